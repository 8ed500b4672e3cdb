"""OREPA: online convolutional re-parameterisation

Paper: `Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826
Official code: https://github.com/JUGGHM/OREPA_CVPR2022 (this is an implementation of our own, from the paper)

             +--------- k x k ------------------+
             +--------- 1 x 1 ------------------+
             +--- 1 x 1 --- mean ---------------+
        x ---+--- 1 x 1 --- cosines ------------+--- y      and all of it one kernel, in training, too
             +--- 1 x 1 --- k x k --------------+
             +--- k x k depthwise --- 1 x 1 ----+
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch.nn.modules.conv import _ConvNd

from ._base import Method, PaddingMode
from ._branched_conv import BranchedConv2d, check_odd
from ._branches import add_on_middle, convolve_branches, identity_kernel, per_output, pointwise_then

__all__ = ['OREPAConv2d']


_METHOD = Method(
    name='OREPA',
    summary=(
        'While it trains, the kernel is a sum of six: the stock one, a 1x1, two that spread a 1x1 by a mean and by '
        'cosines, a 1x1 before a second square one, and a depthwise-separable one. A learned factor for each output '
        'channel stands in for the norm of each, so that training takes one convolution.'
    ),
    title='Online Convolutional Re-parameterization',
    authors='Hu, Mu and Feng, Junyi and Hua, Jiashen and Lai, Baisheng and Huang, Jianqiang and Gong, Xiaojin and '
    'Hua, Xian-Sheng',
    venue='IEEE/CVF Conference on Computer Vision and Pattern Recognition',
    year='2022',
    arxiv='2204.00826',
)

# Kernels that the depthwise-separable branch has for each input channel.
_EXPANSION = 8
# With more groups than this, the 1x1 kernel before the square one gives two channels for each input channel.
_FEW_GROUPS = 4


class OREPAConv2d(BranchedConv2d):
    """Online re-parameterisation, ``y = (g_0 W + sum_k g_k B_k)*x``, g a learned factor for each output channel.

    W (out_channels, in_channels/groups, kh, kw) is the stock kernel. The B_k are

    - mean: a 1x1 kernel over the area of the window,
    - prior: a 1x1 kernel times cosines, one frequency and direction for each output channel,
    - point: a 1x1 kernel on the middle,
    - sequential: a square kernel after a 1x1 kernel E + Q, E the identity (twice above 4 groups),
    - separable: 8 depthwise kernels for each input channel, then a 1x1 kernel.

    A 1x1 convolution has one branch instead, product: two 1x1 kernels in a row, one of which starts at the identity.

    Paper: `Online Convolutional Re-parameterization` - https://arxiv.org/abs/2204.00826
    Official code: https://github.com/JUGGHM/OREPA_CVPR2022

    Differences from the official code: the norm that follows is the backbone's own. The lift starts with g_0 = 1 and
    all other factors 0; with init='scratch' they start as in the official code. The cosines have the size of the
    kernel, whatever it is (3x3 there), and the dtype of the layer (float32 there). The first convolution of a backbone
    stays plain.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``; kernel sides are odd.

    Raises:
        ReparamError: an even kernel side.
    """

    method = _METHOD
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        first_weight: torch.Tensor | None
        second_weight: torch.Tensor  # of 1x1 convolutions, like product_gamma; what follows is of the others
        product_gamma: torch.Tensor
        mean_weight: torch.Tensor
        prior_weight: torch.Tensor
        point_weight: torch.Tensor
        inner_weight: torch.Tensor
        outer_weight: torch.Tensor
        depthwise_weight: torch.Tensor
        pointwise_weight: torch.Tensor
        prior: torch.Tensor
        mean_gamma: torch.Tensor
        prior_gamma: torch.Tensor
        point_gamma: torch.Tensor
        sequential_gamma: torch.Tensor
        separable_gamma: torch.Tensor

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
    ) -> None:
        check_odd('OREPAConv2d', to_2tuple(kernel_size))
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype),
            norms=('scale',),
            branch_norm='scale',
        )
        factory = dict(device=device, dtype=dtype)
        sides, of_group = self.kernel_size, in_channels // groups
        self.weight_gamma = nn.Parameter(torch.empty(out_channels, **factory))
        if sides == (1, 1):
            middle = min(of_group, out_channels // groups)
            shapes = {
                'first': (middle * groups, of_group, 1, 1),
                'second': (out_channels, middle, 1, 1),
            }
            branches = ['product']
        else:
            inner = 2 * of_group if groups > _FEW_GROUPS else of_group
            shapes = {
                'mean': (out_channels, of_group, 1, 1),
                'prior': (out_channels, of_group, 1, 1),
                'point': (out_channels, of_group, 1, 1),
                'inner': (inner * groups, of_group, 1, 1),
                'outer': (out_channels, inner, *sides),
                'depthwise': (_EXPANSION * in_channels, 1, *sides),
                'pointwise': (out_channels, _EXPANSION * of_group, 1, 1),
            }
            branches = ['mean', 'prior', 'point', 'sequential', 'separable']
            self.register_buffer('prior', torch.empty(out_channels, *sides, **factory))
            self.register_parameter('first_weight', None)
        for name, shape in shapes.items():
            self.register_parameter(f'{name}_weight', nn.Parameter(torch.empty(shape, **factory)))
        self._add_norms(branches, device, dtype)
        self._complete = True
        self._reset_variant_parameters('scratch')

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        return not is_stem and (super().selects(conv, is_stem) or (conv.kernel_size == (1, 1) and conv.groups == 1))

    def _branch_weights(self) -> list[torch.Tensor]:
        if self.first_weight is not None:
            return [self.first_weight, self.second_weight]
        return [
            self.mean_weight,
            self.prior_weight,
            self.point_weight,
            self.inner_weight,
            self.outer_weight,
            self.depthwise_weight,
            self.pointwise_weight,
        ]

    def _compose(self) -> torch.Tensor:
        stock = self._stock_kernel()
        if self.first_weight is not None:
            second = per_output(self.product_gamma) * self.second_weight
            return stock + pointwise_then(self.first_weight, second, self.groups)
        # every factor goes to a 1x1 kernel where there is one, which takes few passes over whole kernels
        point = per_output(self.point_gamma) * self.point_weight
        outer = per_output(self.sequential_gamma) * self.outer_weight
        inner = self.inner_weight + identity_kernel(self.inner_weight)
        sequential = pointwise_then(inner, outer, self.groups)
        return add_on_middle(stock, [self._spread(), point, sequential, self._separable()])

    def _spread(self) -> torch.Tensor:
        """The kernels of mean and prior: for each output channel, two 1x1 kernels times two windows."""
        out_channels, of_group = self.weight.shape[:2]
        maps = [self.mean_gamma.view(-1, 1) * self.mean_weight.view(out_channels, of_group)]
        maps.append(self.prior_gamma.view(-1, 1) * self.prior_weight.view(out_channels, of_group))
        prior = self.prior.view(out_channels, 1, -1)
        windows = torch.cat([torch.full_like(prior, 1 / (self.kernel_size[0] * self.kernel_size[1])), prior], 1)
        return torch.bmm(torch.stack(maps, 2), windows).view(self.weight.shape)

    def _separable(self) -> torch.Tensor:
        """The kernel of a depthwise convolution and the 1x1 convolution that follows it."""
        groups, of_group = self.groups, self.in_channels // self.groups
        expansion = self.depthwise_weight.shape[0] // self.in_channels
        kernels = self.depthwise_weight.view(groups, of_group, expansion, -1)
        maps = per_output(self.separable_gamma) * self.pointwise_weight
        maps = maps.view(groups, self.out_channels // groups, of_group, expansion)
        return torch.einsum('goit,gits->gois', maps, kernels).reshape(self.weight.shape)

    def _stock_kernel(self) -> torch.Tensor:
        return per_output(self.weight_gamma) * self.weight

    def _gammas(self) -> list[torch.Tensor]:
        if self.first_weight is not None:
            return [self.product_gamma]
        return [self.mean_gamma, self.prior_gamma, self.point_gamma, self.sequential_gamma, self.separable_gamma]

    def _running_vars(self) -> list[torch.Tensor]:
        variances: list[torch.Tensor] = []
        return variances

    def _gamma_starts(self) -> list[float]:
        return [0.5] if self.first_weight is not None else [0.25, 0.0, 1.0, 0.5, 0.5]

    @torch.no_grad()
    def _init_variant_parameters(self, init: str) -> None:
        super()._init_variant_parameters(init)
        if init == 'scratch':
            self.weight_gamma.fill_(0.25 if self.first_weight is None else 1.0)

    @torch.no_grad()
    def _close_gates(self) -> None:
        super()._close_gates()
        self.weight_gamma.fill_(1.0)

    def _draw_branches(self, init: str) -> None:
        if self.first_weight is not None:
            super()._draw_branches(init)
            wide = self.out_channels > self.in_channels
            unit = self.first_weight if wide else self.second_weight
            unit.copy_(identity_kernel(unit))
            return
        if init == 'scratch':
            for weight in self._branch_weights():
                nn.init.kaiming_uniform_(weight)
        else:
            super()._draw_branches(init)
        self.inner_weight.zero_()
        self.prior.copy_(_cosines(self.out_channels, self.kernel_size))

    def _evaluate_branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        stride, dilation, groups = self.stride, self.dilation, self.groups
        if self.first_weight is not None:
            first = F.conv2d(x, self.first_weight, groups=groups)
            return [F.conv2d(first, self.second_weight, None, stride, groups=groups)]
        window = self.weight.new_full((self.out_channels, 1, *self.kernel_size), 1 / self.weight[0, 0].numel())
        spread = [(self.mean_weight, window), (self.prior_weight, self.prior[:, None])]
        mean, prior = (
            F.conv2d(F.conv2d(x, weight, groups=groups), over, None, stride, 0, dilation, self.out_channels)
            for weight, over in spread
        )
        (point,) = convolve_branches(x, [self.point_weight], self.kernel_size, stride, (0, 0), dilation, groups)
        copies = len(self.inner_weight) // self.in_channels
        of_groups = x.unflatten(-3, (groups, -1))
        inner = F.conv2d(x, self.inner_weight, groups=groups) + torch.cat([of_groups] * copies, -3).flatten(-4, -3)
        sequential = F.conv2d(inner, self.outer_weight, None, stride, 0, dilation, groups)
        depthwise = F.conv2d(x, self.depthwise_weight, None, stride, 0, dilation, self.in_channels)
        separable = F.conv2d(depthwise, self.pointwise_weight, groups=groups)
        return [mean, prior, point, sequential, separable]


def _cosines(channels: int, kernel_size: tuple[int, int]) -> torch.Tensor:
    """Cosines (channels, kh, kw) in float64: along the height in the first half of the channels, then along the width.

    The frequency grows with the channel, and starts again in the middle.
    """
    height, width = (math.pi * (torch.arange(side, dtype=torch.float64) + 0.5) / side for side in kernel_size)
    frequencies = torch.arange(1, channels + 1, dtype=torch.float64)[:, None, None]
    along_height = torch.cos(height[:, None] * frequencies).expand(-1, -1, len(width))
    along_width = torch.cos(width * (frequencies - channels / 2)).expand(-1, len(height), -1)
    return torch.where(frequencies <= (channels + 1) // 2, along_height, along_width)
