"""The convolutions: one file a method, each a drop-in for ``nn.Conv2d``."""

from ._base import Method, ReparamConv2d, ReparamConvTranspose2d, ReparamLayer
from .ac_block import ACBlock2d
from .ac_conv import ACConv2d
from .dbb_block import DBBlock2d
from .dbb_conv import DBBConv2d
from .do_conv import DOConv2d, DOConvTranspose2d
from .dynamic_conv import DynamicConv2d
from .orepa_conv import OREPAConv2d
from .ref_conv import RefConv2d, RefConvTranspose2d

__all__ = [
    'ACBlock2d',
    'ACConv2d',
    'DBBConv2d',
    'DBBlock2d',
    'DOConv2d',
    'DOConvTranspose2d',
    'DynamicConv2d',
    'Method',
    'OREPAConv2d',
    'RefConv2d',
    'RefConvTranspose2d',
    'ReparamConv2d',
    'ReparamConvTranspose2d',
    'ReparamLayer',
]
