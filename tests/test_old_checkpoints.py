"""Checkpoints that earlier versions have saved load for ever, as the functions that they were.

``fixtures/<version>/`` holds pairs as `save_pair` of that version wrote them (all variants, with default and with odd
options), and in ``expected.safetensors`` an input and what every one of them made of it. They are never written anew.
"""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import timm_reparam
from timm_reparam import hub
from timm_reparam.hub.publish import check_claims

FIXTURES = Path(__file__).with_name('fixtures')
FOLDERS = sorted(path.parent for path in FIXTURES.glob('*/*/config.json'))
TRAIN_TIME = [folder for folder in FOLDERS if not folder.name.endswith('_fused')]


def identifier(folder: Path) -> str:
    return f'{folder.parent.name}/{folder.name}'


def expected(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The input of a version's checkpoints, and the output of one of them."""
    tensors = load_file(folder.with_name('expected.safetensors'))
    return tensors['input'], tensors[folder.name]


def assert_as_it_was(model: torch.nn.Module, folder: Path) -> None:
    x, output = expected(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), output, rtol=1e-5, atol=1e-6)


def test_every_variant_is_there_in_both_forms() -> None:
    for variant in timm_reparam.convert.VARIANTS:
        names = {folder.name for folder in FOLDERS if f'_{variant}.' in folder.name}
        assert {f'{name}_fused' for name in names if not name.endswith('_fused')} <= names and len(names) >= 4


@pytest.mark.parametrize('folder', FOLDERS, ids=identifier)
def test_a_folder_loads_as_what_it_was(folder: Path) -> None:
    assert_as_it_was(timm.create_model(f'local-dir:{folder}', pretrained=True), folder)
    assert_as_it_was(hub.load_checkpoint(folder), folder)


@pytest.mark.parametrize('folder', FOLDERS, ids=identifier)
def test_the_claims_of_its_card_are_checked(folder: Path, tmp_path: Path) -> None:
    """Under the headings that cards had then."""
    assert check_claims(folder) == []
    copy = shutil.copytree(folder, tmp_path / folder.name)
    card = (copy / 'README.md').read_text(encoding='utf-8')
    label = 'Algebra, both forms in float64'
    changed = re.sub(rf'- {label}: [^\n]*', f'- {label}: relative difference 0.25', card)
    assert changed != card
    (copy / 'README.md').write_text(changed, encoding='utf-8')
    assert [label in problem for problem in check_claims(copy)] == [True]


@pytest.mark.parametrize('folder', TRAIN_TIME, ids=identifier)
def test_a_pair_is_fused_and_verified_again(folder: Path) -> None:
    x, _ = expected(folder)
    fused_folder = folder.with_name(f'{folder.name}_fused')
    model, fused = hub.load_checkpoint(folder), hub.load_checkpoint(fused_folder)
    assert timm_reparam.verify_fusion(model, fused, inputs=x).passed
    assert_as_it_was(timm_reparam.fuse_model(model), fused_folder)
