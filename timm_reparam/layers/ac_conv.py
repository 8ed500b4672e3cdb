"""ACNet: asymmetric convolution

Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
https://arxiv.org/abs/1908.03930
Official code: https://github.com/DingXiaoH/ACNet (this is an implementation of our own, from the paper)

    square kernel        vertical        horizontal         what they stand for
      w  w  w            .  v  .          .  .  .            w    w+v    w
      w  w  w     +      .  v  .    +     h  h  h      =    w+h  w+v+h  w+h
      w  w  w            .  v  .          .  .  .            w    w+v    w
"""

from typing import TYPE_CHECKING

import torch
import torch.nn as nn
from timm.layers import to_2tuple

from ._base import Method, PaddingMode
from ._branched_conv import EPS, MOMENTUM, BranchedConv2d, check_odd
from ._branches import convolve_branches

__all__ = ['ACConv2d']


_METHOD = Method(
    name='ACNet',
    summary=(
        'While it trains, a vertical and a horizontal one-dimensional kernel run beside the square one and '
        'strengthen its middle column and row; their sum is again one kernel.'
    ),
    title='ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks',
    authors='Ding, Xiaohan and Guo, Yuchen and Ding, Guiguang and Han, Jungong',
    venue='IEEE/CVF International Conference on Computer Vision',
    year='2019',
    arxiv='1908.03930',
)


class ACConv2d(BranchedConv2d):
    """Asymmetric convolution, ``y = W*x + s_v (W_v*x) + s_h (W_h*x)`` with ``s = gamma / sqrt(var + eps)`` per channel.

    W (out_channels, in_channels/groups, kh, kw) is the stock kernel, W_v (.., kh, 1) and W_h (.., 1, kw) strengthen its
    middle column and row; var is the variance of that branch's output, see :class:`BranchedConv2d`.

    Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930
    Official code: https://github.com/DingXiaoH/ACNet

    Differences from the official code: this is the paper's block as seen through the BatchNorm that follows it in the
    backbones. That norm removes every constant and rescales the sum, so the branches need no mean and shift, and the
    square branch no norm; what stays is local to the convolution, starts exactly at the stock kernel (gamma = 0), and
    fuses to a kernel without bias that is right in training mode, too. For the block with its three norms see
    :class:`ACBlock2d`. Dilation works.

    With ``branch_norm='scale'`` it is ``s = gamma``, and with 'none' ``y = scale * (W + W_v + W_h)*x``: one convolution
    in training as well.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``; kernel sides are odd.
        branch_norm: 'batch' scales each branch by gamma over its standard deviation, 'scale' by gamma, 'none' adds the
            kernels as they are.
        gamma_init: Start of gamma with init='scratch' (default 1); not with 'none'.
        scale: Factor on the sum of the kernels; 'none' only.
        eps: Added to the variance; 'batch' only.
        momentum: Weight of the newest batch in the running variance; 'batch' only.
        recompute: Whether the branches' outputs are computed again in the backward pass instead of kept, which costs
            their two convolutions and saves two tensors of the output's size; 'batch' only.

    Raises:
        ReparamError: an even kernel side, an unknown branch_norm, or an option that belongs to another branch_norm.
    """

    method = _METHOD
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        vertical_gamma: torch.Tensor | None
        horizontal_gamma: torch.Tensor  # None with vertical_gamma
        vertical_running_var: torch.Tensor | None
        horizontal_running_var: torch.Tensor

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
        scale: float = 1.0,
        eps: float = EPS,
        momentum: float = MOMENTUM,
        recompute: bool = False,
    ) -> None:
        check_odd('ACConv2d', to_2tuple(kernel_size))
        super().__init__(
            *(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode),
            *(device, dtype),
            norms=('batch', 'scale', 'none'),
            branch_norm=branch_norm,
            gamma_init=gamma_init,
            scale=scale,
            eps=eps,
            momentum=momentum,
            recompute=recompute,
        )
        shape = self.weight.shape
        self.vertical_weight = nn.Parameter(torch.empty(*shape[:3], 1, device=device, dtype=dtype))
        self.horizontal_weight = nn.Parameter(torch.empty(*shape[:2], 1, shape[3], device=device, dtype=dtype))
        self._add_norms(['vertical', 'horizontal'], device, dtype)
        self._complete = True
        self._reset_variant_parameters('scratch')

    def _branch_weights(self) -> list[torch.Tensor]:
        return [self.vertical_weight, self.horizontal_weight]

    def _gammas(self) -> list[torch.Tensor]:
        if self.vertical_gamma is None:
            gammas: list[torch.Tensor] = []
            return gammas
        return [self.vertical_gamma, self.horizontal_gamma]

    def _running_vars(self) -> list[torch.Tensor]:
        if self.vertical_running_var is None:
            variances: list[torch.Tensor] = []
            return variances
        return [self.vertical_running_var, self.horizontal_running_var]

    def _evaluate_branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        weights, size = self._branch_weights(), self.kernel_size
        return convolve_branches(x, weights, size, self.stride, (0, 0), self.dilation, self.groups)
