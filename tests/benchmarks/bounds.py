"""What a training step has to cost at least: work counted, against ceilings measured on the same machine.

    python tests/benchmarks/bounds.py
    python tests/benchmarks/bounds.py --setting 32x64 --runs 20

For each variant of the README's table, and each setting, one interleaved run gives the step as a multiple of the stock
backbone's. Beside it stand two bounds, the stock step plus what the method adds:

    ideal     multiply-adds at the rate at which the stock step does its own, and bytes that are moved beyond the stock
              step at the rate of a copy of a large tensor
    torch     what is no convolution of the stock kind at the rate of torch's own operations for it instead, these
              without autograd and into memory that is there, layer after layer, so that their operands are not in the
              cache: the batched products of 18-wide matrices of DO-Conv and their additions to a kernel of another
              order, the depthwise convolutions of RefConv, the thin convolutions of AC's branches, or the copy and the
              strided additions of its thin kernels; for dynamic convolution the attention, and the products that mix
              and apply kernels, less the convolutions that they take the place of

Bytes are counted as whole passes over a tensor, which nothing avoids that runs one operation after the other:

    doconv         kernel read and written; gradient and kernel read, gradient written
    refconv        base read, kernel written; gradient and base read
    acconv, none   kernel read and written; two thin kernels with gradient, momentum and update
    acconv, batch  of each branch: output read for its variance, read and added to the sum; in the backward pass output
                   and gradient read for the sums, read again and its gradient written; the input's gradient added
    dbbconv, batch the same of each branch; the mean of each window written and read, forward and backward; the kernel
                   of the sequential branch composed, or its two convolutions where that is less
    acconv, dbbconv scale, orepaconv
                   stock kernel read, each branch's kernel of full size read and written once, and their sum; in the
                   backward pass the gradient and each of these kernels read, for the factors, and its gradient written
    dyconv         of each sample's kernel: written and read; read again for the input's gradient, its own gradient
                   written and read twice, for the attention and the residuals. Or, of K outputs for the sample's
                   kernel, where that is less. And the input read for its mean, whose gradient is added to the input's
"""

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
WEIGHT_ONLY = [False, True, False]
convolution_backward = torch.ops.aten.convolution_backward


@dataclass
class Work:
    """What a method adds to a training step.

    Args:
        macs: Multiply-adds.
        numbers: Numbers read or written.
        operations: torch's own operations for these, where the stock step has none of their kind.
        remaining: Numbers that the operations do not read or write, all if there are none.
        replaced: Operations of the stock step that are not run.
    """

    macs: float = 0
    numbers: float = 0
    operations: list[Callable[[], object]] = field(default_factory=list)
    remaining: float | None = None
    replaced: list[Callable[[], object]] = field(default_factory=list)

    def __iadd__(self, other: 'Work') -> 'Work':
        self.macs += other.macs
        self.numbers += other.numbers
        self.operations += other.operations
        self.remaining = (self.remaining or 0) + (other.numbers if other.remaining is None else other.remaining)
        self.replaced += other.replaced
        return self

    def ideal(self, mac_rate: float, byte_rate: float) -> float:
        """Seconds at these rates, multiply-adds and bytes a second."""
        return self.macs / mac_rate + FLOAT * self.numbers / byte_rate

    def with_operations(self, mac_rate: float, byte_rate: float) -> float:
        """Seconds with torch's own operations."""
        if not self.operations:
            return self.ideal(mac_rate, byte_rate)
        assert self.remaining is not None
        rounds = time_interleaved([lambda: run_all(self.operations), lambda: run_all(self.replaced)], runs=15, warmup=1)
        added = statistics.median(ours - stock for ours, stock in zip(*rounds))
        return added + FLOAT * self.remaining / byte_rate


def seconds(function: Callable[[], object]) -> float:
    """Median time of a function's runs after the first."""
    return statistics.median(time_interleaved([function], runs=9, warmup=1)[0])


def run_all(operations: list[Callable[[], object]]) -> None:
    """Run operations one after the other."""
    for operation in operations:
        operation()


