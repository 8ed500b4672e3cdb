"""The table of variants, one line each; every list of methods is read from it when it is needed."""

from dataclasses import dataclass, field
from typing import TypeGuard

import torch.nn as nn

from .errors import ReparamError
from .layers import (
    ACConv2d,
    DBBConv2d,
    DOConv2d,
    DOConvTranspose2d,
    DynamicConv2d,
    Method,
    OREPAConv2d,
    RefConv2d,
    RefConvTranspose2d,
    ReparamLayer,
)

__all__ = ['STOCK', 'VARIANTS', 'Variant', 'colors', 'is_variant', 'known_variant', 'run_methods', 'variant_of']

# What a results file calls a run without a variant, and its colour in pictures.
STOCK = ('stock', 'tab:gray')


@dataclass(frozen=True)
class Variant:
    """What is known of a variant beside what its layers say.

    Attributes:
        layers: The layers that replace the convolutions, that of ``nn.Conv2d`` first.
        color: Colour in pictures, a name of matplotlib.
        settings: Settings of the method that have results of their own: their names in results files, with colours.
    """

    layers: tuple[type[ReparamLayer], ...]
    color: str
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def layer(self) -> type[ReparamLayer]:
        """The layer that replaces ``nn.Conv2d``."""
        return self.layers[0]

    @property
    def method(self) -> Method:
        """The method, with its citation."""
        return self.layer.method

    @property
    def input_dependent(self) -> bool:
        """Whether the kernels depend on the input, so that fusing gives a form for inference only."""
        return self.layer.input_dependent


# acconv_none is ACConv2d without norms of the branches; acblock is the paper's block in place of convolution and norm.
VARIANTS: dict[str, Variant] = {
    'doconv': Variant((DOConv2d, DOConvTranspose2d), 'tab:blue'),
    'acconv': Variant((ACConv2d,), 'tab:orange', {'acconv_none': 'tab:red', 'acblock': 'tab:brown'}),
    'refconv': Variant((RefConv2d, RefConvTranspose2d), 'tab:green'),
    'dyconv': Variant((DynamicConv2d,), 'tab:purple'),
    'dbbconv': Variant((DBBConv2d,), 'tab:cyan'),
    'orepaconv': Variant((OREPAConv2d,), 'tab:pink'),
}


def known_variant(name: str) -> Variant:
    """The variant of this name; ReparamError if there is none."""
    if name not in VARIANTS:
        raise ReparamError(f'unknown variant {name!r}; the variants are: {", ".join(sorted(VARIANTS))}')
    return VARIANTS[name]


def is_variant(module: nn.Module) -> TypeGuard[ReparamLayer]:
    """Whether a module is an over-parameterised convolution of this package."""
    return isinstance(module, ReparamLayer)


def variant_of(model: nn.Module) -> str | None:
    """Name of the variant whose layers a model holds, or None for a model without any."""
    for module in model.modules():
        for name, variant in VARIANTS.items():
            if isinstance(module, variant.layers):
                return name
    return None


def run_methods() -> dict[str, str | None]:
    """The methods that a results file may name, each with its variant; stock, which has none, first."""
    return {STOCK[0]: None, **{run: name for name, variant in VARIANTS.items() for run in (name, *variant.settings)}}


def colors() -> dict[str, str]:
    """The colour of each of `run_methods`, the same in every picture."""
    chosen = dict([STOCK])
    for name, variant in VARIANTS.items():
        chosen |= {name: variant.color, **variant.settings}
    return chosen
