"""train.py: flags, data, training of every variant, resuming, several processes, the saved result."""

import argparse
import contextlib
import copy
import csv
import dataclasses
import functools
import importlib.machinery
import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from stand_in import add_model, random_model
from timm import utils
from timm.models import load_state_dict
from timm.task import ClassificationTask, resume_task_checkpoint

from timm_reparam import DOConv2d, DynamicConv2d, ReparamError, cli, fuse_model, verify_fusion
from timm_reparam.hub import load_checkpoint
from timm_reparam.hub.training import load_training, read_training
from timm_reparam.training import checkpoint, data, engine, result, rng
from timm_reparam.training import flags as command_line
from timm_reparam.training import model as models
from timm_reparam.training.setup import Setup, choose_device
from timm_reparam.variants import VARIANTS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

OTHER_FLAGS = command_line.OTHER_FLAGS
TIMM_FLAGS = json.loads((Path(__file__).parent / 'timm_flags.json').read_text())
CLASSES, TRAIN_IMAGES, VALIDATION_IMAGES, SIDE = 3, 8, 4, 16

# a net and a schedule that take a moment
TINY = ['--model-kwargs', 'layers=(1,0,0,1)', 'channels=(8,8,8,8)']
SHORT = ['--epochs', '2', '--warmup-epochs', '0', '--lr', '0.05', '-b', '8', '-j', '0']
SIZE = ['--input-size', '3', str(SIDE), str(SIDE), '--num-classes', str(CLASSES)]


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """One thread, as in the subprocesses: sums then have one order everywhere."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope='module')
def few_timings():
    """How long a model takes is measured as ever, in fewer rounds."""
    patch = pytest.MonkeyPatch()
    patch.setattr(result, 'compare_profiles', functools.partial(result.compare_profiles, runs=2, warmup=1))
    yield
    patch.undo()


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """A folder of small images in three classes that differ in colour."""
    root = tmp_path_factory.mktemp('data') / 'photos'
    random = np.random.default_rng(0)
    for split, images in (('train', TRAIN_IMAGES), ('validation', VALIDATION_IMAGES)):
        for label in range(CLASSES):
            folder = root / split / f'class{label}'
            folder.mkdir(parents=True)
            for index in range(images):
                pixels = random.integers(0, 128, (SIDE + 4, SIDE + 2, 3)).astype(np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f'{index}.png')
    return root


@pytest.fixture
def flags(photos, tmp_path):
    """Command line of a short run on the photos that writes into the test's own folder."""

    def make(*extra: str, model: str = 'resnet18_doconv', experiment: str = 'run') -> list[str]:
        places = ['--data-dir', str(photos), '--output', str(tmp_path / 'output'), '--experiment', experiment]
        return [*places, '--zoo', str(tmp_path / 'zoo'), '--model', model, *TINY, *SHORT, *SIZE, *extra]

    return make


def parse(*argv: str) -> argparse.Namespace:
    return train.parse_args(argv)


class Start(NamedTuple):
    """What train_one_epoch is called with, in this order."""

    setup: Setup
    state: checkpoint.CheckpointState
    loader: Any
    saver: checkpoint.Saver | None

    @property
    def args(self) -> argparse.Namespace:
        return self.setup.args


def prepare(argv: list[str]) -> Start:
    """Run the script up to its first epoch."""

    class Prepared(Exception):
        pass

    found = []

    def stop(*arguments):
        found.append(Start(*arguments))
        raise Prepared

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Prepared):
        patch.setattr(train, 'train_one_epoch', stop)
        train.run(train.parse_args(argv))
    return found[0]


def train_only(argv: list[str]) -> int:
    """Run the script without what comes after the last epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'save_result', lambda *arguments: '')
        return train.main(argv)


def refusal(argv: list[str], capsys) -> str:
    """Run the script, which has to fail, and return its error message."""
    assert train.main(argv) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith('train.py: error: ')
    return message


def read_summary(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def same(first, second, place='') -> None:
    """Assert that two nested values are equal, tensors bit for bit."""
    assert type(first) is type(second), place
    if isinstance(first, dict):
        assert first.keys() == second.keys(), place
        for key in first:
            same(first[key], second[key], f'{place}/{key}')
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), place
        for index, pair in enumerate(zip(first, second, strict=True)):
            same(*pair, f'{place}/{index}')
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype and torch.equal(first, second), place
    else:
        assert first == second, place


# Flags


def dest_of(names: str) -> str | None:
    """Where the parser puts a flag of timm's; None where it does not have it."""
    actions = command_line.build_parser()._actions
    found = (action.dest for action in actions if {*names.split()} & {*action.option_strings, action.dest})
    return next(found, None)


def other_dest(names: str) -> str:
    return next(dest for name in names.split() if (dest := name.strip('-').replace('-', '_')) in OTHER_FLAGS)


def test_every_flag_of_timm_has_timms_default():
    parser = command_line.build_parser()
    exceptions = {'--device': None, '-c --config': None}  # the device is chosen, see test_device
    dests = {names: dest_of(names) for names in TIMM_FLAGS}
    found = {
        names: parser.get_default(dest) if dest else OTHER_FLAGS[other_dest(names)] for names, dest in dests.items()
    }
    assert found == {**TIMM_FLAGS, **exceptions}
    assert not OTHER_FLAGS.keys() & dests.values()


def test_other_flags_of_timm_name_the_way():
    for dest in OTHER_FLAGS:
        flag = '--' + dest.replace('_', '-')
        with pytest.raises(ReparamError, match=f'{flag}: .* --device-modules timm_reparam, then timm-reparam fuse'):
            parse('--data-dir', 'somewhere', flag, '3')


@pytest.mark.parametrize(
    'argv, expected',
    [
        (['--no-such-flag'], 'unrecognized arguments: --no-such-flag; see train.py --help'),
        (['--variant', 'fastconv'], "argument --variant: invalid choice: 'fastconv'"),
        (['--tag', 'two words'], 'tag'),
        (['--tag', 'über'], 'tag'),
        (['--tag', 'a--b'], 'tag'),
        (['--conv-options', 'depth_multiplier'], 'expected key=value'),
        (['--epochs', 'many'], 'argument --epochs: invalid int value'),
        (['--clip-mode', 'hard'], '--clip-mode'),
        (['--batch-size', '0'], '--batch-size: expected at least 1, got 0'),
        (['--seed', '-1'], '--seed: expected at least 0, got -1'),
        (['--checkpoint-hist', '0'], '--checkpoint-hist: expected at least 1, got 0'),
        (['--epochs', '0'], '--epochs: expected at least 1, got 0'),
        (['--smoothing', '1.5'], '--smoothing: expected at least 0 and less than 1, got 1.5'),
        (['--smoothing', '-0.1'], '--smoothing: '),
        (['--mixup', '0.2', '-b', '7'], '--batch-size 7: '),
        (['--aug-splits', '1'], '--aug-splits: expected 0 or at least 2, got 1'),
        (['--jsd-loss'], '--jsd-loss'),
        (['--stop-epoch', '0'], '--stop-epoch: expected at least 1, got 0'),
        (['--split-bn'], '--split-bn'),
        (['--sched', 'plateau'], '--sched plateau: deprecated by timm; run timm'),
        (['--mixup', '0.2', '--aug-splits', '3'], '--aug-splits'),
        (['--resume', 'auto'], '--resume auto'),
        (['--license', 'mit'], '--license'),
        (['--publish', 'owner'], 'add --license'),
        (['--log-wandb'], '--log-wandb: the package wandb is not installed'),
        (['--target-key', 'x'], '--target-key x: expected a dataset of kind hfds, got folder; leave the flag out'),
        (['--dataset', 'wds/x'], '--dataset wds/x: streams are not supported; run timm'),
        (['--variant-lr', '2', '--sched', 'none'], '--variant-lr 2: '),
        (['--variant-lr', '-1'], 'argument --variant-lr: expected at least 0, got -1'),
        (['--jsd-loss', '--bce-loss', '--aug-splits', '3'], '--jsd-loss and --bce-loss: choose one'),
        (['--split-bn', '--sync-bn', '--aug-splits', '3'], '--split-bn and --sync-bn'),
        (['--dataset-download'], '--dataset-download'),
        (['--dataset', 'digits'], '--data-dir'),
    ],
)
def test_bad_flags(argv, expected, capsys):
    if '--log-wandb' in argv and command_line.importlib.util.find_spec('wandb'):
        pytest.skip('wandb is installed')
    assert expected in refusal(['--data-dir', 'somewhere', *argv], capsys)


