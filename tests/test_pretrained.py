"""Pretrained weights through timm.create_model, fetched by the real client over HTTP from the loopback Hub.

Static variants (ACConv, DO-Conv, RefConv) are compared with stock timm bit for bit. Dynamic convolution has a kernel
for each sample: these are compared bit for bit, and the outputs to the rounding of another order of summation.
"""

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import stand_in
import timm
import torch
from hub.server import HubServer
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from layers.cases import relative_difference
from safetensors.torch import save_file
from stand_in import add_stock
from timm.models import save_for_hf
from torch import nn

from timm_reparam import ReparamError, fuse_model
from timm_reparam.variants import VARIANTS

LAYERS = {name: variant.layer for name, variant in VARIANTS.items()}
STATIC = [name for name, variant in VARIANTS.items() if not variant.input_dependent]
RESNET, MOBILENET = 'resnet10t', 'mobilenetv2_050'  # the smallest of each family; both with a 3x3 stem
TAGS = {
    'resnet18': 'a1_in1k',
    'resnet10t': 'c3_in1k',
    'mobilenetv2_050': 'lamb_in1k',
}


NARROW: dict[str, dict] = {RESNET: dict(channels=(16, 24, 32, 48))}


def narrow(name: str) -> dict:
    """Arguments under which a model of this name is small and otherwise the same."""
    return NARROW.get(name.partition('.')[0].partition('_')[0], {})


def random_model(name: str, **options) -> nn.Module:
    return stand_in.random_model(name, **{**narrow(name), **options})


def rotated(*lists: list) -> list:
    """The product of some lists as parameters of a test: each value with the others in turn, the rest marked slow."""
    parameters = []
    for places in itertools.product(*(range(len(values)) for values in lists)):
        first, *others = places
        kept = all(place == first % len(values) for place, values in zip(others, lists[1:]))
        values = [values[place] for place, values in zip(places, lists)]
        flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
        parameters.append(pytest.param(*flat, marks=[] if kept else pytest.mark.slow))
    return parameters


@pytest.fixture(scope='session')
def stock(session_hub: HubServer) -> Callable[[str], nn.Module]:
    """Name and tag of a timm checkpoint → the model that the Hub serves under it, random and the same in every test."""
    models: dict[str, nn.Module] = {}

    def get(name: str) -> nn.Module:
        name = name if '.' in name else f'{name}.{TAGS[name]}'
        if name not in models:
            models[name] = add_stock(session_hub, name, **narrow(name))
        return models[name]

    return get


@pytest.fixture(scope='session')
def stock_cache(tmp_path_factory) -> Path:
    """A cache shared by the stock models that variants are compared with."""
    return tmp_path_factory.mktemp('stock-cache')


@pytest.fixture(scope='session')
def trained(session_hub: HubServer, tmp_path_factory) -> Callable[..., tuple[nn.Module, Path]]:
    """Name of a variant → a model none of whose parameters is at its start, and the folder it was saved to by timm.

    The Hub serves it as `someone/<name>.test`.
    """
    kept: dict[str, tuple[nn.Module, Path]] = {}

    def get(name: str) -> tuple[nn.Module, Path]:
        if name not in kept:
            model = random_model(name)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore', UserWarning)  # RefConv without pretrained weights
                model.train()(images())  # moves what training moves: statistics, the temperature's schedule
            folder = tmp_path_factory.mktemp(name)
            save_for_hf(model.eval(), folder, safe_serialization=True)
            session_hub.commit_folder(f'someone/{name}.test', folder)
            kept[name] = model, folder
        return kept[name]

    return get


def images(channels: int = 3, size: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def create(name: str, cache_dir: Path | None = None, **options) -> nn.Module:
    return timm.create_model(name, pretrained=True, cache_dir=cache_dir, **{**narrow(name), **options}).eval()


def variant_layers(model: nn.Module, variant: str) -> dict[str, nn.Module]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS[variant])}
    assert found, 'no layer was converted: whatever follows would show nothing'
    return found


