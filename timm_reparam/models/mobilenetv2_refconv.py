"""MobileNetV2s with RefConv, re-parameterised refocusing convolution (https://arxiv.org/abs/2310.10563)."""

from ._backbones import MOBILENETV2S
from ._registry import register_family

__all__ = []  # filled in by the registry
default_cfgs: dict = {}

register_family(__name__, 'refconv', MOBILENETV2S)
