"""The norms of official blocks, and what they tell of the statistics of a block's output."""

import torch

from ..layers._branches import add_on_middle, per_output
from ..layers._tensor import scale_shift
from ._format import Entries

__all__ = ['Norm', 'variance_of_sum']


class Norm:
    """A BatchNorm's entries of a checkpoint, which it takes out of them, in float64."""

    def __init__(self, entries: Entries, prefix: str, eps: float) -> None:
        entries.pop(f'{prefix}num_batches_tracked', None)
        self.running_mean = entries.pop(f'{prefix}running_mean').double()
        self.running_var = entries.pop(f'{prefix}running_var').double()
        self.weight = entries.pop(f'{prefix}weight', torch.ones_like(self.running_mean)).double()
        self.bias = entries.pop(f'{prefix}bias', torch.zeros_like(self.running_mean)).double()
        self.eps = eps
        self.scale, self.shift = scale_shift(self)

    @property
    def deviation(self) -> torch.Tensor:
        """Standard deviation of the output, with the sign of the scale."""
        return self.scale * self.running_var.sqrt()


def variance_of_sum(kernels: list[torch.Tensor], norms: list[Norm]) -> torch.Tensor:
    """Estimate the variance of a sum of branches, each with a norm of its own.

    No checkpoint has the covariances of the branches, so those of white noise at the input are used.

    Args:
        kernels: Kernels of the branches, that of full size first.
        norms: The norm that ends each branch.
    """
    scaled = []
    for kernel, norm in zip(kernels, norms):
        length = kernel.flatten(1).norm(dim=1).clamp_min(1e-30)
        scaled.append(kernel * per_output(norm.deviation / length))
    return add_on_middle(scaled[0], scaled[1:]).flatten(1).square().sum(1)
