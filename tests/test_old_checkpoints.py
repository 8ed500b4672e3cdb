"""Checkpoints that earlier versions have saved load for ever, as the functions that they were.

``fixtures/<version>/`` holds pairs as `save_pair` of that version wrote them (all variants, with default and with odd
options), and in ``expected.safetensors`` an input and what every one of them made of it. They are never written anew.

The options that they do not name are the defaults of 0.1.0, whatever the defaults are by now: some are changed here.
"""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub.server import HubServer
from safetensors.torch import load_file
from stand_in import disturbed, images
from timm.models import get_model_args, resolve_model_input_args, save_for_hf
from timm.utils import reparameterize_model

import timm_reparam
from timm_reparam import ReparamError, hub
from timm_reparam._defaults import DEFAULTS_OF_0_1_0
from timm_reparam.hub.facts import sha256_of
from timm_reparam.hub.gate import check_card
from timm_reparam.hub.training import load_training
from timm_reparam.hub.untrusted import check_folder
from timm_reparam.variants import VARIANTS, variant_of

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
    for variant in DEFAULTS_OF_0_1_0:
        names = {folder.name for folder in FOLDERS if f'_{variant}.' in folder.name}
        assert {f'{name}_fused' for name in names if not name.endswith('_fused')} <= names and len(names) >= 4


@pytest.mark.parametrize('folder', FOLDERS, ids=identifier)
def test_a_folder_loads_as_what_it_was(folder: Path) -> None:
    assert_as_it_was(timm.create_model(f'local-dir:{folder}', pretrained=True), folder)
    assert_as_it_was(hub.load_checkpoint(folder), folder)


@pytest.mark.parametrize('folder', FOLDERS, ids=identifier)
def test_the_claims_of_its_card_are_checked(folder: Path, tmp_path: Path) -> None:
    """In its front matter; the text is that of other templates."""
    sha256 = sha256_of(folder / 'model.safetensors')
    (warning,) = check_card(folder, sha256)
    assert 'README.md: differs from what the installed templates render' in warning
    copy = shutil.copytree(folder, tmp_path / folder.name)
    card = (copy / 'README.md').read_text(encoding='utf-8')
    changed = card.replace('license: apache-2.0', 'license: gpl-3.0')
    assert changed != card
    (copy / 'README.md').write_text(changed, encoding='utf-8')
    with pytest.raises(ReparamError, match="README.md: license: expected 'apache-2.0', got 'gpl-3.0'"):
        check_card(copy, sha256)


@pytest.mark.parametrize('folder', TRAIN_TIME, ids=identifier)
def test_a_pair_is_fused_and_verified_again(folder: Path) -> None:
    x, _ = expected(folder)
    fused_folder = folder.with_name(f'{folder.name}_fused')
    model, fused = hub.load_checkpoint(folder), hub.load_checkpoint(fused_folder)
    assert timm_reparam.verify_fusion(model, fused, inputs=x).passed
    assert_as_it_was(timm_reparam.fuse_model(model), fused_folder)


# Options that are not named -------------------------------------------------------------------------------------------

# Every option by variant, as it was by default in 0.1.0.
OPTIONS: dict[str, dict[str, Any]] = {
    'acconv': dict(branch_norm='batch', gamma_init=None, scale=1.0, eps=1e-5, momentum=0.1, recompute=False),
    'doconv': dict(depth_multiplier=None),
    'dyconv': dict(num_kernels=4, reduction=4, temperature=30.0, temperature_steps=10_000),
    'refconv': dict(map_kernel_size=3),
}
# Other defaults, under which a checkpoint of the old ones would not load, or be another function.
CASES = [
    ('acconv', dict(eps=0.5, momentum=0.7, recompute=True)),
    ('acconv', dict(branch_norm='none', eps=0.5)),
    ('doconv', dict(depth_multiplier=30)),
    ('dyconv', dict(num_kernels=2, temperature=300.0, temperature_steps=3, reduction=1)),
    ('refconv', dict(map_kernel_size=1)),
    # each by itself, which is slow
    ('dyconv', dict(num_kernels=2, temperature=300.0, temperature_steps=3)),
    ('dyconv', dict(reduction=1)),
]
CHANGES = [*CASES[:5], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[5:])]
TINY = dict(channels=(4, 4, 8, 8), stem_width=4, num_classes=3)

