"""MobileNetV2s with DO-Conv, depthwise over-parameterised convolution (https://arxiv.org/abs/2006.12030)."""

from ._backbones import MOBILENETV2S
from ._registry import register_family

__all__ = []  # filled in by the registry
default_cfgs: dict = {}

register_family(__name__, 'doconv', MOBILENETV2S)
