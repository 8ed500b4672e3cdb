"""train.py: what each flag becomes, where timm takes it. Nothing is trained."""

import argparse
import ast
import importlib.util
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from timm_reparam.training import data, engine  # noqa: E402
from timm_reparam.training import flags as command_line  # noqa: E402
from timm_reparam.training import model as models  # noqa: E402

# Words of the command line, who gets them, and what it gets; a number stands for a positional argument. All rows are
# given together, with other values than the defaults and than each other: a flag that reaches another place is seen.
WIRING: list[tuple[str, str, dict[Any, Any]]] = [
    ('--dataset hfds/some/set', 'train split', {0: 'hfds/some/set'}),
    ('--data-dir some/where', 'validation split', dict(root='some/where')),
    ('--train-split trn', 'train split', dict(split='trn', is_training=True)),
    ('--val-split held', 'validation split', dict(split='held', is_training=False)),
    ('--input-key picture', 'train split', dict(input_key='picture')),
    ('--target-key kind', 'train split', dict(target_key='kind')),
    ('--model resnet18.a1_in1k', 'model', {0: 'resnet18_doconv.a1_in1k'}),
    ('--variant doconv', 'model', {0: 'resnet18_doconv.a1_in1k'}),
    ('--conv-options depth_multiplier=18', 'model', dict(conv_options={'depth_multiplier': 18})),
    ('--model-kwargs block_args=9', 'model', dict(block_args=9)),
    ('--pretrained', 'model', dict(pretrained=True)),
    ('--num-classes 7', 'model', dict(num_classes=7)),
    ('--input-size 4 24 40', 'train loader', dict(input_size=(4, 24, 40))),
    ('--crop-pct 0.91', 'validation loader', dict(crop_pct=0.91)),
    ('--mean 0.11 0.12 0.13 0.14', 'train loader', dict(mean=(0.11, 0.12, 0.13, 0.14))),
    ('--std 0.15 0.16 0.17 0.18', 'validation loader', dict(std=(0.15, 0.16, 0.17, 0.18))),
    ('--interpolation nearest', 'validation loader', dict(interpolation='nearest')),
    ('--drop 0.19', 'model', dict(drop_rate=0.19)),
    ('--drop-path 0.2', 'model', dict(drop_path_rate=0.2)),
    ('--grad-checkpointing', 'checkpointing', dict(enable=True)),
    ('--batch-size 12', 'train loader', dict(batch_size=12)),
    ('--validation-batch-size 10', 'validation loader', dict(batch_size=10)),
    ('--grad-accum-steps 2', 'scheduler', dict(updates_per_epoch=3)),
    ('--workers 5', 'train loader', dict(num_workers=5)),
    ('--pin-mem', 'train loader', dict(pin_memory=True)),
    ('--device cpu', 'train loader', dict(device=torch.device('cpu'))),
    ('--amp', 'autocast', dict(device_type='cpu')),
    ('--amp-dtype bfloat16', 'autocast', dict(dtype=torch.bfloat16)),
    ('--channels-last', 'run', dict(channels_last=True)),
    ('--torchcompile eager', 'compile', dict(backend='eager')),
    ('--opt adamw', 'optimizer', dict(opt='adamw')),
    ('--opt-eps 0.21', 'optimizer', dict(eps=0.21)),
    ('--opt-betas 0.22 0.23', 'optimizer', dict(betas=[0.22, 0.23])),
    ('--momentum 0.24', 'optimizer', dict(momentum=0.24)),
    ('--weight-decay 0.25', 'optimizer', dict(weight_decay=0.25)),
    ('--layer-decay 0.26', 'optimizer', dict(layer_decay=0.26)),
    ('--opt-kwargs amsgrad=True', 'optimizer', dict(amsgrad=True)),
    ('--lr 0.28', 'optimizer', dict(lr=0.28)),
    ('--sched step', 'scheduler', dict(sched='step')),
    ('--sched-on-updates', 'scheduler', dict(step_on_epochs=False)),
    ('--lr-noise 0.29 0.3', 'scheduler', dict(noise=[0.29, 0.3])),
    ('--warmup-lr 0.32', 'scheduler', dict(warmup_lr=0.32)),
    ('--min-lr 0.33', 'scheduler', dict(min_lr=0.33)),
    ('--epochs 34', 'scheduler', dict(num_epochs=34)),
    ('--decay-milestones 35 36', 'scheduler', dict(decay_milestones=[35, 36])),
    ('--decay-epochs 37', 'scheduler', dict(decay_epochs=37)),
    ('--warmup-epochs 38', 'scheduler', dict(warmup_epochs=38)),
    ('--warmup-prefix', 'scheduler', dict(warmup_prefix=True)),
    ('--cooldown-epochs 39', 'scheduler', dict(cooldown_epochs=39)),
    ('--decay-rate 0.42', 'scheduler', dict(decay_rate=0.42)),
    ('--eval-metric loss', 'run', dict(lower_is_better=True)),
    ('--seed 43', 'scheduler', dict(noise_seed=43)),
    ('--scale 0.44 0.45', 'train loader', dict(scale=[0.44, 0.45])),
    ('--ratio 0.46 0.47', 'train loader', dict(ratio=[0.46, 0.47])),
    ('--hflip 0.48', 'train loader', dict(hflip=0.48)),
    ('--vflip 0.49', 'train loader', dict(vflip=0.49)),
    ('--color-jitter 0.51', 'train loader', dict(color_jitter=0.51)),
    ('--aa rand-m3', 'train loader', dict(auto_augment='rand-m3')),
    ('--aug-repeats 4', 'train loader', dict(num_aug_repeats=4)),
    ('--reprob 0.55', 'train loader', dict(re_prob=0.55)),
    ('--remode rand', 'train loader', dict(re_mode='rand')),
    ('--train-interpolation bicubic', 'train loader', dict(interpolation='bicubic')),
    ('--mixup 0.56', 'mixup', dict(mixup_alpha=0.56)),
    ('--cutmix 0.57', 'mixup', dict(cutmix_alpha=0.57)),
    ('--mixup-prob 0.61', 'mixup', dict(prob=0.61)),
    ('--mixup-switch-prob 0.62', 'mixup', dict(switch_prob=0.62)),
    ('--smoothing 0.63', 'mixup', dict(label_smoothing=0.63, num_classes=7)),
    ('--smoothing 0.63', 'loss', dict(smoothing=0.63, soft_targets=True)),
    ('--bce-loss', 'loss', {0: 'bce'}),
    ('--bce-target-thresh 0.64', 'loss', dict(bce_target_thresh=0.64)),
    ('--model-ema', 'average', {}),
    ('--model-ema-decay 0.65', 'average', dict(decay=0.65)),
    ('--model-ema-warmup', 'average', dict(use_warmup=True)),
    ('--output runs', 'run', dict(folder='runs/first')),
    ('--experiment first', 'run', dict(folder='runs/first')),
    ('--checkpoint-hist 69', 'run', dict(checkpoint_hist=69)),
]