@torch.no_grad()
def assert_same_function(model: nn.Module, expected: nn.Module, channels: int = 3, method: str = '__call__') -> None:
    x = images(channels)
    torch.testing.assert_close(getattr(model, method)(x), getattr(expected, method)(x), rtol=0, atol=0)


# Stock checkpoints, lifted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(('variant', 'name'), rotated(STATIC, [RESNET, 'resnet18', RESNET]))
def test_default_tag_is_the_stock_function(hub, stock, cache_dir, variant, name):
    expected = stock(name)
    model = create(f'{name}_{variant}', cache_dir)
    assert set(hub.paths('GET')) == {f'/timm/{name}.{TAGS[name]}/resolve/main/model.safetensors'}
    assert len(variant_layers(model, variant)) >= (16 if name == 'resnet18' else 10)
    assert_same_function(model, expected)

    training, expected = model.train(), random_model(f'{name}.{TAGS[name]}').train()
    assert_same_function(training, expected)
    assert_same_function(training.eval(), expected.eval())  # the running statistics moved alike


@pytest.mark.parametrize('variant', STATIC)
def test_mobilenet_is_the_stock_function(stock, cache_dir, variant):
    expected = stock(MOBILENET)
    model = create(f'{MOBILENET}_{variant}', cache_dir)
    variant_layers(model, variant)
    assert_same_function(model, expected)
    assert_same_function(model.train(), random_model(f'{MOBILENET}.{TAGS[MOBILENET]}').train())


@pytest.mark.parametrize('name', [MOBILENET, RESNET])
def test_dynamic_kernels_are_the_stock_kernels(stock, cache_dir, name):
    expected = stock(name)
    model = create(f'{name}_dyconv', cache_dir)
    kernels, inputs = dict(expected.named_parameters()), {}
    layers = variant_layers(model, 'dyconv')
    for layer_name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=layer_name: inputs.update({name: args[0]}))
    with torch.no_grad():
        for mode in (False, True):
            model.train(mode)(images())
            assert inputs.keys() == layers.keys()
            for layer_name, x in inputs.items():
                kernel = kernels[f'{layer_name}.weight']
                sampled = layers[layer_name].sample_kernels(x)
                assert torch.equal(sampled, kernel.expand(len(x), *kernel.shape)), (layer_name, mode)


@pytest.mark.parametrize(
    ('name', 'dtype', 'bound'), rotated([MOBILENET, RESNET], [(torch.float32, 1e-4), (torch.float64, 1e-10)])
)
def test_dynamic_logits_are_the_stock_logits_to_rounding(stock, cache_dir, name, dtype, bound):
    stock(name)
    expected = random_model(f'{name}.{TAGS[name]}').to(dtype)
    model = create(f'{name}_dyconv', cache_dir).to(dtype)
    x = images(dtype=dtype)
    with torch.no_grad():
        assert relative_difference(model(x), expected(x)) <= bound
        assert relative_difference(model.train()(x), expected.train()(x)) <= bound


@pytest.mark.parametrize('tag', ['a1_in1k', 'fb_swsl_ig1b_ft_in1k'])
def test_explicit_tag(hub, stock, cache_dir, tag):
    expected = stock(f'resnet18.{tag}')
    model = create(f'resnet18_doconv.{tag}', cache_dir)
    assert set(hub.paths('GET')) == {f'/timm/resnet18.{tag}/resolve/main/model.safetensors'}
    assert model.pretrained_cfg['architecture'] == 'resnet18_doconv'
    assert model.pretrained_cfg['tag'] == tag
    assert model.pretrained_cfg['hf_hub_id'] == f'timm/resnet18.{tag}'
    assert_same_function(model, expected)


def test_two_tags_are_two_functions(stock):
    """What is compared above is not the same for every checkpoint."""
    one, other = stock('resnet18.a1_in1k')(images()), stock('resnet18.fb_swsl_ig1b_ft_in1k')(images())
    assert relative_difference(one, other) > 0.1


def test_unknown_tag_is_timms_own_error(hub):
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        create('resnet18_doconv.no_such_tag')
    assert not hub.log


