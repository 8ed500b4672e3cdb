"""Branches of a convolution, ``y = W*x + sum_k s_k (B_k*x)``, any number of them.

B_k is a kernel of the size of W, or smaller and placed on its middle. s_k is a factor for each output channel: gamma
over the standard deviation of the branch's own output, which is that of the batch in training.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from ..errors import ReparamError
from ._branch_norm import BranchStatistics
from ._tensor import autocast_disabled, is_tracing_or_transforming

__all__ = [
    'add_on_middle',
    'add_scaled',
    'add_scaled_synchronised',
    'convolve_branches',
    'identity_kernel',
    'per_channel',
    'per_output',
    'pointwise_then',
    'response_to_constants',
    'shares_of_newest',
]


# Kernels


def convolve_branches(
    x: torch.Tensor,
    kernels: list[torch.Tensor],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> list[torch.Tensor]:
    """Convolve the input with the kernel of each branch, on the middle of the stock kernel.

    Args:
        x: Input (batch, in_channels, height, width), batched or unbatched.
        kernels: Kernels of the branches.
        kernel_size: Sides of the stock kernel.
        stride: Stride of the stock convolution.
        padding: Its padding.
        dilation: Its dilation.
        groups: Its groups.
    """
    outputs = []
    for kernel in kernels:
        rows, columns = _inset(kernel_size, kernel)
        pad_h, pad_w = padding[0] - dilation[0] * rows, padding[1] - dilation[1] * columns
        # no convolution takes a negative padding, which crops
        crop_h, crop_w = max(-pad_h, 0), max(-pad_w, 0)
        seen = x
        if crop_h > 0 or crop_w > 0:
            seen = x[..., crop_h : x.shape[-2] - crop_h, crop_w : x.shape[-1] - crop_w]
        outputs.append(F.conv2d(seen, kernel, None, stride, (max(pad_h, 0), max(pad_w, 0)), dilation, groups))
    return outputs


def _inset(kernel_size: tuple[int, int], kernel: torch.Tensor) -> tuple[int, int]:
    """The rows and the columns on each side of a kernel on the middle of one of the given size."""
    return (kernel_size[0] - kernel.shape[2]) // 2, (kernel_size[1] - kernel.shape[3]) // 2


def add_on_middle(kernel: torch.Tensor, branches: list[torch.Tensor]) -> torch.Tensor:
    """Add the kernels of branches to the middle of a kernel.

    Args:
        kernel: Kernel (.., kh, kw).
        branches: Kernels of the branches (.., kh - 2 * rows, kw - 2 * columns).
    """
    size = (kernel.shape[2], kernel.shape[3])
    if not torch.jit.is_scripting() and not is_tracing_or_transforming([kernel] + branches):
        return _AddOnMiddle.apply(kernel, [_inset(size, branch) for branch in branches], *branches)
    total = kernel
    for branch in branches:
        rows, columns = _inset(size, branch)
        total = total + F.pad(branch, [columns, columns, rows, rows])
    return total.view(kernel.shape)  # the legacy ONNX exporter does not know the shape after a pad


class _AddOnMiddle(torch.autograd.Function):
    """:func:`add_on_middle` in one copy of the kernel, and gradients that are views."""

    generate_vmap_rule = True  # for what checkpointing repeats in a batched backward pass, where nothing is batched

    @staticmethod
    def forward(kernel: torch.Tensor, insets: list[tuple[int, int]], *branches: torch.Tensor) -> torch.Tensor:
        total = kernel.clone()
        for branch, inset in zip(branches, insets):
            middle = _middle(total, inset)
            middle += branch
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.insets = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return gradients[0], None, *(_middle(gradients[0], inset) for inset in ctx.insets)


def pointwise_then(inner: torch.Tensor, outer: torch.Tensor, groups: int) -> torch.Tensor:
    """The kernel of a 1x1 convolution and the convolution that follows it, composed outside autocast.

    Args:
        inner: Kernel (inner_channels, in_channels/groups, 1, 1).
        outer: Kernel (out_channels, inner_channels/groups, kh, kw).
        groups: Groups of both.

    Returns:
        Kernel (out_channels, in_channels/groups, kh, kw).
    """
    if torch.jit.is_scripting():
        return _pointwise_then(inner, outer, groups)
    with autocast_disabled(inner.device.type):
        return _pointwise_then(inner, outer, groups)


def _pointwise_then(inner: torch.Tensor, outer: torch.Tensor, groups: int) -> torch.Tensor:
    out_channels, inner_of_group, height, width = outer.shape
    # one product a group: torch.matmul over the output channels would copy the map for each of them
    taps = outer.view(out_channels, inner_of_group, height * width).transpose(1, 2)
    maps = inner.view(groups, inner_of_group, inner.shape[1])
    kernels = torch.bmm(taps.reshape(groups, -1, inner_of_group), maps)
    kernels = kernels.view(out_channels, height * width, inner.shape[1]).transpose(1, 2)
    return kernels.reshape(out_channels, inner.shape[1], height, width)


def identity_kernel(like: torch.Tensor) -> torch.Tensor:
    """The 1x1 kernel that hands on the input channels of each group in turn, of the shape and dtype of another one."""
    channels = like.shape[1]
    eye = torch.eye(channels, dtype=like.dtype, device=like.device)
    return eye.repeat(like.shape[0] // channels, 1)[:, :, None, None]


def response_to_constants(kernel: torch.Tensor, constants: torch.Tensor, groups: int) -> torch.Tensor:
    """What a convolution makes of constant input channels, away from a border.

    Args:
        kernel: Kernel (out_channels, in_channels/groups, kh, kw).
        constants: Value of each input channel, (in_channels,).
        groups: Groups of the convolution.

    Returns:
        Value of each output channel, (out_channels,).
    """
    taps = kernel.sum((2, 3)).view(groups, len(kernel) // groups, -1)
    return torch.matmul(taps, constants.view(groups, -1, 1)).flatten()


def _middle(kernel: torch.Tensor, inset: tuple[int, int]) -> torch.Tensor:
    for dim, skipped in zip((2, 3), inset):
        if skipped > 0:
            kernel = kernel.narrow(dim, skipped, kernel.shape[dim] - 2 * skipped)
    return kernel


def per_output(values: torch.Tensor) -> torch.Tensor:
    """(out_channels,) as (out_channels, 1, 1, 1), for the output channels of a kernel."""
    return values.view(-1, 1, 1, 1)


# Moments


def per_channel(values: torch.Tensor) -> torch.Tensor:
    """(channels,) as (channels, 1, 1)."""
    return values.view(-1, 1, 1)


def _moments(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel of (batch, channels, height, width), batched or unbatched.

    In float32 for half precision.
    """
    values = _to_float32(values)
    if values.numel() == 0:  # an empty batch has none
        return _channel_sums(values), _channel_sums(values)
    if values.device.type != 'cpu':
        variance, mean = torch.var_mean(values, _all_but_channels(values), correction=0)
        return mean, variance
    # on the CPU torch.var takes several times as long, forward and backward
    mean = _channel_sums(values) / _elements_per_channel(values)
    centred = values - per_channel(mean)
    squares = centred.square() if torch.is_grad_enabled() else centred.square_()
    return mean, _channel_sums(squares) / _elements_per_channel(values)


