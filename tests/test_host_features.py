"""What timm's users and scripts do to a model besides training and fusing it, on models of all variants."""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from layers.cases import assert_same_state, relative_difference, state
from stand_in import KINDS, random_model, randomise
from timm.layers import convert_sync_batchnorm, set_reentrant_ckpt, use_reentrant_ckpt
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch import nn

from timm_reparam import ReparamError, convert_model, fuse_model, is_variant, verify_fusion
from timm_reparam.variants import VARIANTS

ALGEBRA = 1e-10
SIZE = 32
# a narrow ResNet
NARROW = dict(num_classes=5, stem_width=4, channels=(8, 12, 16, 24))

variants = pytest.mark.parametrize('variant', KINDS)


def images(batch: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def disturbed(model: nn.Module, seed: int = 2) -> nn.Module:
    """Away from where the model starts: attention that tells the samples apart, in mid-schedule."""
    randomise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if '.fc2.' in name:
                tensor.normal_(0, 20, generator=generator)
            elif 'residual' in name:
                tensor.normal_(0, 0.5 * tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith('temperature_position'):
                tensor.fill_(4_000)
    return model


def build(variant: str, dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A narrow ResNet as a variant, everything randomised, in eval mode."""
    model = random_model('resnet10t', **NARROW)
    return disturbed(convert_model(model, variant, **options)).to(dtype)


def step(model: nn.Module, x: torch.Tensor, lr: float = 0.01) -> dict[str, torch.Tensor]:
    """One step of SGD; gives the gradients."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(x).float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    torch.optim.SGD(parameters.values(), lr=lr).step()
    return gradients


# Copies ---------------------------------------------------------------------------------------------------------------


def saved_whole(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def built_on_meta(model: nn.Module) -> nn.Module:
    with torch.device('meta'):
        other = timm.create_model(model.pretrained_cfg['architecture'], **NARROW)
    assert all(tensor.is_meta for tensor in itertools.chain(other.parameters(), other.buffers()))
    other.to_empty(device='cpu').load_state_dict(model.state_dict())
    return other.train(model.training)


def assigned_on_meta(model: nn.Module) -> nn.Module:
    with torch.device('meta'):
        other = timm.create_model(model.pretrained_cfg['architecture'], **NARROW)
    other.load_state_dict(state(model), assign=True)
    return other.train(model.training)


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
    'torch_save': saved_whole,
    'meta_to_empty': built_on_meta,
    'meta_assign': assigned_on_meta,
}


@pytest.mark.parametrize(
    'variant, make_copy',
    [  # each way with half of the variants
        pytest.param(variant, make_copy, marks=[] if (index + number) % 2 else pytest.mark.slow, id=f'{name}-{variant}')
        for index, variant in enumerate(VARIANTS)
        for number, (name, make_copy) in enumerate(COPIES.items())
    ],
)
def test_copies_train_and_fuse_alike(variant: str, make_copy: Callable[[nn.Module], nn.Module]) -> None:
    model = build(variant)
    other = make_copy(model)
    assert_same_state(other, state(model))
    assert not {t.data_ptr() for t in other.state_dict().values()} & {t.data_ptr() for t in model.state_dict().values()}
    for module in (model, other):
        step(module.train(), images())
        module.eval()
    assert_same_state(other, state(model))
    assert torch.equal(other(images(seed=1)), model(images(seed=1)))
    assert_same_state(fuse_model(other), state(fuse_model(model)))
    assert other.pretrained_cfg['architecture'] == model.pretrained_cfg['architecture']


@variants
@pytest.mark.parametrize('foreach', [True, False], ids=['foreach', 'one_by_one'])
def test_model_ema(variant: str, foreach: bool) -> None:
    """Parameters and running statistics are averaged, the place in the schedule is the model's own."""
    model = build(variant, torch.float64).train()
    ema = ModelEmaV3(model, decay=0.75, foreach=foreach)
    expected = state(model)
    for index in range(3):
        step(model, images(seed=index, dtype=torch.float64), lr=0.1)
        ema.update(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.75 * expected[name] + 0.25 * value
            else:
                expected[name] = value.clone()
    for name, value in ema.module.state_dict().items():
        assert torch.allclose(value.double(), expected[name].double(), rtol=1e-12, atol=1e-14), name
    averaged, latest = ema.module.layer1[0].conv1.state_dict(), model.layer1[0].conv1.state_dict()
    for name, value in latest.items():
        frozen = name == 'prior' or (variant == 'refconv' and name == 'weight')
        assert torch.equal(averaged[name], value) == (frozen or not value.is_floating_point()), name
    if variant == 'dyconv':
        assert averaged['temperature_position'] == 4_003
    assert verify_fusion(ema, inputs=images(dtype=torch.float64)).algebra <= ALGEBRA


@variants
def test_state_dict_hooks_of_the_model_stay(variant: str) -> None:
    """Hooks of a module that holds convolutions: it is converted in place, and fused by copying."""
    stock = random_model('resnet10t', **NARROW)
    stock.layer1.register_state_dict_post_hook(
        lambda module, state_dict, prefix, metadata: state_dict.update({f'{prefix}note': torch.ones(())})
    )
    stock.layer1.register_load_state_dict_pre_hook(
        lambda module, state_dict, prefix, *rest: state_dict.pop(f'{prefix}note', None)
    )
    model = disturbed(convert_model(stock, variant))
    for module in (model, fuse_model(model)):
        saved = state(module)
        assert 'layer1.note' in saved
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        module.load_state_dict(saved)
        assert_same_state(module, saved)


STATE_DICT_HOOKS = {
    'post_hook': lambda conv: conv.register_state_dict_post_hook(lambda *args: None),
    'pre_hook': lambda conv: conv.register_state_dict_pre_hook(lambda *args: None),
    'load_pre_hook': lambda conv: conv.register_load_state_dict_pre_hook(lambda *args: None),
    'load_post_hook': lambda conv: conv.register_load_state_dict_post_hook(lambda *args: None),
}


@pytest.mark.parametrize('register', STATE_DICT_HOOKS.values(), ids=STATE_DICT_HOOKS.keys())
def test_state_dict_hooks_of_a_convolution_are_not_lost_silently(register: Callable) -> None:
    model = timm.create_model('resnet10t', **NARROW)
    register(model.layer1[0].conv1)
    with pytest.raises(ReparamError, match=r'layer1\.0\.conv1: .*hooks'):
        convert_model(model, 'doconv')
    convert_model(model, 'doconv', skip='layer1.0.conv1')


# Norms and freezing ---------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(
    'convert', [convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm], ids=['timm', 'torch']
)
def test_sync_batch_norm(variant: str, convert: Callable[[nn.Module], nn.Module]) -> None:
    """The norms are replaced, those of branches among them; the layers stay, and so does the state."""
    model = build(variant)
    expected, before = model(images()), state(model)
    layers = {name: module for name, module in model.named_modules() if is_variant(module)}
    model = convert(model)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    assert_same_state(model, before)
    assert torch.equal(model(images()), expected)
    fused = fuse_model(model)
    of_branches = [norm for layer in layers.values() for norm in layer.children() if norm in norms]
    assert bool(of_branches) == (variant in ('acconv', 'dbbconv'))
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in fused.modules()) == len(norms) - len(of_branches)
    assert verify_fusion(model, fused, inputs=images()).passed


@variants
def test_freeze_and_unfreeze(variant: str) -> None:
    """timm's freezing stops parameters and BatchNorms; what a layer itself counts or averages stops in eval mode."""
    model = build(variant).train()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    freeze(model, ['conv1', 'layer1'])
    frozen = [model.conv1, model.layer1]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name in trainable if not name.startswith(('conv1.', 'layer1.'))
    }
    for module in frozen:
        module.eval()
    before = {name: value for name, value in state(model).items() if name.startswith(('conv1.', 'layer1.'))}
    first = model.layer1(torch.ones(2, 8, 8, 8))
    gradients = step(model, images())
    assert not any(name.startswith(('conv1.', 'layer1.')) for name in gradients)
    assert any(name.startswith('layer2.0.conv1') for name in gradients)
    found = model.state_dict()
    for name, value in before.items():
        assert torch.equal(found[name], value), name
    assert torch.equal(model.layer1(torch.ones(2, 8, 8, 8)), first)
    assert verify_fusion(model, inputs=images()).passed
    assert not any(p.requires_grad for p in fuse_model(model).layer1.parameters())
    unfreeze(model, ['conv1', 'layer1'])
    model.train()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert 'layer1.0.conv1.bias' not in trainable
    gradients = step(model, images())
    assert gradients.keys() == trainable
    found = model.state_dict()
    moved = {name for name in before if not torch.equal(found[name], before[name])}
    assert any('running_mean' in name for name in moved)


@pytest.fixture
def reentrant() -> Iterator[Callable[[bool], None]]:
    before = use_reentrant_ckpt()
    yield set_reentrant_ckpt
    set_reentrant_ckpt(before)


@variants
@pytest.mark.parametrize('use_reentrant', [False, True], ids=['non_reentrant', 'reentrant'])
def test_gradient_checkpointing(variant: str, use_reentrant: bool, reentrant: Callable[[bool], None]) -> None:
    """The same gradients, and a pass that is repeated counts once."""
    reentrant(use_reentrant)
    model = build(variant, torch.float64).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for index in range(2):
        x = images(seed=index, dtype=torch.float64)
        expected, found = step(model, x), step(other, x)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert (found[name] - gradient).abs().max() <= ALGEBRA * max(1, gradient.abs().max()), name
    positions = {int(b) for name, b in other.named_buffers() if name.endswith('temperature_position')}
    assert positions == ({4_002} if variant == 'dyconv' else set())


# The optimiser --------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(
    'stock, options', [('resnet10t', NARROW), ('mobilenetv2_035', dict(num_classes=5))], ids=['resnet', 'mobilenetv2']
)
def test_layer_decay(variant: str, stock: str, options: dict) -> None:
    """What a layer adds learns at the rate of the layer's own depth, and only what is no vector decays."""
    model = convert_model(random_model(stock, **options), variant)
    optimiser = create_optimizer_v2(model, 'sgd', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group['lr'] * group['lr_scale'] for group in optimiser.param_groups for p in group['params']}
    decays = {names[id(p)]: group['weight_decay'] for group in optimiser.param_groups for p in group['params']}
    assert rates.keys() == set(names.values())
    plain = random_model(stock, **options)
    expected_optimiser = create_optimizer_v2(plain, 'sgd', lr=1.0, weight_decay=0.1, layer_decay=0.5)
    plain_names = {id(parameter): name for name, parameter in plain.named_parameters()}
    expected = {
        plain_names[id(p)]: group['lr'] * group['lr_scale']
        for group in expected_optimiser.param_groups
        for p in group['params']
    }
    assert len(set(expected.values())) > 3
    layers = [name for name, module in model.named_modules() if is_variant(module)]
    for layer in layers:
        own = [name for name in rates if name.startswith(f'{layer}.')]
        assert own
        assert {rates[name] for name in own} == {expected[f'{layer}.weight']}, layer
    for name, rate in expected.items():
        assert rates.get(name, rate) == rate, name
    for name, parameter in model.named_parameters():
        assert decays[name] == (0.1 if parameter.ndim > 1 else 0), name


# Number formats -------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize(
    'dtype',
    [
        pytest.param(torch.bfloat16, id='bfloat16'),
        pytest.param(torch.float16, id='float16', marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize('channels_last', [False, True], ids=['contiguous', 'channels_last'])
def test_training_under_autocast(variant: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Outputs and states near those of float64, every gradient there and finite."""
    model = build(variant).train()
    exact = copy.deepcopy(model).double()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    # with a few pixels a channel left, norms would divide by the rounding of what they see
    x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = exact(x.double())
    with torch.autocast('cpu', dtype):
        found = model(x.to(memory_format=torch.channels_last) if channels_last else x)
        loss = found.float().square().mean()
    assert found.dtype == dtype
    loss.backward()
    bound = 0.06 if dtype == torch.bfloat16 else 0.03
    assert relative_difference(found.double(), expected) < bound
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name
    expected = exact.state_dict()
    for name, value in model.state_dict().items():
        if name.endswith('_running_var'):
            assert relative_difference(value.double(), expected[name]) < bound, name
        if not value.is_floating_point():
            assert torch.equal(value, expected[name]), name
