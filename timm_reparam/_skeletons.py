"""Kernel skeletons: the mean magnitude of kernels at each position, averaged over the stages of a model."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .errors import ReparamError
from .layers._fusible import Fusible, first_conv
from .layers._tensor import float64_copy, to_float64

__all__ = ['Skeleton', 'commonest_kernel_size', 'kernel_skeletons']


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Mean magnitude of the kernels of a stage.

    Args:
        stage: Name of the module with which the stage ends.
        layers: Number of convolutions in the average.
        magnitude: Mean magnitude at each position of the kernel, (size, size) in float64, between 0 and 1.
    """

    stage: str
    layers: int
    magnitude: torch.Tensor


def commonest_kernel_size(*models: nn.Module) -> int:
    """Return the most common size k > 1 of k x k kernels in the models, the smallest one if there are several.

    Raises:
        ReparamError: There are no such kernels.
    """
    sizes = Counter(size for model in models for _, _, size in _square_kernels(model) if size > 1)
    if not sizes:
        raise ReparamError(
            f'{", ".join(type(model).__name__ for model in models)}: expected kxk convolutions with k > 1, found none'
        )
    return min(sizes, key=lambda size: (-sizes[size], size))


def kernel_skeletons(model: nn.Module, kernel_size: int | None = None) -> list[Skeleton]:
    """Average the magnitude of a model's kernels over each stage, as the ACNet paper does over a model.

    Section 4.4 of `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930 - sums the absolute values of a layer's kernels over output and input channels,
    divides the k x k sums by their maximum, so that all layers count equally, and takes the mean over the k x k layers:
    ``A = mean_i(S_i / max(S_i))`` with ``S_i = sum_oc |W_i[o, c, :, :]|``. In the paper i runs over all layers of a
    model, here over those of a stage.

    The kernel of an over-parameterised layer is its fused kernel in float64, that of a dynamic convolution the mean of
    its kernels, and that of other layers their weight (before weight standardisation, if any). The norms after a
    convolution are ignored, except those inside an `ACBlock2d`.

    The stages are those of timm's ``feature_info``. A stage ends with the module named there and begins after the
    previous stage, so that the first one includes the stem. Layers after the last stage, and models without
    ``feature_info``, are grouped by the names of their top-level modules.

    Args:
        model: Any model, in either form; it is not changed.
        kernel_size: Size of the kernels; the most common size above 1 by default.

    Returns:
        The stages that have such kernels, in the order of the modules.

    Raises:
        ReparamError: The model has no kernels of this size.
    """
    size = commonest_kernel_size(model) if kernel_size is None else kernel_size
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends = _stage_ends(model, places)
    stages: dict[str, list[torch.Tensor]] = {}
    found = Counter[int]()
    for name, module, own_size in _square_kernels(model):
        found[own_size] += 1
        if own_size != size:
            continue
        stage = next((stage for stage, end in ends if places[name] <= end), name.partition('.')[0])
        sums = _kernel(module).abs().sum((0, 1))
        stages.setdefault(stage, []).append(sums / sums.max().clamp_min(torch.finfo(sums.dtype).tiny))
    if not stages:
        sizes = ', '.join(f'{number} of {own_size}x{own_size}' for own_size, number in sorted(found.items())) or 'none'
        raise ReparamError(
            f'{type(model).__name__}: expected {size}x{size} convolutions, found {sizes}; choose another size'
        )
    return [Skeleton(stage, len(maps), torch.stack(maps).mean(0)) for stage, maps in stages.items()]


def _square_kernels(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Layers that equal one convolution with a square kernel: name, module, size of the kernel."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        conv: Any = module
        if isinstance(module, Fusible):  # the fused convolution has the geometry of the first one
            inside |= {id(part) for part in module.modules()}
            conv = first_conv(module)
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and conv.kernel_size[0] == conv.kernel_size[1]:
            yield name, module, conv.kernel_size[0]


def _kernel(module: Any) -> torch.Tensor:
    """The equivalent kernel of a layer in float64; the mean kernel of a dynamic convolution."""
    if isinstance(module, Fusible) and not module.input_dependent:
        layer: Any = float64_copy(module)
        return layer.equivalent_kernel().detach()
    return to_float64(module.weight)


def _stage_ends(model: nn.Module, places: Mapping[str, int]) -> list[tuple[str, int]]:
    """Stages of timm's feature_info, each with the index of its last module, sorted by that index."""
    infos = getattr(model, 'feature_info', None) or ()
    ends = {}
    for info in getattr(infos, 'info', infos):
        stage = info.get('module')
        if stage and stage in places:  # some entries name a point inside forward, not a module
            ends[stage] = max(place for name, place in places.items() if f'{name}.'.startswith(f'{stage}.'))
    return sorted(ends.items(), key=lambda item: item[1])
