"""Checkpoint folders: what is saved loads again as the same model, and what cannot be saved changes nothing."""

import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fresh import finished, run_code, started
from safetensors import safe_open
from safetensors.torch import load_file
from stand_in import randomise
from torch import nn

import timm_reparam
from timm_reparam import FusionReport, ReparamError
from timm_reparam.hub import (
    add_facts,
    check_pair,
    check_tag,
    convert_checkpoint,
    folder_name,
    fuse_checkpoint,
    load_checkpoint,
    save_checkpoint,
    save_pair,
    verify_checkpoint,
)
from timm_reparam.hub.card import render_card
from timm_reparam.hub.facts import license_data, read_facts

SMALL = 'resnet10t_doconv'
STOCK = 'resnet10t'
TINY = dict(num_classes=4, channels=(8, 8, 8, 8), stem_width=4)
FILES = ['README.md', 'config.json', 'model.safetensors', 'training.json']
DATA_CONFIG = dict(
    input_size=(3, 32, 32),
    mean=(0.5, 0.5, 0.5),
    std=(0.2, 0.2, 0.2),
    interpolation='bilinear',
    crop_pct=1.0,
    crop_mode='center',
)
# every option of the layers, as it is by default
OPTIONS: dict[str, dict[str, Any]] = {
    'acconv': {
        'branch_norm': 'batch',
        'gamma_init': None,
        'scale': 1.0,
        'eps': 1e-5,
        'momentum': 0.1,
        'recompute': False,
    },
    'doconv': {'depth_multiplier': None},
    'dyconv': {'num_kernels': 4, 'reduction': 4, 'temperature': 30.0, 'temperature_steps': 10_000},
    'refconv': {'map_kernel_size': 3},
}
PASSED = FusionReport(algebra=1e-15, stored=1e-7, own=1e-7, bound=1e-6, top1_agreement=1.0, num_inputs=64)
FAILED = FusionReport(algebra=1e-3, stored=1e-3, own=1e-7, bound=1e-6, top1_agreement=0.5, num_inputs=64)


def small_model(name: str = SMALL, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model(name, **{**TINY, **options}), seed=1).eval()


@pytest.fixture(scope='module')
def model() -> nn.Module:
    """A small train-time model; tests leave it as it is."""
    return small_model()


