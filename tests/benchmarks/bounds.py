"""What a training step has to cost at least: work counted, against ceilings measured on the same machine.

    python tests/benchmarks/bounds.py
    python tests/benchmarks/bounds.py --setting 32x64 --runs 20

For each variant of the README's table, and each setting, one interleaved run gives the step as a multiple of the stock
backbone's. Beside it stand two bounds, the stock step plus what the method adds: its multiply-adds, and the bytes that
it has to move beyond the stock step, these at the rate of a copy of a large tensor.

    ideal     multiply-adds at the rate at which the stock step does its own
    torch     those that are no convolution of the stock kind at the rate of torch's own operations for them, alone and
              repeated: the batched products of 18-wide matrices of DO-Conv, the depthwise convolutions of RefConv, the
              thin kernels' strided additions, the products that mix kernels or outputs, the attention's layers

Bytes are counted as whole passes over a tensor, which nothing avoids that runs one operation after the other:

    doconv         kernel read and written; gradient and kernel read, gradient written
    refconv        base read, kernel written; gradient and base read
    acconv, none   kernel read and written; two thin kernels with gradient, momentum and update
    acconv, batch  of each branch: output read for its variance, read and added to the sum; in the backward pass output
                   and gradient read for the sums, read again and its gradient written; the input's gradient added
    dyconv         of each sample's kernel: written and read; read again for the input's gradient, its own gradient
                   written and read twice, for the attention and the residuals. Or, of K outputs for the sample's
                   kernel, where that is less. And the input read for its mean, whose gradient is added to the input's
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from training_step import ROWS, build_models, environment, setting

from timm_reparam import is_variant
from timm_reparam._measure import time_interleaved
from timm_reparam.profile import compare_profiles

FLOAT = 4  # bytes


@dataclass
class Work:
    """What a method adds to a training step.

    Args:
        macs: Multiply-adds.
        numbers: Numbers read or written.
        composition: Seconds that torch's own operation takes for these multiply-adds, if it is another than stock's.
    """

    macs: float = 0
    numbers: float = 0
    composition: float | None = None

    def __iadd__(self, other: 'Work') -> 'Work':
        self.macs += other.macs
        self.numbers += other.numbers
        if other.composition is not None:
            self.composition = (self.composition or 0) + other.composition
        return self


def seconds(function: Callable[[], object]) -> float:
    """Median time of a function's runs after the first."""
    return statistics.median(time_interleaved([function], runs=9, warmup=1)[0])


def do_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    kernel, area = layer.weight.numel(), layer.weight[0, 0].numel()
    channels = layer.in_channels // 2  # a product for two input channels, half of whose numbers are zero
    if layer.groups > 1 or layer.in_channels % 2 == 1:
        return Work(3 * kernel * area, 5 * kernel, 0)
    columns, transform = torch.randn(channels, len(layer.weight), 2 * area), torch.randn(channels, 2 * area, 2 * area)
    gradient = columns.transpose(1, 2)
    composition = 2 * seconds(lambda: torch.bmm(columns, transform)) + seconds(lambda: torch.bmm(gradient, columns))
    return Work(3 * kernel * area, 5 * kernel, composition)


def ref_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    kernel, maps = layer.weight.numel(), layer.map_weight.detach().requires_grad_()
    image = torch.randn(1, layer.weight[:, :, 0, 0].numel(), *layer.kernel_size)
    groups, padding = len(maps) // maps.shape[1], [side // 2 for side in maps.shape[2:]]

    @torch.enable_grad()
    def compose() -> None:
        change = F.conv2d(image, maps, padding=padding, groups=groups)
        torch.autograd.grad(change, maps, image)

    return Work(2 * kernel * maps[0].numel(), 4 * kernel, seconds(compose))


