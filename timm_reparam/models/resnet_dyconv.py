"""ResNets with dynamic convolution, attention over convolution kernels (https://arxiv.org/abs/1912.03458)."""

from ._backbones import RESNETS
from ._registry import register_family

__all__ = []  # filled in by the registry
default_cfgs: dict = {}

register_family(__name__, 'dyconv', RESNETS)
