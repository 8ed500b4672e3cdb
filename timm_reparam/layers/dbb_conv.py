"""DBB: diverse branch block

Paper: `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
Official code: https://github.com/DingXiaoH/DiverseBranchBlock (this is an implementation of our own, from the paper)

             +--------- k x k ---------+
             +--------- 1 x 1 ---------+
        x ---+                         + --- y
             +--- 1 x 1 --- k x k -----+
             +--- 1 x 1 --- mean ------+
"""

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch.nn.modules.conv import _ConvNd

from ._base import Method, PaddingMode
from ._branched_conv import EPS, MOMENTUM, BranchedConv2d, check_odd
from ._branches import convolve_branches, identity_kernel, pointwise_then

__all__ = ['DBBConv2d']


_METHOD = Method(
    name='DBB',
    summary=(
        'While it trains, a 1x1 convolution, a 1x1 convolution before a second square one, and a 1x1 convolution '
        'before a mean run beside the square one; the sum of the four is again one kernel.'
    ),
    title='Diverse Branch Block: Building a Convolution as an Inception-like Unit',
    authors='Ding, Xiaohan and Zhang, Xiangyu and Han, Jungong and Ding, Guiguang',
    venue='IEEE/CVF Conference on Computer Vision and Pattern Recognition',
    year='2021',
    arxiv='2103.13425',
)