def test_help(capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(['--help'])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert '--decay-epochs' in out and 'python train.py --config args.yaml' in out and '(default: 300)' in out


def test_no_arguments_train_the_digits():
    args = parse()
    assert vars(args).items() >= command_line.DEFAULT_RECIPE.items()
    assert vars(args).items() >= command_line.DIGITS_DATA.items()
    assert args.hflip == 0 and args.vflip == 0
    assert command_line.result_tag(args) == 'digits'


def test_a_flag_changes_one_thing_of_the_recipe():
    args = parse('--epochs', '1', '--variant', 'doconv')
    assert args.epochs == 1 and args.model == 'resnet18_doconv' and args.dataset == 'digits'


def test_a_named_dataset_has_timms_defaults():
    for argv in (['somewhere'], ['--data-dir', 'somewhere'], ['--dataset', 'torch/cifar10']):
        args = parse(*argv)
        assert args.model == 'resnet50' and args.epochs == 300 and args.hflip == 0.5 and args.input_size is None
    digits = parse('--dataset', 'digits', '--input-size', '1', '16', '16')
    assert digits.epochs == 300 and digits.hflip == 0 and digits.input_size == [1, 16, 16]


def test_the_tag_is_the_datasets_name_made_legal():
    for argv, tag in (
        (['--data-dir', '/data/my photos (2)'], 'my-photos-2'),
        (['--data-dir', '/data/birds.tar'], 'birds'),
        (['--dataset', 'hfds/someone/flowers..x'], 'someone-flowers.x'),
        (['--dataset', 'torch/cifar10'], 'cifar10'),
        (['--data-dir', '/data/x', '--tag', 'My_tag.1'], 'My_tag.1'),
    ):
        assert command_line.result_tag(parse(*argv)) == tag


def write_yaml(path: Path, values: dict) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_config_of_timm_with_every_flag_at_its_default(tmp_path):
    flags = {names: default for names, default in TIMM_FLAGS.items() if names != '-c --config'}
    values = {dest_of(names) or other_dest(names): default for names, default in flags.items()}
    config = write_yaml(tmp_path / 'args.yaml', {**values, 'data_dir': 'somewhere', 'lr': '2e-3', 'amp_impl': 'native'})
    args = parse('--config', config)
    expected = parse('--data-dir', 'somewhere', '--lr', '2e-3')
    assert {**vars(args), 'config': None} == vars(expected)


def test_config_round_trip_and_precedence(flags, tmp_path):
    argv = flags(
        '--conv-options', 'depth_multiplier=18', "skip=['conv1']", '--opt', 'adamw', '--opt-betas', '0.8', '0.9'
    )
    written = prepare(argv).saver.folder / 'args.yaml'
    again = vars(parse('--config', str(written)))
    expected = vars(parse(*argv))
    expected['model_kwargs'] = {'layers': [1, 0, 0, 1], 'channels': [8, 8, 8, 8]}  # yaml has lists only
    assert {**again, 'config': None} == expected
    changed = parse('--config', str(written), '--lr', '1', '--conv-options', 'depth_multiplier=9')
    assert changed.lr == 1 and changed.conv_options == {'depth_multiplier': 9} and changed.epochs == 2


def test_a_directory_on_the_command_line_wins_over_that_of_the_config(tmp_path, capsys):
    for index, key in enumerate(('data', 'data_dir')):
        config = write_yaml(tmp_path / f'{index}.yaml', {key: 'old'})
        for argv, expected in ((['new'], 'new'), (['--data-dir', 'new'], 'new'), ([], 'old')):
            args = parse('--config', config, *argv)
            assert args.data_dir == expected and args.data in (None, expected)
    both = parse('--config', write_yaml(tmp_path / 'both.yaml', {'data': 'old', 'data_dir': 'used'}))
    assert both.data == both.data_dir == 'used'
    assert parse('same', '--data-dir', 'same').data_dir == 'same'
    message = refusal(['one', '--data-dir', 'two'], capsys)
    assert '--data-dir two' in message and 'one' in message


def test_config_with_the_gaps_that_timm_leaves(tmp_path):
    values = dict(
        data_dir='somewhere', smoothing=None, eval_metric=None, decay_epochs=None, fuser=None, class_map=None,
        multilabel_threshold=None, save_epochs=None, color_jitter=None, dist_bn='', a_flag_to_come=None, another=False,
        num_gpu=1,
    )  # fmt: skip
    args = parse('--config', write_yaml(tmp_path / 'args.yaml', values))
    assert args.smoothing == 0.1 and args.eval_metric == 'top1' and args.color_jitter is None and args.dist_bn == ''
    assert not hasattr(args, 'a_flag_to_come')


@pytest.mark.parametrize(
    'values, expected',
    [
        ({'lr': 0.1, 'learning_rate': 0.1}, 'learning_rate: no flag of that name'),
        ({'naflex_loader': True}, 'naflex_loader: True: a flag of timm'),
        ({'native_amp': True}, "run timm's own script with --device-modules timm_reparam, then timm-reparam fuse"),
        ({'amp': 'yes'}, "amp: expected bool, got 'yes'"),
        ({'epochs': 'many'}, "epochs: argument --epochs: invalid int value: 'many'"),
        ({'epochs': 2.5}, "epochs: argument --epochs: invalid int value: '2.5'"),
        ({'lr': True}, "lr: argument --lr: invalid float value: 'True'"),
        ({'input_size': [3, 'x', 1]}, "input_size: argument --input-size: invalid int value: 'x'"),
        ({'clip_mode': 'hard'}, "clip_mode: argument --clip-mode: invalid choice: 'hard'"),
        ({'model_kwargs': 3}, 'model_kwargs: expected dict, got 3'),
        ({'epochs': 0}, 'expected at least 1, got 0'),
        (['lr'], 'expected flags and their values'),
    ],
)
def test_bad_config(values, expected, tmp_path, capsys):
    config = write_yaml(tmp_path / 'args.yaml', values)
    assert expected in refusal(['--config', config, '--data-dir', 'somewhere'], capsys)


def test_missing_config(tmp_path, capsys):
    assert 'none.yaml' in refusal(['--config', str(tmp_path / 'none.yaml')], capsys)


def test_device(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.accelerator, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    config = write_yaml(tmp_path / 'args.yaml', {'device': 'cuda'})  # timm's default, asked for by nobody
    for argv in ([], ['--config', config]):
        assert choose_device(parse('--data-dir', 'somewhere', *argv)).type == 'cpu'
    assert '--device cuda: there is no CUDA device' in refusal(flags('--device', 'cuda'), capsys)


# Data


def test_digits_are_split_once_and_evenly():
    splits = data.Digits('train'), data.Digits('validation', 'L')
    assert [len(split) for split in splits] == [1437, 360]
    for split in splits:
        assert np.ptp(np.bincount(split.targets)) <= 10 * len(split) / 1437
    image, label = splits[0][0]
    assert image.mode == 'RGB' and image.size == (8, 8) and splits[1][0][0].mode == 'L' and label in range(10)
    assert np.array_equal(data.Digits('train').images, splits[0].images)
    pixels = {image.tobytes() for image in splits[0].images}
    assert sum(image.tobytes() in pixels for image in splits[1].images) <= 3


def test_digits_without_scikit_learn(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    message = refusal(['--epochs', '1', '--output', str(tmp_path / 'o'), '--zoo', str(tmp_path / 'z')], capsys)
    assert "pip install 'timm-reparam[demo]'" in message
    assert not any(tmp_path.iterdir())


def test_no_folder_of_the_default_split_is_said(flags, photos, caplog):
    """A folder of classes is a dataset, one of splits with other names looks the same."""
    for folder, said in ((photos / 'train', True), (photos, False)):
        caplog.clear()
        prepare([*flags('--val-split=', experiment=folder.name), '--data-dir', str(folder)])
        assert ("no folder 'train'" in caplog.text) == said


def test_bad_folders(flags, photos, tmp_path, capsys):
    def refused(root: Path, *extra: str) -> str:
        return refusal([*flags(*extra), '--data-dir', str(root)], capsys)

    assert 'no such file or folder' in refused(tmp_path / 'nowhere')

    empty = tmp_path / 'empty'
    (empty / 'train').mkdir(parents=True)
    (empty / 'validation').mkdir()
    assert str(empty) in refused(empty)

    flat = tmp_path / 'flat'
    for split in ('train', 'validation'):
        (flat / split).mkdir(parents=True)
        shutil.copy(photos / 'train/class0/0.png', flat / split)
    assert 'no classes' in refused(flat)

    half = tmp_path / 'half'
    shutil.copytree(photos / 'train', half / 'train')
    assert "no split 'validation'" in refused(half)

    leak = tmp_path / 'leak'
    shutil.copytree(photos / 'train', leak / 'trn')
    shutil.copytree(photos / 'validation', leak / 'val')
    message = refused(leak)
    assert "no split 'train'" in message and '--train-split' in message
    for extra in ([], ['--val-split=']):
        assert "no split 'nosuch'" in refusal(flags('--train-split', 'nosuch', *extra), capsys)

    unequal = tmp_path / 'unequal'
    shutil.copytree(photos, unequal)
    shutil.rmtree(unequal / 'validation' / 'class1')
    assert 'different classes (class1)' in refused(unequal)

    assert 'the dataset has 3 classes' in refusal(flags('--num-classes', '2'), capsys)
    for kind in ('hfds/no/such', 'torch/imagenet'):  # not installed, offline, or not there
        assert 'no usable split' in refused(empty, '--dataset', kind)
    assert 'larger than the training split' in refusal(flags('-b', '100'), capsys)
    assert 'RepeatAugment' in refusal(flags('--aug-repeats', '3'), capsys)
    assert not (tmp_path / 'output').exists() and not (tmp_path / 'zoo').exists()


def test_random_stream_is_its_own():
    device = torch.device('cpu')
    utils.random_seed(0)
    expected = torch.rand(1).item(), np.random.rand()
    utils.random_seed(0)
    stream = rng.RandomStream(device, 1, 2)
    with stream:
        first = torch.rand(2), np.random.rand()
    assert (torch.rand(1).item(), np.random.rand()) == expected
    again = rng.RandomStream(device, 1, 2)
    with again:
        head = torch.rand(1)
    torch.rand(5)
    with again:
        assert torch.equal(torch.cat((head, torch.rand(1))), first[0]) and np.random.rand() == first[1]
    with rng.RandomStream(device, 1, 3):
        assert not torch.equal(torch.rand(2), first[0])


# Training


def load_folder(folder: Path) -> torch.nn.Module:
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


@pytest.mark.filterwarnings('always:.*without pretrained weights')  # of RefConv
@pytest.mark.parametrize('variant', sorted(VARIANTS))
def test_every_variant_trains_and_is_saved_in_both_forms(variant, flags, tmp_path, capsys, recwarn):
    assert train.main(flags('--variant', variant, model='resnet18')) == 0
    warned = [warning for warning in recwarn if 'without pretrained weights' in str(warning.message)]
    assert len(warned) == (variant == 'refconv')

    rows = read_summary(tmp_path / 'output/run')
    assert [row['epoch'] for row in rows] == ['0', '1'] and all(float(row['eval_top1']) >= 0 for row in rows)
    zoo = tmp_path / 'zoo'
    names = [f'resnet18_{variant}.photos', f'resnet18_{variant}.photos_fused']
    assert sorted(path.name for path in zoo.iterdir()) == names
    for name in names:
        files = {path.name for path in (zoo / name).iterdir()}
        assert files == {'config.json', 'model.safetensors', 'README.md', 'training.json'}
    architecture = f'resnet18_{variant}' if variant == 'dyconv' else 'resnet18'
    assert json.loads((zoo / names[1] / 'config.json').read_text())['architecture'] == architecture

    model, fused = map(load_folder, (zoo / name for name in names))
    assert any(isinstance(module, VARIANTS[variant].layer) for module in model.modules())
    images = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fused(images), model(images), rtol=1e-4, atol=1e-5)
    best = torch.load(tmp_path / 'output/run/model_best.pth.tar', weights_only=True)['state_dict']
    same(dict(model.state_dict()), dict(best))

    facts = json.loads((zoo / names[0] / 'training.json').read_text())
    assert facts['dataset']['validation_images'] == CLASSES * VALIDATION_IMAGES
    assert facts['fusion']['num_inputs'] == CLASSES * VALIDATION_IMAGES
    table = capsys.readouterr().out
    for text in (
        'top-1',
        'largest logit difference',
        'worst layer',
        'parameters',
        'MACs',
        'latency',
        str(zoo / names[1]),
    ):
        assert text in table


def test_any_other_architecture_becomes_a_variant(flags, tmp_path):
    assert train.main(flags('--epochs', '1', '--variant', 'acconv', model='seresnet18')) == 0
    load_folder(tmp_path / 'zoo/seresnet18_acconv.photos')
    load_folder(tmp_path / 'zoo/seresnet18_acconv.photos_fused')
    assert parse('x', '--model', 'seresnet18_acconv').model == 'seresnet18_acconv'


def test_variant_names(capsys, flags):
    def name(*argv: str) -> str:
        return models.model_name(parse('somewhere', *argv))

    assert name('--model', 'resnet18.a1_in1k', '--variant', 'refconv') == 'resnet18_refconv.a1_in1k'
    assert name('--model', 'resnet18_doconv', '--variant', 'doconv') == 'resnet18_doconv'
    assert name('--model', 'resnet18') == 'resnet18'
    assert name('--model', 'local-dir:zoo/x') == 'local-dir:zoo/x'
    assert timm.is_model(name('--model', 'regnetx_002_doconv'))
    assert 'is a variant already' in refusal(flags('--variant', 'acconv'), capsys)
    assert '--variant acconv' in refusal(flags('--variant', 'acconv', model='hf-hub:a/b'), capsys)
    assert '--conv-options' in refusal(flags('--conv-options', 'skip=x', model='resnet18'), capsys)
    for unknown in ('resnet18_fastconv', 'resnet_of_nobody_doconv'):
        assert unknown.removesuffix('_doconv') in refusal(flags(model=unknown), capsys)
    assert 'depth_multiplier' in refusal(flags('--conv-options', 'depth_multiplier=2'), capsys)


def test_a_stock_model_gives_one_folder_that_refconv_starts_from(flags, tmp_path, capsys, caplog):
    assert train.main(flags(model='resnet18')) == 0
    assert [path.name for path in (tmp_path / 'zoo').iterdir()] == ['resnet18.photos']
    assert 'nothing to fuse' in capsys.readouterr().out
    stock = load_folder(tmp_path / 'zoo/resnet18.photos')

    caplog.clear()
    base = ['--pretrained-path', str(tmp_path / 'zoo/resnet18.photos')]
    run = prepare(flags(*base, model='resnet18_refconv', experiment='refocused'))
    assert not [record for record in caplog.records if 'pretrained weights' in record.getMessage()]
    layer = run.state.model.layer1[0].conv1
    assert torch.equal(layer.weight, stock.layer1[0].conv1.weight)
    engine.train_one_epoch(*run)
    assert torch.equal(layer.weight, stock.layer1[0].conv1.weight) and layer.map_weight.any()

    # a file of the stock model is taken as a lift, too, but not as a run to go on with
    last = str(tmp_path / 'output/run/last.pth.tar')
    run = prepare(flags('--initial-checkpoint', last, model='resnet18_doconv', experiment='initial'))
    layer = run.state.model.layer1[0].conv1
    assert torch.equal(layer.weight, torch.load(last)['state_dict']['layer1.0.conv1.weight'])
    assert not layer.depthwise_weight.any()
    resumed = torch.load(last, weights_only=True) | {'arch': 'resnet18_doconv'}
    torch.save(resumed, tmp_path / 'as_variant.pth.tar')
    message = refusal(flags('--resume', str(tmp_path / 'as_variant.pth.tar'), experiment='x'), capsys)
    assert 'does not fit this model, missing' in message and '--initial-checkpoint' in message


def add_narrow(hub, name: str) -> torch.nn.Module:
    """Serve a stand-in for what timm has published under this name, as narrow as the models here."""
    model = random_model(name, layers=(1, 0, 0, 1), channels=(8, 8, 8, 8))
    add_model(hub, f'timm/{name}', model, '---\nlicense: apache-2.0\n---\n')
    return model


def test_published_weights_are_lifted_and_named_in_the_facts(flags, hub, tmp_path, caplog):
    stock = add_narrow(hub, 'resnet10t.c3_in1k')
    argv = flags('--variant', 'refconv', '--pretrained', '--epochs', '1', model='resnet10t.c3_in1k')
    lifted = prepare(argv).state.model
    assert torch.equal(lifted.layer4[0].conv2.weight, stock.layer4[0].conv2.weight)
    assert not [record for record in caplog.records if 'pretrained weights' in record.getMessage()]
    assert train.main([*argv, '--variant', 'doconv', '--experiment', 'whole']) == 0
    folder = tmp_path / 'zoo/resnet10t_doconv.photos'
    facts = json.loads((folder / 'training.json').read_text())
    commit = hub.repos['timm/resnet10t.c3_in1k'].branches['main'].oid
    assert facts['base_model'] == dict(id='timm/resnet10t.c3_in1k', revision=commit, license='apache-2.0')
    assert facts['recipe']['pretrained'] is True
    assert not any(str(tmp_path) in str(value) for value in facts.values())


def test_a_dropped_connection_is_one_line(flags, hub, tmp_path, capsys):
    add_narrow(hub, 'resnet10t.c3_in1k')
    hub.faults.add('drop_before', path='/timm/resnet10t.c3_in1k/', times=None)
    argv = flags('--variant', 'doconv', '--pretrained', model='resnet10t.c3_in1k')
    try:
        assert '--model resnet10t.c3_in1k: ' in refusal(argv, capsys)
    finally:
        hub.clear()
    assert not (tmp_path / 'output').exists()


def dynamic_layer(run: Start) -> DynamicConv2d:
    return next(module for module in run.state.model.modules() if isinstance(module, DynamicConv2d))


def test_temperature_is_annealed_in_forward_passes(flags):
    dynamic = flags('--epochs', '6', '-b', '4', '--grad-accum-steps', '3', model='resnet18_dyconv')
    run = prepare(dynamic)
    batches = CLASSES * TRAIN_IMAGES // 4
    assert dynamic_layer(run).temperature_steps == batches * 6 // 3
    engine.train_one_epoch(*run)
    assert dynamic_layer(run).temperature_position == batches  # one a forward pass, with two updates

    long = prepare([*dynamic, '--epochs', '60', '--experiment', 'long'])
    assert dynamic_layer(long).temperature_steps == batches * 10
    given = prepare([*dynamic, '--conv-options', 'temperature_steps=7', '--experiment', 'given'])
    assert dynamic_layer(given).temperature_steps == 7
    without = prepare([*dynamic, '--conv-options', 'temperature=None', '--experiment', 'without'])
    assert dynamic_layer(without).temperature_steps is None


def test_accumulation_makes_updates_of_whole_groups(flags, monkeypatch):
    """Each batch counts by its share of its group, of which the last one may be smaller; each group is one update."""
    run = prepare(flags('--epochs', '1', '-b', '4', '--grad-accum-steps', '4'))
    scaled, plain, steps = [], [], []
    backward, task, step = engine.backward, run.state.task, run.state.optimizer.step

    def noted(args, state, loss: torch.Tensor, is_last: bool) -> None:
        scaled.append(loss.item())
        backward(args, state, loss, is_last)

    monkeypatch.setattr(engine, 'backward', noted)
    task.register_forward_hook(lambda module, inputs, output: plain.append(output['loss'].item()))
    monkeypatch.setattr(run.state.optimizer, 'step', lambda *args, **kw: (steps.append(len(scaled)), step(*args, **kw)))
    engine.train_one_epoch(*run)
    batches = len(run.loader)
    last = batches % 4
    assert batches > 4 and last and steps == [*range(4, batches, 4), batches]
    groups = [4.0] * (batches - last) + [float(last)] * last
    assert [value / loss for value, loss in zip(plain, scaled)] == pytest.approx(groups, rel=1e-5)


def test_resuming_keeps_the_temperature(flags):
    first = flags('--epochs', '3', '--resume', 'auto', model='resnet18_dyconv')
    assert train_only([*first, '--stop-epoch', '1']) == 0
    resumed = prepare([*first, '--epochs', '30'])
    batches = CLASSES * TRAIN_IMAGES // 8
    layer = dynamic_layer(resumed)
    assert resumed.state.position.epoch == 1 and layer.temperature_position == layer.temperature_steps == batches


@pytest.mark.parametrize(
    'extra, kind, attributes',
    [
        ('', 'LabelSmoothingCrossEntropy', dict(smoothing=0.1)),
        ('--smoothing 0', 'CrossEntropyLoss', {}),
        ('--mixup 0.2', 'SoftTargetCrossEntropy', {}),
        ('--jsd-loss --aug-splits 3', 'JsdCrossEntropy', dict(num_splits=3)),
        ('--bce-loss --smoothing 0', 'BinaryCrossEntropy', dict(smoothing=0)),
    ],
)
def test_losses(extra, kind, attributes):
    args = parse('somewhere', '--num-classes', '3', *extra.split())
    args.rank = 0
    loss = models.create_task(args, torch.nn.Identity(), torch.device('cpu')).criterion
    assert type(loss).__name__ == kind
    assert {name: getattr(loss, name) for name in attributes} == attributes
    target = torch.rand(6, 3).softmax(1) if args.mixup else torch.arange(6) % 3
    assert loss(torch.randn(6, 3), target).isfinite()


def test_stopping_before_the_end_of_the_schedule(flags, tmp_path, capsys):
    argv = flags('--epochs', '3', '--sched', 'wsd', '--val-interval', '3')
    assert train_only([*argv, '--experiment', 'whole']) == 0
    stopped = [*argv, '--experiment', 'stopped', '--resume', 'auto']
    assert train_only([*stopped, '--stop-epoch', '1']) == 0
    folder, whole = tmp_path / 'output/stopped', tmp_path / 'output/whole'
    assert [row['epoch'] for row in read_summary(folder)] == ['0']
    assert train_only(stopped) == 0
    found, expected = (torch.load(path / 'last.pth.tar', weights_only=True) for path in (folder, whole))
    same(found['state_dict'], expected['state_dict'])
    same(found['optimizer'], expected['optimizer'])
    assert '--stop-epoch 5' in refusal([*argv, '--stop-epoch', '5', '--experiment', 'x'], capsys)


MANY_FLAGS = {
    'mixed images': '--bce-loss --bce-target-thresh 0.2 --mixup 0.2 --cutmix 1 --mixup-off-epoch 1 --reprob 0.5 '
    '--aa rand-m5-n1 --workers 1',
    'augmentation splits': '--aug-splits 3 --jsd-loss --split-bn --resplit --reprob 0.3 --aa augmix-m3 --epochs 1',
    'compiled': '--torchcompile eager --model-ema --clip-grad 1',
    # 32 pixels: PyTorch's own kernels give NaN gradients for 1x1 images in bfloat16 and channels_last, on some CPUs
    'mixed precision': '--amp --amp-dtype bfloat16 --channels-last --clip-grad 1 --clip-mode value '
    '--input-size 3 32 32 --epochs 1',
    'layer decay': '--opt lamb --layer-decay 0.7 --opt-eps 1e-6 --opt-kwargs '
    'max_grad_norm=2 --variant-lr 0.5 --grad-checkpointing --grad-accum-steps 2 --drop 0.1 --drop-path 0.1 --epochs 1',
    'schedule on updates': '--sched-on-updates --sched poly --warmup-epochs 1 --warmup-prefix --lr-noise 0.2 0.9 '
    '--input-size 1 16 16 --mean 0.5 --std 0.2 --no-aug --val-split= --checkpoint-hist 1 --epochs 1',
}


@pytest.mark.parametrize(
    'extra',
    [
        pytest.param(extra, id=name, marks=pytest.mark.slow if name == 'compiled' else [])
        for name, extra in MANY_FLAGS.items()
    ],
)
def test_many_flags(extra, flags, tmp_path):
    assert train.main(flags(*extra.split())) == 0
    load_folder(tmp_path / 'zoo/resnet18_doconv.photos')
    fused = load_folder(tmp_path / 'zoo/resnet18_doconv.photos_fused')
    assert not any(isinstance(module, DOConv2d) for module in fused.modules())


@pytest.mark.parametrize(
    'model',
    ['resnet18_doconv', *(pytest.param(f'resnet18_{name}', marks=pytest.mark.slow) for name in ('acconv', 'dyconv'))],
)
def test_what_is_compiled_shares_its_state_with_what_is_saved(model, flags):
    run = prepare(flags('--torchcompile', 'eager', '--weight-decay', '0.1', model=model))
    before = {name: value.clone() for name, value in run.state.model.state_dict().items()}
    assert run.state.task.get_trainable_module() is not run.state.model
    engine.train_one_epoch(*run)
    after = run.state.model.state_dict()
    still = [
        name for name in before if torch.equal(before[name], after[name]) and not name.endswith('temperature_steps')
    ]
    assert not still


# timm's reader leaves the archive open
@pytest.mark.filterwarnings('ignore:.*pictures.tar:pytest.PytestUnraisableExceptionWarning')
def test_tar(flags, photos, tmp_path):
    archive = shutil.make_archive(str(tmp_path / 'pictures'), 'tar', photos / 'train')
    assert train.main([*flags('--epochs', '1', '--val-split='), '--data-dir', archive]) == 0
    assert (tmp_path / 'zoo/resnet18_doconv.pictures').is_dir()


def test_adaptive_clipping_leaves_what_a_variant_adds_alone(flags):
    run = prepare(flags('--clip-grad', '0.01', '--clip-mode', 'agc'))
    model = run.state.model
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    parameters = models.clipped_parameters(run.args, model, run.state.task)
    clipped = {names[parameter.data_ptr()] for parameter in parameters}
    assert 'layer1.0.conv1.weight' in clipped and 'fc.weight' not in clipped
    assert not any(name.endswith('depthwise_weight') for name in clipped)
    engine.train_one_epoch(*run)
    assert model.layer1[0].conv1.depthwise_weight.any()


ADDED = {
    'acconv': ('layer1.0.conv1.horizontal_weight', 'layer1.0.conv1.vertical_weight'),
    'dbbconv': tuple(f'layer1.0.conv1.{name}_weight' for name in ('inner', 'mean', 'outer', 'point')),
    'doconv': ('layer1.0.conv1.depthwise_weight', 'layer1.0.conv1.surplus_weight'),
    'dyconv': ('layer1.0.conv1.residual_weight',),
    'orepaconv': tuple(
        f'layer1.0.conv1.{name}_weight'
        for name in ('depthwise', 'inner', 'mean', 'outer', 'point', 'pointwise', 'prior')
    ),
    'refconv': ('layer1.0.conv1.map_weight',),
}


@pytest.mark.filterwarnings('ignore:.*without pretrained weights')
@pytest.mark.parametrize('variant', sorted(VARIANTS))
def test_the_kernels_that_a_variant_adds(variant):
    options = {'doconv': dict(depth_multiplier=18, skip=['conv1']), 'orepaconv': dict(skip=['*downsample*'])}
    size = dict(layers=(1, 0, 0, 1), channels=(8, 8, 8, 8))
    model = timm.create_model(f'resnet18_{variant}', conv_options=options.get(variant), **size)
    added = {id(parameter) for parameter in models.added_kernels(model)}
    found = [name for name, parameter in model.named_parameters() if id(parameter) in added]
    assert tuple(sorted(name for name in found if name.startswith('layer1.0.conv1.'))) == ADDED[variant]
    kinds = {name.rpartition('.')[2] for name in ADDED[variant]}
    assert {name.rpartition('.')[2] for name in found} == kinds
    assert not models.added_kernels(timm.create_model('resnet18', **size))


def rates(run: Start) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter."""
    names = {id(parameter): name for name, parameter in run.state.model.named_parameters()}
    groups = run.state.optimizer.param_groups
    return {names[id(each)]: (group['lr'], group['weight_decay']) for group in groups for each in group['params']}


@pytest.mark.parametrize(
    'extra',
    ['--weight-decay 0.1', '--layer-decay 0.5 --opt adamw', '--warmup-epochs 1 --layer-decay 0.5 --weight-decay 0'],
)
def test_the_rate_of_added_kernels(extra, flags):
    plain, scaled = (
        prepare(flags(*extra.split(), *more, model='resnet18_acconv', experiment=f'{len(more)}'))
        for more in ([], ['--variant-lr', '0.25'])
    )
    before, after = rates(plain), rates(scaled)
    assert before.keys() == after.keys()
    for name, (lr, decay) in before.items():
        is_added = name.endswith(('vertical_weight', 'horizontal_weight'))
        assert after[name] == (lr * (0.25 if is_added else 1), decay), name
    assert len({lr for lr, _ in before.values()}) > 1 or 'layer-decay' not in extra
    for run in (plain, scaled):
        engine.train_one_epoch(*run)
        run.state.scheduler.step(1)
    before, after = rates(plain), rates(scaled)
    assert all(
        after[name][0] == lr * (0.25 if name.endswith(('vertical_weight', 'horizontal_weight')) else 1)
        for name, (lr, _) in before.items()
    )


def test_the_rate_of_added_kernels_is_resumed(flags, tmp_path):
    argv = flags('--variant-lr', '0.25', '--opt', 'adamw', '--sched-on-updates')
    assert train.main([*argv, '--experiment', 'whole']) == 0
    first = str(tmp_path / 'output/whole/checkpoint-0.pth.tar')
    assert train.main([*argv, '--resume', first]) == 0
    files = (tmp_path / f'output/{name}/last.pth.tar' for name in ('run', 'whole'))
    found, expected = (torch.load(file, weights_only=True) for file in files)
    same(found['optimizer'], expected['optimizer'])
    same(found['state_dict'], expected['state_dict'])
    facts = json.loads((tmp_path / 'zoo/resnet18_doconv.photos/training.json').read_text())
    assert facts['recipe']['variant_lr'] == 0.25

    # another factor is the new run's own, like another --lr
    runs = [prepare([*argv, '--resume', first, '--experiment', x, '--variant-lr', x]) for x in ('0.25', '0.5')]
    (lr, _), (doubled, _) = (rates(run)['layer1.0.conv1.depthwise_weight'] for run in runs)
    assert doubled == 2 * lr and rates(runs[0])['fc.weight'] == rates(runs[1])['fc.weight']


def test_a_stock_model_has_no_kernels_of_a_variant(flags, capsys):
    message = refusal(flags('--variant-lr', '2', model='resnet18'), capsys)
    assert '--variant-lr 2: resnet18 has no kernels of a variant; add --variant' in message


def test_the_average_is_validated_and_saved(flags, tmp_path, monkeypatch):
    start = prepare(flags('--model-ema', experiment='start')).state.model.fc.weight
    averaged, validated, fuse_form = [], [], engine.fuse_form
    monkeypatch.setattr(train, 'distribute_statistics', lambda args, model: averaged.append(model))
    monkeypatch.setattr(
        engine,
        'fuse_form',
        lambda setup, weights: validated.append(copy.deepcopy(weights)) or fuse_form(setup, weights),
    )
    assert train.main(flags('--model-ema', '--model-ema-decay', '0.5')) == 0
    assert len(averaged) == 4 and len({id(model) for model in averaged}) == 2  # model and average, after each epoch
    best = torch.load(tmp_path / 'output/run/model_best.pth.tar', weights_only=True)
    saved = load_folder(tmp_path / 'zoo/resnet18_doconv.photos').state_dict()
    same(dict(saved), dict(best['state_dict_ema']))
    same(dict(validated[best['epoch']]), dict(best['state_dict_ema']))
    assert not torch.equal(saved['fc.weight'], best['state_dict']['fc.weight'])
    assert not torch.equal(saved['fc.weight'], start)


def test_not_a_number(flags, tmp_path, capsys):
    assert train_only(flags('--epochs', '1')) == 0
    before = (tmp_path / 'output/run/last.pth.tar').read_bytes()
    message = refusal(flags('--resume', 'auto', '--lr', '1e30', '--epochs', '4', '--no-resume-opt'), capsys)
    assert 'the loss is nan' in message or 'the loss is inf' in message or 'NaN or infinity' in message
    assert (tmp_path / 'output/run/last.pth.tar').read_bytes() == before

    run = prepare(flags(experiment='other'))
    run.state.model.bn1.running_var[0] = float('nan')
    with pytest.raises(ReparamError, match='bn1.running_var'):
        run.saver.save_checkpoint(0)
    assert not checkpoint.checkpoints_in(run.saver.folder)


def test_a_fusion_that_is_not_verified_stops_the_run(flags, tmp_path, capsys, monkeypatch):
    def wrong_fusion(model):
        fused = fuse_model(model)
        with torch.no_grad():
            fused.conv1.weight.mul_(1.01)
        return fused

    monkeypatch.setattr(engine, 'fuse_model', wrong_fusion)
    message = refusal(flags(), capsys)
    assert 'epoch 0' in message and 'NOT verified' in message
    assert not (tmp_path / 'zoo').exists() and not checkpoint.checkpoints_in(tmp_path / 'output/run')


def test_a_verification_is_not_a_matter_of_luck(flags, tmp_path, monkeypatch):
    seen = []

    def unlucky_with_few(model, fused, *, inputs):
        report = verify_fusion(model, fused, inputs=inputs)
        seen.append(report.num_inputs)
        few = report.num_inputs < engine.NOISE_IMAGES
        return dataclasses.replace(report, stored=2.1 * report.bound / 2) if few else report

    monkeypatch.setattr(engine, 'verify_fusion', unlucky_with_few)
    assert train.main(flags('--epochs', '1')) == 0
    images = CLASSES * VALIDATION_IMAGES
    assert seen == [8, 8 + engine.NOISE_IMAGES, images, images + engine.NOISE_IMAGES]
    assert (tmp_path / 'zoo/resnet18_doconv.photos_fused').is_dir()


@pytest.mark.parametrize(
    'extra, expected',
    [
        ('--model resnet18_doconv.no_tag', 'Invalid pretrained tag'),
        ('--model resnet18.a3_in1k --variant doconv --pretrained', '--model resnet18.a3_in1k'),  # not on the Hub
        ('--model-kwargs no_such=1', '--model resnet18_doconv: '),
        ('--model dla46_c --variant doconv --grad-checkpointing --model-kwargs', '--grad-checkpointing'),
        ('--device no_such', '--device no_such'),
        ('--device-modules no.such', '--device-modules'),
        ('--interpolation no_such', 'no_such'),
        ('--train-interpolation no_such', 'training loader'),
        ('--scale 1', 'training loader'),
    ],
)
def test_what_timm_refuses_is_one_line(extra, expected, flags, hub, tmp_path, capsys):
    assert expected in refusal(flags(*extra.split()), capsys)
    assert not (tmp_path / 'output').exists() and not (tmp_path / 'zoo').exists()


def test_sizes_that_a_model_cannot_take(flags, capsys):
    def make(*extra: str) -> list[str]:
        argv = [flag for flag in flags(model='vit_tiny_patch16_224') if flag not in TINY]
        return [*argv, '--variant', 'doconv', *extra]

    assert 'requires (224, 224)' in refusal(make(), capsys)
    assert '--in-chans' in refusal(flags('--in-chans', '1'), capsys)
    run = prepare(make('--model-kwargs', f'img_size={SIDE}'))
    assert next(iter(run.loader))[0].shape[1:] == (3, SIDE, SIDE)


def test_places_that_cannot_be_written_to(flags, tmp_path, capsys):
    (tmp_path / 'file').write_text('not a folder')
    argv = flags()
    place = {name: argv.index(name) + 1 for name in ('--zoo', '--output')}
    for name in ('--zoo', '--output'):
        wrong = list(argv)
        wrong[place[name]] = str(tmp_path / 'file/inside')
        assert name in refusal(wrong, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['file']


def test_a_full_disk(flags, tmp_path, capsys):
    assert train_only(flags('--epochs', '1')) == 0
    folder = tmp_path / 'output/run'
    before = {path: path.read_bytes() for path in folder.glob('*.pth.tar')}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        message = refusal(flags('--epochs', '2', '--resume', 'auto'), capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f'{folder}: the checkpoint of epoch 1 cannot be written' in message
    assert {path: path.read_bytes() for path in folder.glob('*.pth.tar')} == before


def test_batch_norms_are_not_synchronised_on_the_cpu(flags):
    run = prepare(flags('--sync-bn'))  # of no effect in one process
    run.args.distributed = True
    with pytest.raises(ReparamError, match='--sync-bn'):
        models.convert_norms(run.args, run.state.model, run.setup.device)


def test_a_zoo_that_holds_another_model(flags, tmp_path, capsys):
    assert train.main(flags('--epochs', '1', '--tag', 'x')) == 0
    assert train.main(flags('--epochs', '1', '--tag', 'x', experiment='again')) == 0  # the same model is replaced
    fused = tmp_path / 'zoo/resnet18_doconv.x_fused'
    config = json.loads((fused / 'config.json').read_text())
    (fused / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet34'}))
    before = {path: path.read_bytes() for path in (tmp_path / 'zoo').rglob('*') if path.is_file()}
    assert 'got one of resnet34' in refusal(flags('--tag', 'x', experiment='third'), capsys)
    assert {path: path.read_bytes() for path in (tmp_path / 'zoo').rglob('*') if path.is_file()} == before
    assert not (tmp_path / 'output/third').exists()


def test_lines_of_progress_in_a_log(flags, caplog):
    run = prepare(flags('--log-interval', '2', '-b', '4'))
    with caplog.at_level(logging.INFO):
        engine.train_one_epoch(*run)
    lines = [record.getMessage() for record in caplog.records if 'images/s' in record.getMessage()]
    assert [line.split()[:3] for line in lines] == [['epoch', '0', f'{done}/6'] for done in (1, 3, 5, 6)]


# Checkpoints and resuming


def test_checkpoints_are_read_without_running_code_and_by_timm(flags, tmp_path):
    assert train_only(flags('--epochs', '1', '--model-ema')) == 0
    path = tmp_path / 'output/run/last.pth.tar'
    saved = torch.load(path, weights_only=True)
    assert saved['arch'] == 'resnet18_doconv' and saved['epoch'] == 0 and saved['args']['epochs'] == 1
    run = prepare(flags(experiment='other'))
    task = ClassificationTask(run.state.model, criterion=torch.nn.CrossEntropyLoss())
    assert resume_task_checkpoint(task, str(path), optimizer=run.state.optimizer) == 1
    same(dict(run.state.model.state_dict()), dict(saved['state_dict']))
    same(dict(load_state_dict(str(path))), dict(saved['state_dict_ema']))


@pytest.mark.parametrize(
    'extra',
    [
        pytest.param((), marks=pytest.mark.slow),
        ('--model-ema', '--aug-splits', '2', '--split-bn'),
        ('--variant', 'doconv', '--conv-options', 'skip=layer1.*', 'init=lift'),
    ],
    ids=' '.join,
)
def test_checkpoints_are_models_for_the_command_line(extra, flags, tmp_path):
    model = 'resnet18' if '--variant' in extra else 'resnet18_doconv'
    assert train.main(flags('--epochs', '1', *extra, model=model)) == 0
    last = tmp_path / 'output/run/last.pth.tar'
    loaded, data_config, facts = load_training(last)
    saved = torch.load(last, weights_only=True)
    options = dict(depth_multiplier=None, **({'skip': ['layer1.*']} if '--conv-options' in extra else {}))
    assert saved['model_args']['conv_options'] == options
    weights = saved.get('state_dict_ema', saved['state_dict'])
    same(dict(loaded.state_dict()), {key: value for key, value in weights.items() if '.aux_bn.' not in key})
    assert data_config['input_size'][-1] == SIDE and facts['recipe']['epochs'] == 1
    fused = tmp_path / 'other' / 'resnet18_doconv.again_fused'
    assert cli.main(['fuse', str(last), str(fused)]) == 0
    expected = load_checkpoint(tmp_path / 'zoo' / 'resnet18_doconv.photos_fused').eval()
    x = torch.randn(2, 3, SIDE, SIDE)
    torch.testing.assert_close(load_checkpoint(fused).eval()(x), expected(x))


def test_a_checkpoint_of_timm_can_be_resumed(flags, tmp_path):
    run = prepare(flags(model='resnet18', experiment='first'))
    arguments = argparse.Namespace(model='resnet18', epochs=3)
    saver = utils.CheckpointSaver(run.state.model, run.state.optimizer, args=arguments, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=50.0)
    resumed = prepare(flags('--resume', str(tmp_path / 'last.pth.tar'), model='resnet18', experiment='second'))
    assert resumed.state.position.epoch == 1 and resumed.saver.best_metric == 50.0
    same(dict(resumed.state.model.state_dict()), dict(run.state.model.state_dict()))
    engine.train_one_epoch(*resumed)


def test_bad_checkpoints(flags, tmp_path, capsys):
    assert train_only(flags('--epochs', '1')) == 0
    last = tmp_path / 'output/run/last.pth.tar'
    assert 'got resnet18_doconv; change --model' in refusal(
        flags('--resume', str(last), model='resnet18_acconv', experiment='other'), capsys
    )
    wider = flags('--resume', str(last), '--model-kwargs', 'layers=(1,1,1,1)', experiment='other')
    assert 'does not fit' in refusal(wider, capsys)
    broken = tmp_path / 'broken.pth.tar'
    broken.write_bytes(last.read_bytes()[:1000])
    assert 'not a readable checkpoint' in refusal(flags('--resume', str(broken), experiment='other'), capsys)
    assert 'no such file' in refusal(flags('--resume', str(tmp_path / 'none'), experiment='other'), capsys)
    torch.save({'weights': 1}, broken)
    assert 'not a training checkpoint' in refusal(flags('--resume', str(broken), experiment='other'), capsys)
    assert not (tmp_path / 'output/other').exists()
    before = last.read_bytes()
    assert 'another run' in refusal(flags(), capsys)
    assert last.read_bytes() == before


def test_resume_auto_starts_anew_where_there_is_nothing(flags):
    assert prepare(flags('--resume', 'auto', experiment='new')).state.position.epoch == 0


def test_a_folder_belongs_to_one_run(flags, tmp_path, monkeypatch, capsys):
    run = prepare(flags())  # has no checkpoint yet
    settings = (run.saver.folder / 'args.yaml').read_bytes()
    message = refusal(flags('--seed', '1'), capsys)
    assert '--experiment run: another run' in message and '--resume auto' in message
    assert (run.saver.folder / 'args.yaml').read_bytes() == settings
    assert prepare(flags('--resume', 'auto')).state.position.epoch == 0  # as after a kill in the first epoch

    class Moment(checkpoint.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(checkpoint, 'datetime', Moment)
    names = [prepare(flags(experiment='')).saver.folder.name for _ in range(3)]
    first = f'20260102-030405-resnet18_doconv-{SIDE}'
    assert names == [first, f'{first}-1', f'{first}-2']


def test_scaler_state_is_resumed(flags):
    def scaled(argv: list[str]) -> Start:
        run = prepare(argv)
        run.state.scaler = run.saver.amp_scaler = utils.NativeScaler(device='cpu')
        return run

    run = scaled(flags())
    run.state.scaler._scaler.load_state_dict({**run.state.scaler.state_dict(), 'scale': 128.0})
    run.state.position = checkpoint.Position(1, random_states=rng.gather_random_states(run.setup.device))
    run.saver.save_checkpoint(0, metric=1.0)
    other = scaled(flags(experiment='other'))
    last = run.saver.folder / 'last.pth.tar'
    other.state.resume(other.setup, last, read_training(last))
    assert other.state.position.epoch == 1
    assert other.state.scaler.state_dict() == run.state.scaler.state_dict()
    assert other.state.scaler.state_dict()['scale'] == 128.0


# All that draws random numbers or has a state of its own.
EVERYTHING = (
    '--model-ema --model-ema-warmup --model-ema-decay 0.9 --opt adamw --lr 0.01 --drop 0.2 --drop-path 0.2 --mixup 0.5 '
    '--cutmix 0.5 --reprob 0.5 --remode pixel --aa rand-m9-mstd0.5 --color-jitter 0.4 --epochs 2 -b 4 '
    '--grad-accum-steps 2 --checkpoint-hist 1 --log-interval 1'
).split()


def kill_when(argv: list[str], file: Path, timeout: float = 120) -> None:
    """Run the script in a process of its own and kill it as soon as the file is there."""
    process = multiprocessing.get_context('fork').Process(target=train.main, args=(argv,))
    process.start()
    end = time.monotonic() + timeout
    while not file.exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and file.exists()


def assert_same_run(folder: Path, whole: Path) -> None:
    """Assert that two runs left the same weights, states, history and summary, bit for bit."""
    for name in ('last', 'model_best'):
        found, expected = (torch.load(path / f'{name}.pth.tar', weights_only=True) for path in (folder, whole))
        del found['args'], expected['args']
        same(found, expected)
    assert read_summary(folder) == read_summary(whole)
    kept = [sorted(p.name for p in checkpoint.checkpoints_in(f) if 'recovery' not in p.name) for f in (folder, whole)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    'model, extra, file',
    [
        pytest.param(
            *('resnet18_acconv', ['--epochs', '3', '--checkpoint-hist', '2'], 'checkpoint-1'), marks=pytest.mark.slow
        ),
        ('resnet18_doconv', ['--workers', '1', '--recovery-interval', '1'], 'recovery-1-1'),
    ],
    ids=['after an epoch', 'in an epoch, with loader processes'],
)
def test_resuming_after_a_kill_is_exact(model, extra, file, flags, tmp_path):
    argv = flags(*EVERYTHING, *extra, model=model, experiment='killed')
    folder = tmp_path / 'output/killed'
    kill_when(argv, folder / f'{file}.pth.tar')
    assert not (tmp_path / 'zoo').exists()
    assert train.main([*argv, '--resume', 'auto']) == 0
    weights = {path: path.read_bytes() for path in (tmp_path / 'zoo').glob('*/model.safetensors')}
    assert len(weights) == 2

    assert train.main([*argv, '--experiment', 'whole']) == 0
    assert {path: path.read_bytes() for path in weights} == weights
    assert_same_run(folder, folder.with_name('whole'))


@pytest.mark.parametrize(
    'model, extra',
    [
        pytest.param('resnet18_acconv', ['--workers', '1'], marks=pytest.mark.slow),
        ('resnet18_dyconv', ['--sched-on-updates', '--grad-accum-steps', '1']),
        pytest.param('resnet18_doconv', ['--sched-on-updates'], marks=pytest.mark.slow),
        pytest.param(
            *('resnet18_refconv', ['--variant-lr', '0.5', '--opt', 'lookahead_adam']),
            marks=[pytest.mark.slow, pytest.mark.filterwarnings('ignore:.*without pretrained weights')],
        ),
    ],
)
def test_resuming_in_the_middle_of_an_epoch_is_exact(model, extra, flags, tmp_path, monkeypatch, capsys):
    save_recovery = checkpoint.Saver.save_recovery

    def save_and_stop(saver, epoch, batch_idx=0):
        save_recovery(saver, epoch, batch_idx)
        if (epoch, batch_idx) == (1, 1):
            raise KeyboardInterrupt

    argv = flags(*EVERYTHING, *extra, '--recovery-interval', '2', model=model, experiment='stopped')
    folder = tmp_path / 'output/stopped'
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Saver, 'save_recovery', save_and_stop)
        assert train_only(argv) == 130
    assert f'--resume {folder}' in capsys.readouterr().err
    files = checkpoint.checkpoints_in(folder)
    found = max(files, key=lambda path: checkpoint.position_of(read_training(path), path))
    assert found.name == 'recovery-1-1.pth.tar'
    # as if it had been stopped after the row of the second epoch and before its checkpoint
    text = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(f'{text}1{text.splitlines()[1].removeprefix("0")}\n')
    assert train_only([*argv, '--resume', 'auto']) == 0
    assert train_only([*argv, '--experiment', 'whole']) == 0
    assert_same_run(folder, folder.with_name('whole'))


def test_resuming_where_the_kill_came_between_two_files(flags, tmp_path):
    argv = flags('--epochs', '3', '--checkpoint-hist', '2')
    assert train_only([*argv, '--experiment', 'whole']) == 0
    whole = tmp_path / 'output/whole'
    assert train_only([*argv, '--experiment', 'killed', '--stop-epoch', '2']) == 0
    killed = tmp_path / 'output/killed'
    # as if the second checkpoint had just been written, and not yet been kept or compared
    (killed / 'checkpoint-1.pth.tar').unlink()
    (killed / 'model_best.pth.tar').unlink()
    shutil.copy(killed / 'checkpoint-0.pth.tar', killed / 'model_best.pth.tar')
    (killed / 'tmp.pth.tar').write_bytes(b'half')
    assert train_only([*argv, '--experiment', 'killed', '--resume', 'auto']) == 0
    for name in ('last', 'model_best'):
        found, expected = (torch.load(path / f'{name}.pth.tar', weights_only=True) for path in (killed, whole))
        same(found['state_dict'], expected['state_dict'])
        same(found['saver'], expected['saver'])


def test_resuming_in_another_folder_brings_the_best_along(flags, tmp_path, monkeypatch):
    measured = iter(
        dict(loss=1.0, top1=top1, top5=99.0) for top1 in (50.0, 40.0, 30.0)
    )  # the first epoch stays the best
    monkeypatch.setattr(train, 'validate', lambda *arguments: next(measured))
    argv = flags('--epochs', '2')
    assert train_only(argv) == 0
    last = str(tmp_path / 'output/run/last.pth.tar')
    assert train_only([*argv, '--experiment', 'moved', '--resume', last, '--epochs', '3']) == 0
    best = torch.load(tmp_path / 'output/moved/model_best.pth.tar', weights_only=True)
    assert best['epoch'] == 0
    assert [row['epoch'] for row in read_summary(tmp_path / 'output/moved')] == ['2']


def test_resuming_what_no_training_saves(flags, tmp_path, capsys):
    """A file from elsewhere may hold anything under every name: one line of error, and no file is touched."""
    argv = flags('--epochs', '1')
    assert train_only(argv) == 0
    last = tmp_path / 'output/run/last.pth.tar'
    good = torch.load(last, weights_only=True)
    victim = tmp_path / 'checkpoint-1.pth.tar'
    victim.write_text('mine')
    state = good['train_state']
    for changes in (
        *(dict(train_state=value) for value in (3, [], {}, {**state, 'epoch': 'a'}, {**state, 'random_states': 5})),
        *(dict(train_state={**state, 'random_states': [value]}) for value in (3, {}, torch.zeros(1), [b'x'])),
        *(dict(optimizer=value) for value in (3, [], {'state': 1}, {'state': {}, 'param_groups': [{}]})),
        dict(state_dict={**good['state_dict'], 'another': torch.zeros(1)}),
        dict(state_dict={key: value for key, value in good['state_dict'].items() if key != 'fc.weight'}),
        *(dict(saver={**good['saver'], 'checkpoint_files': [(name, 1.0)] * 20}) for name in (str(victim), '../x', 3)),
        *(dict(saver={**good['saver'], 'pending': value}) for value in ((f'/../../{victim.name}', 1.0), 3, (1,), 'ab')),
        *(dict(saver={**good['saver'], key: '../x'}) for key in ('best_epoch', 'best_metric')),
    ):
        torch.save({**good, **changes}, tmp_path / 'odd.pth.tar')
        more = ['--epochs', '2', '--experiment', 'other', '--resume', str(tmp_path / 'odd.pth.tar')]
        message = refusal([*argv, *more], capsys)
        assert 'odd.pth.tar' in message, (changes.keys(), message)
        assert victim.read_text() == 'mine'


# Several processes

# Run in each of the processes: the script as it is started, a run that it resumes, and what a probe of their states and
# gradients finds. The processes are those of torchrun, or forks with what it sets in their environment.
PROCESSES = """
import contextlib
import copy
import functools
import json
import os
import runpy
import signal
import sys
from pathlib import Path

root, ports, whole, half, probe = json.load(open('arguments.json'))
sys.path.insert(0, root)
import torch.distributed as dist
import train
from timm_reparam import RefConv2d
from timm_reparam.training import engine, result, rng


def meet_anew():
    # torchrun's own store knows the addresses of the group that is gone
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE='False', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(ports.pop()))


def fork():
    # returns in two processes; the first one waits for them, and ends
    meet_anew()
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
            return
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:
            for other in children:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)
    sys.exit()