@pytest.fixture(scope='module')
def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def snapshot(folder: Path) -> dict[str, str]:
    """Every file under a folder with its hash, every folder with a dash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else '-'
        for path in sorted(folder.rglob('*'))
    }


def config_of(folder: Path) -> dict:
    return json.loads((folder / 'config.json').read_text())


# Both forms


def test_a_pair_is_verified_at_the_size_that_it_names(tmp_path: Path):
    model, sizes = small_model(), set()
    handle = model.register_forward_pre_hook(lambda module, args: sizes.add(tuple(args[0].shape[1:])))
    save_pair(model, tmp_path, tag='t', data_config=dict(DATA_CONFIG, input_size=(3, 24, 28)))
    assert sizes == {(3, 24, 28)}
    handle.remove()


@pytest.mark.parametrize(
    'stock, variant, conv_options',
    [
        ('resnet10t', 'acconv', {}),
        ('resnet10t', 'acconv', {'branch_norm': 'none', 'scale': 0.5, 'init': 'scratch'}),
        ('resnet10t', 'doconv', {'depth_multiplier': 12, 'skip': ['layer1*']}),
        ('resnet10t', 'doconv', {}),
        ('resnet10t', 'refconv', {'map_kernel_size': [1, 3]}),
        ('resnet10t', 'refconv', {}),
        ('resnet10t', 'dyconv', {'num_kernels': 3}),
        ('resnet10t', 'dyconv', {'temperature_steps': 50, 'temperature': 10.0, 'skip': ['layer1*']}),
        ('resnet10t', 'dyconv', {}),
    ],
)
def test_pair_loads_as_saved(tmp_path: Path, images: torch.Tensor, stock: str, variant: str, conv_options: dict):
    name = f'{stock}_{variant}'
    model = small_model(name, **({'conv_options': conv_options} if conv_options else {}))
    fused = timm_reparam.fuse_model(model)
    report = timm_reparam.verify_fusion(model, fused, inputs=images)
    folders = save_pair(model, tmp_path, tag='t1', fused=fused, report=report, data_config=DATA_CONFIG)
    assert folders == (tmp_path / f'{name}.t1', tmp_path / f'{name}.t1_fused')
    for folder, source in zip(folders, (model, fused)):
        assert sorted(os.listdir(folder)) == FILES
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        state = loaded.state_dict()
        assert state.keys() == source.state_dict().keys()
        for key, tensor in source.state_dict().items():
            assert torch.equal(tensor, state[key]), key
        with torch.no_grad():
            assert torch.equal(loaded(images), source(images))
    train_time, inference = config_of(folders[0]), config_of(folders[1])
    assert train_time['architecture'] == name
    assert train_time['reparam_format'] == inference['reparam_format'] == 2
    given = {key: value for key, value in conv_options.items() if key != 'init'}
    assert train_time['model_args']['conv_options'] == {**OPTIONS[variant], **given}
    if variant == 'dyconv':
        assert inference['architecture'] == name
        schedule = {'temperature': None, 'temperature_steps': 10_000}
        assert inference['model_args']['conv_options'] == {**OPTIONS[variant], **given, **schedule}
    else:
        assert inference['architecture'] == stock
        assert 'conv_options' not in inference['model_args']
        stock_state = timm.create_model(stock, **TINY).state_dict()
        saved = load_file(folders[1] / 'model.safetensors')
        assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in stock_state.items()}
    for folder, sibling in zip(folders, reversed(folders)):
        facts = json.loads((folder / 'training.json').read_text())
        digest = hashlib.sha256((sibling / 'model.safetensors').read_bytes()).hexdigest()
        assert facts['sibling'] == {'name': sibling.name, 'sha256': digest}
        assert facts['fusion'] == report.to_dict()
        assert (facts['variant'], facts['stock_architecture'], facts['tag']) == (variant, stock, 't1')


def test_fused_folders_need_no_plugin(tmp_path: Path, images: torch.Tensor):
    """Stock timm alone, in a process that cannot import the plugin, gives the train-time model's logits."""
    bounds = {}
    for name in ('resnet10t_acconv', 'resnet10t_doconv', 'resnet10t_refconv'):
        model = small_model(name)
        fused = timm_reparam.fuse_model(model)
        report = timm_reparam.verify_fusion(model, fused, inputs=images)
        save_pair(model, tmp_path, tag='t', fused=fused, report=report)
        with torch.no_grad():
            torch.save(model.double()(images.double()), tmp_path / f'{name}.pt')
        bounds[name] = report.bound
    torch.save(images, tmp_path / 'images.pt')
    code = """
import json, sys
sys.modules['timm_reparam'] = None  # makes importing it an ImportError
import timm, torch
images = torch.load('images.pt')
for name, bound in json.loads(sys.argv[1]).items():
    model = timm.create_model(f'local-dir:{name}.t_fused', pretrained=True).eval()
    assert type(model).__module__.startswith('timm.')
    assert all(type(module).__module__.split('.')[0] in ('timm', 'torch') for module in model.modules())
    expected = torch.load(f'{name}.pt')
    with torch.no_grad():
        difference = (model(images) - expected).abs().max() / expected.abs().max()
    assert difference <= bound, (name, float(difference), bound)
"""
    done = finished(run_code, code, json.dumps(bounds), folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_config_describes_the_trained_weights(tmp_path: Path):
    model = small_model('resnet10t_doconv', in_chans=1, num_classes=3)
    assert model.pretrained_cfg.get('tag') not in (None, 'mine')
    facts = {
        'dataset': {'name': 'shapes', 'label_names': ['circle', 'square', 'star']},
        'base_model': {'id': 'timm/resnet10t.c3_in1k', 'license': 'apache-2.0'},
    }
    data_config = dict(DATA_CONFIG, input_size=(1, 24, 28), mean=(0.1,), std=(0.3,))
    for folder in save_pair(model, tmp_path, tag='mine', report=PASSED, facts=facts, data_config=data_config):
        config = config_of(folder)
        cfg = config['pretrained_cfg']
        assert (config['num_classes'], cfg['num_classes'], config['model_args']['num_classes']) == (3, 3, 3)
        assert config['model_args']['in_chans'] == 1
        assert (cfg['input_size'], cfg['mean'], cfg['std']) == ([1, 24, 28], [0.1], [0.3])
        assert (cfg['interpolation'], cfg['crop_pct'], cfg['crop_mode']) == ('bilinear', 1.0, 'center')
        assert (cfg['tag'], cfg['license']) == ('mine', 'apache-2.0')
        assert config['label_names'] == ['circle', 'square', 'star']
        stale = {'url', 'file', 'hf_hub_id', 'source', 'origin_url', 'paper_ids', 'test_input_size', 'test_crop_pct'}
        assert not stale & cfg.keys()
        loaded = load_checkpoint(folder)
        resolved = timm.data.resolve_model_data_config(loaded)
        assert (resolved['input_size'], resolved['mean'], resolved['std']) == ((1, 24, 28), [0.1], [0.3])


def test_base_licence_is_not_kept_for_weights_from_scratch(tmp_path: Path, model: nn.Module):
    assert model.pretrained_cfg.get('license')
    folder, _ = save_pair(model, tmp_path, tag='t', report=PASSED, facts={'base_model': None})
    assert 'license' not in config_of(folder)['pretrained_cfg']


def test_source_model_is_left_alone(tmp_path: Path, images: torch.Tensor):
    model = small_model().train()
    cfg, args = json.dumps(model.pretrained_cfg), json.dumps(model._model_args)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    save_pair(model, tmp_path, tag='t', report=timm_reparam.verify_fusion(model, inputs=images))
    assert model.training
    assert (json.dumps(model.pretrained_cfg), json.dumps(model._model_args)) == (cfg, args)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_same_model_gives_the_same_bytes(tmp_path: Path, model: nn.Module):
    for zoo in ('one', 'two'):
        save_pair(model, tmp_path / zoo, tag='t', report=PASSED)
    assert snapshot(tmp_path / 'one') == snapshot(tmp_path / 'two')


# Shapes that a model comes in


def test_channels_last(tmp_path: Path):
    model = small_model().to(memory_format=torch.channels_last)
    assert not model.layer1[0].conv1.weight.is_contiguous()
    save_checkpoint(model, tmp_path / 'm')
    assert torch.equal(load_checkpoint(tmp_path / 'm').layer1[0].conv1.weight, model.layer1[0].conv1.weight)


def test_bfloat16(tmp_path: Path):
    model = small_model(STOCK).bfloat16()
    save_checkpoint(model, tmp_path / 'm')
    with safe_open(tmp_path / 'm' / 'model.safetensors', 'pt') as file:
        assert file.get_tensor('fc.weight').dtype == torch.bfloat16
        assert file.metadata() == {'format': 'pt'}


def test_shared_tensors(tmp_path: Path):
    model = small_model('resnet10t')
    model.bn1.bias = model.bn1.weight
    model.fc.weight = nn.Parameter(torch.randn(8, 8)[2:6])  # a piece of something larger
    save_checkpoint(model, tmp_path / 'm')
    saved = load_file(tmp_path / 'm' / 'model.safetensors')
    assert torch.equal(saved['bn1.bias'], model.bn1.weight) and torch.equal(saved['bn1.weight'], model.bn1.weight)
    assert torch.equal(saved['fc.weight'], model.fc.weight)


@pytest.mark.parametrize('wrap', [nn.DataParallel, timm.utils.ModelEmaV3, torch.compile])
def test_wrapped(tmp_path: Path, model: nn.Module, wrap):
    save_checkpoint(wrap(model), tmp_path / 'm')
    assert torch.equal(load_checkpoint(tmp_path / 'm').fc.weight, model.fc.weight)


def test_file_modes_follow_the_umask(tmp_path: Path, model: nn.Module):
    old = os.umask(0o027)
    try:
        save_checkpoint(model, tmp_path / 'm', facts={})
    finally:
        os.umask(old)
    assert (tmp_path / 'm').stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / 'm').iterdir()} == {0o640}