@pytest.mark.parametrize(
    ('name', 'variant', 'in_chans'),
    rotated([*((RESNET, variant) for variant in STATIC), (MOBILENET, 'doconv')], [1, 3, 4]),
)
def test_adaptation_is_stock_timms(stock, stock_cache, cache_dir, name, variant, in_chans):
    """With another head and other input channels, everything before the new head is what stock timm makes of it."""
    stock(name)
    options = dict(in_chans=in_chans, num_classes=10)
    expected, model = create(name, stock_cache, **options), create(f'{name}_{variant}', cache_dir, **options)
    variant_layers(model, variant)
    assert model.num_classes == 10
    assert model(images(in_chans)).shape == (2, 10)
    assert_same_function(model, expected, in_chans, 'forward_features')
    assert_same_function(model.train(), expected.train(), in_chans, 'forward_features')


@pytest.mark.parametrize('in_chans', [1, 4])
def test_adapted_stem_with_the_published_head(stock, stock_cache, cache_dir, in_chans):
    stock(RESNET)
    expected = create(RESNET, stock_cache, in_chans=in_chans)
    model = create(f'{RESNET}_doconv', cache_dir, in_chans=in_chans)
    assert_same_function(model, expected, in_chans)


def test_no_head(stock, stock_cache, cache_dir):
    stock(RESNET)
    expected, model = create(RESNET, stock_cache, num_classes=0), create(f'{RESNET}_acconv', cache_dir, num_classes=0)
    assert_same_function(model, expected)


@pytest.mark.parametrize('in_chans', [1, pytest.param(4, marks=pytest.mark.slow)])
def test_dynamic_adaptation_is_stock_timms(stock, stock_cache, cache_dir, in_chans):
    stock(MOBILENET)
    options = dict(in_chans=in_chans, num_classes=10)
    expected, model = create(MOBILENET, stock_cache, **options), create(f'{MOBILENET}_dyconv', cache_dir, **options)
    variant_layers(model, 'dyconv')
    for name, value in expected.state_dict().items():
        assert name.startswith('classifier') or torch.equal(model.state_dict()[name], value), name
    x = images(in_chans)
    with torch.no_grad():
        assert relative_difference(model.forward_features(x), expected.forward_features(x)) <= 1e-4


FEATURES = [
    *((name, variant, {}) for name, variant in zip((RESNET, MOBILENET, RESNET), STATIC)),
    (RESNET, 'doconv', {'out_indices': (1, 3)}),
    (MOBILENET, 'doconv', {'in_chans': 1}),
    (MOBILENET, 'doconv', {'output_stride': 16}),
    (RESNET, 'acconv', {'output_stride': 16}),
]
MORE_FEATURES = [
    *((name, variant, {}) for name, variant in zip((MOBILENET, RESNET, MOBILENET), STATIC)),
    (MOBILENET, 'doconv', {'out_indices': (1, 3)}),
    (RESNET, 'doconv', {'in_chans': 1}),
    (RESNET, 'doconv', {'output_stride': 16}),
]


@pytest.mark.parametrize(
    ('name', 'variant', 'options'),
    [*FEATURES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_FEATURES)],
    ids=str,
)
def test_features_are_the_stock_features(stock, stock_cache, cache_dir, name, variant, options):
    stock(name)
    expected = create(name, stock_cache, features_only=True, **options)
    model = create(f'{name}_{variant}', cache_dir, features_only=True, **options)
    variant_layers(model, variant)
    assert model.feature_info.channels() == expected.feature_info.channels()
    assert model.feature_info.reduction() == expected.feature_info.reduction()
    assert_same_function(model, expected, options.get('in_chans', 3))


def test_dynamic_features(stock, stock_cache, cache_dir):
    stock(MOBILENET)
    model = create(f'{MOBILENET}_dyconv', cache_dir, features_only=True)
    expected = create(MOBILENET, stock_cache, features_only=True)
    with torch.no_grad():
        for value, wanted in zip(model(images()), expected(images()), strict=True):
            assert relative_difference(value, wanted) <= 1e-4