def ac_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    thin = layer.vertical_weight.numel() + layer.horizontal_weight.numel()
    updated = 7 * thin  # gradient written and read, momentum and weight read and written, read by the layer
    if layer.branch_norm == 'none':
        kernel, *thin_kernels = (
            weight.detach() for weight in (layer.weight, layer.vertical_weight, layer.horizontal_weight)
        )

        def compose() -> None:
            composed = kernel.clone()
            places = composed[..., kernel.shape[3] // 2 :][..., :1], composed[:, :, kernel.shape[2] // 2 :][:, :, :1]
            for place, thin_kernel in zip(places, thin_kernels):
                place += thin_kernel
                place.contiguous()  # as the thin kernel's gradient is taken out of the kernel's

        return Work(0, 2 * layer.weight.numel() + updated, seconds(compose))
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    return Work(3 * positions * thin, 2 * (1 + 3 + 2 + 3) * y.numel() + 2 * 3 * x.numel() + updated)


def dynamic_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    residuals, kernel, samples = layer.num_kernels - 1, layer.weight.numel(), len(y)
    updated = 6 * residuals * kernel
    positions = samples * y.shape[2] * y.shape[3]
    mixed_kernels = Work(3 * layer.num_kernels * samples * kernel, 6 * samples * kernel + updated)
    mixed_outputs = Work(3 * residuals * positions * kernel, 6 * layer.num_kernels * y.numel() + updated)
    work = min(mixed_kernels, mixed_outputs, key=lambda work: work.numbers)
    if work is mixed_kernels:
        left, right = torch.randn(samples, layer.num_kernels), torch.randn(layer.num_kernels, kernel)
    else:
        left, right = torch.randn(positions, x.shape[1]), torch.randn(x.shape[1], residuals * kernel // x.shape[1])
    gradient = torch.randn(len(left), right.shape[1])
    work.composition = seconds(lambda: (left @ right, gradient @ right.t(), left.t() @ gradient))

    pooled = torch.randn(samples, layer.in_channels, requires_grad=True)
    weights = list(layer.attention.parameters())

    @torch.enable_grad()
    def attend() -> None:
        torch.autograd.grad(layer.attention(pooled).softmax(1)[:, 0].sum(), [pooled, *weights])

    work += Work(3 * samples * sum(weight.numel() for weight in weights), 3 * x.numel(), seconds(attend))
    return work


COUNTED: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Work]] = {
    'DOConv2d': do_conv,
    'RefConv2d': ref_conv,
    'ACConv2d': ac_conv,
    'DynamicConv2d': dynamic_conv,
}


def count(model: nn.Module, images: torch.Tensor) -> Work:
    """Count what the variant layers of a model add to a step with these images."""
    work, handles = Work(), []

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal work
        work += COUNTED[type(layer).__name__](layer, inputs[0], output)

    for layer in model.modules():
        if is_variant(layer):
            handles.append(layer.register_forward_hook(hook))
    with torch.no_grad():
        model.eval()(images)
    for handle in handles:
        handle.remove()
    return work


def step_macs(model: nn.Module, images: torch.Tensor) -> float:
    """Multiply-adds of a forward and a backward pass."""
    with FlopCounterMode(display=False) as counter:
        model.train()(images).sum().backward()
    return counter.get_total_flops() / 2


def copy_rate(megabytes: int = 128) -> float:
    """Bytes that a copy of a large tensor reads and writes a second."""
    source = torch.zeros(megabytes * 2**20 // FLOAT)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description='What a training step has to cost at least, and what it costs.')
    parser.add_argument('--setting', nargs='+', type=setting, default=[(32, 64), (16, 128)], metavar='BATCHxPIXELS')
    parser.add_argument('--runs', type=int, default=20, metavar='N', help='timed rounds (default: 20)')
    args = parser.parse_args()
    facts = environment('cpu')
    for key in ('cpu', 'threads', 'torch', 'timm'):
        print(f'{key}: {facts[key]}')
    warnings.simplefilter('ignore')  # RefConv's base is random here: it is timed, not trained
    for backbone in ROWS:
        for batch_size, pixels in args.setting:
            torch.manual_seed(0)
            images = torch.randn(batch_size, 3, pixels, pixels)
            models = {name: build() for name, build in build_models(backbone, {}, dict(num_classes=10)).items()}
            stock, *variants = models.values()
            profiles = compare_profiles(
                stock,
                *variants,
                names=list(models),
                train=True,
                runs=args.runs,
                batch_size=batch_size,
                input_size=tuple(images.shape[1:]),
            )
            assert profiles[0].step_ms is not None
            step = profiles[0].step_ms / 1e3
            mac_rate, byte_rate = step_macs(stock, images) / step, copy_rate()
            print(
                f'\n{backbone}, batch of {batch_size} ({pixels} px): {step * 1e3:.0f} ms,'
                f' {mac_rate / 1e9:.1f} GMAC/s; a copy moves {byte_rate / 1e9:.1f} GB/s'
            )
            print(f'{"":<40} {"step":>12}  {"ideal":>6} {"torch":>6} {"MMACs":>8} {"MB":>8}')
            for model, profile in zip(variants, profiles[1:]):
                work = count(model, images)
                moving = FLOAT * work.numbers / byte_rate
                ideal = work.macs / mac_rate
                composing = ideal if work.composition is None else work.composition
                bounds = [1 + (moving + computing) / step for computing in (ideal, composing)]
                print(
                    f'{profile.name:<40} {profile.step_ratio:>5.2f} ± {profile.step_ratio_spread / 2:.2f}'
                    f'  {bounds[0]:>6.2f} {bounds[1]:>6.2f} {work.macs / 1e6:>8.0f} {FLOAT * work.numbers / 1e6:>8.0f}',
                    flush=True,
                )


if __name__ == '__main__':
    main()
