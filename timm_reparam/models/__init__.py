"""The families, the backbones' table times the variants', registered with timm on import."""

from ._registry import register_families
from ._registry import register_variant as register_variant

register_families()
