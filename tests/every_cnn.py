"""One architecture of every module of timm, converted, lifted and fused: the table every_cnn.csv.

    python tests/every_cnn.py                  # writes the table anew (up to 16 GB of memory, for vgg11)
    python tests/every_cnn.py resnet10t        # only these rows

A row is one architecture and one variant. Everything is measured in evaluation mode and float64, on random weights and
two small images (of the model's own size where it takes no other); every BatchNorm, every zero-started tensor and
every new parameter is random:

    converted        convolutions that become the variant
    plain            how many of the others stay plain, and why, as `plan_conversion` says
    lift             the freshly converted model equals the stock one bit for bit (dyconv: each kernel that a sample
                     sees equals the stock one bit for bit, and the outputs are equal to rounding)
    fuse             the fused model equals the train-time one to 1e-10, and that differs clearly from the stock one
    strict           the fused state dict loads strictly into the stock architecture, whose types of modules it has
    reparameterize   timm's `reparameterize_model`, called instead of fuse_model or after it, keeps the function, too

`-` stands where there is nothing to say: nothing is converted, or no stock form exists (dyconv).
"""

import argparse
import copy
import csv
import gc
import multiprocessing
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch
from stand_in import random_model
from timm.models import model_entrypoint
from timm.utils import reparameterize_model
from torch import nn

from timm_reparam import (
    DynamicConv2d,
    FusionReport,
    ReparamError,
    convert_model,
    fuse_model,
    is_variant,
    plan_conversion,
    verify_fusion,
)
from timm_reparam.layers._base import conv_arguments
from timm_reparam.variants import VARIANTS

TABLE = Path(__file__).with_suffix('.csv')
COLUMNS = ('module', 'architecture', 'variant', 'converted', 'plain', 'lift', 'fuse', 'strict', 'reparameterize')
# What the smallest of a module lacks: blocks that re-parameterise themselves, SAME padding, other types.
ALSO = (
    'ghostnetv3_050',
    'levit_conv_128s',
    'mixnet_s',
    'mobileone_s0',
    'repvgg_a0',
    'resnetv2_50x1_bit',
    'tf_efficientnet_cc_b0_4e',
    'tf_mixnet_s',
)
SMALL = (64, 112)  # 112: for patches of 14 and windows of 7
ALGEBRA = 1e-10  # the largest relative difference that float64 algebra may leave
# ACNet's layer refuses these, by name; here they are left out by skip=, as its error says.
EVEN = 'with an even kernel, left out by skip'
CLEARLY = 1e-4  # the smallest relative difference from the stock model that shows something: a million times as much


def timm_modules() -> list[str]:
    """timm's own modules, without the families that are registered here."""
    return [name for name in timm.list_modules() if f'timm.models.{name}' in sys.modules]


def smallest(module: str) -> str:
    """The architecture of a module with the fewest parameters, without those that exist for timm's own tests."""
    sizes = []
    for name in timm.list_models(module=module):
        if not name.startswith('test_') and model_entrypoint(name).__module__ == f'timm.models.{module}':
            with torch.device('meta'):
                sizes.append((sum(p.numel() for p in timm.create_model(name).parameters()), name))
    return min(sizes)[1]


def architectures() -> list[str]:
    """What the table holds: the smallest of every module, and ALSO."""
    with multiprocessing.get_context('spawn').Pool() as pool:
        return [*pool.map(smallest, timm_modules(), chunksize=1), *ALSO]


@contextmanager
def float64() -> Iterator[None]:
    """float64 by default, for modules that make tensors of their own; no gradients, one thread (far faster here)."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


def random_stock(architecture: str) -> tuple[nn.Module, torch.Tensor]:
    """A stock model with random weights, and images for it.

    No scale of a channel and no zero-started tensor is left at rest, and the statistics of every BatchNorm are random
    ones close to those of the images: with others the signal fades from layer to layer, and the output shows nothing,
    or it grows, and rounding errors with it.
    """
    model = random_model(architecture)
    disturb(model, [name for name, tensor in model.named_parameters() if tensor.ndim > 1 and is_vector(tensor)])
    x = images(model)
    for norm in norms_of(model):
        if norm.weight is not None:
            norm.weight *= 0.5  # large queries and keys make attention a switch, which rounding errors flip
    settle(model, x)
    return model, x


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def settle(model: nn.Module, x: torch.Tensor) -> None:
    """Give every BatchNorm random statistics close to those of the images."""
    norms = norms_of(model)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    run(model, x)
    generator = torch.Generator().manual_seed(0)
    for norm, momentum in zip(norms, momenta):
        norm.eval()
        norm.momentum = momentum
        noise = torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_mean += 0.1 * noise * norm.running_var.sqrt()
        # a channel of two images may hardly vary: divided by that, rounding errors would grow as much as the signal
        norm.running_var.clamp_(min=0.1 * norm.running_var.mean())
        norm.running_var *= 0.2 * torch.rand(norm.running_var.shape, generator=generator) + 0.9


def is_vector(tensor: torch.Tensor) -> bool:
    """Whether only the first dimension of a tensor is longer than 1."""
    return tensor.ndim > 0 and tensor.numel() == len(tensor)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest magnitude."""
    return float((found - expected).abs().max() / expected.abs().max())


