"""Checkpoints made by somebody else: each ends in one ReparamError, soon, within little memory, without a request."""

import argparse
import json
import os
import random
import resource
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from stand_in import disturbed
from timm.models import get_model_args

import timm_reparam
from hub.server import HubServer
from timm_reparam import ReparamError
from timm_reparam.cli import main
from timm_reparam.hub import (
    check_tag,
    convert_checkpoint,
    fuse_checkpoint,
    load_checkpoint,
    render_card,
    save_pair,
    untrusted,
    verify_pair,
)
from timm_reparam.hub.facts import sha256_of
from timm_reparam.hub.gate import check_card
from timm_reparam.hub.training import load_training, read_training, told_settings
from timm_reparam.hub.untrusted import MOST_TENSORS, check_arguments, check_cost

NAME = 'resnet10t_doconv'
TINY = dict(channels=(4, 4, 8, 8), stem_width=4, num_classes=4)
SECONDS, MEBIBYTES = (
    20,
    700,
)  # of one attack, with a machine that is busy otherwise; what is refused late takes far more


@pytest.fixture(scope='module')
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, of which the tests take copies, and the file of a training."""
    zoo = tmp_path_factory.mktemp('zoo')
    model = disturbed(timm.create_model(NAME, **TINY)).eval()
    save_pair(model, zoo, tag='t', data_config=dict(input_size=(3, 32, 32)), facts={'license': 'mit'})
    torch.save(training(model), zoo / 'last.pth.tar')
    return zoo


@pytest.fixture
def zoo(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / 'zoo'))


def training(model: Any) -> dict[str, Any]:
    args = argparse.Namespace(model=NAME, num_classes=4, input_size=[3, 32, 32], model_kwargs=dict(TINY), lr=0.1)
    return dict(
        arch=NAME, model_args=get_model_args(model), args=args, epoch=1, metric=50.0, state_dict=model.state_dict()
    )


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(function: Callable[[], object], hub: HubServer) -> str:
    """The one line that a call is refused with, within the limits of time and memory, and without a request."""
    hub.clear()
    memory, start = peak(), time.monotonic()
    with pytest.raises(ReparamError) as raised:
        function()
    assert time.monotonic() - start < SECONDS and peak() - memory < MEBIBYTES
    assert not hub.log
    assert len(str(raised.value)) < 2000
    return str(raised.value)


def header_of(tensors: dict[str, Any], data: bytes = b'') -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack('<Q', len(text)) + text + data


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / 'config.json'
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config))


# --- arguments -------------------------------------------------------------------------------------------------------

MANY = 17_000
LOADING = {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'pruned'}
ARGUMENTS: list[dict[str, Any]] = [
    dict(pretrained=True),
    dict(pretrained_cfg=dict(url='http://127.0.0.1:9/x.pth')),
    dict(pretrained_cfg='hf-hub:someone/model'),
    dict(pretrained_cfg_overlay=dict(file='/etc/passwd')),
    dict(pretrained_strict=False),
    dict(pretrained_filter_fn='os.system'),
    dict(checkpoint_path='/etc/passwd'),
    dict(cache_dir='/tmp'),
    dict(scriptable=True),
    dict(pruned=True),
    dict(no_such_argument=1),
    dict(feature_cfg={}),
    dict(global_pool='http://127.0.0.1:9'),
    dict(act_layer='../../up'),
    dict(norm_layer='a/b'),
    dict(act_layer='x' * 10_000),
    dict(num_classes=10**12),
    dict(num_classes=-1),
    dict(num_classes=float('nan')),
    dict(num_classes='many'),
    dict(in_chans=-3),
    dict(in_chans=10**6),
    dict(layers=[1500] * 4),
    dict(layers=[1] * 1000),
    dict(layers=[[[1]]]),
    dict(layers=7),
    dict(channels=[2**20] * 4),
    dict(stem_width=2**20),
    dict(base_width=2**22),
    dict(conv_options=dict(depth_multiplier=2**20)),
    dict(conv_options=dict(no_such_option=1)),
    dict(conv_options=dict(skip='*' * 5000)),
    dict(conv_options=[1]),
    dict(block='torch.nn.Identity'),
    dict(block_args=dict(attn_layer=dict(a=dict(b=1)))),
]


# What reads the folder of a checkpoint; each refuses it, or finds it wrong.
COMMANDS: dict[str, Callable[[Path, HubServer], object]] = {
    'fuse': lambda folder, hub: refused(lambda: fuse_checkpoint(folder, folder.with_name('new')), hub),
    'convert': lambda folder, hub: refused(lambda: convert_checkpoint(folder, folder.with_name('new'), NAME), hub),
    'verify_pair': lambda folder, hub: finds_one_problem(folder),
    'main verify': lambda folder, hub: fails('verify', str(folder)),
    'main profile': lambda folder, hub: fails('profile', str(folder), '--runs', '0'),
}


def finds_one_problem(folder: Path) -> None:
    report = verify_pair(folder)
    assert not report.passed and report.fusion is None and len(report.problems) == 1


def fails(*args: str) -> None:
    assert main(args) == 1


def check_arguments_everywhere(hub: HubServer, zoo: Path, arguments: dict[str, Any], commands: list[str]) -> None:
    """In config.json for some commands, and as model_args and as flags of a training's file."""
    folder = zoo / f'{NAME}.t'
    edit_config(folder, lambda config: config['model_args'].update(arguments))
    before = sorted(path for path in zoo.rglob('*'))
    message = refused(lambda: load_checkpoint(folder), hub)
    if arguments.keys() & LOADING:
        assert 'is a loading option and not allowed here' in message
    for command in commands:
        if command != 'convert' or 'conv_options' not in arguments:  # which convert takes from its caller
            COMMANDS[command](folder, hub)
    content = torch.load(zoo / 'last.pth.tar', weights_only=False)
    for changed in (
        dict(content, model_args={**content['model_args'], **arguments}),
        dict(content, model_args=None, args=argparse.Namespace(**{**vars(content['args']), 'model_kwargs': arguments})),
    ):
        torch.save(changed, zoo / 'last.pth.tar')
        refused(lambda: fuse_checkpoint(zoo / 'last.pth.tar', zoo / f'{NAME}.new_fused'), hub)
    assert sorted(path for path in zoo.rglob('*')) == before


