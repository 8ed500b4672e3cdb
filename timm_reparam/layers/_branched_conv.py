"""A convolution with branches that are linear maps, each with a factor for each output channel.

ACNet, DBB and OREPA are lists of such branches. A method's file says which branches there are: their parameters, the
kernels that they stand for, and how they start. What is done with a list of branches is here.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import checkpoint

from .._defaults import DEFAULTS_OF_0_1_0
from ..errors import ReparamError
from ._base import ReparamConv2d
from ._branch_norm import BranchNorm, BranchStatistics
from ._branches import (
    add_on_middle,
    add_scaled,
    add_scaled_synchronised,
    convolve_branches,
    per_channel,
    per_output,
    shares_of_newest,
)
from ._tensor import fast_uniform_, is_transforming

__all__ = ['EPS', 'MOMENTUM', 'BranchedConv2d', 'check_odd']

# As in torch's BatchNorm.
EPS = 1e-5
MOMENTUM = 0.1


def check_odd(owner: str, kernel_size: tuple[int, int]) -> None:
    """Raise ReparamError unless a smaller kernel can be placed on the middle of one of this size."""
    if any(side % 2 == 0 for side in kernel_size):
        raise ReparamError(f'{owner} needs odd kernel sides, got {tuple(kernel_size)}; leave it out with skip=')


class BranchedConv2d(ReparamConv2d):
    """Convolution with branches, ``y = W*x + sum_k s_k (B_k*x)``, s_k a factor for each output channel.

    W is the stock kernel. B_k is a kernel of its size, or a smaller one that is placed on its middle. `branch_norm`
    says what s_k is:

    - 'batch': ``gamma_k / sqrt(var_k + eps)``, with the variance of the branch's output over batch and space: the
      batch's in training (taken in float32 under autocast), the running one in evaluation. In training each branch is
      a convolution of its own.
    - 'scale': gamma_k. The kernels are added, so that training takes one convolution.
    - 'none': 1. The kernels are added as they are.

    With several processes each uses the variances of its own batch, as BatchNorm does, or those of all of them where
    the model was converted to SyncBatchNorm. Whether the variances are the batch's or the running ones follows the
    modules ``<branch>_norm``, which tools that look for BatchNorms find.

    A method defines `_branch_weights`, `_gammas` and `_running_vars`, which TorchScript compiles, and
    `_evaluate_branches`; `_branch_kernels` where its parameters are not the kernels themselves.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``.
        norms: The possible values of `branch_norm`.
        branch_norm: 'batch', 'scale' or 'none', as above.
        gamma_init: Initial value of gamma with init='scratch', the method's own by default; not with 'none'.
        scale: Factor on the sum of the kernels; 'none' only.
        eps: Added to the variances; 'batch' only.
        momentum: Weight of the newest batch in the running variances; 'batch' only.
        recompute: Whether the branches' outputs are computed again in the backward pass instead of kept; 'batch' only.

    Raises:
        ReparamError: an unknown branch_norm, or an option that belongs to another one.
    """

    def __init__(
        self,
        *geometry: Any,
        norms: Sequence[str],
        branch_norm: str,
        gamma_init: float | None = None,
        scale: float = 1.0,
        eps: float = EPS,
        momentum: float = MOMENTUM,
        recompute: bool = False,
    ) -> None:
        name = type(self).__name__
        if branch_norm not in norms:
            known = ', '.join(map(repr, norms[:-1])) + f' or {norms[-1]!r}'
            raise ReparamError(f'{name}: branch_norm must be {known}, got {branch_norm!r}')
        for option, value, most in (('eps', eps, math.inf), ('momentum', momentum, 1)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
                raise ReparamError(f'{name}: {option} must be a number from 0 to {most}, got {value!r}')
        if branch_norm != 'none' and scale != 1:
            raise ReparamError(f"{name}: scale belongs to branch_norm='none', got scale={scale} with {branch_norm!r}")
        if branch_norm == 'none' and gamma_init is not None:
            raise ReparamError(f"{name}: branch_norm='none' has no gamma, got gamma_init={gamma_init}; leave it out")
        if branch_norm != 'batch':
            # a checkpoint names these, too: as they are by default now, or were in 0.1.0
            defaults = [dict(eps=EPS, momentum=MOMENTUM) | self.default_options(), DEFAULTS_OF_0_1_0['acconv']]
            if (eps, momentum) not in [(known['eps'], known['momentum']) for known in defaults]:
                raise ReparamError(
                    f'{name}: branch_norm={branch_norm!r} has no variances, got eps={eps} and momentum={momentum}; '
                    'leave them out'
                )
        if branch_norm != 'batch' and recompute:
            raise ReparamError(
                f'{name}: branch_norm={branch_norm!r} keeps no branches to recompute, got recompute={recompute}; leave '
                'it out'
            )
        super().__init__(*geometry)
        self.branch_norm = branch_norm
        self.gamma_init = gamma_init
        self.scale = float(scale)
        self.eps = eps
        self.momentum = momentum
        self.recompute = recompute

    def _add_norms(self, branches: Sequence[str], device: Any, dtype: Any) -> None:
        """Add ``<branch>_gamma``, ``<branch>_running_var`` and ``<branch>_norm``, each where branch_norm has it."""
        self._branches = tuple(branches)
        factory = dict(device=device, dtype=dtype)
        normed = self.branch_norm == 'batch'
        for branch in branches:
            gamma = None if self.branch_norm == 'none' else nn.Parameter(torch.empty(self.out_channels, **factory))
            self.register_parameter(f'{branch}_gamma', gamma)
            # 'running_var' in the name is what timm's distribute_bn looks for
            running_var = torch.empty(self.out_channels, **factory) if normed else None
            self.register_buffer(f'{branch}_running_var', running_var)
            norm = BranchNorm(self, branch, self.out_channels, self.eps, self.momentum) if normed else None
            self.register_module(f'{branch}_norm', norm)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for norm in self._norms():
            norm.bind(self)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        norm = self._modules.get(name)
        if isinstance(norm, BranchStatistics) and module is not None:
            module = norm.replaced_by(module)
        super().add_module(name, module)

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        # large kernels stay plain in the official networks
        return min(conv.kernel_size) > 1 and max(conv.kernel_size) < 7

    @classmethod
    def check_lift(cls, **options: Any) -> None:
        if options.get('gamma_init') not in (None, 0):
            raise ReparamError(
                f"{cls.__name__}: init='lift' starts at gamma 0, got gamma_init={options['gamma_init']}; use "
                "init='scratch'"
            )
        if options.get('scale', 1) != 1:
            raise ReparamError(
                f"{cls.__name__}: init='lift' is exact at scale 1 only, got scale={options['scale']}; use "
                "init='scratch'"
            )

    # Defined by a method

    def _branch_weights(self) -> list[torch.Tensor]:
        """The parameters that the branches' kernels are made of."""
        raise NotImplementedError

    def _branch_kernels(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        """The kernels of the branches, each (out_channels, in_channels/groups, .., ..)."""
        return list(weights)

    def _gammas(self) -> list[torch.Tensor]:
        """The gammas of the branches; none with branch_norm='none'."""
        raise NotImplementedError

    def _running_vars(self) -> list[torch.Tensor]:
        """The running variances of the branches; only with branch_norm='batch'."""
        raise NotImplementedError

    def _evaluate_branches(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the branches for a padded input, as the method defines them, for verification."""
        raise NotImplementedError

    def _gamma_starts(self) -> list[float]:
        """Initial value of each gamma with init='scratch'."""
        return [1.0] * len(self._branches)

    def _stock_kernel(self) -> torch.Tensor:
        """W with its own factor, if the method has one."""
        return self.weight

    def _draw_branches(self, init: str) -> None:
        """Initialise the parameters of the branches."""
        for weight in self._branch_weights():
            if init == 'scratch':
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
            elif self.branch_norm != 'none':  # gamma is 0 and hides these values at first
                fast_uniform_(weight, 1 / math.sqrt(weight[0].numel()))

    # Shared by all methods

    @torch.no_grad()
    def _init_variant_parameters(self, init: str) -> None:
        self._draw_branches(init)
        if init == 'lift':
            self._close_gates()
            return
        self._forget_variances()
        for gamma, start in zip(self._gammas(), self._gamma_starts()):
            gamma.fill_(start if self.gamma_init is None else self.gamma_init)

    @torch.no_grad()
    def _close_gates(self) -> None:
        self._forget_variances()
        for gate in self._gammas() or self._branch_weights():
            gate.zero_()

    def _forget_variances(self) -> None:
        for running_var in self._running_vars():
            running_var.fill_(1.0)

    def _norms(self) -> list[BranchStatistics]:
        return [norm for norm in self.children() if isinstance(norm, BranchStatistics)]

    def _uses_batch(self) -> bool:
        """Whether the branches are scaled by the variances of the batch."""
        if not torch.jit.is_scripting():
            return any(norm.training for norm in self._norms())
        found = False
        for norm in self.children():
            found = found or norm.training
        return found

    def _compose(self) -> torch.Tensor:
        kernels = self._branch_kernels(self._branch_weights())
        gammas, running_vars = self._gammas(), self._running_vars()
        for index in range(len(gammas)):
            scale = gammas[index]
            if len(running_vars) > 0:
                scale = scale * torch.rsqrt(running_vars[index] + self.eps)
            kernels[index] = per_output(scale) * kernels[index]
        kernel = add_on_middle(self._stock_kernel(), kernels)
        return kernel if self.scale == 1 else self.scale * kernel

    def _forward_impl(self, x: torch.Tensor) -> torch.Tensor:
        if not self._uses_batch():
            return self._convolve(x, self.equivalent_kernel(), self.bias)
        y = self._convolve(x, self._stock_kernel(), self.bias)
        x, padding = self._pad_partly(x)
        weights = self._branch_weights()
        gammas = torch.stack(self._gammas())
        # gradients of torch.func cannot be checkpointed
        if torch.jit.is_scripting() or not self.recompute or is_transforming([x, gammas] + weights):
            y, unbiased = self._add_branches(y, self._convolve_branches(x, weights, padding), gammas)
        else:
            change, unbiased = checkpoint(
                self._scaled_branches, *(x, weights, padding, gammas), use_reentrant=False, preserve_rng_state=False
            )
            y = y + change
        if y.numel() > 0:
            unbiased = unbiased.to(gammas.dtype)
            if not torch.jit.is_scripting() and torch.jit.is_tracing():  # for a call with an empty batch later
                known = torch.stack(self._running_vars())
                unbiased = torch.where(torch._shape_as_tensor(y).prod() > 0, unbiased, known)
            self._update_running_vars(unbiased)
        return y

    def _convolve_branches(
        self, x: torch.Tensor, weights: list[torch.Tensor], padding: tuple[int, int]
    ) -> list[torch.Tensor]:
        """The outputs of the branches."""
        kernels = self._branch_kernels(weights)
        size, stride, dilation = self.kernel_size, self.stride, self.dilation
        return convolve_branches(x, kernels, size, stride, padding, dilation, self.groups)

    def _add_branches(
        self, y: torch.Tensor, branches: list[torch.Tensor], gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():
            group = self._norms()[0].synchronised_over()
            if group is not None:
                return add_scaled_synchronised(y, branches, gammas, self.eps, group)
        return add_scaled(y, branches, gammas, self.eps)

    @torch.jit.unused
    def _scaled_branches(
        self, x: torch.Tensor, weights: list[torch.Tensor], padding: tuple[int, int], gammas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Of no parameter of the layer itself: the second pass comes after torch.func.functional_call has put those back
        branches = self._convolve_branches(x, weights, padding)
        return self._add_branches(torch.zeros_like(branches[0]), branches, gammas)

    def _update_running_vars(self, variances: torch.Tensor) -> None:
        running_vars = self._running_vars()
        shares = [self.momentum for _ in running_vars]
        if not torch.jit.is_scripting():
            shares = shares_of_newest(self._norms())
        for running_var, variance, share in zip(running_vars, variances, shares):
            running_var.lerp_(variance, share)

    def branch_form(self) -> Callable[..., torch.Tensor]:
        return self._evaluate

    def _evaluate(self, x: torch.Tensor) -> torch.Tensor:
        """The convolutions of the training mode, each branch over its running standard deviation."""
        y = self._convolve(x, self._stock_kernel(), None)
        factors: list[Any] = [1.0] * len(self._branches)
        if self.branch_norm == 'scale':
            factors = [per_channel(gamma) for gamma in self._gammas()]
        elif self.branch_norm == 'batch':
            deviations = [torch.sqrt(variance + self.eps) for variance in self._running_vars()]
            factors = [per_channel(gamma / deviation) for gamma, deviation in zip(self._gammas(), deviations)]
        for branch, factor in zip(self._evaluate_branches(self._pad(x)), factors):
            y = y + factor * branch
        y = self.scale * y
        return y if self.bias is None else y + per_channel(self.bias)

    def extra_repr(self) -> str:
        options = f', branch_norm={self.branch_norm!r}'
        if self.scale != 1:
            options += f', scale={self.scale:g}'
        return super().extra_repr() + options
