"""DOConv2d beyond what all layers share: the composition, the surplus columns, the random start."""

import numpy as np
import pytest
import torch
import torch.nn as nn

from timm_reparam import ReparamError
from timm_reparam.layers import DOConv2d

from . import oracles
from .cases import (
    ALGEBRA,
    CASES,
    METHODS,
    Case,
    Method,
    identifier,
    products,
    randomised,
    relative_difference,
)

DO_METHODS = tuple(method for method in METHODS if method.cls is DOConv2d)


@pytest.mark.parametrize('method, case', products(DO_METHODS, CASES), ids=identifier)
def test_formula(method: Method, case: Case) -> None:
    layer, x = randomised(method, case), case.input()
    kernel = oracles.do_kernel(layer.weight, layer.depthwise_weight, layer.surplus_weight, case.groups)
    expected = oracles.convolution(x, kernel, layer.bias, case)
    assert relative_difference(layer.equivalent_kernel(), kernel) <= ALGEBRA
    assert relative_difference(layer.fuse().weight, kernel) <= ALGEBRA
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.train()(x), expected) <= ALGEBRA


@pytest.mark.parametrize('groups', [1, 2, 4])
def test_every_real_input_channel_has_its_own_transform(groups: int) -> None:
    """Moving the transform of one channel moves the kernel slices that read this channel, and no other."""
    case = Case('groups', 3, groups=groups, out_channels=8)
    layer = DOConv2d.from_conv(case.conv())
    for channel in range(case.in_channels):
        layer.load_state_dict(DOConv2d.from_conv(case.conv()).state_dict())
        with torch.no_grad():
            layer.depthwise_weight[channel].fill_(1.0)
        moved = (layer.equivalent_kernel() != layer.weight).flatten(2).any(dim=2)
        group_inputs, group_outputs = case.in_channels // groups, case.out_channels // groups
        expected = torch.zeros_like(moved)
        group = channel // group_inputs
        expected[group * group_outputs : (group + 1) * group_outputs, channel % group_inputs] = True
        assert torch.equal(moved, expected)


@pytest.mark.parametrize(
    'kernel_size, depth_multiplier, columns, identity_columns',
    [
        ((3, 3), None, 0, 0),
        ((3, 3), 9, 0, 0),
        ((3, 3), 10, 1, 0),
        ((3, 3), 18, 9, 9),
        ((3, 3), 22, 13, 9),
        ((1, 3), 10, 7, 6),
        ((2, 2), 6, 2, 0),
    ],
)
def test_parameters(
    kernel_size: tuple[int, int], depth_multiplier: int | None, columns: int, identity_columns: int
) -> None:
    """Whole identity blocks start at zero; what is left over starts away from zero, or it never would move."""
    area = kernel_size[0] * kernel_size[1]
    for layer in (
        DOConv2d(4, 6, kernel_size, groups=2, bias=False, depth_multiplier=depth_multiplier),
        DOConv2d.from_conv(nn.Conv2d(4, 6, kernel_size, groups=2, bias=False), depth_multiplier=depth_multiplier),
    ):
        assert layer.weight.shape == (6, 2, *kernel_size)
        assert layer.depthwise_weight.shape == (4, area, depth_multiplier or area)
        assert layer.depthwise_weight.abs().max() == 0
        names = {'weight', 'depthwise_weight'}
        if columns == 0:
            assert layer.surplus_weight is None
        else:
            names.add('surplus_weight')
            assert layer.surplus_weight.shape == (6, 2, columns)
            assert (layer.surplus_weight[:, :, :identity_columns] == 0).all()
            assert (layer.surplus_weight[:, :, identity_columns:] != 0).all()
        # The identity is no state of its own.
        assert set(layer.state_dict()) == {name for name, _ in layer.named_parameters()} == names


def test_1x1_has_nothing_to_over_parameterise() -> None:
    for layer in (DOConv2d(4, 6, 1), DOConv2d.from_conv(nn.Conv2d(4, 6, 1))):
        assert set(layer.state_dict()) == {'weight', 'bias'}
        assert layer.depthwise_weight is None
        assert layer.surplus_weight is None
        assert torch.equal(layer.equivalent_kernel(), layer.weight)


def test_kernel_size_of_another_integer_type() -> None:
    """A width that was computed with NumPy is as good for the layer as for nn.Conv2d."""
    layer = DOConv2d(4, 6, np.int64(3))
    assert layer.depthwise_weight.shape == (4, 9, 9)
    assert DOConv2d(4, 6, 3, depth_multiplier=np.int64(10)).surplus_weight.shape == (6, 4, 1)


def test_scratch_start_is_that_of_conv2d() -> None:
    """Same numbers from the same seed: weight first, then bias, and a transform that starts as the identity."""
    torch.manual_seed(3)
    conv = nn.Conv2d(4, 6, 3)
    torch.manual_seed(3)
    layer = DOConv2d(4, 6, 3)
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.bias, conv.bias)
    assert torch.equal(layer.equivalent_kernel(), layer.weight)


def test_feature_composition_is_kernel_composition() -> None:
    """The other way to compute a DO-Conv: the input through D, channel by channel, then through W as a 1×1."""
    case = Case('features', 3, stride=2)
    layer, x = randomised(DO_METHODS[0], case), case.input()
    patches = nn.functional.unfold(x, case.kernel_size, stride=2).unflatten(1, (case.in_channels, case.area))
    transform = layer.depthwise_weight + torch.eye(case.area, dtype=torch.float64)
    features = torch.einsum('bimp,ims->bisp', patches, transform)
    expected = torch.einsum('bisp,ois->bop', features, layer.weight.flatten(2))
    found = layer(x)
    assert relative_difference(found, expected.reshape(found.shape)) <= ALGEBRA


BAD_OPTIONS = [
    ((3, 3), {'depth_multiplier': 8}, ['depth_multiplier', '8', '9']),
    ((3, 5), {'depth_multiplier': 9}, ['depth_multiplier', '9', '15']),
    ((3, 3), {'depth_multiplier': 0}, ['depth_multiplier', '0', '9']),
    ((3, 3), {'depth_multiplier': -9}, ['depth_multiplier', '-9', '9']),
    ((2, 2), {'depth_multiplier': 3}, ['depth_multiplier', '3', '4']),
]


@pytest.mark.parametrize('kernel_size, options, fragments', BAD_OPTIONS, ids=identifier)
def test_bad_options(kernel_size: tuple[int, int], options: dict, fragments: list[str]) -> None:
    conv = nn.Conv2d(4, 6, kernel_size)
    for build in (
        lambda: DOConv2d(4, 6, kernel_size, **options),
        lambda: DOConv2d.from_conv(conv, **options),
        lambda: DOConv2d.from_conv(conv, init='scratch', **options),
    ):
        with pytest.raises(ReparamError) as error:
            build()
        for fragment in ['DOConv2d', *fragments]:
            assert fragment in str(error.value)