ChangeDefaults = Callable[[str, dict[str, Any]], None]


@pytest.fixture
def change_defaults(monkeypatch: pytest.MonkeyPatch) -> ChangeDefaults:
    """Gives the layers of a variant other defaults, for one test."""

    def change(variant: str, options: dict[str, Any]) -> None:
        for layer in VARIANTS[variant].layers:
            for name, value in options.items():
                monkeypatch.setitem(layer.__init__.__kwdefaults__, name, value)
        assert options.items() <= layer.default_options().items()

    return change


def recorded_in(folder: Path) -> dict[str, Any] | None:
    return json.loads((folder / 'config.json').read_text())['model_args'].get('conv_options')


def with_small_images(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint for images of 32 pixels, on which verifying is quick."""
    shutil.copytree(folder, target)
    config = json.loads((target / 'config.json').read_text())
    config['pretrained_cfg']['input_size'] = [3, 32, 32]
    (target / 'config.json').write_text(json.dumps(config))
    return target


def folders_of(variant: str) -> list[Path]:
    return [folder for folder in FOLDERS if f'_{variant}.' in folder.name and folder.parent.name == '0.1.0']


@pytest.mark.parametrize('variant, changes', CHANGES, ids=str)
def test_what_is_not_named_is_the_default_of_0_1_0(tmp_path: Path, change_defaults: ChangeDefaults, variant, changes):
    change_defaults(variant, changes)
    folders = folders_of(variant)
    assert len(folders) >= 4 and None in map(recorded_in, folders)
    for folder in folders:
        named = recorded_in(folder)
        assert_as_it_was(hub.load_checkpoint(folder), folder)
        check_folder(folder)
        # as timm's scripts go about it
        assert_as_it_was(timm.create_model(pretrained=True, **resolve_model_input_args(f'local-dir:{folder}')), folder)
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        assert_as_it_was(model, folder)
        again = hub.save_checkpoint(model, tmp_path / folder.name)
        if variant_of(model) is None:
            assert recorded_in(again) is None
            continue
        skipped = {'skip': ['layer1*' if variant == 'acconv' else 'layer2*']} if 'skip' in (named or {}) else {}
        assert recorded_in(again) == {**OPTIONS[variant], **(named or {}), **skipped}
        assert_as_it_was(hub.load_checkpoint(again), folder)


@pytest.mark.parametrize(
    'variant, changes', [CHANGES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])], ids=str
)
def test_what_is_converted_keeps_the_options_of_0_1_0(
    tmp_path: Path, change_defaults: ChangeDefaults, variant, changes
):
    """Of a form for inference the schedule is the present default: training starts again."""
    change_defaults(variant, changes)
    for folder in folders_of(variant):
        architecture = json.loads((folder / 'config.json').read_text())['architecture']
        if architecture == 'resnet10t':
            continue
        small = with_small_images(folder, tmp_path / 'small' / folder.name)
        new, report = hub.convert_checkpoint(small, tmp_path / folder.name, architecture)
        assert report.passed
        assert_as_it_was(hub.load_checkpoint(new), folder)
        options = {**OPTIONS[variant], **(recorded_in(folder) or {})}
        if options.get('temperature', 1) is None:
            present = VARIANTS[variant].layer.default_options()
            options.update((name, present[name]) for name in ('temperature', 'temperature_steps'))
        found = recorded_in(new)
        assert {**found, 'skip': None} == {**options, 'skip': None}
        assert ('skip' in found) == ('skip' in options)


@pytest.mark.parametrize(
    'options, variant, changes',
    [
        # each change with one of them in every run
        pytest.param(options, *case, marks=[] if number == index % 2 and index < 5 else pytest.mark.slow)
        for index, case in enumerate(CASES)
        for number, options in enumerate((None, 'odd', dict(skip='layer1*')))
    ],
    ids=str,
)
def test_what_is_saved_now_stays_what_it_is(tmp_path: Path, change_defaults: ChangeDefaults, variant, changes, options):
    """Both forms, saved here and by timm, whether or not options were given; only what is new has the new defaults."""
    if options == 'odd':
        odd = {'acconv': dict(gamma_init=0.5), 'doconv': dict(skip='layer2*'), 'dyconv': dict(num_kernels=3)}
        options = odd.get(variant, dict(map_kernel_size=(1, 3)))
    name, x = f'resnet10t_{variant}', images(2, 3, 32, 32)
    model = disturbed(timm.create_model(name, conv_options=options, **TINY)).eval()
    fused = timm_reparam.fuse_model(model)
    timms = tmp_path / 'timms', tmp_path / 'timms_fused'
    for folder, form in zip(timms, (model, fused)):
        save_for_hf(form, str(folder), safe_serialization=True)
    own = hub.save_pair(model, tmp_path, tag='t', data_config=dict(input_size=(3, 32, 32), crop_pct=1.0))
    with torch.no_grad():
        outputs = model(x), fused(x)
    change_defaults(variant, changes)
    for folders in (own, timms):
        for folder, output in zip(folders, outputs):
            names = OPTIONS[variant].keys() | ({'skip'} if 'skip' in (options or {}) else set())
            is_stock = folder.name.endswith('_fused') and variant != 'dyconv'
            assert (recorded_in(folder) or {}).keys() == (set() if is_stock else names)
            by_timm = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
            for loaded in (by_timm, hub.load_checkpoint(folder)):
                with torch.no_grad():
                    assert torch.equal(loaded(x), output)
    fresh = timm.create_model(name, **TINY)
    assert get_model_args(fresh)['conv_options'] == {**OPTIONS[variant], **changes}
    layer = next(module for module in fresh.modules() if timm_reparam.is_variant(module))
    assert changes.items() <= layer.options().items()


def test_from_the_hub(hub: HubServer, cache_dir: Path, change_defaults: ChangeDefaults):
    folder = FIXTURES / '0.1.0/resnet10t_acconv.odd_norm'
    hub.commit_folder('someone/resnet10t_acconv.odd_norm', folder)
    change_defaults('acconv', dict(eps=0.5, branch_norm='none'))
    name = 'hf-hub:someone/resnet10t_acconv.odd_norm'
    assert_as_it_was(timm.create_model(name, pretrained=True, cache_dir=cache_dir), folder)


@pytest.mark.parametrize('name', ['resnet10t_acconv.plain', 'resnet10t_acconv.odd_norm'])
def test_options_that_are_given_leave_the_others_as_they_are_recorded(change_defaults: ChangeDefaults, name: str):
    """Where a folder names them as where it does not."""
    folder = FIXTURES / '0.1.0' / name
    change_defaults('acconv', dict(eps=0.5))
    given = dict(recompute=not (recorded_in(folder) or {}).get('recompute', False))
    model = timm.create_model(f'local-dir:{folder}', pretrained=True, conv_options=given)
    assert_as_it_was(model, folder)
    model.state_dict()
    assert model._model_args['conv_options'] == {**OPTIONS['acconv'], **(recorded_in(folder) or {}), **given}
    assert given.keys() == {'recompute'}  # what the caller passed is the caller's


def test_files_of_a_training_script(tmp_path: Path, change_defaults: ChangeDefaults):
    """train.py of 0.1.0 recorded the given options, and timm's script saves its flags."""
    x = images(2, 3, 32, 32)
    model = disturbed(timm.create_model('resnet10t_acconv', conv_options=dict(momentum=0.3), **TINY)).eval()
    with torch.no_grad():
        output = model(x)
    arguments = dict(TINY, conv_options=dict(momentum=0.3))
    settings = dict(model='resnet10t_acconv', model_kwargs=arguments)
    weights = model.state_dict()
    files = {
        'here': dict(arch='resnet10t_acconv', model_args=arguments, args=settings, state_dict=weights),
        'timms': dict(arch='resnet10t_acconv', args=settings, state_dict=weights),
    }
    change_defaults('acconv', dict(eps=0.5))
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        loaded, _, _ = load_training(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(loaded(x), output)


def test_a_fused_model_needs_no_plugin_to_be_unpickled():
    """Recording the options of the layers leaves nothing behind in a stock model."""
    options = dict(depth_multiplier=12)
    for model in (
        timm_reparam.fuse_model(timm.create_model('resnet10t_doconv', conv_options=options, **TINY)),
        timm_reparam.fuse_model(timm_reparam.convert_model(timm.create_model('resnet10t', **TINY), 'doconv')),
        reparameterize_model(timm.create_model('resnet10t_doconv', **TINY)),
    ):
        assert b'timm_reparam' not in pickle.dumps(model)
