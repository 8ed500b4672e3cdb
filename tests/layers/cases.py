"""The one table of convolutions, the table of layers, and the helpers that the layer tests share."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from timm.layers import Conv2dSame

from timm_reparam.layers import (
    ACConv2d,
    DBBConv2d,
    DOConv2d,
    DOConvTranspose2d,
    DynamicConv2d,
    OREPAConv2d,
    RefConv2d,
    RefConvTranspose2d,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# Relative difference that float64 algebra has to keep, and the one that a randomised layer has to exceed: an
# agreement of two outputs says nothing when the layer still is the stock convolution.
ALGEBRA = 1e-10
CLEARLY = 1e-3

STOCK_NAMES = ('weight', 'bias')


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """An int twice, a tuple as it is."""
    return value if isinstance(value, tuple) else (value, value)


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution: the arguments of `nn.Conv2d`, or of `Conv2dSame` where `same` says so, and an input size."""

    name: str
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] | str = 0
    dilation: int | tuple[int, int] = 1
    groups: int = 1
    bias: bool = False
    padding_mode: str = 'zeros'
    in_channels: int = 4
    out_channels: int = 6
    same: bool = False
    size: tuple[int, int] = (9, 8)

    def __str__(self) -> str:
        return self.name

    @property
    def sides(self) -> tuple[int, int]:
        return pair(self.kernel_size)

    @property
    def area(self) -> int:
        return math.prod(self.sides)

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `nn.Conv2d`."""
        names = ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'bias')
        arguments = {name: getattr(self, name) for name in names}
        if not self.same:
            arguments['padding_mode'] = self.padding_mode
        return arguments

    def conv(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Conv2d:
        """The stock convolution with seeded parameters, all of them of the size of one output."""
        cls = Conv2dSame if self.same else nn.Conv2d
        conv = cls(**self.arguments(), dtype=dtype)
        fill(conv, seed)
        return conv

    def input(self, dtype: torch.dtype = torch.float64, batch: int = 2, seed: int = 1) -> torch.Tensor:
        """A seeded input (batch, in_channels, *size)."""
        return normal((batch, self.in_channels, *self.size), generator(seed)).to(dtype)


CASES = (
    Case('3x3', 3, padding=1),
    Case('3x3_bias', 3, padding=1, bias=True),
    Case('3x3_stem', 3, padding=1, stride=2, in_channels=3),
    Case('3x3_no_padding', 3, bias=True),
    Case('3x3_valid', 3, padding='valid'),
    Case('3x3_same', 3, padding='same', bias=True),
    Case('3x3_same_dilation', 3, padding='same', dilation=(2, 1)),
    Case('3x3_wide_padding', 3, padding=(3, 4)),
    Case('3x3_stride', 3, stride=2, padding=1),
    Case('3x3_stride_2_1', 3, stride=(2, 1), padding=(1, 0), bias=True),
    Case('3x3_dilation_2_1', 3, padding=(2, 1), dilation=(2, 1)),
    Case('3x3_dilation_stride', 3, stride=2, padding=2, dilation=2, bias=True),
    Case('3x3_dilation_no_padding', 3, dilation=2),
    Case('5x5_padding', 5, padding=2, bias=True),
    Case('5x5_no_padding', 5),
    Case('5x5_thin_padding', 5, padding=1, stride=2),
    Case('5x5_padding_0_4', 5, padding=(0, 4), dilation=(1, 2), stride=(1, 2)),
    Case('1x1', 1),
    Case('1x1_bias_stride_groups', 1, stride=2, groups=2, bias=True),
    Case('1x1_padding', 1, stride=(1, 2), padding=(0, 1), bias=True),
    Case('1x1_stride_2_1', 1, stride=(2, 1), bias=True),
    Case('3x5', (3, 5), padding=(1, 2)),
    Case('5x3_stride_dilation', (5, 3), stride=(1, 2), padding=(1, 1), dilation=(2, 1), bias=True),
    Case('1x3', (1, 3), padding=(0, 1)),
    Case('3x1_bias', (3, 1), bias=True),
    Case('7x7_stride', 7, stride=2, padding=3, in_channels=3),
    Case('2x2_stride', 2, stride=2),
    Case('2x2_same', 2, padding='same', bias=True),
    Case('4x3', (4, 3), padding=(2, 1), dilation=(1, 2)),
    Case('groups_2', 3, padding=1, groups=2),
    Case('groups_2_5x3_bias', (5, 3), stride=(2, 1), padding=(2, 0), groups=2, bias=True, out_channels=4),
    Case('groups_3', 3, padding=1, groups=3, in_channels=6, out_channels=9, size=(6, 7)),
    Case('depthwise', 3, padding=1, groups=4, out_channels=4),
    Case('depthwise_5x5_bias', 5, stride=2, padding=2, groups=4, out_channels=4, bias=True),
    Case('depthwise_multiplier', 3, padding=1, dilation=(1, 2), groups=4, out_channels=8, bias=True),
    Case('reflect', 3, padding=1, padding_mode='reflect'),
    Case('reflect_same', (3, 5), padding='same', padding_mode='reflect', bias=True),
    Case('replicate', (3, 5), padding=(1, 2), padding_mode='replicate', bias=True),
    Case('replicate_depthwise', 3, padding=2, dilation=2, padding_mode='replicate', groups=4, out_channels=4),
    Case('circular_stride', 5, stride=2, padding=2, padding_mode='circular'),
    Case('circular_thin_padding', (5, 3), padding=(1, 2), padding_mode='circular', groups=2, bias=True),
    Case('conv2d_same', 3, stride=2, same=True),
    Case('conv2d_same_bias_groups', (5, 3), stride=(1, 2), groups=2, same=True, bias=True),
    Case('conv2d_same_dilation', 3, stride=(2, 1), dilation=(1, 2), same=True, bias=True),
    Case('conv2d_same_depthwise', 5, stride=2, groups=4, out_channels=8, same=True),
    Case('conv2d_same_even', 2, stride=1, same=True),
)
# What says the same in every convolution is run on these few: dense, grouped and depthwise, plain and padded.
FEW_NAMES = (
    '3x3_bias',
    '5x3_stride_dilation',
    'groups_2',
    'depthwise_multiplier',
    'reflect_same',
    'circular_thin_padding',
    'conv2d_same_bias_groups',
)
FEW = tuple(case for case in CASES if case.name in FEW_NAMES)

# What every run checks of the products of layers and convolutions; the other products are marked slow. With its default
# options a layer gets every kind of padding, stride, dilation, groups, sides and bias; with other options, which change
# nothing around the kernel, convolutions of the same kinds in other sizes.
OFTEN_NAMES = (
    *('3x3_bias', '3x3_same_dilation', '3x3_wide_padding', '3x3_stride_2_1', '5x5_padding_0_4'),
    *('1x1_bias_stride_groups', '1x1_stride_2_1', '5x3_stride_dilation', '3x1_bias', '2x2_same', '4x3'),
    *('groups_2_5x3_bias', 'groups_3', 'depthwise_multiplier'),
    *('reflect_same', 'replicate_depthwise', 'circular_stride', 'circular_thin_padding'),
    *('conv2d_same_bias_groups', 'conv2d_same_dilation', 'conv2d_same_even'),
)
OFTEN_NAMES_WITH_OPTIONS = (
    *('3x3_valid', '3x3_dilation_stride', '5x5_thin_padding', '1x1_padding', '1x3', '7x7_stride', '2x2_stride'),
    *('groups_2', 'depthwise_5x5_bias', 'replicate', 'reflect_same', 'conv2d_same_bias_groups'),
    'conv2d_same_depthwise',
)


@dataclasses.dataclass(frozen=True)
class Method:
    """One layer with one set of options.

    Args:
        name: Its name in test ids.
        cls: The layer's class.
        options: The options of `from_conv` for a case.
        admits: Whether the layer takes the convolution of a case.
        over_parameterises: Whether the layer adds anything to the convolution of a case.
    """

    name: str
    cls: type[nn.Module]
    options: Callable[[Any], dict[str, Any]] = lambda case: {}
    admits: Callable[[Any], bool] = lambda case: True
    over_parameterises: Callable[[Any], bool] = lambda case: True

    def __str__(self) -> str:
        return self.name

    @property
    def is_default(self) -> bool:
        """Whether the options are the default ones."""
        return self.options is Method.options

    @property
    def dynamic(self) -> bool:
        return self.cls.input_dependent

    @property
    def has_statistics(self) -> bool:
        """Whether a pass in training moves running variances."""
        return self.is_default and issubclass(self.cls, (ACConv2d, DBBConv2d))

    def lift(self, conv: nn.Module, case: Any) -> nn.Module:
        """The layer as it starts from a trained convolution."""
        return self.cls.from_conv(conv, **self.options(case))


def has_area(case: Any) -> bool:
    return case.area > 1


def has_middle(case: Any) -> bool:
    return all(side % 2 for side in case.sides)


def has_middle_or_depthwise(case: Any) -> bool:
    return has_middle(case) or case.groups == case.in_channels == case.out_channels


METHODS = (
    Method('doconv', DOConv2d, over_parameterises=has_area),
    # One whole further identity block and three columns beyond it.
    Method('doconv_surplus', DOConv2d, lambda case: {'depth_multiplier': 2 * case.area + 3}, admits=has_area),
    Method('acconv', ACConv2d, admits=has_middle),
    Method('acconv_scale', ACConv2d, lambda case: {'branch_norm': 'scale'}, admits=has_middle),
    Method('acconv_plain', ACConv2d, lambda case: {'branch_norm': 'none'}, admits=has_middle),
    Method('refconv', RefConv2d),
    Method('refconv_map_1', RefConv2d, lambda case: {'map_kernel_size': 1}),
    Method('dbbconv', DBBConv2d, admits=has_middle_or_depthwise),
    Method('dbbconv_scale', DBBConv2d, lambda case: {'branch_norm': 'scale'}, admits=has_middle_or_depthwise),
    Method('orepaconv', OREPAConv2d, admits=has_middle),
    Method('dyconv', DynamicConv2d),
    Method('dyconv_2', DynamicConv2d, lambda case: {'num_kernels': 2, 'reduction': 1, 'temperature_steps': 8}),
)
STATIC_METHODS = tuple(method for method in METHODS if not method.dynamic)


@dataclasses.dataclass(frozen=True)
class TransposedCase:
    """One transposed convolution: the arguments of `nn.ConvTranspose2d` and an input size."""

    name: str
    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 0
    output_padding: int | tuple[int, int] = 0
    groups: int = 1
    bias: bool = False
    dilation: int | tuple[int, int] = 1
    in_channels: int = 4
    out_channels: int = 6
    size: tuple[int, int] = (5, 4)

    __str__ = Case.__str__
    sides = Case.sides
    area = Case.area
    input = Case.input

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `nn.ConvTranspose2d`."""
        arguments = dataclasses.asdict(self)
        del arguments['name'], arguments['size']
        return arguments

    def conv(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.ConvTranspose2d:
        """The stock transposed convolution with seeded parameters."""
        conv = nn.ConvTranspose2d(**self.arguments(), dtype=dtype)
        fill(conv, seed)
        return conv


TRANSPOSED_CASES = (
    TransposedCase('3x3', 3, padding=1),
    TransposedCase('4x4_stride_bias', 4, stride=2, padding=1, bias=True),
    TransposedCase('3x3_output_padding', 3, stride=2, padding=1, output_padding=1, bias=True),
    TransposedCase('3x5_output_padding_1_0', (3, 5), stride=(2, 1), padding=(0, 2), output_padding=(1, 0)),
    TransposedCase('1x1', 1, stride=2, bias=True),
    TransposedCase('2x2', 2, stride=2),
    TransposedCase('groups_2', 3, padding=1, groups=2, bias=True),
    TransposedCase('groups_2_dilation', (3, 2), stride=(1, 2), dilation=(2, 1), groups=2, out_channels=4),
    TransposedCase('depthwise', 3, stride=2, padding=1, output_padding=(0, 1), groups=4, out_channels=4),
    TransposedCase('depthwise_multiplier', (1, 3), groups=4, out_channels=8, bias=True),
)
TRANSPOSED_METHODS = (
    Method('doconv', DOConvTranspose2d, over_parameterises=has_area),
    Method('doconv_surplus', DOConvTranspose2d, lambda case: {'depth_multiplier': 2 * case.area + 3}, admits=has_area),
    Method('refconv', RefConvTranspose2d),
)


def products(methods: tuple[Method, ...], cases: tuple[Any, ...]) -> list[tuple[Method, Any]]:
    """Every layer with every convolution that it takes."""
    return [(method, case) for method in methods for case in cases if method.admits(case)]


def often(methods: tuple[Method, ...], cases: tuple[Any, ...]) -> list[Any]:
    """As `products`, as parameters of a test: all of them, most marked slow (see OFTEN_NAMES)."""
    parameters = []
    for method, case in products(methods, cases):
        names = OFTEN_NAMES if method.is_default else OFTEN_NAMES_WITH_OPTIONS
        kept = case.name in names or (method.is_default and case in FEW)
        parameters.append(pytest.param(method, case, marks=[] if kept else pytest.mark.slow))
    return parameters


def identifier(value: Any) -> str | None:
    """The pytest id of a parameter."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix('torch.')
    if isinstance(value, dict):
        return ','.join(f'{name}={option}' for name, option in value.items())
    return str(value) if isinstance(value, (Case, TransposedCase, Method)) else None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """Seeded standard normal numbers in float64, whatever dtype they are rounded to later."""
    return torch.randn(shape, generator=rng, dtype=torch.float64)


@torch.no_grad()
def fill(conv: nn.Module, seed: int) -> None:
    """Seeded numbers in the stock parameters of a convolution."""
    rng = generator(seed)
    for parameter in conv.parameters():
        parameter.copy_(normal(parameter.shape, rng) * 0.3)


@torch.no_grad()
def randomise(layer: nn.Module, rng: torch.Generator, keep: tuple[str, ...] = STOCK_NAMES) -> None:
    """Moves all that decides the function of a layer, beside its stock tensors, away from where it starts.

    Every parameter and every float buffer is visited by name, so a new kind of state cannot be left at its start
    unseen: integer state that is not known here is an error.
    """
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name in keep:
            continue
        if name.endswith('running_var'):
            tensor.copy_(0.5 + 1.5 * torch.rand(tensor.shape, generator=rng, dtype=torch.float64))
        elif tensor.is_floating_point():
            # Attention has to tell samples apart at a high temperature too.
            scale = 10.0 if '.fc2.' in name else 0.5
            tensor.copy_(scale * normal(tensor.shape, rng))
        elif name.endswith('temperature_position'):
            tensor.copy_(layer.get_buffer(name.removesuffix('position') + 'steps') // 2)
        else:
            known = ('temperature_steps', 'temperature_pending', 'num_batches_tracked')
            assert name.endswith(known), f'{name}: unknown state'


def randomised(method: Method, case: Any, dtype: torch.dtype = torch.float64, seed: int = 2) -> nn.Module:
    """A lifted layer with everything new in it randomised, in eval mode."""
    layer = method.lift(case.conv(dtype), case)
    randomise(layer, generator(seed))
    return layer.eval()


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the state dict that later changes do not reach."""
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_state(found: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Same keys in the same order, bit-equal values."""
    found_state = found.state_dict()
    assert list(found_state) == list(expected)
    for name, tensor in expected.items():
        assert found_state[name].dtype == tensor.dtype, name
        assert torch.equal(found_state[name], tensor), name


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max|found - expected| / max|expected|."""
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def in_float64(module: nn.Module) -> nn.Module:
    """The same function in float64: the parameters are exact, the arithmetic is not rounded to their dtype."""
    return copy.deepcopy(module).double()


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def assert_within(found: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """Elementwise |found - expected| <= bound; float64 arithmetic itself gets 1e-12 of the largest value."""
    assert found.shape == expected.shape
    excess = (found.double() - expected).abs() - bound - 1e-12 * expected.abs().max()
    assert excess.max() <= 0, f'outside the bound by {excess.max().item():.3g} of {expected.abs().max().item():.3g}'


@torch.no_grad()
def magnitude(conv: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """|weight| * |x| + |bias| in float64: what errors relative to each weight can add up to in the output of `conv`."""
    conv = in_float64(conv)
    conv.weight.copy_(weight.abs())
    if conv.bias is not None:
        conv.bias.zero_()
        if bias is not None:
            conv.bias.copy_(bias.abs())
    return conv(x.double().abs())


def summation_bound(conv: nn.Module, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """How far a convolution in x.dtype may lie from its float64 value, in any order of summation.

    float32 sums n terms with n roundings. bfloat16 is summed in float32 and rounded as it is stored: the products,
    with the bias, and once more where a kernel adds the bias to what is already stored.
    """
    terms = weight[0].numel() + 2
    relative = terms * unit_roundoff(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if x.dtype == torch.bfloat16:
        relative += 3 * unit_roundoff(torch.bfloat16)
    return relative * magnitude(conv, x, weight, bias)
