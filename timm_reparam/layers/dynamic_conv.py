"""Dynamic convolution: attention over convolution kernels

Paper: `Dynamic Convolution: Attention over Convolution Kernels` - https://arxiv.org/abs/1912.03458
(no official code; this is an implementation of our own, from the paper)

                       +-> pool -> fc1 -> relu -> fc2 -> softmax(. / T) = pi ---+
                       |                                                        |
    x (B, I, H, W) ----+----------------> convolution of each sample with  W + sum_k (pi_k - pi_K) R_k ----> y

    start:  fc2 = 0, so pi is uniform, every coefficient is 0 and every sample's kernel is W, bit for bit
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from timm.layers.padding import pad_same
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import ReparamError
from ._base import Method, PaddingMode, ReparamConv2d, conv_arguments, fx_leaf, is_symbolic
from ._tensor import (
    autocast_disabled,
    fast_uniform_,
    float64_copy,
    is_tracing_or_transforming,
    is_transforming,
    materialize,
)

__all__ = ['DynamicConv2d', 'KernelAttention']

_METHOD = Method(
    name='Dynamic convolution',
    summary=(
        'Each convolution mixes several kernels by weights that an attention branch computes from its input, '
        'so every image gets a kernel of its own.'
    ),
    title='Dynamic Convolution: Attention over Convolution Kernels',
    authors='Chen, Yinpeng and Dai, Xiyang and Liu, Mengchen and Chen, Dongdong and Yuan, Lu and Liu, Zicheng',
    venue='IEEE/CVF Conference on Computer Vision and Pattern Recognition',
    year='2020',
    arxiv='1912.03458',
)

# Narrowest hidden layer of the attention, for inputs of few channels.
_MIN_HIDDEN = 4
# Start of the residual kernels when lifted, as a share of nn.Conv2d's own start: large enough for the attention to get
# a gradient at once, small beside trained kernels.
_LIFT_RESIDUAL = 0.1


def _temperature(position: torch.Tensor, steps: torch.Tensor, start: float) -> torch.Tensor:
    """Temperature at a position of the schedule, falling linearly from `start` to 1 over `steps`, in float32."""
    # not the quotient of the integers, which is of whatever dtype is the default one
    return 1 + (start - 1) * (1 - position.float() / steps).clamp(min=0)


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _take_step(
    position: torch.Tensor, pending: torch.Tensor, steps: torch.Tensor, start: float, counts: bool
) -> torch.Tensor:
    """Temperature of a training-mode forward pass, which moves the schedule if the pass counts.

    Gradient checkpointing runs a pass twice, the second time inside the backward pass. A first pass with gradients
    counts at once. One without (reentrant checkpointing) is pending, and the second one counts. So a pass without
    gradients that no backward pass repeats, as in ``update_bn``, never counts.
    """
    if _inside_backward():
        temperature = _temperature(position - 1 + pending, steps, start)
        position.add_(pending)
        pending.zero_()
        return temperature
    temperature = _temperature(position, steps, start)
    if counts:
        position.add_(1)
    pending.fill_(0 if counts else 1)
    return temperature


# One opaque operation for torch.compile: it would otherwise recompute the temperature in the backward pass, from a
# position that has moved on by then, and could not tell a repeated pass, which only shows at run time.
_take_step_compiled = torch.library.custom_op(
    'timm_reparam::take_step', _take_step, mutates_args={'position', 'pending'}
)


@_take_step_compiled.register_fake
def _(position: torch.Tensor, pending: torch.Tensor, steps: torch.Tensor, start: float, counts: bool) -> torch.Tensor:
    return torch.empty((), device=position.device)


class KernelAttention(nn.Module):
    """Squeeze-and-excitation style attention: pooled features to one logit a kernel.

    Args:
        in_channels: Channels of the pooled features.
        hidden_features: Width of the hidden layer.
        num_kernels: Number of logits.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, in_channels: int, hidden_features: int, num_kernels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_channels, hidden_features, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_features, num_kernels, device=device, dtype=dtype)

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """Logits (batch, num_kernels) of pooled features (batch, in_channels)."""
        return self.fc2(F.relu(self.fc1(pooled)))


