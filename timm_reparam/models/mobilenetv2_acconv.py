"""MobileNetV2s with ACNet's asymmetric convolution (https://arxiv.org/abs/1908.03930)."""

from ._backbones import MOBILENETV2S
from ._registry import register_family

__all__ = []  # filled in by the registry
default_cfgs: dict = {}

register_family(__name__, 'acconv', MOBILENETV2S)
