"""How fast RefConv's maps let kernels move: the rates that gradient descent has along each direction of a kernel.

    python tests/benchmarks/map_rates.py tests/benchmarks/zoo/resnet10t_refconv.cifar10
    python tests/benchmarks/map_rates.py mobilenetv2_050_refconv

K = W + Map(W) is linear in the map, so a step of the map by its gradient moves K by P times K's own gradient, where P
(kh*kw, kh*kw) is the sum of J J^T over the kernels that a filter of the map takes in, J being the kernel's derivative
by the filter. Were P a multiple of the identity, refocusing would be training the kernel itself, at another learning
rate. Its eigenvalues are the rates; directions of small ones stand still.
"""

import argparse
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from timm_reparam.cli import load_model
from timm_reparam.layers import RefConv2d


def map_rates(layer: RefConv2d) -> torch.Tensor:
    """The eigenvalues of P, ascending: (groups of the map, kh*kw), float64."""
    linked, sides = layer.map_weight.shape[1], tuple(layer.map_weight.shape[2:])
    kernels = layer.weight.detach().double().reshape(-1, 1, *layer.kernel_size)
    padding = (sides[0] // 2, sides[1] // 2)
    derivatives = F.unfold(kernels, sides, padding=padding).unflatten(0, (-1, linked))  # (groups, linked, taps, kh*kw)
    return torch.linalg.eigvalsh(torch.einsum('gltm,gltn->gmn', derivatives, derivatives))


def rows_of(model: nn.Module) -> Iterator[tuple[str, int, float, float]]:
    """Of each layer its name, kernels a filter takes in, largest over smallest rate, share of slow directions."""
    for name, layer in model.named_modules():
        if isinstance(layer, RefConv2d):
            rates = map_rates(layer)
            largest, smallest = rates[:, -1], rates[:, 0]
            smallest = smallest.where(smallest > 1e-9 * largest, 0)  # a map smaller than its kernel cannot reach it all
            ratio = (largest / smallest).median().item()
            slow = (rates < rates.mean() / 10).double().mean().item()
            yield name, layer.map_weight.shape[1], ratio, slow


def main() -> None:
    torch.manual_seed(0)
    parser = argparse.ArgumentParser(description='Rates at which the maps of RefConv let kernels move.')
    parser.add_argument('model', help='train-time checkpoint, or a model, which is drawn at random')
    model = load_model(parser.parse_args().model)
    print(f'{"layer":<32} {"kernels":>8} {"max/min":>10} {"slow":>6}   (max/min: median; slow: below 1/10 of the mean)')
    for name, linked, ratio, slow in rows_of(model):
        print(f'{name:<32} {linked:>8} {ratio:>10.3g} {slow:>6.0%}')


if __name__ == '__main__':
    main()