class DBBConv2d(BranchedConv2d):
    """Diverse branches, ``y = W*x + s_p (P*x) + s_s (S*(E + Q)*x) + s_m (A*M*x)``, s a factor per output channel.

    W (out_channels, in_channels/groups, kh, kw) is the stock kernel, P and M (.., 1, 1) are 1x1 kernels, Q
    (in_channels, in_channels/groups, 1, 1) is the change of a 1x1 kernel from the identity E, S has the shape of W, and
    A is the mean over the window. What s is says :class:`BranchedConv2d`.

    A depthwise convolution (one input and one output channel in each group) has no channels to mix: no P, no M, and S
    sees each channel through two factors in place of E + Q.

    Paper: `Diverse Branch Block: Building a Convolution as an Inception-like Unit` - https://arxiv.org/abs/2103.13425
    Official code: https://github.com/DingXiaoH/DiverseBranchBlock

    Differences from the official code: this is the paper's block as seen through the BatchNorm that follows it in the
    backbones. That norm removes every constant and rescales the sum, so the branches need no mean and shift, and the
    square branch no norm. There is no norm between the two convolutions of a branch either: it would be a factor on
    the rows of E + Q and M, and a constant. What stays is local to the convolution, starts exactly at the stock kernel
    (gamma = 0), and fuses to a kernel without bias. For the block with its norms see :class:`DBBlock2d`.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``; kernel sides are odd unless the convolution is depthwise.
        branch_norm: 'batch' (the paper's) scales each branch by gamma over its standard deviation, 'scale' by gamma.
        gamma_init: Start of gamma with init='scratch' (default 1).
        eps: Added to the variance; 'batch' only.
        momentum: Weight of the newest batch in the running variance; 'batch' only.
        recompute: Whether the branches' outputs are computed again in the backward pass instead of kept, which costs
            their convolutions and saves three tensors of the output's size; 'batch' only.

    Raises:
        ReparamError: an even kernel side, an unknown branch_norm, or an option that belongs to the other branch_norm.
    """

    method = _METHOD
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        inner_weight: torch.Tensor
        outer_weight: torch.Tensor
        point_weight: torch.Tensor | None
        mean_weight: torch.Tensor  # None with point_weight, and so is point_gamma
        point_gamma: torch.Tensor
        sequential_gamma: torch.Tensor
        mean_gamma: torch.Tensor
        point_running_var: torch.Tensor | None
        sequential_running_var: torch.Tensor | None
        mean_running_var: torch.Tensor

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
        branch_norm: str = 'batch',
        gamma_init: float | None = None,
        eps: float = EPS,
        momentum: float = MOMENTUM,
        recompute: bool = False,
    ) -> None:
        depthwise = groups == in_channels == out_channels
        if not depthwise:
            check_odd('DBBConv2d', to_2tuple(kernel_size))
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype),
            norms=('batch', 'scale'),
            branch_norm=branch_norm,
            gamma_init=gamma_init,
            eps=eps,
            momentum=momentum,
            recompute=recompute,
        )
        of_group, inner_channels = in_channels // groups, 2 * in_channels if depthwise else in_channels
        mixing = None if depthwise else (out_channels, of_group, 1, 1)
        shapes: dict[str, tuple[int, ...] | None] = {
            'point': mixing,
            'inner': (inner_channels, of_group, 1, 1),
            'outer': (out_channels, inner_channels // groups, *self.kernel_size),
            'mean': mixing,
        }
        for name, shape in shapes.items():
            weight = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(f'{name}_weight', weight)
        self._add_norms(['sequential', 'mean'] if depthwise else ['point', 'sequential', 'mean'], device, dtype)
        if depthwise:
            self.register_parameter('point_gamma', None)
            self.register_buffer('point_running_var', None)
        self._complete = True
        self._reset_variant_parameters('scratch')

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        # the stem stays plain in the official networks
        return super().selects(conv, is_stem) and not is_stem

    def _branch_weights(self) -> list[torch.Tensor]:
        if self.point_weight is None:
            return [self.inner_weight, self.outer_weight]
        return [self.inner_weight, self.outer_weight, self.point_weight, self.mean_weight]

    def _branch_kernels(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        height, width = self.kernel_size
        if self.point_weight is None:
            sequential = pointwise_then(weights[0], weights[1], self.groups)
            return [sequential, torch.full_like(sequential, 1 / (height * width))]
        inner = weights[0] + identity_kernel(weights[0])
        mean = (weights[3] / (height * width)).expand(-1, -1, height, width)
        return [weights[2], pointwise_then(inner, weights[1], self.groups), mean]

    def _convolve_branches(
        self, x: torch.Tensor, weights: list[torch.Tensor], padding: tuple[int, int]
    ) -> list[torch.Tensor]:
        """The outputs of the branches; the square kernel follows the 1x1 kernel, or is composed with it."""
        size, stride, dilation, groups = self.kernel_size, self.stride, self.dilation, self.groups
        # several times as fast as torch's mean on the CPU, forward and backward
        window = torch.full(
            (self.in_channels, 1, size[0], size[1]), 1 / (size[0] * size[1]), dtype=x.dtype, device=x.device
        )
        mean = F.conv2d(x, window, None, stride, padding, dilation, self.in_channels)
        inner, outer = weights[0], weights[1]
        if self.point_weight is not None:
            inner = inner + identity_kernel(inner)
        positions = x.numel() // max(x.shape[-3], 1)
        if positions * inner.numel() < outer.numel() * inner.shape[1]:  # fewer multiply-adds
            sequential = F.conv2d(F.conv2d(x, inner, groups=groups), outer, None, stride, padding, dilation, groups)
        else:
            sequential = F.conv2d(x, pointwise_then(inner, outer, groups), None, stride, padding, dilation, groups)
        if self.point_weight is None:
            return [sequential, mean]
        mean = F.conv2d(mean, weights[3], groups=groups)
        return convolve_branches(x, [weights[2]], size, stride, padding, dilation, groups) + [sequential, mean]

    def _gammas(self) -> list[torch.Tensor]:
        if self.point_weight is None:
            return [self.sequential_gamma, self.mean_gamma]
        return [self.point_gamma, self.sequential_gamma, self.mean_gamma]

    def _running_vars(self) -> list[torch.Tensor]:
        if self.sequential_running_var is None:
            variances: list[torch.Tensor] = []
            return variances
        if self.point_running_var is None:
            return [self.sequential_running_var, self.mean_running_var]
        return [self.point_running_var, self.sequential_running_var, self.mean_running_var]

    def _draw_branches(self, init: str) -> None:
        super()._draw_branches(init)
        if self.point_weight is not None:
            self.inner_weight.zero_()

    def _evaluate_branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        geometry = (self.stride, (0, 0), self.dilation)
        inner = F.conv2d(x, self.inner_weight, groups=self.groups)
        averaged = x
        if self.point_weight is not None:
            inner = inner + x
            averaged = F.conv2d(x, self.mean_weight, groups=self.groups)
        window = self.weight.new_full((self.out_channels, 1, *self.kernel_size), 1 / self.weight[0, 0].numel())
        sequential = F.conv2d(inner, self.outer_weight, None, *geometry, self.groups)
        mean = F.conv2d(averaged, window, None, *geometry, self.out_channels)
        if self.point_weight is None:
            return [sequential, mean]
        return [*convolve_branches(x, [self.point_weight], self.kernel_size, *geometry, self.groups), sequential, mean]
