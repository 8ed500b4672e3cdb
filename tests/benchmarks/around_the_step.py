"""What a variant costs around the training step, beside what stock timm does there: a table of medians.

    python tests/benchmarks/around_the_step.py
    python tests/benchmarks/around_the_step.py convert --convert hrnet_w48 densenet201

create      create_model(pretrained=True) from a file of random weights, beside the same of the stock model
fuse        fuse_model, beside a deep copy of the stock model; and the most memory that it takes beyond its result
convert     convert_model on the CPU and on the meta device, beside making the stock model there
verify      verify_fusion of two images, beside a pass of the stock model; and the most memory that it takes
fold        inference of the fused model, and of the one with folded BatchNorms, beside the stock model

Stock and variant take turns, and the ratio is the median of the turns' ratios, so that a machine that is shared by
others tells the same. Memory is counted by torch's profiler, as multiples of the fused model's weights.
"""

import argparse
import copy
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from stand_in import random_model, randomise  # noqa: E402

from timm_reparam import ReparamError, convert_model, fuse_model, verify_fusion  # noqa: E402
from timm_reparam._measure import cpu_allocations  # noqa: E402
from timm_reparam.variants import VARIANTS  # noqa: E402

CREATED = [*(('resnet50', variant) for variant in VARIANTS), ('mobilenetv2_100', 'dyconv')]
FUSED = [('resnet152', variant) for variant in VARIANTS]
CONVERTED = ['densenet201', 'hrnet_w48', 'convnext_base', 'regnety_160', 'resnet152']
FOLDED = [('resnet18', 'doconv'), ('resnet50', 'acconv'), ('mobilenetv2_100', 'refconv'), ('mobilenetv2_100', 'dyconv')]


def seconds(function: Callable[[], Any]) -> float:
    """How long a function takes, without what becomes of its result."""
    began = time.perf_counter()
    result = function()
    took = time.perf_counter() - began
    del result
    return took


def compare(what: str, stock: Callable[[], Any], ours: Callable[[], Any], turns: int, note: str = '') -> None:
    """Print a row: the medians of both and of their ratio; the first turn only warms up."""
    rows = [(seconds(stock), seconds(ours)) for _ in range(turns + 1)][1:]
    medians = [statistics.median(values) for values in zip(*rows)]
    ratio = statistics.median(b / a for a, b in rows)
    print(f'{what:<44} {medians[0]:>9.3f} {medians[1]:>9.3f} {ratio:>7.2f}  {note}', flush=True)


def most_memory(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that a function has allocated at any time."""
    return max(itertools.accumulate(cpu_allocations(function)), default=0)


def num_bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def create(turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for stock, variant in CREATED:
            file = Path(folder) / f'{stock}.safetensors'
            save_file(timm.create_model(stock).state_dict(), file)
            options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))

            def make(name: str, options=options) -> nn.Module:
                return timm.create_model(name, **options)

            compare(
                f'create  {stock}_{variant}',
                lambda make=make, stock=stock: make(stock),
                lambda make=make, name=f'{stock}_{variant}': make(name),
                turns,
            )


def fuse(turns: int) -> None:
    for stock, variant in FUSED:
        plain, model = timm.create_model(stock), timm.create_model(f'{stock}_{variant}', conv_options=dict(init='lift'))
        weights = num_bytes(fuse_model(model))
        extra = most_memory(lambda model=model: fuse_model(model)) / weights - 1
        compare(
            f'fuse    {stock}_{variant}',
            lambda plain=plain: copy.deepcopy(plain),
            lambda model=model: fuse_model(model),
            turns,
            f'{extra:.2f} of the fused weights beyond them',
        )


def convert(turns: int, names: list[str]) -> None:
    for name, variant, device in itertools.product(names, VARIANTS, ('cpu', 'meta')):

        def make(name: str = name, device: str = device) -> nn.Module:
            with torch.device(device):
                return timm.create_model(name)

        # each turn needs a stock model of its own, whose making is the stock side
        made: list[nn.Module] = []
        try:
            compare(
                f'convert {name} to {variant} ({device})',
                lambda made=made, make=make: made.append(make()),
                lambda made=made, variant=variant: convert_model(made.pop(), variant),
                turns,
            )
        except ReparamError as error:
            print(f'convert {name} to {variant} ({device}): {str(error).splitlines()[0][-90:]}')


def verify(turns: int) -> None:
    for stock, variant in FUSED:
        plain, model = (timm.create_model(name).eval() for name in (stock, f'{stock}_{variant}'))
        fused, images = fuse_model(model), torch.randn(2, 3, 64, 64)
        memory = most_memory(lambda m=model, f=fused, x=images: verify_fusion(m, f, inputs=x)) / num_bytes(fused)
        compare(
            f'verify  {stock}_{variant}',
            torch.no_grad()(lambda plain=plain, x=images: plain(x)),
            lambda m=model, f=fused, x=images: verify_fusion(m, f, inputs=x),
            turns,
            f'{memory:.1f} times the fused weights at most',
        )


@torch.inference_mode()
def fold(turns: int) -> None:
    for stock, variant in FOLDED:
        plain = random_model(stock)
        model = randomise(convert_model(random_model(stock), variant), seed=1).eval()
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(4, 3, 128, 128).to(memory_format=layout)
            for what, fused in (('fused', fuse_model(model)), ('folded', fuse_model(model, fold_bn=True))):
                plain.to(memory_format=layout)
                fused.to(memory_format=layout)
                compare(
                    f'fold    {stock}_{variant}, {what}',
                    lambda plain=plain, x=images: plain(x),
                    lambda fused=fused, x=images: fused(x),
                    4 * turns,
                    str(layout).removeprefix('torch.'),
                )


def main() -> None:
    parts = ('create', 'fuse', 'convert', 'verify', 'fold')
    parser = argparse.ArgumentParser(description='Time what a variant costs around the training step.')
    parser.add_argument('parts', nargs='*', metavar='PART', help=f'of {", ".join(parts)} (default: all)')
    parser.add_argument('--turns', type=int, default=5, help='turns that count (default: %(default)s)')
    parser.add_argument('--threads', type=int, help="threads of torch (default: torch's own)")
    parser.add_argument('--convert', nargs='+', default=CONVERTED, metavar='MODEL', help='architectures to convert')
    args = parser.parse_args()
    if unknown := set(args.parts) - set(parts):
        parser.error(f'unknown part {", ".join(sorted(unknown))}; the parts are {", ".join(parts)}')
    if args.threads:
        torch.set_num_threads(args.threads)
    print(f'torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, {args.turns} turns')
    print(f'{"":<44} {"stock s":>9} {"ours s":>9} {"ratio":>7}')
    functions = dict(create=create, fuse=fuse, convert=convert, verify=verify, fold=fold)
    for part in args.parts or parts:
        functions[part](args.turns, *([args.convert] if part == 'convert' else []))


if __name__ == '__main__':
    main()