if 'RANK' not in os.environ:
    fork()
result.compare_profiles = functools.partial(result.compare_profiles, runs=2, warmup=1)
rank = os.environ['RANK']
sys.argv = [f'{root}/train.py', *whole]
with open(f'printed-{rank}', 'w') as file, contextlib.redirect_stdout(file):
    try:
        runpy.run_path(sys.argv[0], run_name='__main__')
    except SystemExit as exit_:
        assert exit_.code == 0, exit_.code

train.save_result = lambda *arguments: ''
meet_anew()
assert train.main(half) == 0


def differing(tensors):
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, tensors)
    return sorted(name for name in tensors if any(not other[name].equal(tensors[name]) for other in everywhere))


def probed(*run):
    setup, state, loader, saver = run
    args = setup.args
    weights = dict(state.model.state_dict())
    start = {name: value.clone() for name, value in weights.items()}
    assert not differing(start), differing(start)
    module = state.task.get_trainable_module()
    ignored = module.parameters_to_ignore
    bases = {f'{name}.weight' for name, layer in state.model.named_modules() if isinstance(layer, RefConv2d)}
    assert bases and ignored == bases, (ignored, bases)
    assert not bases & {name for name, _ in module.named_buffers() if name in module.named_module_buffers}
    loss = engine.train_one_epoch(*run)
    engine.distribute_statistics(args, state.model)
    assert not differing(weights), differing(weights)
    assert any(not weights[name].equal(start[name]) for name in weights)
    index, input, target = next(rng.draw(loader, rng.RandomStream(setup.device, args.rank)))
    state.task(input, target)['loss'].backward()
    gradients = {name: parameter.grad for name, parameter in state.model.named_parameters()}
    assert not differing(gradients), differing(gradients)
    inputs = [None] * 2
    dist.all_gather_object(inputs, input)
    assert not inputs[0].equal(inputs[1])
    assert (saver is None) == (args.rank == 1)
    return loss


