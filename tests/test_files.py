"""Files that are complete or not there at all, on the disk before they take their names."""

import os
from pathlib import Path

import pytest
import timm
import torch

import timm_reparam
from timm_reparam._files import write_whole
from timm_reparam.hub import save_pair


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[str]]:
    """By inode, the names under which files and folders were while they were flushed."""
    found: dict[int, set[str]] = {}
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        fsync(descriptor)
        name = os.readlink(f'/proc/self/fd/{descriptor}')
        found.setdefault(os.fstat(descriptor).st_ino, set()).add(Path(name).name)

    monkeypatch.setattr(os, 'fsync', noted)
    return found


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path: Path, synced: dict[int, set[str]]):
    path = tmp_path / 'args.yaml'
    path.write_text('old')
    write_whole(path, b'new')
    assert path.read_bytes() == b'new' and [file.name for file in tmp_path.iterdir()] == ['args.yaml']
    assert synced == {path.stat().st_ino: {'.args.yaml.partial'}, tmp_path.stat().st_ino: {tmp_path.name}}


def test_a_pair_is_on_the_disk_before_it_takes_its_names(tmp_path: Path, synced: dict[int, set[str]]):
    model = timm.create_model('resnet10t_doconv', num_classes=2, channels=(8, 8, 8, 8), stem_width=4).eval()
    fused = timm_reparam.fuse_model(model)
    report = timm_reparam.verify_fusion(model, fused, inputs=torch.randn(2, 3, 32, 32))
    folders = [Path(folder) for folder in save_pair(model, tmp_path / 'zoo', tag='t', fused=fused, report=report)]
    for folder in folders:
        assert synced[folder.stat().st_ino].isdisjoint({folder.name})  # under a name for the time being
        assert all(file.stat().st_ino in synced for file in folder.iterdir())
    assert 'zoo' in synced[(tmp_path / 'zoo').stat().st_ino]