def do_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    weight, area = layer.weight.detach(), layer.weight[0, 0].numel()
    work = Work(3 * weight.numel() * area, 5 * weight.numel())
    if layer.groups > 1 or layer.in_channels % 2 == 1:
        return work
    # a product for two input channels, half of whose numbers are zero, on parameters as stock lays them out
    columns = weight.view(len(weight), -1, 2 * area).transpose(0, 1)
    transform = torch.randn(len(columns), 2 * area, 2 * area)
    composed, gradient = torch.empty_like(weight), torch.empty_like(transform)
    place = composed.view(len(weight), -1, 2 * area).transpose(0, 1)

    def compose() -> None:
        for _ in ('forward', 'backward'):
            torch.add(columns, torch.bmm(columns, transform), out=place)
        torch.bmm(columns.transpose(1, 2), place, out=gradient)

    work.operations, work.remaining = [compose], 0
    return work


def ref_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    kernel, maps = layer.weight.numel(), layer.map_weight.detach()
    image = torch.randn(1, layer.weight[:, :, 0, 0].numel(), *layer.kernel_size)
    groups, padding = len(maps) // maps.shape[1], [side // 2 for side in maps.shape[2:]]

    def compose() -> None:
        change = F.conv2d(image, maps, padding=padding, groups=groups)
        convolution_backward(change, image, maps, None, [1, 1], padding, [1, 1], False, [0, 0], groups, WEIGHT_ONLY)

    return Work(2 * kernel * maps[0].numel(), 4 * kernel, [compose], 0)