FILES = {
    'as saved': lambda state: state,
    'before BatchNorm counted batches': lambda state: {k: v for k, v in state.items() if not k.endswith('_tracked')},
    'half precision': lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    'of a training script': lambda state: {'arch': RESNET, 'epoch': 1, 'state_dict': state},
    'of a parallel model': lambda state: {'state_dict': {f'module.{k}': v for k, v in state.items()}},
    'with an average': lambda state: {'state_dict': {k: v + 1 for k, v in state.items()}, 'state_dict_ema': state},
}


@pytest.mark.parametrize(('kind', 'in_chans'), rotated(list(FILES), [3, 1]))
def test_stock_weights_in_a_file(stock, tmp_path, kind, in_chans):
    """Whatever stock timm takes as a file of stock weights is taken and lifted."""
    torch.save(FILES[kind](stock(RESNET).state_dict()), tmp_path / 'weights.pth')
    options = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')), in_chans=in_chans)
    assert_same_function(create(f'{RESNET}_doconv', **options), create(RESNET, **options), in_chans)


@pytest.mark.parametrize(
    'variant', ['refconv', *(pytest.param(variant, marks=pytest.mark.slow) for variant in ('acconv', 'doconv'))]
)
def test_arguments_of_the_stock_entrypoint_are_passed_on(stock, stock_cache, cache_dir, variant):
    stock(RESNET)
    options = dict(dtype=torch.float64, device='cpu', global_pool='max', output_stride=8, act_layer='silu')
    expected = create(RESNET, stock_cache, **options)
    model = create(f'{RESNET}_{variant}', cache_dir, **options)
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float64}
    x = images(dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))


# Train-time checkpoints ----------------------------------------------------------------------------------------------

TRAINED = [*(f'{RESNET}_{variant}' for variant in LAYERS), f'{MOBILENET}_doconv', f'{MOBILENET}_dyconv']


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []


@pytest.mark.parametrize('name', TRAINED)
def test_train_time_checkpoint_from_a_folder(hub, trained, name):
    expected, folder = trained(name)
    model = create(f'local-dir:{folder}')
    assert_same_state(model, expected)
    assert_same_function(model, expected)
    assert not hub.log


@pytest.mark.parametrize('name', [f'{RESNET}_{variant}' for variant in LAYERS])
def test_train_time_checkpoint_from_the_hub(hub, trained, cache_dir, name):
    expected, _ = trained(name)
    model = create(f'hf-hub:someone/{name}.test', cache_dir)
    repo = f'/someone/{name}.test/resolve/main'
    assert set(hub.paths('GET')) == {f'{repo}/config.json', f'{repo}/model.safetensors'}
    assert_same_state(model, expected)
    assert_same_function(model, expected)


def test_train_time_checkpoint_of_a_revision(hub, trained, cache_dir):
    expected, folder = trained(f'{RESNET}_doconv')
    commit = hub.commit_folder('someone/revisions', folder)
    hub.commit('someone/revisions', {'model.safetensors': None})
    assert_same_state(create(f'hf-hub:someone/revisions@{commit}', cache_dir), expected)


@pytest.mark.parametrize('name', [f'{RESNET}_{variant}' for variant in LAYERS])
def test_train_time_checkpoint_from_a_file(trained, name):
    expected, folder = trained(name)
    model = create(name, pretrained_cfg_overlay=dict(file=str(folder / 'model.safetensors')))
    assert_same_state(model, expected)


@pytest.mark.parametrize('init', ['lift', 'scratch'])
def test_train_time_checkpoint_loaded_last_overrides_the_start(trained, init):
    expected, folder = trained(f'{RESNET}_acconv')
    path = folder / 'model.safetensors'
    model = timm.create_model(f'{RESNET}_acconv', checkpoint_path=path, conv_options=dict(init=init), **NARROW[RESNET])
    assert_same_state(model, expected)


