"""Blocks of convolutions that each have a BatchNorm of their own; they fold to one convolution with bias."""

import copy
from collections.abc import Callable

import torch
import torch.nn as nn

from ._base import conv_arguments
from ._fusible import Fusible, first_conv
from ._tensor import autocast_disabled, float64_copy

__all__ = ['BranchBlock2d']


class BranchBlock2d(Fusible):
    """A sum of branches, each a convolution or more with BatchNorms; a block defines `forward` and `_fold`."""

    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Kernel and bias of the block in evaluation."""
        raise NotImplementedError

    def equivalent_kernel(self) -> torch.Tensor:
        """Kernel (out_channels, in_channels/groups, kh, kw) of the convolution that the block equals in evaluation."""
        return self._folded()[0]

    def equivalent_bias(self) -> torch.Tensor:
        """Bias (out_channels,) of the convolution that the block equals in evaluation."""
        return self._folded()[1]

    def _folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        with autocast_disabled(first_conv(self).weight.device.type):
            return self._fold()

    def branch_form(self) -> Callable[..., torch.Tensor]:
        return copy.deepcopy(self).eval().forward

    @torch.no_grad()
    def fuse(self) -> nn.Conv2d:
        """Fold the block, in float64 and rounded once, into a fresh convolution with bias; it stays as it was."""
        kernel, bias = float64_copy(self).eval()._folded()
        like = next(self.parameters())
        conv = nn.Conv2d(**dict(conv_arguments(first_conv(self)), bias=True), device='meta', dtype=like.dtype)
        vars(conv).update(self.added_attributes())
        trainable = any(p.requires_grad for p in self.parameters())
        for name, value in (('weight', kernel), ('bias', bias)):
            setattr(conv, name, nn.Parameter(value.to(like.device, like.dtype), requires_grad=trainable))
        return conv.train(self.training)
