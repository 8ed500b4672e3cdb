"""The families, the backbones' table times the variants', registered with timm on import."""

from ._registry import register_families, register_variant

__all__ = ['register_variant']

register_families()