@pytest.mark.parametrize(('name', 'in_chans'), rotated(TRAINED, [1, 4]))
def test_train_time_checkpoint_with_other_input_channels(trained, tmp_path, name, in_chans):
    """The stem is fused, adapted by timm and lifted again; nothing else changes.

    The stem is what stock timm makes of the fused one; where it is not converted, its weight is adapted as it is.
    """
    expected, folder = trained(name)
    model = create(f'local-dir:{folder}', in_chans=in_chans)
    stem_name = expected.pretrained_cfg['first_conv']
    stem, trained_stem = model.get_submodule(stem_name), expected.get_submodule(stem_name)
    assert isinstance(stem, LAYERS[name.split('_')[-1]]) == (not name.endswith(('dyconv', 'dbbconv', 'orepaconv')))
    assert type(stem) is type(trained_stem)

    stock_name = name.rsplit('_', 1)[0]
    save_for_hf(timm.create_model(stock_name, **narrow(stock_name)), tmp_path, safe_serialization=True)
    weights = random_model(stock_name).state_dict()
    fused_stem = trained_stem.fuse() if hasattr(trained_stem, 'fuse') else trained_stem
    weights[f'{stem_name}.weight'] = fused_stem.weight
    save_file({key: value.detach().contiguous() for key, value in weights.items()}, tmp_path / 'model.safetensors')
    adapted = create(f'local-dir:{tmp_path}', in_chans=in_chans).get_submodule(stem_name).weight
    kernel = stem.equivalent_kernel() if hasattr(stem, 'equivalent_kernel') else stem.weight
    assert torch.equal(kernel, adapted)

    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    changed = [key for key in wanted if not torch.equal(state[key], wanted[key])]  # no error where shapes differ
    assert changed and all(key.startswith(f'{stem_name}.') for key in changed)


@pytest.mark.parametrize(('variant', 'in_chans'), rotated(STATIC, [1, 4]))
def test_adapting_then_fusing_is_fusing_then_adapting(trained, tmp_path, variant, in_chans):
    expected, folder = trained(f'{RESNET}_{variant}')
    fused = fuse_model(expected)
    assert fused.pretrained_cfg['architecture'] == RESNET
    save_for_hf(fused, tmp_path, safe_serialization=True)
    with torch.no_grad():
        x = images(in_chans)
        wanted = create(f'local-dir:{tmp_path}', in_chans=in_chans)(x)
        model = create(f'local-dir:{folder}', in_chans=in_chans)
        assert relative_difference(model(x), wanted) <= 1e-5
        assert relative_difference(fuse_model(model)(x), wanted) == 0


def test_one_channel_checkpoint_with_three_input_channels(stock_cache, tmp_path):
    """Adaptation starts from the checkpoint's own number of channels, which its model_args say."""
    model = random_model(f'{RESNET}_doconv', in_chans=1)
    save_for_hf(model, tmp_path / 'train_time', safe_serialization=True)
    save_for_hf(fuse_model(model), tmp_path / 'fused', safe_serialization=True)
    assert_same_function(create(f'local-dir:{tmp_path / "train_time"}'), model, channels=1)
    with torch.no_grad():
        for in_chans in (3, 4):
            x = images(in_chans)
            wanted = create(f'local-dir:{tmp_path / "fused"}', in_chans=in_chans)(x)
            value = create(f'local-dir:{tmp_path / "train_time"}', in_chans=in_chans)(x)
            assert relative_difference(value, wanted) <= 1e-5


@pytest.mark.parametrize('name', [f'{RESNET}_{variant}' for variant in LAYERS])
def test_train_time_checkpoint_with_another_head(trained, name):
    expected, folder = trained(name)
    model = create(f'local-dir:{folder}', num_classes=7)
    assert model(images()).shape == (2, 7)
    assert_same_function(model, expected, method='forward_features')
    both = create(f'local-dir:{folder}', num_classes=7, in_chans=1)
    assert both(images(1)).shape == (2, 7)


def test_train_time_checkpoint_of_a_fine_tuned_head(tmp_path):
    expected = random_model(f'{RESNET}_acconv', num_classes=10)
    save_for_hf(expected, tmp_path, safe_serialization=True)
    model = create(f'local-dir:{tmp_path}')
    assert model.num_classes == 10
    assert_same_function(model, expected)
    other = create(f'local-dir:{tmp_path}', num_classes=1000)
    assert other(images()).shape == (2, 1000)
    assert_same_function(other, expected, method='forward_features')


