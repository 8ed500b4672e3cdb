"""Training checkpoints of timm's train script, written by timm's own saver: to a pair of folders, and on to the Hub."""

import argparse
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from stand_in import randomise
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn

from hub.server import HubServer
from timm_reparam import ReparamError, is_variant
from timm_reparam.cli import main
from timm_reparam.hub import convert_checkpoint, fuse_checkpoint, load_checkpoint, verify_checkpoint

TINY = dict(channels=(8, 8, 8, 8), stem_width=4)
NAME = 'resnet10t_doconv'
FUSED = f'{NAME}.t_fused'


def settings(**changes) -> argparse.Namespace:
    """Some of what timm's parser gives, None and False where a flag was not given."""
    return argparse.Namespace(
        **dict(
            model=NAME,
            num_classes=4,
            img_size=32,
            in_chans=None,
            input_size=None,
            gp=None,
            bn_eps=None,
            mean=[0.5, 0.5, 0.5],
            pretrained=False,
            pretrained_path=None,
            initial_checkpoint='',
            model_kwargs=TINY,
            data_dir='/home/somebody/photos',
            dataset='',
            val_split='validation',
            output='/home/somebody/output',
            eval_metric='top1',
            lr=0.05,
            amp=False,
        )
        | changes
    )


def built(args: argparse.Namespace, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
    return randomise(model, seed).eval()


def save(folder: Path, model: nn.Module, args: argparse.Namespace, ema: nn.Module | None = None) -> Path:
    """Saves as timm's train script does at the end of an epoch, and gives the file."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(model, optimizer, args=args, model_ema=ema, checkpoint_dir=folder, recovery_dir=folder)
    saver.save_checkpoint(1, metric=61.5)
    return folder / 'last.pth.tar'


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    'name, options',
    [
        ('resnet10t_doconv', {}),
        ('resnet10t_acconv', dict(conv_options=dict(branch_norm='none'))),
        ('resnet10t_refconv', {}),
        ('resnet10t_dyconv', dict(conv_options=dict(temperature_steps=7))),
    ],
)
@pytest.mark.filterwarnings('ignore:.*without pretrained weights')
def test_both_forms_are_saved(tmp_path: Path, name: str, options: dict):
    args = settings(model=f'{name}.c3_in1k', model_kwargs={**TINY, **options})
    model = built(args)
    model.train()(images())  # moves what training moves
    file = save(tmp_path, model.eval(), args)
    folder, report = fuse_checkpoint(file, tmp_path / 'zoo' / f'{name}.t_fused')
    assert report.passed and verify_checkpoint(folder).passed
    train_time, fused = load_checkpoint(tmp_path / 'zoo' / f'{name}.t'), load_checkpoint(folder)
    assert any(map(is_variant, train_time.modules()))
    assert any(map(is_variant, fused.modules())) == name.endswith('dyconv')
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in train_time.state_dict().items())
    expected = model(images())
    assert torch.equal(train_time(images()), expected)
    torch.testing.assert_close(fused(images()), expected, rtol=1e-4, atol=1e-4)


def test_what_the_folders_tell(tmp_path: Path):
    args = settings(pretrained=True)
    file = save(tmp_path, built(args), args)
    folder, report = fuse_checkpoint(file, tmp_path / FUSED)
    for one, form in ((tmp_path / f'{NAME}.t', 'train_time'), (folder, 'fused')):
        facts = json.loads((one / 'training.json').read_text())
        assert facts['form'] == form and facts['fusion'] == report.to_dict()
        assert facts['base_model'] == {'id': 'timm/resnet10t.c3_in1k', 'revision': None, 'license': 'apache-2.0'}
        assert facts['dataset'] == {'name': 'photos', 'split': 'validation'}
        assert facts['metrics'] == {'train_time': {'top1': 61.5}}
        assert facts['recipe']['lr'] == 0.05 and 'amp' not in facts['recipe']
        config = json.loads((one / 'config.json').read_text())['pretrained_cfg']
        assert config['input_size'] == [3, 32, 32] and config['mean'] == [0.5, 0.5, 0.5]
        assert not any('somebody' in path.read_text() for path in one.iterdir() if path.suffix != '.safetensors')


@pytest.mark.parametrize(
    'changes, expected',
    [
        ({}, None),
        (dict(pretrained=True, pretrained_path='x.pth'), dict(id=None, revision=None, license=None)),
        (dict(initial_checkpoint='x.pth'), dict(id=None, revision=None, license=None)),
    ],
)
def test_where_the_weights_started(tmp_path: Path, changes: dict, expected: dict | None):
    args = settings(**changes)
    folder, _ = fuse_checkpoint(save(tmp_path, built(args), args), tmp_path / FUSED)
    assert json.loads((folder / 'training.json').read_text())['base_model'] == expected


def test_settings_that_change_the_model(tmp_path: Path):
    args = settings(input_size=[1, 32, 32], img_size=None, gp='max', mean=None)
    torch.manual_seed(0)
    model = randomise(timm.create_model(NAME, num_classes=4, in_chans=1, global_pool='max', **TINY), 0).eval()
    fuse_checkpoint(save(tmp_path, model, args), tmp_path / FUSED)
    expected = model(images(1))
    assert torch.equal(load_checkpoint(tmp_path / f'{NAME}.t')(images(1)), expected)
    torch.testing.assert_close(load_checkpoint(tmp_path / FUSED)(images(1)), expected, rtol=1e-4, atol=1e-4)


def test_averaged_weights_are_taken(tmp_path: Path):
    args = settings()
    model, other = built(args), built(args, seed=1)
    ema = ModelEmaV3(other)
    fuse_checkpoint(save(tmp_path, model, args, ema), tmp_path / FUSED)
    assert torch.equal(load_checkpoint(tmp_path / f'{NAME}.t')(images()), other(images()))


def test_what_is_refused(tmp_path: Path):
    """Nothing is written."""
    args = settings()
    model = built(args)
    file = save(tmp_path, model, args)
    stock = settings(model='resnet10t')

    def refused(checkpoint: object, *words: str, name: str = FUSED) -> None:
        path = tmp_path / 'other.pth.tar'
        torch.save(checkpoint, path)
        before = set(os.listdir(tmp_path))
        with pytest.raises(ReparamError) as error:
            fuse_checkpoint(path, tmp_path / name)
        assert all(word in str(error.value) for word in words), error.value
        assert set(os.listdir(tmp_path)) == before

    good = torch.load(file, weights_only=False)
    for name in ('fused', f'{NAME}.t', f'{NAME}._fused', 'resnet10t.t_fused', f'{NAME}_fused', f'{NAME}.a b_fused'):
        refused(good, 'tag', name=name)
    refused(good, 'missing/zoo', name=f'missing/zoo/{FUSED}')
    refused(model.state_dict(), 'other.pth.tar', 'not a training checkpoint')
    refused({'state_dict': model.state_dict()}, 'other.pth.tar', 'settings')
    refused({**good, 'args': settings(model='resnet_of_nobody')}, 'other.pth.tar', 'resnet_of_nobody')
    refused({**good, 'args': settings(num_classes=5)}, 'other.pth.tar', 'do not fit', 'fc.weight')
    refused(
        {**good, 'args': stock, 'state_dict': built(stock).state_dict()}, 'nothing to fuse', name='resnet10t.t_fused'
    )
    (tmp_path / 'text').write_text('no checkpoint')
    with pytest.raises(ReparamError, match='text: not a readable checkpoint'):
        fuse_checkpoint(tmp_path / 'text', tmp_path / FUSED)


def test_from_the_command_line_to_the_hub(tmp_path: Path, hub: HubServer, owner: str, capsys: pytest.CaptureFixture):
    args = settings()
    file = save(tmp_path, built(args), args)
    assert main(['fuse', str(file), str(tmp_path / FUSED)]) == 0
    printed = capsys.readouterr().out
    assert f'saved {tmp_path / NAME}.t\n' in printed and f'saved {tmp_path / FUSED}\n' in printed
    assert main(['publish', str(tmp_path / FUSED), owner, '--license', 'mit']) == 0
    assert main(['verify', f'{owner}/{NAME}.t']) == 0
    fused = timm.create_model(f'hf-hub:{owner}/{FUSED}', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    assert not any(map(is_variant, fused.modules()))
    torch.testing.assert_close(fused(images()), built(args)(images()), rtol=1e-4, atol=1e-4)


def test_a_pickled_model_and_weights_alone_name_what_to_do(tmp_path: Path) -> None:
    model = timm.create_model('resnet10t', num_classes=2)
    torch.save({'state_dict': model.state_dict(), 'model': model}, tmp_path / 'model.pth')
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    torch.save({'state_dict': model.state_dict(), 'epoch': 1}, tmp_path / 'no_args.pth')
    for name, words in (
        ('model.pth', 'reading those may run any code; save model.state_dict.. instead'),
        ('weights.pth', 'weights alone are for timm-reparam convert'),
        ('no_args.pth', 'timm-reparam convert takes weights of a model that you name'),
    ):
        with pytest.raises(ReparamError, match=words) as raised:
            fuse_checkpoint(tmp_path / name, tmp_path / 'out_fused')
        assert '\x1b' not in str(raised.value) and '\n' not in str(raised.value) and len(str(raised.value)) < 500
    with pytest.raises(ReparamError, match='may run any code'):
        convert_checkpoint(tmp_path / 'model.pth', tmp_path / 'out', 'resnet10t_doconv')
