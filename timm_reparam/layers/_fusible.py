"""Modules that fuse into one convolution: the contract between a layer, `fuse_model` and `verify_fusion`."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd

from ..errors import ReparamError

__all__ = ['CALL_HOOKS', 'Fusible', 'HOOKS', 'first_conv']

# Hooks on the calls of a module.
CALL_HOOKS = (
    *('_forward_hooks', '_forward_hooks_with_kwargs', '_forward_hooks_always_called'),
    *('_forward_pre_hooks', '_forward_pre_hooks_with_kwargs', '_backward_hooks', '_backward_pre_hooks'),
)
# All hooks of a module: its fused form keeps them, and a convolution that has any is not converted.
HOOKS = (
    *CALL_HOOKS,
    *('_state_dict_hooks', '_state_dict_pre_hooks', '_load_state_dict_pre_hooks', '_load_state_dict_post_hooks'),
)


class Fusible(nn.Module):
    """A module that ``fuse_model`` folds into one convolution and that ``verify_fusion`` compares with the result.

    The fused convolution has the geometry of the first convolution in the module (:func:`first_conv`).

    Attributes:
        input_dependent: Whether the kernel depends on the input, so that fusing gives a form for inference only.
    """

    input_dependent: ClassVar[bool] = False

    def fuse(self) -> nn.Module:
        """Return the fused form, a new module with the same device, dtype and mode; this module is not changed."""
        raise NotImplementedError

    def branch_form(self) -> Callable[..., torch.Tensor]:
        """Return the function of the module in evaluation, computed branch by branch with running statistics.

        Verification compares the fused form with this function, so the two must not share any step.

        Returns:
            A function of the arguments of `forward`, with the current parameters of the module.

        Raises:
            ReparamError: The class does not define it.
        """
        raise ReparamError(
            f'{type(self).__name__}: no branch_form to verify its fusion against; define it from the formula of the '
            'method, without what fuse() uses'
        )

    def _fresh(self) -> nn.Module:
        """A new module with the attributes that a new instance of this class has."""
        return nn.Module()

    def added_attributes(self) -> dict[str, Any]:
        """Plain attributes that were set on the module after construction; its fused form keeps them."""
        # An attribute that hides one of the class, such as a forward, makes sense for this class only.
        own = vars(self._fresh()).keys() | dir(type(self))
        return {name: value for name, value in vars(self).items() if name not in own}


def first_conv(module: nn.Module) -> Any:
    """The first convolution in a module, or the module itself."""
    return next(part for part in module.modules() if isinstance(part, _ConvNd))