def test_train_time_file_of_a_one_channel_model(tmp_path):
    """A file does not say how many channels it has: as with stock timm, a stem that fits is taken as it is."""
    expected = random_model(f'{RESNET}_doconv', in_chans=1)
    overlay = overlay_of(expected.state_dict(), tmp_path)
    model = create(f'{RESNET}_doconv', in_chans=1, pretrained_cfg_overlay=overlay)
    assert_same_state(model, expected)
    with pytest.raises((ReparamError, RuntimeError), match=r'conv1\.0'):
        create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize('options', [dict(depth_multiplier=12), dict(skip=['layer4.*'])], ids=str)
def test_train_time_checkpoint_under_other_options_than_its_own(trained, options):
    _, folder = trained(f'{RESNET}_doconv')
    with pytest.raises(ReparamError, match=r'layer4\.0\.conv1\.(depthwise|surplus)_weight'):
        create(f'local-dir:{folder}', conv_options=options)


@pytest.mark.parametrize('name', [f'{RESNET}_acconv', f'{MOBILENET}_doconv'])
def test_features_of_a_train_time_checkpoint(trained, name):
    expected, folder = trained(name)
    model = create(f'local-dir:{folder}', features_only=True)
    with torch.no_grad():
        features = model(images())
        wanted = expected.forward_intermediates(images(), intermediates_only=True)
    for value in features:
        assert any(value.shape == other.shape and torch.equal(value, other) for other in wanted)


OPTIONS = [
    ('doconv', dict(depth_multiplier=12)),
    ('doconv', dict(skip=['layer4.*', 'conv1.0'])),
    ('acconv', dict(branch_norm='none')),
    ('refconv', dict(map_kernel_size=1, skip=['layer[34].*'])),
    ('refconv', dict(map_kernel_size=(1, 3))),
    ('dyconv', dict(num_kernels=2, reduction=8, temperature=10.0, temperature_steps=50)),
    ('dyconv', dict(temperature=None)),
]


@pytest.mark.parametrize('variant, options', OPTIONS, ids=str)
@pytest.mark.filterwarnings('ignore:.*pretrained')
def test_layer_options_come_back_with_the_checkpoint(tmp_path, variant, options):
    default = timm.create_model(f'{RESNET}_{variant}', **NARROW[RESNET])
    model = random_model(f'{RESNET}_{variant}', conv_options=options)
    shapes = [{name: value.shape for name, value in each.state_dict().items()} for each in (model, default)]
    assert shapes[0] != shapes[1] or 'temperature_steps' in options
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = create(f'local-dir:{tmp_path}')
    every_option = {**LAYERS[variant].default_options(), **options}
    assert loaded._model_args['conv_options'] == json.loads(json.dumps(every_option))
    assert_same_state(loaded, model)
    assert_same_function(loaded, model)


FROM_SCRATCH = [
    ('doconv', dict(init='scratch')),
    ('acconv', dict(init='scratch', gamma_init=0.5)),
    ('acconv', dict(init='scratch', branch_norm='none', scale=1 / 3)),
    ('dyconv', dict(init='scratch')),
]


@pytest.mark.parametrize('variant, options', FROM_SCRATCH, ids=str)
def test_checkpoint_of_a_model_trained_from_scratch(tmp_path, variant, options):
    """The start is no option of the layers: it is not recorded, and does not stand in its own checkpoint's way."""
    model = random_model(f'{RESNET}_{variant}', conv_options=options)
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = create(f'local-dir:{tmp_path}')
    assert loaded._model_args['conv_options'].keys() == LAYERS[variant].default_options().keys()
    assert_same_state(loaded, model)
    assert_same_function(loaded, model)


NOT_LIFTED = [
    *((variant, dict(init='scratch')) for variant in LAYERS),
    ('acconv', dict(gamma_init=0.5)),
    ('acconv', dict(branch_norm='none', scale=1 / 3)),
]