@pytest.mark.parametrize('number', range(len(ARGUMENTS)), ids=lambda number: str(ARGUMENTS[number])[:60])
def test_arguments_of_a_model(hub: HubServer, zoo: Path, number: int, capsys: pytest.CaptureFixture) -> None:
    """The command changes from one to the next."""
    check_arguments_everywhere(hub, zoo, ARGUMENTS[number], [list(COMMANDS)[number % len(COMMANDS)]])
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('arguments', ARGUMENTS, ids=lambda arguments: str(arguments)[:60])
def test_arguments_of_a_model_in_every_command(
    hub: HubServer, zoo: Path, arguments: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    check_arguments_everywhere(hub, zoo, arguments, list(COMMANDS))
    assert 'Traceback' not in capsys.readouterr().err


def test_arguments_that_people_give_are_taken() -> None:
    for name, arguments in (
        (NAME, dict(TINY, in_chans=1, drop_rate=0.1, global_pool='avgmax', output_stride=8, act_layer='silu')),
        ('resnet50_acconv', dict(num_classes=0, aa_layer='blurpool', replace_stem_pool=True, zero_init_last=False)),
        (
            'mobilenetv2_100_dyconv',
            dict(bn_eps=1e-3, bn_momentum=0.1, pad_type='same', conv_options=dict(reduction=8)),
        ),
        ('resnet18', dict(block_args=dict(attn_layer='se'), norm_layer='batchnorm2d')),
        ('convnext_atto', dict(patch_size=2, ls_init_value=None, kernel_sizes=5)),
        ('efficientnet_b0', dict(drop_path_rate=0.2, se_layer='se', bn_eps=1e-3)),
    ):
        assert arguments.items() <= {**check_arguments(name, arguments, 'x'), **arguments}.items()


# --- configuration and header ---------------------------------------------------------------------------------------


def set_cfg(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda config: config['pretrained_cfg'].update(values)


@pytest.mark.parametrize(
    'edit',
    [
        *(set_cfg(input_size=size) for size in ([3, -32, 32], [3, 0, 32], [3, 32], 'x', [3, 1e9, 32], [3, True, 32])),
        set_cfg(input_size=[3, 10**9, 10**9]),
        set_cfg(input_size=[3, 60_000, 60_000]),
        set_cfg(input_size=[1, 32, 32]),
        set_cfg(num_classes=1000),
        *(set_cfg(**{key: 'http://127.0.0.1:9/x'}) for key in ('url', 'file', 'hf_hub_id', 'state_dict', 'source')),
        set_cfg(custom_load=True),
        lambda config: config.update(num_classes=1000),
        lambda config: config.update(architecture='hf-hub:someone/model'),
        lambda config: config.update(architecture=['resnet18']),
        lambda config: config.update(architecture='x' * 10**5),
        lambda config: config.update(reparam_format=10**6),
        lambda config: config.update(pretrained_cfg=[]),
    ],
)
def test_configurations(hub: HubServer, zoo: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    folder = zoo / f'{NAME}.t'
    edit_config(folder, edit)
    refused(lambda: load_checkpoint(folder), hub)
    refused(lambda: fuse_checkpoint(folder, zoo / 'new'), hub)
    assert not verify_pair(folder).passed


def test_a_path_that_is_not_utf_8(zoo: Path) -> None:
    place = zoo / os.fsdecode(b'\xff')
    try:
        shutil.copytree(zoo / f'{NAME}.t', place / f'{NAME}.t')
    except OSError:
        pytest.skip('this file system takes no such names')
    with pytest.raises(ReparamError, match='expected a path in UTF-8'):
        load_checkpoint(place / f'{NAME}.t')


@pytest.mark.parametrize('tag', ['NUL', 'aux', 'com1', 'Con.2', '', 'a b', 'a/b', '_fused', 'x_fused'])
def test_tags(tag: str) -> None:
    with pytest.raises(ReparamError, match='tag: '):
        check_tag(tag, NAME)


@pytest.mark.parametrize('changes', [dict(), dict(classifier='conv1.0')], ids=['fc', 'conv1.0'])
def test_what_timm_would_change_while_it_loads(hub: HubServer, zoo: Path, changes: dict[str, Any]) -> None:
    """Without a number of classes it takes another one, and leaves the classifier at its random start."""
    folder = zoo / f'{NAME}.t'
    edit_config(folder, lambda config: (config.pop('num_classes'), config['pretrained_cfg'].pop('num_classes')))
    edit_config(folder, set_cfg(**changes))
    assert 'makes timm change what it loads' in refused(lambda: load_checkpoint(folder), hub)


def test_the_cost_of_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device('meta'):
        model = timm.create_model(NAME, **TINY)
    check_cost(model, (3, 64, 64), 'x')
    for name, value in (('MOST_BYTES', 10_000), ('MOST_MACS', 10_000)):
        with monkeypatch.context() as patch:
            patch.setattr(untrusted, name, value)
            with pytest.raises(ReparamError, match='take more than the budget'):
                check_cost(model, (3, 64, 64), 'x')
    monkeypatch.setattr(untrusted, '_MOST_OPERATIONS', 3)
    with pytest.raises(ReparamError, match='expected at most 3 operations'):
        check_cost(model, (3, 64, 64), 'x')


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'is not a safetensors file'),
        (b'\xff' * 100, 'is not a safetensors file'),
        (struct.pack('<Q', 2**60) + b'{}', 'is not a safetensors file'),
        (header_of({}), 'expected tensors with values, got no tensor'),
        (header_of({'a': dict(dtype='F32', shape=[0, 10**12], data_offsets=[0, 0])}), 'expected tensors with values'),
        (header_of({'a': dict(dtype='F32', shape=[-1, 4], data_offsets=[0, 4])}, b'0000'), 'is not a safetensors file'),
        (
            header_of(
                {f't{n}': dict(dtype='U8', shape=[1], data_offsets=[n, n + 1]) for n in range(MANY)}, bytes(MANY)
            ),
            'expected at most 16384 tensors',
        ),
    ],
    ids=['empty', 'noise', 'huge header', 'no tensors', 'no entries', 'negative', 'many'],
)
def test_headers(hub: HubServer, zoo: Path, content: bytes, words: str) -> None:
    folder = zoo / f'{NAME}.t'
    (folder / 'model.safetensors').write_bytes(content)
    assert words in refused(lambda: load_checkpoint(folder), hub)
    assert not verify_pair(folder).passed


