"""Checkpoints of RefConv's official code (https://github.com/Aiolus-X/RefConv)."""

from ..layers import RefConv2d
from ._format import Entries, Format, TranslatedEntries

__all__ = ['FORMAT']


def matches(entries: Entries) -> bool:
    """Whether there is a map."""
    return 'convmap.weight' in entries


def read(layer: RefConv2d, entries: Entries) -> TranslatedEntries:
    """Read the base kernel, a buffer `weight`, and the map, a convolution module; the shapes are the same."""
    return TranslatedEntries({'weight': entries.pop('weight'), 'map_weight': entries.pop('convmap.weight')})


FORMAT = Format(matches, read)