@pytest.mark.parametrize('variant, options', NOT_LIFTED, ids=str)
def test_what_has_no_exact_lift_takes_no_stock_weights(stock, cache_dir, variant, options):
    stock(RESNET)
    with pytest.raises(ReparamError, match='scratch'):
        create(f'{RESNET}_{variant}', cache_dir, conv_options=options)


@pytest.mark.parametrize(
    'options',
    [dict(init='middle'), dict(depth_multiplier=4), dict(no_such_option=1), dict(skip=['no_such_layer*'])],
    ids=str,
)
def test_options_that_cannot_be(options):
    with pytest.raises(ReparamError):
        timm.create_model(f'{RESNET}_doconv', conv_options=options)


def test_training_refconv_without_pretrained_weights_warns_once():
    model = timm.create_model(f'{RESNET}_refconv', **NARROW[RESNET])
    model.eval()(images())
    with pytest.warns(UserWarning, match='without pretrained weights') as seen:
        model.train()(images())
    assert len(seen) == 1
    model(images())  # warnings are errors here


def test_training_refconv_with_weights_does_not_warn(stock, trained, cache_dir, tmp_path):
    stock(RESNET)
    _, folder = trained(f'{RESNET}_refconv')
    weights = timm.create_model(RESNET, **NARROW[RESNET]).state_dict()
    torch.save(weights, tmp_path / 'stock.pth')
    loaded = timm.create_model(f'{RESNET}_refconv', **NARROW[RESNET])
    loaded.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        for model in (
            loaded,
            create(f'{RESNET}_refconv', cache_dir),
            create(f'local-dir:{folder}'),
            timm.create_model(f'{RESNET}_refconv', checkpoint_path=tmp_path / 'stock.pth', **NARROW[RESNET]),
        ):
            model.train()(images())


# Wrong checkpoints ---------------------------------------------------------------------------------------------------


def overlay_of(state: dict[str, torch.Tensor], folder: Path) -> dict[str, str]:
    path = folder / 'weights.safetensors'
    save_file({name: value.detach().contiguous() for name, value in state.items()}, path)
    return dict(file=str(path))


def assert_listed(message: str, keys: list[str]) -> None:
    assert [key for key in keys if key not in message] == []
    places = [message.index(key) for key in sorted(keys)]
    assert places == sorted(places), 'not sorted'


@pytest.mark.parametrize(('variant', 'num_classes'), rotated(list(LAYERS), [None, 10]))
def test_checkpoint_of_another_architecture(stock, tmp_path, variant, num_classes):
    """With another num_classes timm loads without strictness: a wrong checkpoint would load nothing and say nothing."""
    overlay = overlay_of(stock(MOBILENET).state_dict(), tmp_path)
    with pytest.raises(ReparamError, match=r'(?is)missing.*unexpected|unexpected.*missing') as error:
        create(f'{RESNET}_{variant}', pretrained_cfg_overlay=overlay, num_classes=num_classes)
    message = str(error.value)
    assert_listed(message, ['conv1.0.weight', 'layer1.0.conv1.weight', 'layer4.0.bn2.running_var'])
    assert_listed(message, ['blocks.0.0.conv_dw.weight', 'blocks.6.0.bn3.bias', 'conv_stem.weight'])


@pytest.mark.parametrize(('name', 'num_classes'), rotated([RESNET, f'{RESNET}_acconv', f'{RESNET}_doconv'], [None, 10]))
def test_missing_and_unexpected_keys_are_listed_sorted(stock, trained, tmp_path, name, num_classes):
    """In a stock checkpoint and in a train-time one."""
    model, architecture = (stock(name), f'{RESNET}_doconv') if name == RESNET else (trained(name)[0], name)
    state = model.state_dict()
    missing = ['layer3.0.conv2.weight', 'layer1.0.bn2.running_mean', 'layer4.0.downsample.1.weight']
    unexpected = ['stray.weight', 'layer2.0.conv1.stray', 'another.bias']
    for key in missing:
        del state[key]
    state |= {key: torch.zeros(1) for key in unexpected}
    with pytest.raises(ReparamError) as error:
        create(architecture, pretrained_cfg_overlay=overlay_of(state, tmp_path), num_classes=num_classes)
    assert_listed(str(error.value), missing)
    assert_listed(str(error.value), unexpected)
    assert 'layer1.0.conv1' not in str(error.value)
    assert 'fc.' not in str(error.value)


