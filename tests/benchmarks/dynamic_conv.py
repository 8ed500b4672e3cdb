"""Time of the ways in which DynamicConv2d computes, over shapes: the table behind the layer's choice.

    python tests/benchmarks/dynamic_conv.py [--batch 32] [--runs 15]

Forward and backward pass of a layer, as multiples of the plain convolution's; the star is at what the layer takes.
"""

import argparse

import torch
from torch import nn

from timm_reparam._measure import time_interleaved
from timm_reparam.layers import DynamicConv2d

WAYS = {
    'kernels': DynamicConv2d._mix_kernels,
    'outputs': DynamicConv2d._mix_outputs,
    'outputs, 1x1': DynamicConv2d._mix_outputs_1x1,
}
# in_channels, out_channels, kernel side, groups; each at several sizes of the feature map
LAYERS = [(576, 160, 1, 1), (160, 960, 1, 1), (64, 384, 1, 1), (128, 128, 3, 1), (256, 256, 3, 1), (384, 384, 3, 384)]
SIZES = (2, 3, 4, 6, 8, 14)


def measure(layer: tuple[int, int, int, int], size: int, batch: int, runs: int) -> str:
    """One row of the table."""
    in_channels, out_channels, side, groups = layer
    conv = nn.Conv2d(in_channels, out_channels, side, padding=side // 2, groups=groups, bias=False)
    dynamic = DynamicConv2d.from_conv(conv)
    x = torch.randn(batch, in_channels, size, size, requires_grad=True)
    coefficients = torch.randn(batch, dynamic.num_kernels - 1, requires_grad=True)
    gradient = torch.randn(batch, out_channels, size, size)
    ways = {name: way for name, way in WAYS.items() if side == 1 or name != 'outputs, 1x1'}
    steps = [lambda: conv(x).backward(gradient)]
    steps += [lambda way=way: way(dynamic, x, coefficients).backward(gradient) for way in ways.values()]
    plain, *times = (min(seconds) for seconds in time_interleaved(steps, runs, warmup=2))
    taken = 'kernels' if not dynamic._has_few_positions(x) else 'outputs, 1x1' if side == 1 else 'outputs'
    cells = [f'{in_channels}-{out_channels} {side}x{side}, {groups} groups', f'{size}x{size}', f'{1e3 * plain:.2f} ms']
    cells += [f'{seconds / plain:.2f}{"*" if name == taken else " "}' for name, seconds in zip(ways, times)]
    return f'{cells[0]:<28}{cells[1]:>8}{cells[2]:>12}' + ''.join(f'{cell:>14}' for cell in cells[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description='Time the ways in which DynamicConv2d computes.')
    parser.add_argument('--batch', type=int, default=32, help='images (default: 32)')
    parser.add_argument('--runs', type=int, default=15, help='runs, of which the fastest counts (default: 15)')
    args = parser.parse_args()
    print(f'torch {torch.__version__}, {torch.get_num_threads()} threads, batch of {args.batch}')
    print(f'{"layer":<28}{"map":>8}{"plain":>12}' + ''.join(f'{name:>14}' for name in WAYS))
    for layer in LAYERS:
        for size in SIZES:
            print(measure(layer, size, args.batch, args.runs), flush=True)


if __name__ == '__main__':
    main()