def test_own_card(tmp_path: Path, model: nn.Module):
    save_checkpoint(model, tmp_path / 'm', card='# mine\n')
    assert (tmp_path / 'm' / 'README.md').read_text() == '# mine\n'


# Replacing


def test_same_architecture_is_replaced(tmp_path: Path, model: nn.Module):
    first = save_pair(model, tmp_path, tag='t', report=PASSED, facts={'metrics': {'fused': {'top1': 1.0}}})
    before = snapshot(tmp_path)
    other = small_model()
    with torch.no_grad():
        other.fc.weight.add_(1.0)
    assert save_pair(other, tmp_path, tag='t', report=PASSED) == first
    after = snapshot(tmp_path)
    assert after.keys() == before.keys()
    assert all(after[key] != before[key] for key in after if after[key] != '-' and not key.endswith('config.json'))
    assert torch.equal(load_checkpoint(first[0]).fc.weight, other.fc.weight)


def test_empty_folder_is_filled(tmp_path: Path, model: nn.Module):
    (tmp_path / 'm').mkdir()
    save_checkpoint(model, tmp_path / 'm')
    assert load_checkpoint(tmp_path / 'm').num_classes == 4


def test_leftovers_of_a_killed_save(tmp_path: Path, model: nn.Module):
    """A folder that was set aside comes back before it is replaced; unfinished ones and those of no use go."""
    target = save_checkpoint(model, tmp_path / 'm')
    target.rename(tmp_path / '.m.previous')
    (tmp_path / '.m.partial').mkdir()
    (tmp_path / '.m.partial' / 'model.safetensors').write_bytes(b'half')
    with pytest.raises(ReparamError, match=f'got one of {SMALL}'):  # the one that came back
        save_checkpoint(small_model('resnet10t'), target)
    assert sorted(os.listdir(tmp_path)) == ['.m.partial', 'm']
    (tmp_path / '.m.previous').mkdir()
    save_checkpoint(model, target)
    assert os.listdir(tmp_path) == ['m']


