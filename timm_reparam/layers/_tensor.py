"""Tensors and modules in general: float64 copies, memory, random starts, what torch is doing with a tensor."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch.utils._pytree import tree_flatten

__all__ = [
    'autocast_disabled',
    'fast_uniform_',
    'float64_copy',
    'inside_backward',
    'is_tracing_or_transforming',
    'is_transforming',
    'kept_tensors',
    'materialize',
    'scale_shift',
    'to_float64',
]

_Module = TypeVar('_Module', bound=nn.Module)


def autocast_disabled(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off on `device_type` (nothing to switch off on the meta device)."""
    # asked first in eager mode, where small layers notice the time that torch.autocast takes
    if device_type == 'meta' or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device_type)):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@torch.jit.unused  # scripted code asks for that first
def is_tracing_or_transforming(tensors: list[torch.Tensor]) -> bool:
    """True under tracing, compilation, export or functorch, where custom autograd functions must not be used."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or is_transforming(tensors)


@torch.jit.unused
def is_transforming(tensors: list[torch.Tensor]) -> bool:
    """True under functorch transforms, and where one of the tensors has a tangent of forward mode.

    False inside a backward pass: a pass that checkpointing repeats there must take the path of the first one, whatever
    batches the gradients or differentiates them forward.
    """
    if torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return not inside_backward()
    in_forward_mode = forward_ad._current_level >= 0
    return in_forward_mode and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def inside_backward() -> bool:
    """True during a backward pass, where gradient checkpointing repeats a forward pass."""
    return torch._C._current_graph_task_id() != -1


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A detached float64 copy of a tensor (integers keep their dtype), on the CPU where the device has no float64."""
    device = 'cpu' if tensor.device.type == 'mps' else None
    dtype = torch.float64 if tensor.is_floating_point() else torch.complex128 if tensor.is_complex() else None
    return tensor.detach().to(device=device, dtype=dtype, copy=True)


def float64_copy(module: _Module, memo: Mapping[int, Any] | None = None) -> _Module:
    """A float64 copy of a module, on the CPU where the device has no float64; objects in `memo` are not copied."""
    # Deep-copying with the converted tensors already in the memo makes no copy of them in their own dtype first.
    memo = {**(memo or {}), **{id(buffer): to_float64(buffer) for buffer in module.buffers()}}
    memo |= {id(p): nn.Parameter(to_float64(p), p.requires_grad) for p in module.parameters()}
    memo |= {id(kept): to_float64(kept) for kept in kept_tensors(module) if id(kept) not in memo}
    return copy.deepcopy(module, memo)


def kept_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The floating-point tensors in plain attributes of modules, such as masks and tables that are made once."""
    for part in module.modules():
        values = [value for key, value in vars(part).items() if key not in ('_parameters', '_buffers', '_modules')]
        for value in tree_flatten(values)[0]:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield value


def scale_shift(
    norm: Any, convert: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A BatchNorm in evaluation as (scale, shift), each (channels,).

    Args:
        norm: Has running_mean, running_var, eps, and weight and bias, which may be None.
        convert: Applied to the tensors first, such as :func:`to_float64`.
    """
    tensors: tuple[Any, ...] = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if convert is not None:
        tensors = tuple(None if tensor is None else convert(tensor) for tensor in tensors)
    mean, variance, gamma, bias = tensors
    scale = torch.rsqrt(variance + norm.eps)
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias
    return scale, shift


@torch.no_grad()
def fast_uniform_(values: torch.Tensor, bound: float) -> None:
    """Fill a tensor with random values in [-bound, bound], for starts that training moves at once.

    On the CPU there are 256 different values, because its generator takes as long for one number as for eight bytes.
    """
    if values.device.type != 'cpu':
        values.uniform_(-bound, bound)
        return
    drawn = torch.empty((values.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    values.copy_(drawn.view(torch.int8)[: values.numel()].view(values.shape))
    values.add_(0.5).mul_(bound / 127.5)


def materialize(module: nn.Module, device: torch.device) -> None:
    """Give the parameters and buffers on the meta device uninitialised memory on `device`.

    ``Module.to_empty`` does so for all parameters and buffers, and takes several times as long.
    """
    if device.type == 'meta':
        return
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                setattr(part, name, nn.Parameter(memory, parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