# Rows that contradict the others, each for itself.
ALONE: list[tuple[str, str, dict[Any, Any]]] = [
    ('x --no-aug', 'train loader', dict(no_aug=True, interpolation='bicubic')),
    ('x --img-size 48', 'train loader', dict(input_size=(3, 48, 48))),
    ('x --in-chans 1', 'model', dict(in_chans=1)),
    ('x --input-size 1 8 8', 'model', dict(in_chans=1)),
    ('x --input-size 1 8 8 --mean 0 --std 1', 'train split', dict(input_img_mode='L')),
    ('x --aug-splits 3', 'train loader', dict(num_aug_splits=3, re_split=False)),
    ('x --aug-splits 3 --resplit', 'train loader', dict(re_split=True)),
    ('x --aug-splits 3 --split-bn', 'split norms', {1: 3}),
    ('x --jsd-loss --aug-splits 2', 'loss', {0: 'jsd', 'jsd_splits': 2, 'soft_targets': False}),
    ('x --mixup 0.3 --smoothing 0.2', 'mixup', dict(mixup_alpha=0.3, label_smoothing=0.2)),
    ('x --cutmix 0.2', 'mixup', dict(mixup_alpha=0, cutmix_alpha=0.2)),
    ('x --eval-metric loss --val-split=', 'run', dict(lower_is_better=True)),
    ('x --eval-metric top5', 'run', dict(lower_is_better=False)),
    ('--dataset torch/cifar10 --dataset-download', 'train split', dict(download=True)),
    (f'x --pretrained-path {__file__}', 'model', dict(pretrained_cfg_overlay=dict(file=__file__, num_classes=-1))),
    ('x -b 32 --lr-base 0.3 --lr-base-size 128 --opt adamw', 'optimizer', dict(lr=0.15)),
    ('x -b 32 --grad-accum-steps 2', 'optimizer', dict(lr=0.1 * 64 / 256)),
    ('x -b 64 --opt adamw', 'optimizer', dict(lr=0.05)),
    ('x -b 64', 'optimizer', dict(lr=0.025)),
    ('x -b 9', 'validation loader', dict(batch_size=9)),
    ('x --workers 3', 'validation loader', dict(num_workers=3)),
    ('x --device-modules this_module', 'modules', {0: 'this_module'}),
]  # fmt: skip