@pytest.mark.slow
def test_interrupted_at_every_step(tmp_path: Path):
    command = [sys.executable, Path(__file__).with_name('interrupted_saves.py'), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed = [line for line in done.stdout.splitlines() if line.startswith('kill from a pair')]
    # every state on the way from the old pair to the new one was seen
    assert killed and set(killed[0].split()[5:]) == {'old/old', 'aside/old', 'new/old', 'new/aside', 'new/new'}


def test_full_disk(tmp_path: Path, model: nn.Module):
    """A limit on the size of files ends the write of the weights as a full disk would."""
    resource = pytest.importorskip('resource')
    save_checkpoint(model, tmp_path / 'm')
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ('m', 'new'):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(ReparamError, match='cannot be written'):
                save_checkpoint(model, tmp_path / name)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert snapshot(tmp_path) == before


def test_two_saves_at_once(tmp_path: Path):
    """Here and in another process, until that one is done."""
    code = f"""
import timm, timm_reparam
from timm_reparam.hub import save_checkpoint
model = timm.create_model({SMALL!r}, **{{**{TINY!r}, 'num_classes': 3}})
print('begins', flush=True)
for _ in range(5):
    save_checkpoint(model, 'm')
"""
    model, saves = small_model(), 0
    with started(run_code, code, folder=tmp_path) as (process, (printed, errors)):
        while process.is_alive() and not (printed.exists() and printed.read_text()):
            time.sleep(0.01)
        while process.is_alive():
            save_checkpoint(model, tmp_path / 'm')
            saves += 1
        assert process.exitcode == 0, errors.read_text()
    assert saves and os.listdir(tmp_path) == ['m']
    assert load_checkpoint(tmp_path / 'm').num_classes in (3, 4)


@pytest.mark.parametrize('checked', ['save', 'pair', 'facts'])
def test_looks_only_when_no_other_save_is_at_work(tmp_path: Path, checked: str):
    """What lies there while another save exchanges folders is no reason to refuse."""
    fcntl = pytest.importorskip('fcntl')
    model = small_model()
    name = folder_name(SMALL, 'a', fused=False)
    target = save_checkpoint(model, tmp_path / name)
    outcome: list[Any] = []

    def work() -> None:
        try:
            if checked == 'save':
                outcome.append(save_checkpoint(model, target))
            elif checked == 'facts':
                outcome.append(add_facts(target, {'license': 'mit'}))
            else:
                outcome.append(check_pair(SMALL, tmp_path, tag='a'))
        except BaseException as error:
            outcome.append(error)

    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        config = (target / 'config.json').read_bytes()
        (target / 'config.json').unlink()
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.2)
        (target / 'config.json').write_bytes(config)
    finally:
        os.close(descriptor)
    thread.join(60)
    assert outcome == [None if checked == 'pair' else target]


# Refusals, with everything left as it was