def _channel_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum of each channel of (batch, channels, height, width), batched or unbatched."""
    if values.device.type != 'cpu':
        return values.sum(_all_but_channels(values))
    # One sum over batch and space takes two to four times as long there. Batched gradients do not know flatten.
    sums = values.sum((-2, -1))
    return sums.sum(0) if values.dim() == 4 else sums


def _elements_per_channel(values: torch.Tensor) -> int:
    """At least 1, so that one can divide by it."""
    return max(values.numel() // max(values.shape[-3], 1), 1)


def _all_but_channels(values: torch.Tensor) -> list[int]:
    return [0, 2, 3] if values.dim() == 4 else [1, 2]


def _to_float32(values: torch.Tensor) -> torch.Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _branch_moments(branches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means and variances of the branches' outputs, each (branches, channels)."""
    moments = [_moments(branch) for branch in branches]
    return torch.stack([mean for mean, _ in moments]), torch.stack([variance for _, variance in moments])


def _over_processes(
    means: torch.Tensor, variances: torch.Tensor, count: int, group: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means and variances over the batches of all processes of a group, and the elements of a channel in them."""
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


# Scaled sum


def add_scaled(
    y: torch.Tensor, branches: list[torch.Tensor], gammas: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add branches, each scaled by its gamma over its standard deviation, to y, which may be overwritten.

    Args:
        y: What is added to, (batch, channels, height, width), batched or unbatched.
        branches: Outputs of the branches, of y's shape.
        gammas: Scales, (branches, channels).
        eps: Added to the variances.

    Returns:
        The sum, and the unbiased variances (branches, channels), through which no gradient flows.
    """
    count = _elements_per_channel(y)
    unbiasing = count / max(count - 1, 1)
    if not torch.jit.is_scripting() and not is_tracing_or_transforming([y, gammas] + branches):
        with torch.no_grad():
            means, variances = _branch_moments(branches)
        y = _AddScaled.apply(y, gammas, means, variances, count, eps, None, *branches)
        return y, variances * unbiasing
    _, variances = _branch_moments(branches)
    scales = (gammas * torch.rsqrt(variances + eps)).to(y.dtype)
    for index, branch in enumerate(branches):
        y = torch.addcmul(y, per_channel(scales[index]), branch)
    return y, variances.detach() * unbiasing


@torch.compiler.disable
def add_scaled_synchronised(
    y: torch.Tensor, branches: list[torch.Tensor], gammas: torch.Tensor, eps: float, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`add_scaled` with the variances over all processes of a group."""
    with torch.no_grad():
        count = _elements_per_channel(y) if y.numel() else 0
        means, variances, total = _over_processes(*_branch_moments(branches), count, group)
    y = _AddScaled.apply(y, gammas, means, variances, total, eps, group, *branches)
    return y, variances * (total / (total - 1).clamp(min=1))


class _AddScaled(torch.autograd.Function):
    """:func:`add_scaled` in place, keeping nothing of y's size but the branches, differentiated in few passes."""

    generate_vmap_rule = True  # for what checkpointing repeats in a batched backward pass, where nothing is batched

    @staticmethod
    def forward(
        y: torch.Tensor,
        gammas: torch.Tensor,
        means: torch.Tensor,
        variances: torch.Tensor,
        count: int | torch.Tensor,
        eps: float,
        group: Any,
        *branches: torch.Tensor,
    ) -> torch.Tensor:
        scales = (gammas * torch.rsqrt(variances + eps)).to(y.dtype)
        for branch, scale in zip(branches, scales):
            y.addcmul_(per_channel(scale), branch)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        y, gammas, means, variances, ctx.count, ctx.eps, ctx.group, *branches = inputs
        ctx.mark_dirty(y)
        ctx.save_for_backward(gammas, means, variances, *branches)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (gammas, means, variances, *branches) = gradients, ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            if ctx.group is not None:
                raise ReparamError('synchronised variances of branches are differentiated once, as SyncBatchNorm is')
            means, variances = _branch_moments(branches)
        wide_gradient, wide = _to_float32(gradient), [_to_float32(branch) for branch in branches]
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
            change = torch.addcmul(per_channel(shift), per_channel(slope), branch)
            for_branches.append(change.addcmul_(per_channel(scale), wide_gradient).to(gradient.dtype))
        return gradient, for_gammas.to(gammas.dtype), None, None, None, None, None, *for_branches


# Running variances


def shares_of_newest(norms: Sequence[BranchStatistics]) -> list[float]:
    """The share of the newest batch in each running variance; none while torch.func has taken the statistics away."""
    if not all(norm.track_running_stats for norm in norms):
        return []
    return [norm.share_of_newest() for norm in norms]