# Flags that have a test of what they do: here below, or in test_train.py.
DONE_ELSEWHERE = {
    *('data', 'config', 'help', 'initial_checkpoint', 'resume', 'no_resume_opt', 'stop_epoch', 'val_interval'),
    *('recovery_interval', 'log_interval', 'sync_bn', 'variant_lr', 'tag', 'zoo', 'publish', 'license', 'verbose'),
    *('clip_grad', 'clip_mode', 'mixup_off_epoch', 'dist_bn', 'log_wandb', 'wandb_project'),
}


class Recorded(Exception):
    pass


class Loader(list):
    dataset = batch_sampler = sampler = None


class Dataset(list):
    classes = ['one', 'two']
    transform = None


class Task(torch.nn.Module):
    def __init__(self, calls: dict, model: torch.nn.Module) -> None:
        super().__init__()
        self.calls, self.trainable_module = calls, model

    def get_trainable_module(self) -> torch.nn.Module:
        return self.trainable_module

    def compile(self, **arguments: Any) -> None:
        self.calls['compile'] = arguments


def received(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[Any, Any]]:
    """What timm's functions get from a run that is stopped before its first epoch."""
    calls: dict[str, dict[Any, Any]] = {}
    small = partial(timm.create_model, 'resnet18_doconv', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8), num_classes=7)

    def stand_in(place: Any, name: str, role: Any, result: Any) -> None:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[role(named) if callable(role) else role] = dict(enumerate(arguments)) | named
            return result(*arguments, **named) if callable(result) else result

        monkeypatch.setattr(place, name, call)

    def side(named: dict[str, Any], what: str) -> str:
        return f'{"train" if named["is_training"] else "validation"} {what}'

    def stop(setup: Any, state: Any, loader: Any, saver: Any):
        calls['autocast'] = setup.autocast.keywords if isinstance(setup.autocast, partial) else {}
        is_last = state.model.conv1.weight.is_contiguous(memory_format=torch.channels_last)
        calls['run'] = dict(folder=str(saver.folder), checkpoint_hist=saver.max_history, channels_last=is_last)
        calls['run']['lower_is_better'] = saver.decreasing
        raise Recorded

    stand_in(models.timm, 'create_model', 'model', lambda name, **named: small(in_chans=named['in_chans']))
    stand_in(timm.models.resnet.ResNet, 'set_grad_checkpointing', 'checkpointing', None)
    stand_in(models, 'convert_splitbn_model', 'split norms', lambda model, splits: model)
    stand_in(data, 'create_dataset', partial(side, what='split'), Dataset(range(99)))
    stand_in(data, 'create_loader', partial(side, what='loader'), Loader(range(6)))
    stand_in(data, 'FastCollateMixup', 'mixup', None)
    stand_in(models, 'create_classification_loss', 'loss', lambda *arguments, **named: torch.nn.Identity())
    stand_in(models, 'ClassificationTask', 'task', lambda model, **named: Task(calls, model))
    stand_in(models, 'create_optimizer_v2', 'optimizer', lambda module, **named: torch.optim.SGD(module.parameters()))
    stand_in(models, 'create_scheduler_v2', 'scheduler', (None, 99))
    monkeypatch.setattr(train, 'utils', types.SimpleNamespace(**vars(train.utils)))
    stand_in(train.utils, 'ModelEmaV3', 'average', lambda model, **named: types.SimpleNamespace(module=model))
    monkeypatch.setattr(train, 'importlib', types.SimpleNamespace(import_module=None))
    stand_in(train.importlib, 'import_module', 'modules', None)
    monkeypatch.setattr(data, 'class_names', lambda dataset: dataset.classes)
    Path('x').mkdir(exist_ok=True)  # a folder of images, as far as anything looks
    monkeypatch.setattr(train, 'train_one_epoch', stop)
    with pytest.raises(Recorded):
        train.run(train.parse_args(argv))
    return calls


def check(calls: dict[str, dict[Any, Any]], rows: list[tuple[str, str, dict[Any, Any]]]) -> None:
    for words, receiver, expected in rows:
        got = calls.get(receiver)
        assert got is not None, f'{words}: {receiver} is not called'
        assert {key: got.get(key) for key in expected} == expected, f'{words}: {receiver}'