def run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The output of a model in one tensor."""
    y = model(x)
    return y if isinstance(y, torch.Tensor) else torch.cat([part.flatten(1) for part in y], 1)


def images(model: nn.Module) -> torch.Tensor:
    """Two seeded images, small ones where the model takes them."""
    channels, *native = model.pretrained_cfg['input_size']
    sizes = [] if model.pretrained_cfg.get('fixed_input_size') else [(side, side) for side in SMALL]
    for size in (*sizes, native):
        x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
        try:
            run(model, x)
            break
        except (AssertionError, RuntimeError, ValueError):  # each architecture refuses in its own way
            if size is native:
                raise
    return x


def disturb(model: nn.Module, names: Iterable[str]) -> None:
    """Randomise the parameters and buffers of these names, in place; the temperature is on its way to 1."""
    # under every name: shared modules have several
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name in sorted(names):
        tensor = tensors[name]
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if name.endswith('temperature_position'):
            tensor.fill_(4_000)
        elif tensor.is_floating_point() and is_vector(tensor):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            # a kernel for each output channel, or (DO-Conv) a matrix for each channel
            fan_in = tensor.shape[2] if tensor.ndim == 3 else tensor[0].numel()
            tensor.normal_(0.0, fan_in**-0.5, generator=generator)


def lifted_kernels_are_exact(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether every kernel that a sample sees in a model with dynamic convolutions is the mean kernel bit for bit."""
    exact = []

    def look(layer: DynamicConv2d, inputs: tuple[torch.Tensor]) -> None:
        exact.append(all(torch.equal(kernel, layer.weight) for kernel in layer.sample_kernels(inputs[0])))

    hooks = [layer.register_forward_pre_hook(look) for layer in model.modules() if isinstance(layer, DynamicConv2d)]
    run(model, x)
    for hook in hooks:
        hook.remove()
    return bool(exact) and all(exact)


def rows(architecture: str, variants: Iterable[str] = tuple(sorted(VARIANTS))) -> list[dict[str, str]]:
    """The rows of one architecture; what does not hold is in them with the figure, or with the error's text."""
    with float64():
        stock, x = random_stock(architecture)
        expected = run(stock, x)
        if not expected.isfinite().all() or not expected.any():
            raise ValueError(f'{architecture}: an output without finite values other than 0 shows nothing')
        with torch.device('meta'):
            blank = timm.create_model(architecture)
        module = model_entrypoint(architecture).__module__.rpartition('.')[2]
        found = []
        for variant in variants:
            row = dict(module=module, architecture=architecture, variant=variant)
            skip = even_kernels(stock, variant)
            reasons = Counter(plan_conversion(stock, variant, skip=skip).values())
            if skip:
                reasons[EVEN] = reasons.pop('left out by skip')
            row['converted'] = str(reasons.pop('', 0))
            plain = '; '.join(f'{number} {why_plain}' for why_plain, number in sorted(reasons.items()))
            if row['converted'] != '0':
                row |= dict(plain=plain) | checks(stock, blank, variant, skip, x, expected)
            else:
                row |= dict(plain=plain or 'holds no convolution') | nothing(stock, variant, skip)
            found.append(row)
            gc.collect()
        return found


def refused(variant: str, conv: nn.Module) -> bool:
    """Whether the layer of a variant refuses this convolution, which is the case for even kernels only."""
    try:
        VARIANTS[variant].layer(**conv_arguments(conv), device='meta')
    except ReparamError as error:
        assert 'needs odd kernel sides' in str(error)
        return True
    return False


def even_kernels(stock: nn.Module, variant: str) -> list[str]:
    """The convolutions that the layer of a variant refuses, to be left out by skip=."""
    return [
        name
        for name, why in plan_conversion(stock, variant).items()
        if not why and refused(variant, stock.get_submodule(name))
    ]