def not_a_number(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model.fc.weight[0, 0] = float('nan')
    return model


def infinite_statistics(model: nn.Module) -> nn.Module:
    model.bn1.running_var[0] = float('inf')
    return model


@pytest.mark.parametrize(
    'make, words',
    [
        (lambda: not_a_number(small_model()), 'fc.weight'),
        (lambda: infinite_statistics(small_model()), 'bn1.running_var'),
        (lambda: nn.Conv2d(3, 4, 3), 'pretrained_cfg'),
        (lambda: timm.create_model(STOCK, features_only=True), 'num_classes'),
        (lambda: timm.create_model(STOCK, norm_layer=nn.BatchNorm2d), 'json'),
        (lambda: timm.create_model(STOCK, **TINY).to('meta'), 'tensor with values'),
        (lambda: timm_reparam.convert_model(timm.create_model('test_resnet'), 'doconv'), 'test_resnet_doconv'),
    ],
)
def test_models_that_cannot_be_saved(tmp_path: Path, make, words: str):
    with pytest.raises(ReparamError, match=words):
        save_checkpoint(make(), tmp_path / 'm')
    assert os.listdir(tmp_path) == []


def other_architecture(place: Path) -> None:
    save_checkpoint(small_model(STOCK), place)


def foreign_files(place: Path) -> None:
    place.mkdir()
    (place / 'notes.txt').write_text('mine')


def only_a_card(place: Path) -> None:
    place.mkdir()
    (place / 'README.md').write_text('mine')


def unreadable_config(place: Path) -> None:
    place.mkdir()
    (place / 'config.json').write_text('{')


@pytest.mark.parametrize(
    'occupy, words',
    [
        (other_architecture, 'resnet10t;'),
        (foreign_files, 'notes.txt'),
        (only_a_card, 'config.json'),
        (unreadable_config, 'config.json'),
        (lambda place: place.write_text('a file'), 'a file'),
        (lambda place: place.symlink_to(place.parent), 'link'),
        (lambda place: place.symlink_to('nowhere'), 'link'),
    ],
)
@pytest.mark.parametrize('save', ['checkpoint', 'pair', 'check'])
def test_places_that_are_taken(tmp_path: Path, model: nn.Module, save: str, occupy, words: str):
    place = tmp_path / folder_name(SMALL, 't', fused=False)
    occupy(place)
    before = snapshot(tmp_path)
    with pytest.raises(ReparamError, match=words):
        if save == 'checkpoint':
            save_checkpoint(model, place)
        elif save == 'pair':
            save_pair(model, tmp_path, tag='t', report=PASSED)
        else:
            check_pair(SMALL, tmp_path, tag='t')
    assert snapshot(tmp_path) == before


def test_place_of_the_fused_form_is_taken(tmp_path: Path, model: nn.Module):
    """Neither form is written when only one of them could be."""
    save_checkpoint(small_model('resnet10t_acconv'), tmp_path / folder_name(SMALL, 't', fused=True))
    before = snapshot(tmp_path)
    with pytest.raises(ReparamError, match='got one of resnet10t_acconv'):
        save_pair(model, tmp_path, tag='t', report=PASSED)
    with pytest.raises(ReparamError, match='got one of resnet10t_acconv'):
        check_pair(SMALL, tmp_path, tag='t')
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize('place', ['missing/zoo', 'file/zoo'])
def test_parents_that_cannot_hold_a_folder(tmp_path: Path, model: nn.Module, place: str):
    (tmp_path / 'file').write_text('a file')
    zoo = tmp_path / place
    for save in (
        lambda: save_checkpoint(model, zoo),
        lambda: save_pair(model, zoo, tag='t', report=PASSED),
        lambda: check_pair(SMALL, zoo, tag='t'),
    ):
        with pytest.raises(ReparamError, match=str(zoo)):
            save()
        assert os.listdir(tmp_path) == ['file']


@pytest.mark.skipif(not Path('/proc/self').is_dir(), reason='needs a file system that refuses to be written')
def test_file_system_that_refuses(model: nn.Module):
    for save in (
        lambda: save_checkpoint(model, '/proc/self/m'),
        lambda: save_pair(model, '/proc/self', tag='t', report=PASSED),
        lambda: check_pair(SMALL, '/proc/self', tag='t'),
        lambda: check_pair(SMALL, '/proc/self/zoo', tag='t'),
    ):
        with pytest.raises(ReparamError, match='/proc/'):
            save()


@pytest.mark.parametrize(
    'options, words',
    [
        ({'report': FAILED}, 'differs'),
        ({'tag': 'a/b'}, 'tag'),
        ({'facts': {'metrics': {'fused': {'top1': float('nan')}}}}, 'metrics'),
        ({'facts': {'dataset': {'name': 3}}}, 'dataset.name'),
        ({'facts': {'dataset': {'label_names': ['only one']}}}, 'label_names'),
        ({'facts': {'recipe': {'model': nn.Identity()}}}, 'recipe'),
        ({'data_config': {'input_size': (1, 32, 32)}}, 'channels'),
        ({'fused': small_model()}, 'variant layer'),
        ({'fused': timm.create_model('resnet14t', **TINY)}, 'resnet14t'),
    ],
)
def test_pairs_that_are_refused(tmp_path: Path, model: nn.Module, options: dict, words: str):
    with pytest.raises(ReparamError, match=words):
        save_pair(model, tmp_path / 'zoo', **{'tag': 't', 'report': PASSED, **options})
    assert os.listdir(tmp_path) == []


def test_pair_with_damaged_weights_names_them(tmp_path: Path):
    model = small_model()
    with torch.no_grad():
        model.layer1[0].conv1.weight[0] = float('nan')
    with pytest.raises(ReparamError, match='NaN or infinity in layer1.0.conv1.weight'):
        save_pair(model, tmp_path, tag='t')
    assert os.listdir(tmp_path) == []


def test_pair_of_a_stock_model_is_refused(tmp_path: Path):
    with pytest.raises(ReparamError, match='convert'):
        save_pair(small_model(STOCK), tmp_path, tag='t')


# Names


@pytest.mark.parametrize('tag', ['digits', 'a1_in1k', 'v1.0', 'A-b', '7', 'x' * 40])
def test_legal_tags(tag: str):
    assert check_tag(tag, SMALL) == tag
    assert folder_name(SMALL, tag, fused=False) == f'{SMALL}.{tag}'
    assert folder_name(SMALL, tag, fused=True) == f'{SMALL}.{tag}_fused'


@pytest.mark.parametrize(
    'tag',
    [
        *(
            '',
            '.',
            '..',
            '../up',
            'a/b',
            'a b',
            'a--b',
            'a..b',
            '.a',
            'a-',
            'a.',
            'é',
            'a\n',
            'x.git',
            'x_fused',
            'x' * 80,
        ),
        None,
    ],
)
def test_illegal_tags(tag: str):
    with pytest.raises(ReparamError, match='tag'):
        check_tag(tag, SMALL)


def test_check_pair(tmp_path: Path, model: nn.Module):
    check_pair(SMALL, tmp_path / 'zoo', tag='t')
    assert os.listdir(tmp_path) == []
    save_pair(model, tmp_path / 'zoo', tag='t', report=PASSED)
    before = snapshot(tmp_path)
    check_pair(SMALL, tmp_path / 'zoo', tag='t')
    assert snapshot(tmp_path) == before


# Folder to folder


@pytest.fixture
def pair(tmp_path: Path, model: nn.Module) -> tuple[Path, Path]:
    facts = {
        'metrics': {'train_time': {'top1': 90.0}, 'fused': {'top1': 91.0}},
        'dataset': {'name': 'shapes'},
        'logit_difference': 1e-6,
    }
    return save_pair(model, tmp_path, tag='t', report=PASSED, facts=facts, data_config=DATA_CONFIG)


def test_add_facts(tmp_path: Path, pair: tuple[Path, Path]):
    weights = (pair[0] / 'model.safetensors').read_bytes()
    config = config_of(pair[0])
    before = read_facts(pair[0])
    assert add_facts(pair[0], {'license': 'mit', 'metrics': None}) == pair[0]
    assert read_facts(pair[0]) == {**before, 'license': 'mit', 'metrics': None}
    assert read_facts(pair[1])['license'] == 'mit' and config_of(pair[1])['pretrained_cfg']['license'] == 'mit'
    assert (pair[1] / 'README.md').read_text() == render_card(pair[1])
    card = (pair[0] / 'README.md').read_text()
    assert card == render_card(pair[0]) and 'license: mit' in card
    assert (pair[0] / 'model.safetensors').read_bytes() == weights
    assert verify_checkpoint(*pair).passed
    licensed = {**config['pretrained_cfg'], 'license': 'mit'}
    assert config_of(pair[0]) == {**config, 'pretrained_cfg': licensed}
    add_facts(pair[0], {'license': None})
    assert config_of(pair[0]) == config
    add_facts(pair[0], {'license': 'mit'})

    (pair[0] / 'README.md').write_text(card + 'My own words.\n')
    add_facts(pair[0], {'tag': 'other'})
    assert (pair[0] / 'README.md').read_text() == card + 'My own words.\n'
    assert sorted(os.listdir(pair[0])) == FILES

    found = snapshot(tmp_path)
    for facts in ({'tag': 3}, {'license': float('nan')}):
        with pytest.raises(ReparamError, match=next(iter(facts))):
            add_facts(pair[0], facts)
    with pytest.raises(ReparamError, match='config.json'):
        add_facts(tmp_path / 'none', {})
    assert snapshot(tmp_path) == found


def test_fuse_checkpoint(tmp_path: Path, pair: tuple[Path, Path]):
    folder, report = fuse_checkpoint(pair[0], tmp_path / 'again')
    assert report.passed and report.num_inputs == 8  # conftest.py: few_images
    weights = [(one / 'model.safetensors').read_bytes() for one in (folder, pair[1])]
    assert weights[0] == weights[1]
    assert config_of(folder) == config_of(pair[1])
    facts, expected = (json.loads((one / 'training.json').read_text()) for one in (folder, pair[1]))
    assert facts == {**expected, 'fusion': report.to_dict()}
    assert verify_checkpoint(pair[0], folder).passed


def test_fused_figures_of_other_weights_are_dropped(tmp_path: Path, pair: tuple[Path, Path]):
    facts = json.loads((pair[0] / 'training.json').read_text())
    facts['sibling']['sha256'] = '0' * 64
    (pair[0] / 'training.json').write_text(json.dumps(facts))
    folder, _ = fuse_checkpoint(pair[0], tmp_path / 'again')
    facts = json.loads((folder / 'training.json').read_text())
    assert facts['metrics'] == {'train_time': {'top1': 90.0}}
    assert 'logit_difference' not in facts


def test_fused_card_of_a_fetched_folder_does_not_load_what_it_was_made_of(tmp_path: Path, pair: tuple[Path, Path]):
    facts = json.loads((pair[0] / 'training.json').read_text())
    (pair[0] / 'training.json').write_text(json.dumps({**facts, 'repo': f'me/{pair[0].name}'}))
    folder, _ = fuse_checkpoint(pair[0], tmp_path / 'again')
    facts, card = json.loads((folder / 'training.json').read_text()), (folder / 'README.md').read_text()
    assert 'repo' not in facts and facts['sibling']['repo'] == f'me/{pair[0].name}'
    assert 'hf-hub:' not in card and f'local-dir:path/to/{pair[1].name}' in card


def test_fuse_checkpoint_without_facts(tmp_path: Path, model: nn.Module):
    save_checkpoint(model, tmp_path / 'm', data_config=DATA_CONFIG)
    folder, report = fuse_checkpoint(tmp_path / 'm', tmp_path / 'f')
    assert report.passed
    assert sorted(os.listdir(folder)) == ['README.md', 'config.json', 'model.safetensors']
    assert config_of(folder)['pretrained_cfg']['input_size'] == [3, 32, 32]


def test_fuse_refuses_a_fused_checkpoint(tmp_path: Path, pair: tuple[Path, Path]):
    with pytest.raises(ReparamError, match='nothing to fuse'):
        fuse_checkpoint(pair[1], tmp_path / 'again')


def test_verify_checkpoint(pair: tuple[Path, Path]):
    assert verify_checkpoint(pair[0]).passed
    assert verify_checkpoint(pair[1]).passed


def test_verify_finds_a_half_that_was_replaced(tmp_path: Path, pair: tuple[Path, Path], model: nn.Module):
    other = small_model()
    with torch.no_grad():
        other.fc.weight.add_(1.0)
    save_checkpoint(other, pair[0], data_config=DATA_CONFIG, facts=read_facts(pair[0]))
    with pytest.raises(ReparamError, match='sha256'):
        verify_checkpoint(pair[0])
    for name in ('training.json', 'README.md'):  # nothing tells but the weights
        (pair[1] / name).unlink()
    assert not verify_checkpoint(pair[0]).passed


def test_folders_that_do_not_load(tmp_path: Path, model: nn.Module):
    folder = tmp_path / 'm'
    with pytest.raises(ReparamError, match='config.json: not found'):
        load_checkpoint(folder)
    save_checkpoint(model, folder)
    weights = (folder / 'model.safetensors').read_bytes()
    (folder / 'model.safetensors').write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ReparamError, match='is not a safetensors file'):
        load_checkpoint(folder)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(ReparamError, match='safetensors'):
        load_checkpoint(folder)
    (folder / 'pytorch_model.bin').rename(folder / 'model.safetensors')
    config = config_of(folder)
    (folder / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet_of_nobody'}))
    with pytest.raises(ReparamError, match='resnet_of_nobody'):
        load_checkpoint(folder)


# The way back in


def stock_folder(tmp_path: Path, **options) -> tuple[nn.Module, Path]:
    model = small_model(STOCK, **options)
    return model, save_checkpoint(model, tmp_path / 'stock')


@pytest.mark.parametrize('variant', ['acconv', 'doconv', 'refconv'])
def test_fused_folder_becomes_trainable_again(tmp_path: Path, images: torch.Tensor, variant: str):
    facts = {
        'license': 'mit',
        'dataset': {'name': 'd', 'label_names': list('abcd')},
        'metrics': {'fused': {'top1': 9.0}},
    }
    _, fused = save_pair(small_model(f'{STOCK}_{variant}'), tmp_path, tag='t', facts=facts, data_config=DATA_CONFIG)
    folder, report = convert_checkpoint(fused, tmp_path / 'again', f'{STOCK}_{variant}')
    assert report.passed and folder == tmp_path / 'again' and sorted(os.listdir(folder)) == FILES
    model, expected = load_checkpoint(folder), load_checkpoint(fused)
    for mode in (False, True):
        with torch.no_grad():
            assert torch.equal(model.train(mode)(images), expected.train(mode)(images))
    assert not getattr(model.layer1[0].conv1, 'depthwise_weight', torch.zeros(1)).any()  # lifted, not trained
    again = json.loads((folder / 'training.json').read_text())
    assert (again['form'], again['variant'], again['name']) == ('train_time', variant, 'again')
    assert again['license'] == 'mit' and again['dataset'] == facts['dataset'] and again['tag'] == 't'
    assert not again.keys() & {'metrics', 'sibling', 'fusion'}  # these were another folder's
    config = config_of(folder)
    assert config['label_names'] == list('abcd') and config['num_classes'] == 4
    for key, value in DATA_CONFIG.items():
        assert config['pretrained_cfg'][key] == (list(value) if isinstance(value, tuple) else value)
    save_pair(model.eval(), tmp_path, tag='second', data_config=DATA_CONFIG)


@pytest.mark.parametrize('conv_options', [{}, {'depth_multiplier': 12, 'skip': ['layer1*']}], ids=str)
def test_stock_folder_is_lifted(tmp_path: Path, images: torch.Tensor, conv_options: dict):
    """Of one input channel; the folder says what the model's arguments are."""
    stock, source = stock_folder(tmp_path, in_chans=1)
    options = {'conv_options': conv_options} if conv_options else {}
    folder, report = convert_checkpoint(source, tmp_path / 'out', SMALL, **options)
    model = load_checkpoint(folder)
    with torch.no_grad():
        assert torch.equal(model(images[:, :1]), stock(images[:, :1]))
    assert config_of(folder)['model_args']['conv_options'] == {**OPTIONS['doconv'], **conv_options}
    assert report.passed and timm_reparam.verify_fusion(model, stock).passed


def test_form_for_inference_becomes_trainable_again(tmp_path: Path, images: torch.Tensor):
    model = small_model('resnet10t_dyconv', conv_options=dict(num_kernels=3))
    _, fused = save_pair(model, tmp_path, tag='t', data_config=DATA_CONFIG)
    folder, _ = convert_checkpoint(fused, tmp_path / 'again', 'resnet10t_dyconv')
    again = load_checkpoint(folder)
    layer = again.layer1[0].conv1
    assert layer.num_kernels == 3 and layer.temperature == 30 and layer.current_temperature() == 1
    with torch.no_grad():
        assert torch.equal(again(images), load_checkpoint(fused)(images))


def test_train_time_folder_stays_what_it_is(tmp_path: Path, images: torch.Tensor):
    """In mid-schedule, with a temperature of its own."""
    options = dict(num_kernels=3, temperature=10.0, temperature_steps=8)
    model = small_model('resnet10t_dyconv', conv_options=options).train()
    model(images)
    source = save_checkpoint(model.eval(), tmp_path / 'source', data_config=DATA_CONFIG)
    again = load_checkpoint(convert_checkpoint(source, tmp_path / 'again', 'resnet10t_dyconv')[0])
    assert 1 < again.layer1[0].conv1.current_temperature() < 10
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize('kind', ['a training script', 'official code'])
def test_file_becomes_a_folder(tmp_path: Path, images: torch.Tensor, kind: str):
    """Its number of classes is found; nothing is known of its licence, whatever timm's own weights have."""
    model = small_model()
    state = dict(model.state_dict())
    if kind == 'official code':
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d):
                weight = state.pop(f'{name}.weight').flatten(2)
                state[f'{name}.W'] = weight
                if f'{name}.depthwise_weight' in state:
                    state[f'{name}.D'] = state.pop(f'{name}.depthwise_weight')
                    state[f'{name}.d_diag'] = torch.eye(9).expand(state[f'{name}.D'].shape)
    checkpoint = {'arch': SMALL, 'epoch': 3, 'state_dict': {f'module.{key}': value for key, value in state.items()}}
    torch.save(checkpoint, tmp_path / 'last.pth.tar')
    tiny = {name: value for name, value in TINY.items() if name != 'num_classes'}
    folder, report = convert_checkpoint(tmp_path / 'last.pth.tar', tmp_path / 'out', SMALL, **tiny)
    loaded = load_checkpoint(folder)
    assert report.passed and loaded.num_classes == 4
    for key, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    assert 'license' not in config_of(folder)['pretrained_cfg'] and not license_data(read_facts(folder) or {})


