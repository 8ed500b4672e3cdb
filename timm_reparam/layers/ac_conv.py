"""ACNet: asymmetric convolution

Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
https://arxiv.org/abs/1908.03930
Official code: https://github.com/DingXiaoH/ACNet (this is an implementation of our own, from the paper)

    square kernel        vertical        horizontal         what they stand for
      w  w  w            .  v  .          .  .  .            w    w+v    w
      w  w  w     +      .  v  .    +     h  h  h      =    w+h  w+v+h  w+h
      w  w  w            .  v  .          .  .  .            w    w+v    w
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from .._defaults import DEFAULTS_OF_0_1_0
from ..errors import ReparamError
from ._base import Method, PaddingMode, ReparamConv2d
from ._branch_norm import BranchNorm, BranchStatistics
from ._branches import (
    add_on_middle,
    add_scaled,
    add_scaled_synchronised,
    convolve_branches,
    per_channel,
    shares_of_newest,
)
from ._tensor import (
    fast_uniform_,
    is_transforming,
)

__all__ = ['ACConv2d', 'EPS', 'MOMENTUM', 'check_odd', 'insets_of']


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


# As in torch's BatchNorm.
EPS = 1e-5
MOMENTUM = 0.1


def check_odd(owner: str, kernel_size: tuple[int, int]) -> None:
    if any(side % 2 == 0 for side in kernel_size):
        raise ReparamError(f'{owner} needs odd kernel sides, got {tuple(kernel_size)}; leave it out with skip=')


def insets_of(kernel_size: tuple[int, int]) -> list[tuple[int, int]]:
    """The rows and columns of the square kernel on each side of the vertical and of the horizontal one."""
    return [(0, kernel_size[1] // 2), (kernel_size[0] // 2, 0)]


class ACConv2d(ReparamConv2d):
    """Asymmetric convolution, ``y = W*x + s_v (W_v*x) + s_h (W_h*x)`` with ``s = gamma / sqrt(var + eps)`` per channel.

    W (out_channels, in_channels/groups, kh, kw) is the stock kernel, W_v (.., kh, 1) and W_h (.., 1, kw) strengthen its
    middle column and row; var is the variance of that branch's output over batch and space: the batch's in training
    (taken in float32 under autocast), the running one in evaluation, where the layer is a single convolution. With
    several processes each uses the variance of its own batch, as BatchNorm does, or that of all of them where the
    model was converted to SyncBatchNorm. Whether the variances are the batch's or the running ones follows the modules
    ``vertical_norm`` and ``horizontal_norm``, which tools that look for BatchNorms find.

    Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930
    Official code: https://github.com/DingXiaoH/ACNet

    Differences from the official code: this is the paper's block as seen through the BatchNorm that follows it in the
    backbones. That norm removes every constant and rescales the sum, so the branches need no mean and shift, and the
    square branch no norm; what stays is local to the convolution, starts exactly at the stock kernel (gamma = 0), and
    fuses to a kernel without bias that is right in training mode, too. For the block with its three norms see
    :class:`ACBlock2d`. Dilation works.

    With ``branch_norm='none'`` the layer is ``y = scale * (W + W_v + W_h)*x``, one convolution in training as well.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``; kernel sides are odd.
        branch_norm: 'batch' scales each branch by its variance, 'none' adds the kernels as they are.
        gamma_init: Start of gamma with init='scratch' (default 1); 'batch' only.
        scale: Factor on the sum of the kernels; 'none' only.
        eps: Added to the variance; 'batch' only.
        momentum: Weight of the newest batch in the running variance; 'batch' only.
        recompute: Whether the branches' outputs are computed again in the backward pass instead of kept, which costs
            their two convolutions and saves two tensors of the output's size; 'batch' only.

    Raises:
        ReparamError: an even kernel side, an unknown branch_norm, or an option that belongs to the other branch_norm.
    """

    method = _METHOD
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        vertical_gamma: torch.Tensor | None
        horizontal_gamma: torch.Tensor  # None with vertical_gamma, and so is what follows
        vertical_running_var: torch.Tensor
        horizontal_running_var: torch.Tensor
        vertical_norm: BranchNorm
        horizontal_norm: BranchNorm

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
        if branch_norm not in ('batch', 'none'):
            raise ReparamError(f"ACConv2d: branch_norm must be 'batch' or 'none', got {branch_norm!r}")
        if branch_norm == 'batch' and scale != 1:
            raise ReparamError(f"ACConv2d: scale belongs to branch_norm='none', got scale={scale} with 'batch'")
        if branch_norm == 'none' and gamma_init is not None:
            raise ReparamError(f"ACConv2d: branch_norm='none' has no gamma, got gamma_init={gamma_init}; leave it out")
        if branch_norm == 'none':
            # a checkpoint names these, too: as they are by default now, or were in 0.1.0
            defaults = [ACConv2d.default_options(), DEFAULTS_OF_0_1_0['acconv']]
            if (eps, momentum) not in [(known['eps'], known['momentum']) for known in defaults]:
                raise ReparamError(
                    f"ACConv2d: branch_norm='none' has no norm, got eps={eps} and momentum={momentum}; leave them out"
                )
        for name, value, most in (('eps', eps, math.inf), ('momentum', momentum, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ReparamError(f'ACConv2d: {name} must be a number from 0 to {most}, got {value!r}')
        if branch_norm == 'none' and recompute:
            raise ReparamError(
                f"ACConv2d: branch_norm='none' keeps no branches to recompute, got recompute={recompute}; leave it out"
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        factory = dict(device=device, dtype=dtype)
        self.branch_norm = branch_norm
        self.gamma_init = gamma_init
        self.scale = float(scale)
        self.eps = eps
        self.momentum = momentum
        self.recompute = recompute
        shape = self.weight.shape
        self.vertical_weight = nn.Parameter(torch.empty(*shape[:3], 1, **factory))
        self.horizontal_weight = nn.Parameter(torch.empty(*shape[:2], 1, shape[3], **factory))
        normed = branch_norm == 'batch'
        for branch in ('vertical', 'horizontal'):
            gamma = nn.Parameter(torch.empty(out_channels, **factory)) if normed else None
            self.register_parameter(f'{branch}_gamma', gamma)
            # 'running_var' in the name is what timm's distribute_bn looks for
            running_var = torch.empty(out_channels, **factory) if normed else None
            self.register_buffer(f'{branch}_running_var', running_var)
            norm = BranchNorm(self, branch, out_channels, eps, momentum) if normed else None
            self.register_module(f'{branch}_norm', norm)
        self._complete = True
        self._start('scratch')

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for norm in self.children():
            if isinstance(norm, BranchStatistics):
                norm.bind(self)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        norm = self._modules.get(name)
        if isinstance(norm, BranchStatistics) and module is not None:
            module = norm.replaced_by(module)
        super().add_module(name, module)

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        # a 1 x k kernel would only get a copy of itself, and the 7x7 stem stays plain in the official networks, too
        return min(conv.kernel_size) > 1 and max(conv.kernel_size) < 7

    @classmethod
    def check_lift(cls, **options: Any) -> None:
        if options.get('gamma_init') not in (None, 0):
            raise ReparamError(
                f"ACConv2d: init='lift' starts at gamma 0, got gamma_init={options['gamma_init']}; use init='scratch'"
            )
        if options.get('scale', 1) != 1:
            raise ReparamError(
                f"ACConv2d: init='lift' is exact at scale 1 only, got scale={options['scale']}; use init='scratch'"
            )

    @torch.no_grad()
    def _init_variant(self, init: str) -> None:
        for weight in (self.vertical_weight, self.horizontal_weight):
            if init == 'scratch':
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            elif self.branch_norm == 'batch':  # gamma is 0: what they are now does not matter yet
                fast_uniform_(weight, 1 / math.sqrt(weight[0].numel()))
        if init == 'lift':
            self._close_gates()
        elif self.branch_norm == 'batch':
            self._set_norms(1.0 if self.gamma_init is None else self.gamma_init)

    @torch.no_grad()
    def _close_gates(self) -> None:
        if self.branch_norm == 'batch':
            self._set_norms(0.0)
        else:
            self.vertical_weight.zero_()
            self.horizontal_weight.zero_()

    def _set_norms(self, gamma: float) -> None:
        for branch in ('vertical', 'horizontal'):
            getattr(self, f'{branch}_gamma').fill_(gamma)
            getattr(self, f'{branch}_running_var').fill_(1.0)

    def _compose(self) -> torch.Tensor:
        vertical, horizontal = self.vertical_weight, self.horizontal_weight
        if self.vertical_gamma is None:
            kernel = add_on_middle(self.weight, [vertical, horizontal], insets_of(self.kernel_size))
            return kernel if self.scale == 1 else self.scale * kernel
        vertical_scale = self.vertical_gamma * torch.rsqrt(self.vertical_running_var + self.eps)
        horizontal_scale = self.horizontal_gamma * torch.rsqrt(self.horizontal_running_var + self.eps)
        scaled_vertical = vertical_scale.view(-1, 1, 1, 1) * vertical
        scaled_horizontal = horizontal_scale.view(-1, 1, 1, 1) * horizontal
        return add_on_middle(self.weight, [scaled_vertical, scaled_horizontal], insets_of(self.kernel_size))

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        if self.vertical_gamma is None:
            return self._convolve(x, self.equivalent_kernel(), self.bias)
        if not self.vertical_norm.training:
            return self._convolve(x, self.equivalent_kernel(), self.bias)
        y = self._convolve(x, self.weight, self.bias)
        x, padding = self._pad_partly(x)
        weights: list[torch.Tensor] = [self.vertical_weight, self.horizontal_weight]
        gammas = torch.stack([self.vertical_gamma, self.horizontal_gamma])
        # gradients of torch.func cannot be checkpointed
        if torch.jit.is_scripting() or not self.recompute or is_transforming([x, gammas] + weights):
            y, unbiased = self._add_branches(y, self._branches(x, weights, padding), gammas)
        else:
            change, unbiased = checkpoint(
                self._scaled_branches, *(x, weights, padding, gammas), use_reentrant=False, preserve_rng_state=False
            )
            y = y + change
        if y.numel() > 0:
            unbiased = unbiased.to(self.vertical_running_var.dtype)
            if not torch.jit.is_scripting() and torch.jit.is_tracing():  # for a call with an empty batch later
                known = torch.stack([self.vertical_running_var, self.horizontal_running_var])
                unbiased = torch.where(torch._shape_as_tensor(y).prod() > 0, unbiased, known)
            self._update_running_vars(unbiased)
        return y

    def _branches(self, x: torch.Tensor, weights: list[torch.Tensor], padding: tuple[int, int]) -> list[torch.Tensor]:
        """Outputs of the vertical and of the horizontal convolution."""
        insets = insets_of(self.kernel_size)
        return convolve_branches(x, weights, insets, self.stride, padding, self.dilation, self.groups)

    def _add_branches(
        self, y: torch.Tensor, branches: list[torch.Tensor], gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            group = self.vertical_norm.synchronised_over()
            if group is not None:
                return add_scaled_synchronised(y, branches, gammas, self.eps, group)
        return add_scaled(y, branches, gammas, self.eps)

    @torch.jit.unused
    def _scaled_branches(
        self, x: torch.Tensor, weights: list[torch.Tensor], padding: tuple[int, int], gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Of no parameter of the layer itself: the second pass comes after torch.func.functional_call has put those back
        branches = self._branches(x, weights, padding)
        return self._add_branches(torch.zeros_like(branches[0]), branches, gammas)

    def _update_running_vars(self, variances: torch.Tensor) -> None:
        shares = [self.momentum, self.momentum]
        if not torch.jit.is_scripting():
            shares = shares_of_newest([self.vertical_norm, self.horizontal_norm])
        running_vars = [self.vertical_running_var, self.horizontal_running_var]
        for running_var, variance, share in zip(running_vars, variances, shares):
            running_var.lerp_(variance, share)

    def branch_form(self) -> Callable[..., torch.Tensor]:
        return self._evaluate_branches

    def _evaluate_branches(self, x: torch.Tensor) -> torch.Tensor:
        """The three convolutions of the training mode, each branch over its running standard deviation."""
        y = self._convolve(x, self.weight, None)
        weights: list[torch.Tensor] = [self.vertical_weight, self.horizontal_weight]
        vertical, horizontal = self._branches(self._pad(x), weights, (0, 0))
        if self.vertical_gamma is None:
            y = self.scale * (y + vertical + horizontal)
        else:
            for branch, gamma, variance in (
                (vertical, self.vertical_gamma, self.vertical_running_var),
                (horizontal, self.horizontal_gamma, self.horizontal_running_var),
            ):
                y = y + per_channel(gamma / torch.sqrt(variance + self.eps)) * branch
        return y if self.bias is None else y + per_channel(self.bias)

    def extra_repr(self) -> str:
        options = f", branch_norm='{self.branch_norm}'"
        if self.scale != 1:
            options += f', scale={self.scale:g}'
        return super().extra_repr() + options