@torch.no_grad()
def reports(
    architecture: str, variants: Iterable[str] = tuple(sorted(VARIANTS)), dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, FusionReport]]:
    """What `verify_fusion` says of the right fusion in each variant that converts anything, all random as in `rows`."""
    stock, x = random_stock(architecture)
    for variant in variants:
        skip = even_kernels(stock, variant)
        if '' not in plan_conversion(stock, variant, skip=skip).values():
            continue
        model = convert_model(copy.deepcopy(stock), variant, skip=skip)
        disturb(model, model.state_dict().keys() - stock.state_dict().keys())
        settle(model, x)
        model.to(dtype)
        yield variant, verify_fusion(model, fuse_model(model), inputs=x)


def nothing(stock: nn.Module, variant: str, skip: list[str]) -> dict[str, str]:
    """The verdicts where nothing is converted: convert_model says so."""
    try:
        convert_model(stock, variant, skip=skip)
    except ReparamError as error:
        if 'nothing to convert' in str(error):
            return dict.fromkeys(COLUMNS[5:], '-')
    raise AssertionError('convert_model converts what plan_conversion leaves plain')


def checks(
    stock: nn.Module, blank: nn.Module, variant: str, skip: list[str], x: torch.Tensor, expected: torch.Tensor
) -> dict[str, str]:
    """The verdicts on one variant.

    Args:
        stock: The stock model.
        blank: The same architecture on the meta device.
        variant: Name of the variant.
        skip: Names of convolutions to leave out.
        x: Images.
        expected: What the stock model makes of them.
    """

    def equal(found: torch.Tensor, reference: torch.Tensor) -> str:
        figure = difference(found, reference)
        return 'exact' if figure <= ALGEBRA else f'differs by {figure:.0e}'

    static = variant != 'dyconv'
    # a copy but for the parameters, of which some models have gigabytes
    shared = {id(parameter): parameter for parameter in stock.parameters()}
    model = convert_model(copy.deepcopy(stock, shared), variant, skip=skip)
    row = {}
    if static:
        lifted = run(model, x)
        row['lift'] = 'exact' if torch.equal(lifted, expected) else f'differs by {difference(lifted, expected):.0e}'
    elif lifted_kernels_are_exact(model, x):
        row['lift'] = equal(run(model, x), expected)
    else:
        row['lift'] = 'kernels differ'
    disturb(model, model.state_dict().keys() - stock.state_dict().keys())
    trained = run(model, x)
    if not trained.isfinite().all():  # a sum of random kernels in each of many layers
        settle(model, x)
        trained = run(model, x)
    clearly = difference(trained, expected)
    if not clearly >= CLEARLY:
        row.update(dict.fromkeys(COLUMNS[6:], f'shows nothing: the variant differs from stock by {clearly:.0e}'))
        return row
    fused = fuse_model(model)
    row['fuse'] = equal(run(fused, x), trained)
    row['strict'] = '-'
    if static:
        try:
            blank.load_state_dict(fused.state_dict(), assign=True)
            same_types = [type(module) for module in fused.modules()] == [type(module) for module in blank.modules()]
            row['strict'] = 'loads' if same_types and not any(map(is_variant, fused.modules())) else 'other modules'
        except RuntimeError as error:
            row['strict'] = str(error)
    row['reparameterize'] = equal(run(reparameterize_model(fused, inplace=True), x), trained)
    del fused
    if row['reparameterize'] == 'exact':
        row['reparameterize'] = equal(run(reparameterize_model(model), x), trained)
    return row


def read() -> dict[tuple[str, str], dict[str, str]]:
    """The table, by architecture and variant."""
    with TABLE.open(newline='') as file:
        return {(row['architecture'], row['variant']): row for row in csv.DictReader(file)}


def write(table: dict[tuple[str, str], dict[str, str]]) -> None:
    """Save the table, sorted by module, architecture and variant."""
    with TABLE.open('w', newline='') as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator='\n')
        writer.writeheader()
        writer.writerows(sorted(table.values(), key=lambda row: [row[column] for column in COLUMNS[:3]]))


def main() -> None:
    parser = argparse.ArgumentParser(description='Write tests/every_cnn.csv anew.')
    parser.add_argument('architectures', nargs='*', help='only the rows of these; default: the whole table')
    chosen = parser.parse_args().architectures
    table = read() if chosen else {}
    for architecture in chosen or architectures():
        for row in rows(architecture):
            table[row['architecture'], row['variant']] = row
            print(*row.values(), sep=' | ', flush=True)
        write(table)


if __name__ == '__main__':
    main()
