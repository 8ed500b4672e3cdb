"""ACNet: asymmetric convolution

Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
https://arxiv.org/abs/1908.03930
Official code: https://github.com/DingXiaoH/ACNet (this is an implementation of our own, from the paper)

    square kernel        vertical        horizontal         what they stand for
      w  w  w            .  v  .          .  .  .            w    w+v    w
      w  w  w     +      .  v  .    +     h  h  h      =    w+h  w+v+h  w+h
      w  w  w            .  v  .          .  .  .            w    w+v    w
"""

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from .._defaults import DEFAULTS_OF_0_1_0
from ..errors import ReparamError
from ._base import Fusible, Method, PaddingMode, ReparamConv2d, conv_arguments, fx_leaf, is_symbolic
from ._branch_norm import BranchNorm, BranchStatistics
from ._tensor import (
    autocast_disabled,
    fast_uniform_,
    float64_copy,
    is_tracing_or_transforming,
    is_transforming,
    scale_shift,
)

__all__ = ['ACConv2d', 'ACBlock2d']


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
_EPS = 1e-5
_MOMENTUM = 0.1


def _check_odd(owner: str, kernel_size: tuple[int, int]) -> None:
    if any(side % 2 == 0 for side in kernel_size):
        raise ReparamError(f'{owner} needs odd kernel sides, got {tuple(kernel_size)}; leave it out with skip=')


