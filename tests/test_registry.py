"""What importing timm_reparam adds to timm's registry, and `register_variant` for the rest of timm."""

import json
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from hub.server import client_environment
from safetensors.torch import save_file
from stand_in import add_stock, random_model
from timm.models import get_arch_pretrained_cfgs, is_model_pretrained, list_pretrained, model_entrypoint, register_model

import timm_reparam
from timm_reparam import ReparamError
from timm_reparam.convert import convert_model
from timm_reparam.models import register_variant
from timm_reparam.models._registry import ensure_registered, is_registered_on_import, is_variant_name
from timm_reparam.variants import VARIANTS

RESNETS = (
    'resnet18 resnet34 resnet50 resnet101 resnet152 resnet18d resnet34d resnet50d resnet101d resnet152d '
    'resnet10t resnet14t resnet26 resnet26d resnet26t '
    'resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2 seresnet50'
).split()
MOBILENETS = timm.list_models('mobilenetv2_*', module='efficientnet')
FAMILIES = {
    f'{family}_{variant}': [f'{stock}_{variant}' for stock in stocks]
    for family, stocks in (('resnet', RESNETS), ('mobilenetv2', MOBILENETS))
    for variant in ('acconv', 'dbbconv', 'doconv', 'dyconv', 'orepaconv', 'refconv')
}


# Run in a process of its own: what the import of timm_reparam does can be seen only once.
IMPORT = """
import io, json, sys
sockets = []
sys.addaudithook(lambda event, args: sockets.append(event) if event.startswith('socket.') else None)
import timm
from timm.models import _registry as registry

TABLES = [name for name, value in vars(registry).items() if name.startswith('_m') and isinstance(value, (dict, set))]

def snapshot():
    state = {}
    for table in TABLES:
        entries = getattr(registry, table)
        for key in list(entries):
            value = entries[key] if isinstance(entries, dict) else True
            # Functions by identity, the rest by what it says.
            state[table + ' ' + key] = str(id(value)) if callable(value) else repr(
                sorted(value) if isinstance(value, set) else value)
    return state

before, sockets_before = snapshot(), len(sockets)
stdout, stderr = sys.stdout, sys.stderr
sys.stdout = sys.stderr = quiet = io.StringIO()
import timm_reparam
sys.stdout, sys.stderr = stdout, stderr
after = snapshot()
added = [key.split() for key in after if key not in before]
report = {
    'tables': TABLES,
    'num_before': len(before),
    'changed': [key for key in before if after.get(key) != before[key]],
    'new': [key for table, key in added if table == '_model_entrypoints'],
    'new_modules': [key for table, key in added if table == '_module_to_models'],
    'families': {module: timm.list_models(module=module) for module in registry._module_to_models},
    'output': quiet.getvalue(),
    'sockets': sockets[sockets_before:],
}
for name in ('resnet10t_doconv', 'hf-hub:someone/resnet10t_doconv.test'):
    try:
        timm.create_model(name, pretrained=True)
    except Exception as error:
        report[name] = [f'{type(error).__module__}.{type(error).__name__}', str(error)]
json.dump(report, open(sys.argv[1], 'w'))
"""


@pytest.fixture(scope='module')
def imported(tmp_path_factory) -> dict:
    """What a fresh process saw when it imported timm_reparam, and when it then asked for weights without a network."""
    folder = tmp_path_factory.mktemp('import')
    environment = client_environment('http://127.0.0.1:9', folder / 'home')
    environment['HF_HUB_OFFLINE'] = '1'  # otherwise the client first tries for half a minute
    environment['PYTHONPATH'] = str(Path(timm_reparam.__file__).parents[1])
    command = [sys.executable, '-c', IMPORT, folder / 'report.json']
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {**json.loads((folder / 'report.json').read_text()), 'stdout': done.stdout}


def test_import_changes_no_entry_of_timm(imported):
    tables = {'_model_entrypoints', '_model_pretrained_cfgs', '_model_with_tags', '_module_to_models'}
    assert tables <= set(imported['tables'])
    assert imported['num_before'] > 5000
    assert imported['changed'] == []


def test_import_adds_the_variants_and_nothing_else(imported):
    assert sorted(imported['new']) == sorted(name for names in FAMILIES.values() for name in names)
    assert sorted(imported['new_modules']) == sorted(FAMILIES)


def test_import_says_nothing_and_opens_no_socket(imported):
    assert imported['output'] == imported['stdout'] == ''
    assert imported['sockets'] == []


@pytest.mark.parametrize('name', ['resnet10t_doconv', 'hf-hub:someone/resnet10t_doconv.test'])
def test_no_network_is_the_clients_error(imported, name):
    kind, message = imported[name]
    assert kind == 'huggingface_hub.errors.LocalEntryNotFoundError'
    assert message


@pytest.mark.parametrize('module', FAMILIES)
def test_families(imported, module):
    assert set(imported['families'][module]) == set(FAMILIES[module])