meet_anew()
train.train_one_epoch = probed
assert train.main(probe) == 0
# A thread of the group that is still at work when Python shuts down may abort the process.
names = [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]
assert not [name for name in names if 'gloo' in name], names
Path(f'agreed-{rank}').touch()
"""


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(('127.0.0.1', 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


@pytest.mark.parametrize(
    'launcher',
    [
        pytest.param((), id='forked'),
        pytest.param(
            ('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2'),
            id='torchrun',
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes_train_resume_save_once_and_agree(launcher, flags, tmp_path):
    """On weights, gradients and frozen kernels."""
    argv = flags('--device', 'cpu', '-b', '4', '--drop', '0.2', '--mixup', '0.2', '--grad-accum-steps', '2')
    whole, half = tmp_path / 'output/whole', tmp_path / 'output/half'
    probe = flags('--device', 'cpu', '--model-ema', '-b', '4', '--epochs', '1', model='resnet18_refconv')
    runs = (
        [*argv, '--experiment', 'whole'],
        [*argv, '--resume', str(whole / 'checkpoint-0.pth.tar'), '--experiment', 'half'],
        probe,
    )
    (tmp_path / 'arguments.json').write_text(json.dumps([str(ROOT), free_ports(3), *runs]))
    (tmp_path / 'processes.py').write_text(PROCESSES)
    command = [sys.executable, *launcher, 'processes.py']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr

    printed = [(tmp_path / f'printed-{rank}').read_text().count('saved, fused form') for rank in (0, 1)]
    assert printed == [1, 0]
    last = torch.load(whole / 'last.pth.tar', weights_only=True)
    first, second = last['train_state']['random_states']
    assert not torch.equal(first['torch'], second['torch'])
    assert [row['epoch'] for row in read_summary(whole)] == ['0', '1']
    load_folder(tmp_path / 'zoo/resnet18_doconv.photos_fused')

    again = torch.load(half / 'last.pth.tar', weights_only=True)
    same(again['state_dict'], last['state_dict'])
    same(again['optimizer'], last['optimizer'])
    same(again['train_state'], last['train_state'])

    assert sorted(path.name for path in tmp_path.glob('agreed-*')) == ['agreed-0', 'agreed-1']


# Publishing


def test_both_forms_are_published_at_the_end(flags, hub, cache_dir, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    assert train.main(flags('--epochs', '1', '--publish', 'owner', '--license', 'mit')) == 0
    assert 'owner/resnet18_doconv.photos_fused' in capsys.readouterr().out
    assert {repo for repo in hub.commit_counts if repo.startswith('owner/resnet18_doconv.photos')} == {
        'owner/resnet18_doconv.photos',
        'owner/resnet18_doconv.photos_fused',
    }
    fused = timm.create_model('hf-hub:owner/resnet18_doconv.photos_fused', pretrained=True, cache_dir=cache_dir)
    assert fused.pretrained_cfg['architecture'] == 'resnet18'
    assert fused.pretrained_cfg['license'] == 'mit'


def test_what_publishing_would_refuse_is_refused_before_training(flags, hub, tmp_path, capsys):
    add_narrow(hub, 'resnet10t.c3_in1k')
    lifted = flags('--variant', 'doconv', '--pretrained', model='resnet10t.c3_in1k')
    for argv, expected in (
        (flags('--publish', 'owner/models', '--license', 'mit'), '--publish owner/models'),
        (flags('--publish', 'owner', '--license', 'MIT License'), '--license MIT License: '),
        (flags('--publish', 'owner', '--pretrained-path', 'x.pth'), 'add --license'),
        (flags('--publish', 'owner', '--pretrained', '--initial-checkpoint', 'x.pth'), 'add --license'),
        (flags('--publish', 'owner', model='local-dir:x'), 'add --license'),
        ([*lifted, '--publish', 'owner', '--license', 'mit'], "the weights are under apache-2.0, got 'mit'"),
    ):
        assert expected in refusal(argv, capsys)
    assert not (tmp_path / 'output').exists() and not (tmp_path / 'zoo').exists()


def test_the_result_is_printed_before_it_is_published(flags, hub, monkeypatch, capsys):
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    hub.faults.add('403', path='/api/models/owner/', times=None)
    try:
        assert train.main(flags('--epochs', '1', '--publish', 'owner', '--license', 'mit', '--tag', 'kept')) == 1
    finally:
        hub.clear()
    out, err = capsys.readouterr()
    assert 'top-1' in out and 'saved, fused form' in out
    assert err.strip().splitlines()[-1].startswith('train.py: error: owner/resnet18_doconv.kept')


def test_a_stock_model_is_not_published(flags, capsys):
    assert 'add --variant' in refusal(flags('--publish', 'owner', '--license', 'mit', model='resnet18'), capsys)


# The embedded default


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_arguments_reach_97_percent_and_save_both_forms(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / 'train.py')], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    top1 = re.search(r'top-1 \(%\)\s+([\d.]+)\s+([\d.]+)', done.stdout)
    assert top1 and min(float(top1[1]), float(top1[2])) >= 97
    assert sorted(path.name for path in (tmp_path / 'zoo').iterdir()) == [
        'resnet18_doconv.digits',
        'resnet18_doconv.digits_fused',
    ]


def test_weights_and_biases(flags, monkeypatch, tmp_path):
    logged, started = [], []
    wandb = types.ModuleType('wandb')
    wandb.__spec__ = importlib.machinery.ModuleSpec('wandb', None)
    wandb.init, wandb.log = (lambda **named: started.append(named)), logged.append
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr('timm.utils.summary.wandb', wandb, raising=False)
    assert train_only(flags('--log-wandb', '--wandb-project', 'digits', '--epochs', '1')) == 0
    assert [(each['project'], each['name'], each['config']['epochs']) for each in started] == [('digits', 'run', 1)]
    assert len(logged) == 1 and {'train_loss', 'eval_top1'} <= logged[0].keys()
