"""Dynamic convolution: attention over convolution kernels

Paper: `Dynamic Convolution: Attention over Convolution Kernels` - https://arxiv.org/abs/1912.03458
(no official code; this is an implementation of our own, from the paper)

                       +-> pool -> fc1 -> relu -> fc2 -> softmax(. / T) = pi ---+
                       |                                                        |
    x (B, I, H, W) ----+----------------> convolution of each sample with  W + sum_k (pi_k - pi_K) R_k ----> y

    start:  fc2 = 0, so pi is uniform, every coefficient is 0 and every sample's kernel is W, bit for bit
"""

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import is_exportable
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import type_before_parametrizations

from ..errors import ReparamError
from ._base import Method, PaddingMode, conv_arguments
from ._per_sample import PerSampleConv2d
from ._temperature import TemperatureSchedule, check_integer
from ._tensor import (
    autocast_disabled,
    fast_uniform_,
    float64_copy,
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


class DynamicConv2d(TemperatureSchedule, PerSampleConv2d):
    """Dynamic convolution, ``y_b = (sum_k pi_k(x_b) W_k) * x_b + sum_k pi_k(x_b) b_k`` for each sample b.

    K kernels are mixed by an attention ``pi(x) = softmax(fc2(relu(fc1(avgpool(x)))) / T)``. Held as the mean kernel
    `weight` (the plain convolution's name and shape) and K-1 residuals R_k, ``W_k = W + R_k`` and
    ``W_K = W - sum R_k``, stacked in `residual_weight` ((K-1) * out_channels, in_channels/groups, kh, kw): since the
    attention sums to one, the sample's kernel is ``W + sum_k (pi_k - pi_K) R_k``. Biases are held likewise.

    The temperature falls linearly from `temperature` to 1 over `temperature_steps` training-mode forward passes of this
    layer, in any training loop, and stays there; evaluation uses the current temperature. A pass that gradient
    checkpointing repeats counts once, and one under ``torch.no_grad`` does not count. Position and length are buffers,
    so the schedule is saved, moved and resumed with the model. With ``temperature=None`` there is no schedule and
    T = 1: the form for inference.

    The kernel depends on the input, so there is no equivalent kernel; :meth:`fuse` gives the form for inference.

    The layer mixes kernels or outputs, whichever is faster on the input. Built under timm's ``set_exportable(True)``
    (``create_model(..., exportable=True)``), and in any export to ONNX, it always mixes outputs, which is a graph of
    fixed shape; so it does in ``torch.jit.trace``, 1x1 kernels aside.

    Paper: `Dynamic Convolution: Attention over Convolution Kernels` - https://arxiv.org/abs/1912.03458

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``; with `bias` there are K biases.
        num_kernels: K, the number of kernels.
        reduction: The attention's hidden layer has in_channels // reduction features (at least 4).
        temperature: T at the start, at least 1, or None for no schedule.
        temperature_steps: Training-mode forward passes until T is 1.

    Raises:
        ReparamError: an option out of its range.
    """

    method = _METHOD
    input_dependent = True

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
        check_integer('DynamicConv2d', 'num_kernels', num_kernels, 2)
        check_integer('DynamicConv2d', 'reduction', reduction, 1)
        self.check_schedule('DynamicConv2d', temperature, temperature_steps)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        factory = dict(device=device, dtype=dtype)
        self.num_kernels = num_kernels
        self.reduction = reduction
        self.exportable = is_exportable()
        shape = self.weight.shape
        # 4-D, because model.to(memory_format=torch.channels_last) refuses 5-D parameters
        self.residual_weight = nn.Parameter(torch.empty((num_kernels - 1) * shape[0], *shape[1:], **factory))
        self.register_parameter('residual_bias', None)
        if bias:
            self.residual_bias = nn.Parameter(torch.empty((num_kernels - 1) * out_channels, **factory))
        self.attention = KernelAttention(
            in_channels, max(in_channels // reduction, _MIN_HIDDEN), num_kernels, device=device, dtype=dtype
        )
        self._add_schedule(temperature, temperature_steps, device)
        self._complete = True
        self._reset_variant_parameters('scratch')

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        return not is_stem

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
    def _init_variant_parameters(self, init: str) -> None:
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

    def _coefficients(self, x: torch.Tensor, temperature: torch.Tensor | None) -> torch.Tensor:
        """pi_k - pi_K, (batch, num_kernels - 1), in the parameters' dtype."""
        # not x.mean, whose gradient is a tensor of the input's size; in float32 at least, float16 is soon too small
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        pooled = x.sum((2, 3), dtype=wide) / (x.shape[2] * x.shape[3])
        logits = self.attention(pooled.to(self.weight.dtype))
        attention = _softmax(logits if temperature is None else logits / temperature)
        others, last = attention.split([self.num_kernels - 1, 1], dim=1)
        return others - last

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

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        unbatched = x.dim() == 3
        if unbatched:
            x = x.unsqueeze(0)
        temperature = self._next_temperature()
        if torch.jit.is_scripting():
            coefficients = self._coefficients(x, temperature)
        else:
            with autocast_disabled(self.weight.device.type):
                coefficients = self._coefficients(x, temperature)
        y = self._convolve_mixed(x, coefficients)
        return y.squeeze(0) if unbatched else y

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