def test_the_set_of_keys_is_compared(hub: HubServer, zoo: Path) -> None:
    folder = zoo / f'{NAME}.t'
    tensors = load_file(folder / 'model.safetensors')
    for changed in (
        {**tensors, 'another': torch.zeros(1)},
        {key: value for key, value in tensors.items() if key != 'fc.weight'},
        {**tensors, 'fc.weight': torch.zeros(5, 8)},
        load_file(zoo / f'{NAME}.t_fused/model.safetensors'),
    ):
        save_file(changed, folder / 'model.safetensors', metadata={'format': 'pt'})
        assert 'tensors differ' in refused(lambda: load_checkpoint(folder), hub)


@pytest.mark.parametrize('side', [pytest.param(224, marks=pytest.mark.slow), 2048])
def test_large_images_are_allowed(side: int) -> None:
    for name in ('resnet18', 'resnet152', 'resnet50_dyconv', 'mobilenetv2_100_doconv'):
        with torch.device('meta'):
            check_cost(timm.create_model(name), (3, side, side), 'x')


def test_limits_leave_room() -> None:
    """The largest network of convolutions that timm has, with layers of the variant that has most tensors."""
    timm_reparam.register_variant('nasnetalarge', 'dyconv')
    with torch.device('meta'):
        assert 2 * len(timm.create_model('nasnetalarge_dyconv').state_dict()) < MOST_TENSORS


