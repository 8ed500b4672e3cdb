"""RefConv2d beyond what all layers share: the map and its groups, the frozen base."""

import copy

import pytest
import torch
import torch.nn as nn

from timm_reparam import ReparamError
from timm_reparam.layers import RefConv2d

from . import oracles
from .cases import (
    ALGEBRA,
    CASES,
    CLEARLY,
    METHODS,
    Case,
    Method,
    generator,
    identifier,
    products,
    randomise,
    randomised,
    relative_difference,
    state,
)

REF_METHODS = (
    *(method for method in METHODS if method.cls is RefConv2d),
    Method('refconv_map_5', RefConv2d, lambda case: {'map_kernel_size': 5}),
)


@pytest.mark.parametrize('method, case', products(REF_METHODS, CASES), ids=identifier)
def test_formula(method: Method, case: Case) -> None:
    layer, x = randomised(method, case), case.input()
    kernel = oracles.ref_kernel(layer.weight, layer.map_weight, case.groups)
    expected = oracles.convolution(x, kernel, layer.bias, case)
    assert relative_difference(layer.equivalent_kernel(), kernel) <= ALGEBRA
    assert relative_difference(layer.fuse().weight, kernel) <= ALGEBRA
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.train()(x), expected) <= ALGEBRA


@pytest.mark.parametrize(
    'in_channels, out_channels, kernel_size, groups, map_kernel_size, expected',
    [
        # Dense: one filter for each 2-D kernel.
        (4, 6, (3, 3), 1, 3, (24, 1, 3, 3)),
        (4, 6, (7, 7), 1, 3, (24, 1, 3, 3)),
        (4, 6, (7, 7), 1, 5, (24, 1, 5, 5)),
        (4, 6, (3, 3), 1, 1, (24, 1, 1, 1)),
        # Each side the smaller of the map's and the kernel's, rounded down to odd.
        (4, 6, (1, 3), 1, 3, (24, 1, 1, 3)),
        (4, 6, (3, 5), 1, 5, (24, 1, 3, 5)),
        (4, 6, (2, 2), 1, 3, (24, 1, 1, 1)),
        (4, 6, (4, 5), 1, 5, (24, 1, 3, 5)),
        # Groups: each set of g kernels is linked; depthwise, all of them.
        (4, 6, (3, 3), 2, 3, (12, 2, 3, 3)),
        (6, 9, (3, 3), 3, 3, (18, 3, 3, 3)),
        (4, 4, (3, 3), 4, 3, (4, 4, 3, 3)),
        (4, 8, (3, 3), 4, 3, (8, 4, 3, 3)),
    ],
)
def test_map_shape(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    groups: int,
    map_kernel_size: int,
    expected: tuple[int, ...],
) -> None:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, groups=groups, bias=False)
    lifted = RefConv2d.from_conv(conv, map_kernel_size=map_kernel_size)
    arguments = (in_channels, out_channels, kernel_size)
    direct = RefConv2d(*arguments, groups=groups, bias=False, map_kernel_size=map_kernel_size)
    for layer in (lifted, direct):
        assert layer.map_weight.shape == expected
        assert set(layer.state_dict()) == {'weight', 'map_weight'}
        assert [name for name, _ in layer.named_parameters()] == ['map_weight']
        assert layer.weight.shape == conv.weight.shape
    assert (lifted.map_weight == 0).all()


def test_base_is_frozen() -> None:
    case = Case('base', 3, padding=1, bias=True)
    conv, x = case.conv(), case.input()
    layer = RefConv2d.from_conv(conv).train()
    randomise(layer, generator(2))
    before = state(layer)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.1)
    layer(x).square().sum().backward()
    optimiser.step()
    assert torch.equal(layer.weight, before['weight'])
    assert layer.weight.grad is None
    assert conv.weight.grad is None
    for name in ('map_weight', 'bias'):
        assert not torch.equal(layer.state_dict()[name], before[name]), name


def test_base_moves_with_the_layer() -> None:
    layer = copy.deepcopy(RefConv2d(4, 6, 3))
    assert layer.bfloat16().weight.dtype == torch.bfloat16
    assert layer.to('meta').weight.is_meta


def test_scratch_start_has_random_maps() -> None:
    """The released script's start: the map at the default start of a convolution of its shape."""
    case = Case('scratch', 3, padding=1, groups=2)
    conv, x = case.conv(), case.input()
    layer = RefConv2d.from_conv(conv, init='scratch')
    assert torch.equal(layer.weight, conv.weight)
    bound = (layer.map_weight[0].numel()) ** -0.5
    assert layer.map_weight.abs().max() <= bound
    assert layer.map_weight.abs().max() > 0.9 * bound
    assert relative_difference(layer(x), conv(x)) > CLEARLY
    kernel = oracles.ref_kernel(layer.weight, layer.map_weight, case.groups)
    assert relative_difference(layer.fuse().weight, kernel) <= ALGEBRA


BAD_OPTIONS = [
    ({'map_kernel_size': 0}, ['map_kernel_size', '0']),
    ({'map_kernel_size': -3}, ['map_kernel_size', '-3']),
    ({'map_kernel_size': (3, 3, 3)}, ['map_kernel_size', '(3, 3, 3)']),
]


@pytest.mark.parametrize('options, fragments', BAD_OPTIONS, ids=identifier)
def test_bad_options(options: dict, fragments: list[str]) -> None:
    for build in (
        lambda: RefConv2d(4, 6, 3, **options),
        lambda: RefConv2d.from_conv(nn.Conv2d(4, 6, 3), **options),
        lambda: RefConv2d.from_conv(nn.Conv2d(4, 6, 3), init='scratch', **options),
    ):
        with pytest.raises(ReparamError) as error:
            build()
        for fragment in ['RefConv2d', *fragments]:
            assert fragment in str(error.value)
