"""DO-Conv: depthwise over-parameterised convolution

Paper: `DO-Conv: Depthwise Over-parameterized Convolutional Layer` - https://arxiv.org/abs/2006.12030
Official code: https://github.com/yangyanli/DO-Conv (this is an implementation of our own, from the paper)
"""

import math
from collections.abc import Callable
from numbers import Integral
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.conv import _ConvNd

from ..errors import ReparamError
from ._base import Method, PaddingMode, ReparamConv2d, ReparamConvTranspose2d, ReparamLayer

__all__ = ['DOConv2d', 'DOConvTranspose2d']


_METHOD = Method(
    name='DO-Conv',
    summary=(
        'While it trains, every kernel larger than 1x1 is the product of a kernel and a depthwise transform '
        'that starts as the identity; the product is again one kernel of the same size.'
    ),
    title='DO-Conv: Depthwise Over-parameterized Convolutional Layer',
    authors=(
        'Cao, Jinming and Li, Yangyan and Sun, Mingchao and Chen, Ying and Lischinski, Dani and Cohen-Or, '
        'Daniel and Chen, Baoquan and Tu, Changhe'
    ),
    venue='IEEE Transactions on Image Processing',
    year='2022',
    arxiv='2006.12030',
)


class _DepthwiseOverParameterised(ReparamLayer):
    """What the convolution and the transposed convolution share: the parameters, their start, the kernel."""

    method = _METHOD
    if TYPE_CHECKING:  # not for TorchScript, which then would not know which weights are None
        depth_multiplier: int
        depthwise_weight: torch.Tensor | None
        surplus_weight: torch.Tensor | None

    def _add_depthwise(self, depth_multiplier: int | None, device=None, dtype=None) -> None:
        area = self._area
        if depth_multiplier is None:
            depth_multiplier = area
        if not isinstance(depth_multiplier, Integral) or depth_multiplier < area:
            raise ReparamError(
                f'{type(self).__name__}: depth_multiplier must be an integer of at least {area}, the area of the '
                f'{self.kernel_size[0]}x{self.kernel_size[1]} kernel, got {depth_multiplier!r}; leave it at None, or '
                'leave the layer out with skip='
            )
        if area == 1 and depth_multiplier != 1:
            raise ReparamError(
                f'{type(self).__name__}: a 1x1 kernel has nothing to over-parameterise, got depth_multiplier='
                f'{depth_multiplier}; leave it at None'
            )
        depth_multiplier = self.depth_multiplier = int(depth_multiplier)
        self.register_parameter('depthwise_weight', None)
        self.register_parameter('surplus_weight', None)
        if area > 1:
            shape = (self.in_channels, area, depth_multiplier)
            self.depthwise_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if depth_multiplier > area:
            shape = (*self.weight.shape[:2], depth_multiplier - area)
            self.surplus_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self._complete = True

    @torch.no_grad()
    def _init_variant_parameters(self, init: str) -> None:
        # Both starts are the same: with D = 0 the layer is the plain convolution, and that is the paper's start, too.
        if self.surplus_weight is not None:
            # The columns that no whole identity block covers reach the kernel through D alone: D = W = 0 never moves.
            leftover = self.surplus_weight[..., self.surplus_weight.shape[-1] // self._area * self._area :]
            bound = 1 / math.sqrt(self.weight.shape[1] * self._area)
            leftover.uniform_(-bound, bound)
        self._close_gates()

    @torch.no_grad()
    def _close_gates(self) -> None:
        if self.depthwise_weight is not None:
            self.depthwise_weight.zero_()
        if self.surplus_weight is not None:
            self.surplus_weight[..., : self.surplus_weight.shape[-1] // self._area * self._area].zero_()

    @property
    def _area(self) -> int:
        return self.kernel_size[0] * self.kernel_size[1]

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        return max(conv.kernel_size) > 1

    def _compose(self) -> torch.Tensor:
        weight = self.weight
        depthwise = self.depthwise_weight
        if depthwise is None:
            return weight
        area = weight.shape[2] * weight.shape[3]
        columns = weight.flatten(2).contiguous()  # where the model is in channels_last, it is not
        kernel = columns
        if self.surplus_weight is not None:
            surplus = self.surplus_weight
            for block in range(surplus.shape[2] // area):
                kernel = kernel + surplus[:, :, block * area : (block + 1) * area]
            columns = torch.cat([columns, surplus], dim=2)
        return self._add_transformed(kernel, depthwise, columns).reshape(weight.shape)

    def _add_transformed(self, kernel: torch.Tensor, depthwise: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`kernel` plus D applied to the columns of every kernel, both in the layout of `weight`."""
        raise NotImplementedError

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E + D (in_channels, kh*kw, depth_multiplier), and all columns of W in the layout of `weight`."""
        assert self.depthwise_weight is not None
        area, num_columns = self._area, self.depth_multiplier
        identity = torch.eye(area, dtype=self.weight.dtype, device=self.weight.device)
        identity = F.pad(identity.repeat(1, num_columns // area), (0, num_columns % area))
        columns = self.weight.flatten(2)
        if self.surplus_weight is not None:
            columns = torch.cat([columns, self.surplus_weight], 2)
        return self.depthwise_weight + identity, columns

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, depth_multiplier={self.depth_multiplier}'


def _channels_of_a_block(channels: int) -> int:
    # A matrix product for each input channel has kh*kw columns, too few to be fast. Two channels that share one waste
    # half of it, and take half the time.
    return 2 if channels % 2 == 0 else 1


def _block_diagonal(depthwise: torch.Tensor, b: int) -> torch.Tensor:
    """D (in_channels, m, s) as (in_channels / b, b * m, b * s)."""
    area, num_columns = depthwise.shape[1], depthwise.shape[2]
    eye = torch.eye(b, dtype=depthwise.dtype, device=depthwise.device).view(b, 1, b, 1)
    return (depthwise.view(-1, b, area, 1, num_columns) * eye).reshape(-1, b * area, b * num_columns)


class DOConv2d(_DepthwiseOverParameterised, ReparamConv2d):
    """Depthwise over-parameterised convolution, ``K[o, i, m] = sum_s (E[m, s] + D[i, m, s]) W[o, i, s]``.

    A depthwise kernel D (in_channels, kh*kw, depth_multiplier) transforms the kernel W (out_channels,
    in_channels/groups, depth_multiplier) of every input channel i; E is the identity, repeated. D starts at zero, so
    the layer starts as the plain convolution and weight decay pulls it back there. Composed in kernel space, its cost
    does not grow with the feature map.

    Paper: `DO-Conv: Depthwise Over-parameterized Convolutional Layer` - https://arxiv.org/abs/2006.12030
    Official code: https://github.com/yangyanli/DO-Conv

    Differences from the official code: `weight` is the first identity block, with the plain convolution's name and
    shape, and the identity is not stored. With groups, each *real* input channel has its own D, as the paper has it;
    the official code's reshape pairs D with the wrong channels there. A 1x1 kernel gets no D, as in the official code.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``.
        depth_multiplier: Columns of D, at least kh*kw (the default).

    Raises:
        ReparamError: depth_multiplier is smaller than the kernel's area.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = 'zeros',
        device=None,
        dtype=None,
        *,
        depth_multiplier: int | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._add_depthwise(depth_multiplier, device, dtype)
        self._reset_variant_parameters('scratch')

    def branch_form(self) -> Callable[..., torch.Tensor]:
        # the paper's composition of features: D is applied to the window of each position, then W to what comes out
        if self.depthwise_weight is None:
            return lambda x: self._convolve(x, self.weight, self.bias)
        transform, columns = self._factors()
        pointwise = columns.flatten(1)[:, :, None, None]

        def function(x: torch.Tensor) -> torch.Tensor:
            x = self._pad(x)
            sides = zip(x.shape[2:], self.kernel_size, self.dilation, self.stride)
            size = [(side - dilation * (kernel - 1) - 1) // stride + 1 for side, kernel, dilation, stride in sides]
            windows = F.unfold(x, self.kernel_size, self.dilation, 0, self.stride).unflatten(1, (self.in_channels, -1))
            features = torch.einsum('ims,biml->bisl', transform, windows).flatten(1, 2).unflatten(2, size)
            return F.conv2d(features, pointwise, self.bias, groups=self.groups)

        return function

    def _add_transformed(self, kernel: torch.Tensor, depthwise: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        group_channels = self.in_channels // self.groups  # a number, where a shape is not one while a trace runs
        area, num_columns, b = kernel.shape[2], columns.shape[2], _channels_of_a_block(group_channels)
        blocks = _block_diagonal(depthwise, b).view(self.groups, -1, b * area, b * num_columns)
        columns = columns.view(self.groups, -1, group_channels // b, b * num_columns)
        kernel = kernel.view(self.groups, -1, group_channels // b, b * area)
        return kernel + torch.matmul(columns.transpose(1, 2), blocks.transpose(2, 3)).transpose(1, 2)


class DOConvTranspose2d(_DepthwiseOverParameterised, ReparamConvTranspose2d):
    """Depthwise over-parameterised transposed convolution, ``K[i, o, m] = sum_s (E[m, s] + D[i, m, s]) W[i, o, s]``.

    :class:`DOConv2d` in the kernel space of ``nn.ConvTranspose2d``, whose weight (in_channels, out_channels/groups, kh,
    kw) leads with the input channel.

    Args:
        in_channels, ..., dtype: As in ``nn.ConvTranspose2d``.
        depth_multiplier: Columns of D, at least kh*kw (the default).

    Raises:
        ReparamError: depth_multiplier is smaller than the kernel's area.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: PaddingMode = 'zeros',
        device=None,
        dtype=None,
        *,
        depth_multiplier: int | None = None,
    ) -> None:
        geometry = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        self._add_depthwise(depth_multiplier, device, dtype)
        self._reset_variant_parameters('scratch')

    def branch_form(self) -> Callable[..., torch.Tensor]:
        # as for the convolution; each input channel spreads into as many maps as D has columns
        if self.depthwise_weight is None:
            return lambda x, output_size=None: self._convolve(x, self.weight, self.bias, output_size)
        transform, columns = self._factors()
        depthwise = transform.transpose(1, 2).unflatten(2, self.kernel_size)
        # (in_channels, out_channels/groups, s) as the (out_channels, in_channels/groups * s) of a convolution
        columns = columns.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        pointwise = columns[:, :, None, None]

        def function(x: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
            features = self._convolve(x, depthwise, None, output_size, groups=self.in_channels)
            return F.conv2d(features, pointwise, self.bias, groups=self.groups)

        return function

    def _add_transformed(self, kernel: torch.Tensor, depthwise: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return kernel + torch.einsum('ios,ims->iom', columns, depthwise)