def test_families_have_what_was_promised():
    assert len(MOBILENETS) == 7 and len(FAMILIES) == 12
    variants = ('acconv', 'dbbconv', 'doconv', 'dyconv', 'orepaconv', 'refconv')
    assert timm.list_models('resnet18_*') == [f'resnet18_{variant}' for variant in variants]
    assert not [name for name in timm.list_models('test_*') if name.endswith(variants)]


@pytest.mark.parametrize('module', FAMILIES)
def test_every_stock_tag_is_a_tag_of_the_variant(module):
    for name in FAMILIES[module]:
        stock = name.rsplit('_', 1)[0]
        cfgs, wanted = get_arch_pretrained_cfgs(name), get_arch_pretrained_cfgs(stock)
        assert [key.removeprefix(name) for key in cfgs] == [key.removeprefix(stock) for key in wanted]  # in this order
        for cfg, expected in zip(cfgs.values(), wanted.values(), strict=True):
            assert cfg.architecture == name
            assert replace(cfg, architecture=stock) == expected
            assert expected.hf_hub_id is None or cfg.hf_hub_id == f'timm/{stock}.{expected.tag}'
        assert is_model_pretrained(name) == is_model_pretrained(stock), name
        assert list_pretrained(f'{name}.*') == [key.replace(stock, name, 1) for key in list_pretrained(f'{stock}.*')]


def test_tags_the_readme_speaks_of():
    assert timm.models.get_pretrained_cfg('resnet18_doconv').hf_hub_id == 'timm/resnet18.a1_in1k'
    assert 'resnet18_doconv.fb_swsl_ig1b_ft_in1k' in list_pretrained('resnet18_doconv*')
    assert 'mobilenetv2_100_dyconv.ra_in1k' in list_pretrained()


@pytest.mark.parametrize('name', ['resnet18_doconv', 'mobilenetv2_100_dyconv'])
def test_entrypoints_look_like_timms(name):
    entrypoint = model_entrypoint(name)
    assert entrypoint.__name__ == name
    assert entrypoint.__doc__
    module = sys.modules[entrypoint.__module__]
    assert name in module.__all__ and getattr(module, name) is entrypoint
    assert module.__name__.startswith('timm_reparam.')
    assert getattr(timm_reparam.models, module.__name__.rpartition('.')[2]) is module
    assert pickle.loads(pickle.dumps(entrypoint)) is entrypoint and module.default_cfgs[name].cfgs
    with pytest.raises(TypeError):
        entrypoint(no_such_argument=1)


@pytest.mark.parametrize('name', [f'{stock}_{v}' for stock in ('resnet10t', 'mobilenetv2_035') for v in VARIANTS])
def test_intermediates_and_pruning_are_those_of_the_stock(name):
    """What timm's own tests ask of timm's own modules only."""
    stock, _, variant = name.rpartition('_')
    expected, model = random_model(stock), convert_model(random_model(stock), variant)
    assert model.pretrained_cfg['architecture'] == name
    x = torch.randn(2, 3, 64, 64)
    tolerance = 1e-4 if variant == 'dyconv' else 0  # its outputs are those of the stock to rounding

    @torch.no_grad()
    def compare(found: torch.nn.Module, **options) -> None:
        final, intermediates = found.forward_intermediates(x, **options)
        expected_final, expected_intermediates = expected.forward_intermediates(x, **options)
        assert len(intermediates) == len(expected_intermediates) > 0
        for y, wanted in zip([final, *intermediates], [expected_final, *expected_intermediates], strict=True):
            torch.testing.assert_close(y, wanted, rtol=0, atol=tolerance * float(wanted.abs().max()))

    compare(model)
    compare(model, indices=[0, 2], stop_early=True)
    assert model.prune_intermediate_layers([0, 2]) == expected.prune_intermediate_layers([0, 2])
    compare(model, indices=[0, 2])
    fused = timm_reparam.fuse_model(model)
    assert variant == 'dyconv' or list(fused.state_dict()) == list(expected.state_dict())
    compare(fused, indices=[0, 2])


# register_variant ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def convnext() -> str:
    name = 'convnext_atto_doconv'
    assert register_variant('convnext_atto', 'doconv') == name
    return name


def published_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of timm's ConvNeXt under the names and shapes of the paper's own checkpoints."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r'^stem\.', 'downsample_layers.0.', name)
        name = re.sub(r'^stages\.(\d)\.downsample\.', r'downsample_layers.\1.', name)
        name = re.sub(r'^stages\.(\d)\.blocks\.', r'stages.\1.', name)
        name = name.replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')
        name = name.replace('head.norm', 'norm').replace('head.fc', 'head')
        renamed[name] = value.flatten(1) if 'pwconv' in name and name.endswith('weight') else value
    return renamed


def test_registered_variant_of_another_architecture(hub, cache_dir, convnext):
    assert timm.list_models(module='convnext_doconv') == [convnext]
    assert list_pretrained(f'{convnext}*') == [f'{convnext}.d2_in1k']
    expected = add_stock(hub, 'convnext_atto.d2_in1k')
    model = timm.create_model(convnext, pretrained=True, cache_dir=cache_dir).eval()
    assert any(isinstance(module, timm_reparam.layers.DOConv2d) for module in model.modules())
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), expected(x))
    assert model.pretrained_cfg['architecture'] == convnext