def ac_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    thin = layer.vertical_weight.numel() + layer.horizontal_weight.numel()
    updated = 7 * thin  # gradient written and read, momentum and weight read and written, read by the layer
    if layer.branch_norm == 'scale':
        moved = updated + 5 * layer.weight.numel()
        return Work(0, moved, [], moved)
    if layer.branch_norm == 'batch':
        positions = y.shape[0] * y.shape[2] * y.shape[3]
        moved = 2 * (1 + 3 + 2 + 3) * y.numel() + 2 * 3 * x.numel() + updated
        top, left = layer.padding
        branches = (layer.vertical_weight.detach(), [top, 0]), (layer.horizontal_weight.detach(), [0, left])
        convolutions = [partial(convolve, layer, x, weight, y, padding) for weight, padding in branches]
        return Work(3 * positions * thin, moved, convolutions, moved)
    kernel = layer.weight.detach()
    composed, (rows, columns) = torch.empty_like(kernel), kernel.shape[2:]
    places = composed.narrow(3, columns // 2, 1), composed.narrow(2, rows // 2, 1)
    thin_kernels = layer.vertical_weight.detach(), layer.horizontal_weight.detach()
    gradients = [torch.empty_like(weight) for weight in thin_kernels]

    def compose() -> None:
        composed.copy_(kernel)
        for place, weight, gradient in zip(places, thin_kernels, gradients):
            place.add_(weight)
            gradient.copy_(place)  # as it is taken out of the kernel's

    return Work(0, 2 * kernel.numel() + updated, [compose], updated - 2 * thin)


def dbb_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    inner, outer = layer.inner_weight.detach(), layer.outer_weight.detach()
    pointwise = [] if layer.point_weight is None else [layer.point_weight.detach(), layer.mean_weight.detach()]
    updated = 7 * (inner.numel() + outer.numel() + sum(weight.numel() for weight in pointwise))
    product, macs = product_of(inner, outer, layer.groups)
    kernel = layer.weight.detach()
    if layer.branch_norm == 'scale':
        return Work(macs, updated + 9 * kernel.numel(), [product], updated + 9 * kernel.numel())
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    two = x.shape[0] * x.shape[2] * x.shape[3] * inner.numel() < outer.numel() * inner.shape[1]
    if two:
        product, macs = (
            partial(convolve, layer, x, inner, x[:, : len(inner)], [0, 0], [1, 1]),
            3 * x.numel() * inner[0].numel(),
        )
    branches = 1 + len(pointwise) // 2
    moved = (1 + branches) * (9 * y.numel() + 3 * x.numel()) + 4 * x.numel() + updated
    window, averaged = torch.full((x.shape[1], 1, *layer.kernel_size), 0.1), y[:, :1].expand(-1, x.shape[1], -1, -1)
    averaged = averaged.contiguous()
    operations = [product, partial(convolve, layer, x, kernel, y), partial(convolve, layer, x, window, averaged)]
    macs += 3 * positions * (kernel.numel() + sum(w.numel() for w in pointwise)) + 2 * positions * window.numel()
    if pointwise:
        operations.append(partial(convolve, layer, averaged, pointwise[1], y, [0, 0], [1, 1]))
        operations.append(partial(convolve, layer, x, pointwise[0], y, [0, 0]))
    return Work(macs, moved, operations, moved)


def orepa_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    kernel = layer.weight.numel()
    updated = 7 * sum(parameter.numel() for parameter in layer.parameters()) - 7 * kernel
    if layer.first_weight is not None:
        product, macs = product_of(layer.first_weight.detach(), layer.second_weight.detach(), layer.groups)
        return Work(macs, updated + 9 * kernel, [product], updated + 9 * kernel)
    product, macs = product_of(layer.inner_weight.detach(), layer.outer_weight.detach(), layer.groups)
    maps, windows = (
        torch.randn(layer.out_channels, kernel // layer.out_channels // 9, 2),
        torch.randn(layer.out_channels, 2, 9),
    )
    pointwise = torch.randn(x.shape[1], layer.out_channels // layer.groups, 8)
    depthwise = torch.randn(x.shape[1], 8, 9)
    both = [(maps, windows), (pointwise, depthwise)]

    def spread() -> None:
        for left, right in both:
            composed = torch.bmm(left, right)
            torch.bmm(composed, right.transpose(1, 2))
            torch.bmm(left.transpose(1, 2), composed)

    macs += 3 * kernel * (2 + 8)
    # stock, sequential, spread and separable kernels
    moved = updated + (1 + 3 * 2 + 1 + 4 * 2) * kernel
    return Work(macs, moved, [product, spread], moved)


def product_of(inner: torch.Tensor, outer: torch.Tensor, groups: int) -> tuple[Callable[[], None], int]:
    """The kernel of a 1x1 and the convolution behind it, forward and backward; and its multiply-adds."""
    taps = torch.randn(groups, outer.numel() // outer.shape[1] // groups, outer.shape[1])
    maps = inner.reshape(groups, outer.shape[1], inner.shape[1])

    def compose() -> None:
        composed = torch.bmm(taps, maps)
        torch.bmm(composed, maps.transpose(1, 2))
        torch.bmm(taps.transpose(1, 2), composed)

    return compose, 3 * outer.numel() * inner.shape[1]


def dynamic_conv(layer: Any, x: torch.Tensor, y: torch.Tensor) -> Work:
    residuals, kernel, samples = layer.num_kernels - 1, layer.weight.numel(), len(y)
    updated = 6 * residuals * kernel
    positions = samples * y.shape[2] * y.shape[3]
    mixed_kernels = Work(3 * layer.num_kernels * samples * kernel, 6 * samples * kernel + updated)
    mixed_outputs = Work(3 * residuals * positions * kernel, 6 * layer.num_kernels * y.numel() + updated)
    work = min(mixed_kernels, mixed_outputs, key=lambda work: work.numbers)
    work.operations = [min(ways_of_mixing(layer, x, y), key=seconds)]
    work.remaining = updated
    weight = layer.weight.detach()
    work.replaced = [partial(convolve, layer, x, weight, y)]

    pooled, scores = torch.randn(samples, layer.in_channels), torch.randn(samples, layer.num_kernels)
    first, second = layer.attention.fc1.weight.detach(), layer.attention.fc2.weight.detach()

    def attend() -> None:
        hidden = F.linear(pooled, first).relu_()
        F.linear(hidden, second).softmax(1)
        gradient = scores @ second
        scores.t() @ hidden, gradient.t() @ pooled, gradient @ first

    macs = 3 * samples * (first.numel() + second.numel())
    work += Work(macs, 3 * x.numel(), [attend], 3 * x.numel())
    return work


def ways_of_mixing(layer: Any, x: torch.Tensor, y: torch.Tensor) -> list[Callable[[], object]]:
    """A layer's convolutions, forward and backward, by mixing kernels and, where they are 1x1, by mixing outputs."""
    samples, count, shape = len(x), layer.num_kernels, layer.weight.shape
    kernels, coefficients = torch.randn(count, layer.weight.numel()), torch.randn(samples, count)
    mixed, gradients = torch.empty(samples, kernels.shape[1]), torch.empty_like(kernels)
    pointwise = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
    padded = any(size < side for size, side in zip(x.shape[2:], layer.kernel_size))  # faster there
    columns, out = x.flatten(2), y.flatten(2)
    results = [torch.empty_like(values) for values in (mixed, columns, out)]

    def mix_kernels() -> None:
        torch.mm(coefficients, kernels, out=mixed)
        if pointwise:
            each = mixed.view(samples, *shape[:2])
            torch.bmm(each, columns, out=results[2])
            torch.bmm(each.transpose(1, 2), out, out=results[1])
            torch.bmm(out, columns.transpose(1, 2), out=results[0].view_as(each))
        else:
            all_x, all_y = x.reshape(1, -1, *x.shape[2:]), y.view(1, -1, *y.shape[2:])
            if padded:
                all_x = F.pad(all_x, layer._reversed_padding_repeated_twice)
            convolve(layer, all_x, mixed.view(-1, *shape[1:]), all_y, [0, 0] if padded else None)
        torch.mm(coefficients.t(), results[0], out=gradients)
        results[0] @ kernels.t()

    if not pointwise:
        return [mix_kernels]
    rows, all_kernels = columns.transpose(1, 2).reshape(-1, shape[1]), kernels.view(-1, shape[1])
    all_outputs, rows_out = torch.empty(len(rows), len(all_kernels)), torch.empty_like(rows)

    def mix_outputs() -> None:
        torch.mm(rows, all_kernels.t(), out=all_outputs)
        torch.mm(all_outputs, all_kernels, out=rows_out)
        torch.mm(all_outputs.t(), rows, out=gradients.view_as(all_kernels))

    return [mix_kernels, mix_outputs]


def convolve(
    layer: Any,
    x: torch.Tensor,
    kernel: torch.Tensor,
    gradient: torch.Tensor,
    padding: list[int] | None = None,
    stride: list[int] | None = None,
) -> None:
    """A convolution with a layer's settings, groups as the kernel needs them, and its backward pass."""
    padding, groups = list(layer.padding) if padding is None else padding, x.shape[1] // kernel.shape[1]
    stride = list(layer.stride) if stride is None else stride
    F.conv2d(x, kernel, None, stride, padding, layer.dilation, groups)
    settings = stride, padding, list(layer.dilation), False, [0, 0], groups, [True, True, False]
    convolution_backward(gradient, x, kernel, None, *settings)


COUNTED: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Work]] = {
    'DBBConv2d': dbb_conv,
    'DOConv2d': do_conv,
    'OREPAConv2d': orepa_conv,
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
                with torch.no_grad():
                    costs = work.ideal(mac_rate, byte_rate), work.with_operations(mac_rate, byte_rate)
                bounds = [1 + cost / step for cost in costs]
                print(
                    f'{profile.name:<40} {profile.step_ratio:>5.2f} ± {profile.step_ratio_spread / 2:.2f}'
                    f'  {bounds[0]:>6.2f} {bounds[1]:>6.2f} {work.macs / 1e6:>8.0f} {FLOAT * work.numbers / 1e6:>8.0f}',
                    flush=True,
                )


if __name__ == '__main__':
    main()