class _Mix(torch.autograd.Function):
    """``mean + coefficients @ residuals``, (batch, elements), as one product with fewer passes over the result.

    The products with coefficients of 1 and 0 are exact in float32 on the CPU, though not in TF32 on a GPU.
    """

    generate_vmap_rule = True  # for what checkpointing repeats in a batched backward pass, where nothing is batched

    @staticmethod
    def is_faster(coefficients: torch.Tensor, mean: torch.Tensor, residuals: torch.Tensor) -> bool:
        """Whether there are enough samples to make up for a copy of the K kernels."""
        plain = coefficients.device.type == 'cpu' and not is_tracing_or_transforming([coefficients, mean, residuals])
        return plain and len(coefficients) >= 8

    @staticmethod
    def forward(coefficients: torch.Tensor, mean: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        return torch.mm(_with_ones(coefficients), torch.cat([mean, residuals]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        coefficients, _, residuals = inputs
        ctx.save_for_backward(coefficients, residuals)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (gradient,), (coefficients, residuals) = gradients, ctx.saved_tensors
        for_kernels = torch.mm(_with_ones(coefficients).t(), gradient)
        return torch.mm(gradient, residuals.t()), for_kernels[:1], for_kernels[1:]


def _with_ones(coefficients: torch.Tensor) -> torch.Tensor:
    return F.pad(coefficients, (1, 0), value=1.0)


class DynamicConv2d(ReparamConv2d):
    """Dynamic convolution, ``y_b = (sum_k pi_k(x_b) W_k) * x_b + sum_k pi_k(x_b) b_k`` for each sample b.

    K kernels are mixed by an attention ``pi(x) = softmax(fc2(relu(fc1(avgpool(x)))) / T)``. Held as the mean kernel
    `weight` (the plain convolution's name and shape) and K-1 residuals R_k, ``W_k = W + R_k`` and
    ``W_K = W - sum R_k``, stacked in `residual_weight` ((K-1) * out_channels, in_channels/groups, kh, kw): since the
    attention sums to one, the sample's kernel is ``W + sum_k (pi_k - pi_K) R_k``. Biases are held likewise.

    The temperature falls linearly from `temperature` to 1 over `temperature_steps` training-mode forward passes of this
    layer, in any training loop: position and length are buffers, so the schedule is saved, moved and resumed with the
    model. A pass that gradient checkpointing repeats counts once, at one temperature (that of the latest one, where a
    layer runs several times before the backward pass). A pass under ``torch.no_grad``, as in
    ``torch.optim.swa_utils.update_bn``, does not count. Evaluation uses the current temperature. With
    ``temperature=None`` there is no schedule and T = 1: the form for inference.

    The kernel depends on the input, so there is no equivalent kernel; :meth:`fuse` gives the form for inference.

    There are two ways to compute it. Either each sample is convolved with its own mix of the kernels: by a matrix
    product for each sample where kernels are 1x1, elsewhere by one convolution with batch * groups groups. Or the
    outputs of K convolutions are mixed: K times the arithmetic, but no kernel for each sample, which is less where
    there are few output positions. Built under timm's ``set_exportable(True)``
    (``create_model(..., exportable=True)``), and in any export to ONNX, the layer always mixes outputs, which is a
    graph of fixed shape; so it does in ``torch.jit.trace``, 1x1 kernels aside.

    Paper: `Dynamic Convolution: Attention over Convolution Kernels` - https://arxiv.org/abs/1912.03458

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Sides of the kernel.
        stride: Stride of the convolution.
        padding: Zeros (see padding_mode) added to each side of the input, or 'same' or 'valid'.
        dilation: Spacing between kernel elements.
        groups: Blocked connections from input to output channels.
        bias: Whether the output gets K learned biases.
        padding_mode: 'zeros', 'reflect', 'replicate' or 'circular'.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        num_kernels: K, the number of kernels.
        reduction: The attention's hidden layer has in_channels // reduction features (at least 4).
        temperature: T at the start, at least 1, or None for no schedule.
        temperature_steps: Training-mode forward passes until T is 1.

    Raises:
        ReparamError: an option out of its range.
    """

    __constants__ = [*ReparamConv2d.__constants__, 'exportable']
    method = _METHOD
    input_dependent = True
    schedule_options = ('temperature', 'temperature_steps')
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        residual_weight: torch.Tensor
        residual_bias: torch.Tensor | None
        temperature_position: torch.Tensor | None
        temperature_steps: torch.Tensor  # None with temperature_position
        temperature_pending: torch.Tensor  # likewise

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
        num_kernels: int = 4,
        reduction: int = 4,
        temperature: float | None = 30.0,
        temperature_steps: int = 10_000,
    ) -> None:
        _check_integer('num_kernels', num_kernels, 2)
        _check_integer('reduction', reduction, 1)
        _check_integer('temperature_steps', temperature_steps, 1)
        is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if temperature is not None and not (is_number and 1 <= temperature < math.inf):
            raise ReparamError(
                f'DynamicConv2d: temperature must be a number of at least 1, or None, got {temperature!r}'
            )
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        factory = dict(device=device, dtype=dtype)
        self.num_kernels = num_kernels
        self.reduction = reduction
        self.exportable = is_exportable()
        self.temperature = None if temperature is None else float(temperature)
        shape = self.weight.shape
        # 4-D, because model.to(memory_format=torch.channels_last) refuses 5-D parameters
        self.residual_weight = nn.Parameter(torch.empty((num_kernels - 1) * shape[0], *shape[1:], **factory))
        self.register_parameter('residual_bias', None)
        if bias:
            self.residual_bias = nn.Parameter(torch.empty((num_kernels - 1) * out_channels, **factory))
        self.attention = KernelAttention(
            in_channels, max(in_channels // reduction, _MIN_HIDDEN), num_kernels, device=device, dtype=dtype
        )
        # Integers: a float counter stops at 256 in bfloat16, and weight averaging would average it.
        schedule = dict(dtype=torch.int64, device=device)
        scheduled = temperature is not None
        self.register_buffer('temperature_position', torch.zeros((), **schedule) if scheduled else None)
        self.register_buffer('temperature_steps', torch.zeros((), **schedule) if scheduled else None)
        # whether a pass without gradients waits to be repeated, see _take_step
        self.register_buffer(
            'temperature_pending', torch.zeros((), **schedule) if scheduled else None, persistent=False
        )
        self._length = temperature_steps
        self._complete = True
        self._start('scratch')

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        return not is_stem

    def options(self) -> dict[str, Any]:
        return dict(super().options(), temperature_steps=self._length)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.temperature_steps is not None and not self.temperature_steps.is_meta:
            self._length = int(self.temperature_steps)

    def _stacks(self) -> dict[str, torch.Tensor]:
        """All K kernels (num_kernels, *weight.shape) as `weight`, all K biases as `bias` if there are any."""
        stacks = {}
        for name, mean, residual in (
            ('weight', self.weight, self.residual_weight),
            ('bias', self.bias, self.residual_bias),
        ):
            if mean is not None and residual is not None:
                residuals = residual.unflatten(0, (self.num_kernels - 1, -1))
                stacks[name] = mean + torch.cat([residuals, -residuals.sum(0, keepdim=True)])
        return stacks

    @torch.no_grad()
    def _init_variant(self, init: str) -> None:
        self.attention.fc1.reset_parameters()
        if init == 'scratch':
            self.attention.fc2.reset_parameters()
        if self.temperature is not None:
            self.reset_temperature(self._length)
        if init == 'lift':
            self._close_gates()
            bound = _LIFT_RESIDUAL / self.weight[0].numel() ** 0.5
            fast_uniform_(self.residual_weight, bound)
            if self.residual_bias is not None:
                fast_uniform_(self.residual_bias, bound)
            return
        for mean, residual in ((self.weight, self.residual_weight), (self.bias, self.residual_bias)):
            if mean is not None and residual is not None:
                # kernels that differ from each other as independent draws of the mean's own scale do
                draws = torch.randn_like(mean.expand(self.num_kernels, *mean.shape))
                draws = draws * mean.square().mean().sqrt()
                residual.copy_((draws[:-1] - draws.mean(0)).flatten(0, 1))

    @torch.no_grad()
    def _close_gates(self) -> None:
        nn.init.zeros_(self.attention.fc2.weight)
        nn.init.zeros_(self.attention.fc2.bias)
        if self.temperature is not None:
            self.reset_temperature()

    def reset_temperature(self, steps: int | None = None) -> None:
        """Start the temperature's schedule again.

        Args:
            steps: New length of the schedule in training-mode forward passes; None keeps it.

        Raises:
            ReparamError: steps is not a positive integer, or the layer has no schedule.
        """
        if self.temperature_position is None:
            raise ReparamError(
                'DynamicConv2d: this layer has no temperature schedule (temperature=None) to start again'
            )
        if steps is not None:
            _check_integer('steps', steps, 1)
            self.temperature_steps.fill_(steps)
            self._length = steps
        self.temperature_position.zero_()
        self.temperature_pending.zero_()

    def current_temperature(self) -> torch.Tensor:
        """The temperature of evaluation and of the next training-mode forward pass, as a 0-dim tensor."""
        return self._temperature_at(self.temperature_position)

    def _temperature_at(self, position: torch.Tensor | None) -> torch.Tensor:
        if position is None or self.temperature is None or self.temperature_steps is None:
            return torch.ones((), device=self.weight.device)
        return _temperature(position, self.temperature_steps, self.temperature)

    def _next_temperature(self) -> torch.Tensor:
        """Temperature of this forward pass, which counts if it is one of training."""
        position = self.temperature_position
        if position is None or self.temperature is None or not self.training:
            return self._temperature_at(position)
        counts = torch.is_grad_enabled()
        if not torch.jit.is_scripting():
            take_step = _take_step_compiled if torch.compiler.is_compiling() else _take_step
            return take_step(position, self.temperature_pending, self.temperature_steps, self.temperature, counts)
        temperature = self._temperature_at(position)
        if counts:
            position.add_(1)
        return temperature

    def _coefficients(self, x: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        """pi_k - pi_K, (batch, num_kernels - 1), in the parameters' dtype."""
        # not x.mean, whose gradient is a tensor of the input's size; in float32 at least, float16 is soon too small
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        pooled = x.sum((2, 3), dtype=wide) / (x.shape[2] * x.shape[3])
        logits = self.attention(pooled.to(self.weight.dtype))
        attention = _softmax(logits / temperature)
        others, last = attention.split([self.num_kernels - 1, 1], dim=1)
        return others - last

    def _mix(self, coefficients: torch.Tensor, mean: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """mean + sum_k coefficients_k residuals_k for each sample, (batch, *mean.shape)."""
        flat, residuals = mean.reshape(1, -1), residuals.reshape(self.num_kernels - 1, -1)
        if torch.jit.is_scripting() or not _Mix.is_faster(coefficients, flat, residuals):
            mixed = flat + torch.matmul(coefficients, residuals)
        else:
            mixed = _Mix.apply(coefficients, flat, residuals)
        return mixed.unflatten(1, mean.shape)

    def sample_kernels(self, x: torch.Tensor) -> torch.Tensor:
        """The kernel of each sample at the current temperature; the schedule is not advanced.

        Args:
            x: Input (batch, in_channels, height, width).

        Returns:
            Kernels (batch, out_channels, in_channels/groups, kh, kw); without the batch if the input has none.
        """
        if x.dim() == 3:
            return self.sample_kernels(x.unsqueeze(0)).squeeze(0)
        with autocast_disabled(self.weight.device.type):
            coefficients = self._coefficients(x, self.current_temperature())
            return self._mix(coefficients, self.weight, self.residual_weight)

    def branch_form(self) -> Callable[..., torch.Tensor]:
        stacks, temperature = self._stacks(), self.current_temperature()

        def function(x: torch.Tensor) -> torch.Tensor:
            """The paper's formula: attention mixes all K kernels and biases for each sample of a batch."""
            attention = (self.attention(x.mean((2, 3))) / temperature).softmax(1)
            mixed = {name: torch.tensordot(attention, stack, 1) for name, stack in stacks.items()}
            biases = mixed.get('bias', [None] * len(x))
            return torch.cat([self._convolve(*sample) for sample in zip(x.split(1), mixed['weight'], biases)])

        return function

    def equivalent_kernel(self) -> torch.Tensor:
        """Not possible: the kernel depends on the input.

        Raises:
            ReparamError: always.
        """
        raise ReparamError(
            'DynamicConv2d: the kernel depends on the input, so no single kernel is equivalent; use sample_kernels(x) '
            'for the kernels of a batch, or fuse() for the form for inference'
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Convolve each sample of (batch, in_channels, height, width) with its own kernel."""
        if not torch.jit.is_scripting():
            if is_symbolic(input):
                return fx_leaf(self, input)
        x = input
        unbatched = x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        temperature = self._next_temperature()
        if torch.jit.is_scripting():
            coefficients = self._coefficients(x, temperature)
        else:
            with autocast_disabled(self.weight.device.type):
                coefficients = self._coefficients(x, temperature)
        if self._is_static():
            y = self._mix_outputs(x, coefficients)
        elif not self._has_few_positions(x):
            y = self._mix_kernels(x, coefficients)
        elif self._is_pointwise() and self.groups == 1:
            y = self._mix_outputs_1x1(x, coefficients)
        else:
            y = self._mix_outputs(x, coefficients)
        return y.squeeze(0) if unbatched else y

    def _is_static(self) -> bool:
        """Whether the graph of this forward pass has to be the same for every batch size."""
        if torch.jit.is_scripting():
            return self.exportable
        # a trace takes the groups of a convolution for constants, and so the samples of a convolution of all samples
        is_traced = torch.jit.is_tracing() and not self._is_pointwise()
        return self.exportable or torch.onnx.is_in_onnx_export() or is_traced

    def _is_pointwise(self) -> bool:
        return self.kernel_size == (1, 1) and max(self._reversed_padding_repeated_twice) == 0

    def _has_few_positions(self, x: torch.Tensor) -> bool:
        """Whether it takes less time to mix outputs than kernels.

        Kernels for each sample cost time for each of their elements, K outputs for each element and output position.
        """
        if x.shape[0] == 0:  # no convolution has 0 groups
            return True
        if x.shape[0] == 1 or self.groups == self.in_channels:  # one kernel, or kernels of few elements
            return False
        positions = (x.shape[2] // self.stride[0]) * (x.shape[3] // self.stride[1])
        # measured by tests/benchmarks/dynamic_conv.py; a kernel larger than 1x1 costs more for each sample
        return positions <= (12 if self.kernel_size == (1, 1) else 49)

    def _mix_outputs(self, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """K convolutions of the whole batch, the K-1 with the residuals as one."""
        y = self._convolve(x, self.weight, self.bias)
        # (groups, K-1, output channels of a group, ..), the order of the groups of a convolution; a view if it has one
        order = (self.num_kernels - 1, self.groups, self.out_channels // self.groups)
        residuals = self.residual_weight.unflatten(0, order).transpose(0, 1).flatten(0, 2)
        biases = self.residual_bias
        if biases is not None:
            biases = biases.unflatten(0, order).transpose(0, 1).flatten()
        changes = self._convolve(x, residuals, biases)
        height, width = y.shape[2], y.shape[3]
        changes = changes.unflatten(1, (order[1], order[0], order[2])).flatten(3)
        change = torch.matmul(coefficients.to(y.dtype)[:, None, None, :], changes)
        return y + change.view(-1, self.out_channels, height, width)

    def _mix_outputs_1x1(self, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """The same with matrix products of all positions, for 1x1 kernels without groups."""
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        batch_size, in_channels, height, width = x.shape
        x = x.flatten(2).transpose(1, 2).reshape(batch_size * height * width, in_channels)
        y = F.linear(x, self.weight.flatten(1), self.bias)
        changes = F.linear(x, self.residual_weight.flatten(1), self.residual_bias)
        changes = changes.unflatten(1, (self.num_kernels - 1, self.out_channels))
        coefficients = coefficients.to(y.dtype).repeat_interleave(height * width, dim=0)
        y = torch.baddbmm(y.unsqueeze(1), coefficients.unsqueeze(1), changes)
        y = y.view(batch_size, height * width, self.out_channels).transpose(1, 2)
        return y.reshape(batch_size, self.out_channels, height, width)

    def _mix_kernels(self, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Mix the kernels: one convolution with a kernel for each sample."""
        if torch.jit.is_scripting():
            kernels, biases = self._mix_all(coefficients)
        else:
            with autocast_disabled(self.weight.device.type):
                kernels, biases = self._mix_all(coefficients)
        y = self._convolve_samples(x, kernels)
        if biases is not None:
            y = y + biases.to(y.dtype)[:, :, None, None]
        return y

    def _mix_all(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        kernels = self._mix(coefficients, self.weight, self.residual_weight)
        if self.bias is not None and self.residual_bias is not None:
            return kernels, self._mix(coefficients, self.bias, self.residual_bias)
        return kernels, None

    def _convolve_samples(self, x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        """Convolve sample b of x with kernels[b]."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        padding = (top, left)
        if self.tf_same:
            # timm declares lists
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)  # type: ignore[arg-type]
            padding = (0, 0)
        elif self.padding_mode != 'zeros' or (left, top) != (right, bottom) or self._pads_itself(x):
            mode = 'constant' if self.padding_mode == 'zeros' else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            padding = (0, 0)
        batch_size, in_channels, height, width = x.shape
        if self.kernel_size == (1, 1) and padding == (0, 0):  # padded above, if at all
            # a matrix product for each sample, much faster than a convolution of batch * groups groups
            x = x[:, :, :: self.stride[0], :: self.stride[1]]
            height, width = x.shape[2], x.shape[3]
            x = x.reshape(batch_size, self.groups, in_channels // self.groups, height * width)
            kernels = kernels.reshape(batch_size, self.groups, self.out_channels // self.groups, x.shape[2])
            return torch.matmul(kernels, x).view(batch_size, self.out_channels, height, width)
        # the samples side by side as groups of one convolution
        x = x.reshape(1, batch_size * in_channels, height, width)
        kernels = kernels.flatten(0, 1)
        y = F.conv2d(x, kernels, None, self.stride, padding, self.dilation, batch_size * self.groups)
        return y.view(batch_size, self.out_channels, y.shape[2], y.shape[3])

    def _pads_itself(self, x: torch.Tensor) -> bool:
        """Whether to pad before the convolution of all samples, on a map smaller than the kernel.

        With the padding left to it, the backward pass of torch's 3x3 convolution takes 5 to 9 times as long on the CPU.
        """
        small = x.shape[2] < self.kernel_size[0] or x.shape[3] < self.kernel_size[1]
        return small and x.device.type == 'cpu'

    @torch.no_grad()
    def fuse(self) -> 'DynamicConv2d':
        """The form for inference, with the current temperature folded into fc2; the layer itself is left as it was.

        Returns:
            A fresh DynamicConv2d without a schedule, with the same device, dtype and mode.
        """
        # from a copy, because a parametrisation computes some of it, and changes perhaps as it is read in training
        source, like = float64_copy(self).eval(), next(self.parameters())
        layer = type_before_parametrizations(self)(
            **conv_arguments(source),
            device='meta',
            dtype=like.dtype,
            num_kernels=self.num_kernels,
            reduction=self.reduction,
            temperature=None,
        )
        vars(layer).update(self.added_attributes())
        materialize(layer, like.device)
        layer.tf_same = self.tf_same
        layer.exportable = self.exportable
        parameters = dict(self.named_parameters())
        trainable = any(parameter.requires_grad for parameter in parameters.values())
        for name, new in layer.named_parameters():
            owner, _, part = name.rpartition('.')
            value = getattr(source.get_submodule(owner), part)  # no entry of the state dict, where it is parametrised
            if owner == 'attention.fc2':  # all that changes
                value = value / source.current_temperature()
            new.copy_(value)
            new.requires_grad_(parameters[name].requires_grad if name in parameters else trainable)
        return layer.train(self.training)

    @torch.no_grad()
    def scale_outputs(self, scale: torch.Tensor, shift: torch.Tensor) -> None:
        """Make the layer give ``scale * y + shift``, as a BatchNorm in evaluation makes of y; rounded once.

        Every kernel and every bias is scaled, and the shift, which is the same for all kernels since the attention sums
        to one, goes into the mean bias. The parameters become new ones.

        Args:
            scale: Scale of each output channel, (out_channels,), in float64.
            shift: What is added to each output channel, likewise.
        """

        def new(value: torch.Tensor) -> nn.Parameter:
            weight = self.weight
            return nn.Parameter(value.to(weight.device, weight.dtype), weight.requires_grad)

        zeros = torch.zeros_like(shift)
        mean_bias = zeros if self.bias is None else self.bias.to(scale)
        residuals = self.num_kernels - 1
        residual_bias = zeros.repeat(residuals) if self.residual_bias is None else self.residual_bias.to(scale)
        scales = scale.repeat(residuals)
        self.residual_bias = new(residual_bias * scales)
        self.residual_weight = new(self.residual_weight.to(scale) * scales[:, None, None, None])
        self._parameters['bias'] = new(mean_bias * scale + shift)  # where there was none, too
        self.weight = new(self.weight.to(scale) * scale[:, None, None, None])

    def extra_repr(self) -> str:
        schedule = 'None' if self.temperature is None else f'{self.temperature:g}'
        options = f'num_kernels={self.num_kernels}, reduction={self.reduction}, temperature={schedule}'
        return f'{super().extra_repr()}, {options}'


def _softmax(logits: torch.Tensor) -> torch.Tensor:
    """Softmax of the last dimension."""
    if torch.jit.is_scripting() or not is_transforming([logits]):
        return logits.softmax(-1)
    # written out, because no gradient flows back through the forward mode of torch's own
    exponentials = (logits - logits.amax(-1, keepdim=True).detach()).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def _check_integer(name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ReparamError(f'DynamicConv2d: {name} must be an integer of at least {at_least}, got {value!r}')