def test_a_layer_of_which_half_is_missing(trained, tmp_path):
    state = trained(f'{RESNET}_acconv')[0].state_dict()
    del state['layer1.0.conv1.vertical_gamma']
    with pytest.raises(ReparamError, match=r'layer1\.0\.conv1\.vertical_gamma'):
        create(f'{RESNET}_acconv', pretrained_cfg_overlay=overlay_of(state, tmp_path))


@pytest.mark.parametrize('num_classes', [None, 10])
def test_train_time_checkpoint_of_another_variant(trained, tmp_path, num_classes):
    overlay = overlay_of(trained(f'{RESNET}_acconv')[0].state_dict(), tmp_path)
    with pytest.raises(ReparamError, match=r'layer1\.0\.conv1\.vertical_weight'):
        create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay, num_classes=num_classes)


def test_train_time_checkpoint_of_other_options(tmp_path):
    state = random_model(f'{RESNET}_doconv', conv_options=dict(depth_multiplier=12)).state_dict()
    with pytest.raises(ReparamError, match=r'layer1\.0\.conv1\.(depthwise|surplus)_weight'):
        create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay_of(state, tmp_path))


def test_only_the_classifier_may_be_missing(stock, tmp_path):
    state = {name: value for name, value in stock(RESNET).state_dict().items() if not name.startswith('fc.')}
    overlay = overlay_of(state, tmp_path)
    model = create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay, num_classes=10)
    assert_same_function(model, stock(RESNET), method='forward_features')


WRONG_SHAPES = [
    ('layer1.0.conv1.weight', (64, 64, 5, 5)),
    ('layer2.0.bn1.running_var', (7,)),
    ('conv1.0.weight', (24, 3, 5, 5)),
]


@pytest.mark.parametrize(('key', 'shape', 'num_classes'), rotated(WRONG_SHAPES, [None, 10]))
def test_wrong_shapes(stock, tmp_path, key, shape, num_classes):
    state = stock(RESNET).state_dict()
    wanted = tuple(state[key].shape)
    state[key] = torch.ones(shape)
    with pytest.raises(ReparamError) as error:
        create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay_of(state, tmp_path), num_classes=num_classes)
    for text in (key, str(wanted).strip('(,)'), str(shape).strip('(,)')):
        assert text in str(error.value)


def test_wrong_shape_in_a_train_time_checkpoint(trained, tmp_path):
    state = trained(f'{RESNET}_doconv')[0].state_dict()
    state['layer1.0.conv1.depthwise_weight'] = torch.ones(64, 9, 8)
    with pytest.raises(ReparamError, match=r'layer1\.0\.conv1\.depthwise_weight'):
        create(f'{RESNET}_doconv', pretrained_cfg_overlay=overlay_of(state, tmp_path), num_classes=10)


# What the client says is passed on -----------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['resnet14t_doconv', 'hf-hub:someone/no_such_model'])
def test_unknown_repo_is_the_clients_error(hub, cache_dir, name):
    with pytest.raises(RepositoryNotFoundError):
        create(name, cache_dir)
    assert hub.log


def test_gated_repo_is_the_clients_error(hub, trained, cache_dir):
    _, folder = trained(f'{RESNET}_doconv')
    if 'someone/gated' not in hub.repos:
        hub.create_repo('someone/gated', gated=True)
        hub.commit_folder('someone/gated', folder)
    with pytest.raises(GatedRepoError, match='restricted'):
        create('hf-hub:someone/gated', cache_dir)


def test_unknown_architecture_in_a_config_is_timms_error(hub, cache_dir):
    hub.commit('someone/unknown', {'config.json': '{"architecture": "resnet18_noconv", "pretrained_cfg": {}}'})
    with pytest.raises(RuntimeError, match='Unknown model'):
        create('hf-hub:someone/unknown', cache_dir)
