"""The transposed layers: the table of transposed convolutions times DOConvTranspose2d and RefConvTranspose2d."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_feature_extractor

from timm_reparam import ReparamError
from timm_reparam.layers import DOConvTranspose2d, RefConvTranspose2d

from . import oracles
from .cases import (
    ALGEBRA,
    CLEARLY,
    DTYPES,
    TRANSPOSED_CASES,
    TRANSPOSED_METHODS,
    Method,
    TransposedCase,
    assert_same_state,
    assert_within,
    generator,
    identifier,
    in_float64,
    magnitude,
    products,
    randomise,
    randomised,
    relative_difference,
    state,
    unit_roundoff,
)

everything = pytest.mark.parametrize('method, case', products(TRANSPOSED_METHODS, TRANSPOSED_CASES), ids=identifier)
every_layer = pytest.mark.parametrize('method', TRANSPOSED_METHODS, ids=identifier)
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])

BIASED = next(case for case in TRANSPOSED_CASES if case.name == 'groups_2')


def kernel_of(layer: nn.Module, case: TransposedCase) -> torch.Tensor:
    if isinstance(layer, RefConvTranspose2d):
        return oracles.ref_kernel(layer.weight, layer.map_weight, case.groups)
    return oracles.do_transpose_kernel(layer.weight, layer.depthwise_weight, layer.surplus_weight)


@pytest.mark.parametrize('dtype', DTYPES, ids=identifier)
@everything
def test_lift_is_exact(method: Method, case: TransposedCase, dtype: torch.dtype) -> None:
    conv, x = case.conv(dtype), case.input(dtype)
    layer = method.lift(conv, case)
    assert type(layer) is method.cls
    assert isinstance(layer, nn.ConvTranspose2d)
    for training in (False, True):
        assert torch.equal(layer.train(training)(x), conv(x))
    assert layer.bias is conv.bias
    assert torch.equal(layer.weight, conv.weight)
    if method.cls is DOConvTranspose2d:
        assert layer.weight is conv.weight
    else:
        assert 'weight' not in dict(layer.named_parameters())


@everything
def test_formula(method: Method, case: TransposedCase) -> None:
    conv, x = case.conv(), case.input()
    layer = randomised(method, case)
    before = state(layer)
    kernel = kernel_of(layer, case)
    arguments = (case.stride, case.padding, case.output_padding, case.groups, case.dilation)
    expected = F.conv_transpose2d(x, kernel, layer.bias, *arguments)
    if method.over_parameterises(case):
        assert relative_difference(expected, conv(x)) > CLEARLY
    for training in (True, False):
        assert relative_difference(layer.train(training)(x), expected) <= ALGEBRA
    assert relative_difference(layer.equivalent_kernel(), kernel) <= ALGEBRA
    fused = layer.fuse()
    assert type(fused) is nn.ConvTranspose2d
    assert list(fused.state_dict()) == list(conv.state_dict())
    assert fused.training is False
    for name in ('stride', 'padding', 'output_padding', 'dilation', 'groups', 'padding_mode', 'kernel_size'):
        assert getattr(fused, name) == getattr(conv, name), name
    assert fused.weight.shape == conv.weight.shape
    assert relative_difference(fused(x), expected) <= ALGEBRA
    assert_same_state(layer, before)


@everything
def test_output_size(method: Method, case: TransposedCase) -> None:
    """Every size that the stride leaves open can be asked for, as from nn.ConvTranspose2d."""
    conv, x, layer = case.conv(), case.input(), randomised(method, case)
    fused = layer.fuse()
    smallest = F.conv_transpose2d(x, conv.weight, None, case.stride, case.padding, 0, case.groups, case.dilation).shape[
        2:
    ]
    strides = conv.stride
    for output_size in {tuple(smallest), (smallest[0] + strides[0] - 1, smallest[1] + strides[1] - 1)}:
        found = layer(x, output_size=list(output_size))
        assert found.shape[2:] == output_size
        assert relative_difference(found, fused(x, output_size=list(output_size))) <= ALGEBRA
    with pytest.raises(ValueError, match='output size'):
        layer(x, output_size=[smallest[0] + strides[0], smallest[1]])


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=identifier)
@everything
def test_fused_kernel_is_rounded_once(method: Method, case: TransposedCase, dtype: torch.dtype) -> None:
    x = case.input(dtype)
    layer = randomised(method, case, dtype)
    exact, fused = in_float64(layer), layer.fuse()
    kernel = exact.equivalent_kernel()
    roundoff = unit_roundoff(dtype)
    assert fused.weight.dtype == dtype
    assert_within(fused.weight, kernel, roundoff * kernel.abs())
    bound = roundoff * magnitude(case.conv(), x, kernel)
    assert_within(in_float64(fused)(x.double()), exact(x.double()), bound)


@everything
def test_gradients(method: Method, case: TransposedCase) -> None:
    layer, x = method.lift(case.conv(), case).train(), case.input()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f'{name} has no gradient on the fresh lift'
    randomise(layer, generator(2))
    layer.zero_grad()
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, f'{name} has a gradient of zeros'


@everything
def test_round_trips(method: Method, case: TransposedCase) -> None:
    layer, x = randomised(method, case), case.input()
    fresh = method.cls(**case.arguments(), **method.options(case), dtype=torch.float64).eval()
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert_same_state(other, state(layer))
        assert torch.equal(other(x), layer(x))


@every_layer
@both_modes
def test_scripted_layer_equals_eager(method: Method, training: bool) -> None:
    layer, x = randomised(method, BIASED).train(training), BIASED.input()
    scripted = torch.jit.script(copy.deepcopy(layer))
    assert torch.equal(scripted(x), layer(x))
    output_size = list(layer(x).shape[2:])
    assert torch.equal(scripted(x, output_size), layer(x, output_size))


@every_layer
def test_constructor_is_that_of_conv_transpose2d(method: Method) -> None:
    stock = list(inspect.signature(nn.ConvTranspose2d).parameters)
    found = inspect.signature(method.cls).parameters
    assert list(found)[: len(stock)] == stock
    for name in list(found)[len(stock) :]:
        assert found[name].kind == inspect.Parameter.KEYWORD_ONLY, name
    positional = method.cls(4, 6, 3, 2, 1, 1, 2, True, (1, 2), **method.options(BIASED))
    conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, 2, True, (1, 2))
    x = torch.ones(2, 4, 5, 4)
    assert positional(x).shape == conv(x).shape
    meta = method.cls(4, 6, 3, device='meta', **method.options(BIASED))
    assert all(tensor.is_meta for tensor in meta.state_dict().values())


@every_layer
def test_edge_inputs(method: Method) -> None:
    layer, x = randomised(method, BIASED), BIASED.input()
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
    assert relative_difference(layer(x[0]), layer(x)[0]) <= ALGEBRA
    other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
    assert relative_difference(other(x.contiguous(memory_format=torch.channels_last)), layer(x)) <= ALGEBRA


@every_layer
def test_autocast_does_not_reach_the_composition(method: Method) -> None:
    layer, x = randomised(method, BIASED, torch.float32), BIASED.input(torch.float32)
    kernel = layer.equivalent_kernel()
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(layer.equivalent_kernel(), kernel)
        assert layer(x).dtype == torch.bfloat16


BAD_OPTIONS = [
    (DOConvTranspose2d, {'depth_multiplier': 8}, ['depth_multiplier', '8', '9']),
    (RefConvTranspose2d, {'map_kernel_size': 0}, ['map_kernel_size', '0']),
    (DOConvTranspose2d, {'init': 'warm'}, ['init', "'warm'", 'lift', 'scratch']),
    (RefConvTranspose2d, {'init': 'warm'}, ['init', "'warm'", 'lift', 'scratch']),
]


@pytest.mark.parametrize('cls, options, fragments', BAD_OPTIONS, ids=identifier)
def test_bad_options(cls: type[nn.Module], options: dict, fragments: list[str]) -> None:
    with pytest.raises(ReparamError) as error:
        cls.from_conv(nn.ConvTranspose2d(4, 6, 3), **options)
    for fragment in [cls.__name__, *fragments]:
        assert fragment in str(error.value)


@every_layer
def test_traced(method: Method) -> None:
    model, x = nn.Sequential(randomised(method, BIASED), nn.ReLU()), BIASED.input()
    extractor = create_feature_extractor(model, return_nodes=['1'])
    assert torch.equal(extractor(x)['1'], model(x))
