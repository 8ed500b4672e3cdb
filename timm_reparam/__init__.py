"""Over-parameterised convolutions for timm backbones: accuracy while training, the stock architecture afterwards."""

from . import models  # registers the models with timm
from .convert import convert_model, plan_conversion
from .errors import ReparamError
from .fuse import fuse_model
from .importers import export_state_dict, import_state_dict
from .layers import (
    ACBlock2d,
    ACConv2d,
    DBBConv2d,
    DBBlock2d,
    DOConv2d,
    DOConvTranspose2d,
    DynamicConv2d,
    OREPAConv2d,
    RefConv2d,
    RefConvTranspose2d,
)
from .models import register_variant
from .variants import is_variant
from .verify import FusionReport, LayerReport, verify_fusion
from .version import __version__

__all__ = [
    'ACBlock2d',
    'ACConv2d',
    'DBBConv2d',
    'DBBlock2d',
    'DOConv2d',
    'DOConvTranspose2d',
    'DynamicConv2d',
    'FusionReport',
    'LayerReport',
    'OREPAConv2d',
    'RefConv2d',
    'RefConvTranspose2d',
    'ReparamError',
    '__version__',
    'convert_model',
    'export_state_dict',
    'fuse_model',
    'import_state_dict',
    'is_variant',
    'models',
    'plan_conversion',
    'register_variant',
    'verify_fusion',
]
