"""The running variance of a branch, as torch and timm find it among a model's BatchNorms.

``torch.optim.swa_utils.update_bn``, ``convert_sync_batchnorm``, ``timm.utils.freeze`` and code that switches norms to
evaluation look for BatchNorms by their type. The modules here have the type, and no parameter or buffer of their own: a
layer keeps its variances itself, so that the keys of its state dict do not depend on them.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers.norm_act import FrozenBatchNorm2d

__all__ = ['BranchNorm', 'BranchStatistics']


class BranchStatistics(nn.Module):
    """What the norms of a branch share; `weight` and `running_var` are the layer's own tensors."""

    __jit_unused_properties__ = ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']

    def __init__(self, layer: nn.Module, branch: str, num_features: int, eps: float, momentum: float) -> None:
        nn.Module.__init__(self)  # none of the parameters and buffers of a BatchNorm
        self._branch = branch
        self._layer: Any = None
        self.bind(layer)
        self.num_features = num_features
        self.eps = eps
        self.momentum: float | None = momentum
        self.affine = False
        self.track_running_stats = True
        self.process_group: Any = None
        self._batches = 0

    def bind(self, layer: nn.Module) -> None:
        """Make this a norm of `layer`, unless it is one of another layer; it does not keep the layer alive."""
        if self._layer is None:
            self._layer = weakref.ref(layer)

    def __getstate__(self) -> dict[str, Any]:
        return dict(vars(self), _layer=None)  # the copy of the layer binds its own norms

    def _of_layer(self, name: str) -> torch.Tensor:
        return getattr(self._layer(), f'{self._branch}_{name}')

    @property
    def weight(self) -> torch.Tensor:
        """Gamma of the branch."""
        return self._of_layer('gamma')

    @property
    def bias(self) -> torch.Tensor:
        """Zeros: a branch has no shift."""
        return torch.zeros_like(self.running_var)

    @property
    def running_var(self) -> torch.Tensor:
        """Running variance of the branch."""
        return self._of_layer('running_var')

    @running_var.setter
    def running_var(self, value: torch.Tensor | None) -> None:
        # torch.func takes the statistics of a BatchNorm away, and clears track_running_stats, which is enough here
        if value is not None:
            setattr(self._layer(), f'{self._branch}_running_var', value)

    @property
    def running_mean(self) -> torch.Tensor:
        """Zeros: a branch is scaled, not centred."""
        return torch.zeros_like(self.running_var)

    @running_mean.setter
    def running_mean(self, value: torch.Tensor | None) -> None:
        """Nothing is kept."""

    @property
    def num_batches_tracked(self) -> torch.Tensor:
        """Batches of a cumulative average; a number of its own, for code that sets those of BatchNorms to zero."""
        return torch.tensor(self._batches)

    @num_batches_tracked.setter
    def num_batches_tracked(self, value: torch.Tensor | None) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def reset_running_stats(self) -> None:
        """Forget the batches seen so far."""
        self._batches = 0
        self.running_var.fill_(1)

    def share_of_newest(self) -> float:
        """The share of the newest batch in the running variance: 1 over the batches seen where momentum is None."""
        if self.momentum is not None:
            return self.momentum
        self._batches += 1
        return 1 / self._batches

    def synchronised_over(self) -> Any:
        """The process group whose batches make one, or None."""
        return None

    def replaced_by(self, module: nn.Module) -> nn.Module:
        """The norm of this branch that stands for what a tool puts in its place."""
        for replaced, kind in _KINDS.items():
            if isinstance(module, replaced) and not isinstance(module, BranchStatistics):
                new = kind(self._layer(), self._branch, self.num_features, self.eps, self.momentum)
                new.process_group = getattr(module, 'process_group', None)
                return new.train(module.training)
        return module

    def extra_repr(self) -> str:
        return f'{self.num_features}, momentum={self.momentum}'

    __repr__ = nn.Module.__repr__
    _load_from_state_dict = nn.Module._load_from_state_dict  # a BatchNorm's adds a key of old checkpoints


class BranchNorm(BranchStatistics, nn.BatchNorm2d):  # type: ignore[misc]
    """Norm of a branch: the batch's variance while it is in training mode, the running one in evaluation."""

    forward = nn.Module.forward


class _SyncBranchNorm(BranchStatistics, nn.SyncBatchNorm):  # type: ignore[misc]
    """The same with the variance over all processes of a group."""

    forward = nn.Module.forward

    def synchronised_over(self) -> Any:
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = self.process_group or dist.group.WORLD
        return group if dist.get_world_size(group) > 1 else None


class _FrozenBranchNorm(BranchStatistics, FrozenBatchNorm2d):
    """The same, always in evaluation."""

    forward = nn.Module.forward

    def train(self, mode: bool = True) -> '_FrozenBranchNorm':
        return super().train(False)


_KINDS: dict[type[nn.Module], type[Any]] = {
    nn.BatchNorm2d: BranchNorm,
    nn.SyncBatchNorm: _SyncBranchNorm,
    FrozenBatchNorm2d: _FrozenBranchNorm,
}