def test_every_flag_reaches_its_place(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(received([word for words, _, _ in WIRING for word in words.split()], monkeypatch), WIRING)


@pytest.mark.parametrize('row', ALONE, ids=lambda row: row[0].partition(' ')[2].replace(__file__, 'FILE'))
def test_a_flag_that_excludes_others_reaches_its_place(row, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    check(received(row[0].split(), monkeypatch), [row])


def test_every_flag_has_a_row():
    actions = command_line.build_parser()._actions
    words = {word for words, _, _ in WIRING + ALONE for word in words.split()}
    rowed = {action.dest for action in actions if words & {*action.option_strings}}
    assert rowed | DONE_ELSEWHERE == {action.dest for action in actions} and not rowed & DONE_ELSEWHERE


def test_the_values_of_the_table_tell_flags_apart():
    """Otherwise a flag that reaches another one's place would not be seen."""
    values = [repr(value) for _, receiver, expected in WIRING for value in expected.values()]
    known = {"'resnet18_doconv.a1_in1k'", 'True', 'False', '3', "'runs/first'", '0.63', '7'}
    assert not {value for value in values if values.count(value) > 1} - known


def arguments(*argv: str) -> argparse.Namespace:
    args = train.parse_args(['x', *argv])
    args.distributed, args.world_size, args.rank = False, 1, 0
    return args


def test_clipping_gets_its_limit_and_mode(monkeypatch):
    layer = torch.nn.Linear(2, 2)
    task = types.SimpleNamespace(get_clip_parameters=lambda exclude_head: layer.parameters())
    state = types.SimpleNamespace(
        model=layer, task=task, scaler=None, optimizer=types.SimpleNamespace(step=lambda: None)
    )
    seen = []
    monkeypatch.setattr(engine.utils, 'dispatch_clip_grad', lambda parameters, value, mode: seen.append((value, mode)))
    args = arguments('--clip-grad', '0.3', '--clip-mode', 'value')
    for need_update in (False, True):
        engine.backward(args, state, layer(torch.ones(1, 2)).sum(), need_update)
    assert seen == [(0.3, 'value')]
    engine.backward(arguments(), state, layer(torch.ones(1, 2)).sum(), True)
    assert len(seen) == 1

    scaled: list[dict] = []
    state.scaler = lambda loss, optimizer, **named: scaled.append(named)
    engine.backward(args, state, torch.zeros(()), True)
    assert [(each['clip_grad'], each['clip_mode'], each['need_update']) for each in scaled] == [(0.3, 'value', True)]


def test_mixing_ends():
    args = arguments('--mixup-off-epoch', '3')
    for epoch, mixes in ((2, True), (3, False), (4, False)):
        loader = Loader()
        loader.mixup_enabled = True
        data.set_epoch(args, loader, epoch)
        assert loader.mixup_enabled == mixes


def test_an_epoch_reaches_all_that_shuffles():
    told: list[str] = []
    loader = Loader()
    for part in ('dataset', 'batch_sampler', 'sampler'):
        setattr(loader, part, types.SimpleNamespace(set_epoch=lambda epoch, part=part: told.append(f'{part} {epoch}')))
    data.set_epoch(arguments(), loader, 5)
    assert told == ['dataset 5', 'batch_sampler 5', 'sampler 5']


def test_statistics_of_processes(monkeypatch):
    seen = []
    monkeypatch.setattr(engine.utils, 'distribute_bn', lambda model, size, reduce: seen.append((size, reduce)))
    for flag in ('reduce', 'broadcast', ''):
        args = arguments('--dist-bn', flag)
        engine.distribute_statistics(args, torch.nn.Identity())
        args.distributed, args.world_size = True, 4
        engine.distribute_statistics(args, torch.nn.Identity())
    assert seen == [(4, True), (4, False)]


def test_the_plugin_does_not_import_the_training():
    package = ROOT / 'timm_reparam'
    imported = set()
    for file in package.rglob('*.py'):
        room = '.'.join(file.parent.relative_to(ROOT).parts)
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                imported |= {(room, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                module = importlib.util.resolve_name('.' * node.level + (node.module or ''), room)
                imported |= {(room, f'{module}.{alias.name}') for alias in node.names}
    importers = {room for room, name in imported if name.startswith('timm_reparam.training')}
    assert importers == {'timm_reparam.training'}  # which imports its own parts
