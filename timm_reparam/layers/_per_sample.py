"""One kernel for each sample, ``W + sum_k c_k R_k`` with coefficients c (batch, residuals), and how it is computed.

Either kernels are mixed: each sample is convolved with its own, by a matrix product for each sample where kernels are
1x1, elsewhere by one convolution with batch * groups groups, which for one image is an ordinary convolution. Or outputs
are mixed: those of the convolutions with W and every R_k. That is K times the arithmetic, but no kernel for each
sample, which is less where there are few output positions. Its graph has a fixed shape, so it is what an export takes.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ._base import ReparamConv2d
from ._tensor import autocast_disabled, is_tracing_or_transforming

__all__ = ['PerSampleConv2d']


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


class PerSampleConv2d(ReparamConv2d):
    """Base of the layers whose kernel depends on the sample.

    Attributes:
        num_kernels: K, one more than there are residuals.
        exportable: Whether the graph has to be the same for every batch size.
        residual_weight: The residuals R, stacked, ((K-1) * out_channels, in_channels/groups, kh, kw).
        residual_bias: Residuals of the bias, ((K-1) * out_channels,), or None.
    """

    __constants__ = [*ReparamConv2d.__constants__, 'exportable']
    num_kernels: int
    exportable: bool
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        residual_weight: torch.Tensor
        residual_bias: torch.Tensor | None

    def _convolve_mixed(self, x: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """Convolve each sample with its own kernel, the faster way."""
        if self._is_static():
            return self._mix_outputs(x, coefficients)
        if not self._has_few_positions(x):
            return self._mix_kernels(x, coefficients)
        if self._is_pointwise() and self.groups == 1:
            return self._mix_outputs_1x1(x, coefficients)
        return self._mix_outputs(x, coefficients)

    def _is_static(self) -> bool:
        """Whether the graph of this forward pass has to be the same for every batch size."""
        if torch.jit.is_scripting():
            return self.exportable
        if self.exportable or not (torch.jit.is_tracing() or torch.compiler.is_compiling()):
            return self.exportable
        # a trace takes the groups of a convolution for constants, and so the samples of a convolution of all samples
        return torch.onnx.is_in_onnx_export() or (torch.jit.is_tracing() and not self._is_pointwise())

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
        return self._convolve_samples(x, kernels, biases)

    def _mix_all(self, coefficients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        kernels = self._mix(coefficients, self.weight, self.residual_weight)
        if self.bias is not None and self.residual_bias is not None:
            return kernels, self._mix(coefficients, self.bias, self.residual_bias)
        return kernels, None

    def _convolve_samples(self, x: torch.Tensor, kernels: torch.Tensor, biases: torch.Tensor | None) -> torch.Tensor:
        """Convolve sample b of x with kernels[b], and add biases[b]."""
        if x.shape[0] == 1 and self.kernel_size != (1, 1):  # those are traced, for any batch size
            return self._convolve(x, kernels[0], None if biases is None else biases[0])
        if self._pads_itself(x):
            x, padding = self._pad(x), (0, 0)
        else:
            x, padding = self._pad_partly(x)
        if self.kernel_size == (1, 1) and padding == (0, 0):  # padded above, if at all
            return self._multiply_samples(x[:, :, :: self.stride[0], :: self.stride[1]], kernels.flatten(2), biases)
        # the samples side by side as groups of one convolution
        batch_size, in_channels, height, width = x.shape
        x = x.reshape(1, batch_size * in_channels, height, width)
        y = F.conv2d(x, kernels.flatten(0, 1), None, self.stride, padding, self.dilation, batch_size * self.groups)
        y = y.view(batch_size, self.out_channels, y.shape[2], y.shape[3])
        return y if biases is None else y + biases.to(y.dtype)[:, :, None, None]

    def _multiply_samples(self, x: torch.Tensor, kernels: torch.Tensor, biases: torch.Tensor | None) -> torch.Tensor:
        """Multiply sample b of x with kernels[b], (batch, out_channels, in_channels/groups), and add biases[b].

        Much faster than a convolution of batch * groups groups. Without groups the memory format is kept.
        """
        batch_size, in_channels, height, width = x.shape
        if self.groups > 1:
            x = x.reshape(batch_size, self.groups, in_channels // self.groups, height * width)
            kernels = kernels.reshape(batch_size, self.groups, self.out_channels // self.groups, x.shape[2])
            y = torch.matmul(kernels, x).view(batch_size, self.out_channels, height, width)
            return y if biases is None else y + biases.to(y.dtype)[:, :, None, None]
        if x.stride(1) == 1:
            rows = x.permute(0, 2, 3, 1).reshape(batch_size, height * width, in_channels)
            kernels = kernels.transpose(1, 2)
            y = torch.bmm(rows, kernels) if biases is None else torch.baddbmm(biases[:, None, :], rows, kernels)
            return y.view(batch_size, height, width, self.out_channels).permute(0, 3, 1, 2)
        columns = x.reshape(batch_size, in_channels, height * width)
        y = torch.bmm(kernels, columns) if biases is None else torch.baddbmm(biases[:, :, None], kernels, columns)
        return y.view(batch_size, self.out_channels, height, width)

    def _pads_itself(self, x: torch.Tensor) -> bool:
        """Whether to pad before the convolution of all samples, on a map smaller than the kernel.

        With the padding left to it, the backward pass of torch's 3x3 convolution takes 5 to 9 times as long on the CPU.
        """
        small = x.shape[2] < self.kernel_size[0] or x.shape[3] < self.kernel_size[1]
        return small and x.device.type == 'cpu'

    def _mix(self, coefficients: torch.Tensor, mean: torch.Tensor, residuals: torch.Tensor) -> torch.Tensor:
        """mean + sum_k coefficients_k residuals_k for each sample, (batch, *mean.shape)."""
        flat, residuals = mean.reshape(1, -1), residuals.reshape(self.num_kernels - 1, -1)
        if torch.jit.is_scripting() or not _Mix.is_faster(coefficients, flat, residuals):
            # not torch.addmm, which TorchScript takes apart, so that it would round otherwise
            mixed = torch.baddbmm(flat[None], coefficients[None], residuals[None])[0]
        else:
            mixed = _Mix.apply(coefficients, flat, residuals)
        return mixed.unflatten(1, mean.shape)
