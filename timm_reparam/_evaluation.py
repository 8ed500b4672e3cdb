"""Context managers for forward passes: evaluation mode, full precision, a default dtype, hooks that are removed."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn

from .layers._tensor import autocast_disabled

__all__ = ['default_dtype', 'evaluating', 'full_precision', 'removed_afterwards']


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode; the mode of every module is restored on exit."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and cuDNN's benchmark; these and the random state are restored on exit."""
    cudnn = torch.backends.cudnn
    with (
        torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []),
        autocast_disabled(device.type),
        _highest_matmul_precision(),
        cudnn.flags(enabled=cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False),
    ):
        yield


@contextmanager
def _highest_matmul_precision() -> Iterator[None]:
    """Compute float32 matrix products in float32; restores a setting of either of torch's two interfaces."""
    backends: Any = torch.backends
    newer = [each.matmul for each in (backends.cuda, backends.mkldnn) if hasattr(each, 'matmul')]
    newer = [place for place in newer if hasattr(place, 'fp32_precision')]
    settings = [place.fp32_precision for place in newer]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # fp32_precision was set, which this older function cannot express
        before = None
    torch.set_float32_matmul_precision('highest')
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        else:
            for place, setting in zip(newer, settings):
                place.fp32_precision = setting


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Set torch's default dtype; it is restored on exit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def removed_afterwards(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks on exit."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
