"""DBB's stand-alone block: four branches, each ended by a norm of its own

Paper: `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
Official code: https://github.com/DingXiaoH/DiverseBranchBlock (this is an implementation of our own, from the paper)
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple

from ._block import BranchBlock2d
from ._branched_conv import EPS, MOMENTUM, check_odd
from ._branches import (
    add_on_middle,
    convolve_branches,
    identity_kernel,
    per_channel,
    per_output,
    pointwise_then,
    response_to_constants,
)
from ._tensor import scale_shift

__all__ = ['DBBlock2d']


class DBBlock2d(BranchBlock2d):
    """The paper's stand-alone block, ``y = BN(W*x) + BN(P*x) + BN(S*pad(BN((E + Q)*x))) + BN(mean(pad(BN(M*x))))``.

    For networks that are composed by hand, and for checkpoints of the official code, whose module names it keeps. It
    fuses to one convolution with bias. The norms inside two branches pad the border with what they make of zero, which
    is what a convolution with bias sees there; in training that is told by their running statistics.

    Where each group has one output channel, P and M are left out, and a 1x1 kernel to twice the channels stands in for
    E + Q.

    Paper: `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
    Official code: https://github.com/DingXiaoH/DiverseBranchBlock

    Args:
        in_channels, out_channels, kernel_size, stride, padding, groups, device, dtype: As in ``nn.Conv2d``. Kernel
            sides are odd. The padding is that of the square convolution.
        inner_channels: Channels between the 1x1 and the square convolution of a branch; as many as there are input
            channels by default, or twice that with one output channel a group. With as many as there are input
            channels the 1x1 kernel is the identity plus a learned change.
        single_init: Start the scale of the last norm of the square branch at 1 and those of the others at 0.
        eps: Added to the variances.
        momentum: Weight of the newest batch in the running statistics.

    Raises:
        ReparamError: an even kernel side.
    """

    if TYPE_CHECKING:  # modules whose parts torch does not declare
        dbb_origin: Any
        dbb_1x1: Any
        dbb_avg: Any
        dbb_1x1_kxk: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        groups: int = 1,
        device=None,
        dtype=None,
        *,
        inner_channels: int | None = None,
        single_init: bool = False,
        eps: float = EPS,
        momentum: float = MOMENTUM,
    ) -> None:
        super().__init__()
        sides: tuple[int, int] = to_2tuple(kernel_size)
        margins: tuple[int, int] = to_2tuple(padding)
        check_odd('DBBlock2d', sides)
        factory = dict(device=device, dtype=dtype)
        norm = dict(eps=eps, momentum=momentum, **factory)
        options = dict(groups=groups, bias=False, **factory)
        mixes = groups < out_channels
        if inner_channels is None:
            inner_channels = in_channels if mixes else 2 * in_channels

        def conv_bn(size: tuple[int, int], padding: tuple[int, int]) -> nn.Sequential:
            conv = nn.Conv2d(in_channels, out_channels, size, stride, padding, **options)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels, **norm)))

        self.dbb_origin = conv_bn(sides, margins)
        mean: dict[str, nn.Module] = {}
        if mixes:
            mean['conv'] = nn.Conv2d(in_channels, out_channels, 1, **options)
            mean['bn'] = _NormAndPad(nn.BatchNorm2d(out_channels, **norm), margins)
        # torch's mean takes no padding beyond half of the window
        mean['avg'] = nn.AvgPool2d(sides, stride)
        mean['avgbn'] = nn.BatchNorm2d(out_channels, **norm)
        self.dbb_avg = nn.ModuleDict(mean)
        self.dbb_1x1 = conv_bn((1, 1), (0, 0)) if mixes else None
        sequential: dict[str, nn.Module] = {}
        if inner_channels == in_channels:
            sequential['idconv1'] = _IdentityConv(in_channels, groups, **factory)
        else:
            sequential['conv1'] = nn.Conv2d(in_channels, inner_channels, 1, **options)
        sequential['bn1'] = _NormAndPad(nn.BatchNorm2d(inner_channels, **norm), margins)
        sequential['conv2'] = nn.Conv2d(inner_channels, out_channels, sides, stride, **options)
        sequential['bn2'] = nn.BatchNorm2d(out_channels, **norm)
        self.dbb_1x1_kxk = nn.Sequential(OrderedDict(sequential))
        if single_init:
            last = [self.dbb_avg['avgbn'], self.dbb_1x1_kxk.bn2] + ([self.dbb_1x1.bn] if self.dbb_1x1 else [])
            for other in last:
                nn.init.zeros_(other.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Sum of the four branches of (batch, in_channels, height, width)."""
        x = input
        square = self.dbb_origin.conv
        y = self.dbb_origin(x)
        if self.dbb_1x1 is not None:
            size, stride, padding = square.kernel_size, square.stride, square.padding
            (point,) = convolve_branches(x, [self.dbb_1x1.conv.weight], size, stride, padding, (1, 1), square.groups)
            y = y + self.dbb_1x1.bn(point)
            averaged = self.dbb_avg['bn'](self.dbb_avg['conv'](x))
        else:
            averaged = F.pad(x, square._reversed_padding_repeated_twice)
        y = y + self.dbb_avg['avgbn'](self.dbb_avg['avg'](averaged))
        return y + self.dbb_1x1_kxk(x)

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        square = self.dbb_origin.conv
        groups, area = square.groups, square.weight[0, 0].numel()
        scale, bias = scale_shift(self.dbb_origin.bn)
        kernel = per_output(scale) * square.weight
        kernels = []

        scale, shift = scale_shift(self.dbb_avg['avgbn'])
        if self.dbb_1x1 is None:
            window = torch.ones_like(square.weight) / area
        else:
            inner_scale, inner_shift = scale_shift(self.dbb_avg['bn'].bn)
            mean = per_output(inner_scale) * self.dbb_avg['conv'].weight / area
            window, shift = mean.expand_as(square.weight), scale * inner_shift + shift
            point_scale, point_shift = scale_shift(self.dbb_1x1.bn)
            kernels.append(per_output(point_scale) * self.dbb_1x1.conv.weight)
            bias = bias + point_shift
        kernels.append(per_output(scale) * window)
        bias = bias + shift

        first, norm, second, last = self.dbb_1x1_kxk
        inner = first.kernel() if isinstance(first, _IdentityConv) else first.weight
        inner_scale, inner_shift = scale_shift(norm.bn)
        scale, shift = scale_shift(last)
        kernels.append(per_output(scale) * pointwise_then(per_output(inner_scale) * inner, second.weight, groups))
        constant = response_to_constants(second.weight, inner_shift, groups)
        return add_on_middle(kernel, kernels), bias + scale * constant + shift


class _IdentityConv(nn.Conv2d):
    """1x1 convolution with the kernel E + Q, E the identity and Q its `weight`, which starts at zero."""

    def __init__(self, channels: int, groups: int, device=None, dtype=None) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def kernel(self) -> torch.Tensor:
        """E + Q, (channels, channels/groups, 1, 1)."""
        return self.weight + identity_kernel(self.weight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.conv2d(input, self.kernel(), None, groups=self.groups)


class _NormAndPad(nn.Module):
    """A norm, and a border of what it makes of zero with its running statistics."""

    if TYPE_CHECKING:
        bn: Any

    def __init__(self, bn: nn.BatchNorm2d, padding: tuple[int, int]) -> None:
        super().__init__()
        self.bn = bn
        self.padding = padding

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y = self.bn(input)
        rows, columns = self.padding
        margins = [columns, columns, rows, rows]
        border = 1 - F.pad(torch.ones_like(y[:1, :1]), margins)
        norm = self.bn
        inverse = torch.rsqrt(norm.running_var + norm.eps)
        shift = norm.bias.detach() - norm.running_mean * norm.weight.detach() * inverse
        return F.pad(y, margins) + border * per_channel(shift.to(y.dtype))
