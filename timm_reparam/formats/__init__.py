"""Checkpoints of the methods' official code: one file a method. A method that has none needs no file."""

from ..layers import ACConv2d, DBBConv2d, DOConv2d, DynamicConv2d, OREPAConv2d, RefConv2d, ReparamLayer
from . import ac_conv, dbb_conv, do_conv, dynamic_conv, orepa_conv, ref_conv
from ._format import Entries, Format, TranslatedEntries

__all__ = ['FORMATS', 'Entries', 'Format', 'TranslatedEntries']

# The layer whose entries a format is read into, and the format; the first that matches is taken.
FORMATS: dict[type[ReparamLayer], Format] = {
    ACConv2d: ac_conv.FORMAT,
    DBBConv2d: dbb_conv.FORMAT,
    DOConv2d: do_conv.FORMAT,
    DynamicConv2d: dynamic_conv.FORMAT,
    OREPAConv2d: orepa_conv.FORMAT,
    RefConv2d: ref_conv.FORMAT,
}