def test_what_cannot_be_converted_leaves_nothing(tmp_path: Path):
    _, source = stock_folder(tmp_path)
    (tmp_path / 'no.pth').write_bytes(b'no weights')
    torch.save({'epoch': 3}, tmp_path / 'none.pth')
    torch.save({'stray': torch.zeros(1)}, tmp_path / 'stray.pth')
    before = snapshot(tmp_path)
    for checkpoint, name, options, words in (
        (source, STOCK, {}, 'expected the name of a variant'),
        (source, 'resnet18_doconv', {}, r'(?s)missing.*conv1\.weight'),
        (source, SMALL, dict(conv_options=dict(depth_multiplier=2)), 'depth_multiplier'),
        (source, 'resnet10t_acconv', dict(conv_options=dict(gamma_init=0.5)), 'scratch'),
        (source, SMALL, dict(num_classes=7), 'num_classes: expected 4, as in the checkpoint, got 7'),
        (tmp_path / 'missing.pth', SMALL, {}, 'not found'),
        (tmp_path / 'no.pth', SMALL, {}, 'cannot be read'),
        (tmp_path / 'none.pth', SMALL, {}, 'state dict of tensors'),
        (tmp_path / 'stray.pth', SMALL, {}, r'(?s)missing.*unexpected: stray'),
    ):
        with pytest.raises(ReparamError, match=words):
            convert_checkpoint(checkpoint, tmp_path / 'out', name, **options)
        assert snapshot(tmp_path) == before, words
