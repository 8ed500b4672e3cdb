"""What a format is: the functions that recognise, read and write the entries of one convolution."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

__all__ = ['Entries', 'Format', 'TranslatedEntries']

# The entries of one convolution in a state dict, without the convolution's name.
Entries = dict[str, torch.Tensor]


@dataclasses.dataclass
class TranslatedEntries:
    """A convolution of an official checkpoint as entries of a layer of this package.

    Attributes:
        entries: Entries of the layer: either all of them, or only `weight` (and `bias`) where only the kernel can be
            read. The rest then starts as in a lift.
        constant: What the official layer adds to each output channel, if that is not a bias among the entries.
        mean: Mean of each output channel in training, without the constant, if the checkpoint knows it.
        variance: Its variance, which may be an estimate.
    """

    entries: Entries
    constant: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    variance: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Format:
    """The checkpoint format of a method's official (or most common) code.

    Attributes:
        matches: Whether the entries of a convolution are in this format.
        read: Translates entries that match into those of a given layer, with the same function. It takes what it reads
            out of the given dict; what is left is unexpected, except for a bias that means the same. It raises KeyError
            where an entry is missing, and ReparamError where the options of the layer do not fit.
        write: Translates a layer into entries of this format. None if the method has no way back.
    """

    matches: Callable[[Entries], bool]
    read: Callable[[Any, Entries], TranslatedEntries]
    write: Callable[[Any], Entries] | None = None