@pytest.mark.parametrize('options', [{}, {'in_chans': 1}, {'num_classes': 10}, {'features_only': True}], ids=str)
def test_registered_variant_loads_through_its_stocks_own_filter(tmp_path, convnext, options):
    """A checkpoint in the layout of the paper's own, which stock timm renames and reshapes when it loads it."""
    state = published_layout(random_model('convnext_atto', seed=5).state_dict())
    save_file(state, tmp_path / 'weights.safetensors')
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.safetensors')), **options)
    x = torch.randn(2, options.get('in_chans', 3), 64, 64)
    expected, model = (timm.create_model(name, **options).eval() for name in ('convnext_atto', convnext))
    with torch.no_grad():
        if 'num_classes' in options:
            assert torch.equal(model.forward_features(x), expected.forward_features(x))
        else:
            torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)


@pytest.mark.parametrize('stock', ['dla46_c', 'mobilenetv3_small_050', 'vit_tiny_patch16_224'])
def test_registered_variant_has_the_features_of_its_stock(stock):
    name = register_variant(stock, 'doconv')
    for options in ({}, {'out_indices': (0, 2)}):
        features = timm.create_model(name, features_only=True, **options).feature_info
        expected = timm.create_model(stock, features_only=True, **options).feature_info
        assert features.channels() == expected.channels()
        assert features.reduction() == expected.reduction()
        assert features.out_indices == expected.out_indices


def test_registered_variants_own_checkpoint(tmp_path, convnext):
    model = random_model(convnext)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), model(x))
        adapted = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, in_chans=1, num_classes=3).eval()
        assert adapted(x[:, :1]).shape == (2, 3)


def test_registered_variant_refuses_another_checkpoint(tmp_path, convnext):
    save_file(random_model('resnet10t').state_dict(), tmp_path / 'weights.safetensors')
    overlay = dict(file=str(tmp_path / 'weights.safetensors'))
    with pytest.raises(ReparamError, match='(?s)conv1.0.weight'):
        timm.create_model(convnext, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)


@pytest.mark.parametrize(('stock', 'variant'), [('resnet18', 'doconv'), ('mobilenetv2_100', 'dyconv')])
def test_registering_twice_changes_nothing(stock, variant):
    name = f'{stock}_{variant}'
    entrypoint, cfgs = model_entrypoint(name), get_arch_pretrained_cfgs(name)
    assert register_variant(stock, variant) == name
    assert model_entrypoint(name) is entrypoint
    assert get_arch_pretrained_cfgs(name) == cfgs


def test_a_name_that_says_what_it_is_is_registered_when_it_is_needed():
    assert not timm.is_model('convnext_pico_refconv')
    assert ensure_registered('convnext_pico_refconv.some_tag')
    assert timm.list_models('convnext_pico*conv') == ['convnext_pico_refconv']
    assert is_variant_name('convnext_pico_refconv') and not is_registered_on_import('convnext_pico_refconv')
    assert ensure_registered('resnet18_doconv') and is_registered_on_import('resnet18_doconv')
    assert ensure_registered('resnet18.a1_in1k') and not is_registered_on_import('resnet18')
    # of an architecture that the table lacks, in a family that it has
    assert register_variant('resnet50_gn', 'refconv') in timm.list_models(module='resnet_refconv')
    assert not is_registered_on_import('resnet50_gn_refconv')
    before = timm.list_models()
    for name in ('no_such_model', 'no_such_model_doconv', 'resnet18_doconv_acconv', 'test_resnet_doconv', 'doconv', ''):
        assert not ensure_registered(name)
    assert timm.list_models() == before


def test_a_name_of_somebody_else_is_not_overwritten():
    def convnext_femto_doconv(pretrained=False, **kwargs):
        """Somebody else's model."""

    register_model(convnext_femto_doconv)
    with pytest.raises(ReparamError, match='convnext_femto_doconv'):
        register_variant('convnext_femto', 'doconv')
    assert model_entrypoint('convnext_femto_doconv') is convnext_femto_doconv


@pytest.mark.parametrize(
    ('stock', 'variant', 'named'),
    [
        ('resnet18', 'noconv', 'noconv'),
        ('no_such_model', 'doconv', 'no_such_model'),
        ('resnet18_doconv', 'doconv', 'resnet18_doconv'),
    ],
)
def test_what_cannot_be_registered(stock, variant, named):
    before = timm.list_models()
    with pytest.raises(ReparamError, match=named):
        register_variant(stock, variant)
    assert timm.list_models() == before


def test_no_name_starts_with_test():
    """timm's own tests run inference on every pretrained name that starts so."""
    before = timm.list_models('test_*')
    with pytest.raises(ReparamError, match='test_resnet_doconv'):
        register_variant('test_resnet', 'doconv')
    assert timm.list_models('test_*') == before