def _thin_padding(
    kernel_size: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Paddings that put the kh x 1 and the 1 x kw kernel on the middle of the kh x kw one (negative: crop)."""
    middle_h, middle_w = dilation[0] * (kernel_size[0] - 1) // 2, dilation[1] * (kernel_size[1] - 1) // 2
    return (padding[0], padding[1] - middle_w), (padding[0] - middle_h, padding[1])


def _thin_conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """Convolution whose padding may be negative, which crops the input."""
    crop_h, crop_w = max(-padding[0], 0), max(-padding[1], 0)
    if crop_h > 0 or crop_w > 0:
        x = x[..., crop_h : x.shape[-2] - crop_h, crop_w : x.shape[-1] - crop_w]
    return F.conv2d(x, weight, None, stride, (max(padding[0], 0), max(padding[1], 0)), dilation, groups)


def _add_skeleton(
    square: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, kernel_size: tuple[int, int]
) -> torch.Tensor:
    """Add a kh x 1 and a 1 x kw kernel to the middle column and row of a kh x kw one."""
    down, across = kernel_size[0] // 2, kernel_size[1] // 2
    if not torch.jit.is_scripting() and not is_tracing_or_transforming([square, vertical, horizontal]):
        return _AddSkeleton.apply(square, vertical, horizontal)
    vertical = F.pad(vertical, [across, across, 0, 0])
    horizontal = F.pad(horizontal, [0, 0, down, down])
    kernel = square + vertical + horizontal
    return kernel.view(square.shape)  # the legacy ONNX exporter does not know the shape after a pad


class _AddSkeleton(torch.autograd.Function):
    """:func:`_add_skeleton` in one copy of the square kernel, and gradients that are views."""

    generate_vmap_rule = True  # for what checkpointing repeats in a batched backward pass, where nothing is batched

    @staticmethod
    def forward(square: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor) -> torch.Tensor:
        kernel = square.clone()
        column, row = _AddSkeleton.middle(kernel)
        column += vertical
        row += horizontal
        return kernel

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        """Nothing is needed for the backward pass."""

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[0], *_AddSkeleton.middle(gradients[0])

    @staticmethod
    def middle(kernel: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The middle column (.., kh, 1) and the middle row (.., 1, kw)."""
        return kernel.narrow(3, kernel.shape[3] // 2, 1), kernel.narrow(2, kernel.shape[2] // 2, 1)


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of (batch, channels, height, width), the batch left out or not.

    In float32 for half precision.
    """
    values = _widened(values)
    if values.numel() == 0:  # an empty batch has none
        return _channel_sums(values), _channel_sums(values)
    if values.device.type != 'cpu':
        variance, mean = torch.var_mean(values, _all_but_channels(values), correction=0)
        return mean, variance
    # on the CPU torch.var takes several times as long, forward and backward
    mean = _channel_sums(values) / _count(values)
    centred = values - _per_channel(mean)
    squares = centred.square() if torch.is_grad_enabled() else centred.square_()
    return mean, _channel_sums(squares) / _count(values)


def _channel_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of each channel of (batch, channels, height, width), the batch left out or not."""
    if values.device.type != 'cpu':
        return values.sum(_all_but_channels(values))
    # One sum over batch and space takes two to four times as long there. Batched gradients do not know flatten.
    sums = values.sum((-2, -1))
    return sums.sum(0) if values.dim() == 4 else sums


def _count(values: torch.Tensor) -> int:
    """Numbers of a channel; 1 for none, so that one can divide by it."""
    return max(values.numel() // max(values.shape[-3], 1), 1)


def _all_but_channels(values: torch.Tensor) -> list[int]:
    return [0, 2, 3] if values.dim() == 4 else [1, 2]


def _widened(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _per_channel(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1)


def _branch_moments(vertical: torch.Tensor, horizontal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of both branches, each (2, channels)."""
    vertical_mean, vertical_variance = _moments(vertical)
    horizontal_mean, horizontal_variance = _moments(horizontal)
    return torch.stack([vertical_mean, horizontal_mean]), torch.stack([vertical_variance, horizontal_variance])


def _over_processes(
    means: torch.Tensor, variances: torch.Tensor, count: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and variances over the batches of all processes of a group, and the numbers of a channel in them."""
    own = torch.cat([means.flatten(), variances.flatten(), means.new_full((1,), count)])
    of_all = own.new_zeros(dist.get_world_size(group), len(own))
    of_all[dist.get_rank(group)] = own
    dist.all_reduce(of_all, group=group)  # a gather that every backend has
    counts = of_all[:, -1:, None]
    all_means, all_variances = of_all[:, :-1].unflatten(1, (2, *means.shape)).unbind(1)
    total = counts.sum()
    means = (counts * all_means).sum(0) / total
    variances = (counts * (all_variances + (all_means - means).square())).sum(0) / total
    return means, variances, total


@torch.compiler.disable
def _add_synchronised(
    y: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, gammas: torch.Tensor, eps: float, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`_add_scaled` with the variances of all processes of a group."""
    with torch.no_grad():
        moments = _branch_moments(vertical, horizontal)
        means, variances, count = _over_processes(*moments, _count(vertical) if vertical.numel() else 0, group)
    y = _AddScaled.apply(y, vertical, horizontal, gammas, means, variances, count, eps, group)
    return y, variances * (count / (count - 1).clamp(min=1))


def _add_scaled(
    y: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, gammas: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add both branches, each scaled by its gamma over its standard deviation, to y, which may be overwritten.

    Returns:
        The sum, and the branches' unbiased variances (2, channels), through which no gradient flows.
    """
    count = _count(y)
    unbiasing = count / max(count - 1, 1)
    if not torch.jit.is_scripting() and not is_tracing_or_transforming([y, vertical, horizontal, gammas]):
        with torch.no_grad():
            means, variances = _branch_moments(vertical, horizontal)
        y = _AddScaled.apply(y, vertical, horizontal, gammas, means, variances, count, eps, None)
        return y, variances * unbiasing
    _, variances = _branch_moments(vertical, horizontal)
    scales = (gammas * torch.rsqrt(variances + eps)).to(y.dtype)
    y = torch.addcmul(y, _per_channel(scales[0]), vertical)
    return torch.addcmul(y, _per_channel(scales[1]), horizontal), variances.detach() * unbiasing


class _AddScaled(torch.autograd.Function):
    """:func:`_add_scaled` in place, keeping nothing of y's size but the branches, differentiated in few passes."""

    generate_vmap_rule = True  # for what checkpointing repeats in a batched backward pass, where nothing is batched

    @staticmethod
    def forward(
        y: torch.Tensor,
        vertical: torch.Tensor,
        horizontal: torch.Tensor,
        gammas: torch.Tensor,
        means: torch.Tensor,
        variances: torch.Tensor,
        count: int | torch.Tensor,
        eps: float,
        group: Any,
    ) -> torch.Tensor:
        scales = (gammas * torch.rsqrt(variances + eps)).to(y.dtype)
        for branch, scale in zip((vertical, horizontal), scales):
            y.addcmul_(_per_channel(scale), branch)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        y, *needed, ctx.count, ctx.eps, ctx.group = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(*needed)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (*branches, gammas, means, variances) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            if ctx.group is not None:
                raise ReparamError('ACConv2d: synchronised variances are differentiated once, as SyncBatchNorm is')
            means, variances = _branch_moments(*branches)
        wide_gradient, wide = _widened(gradient), [_widened(branch) for branch in branches]
        inverses = torch.rsqrt(variances + ctx.eps)
        products = [wide_gradient * branch for branch in wide]
        for_gammas = for_variances = inverses * torch.stack([_channel_sums(product) for product in products])
        if ctx.group is not None:
            for_variances = for_gammas.clone()
            dist.all_reduce(for_variances, group=ctx.group)
        scales = gammas * inverses
        slopes = -scales * inverses * for_variances / ctx.count
        for_branches = []
        del products  # whose memory is used again
        for branch, scale, slope, shift in zip(wide, scales, slopes, -slopes * means):
            change = torch.addcmul(_per_channel(shift), _per_channel(slope), branch)
            for_branches.append(change.addcmul_(_per_channel(scale), wide_gradient).to(gradient.dtype))
        return gradient, *for_branches, for_gammas.to(gammas.dtype), None, None, None, None, None


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
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Sides of the kernel, odd.
        stride: Stride of the convolution.
        padding: Zeros (see padding_mode) added to each side of the input, or 'same' or 'valid'.
        dilation: Spacing between kernel elements.
        groups: Blocked connections from input to output channels.
        bias: Whether the output gets a learned bias.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
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
        eps: float = _EPS,
        momentum: float = _MOMENTUM,
        recompute: bool = False,
    ) -> None:
        _check_odd('ACConv2d', to_2tuple(kernel_size))
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
            kernel = _add_skeleton(self.weight, vertical, horizontal, self.kernel_size)
            return kernel if self.scale == 1 else self.scale * kernel
        vertical_scale = self.vertical_gamma * torch.rsqrt(self.vertical_running_var + self.eps)
        horizontal_scale = self.horizontal_gamma * torch.rsqrt(self.horizontal_running_var + self.eps)
        scaled_vertical = vertical_scale.view(-1, 1, 1, 1) * vertical
        scaled_horizontal = horizontal_scale.view(-1, 1, 1, 1) * horizontal
        return _add_skeleton(self.weight, scaled_vertical, scaled_horizontal, self.kernel_size)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve (batch, in_channels, height, width)."""
        if not torch.jit.is_scripting():
            if is_symbolic(input):
                return fx_leaf(self, input)
        x = input
        if self.vertical_gamma is None:
            return self._convolve(x, self.equivalent_kernel(), self.bias)
        if not self.vertical_norm.training:
            return self._convolve(x, self.equivalent_kernel(), self.bias)
        y = self._convolve(x, self.weight, self.bias)
        if self.tf_same or self.padding_mode != 'zeros':
            x = self._pad(x)
            padding = (0, 0)
        else:
            # left and right, top and bottom are equal: sides are odd
            padding = (self._reversed_padding_repeated_twice[2], self._reversed_padding_repeated_twice[0])
        vertical_padding, horizontal_padding = _thin_padding(self.kernel_size, padding, self.dilation)
        weights = (self.vertical_weight, self.horizontal_weight)
        gammas = torch.stack([self.vertical_gamma, self.horizontal_gamma])
        # gradients of torch.func cannot be checkpointed
        if torch.jit.is_scripting() or not self.recompute or is_transforming([x, *weights, gammas]):
            vertical, horizontal = self._branches(x, weights, vertical_padding, horizontal_padding)
            y, unbiased = self._add_branches(y, vertical, horizontal, gammas)
        else:
            change, unbiased = checkpoint(
                self._scaled_branches,
                *(x, weights, vertical_padding, horizontal_padding, gammas),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            y = y + change
        if y.numel() > 0:
            self._update_running_vars(unbiased.to(self.vertical_running_var.dtype))
        return y

    def _add_branches(
        self, y: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            group = self.vertical_norm.synchronised_over()
            if group is not None:
                return _add_synchronised(y, vertical, horizontal, gammas, self.eps, group)
        return _add_scaled(y, vertical, horizontal, gammas, self.eps)

    def _update_running_vars(self, variances: torch.Tensor) -> None:
        shares = [self.momentum, self.momentum]
        if not torch.jit.is_scripting():
            norms = (self.vertical_norm, self.horizontal_norm)
            if not all(norm.track_running_stats for norm in norms):
                return
            shares = [norm.share_of_newest() for norm in norms]
        self.vertical_running_var.lerp_(variances[0], shares[0])
        self.horizontal_running_var.lerp_(variances[1], shares[1])

    def _branches(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        vertical_padding: tuple[int, int],
        horizontal_padding: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of the vertical and of the horizontal convolution."""
        vertical = _thin_conv(x, weights[0], self.stride, vertical_padding, self.dilation, self.groups)
        horizontal = _thin_conv(x, weights[1], self.stride, horizontal_padding, self.dilation, self.groups)
        return vertical, horizontal

    def branch_form(self) -> Callable[..., torch.Tensor]:
        return self._evaluate_branches

    def _evaluate_branches(self, x: torch.Tensor) -> torch.Tensor:
        """The three convolutions of the training mode, each branch over its running standard deviation."""
        y = self._convolve(x, self.weight, None)
        vertical_padding, horizontal_padding = _thin_padding(self.kernel_size, (0, 0), self.dilation)
        weights = (self.vertical_weight, self.horizontal_weight)
        vertical, horizontal = self._branches(self._pad(x), weights, vertical_padding, horizontal_padding)
        if self.vertical_gamma is None:
            y = self.scale * (y + vertical + horizontal)
        else:
            for branch, gamma, variance in (
                (vertical, self.vertical_gamma, self.vertical_running_var),
                (horizontal, self.horizontal_gamma, self.horizontal_running_var),
            ):
                y = y + _per_channel(gamma / torch.sqrt(variance + self.eps)) * branch
        return y if self.bias is None else y + _per_channel(self.bias)

    @torch.jit.unused
    def _scaled_branches(
        self,
        x: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor],
        vertical_padding: tuple[int, int],
        horizontal_padding: tuple[int, int],
        gammas: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Of no parameter of the layer itself: the second pass comes after torch.func.functional_call has put those back
        vertical, horizontal = self._branches(x, weights, vertical_padding, horizontal_padding)
        return self._add_branches(torch.zeros_like(vertical), vertical, horizontal, gammas)

    def extra_repr(self) -> str:
        options = f", branch_norm='{self.branch_norm}'"
        if self.scale != 1:
            options += f', scale={self.scale:g}'
        return super().extra_repr() + options


class ACBlock2d(Fusible):
    """The paper's stand-alone block, ``y = BN_s(W*x) + BN_v(W_v*x) + BN_h(W_h*x)``.

    For networks that are composed by hand, and for checkpoints of the official code, whose module names it keeps. It
    fuses to one convolution with bias.

    Paper: `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930
    Official code: https://github.com/DingXiaoH/ACNet

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Sides of the square kernel, odd.
        stride: Stride of the convolutions.
        padding: Padding of the square convolution, or 'same' or 'valid'; the thin ones are aligned with it.
        dilation: Spacing between kernel elements.
        groups: Blocked connections from input to output channels.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
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
        eps: float = _EPS,
        momentum: float = _MOMENTUM,
    ) -> None:
        super().__init__()
        sides: tuple[int, int] = to_2tuple(kernel_size)
        _check_odd('ACBlock2d', sides)
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
        # torch declares tuples of any length
        vertical_padding, horizontal_padding = _thin_padding(conv.kernel_size, padding, conv.dilation)  # type: ignore[arg-type]
        vertical = _thin_conv(x, self.ver_conv.weight, conv.stride, vertical_padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        horizontal = _thin_conv(x, self.hor_conv.weight, conv.stride, horizontal_padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        y = y + self.ver_bn(vertical) + self.hor_bn(horizontal)
        if self.last_bn is not None:
            y = self.last_bn(y)
        return y

    def equivalent_kernel(self) -> torch.Tensor:
        """Kernel (out_channels, in_channels/groups, kh, kw) of the convolution that the block equals in evaluation."""
        return self._fold()[0]

    def equivalent_bias(self) -> torch.Tensor:
        """Bias (out_channels,) of the convolution that the block equals in evaluation."""
        return self._fold()[1]

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast_disabled(self.square_conv.weight.device.type):
            kernels, biases = [], []
            branches = (
                (self.square_conv, self.square_bn),
                (self.ver_conv, self.ver_bn),
                (self.hor_conv, self.hor_bn),
            )
            for conv, norm in branches:
                scale, shift = scale_shift(norm)
                kernels.append(scale.view(-1, 1, 1, 1) * conv.weight)
                biases.append(shift)
            square, vertical, horizontal = kernels
            height, width = self.square_conv.kernel_size
            kernel = _add_skeleton(square, vertical, horizontal, (height, width))
            bias = sum(biases[1:], biases[0])
            if self.last_bn is not None:
                scale, shift = scale_shift(self.last_bn)
                kernel, bias = scale.view(-1, 1, 1, 1) * kernel, scale * bias + shift
            return kernel, bias

    def branch_form(self) -> Callable[..., torch.Tensor]:
        return copy.deepcopy(self).eval().forward

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Fold the block, in float64 and rounded once, into a fresh convolution with bias; it stays as it was."""
        kernel, bias = float64_copy(self).eval()._fold()
        like = next(self.parameters())
        conv = nn.Conv2d(**dict(conv_arguments(self.square_conv), bias=True), device='meta', dtype=like.dtype)
        vars(conv).update(self.added_attributes())
        trainable = any(p.requires_grad for p in self.parameters())
        for name, value in (('weight', kernel), ('bias', bias)):
            setattr(conv, name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=trainable))
        return conv.train(self.training)
