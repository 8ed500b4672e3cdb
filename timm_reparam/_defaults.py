"""The defaults of the layers' options as 0.1.0 had them, for checkpoints that do not name every option.

0.1.0 recorded only the options that were given: what its checkpoints leave out is what it did by default. So these are
copies of the constructors' defaults, not references to them, and they never change, while a constructor's default may.
A variant that 0.1.0 did not have needs no entry: its checkpoints name every option.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ['DEFAULTS_OF_0_1_0', 'with_defaults_of_0_1_0']

DEFAULTS_OF_0_1_0: dict[str, dict[str, Any]] = {
    'acconv': dict(branch_norm='batch', gamma_init=None, scale=1.0, eps=1e-5, momentum=0.1, recompute=False),
    'doconv': dict(depth_multiplier=None),
    'dyconv': dict(num_kernels=4, reduction=4, temperature=30.0, temperature_steps=10_000),
    'refconv': dict(map_kernel_size=3),
}


def with_defaults_of_0_1_0(variant: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a checkpoint records them, and those that it does not name."""
    return {**DEFAULTS_OF_0_1_0.get(variant, {}), **options}
