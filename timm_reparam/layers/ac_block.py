"""ACNet's stand-alone block: three convolutions, each with a norm of its own

Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
https://arxiv.org/abs/1908.03930
Official code: https://github.com/DingXiaoH/ACNet (this is an implementation of our own, from the paper)
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple

from ..errors import ReparamError
from ._base import PaddingMode
from ._block import BranchBlock2d
from ._branched_conv import EPS, MOMENTUM, check_odd
from ._branches import add_on_middle, convolve_branches, per_output
from ._tensor import scale_shift

__all__ = ['ACBlock2d']


class ACBlock2d(BranchBlock2d):
    """The paper's stand-alone block, ``y = BN_s(W*x) + BN_v(W_v*x) + BN_h(W_h*x)``.

    For networks that are composed by hand, and for checkpoints of the official code, whose module names it keeps. It
    fuses to one convolution with bias.

    Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930
    Official code: https://github.com/DingXiaoH/ACNet

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``, without `bias`. Kernel sides are odd. The padding is that of the
            square convolution; the thin ones are aligned with it.
        affine: Whether the three norms have a learned scale and shift.
        gamma_init: Start of the scale of all three norms (default 1).
        reduce_gamma: Start the scale of all three norms at 1/3.
        single_init: Start the scale of the square norm at 1 and those of the others at 0.
        last_norm: Whether a BatchNorm follows the sum.
        eps: Added to the variances.
        momentum: Weight of the newest batch in the running statistics.

    Raises:
        ReparamError: an even kernel side, or more than one start of the scales, or one without affine norms.
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
        padding_mode: PaddingMode = 'zeros',
        device=None,
        dtype=None,
        *,
        affine: bool = True,
        gamma_init: float | None = None,
        reduce_gamma: bool = False,
        single_init: bool = False,
        last_norm: bool = False,
        eps: float = EPS,
        momentum: float = MOMENTUM,
    ) -> None:
        super().__init__()
        sides: tuple[int, int] = to_2tuple(kernel_size)
        check_odd('ACBlock2d', sides)
        starts = [
            name
            for name, given in (
                ('gamma_init', gamma_init is not None),
                ('reduce_gamma', reduce_gamma),
                ('single_init', single_init),
            )
            if given
        ]
        if len(starts) > 1 or (starts and not affine):
            raise ReparamError(
                'ACBlock2d: give at most one of gamma_init, reduce_gamma and single_init, and with affine=True only; '
                f'got {", ".join(starts)} with affine={affine}'
            )
        factory = dict(device=device, dtype=dtype)
        options = dict(stride=stride, dilation=dilation, groups=groups, bias=False, **factory)
        norm = dict(eps=eps, momentum=momentum, **factory)
        self.square_conv = nn.Conv2d(
            in_channels, out_channels, sides, padding=padding, padding_mode=padding_mode, **options
        )
        self.square_bn = nn.BatchNorm2d(out_channels, affine=affine, **norm)
        self.ver_conv = nn.Conv2d(in_channels, out_channels, (sides[0], 1), **options)
        self.ver_bn = nn.BatchNorm2d(out_channels, affine=affine, **norm)
        self.hor_conv = nn.Conv2d(in_channels, out_channels, (1, sides[1]), **options)
        self.hor_bn = nn.BatchNorm2d(out_channels, affine=affine, **norm)
        self.last_bn = nn.BatchNorm2d(out_channels, **norm) if last_norm else None
        if reduce_gamma:
            gamma_init = 1 / 3
        square_start, thin_start = (1.0, 0.0) if single_init else (gamma_init, gamma_init)
        if square_start is not None and thin_start is not None:
            nn.init.constant_(self.square_bn.weight, square_start)
            for thin_norm in (self.ver_bn, self.hor_bn):
                nn.init.constant_(thin_norm.weight, thin_start)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Sum of the three normalised branches of (batch, in_channels, height, width)."""
        conv = self.square_conv
        x = input
        y = self.square_bn(conv(x))
        # left and right, top and bottom are equal: sides are odd
        padding = (conv._reversed_padding_repeated_twice[2], conv._reversed_padding_repeated_twice[0])
        if conv.padding_mode != 'zeros':
            x = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            padding = (0, 0)
        weights: list[torch.Tensor] = [self.ver_conv.weight, self.hor_conv.weight]
        sides, stride, dilation = conv.kernel_size, conv.stride, conv.dilation
        # torch declares tuples of any length
        vertical, horizontal = convolve_branches(x, weights, sides, stride, padding, dilation, conv.groups)  # type: ignore[arg-type]
        y = y + self.ver_bn(vertical) + self.hor_bn(horizontal)
        if self.last_bn is not None:
            y = self.last_bn(y)
        return y

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        kernels, biases = [], []
        branches = (
            (self.square_conv, self.square_bn),
            (self.ver_conv, self.ver_bn),
            (self.hor_conv, self.hor_bn),
        )
        for conv, norm in branches:
            scale, shift = scale_shift(norm)
            kernels.append(per_output(scale) * conv.weight)
            biases.append(shift)
        kernel = add_on_middle(kernels[0], kernels[1:])
        bias = sum(biases[1:], biases[0])
        if self.last_bn is not None:
            scale, shift = scale_shift(self.last_bn)
            kernel, bias = per_output(scale) * kernel, scale * bias + shift
        return kernel, bias