# --- files of a training --------------------------------------------------------------------------------------------


def flags(**values: Any) -> dict[str, Any]:
    """Changes of a file that names its model as timm's script does, by its flags."""
    return dict(model_args=None, args=dict(dict(model=NAME, num_classes=4, model_kwargs=TINY), **values))


@pytest.mark.parametrize(
    'changes',
    [
        *(dict(args=value) for value in ([1, 2], 'x', 3)),
        *(flags(model=name) for name in (3, None, [NAME], 'no_such_model', '../up')),
        *(flags(model_kwargs=value) for value in ([1], 'x', 3, {3: 4})),
        *(flags(input_size=size) for size in ([3, -1, 32], 'abc', 3, [10**9] * 3, [3, 60_000, 60_000])),
        *(flags(mean=value) for value in ('x', [[1]], [0.5, 0.5], [float('nan')] * 3)),
        flags(interpolation='/home/x'),
        *(dict(state_dict=value) for value in (3, [], {}, None, {'a': 1}, {1: torch.zeros(1)}, {'a': torch.zeros(1)})),
        dict(arch=3),
        dict(arch=None, args=None),
        dict(arch='no_such_model'),
        dict(epoch='a word'),
        dict(metric='much'),
        dict(model_args=[('a', 1)]),
        dict(train_state=[1]),
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_entries_of_a_training(hub: HubServer, zoo: Path, changes: dict[str, Any]) -> None:
    content = torch.load(zoo / 'last.pth.tar', weights_only=False)
    torch.save({**content, **changes}, zoo / 'last.pth.tar')
    refused(lambda: load_training(zoo / 'last.pth.tar'), hub)
    refused(lambda: fuse_checkpoint(zoo / 'last.pth.tar', zoo / f'{NAME}.new_fused'), hub)


@pytest.mark.parametrize(
    'weights',
    [{'fc.weight': torch.zeros(1).expand(2**40)}, dict.fromkeys(map(str, range(1000)), torch.zeros(2**14))],
    ids=['one', 'many'],
)
@pytest.mark.parametrize('key', ['state_dict', 'state_dict_ema'])
def test_tensors_that_are_larger_than_their_file(hub: HubServer, zoo: Path, key: str, weights: dict[str, Any]) -> None:
    content = torch.load(zoo / 'last.pth.tar', weights_only=False)
    torch.save({**content, key: weights}, zoo / 'last.pth.tar')
    assert 'share their memory' in refused(lambda: load_training(zoo / 'last.pth.tar'), hub)


def test_no_code_of_a_pickle_runs(hub: HubServer, zoo: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (zoo / 'ran',)

    torch.save(dict(state_dict={}, args=Evil()), zoo / 'last.pth.tar')
    refused(lambda: read_training(zoo / 'last.pth.tar'), hub)
    assert not (zoo / 'ran').exists()


def test_a_compressed_archive_is_not_read(hub: HubServer, zoo: Path) -> None:
    """It may be any number of times as large in memory."""
    torch.save(dict(state_dict={'a': torch.zeros(2**22)}), zoo / 'large')
    with zipfile.ZipFile(zoo / 'large') as source, zipfile.ZipFile(zoo / 'bomb', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for name in source.namelist():
            bomb.writestr(name, source.read(name))
    assert (zoo / 'bomb').stat().st_size < 2**20
    assert 'got compressed entries' in refused(lambda: read_training(zoo / 'bomb'), hub)


def test_a_recipe_tells_of_the_training_alone() -> None:
    settings = dict(
        *(dict(model=NAME, lr=0.1, mean=[0.5], model_kwargs=dict(TINY), aa='rand-m9-mstd0.5-inc1').items(),),
        data_dir='/home/somebody/data',
        class_map='/home/somebody/map.txt',
        class_stats='/home/somebody/stats',
        kd_model_name='local-dir:/home/somebody/teacher',
        some_new_flag='x',
        loss='/home/somebody/loss',
        conv_options=dict(skip='layer1.*'),
        opt_kwargs=dict(path='/home/somebody'),
    )
    assert told_settings(settings) == dict(
        model=NAME,
        lr=0.1,
        mean=[0.5],
        model_kwargs=dict(TINY),
        aa='rand-m9-mstd0.5-inc1',
        conv_options=dict(skip='layer1.*'),
    )


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A file with a few bytes changed, cut, doubled or moved."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place, length = rng.randrange(len(content) + 1), rng.choice((1, 1, 4, 64))
        what = rng.randrange(5)
        if what == 0:
            content[place : place + length] = rng.randbytes(length)
        elif what == 1:
            del content[place : place + length]
        elif what == 2:
            content[place:place] = content[place : place + length]
        elif what == 3:
            content = content[:place]
        else:
            content[place : place + 1] = rng.choice((b'-', b'9' * 12, b'null', b'[', b'{', b'"', b'\0', b'\xff'))
        if not content:
            break
    return bytes(content)


# What reads a file of each kind first, where the others are right.
READ: dict[str, Callable[[Path], object]] = {
    'last.pth.tar': load_training,
    'config.json': lambda path: load_checkpoint(path.parent),
    'model.safetensors': lambda path: load_checkpoint(path.parent),
    'training.json': lambda path: render_card(path.parent),
    'README.md': lambda path: check_card(path.parent, sha256_of(path.with_name('model.safetensors'))),
}


@pytest.mark.parametrize('part', [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 6))])
@pytest.mark.parametrize('kind', READ)
def test_damaged_files(hub: HubServer, zoo: Path, kind: str, part: int) -> None:
    """A hundred of each kind in each part: none escapes as another error."""
    hub.clear()
    rng = random.Random(f'{kind} {part}')
    path = zoo / kind if kind == 'last.pth.tar' else zoo / f'{NAME}.t' / kind
    original = path.read_bytes()
    memory, found = peak(), 0
    for _ in range(100):
        # of weights and of pickles it is the head that decides most
        head = 4096 if kind in ('last.pth.tar', 'model.safetensors') and rng.random() < 0.7 else len(original)
        path.write_bytes(mutated(original[:head], rng) + original[head:])
        try:
            READ[kind](path)
        except ReparamError:
            found += 1
    assert found > 10, 'they do damage'
    assert peak() - memory < MEBIBYTES and not hub.log


# --- what a Hub says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, content',
    [
        ('README.md', b'---\na: !!bool foo\n---\n'),
        ('README.md', b'---\na: !!int ""\n---\n'),
        ('README.md', b'---\na: !!timestamp foo\n---\n'),
        ('training.json', b'{"environment": {"torch": null}}'),
        ('training.json', b'{"fusion": {"top1_agreement": 1%s}}' % (b'0' * 308)),
        ('training.json', b'{"recipe": %s1%s}' % (b'{"a": ' * 990, b'}' * 990)),
        (
            'test/rand_tensors.safetensors',
            header_of({'input': dict(dtype='F8_E8M0', shape=[1], data_offsets=[0, 1])}, b'0'),
        ),
    ],
)
def test_whatever_a_file_raises_is_a_problem(zoo: Path, name: str, content: bytes) -> None:
    path = zoo / f'{NAME}.t' / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    report = verify_pair(zoo / f'{NAME}.t')
    assert not report.passed and all('\n' not in problem for problem in report.problems)
    assert len(str(report)) < 5_000


def test_the_marks_of_notes_take_no_time(zoo: Path) -> None:
    (zoo / f'{NAME}.t' / 'README.md').write_bytes(b'<!-- notes -->\n' * 2**20)
    began = time.process_time()
    assert not verify_pair(zoo / f'{NAME}.t').passed
    assert time.process_time() - began < 30


@pytest.mark.parametrize('images', [0, 5])
def test_a_self_check_of_many_images(zoo: Path, images: int) -> None:
    path = zoo / f'{NAME}.t' / 'test/rand_tensors.safetensors'
    path.parent.mkdir()
    tensors = {name: torch.zeros(images, 3, 32, 32) for name in ('input', 'features', 'pre_logits', 'output')}
    save_file(tensors, path)
    report = verify_pair(zoo / f'{NAME}.t')
    assert not report.passed and 'expected an input of' in report.problems[0]
