"""Comparison of two models outside their fused layers, module by module, under the same names."""

import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
import torch.nn as nn
from timm.layers import DropBlock2d, DropPath, PatchDropout
from torchvision.ops import StochasticDepth

from .fold import NORMS, takes_norm
from .layers._fusible import Fusible

__all__ = ['Comparison', 'differing_settings']

# Modules without effect in evaluation, whatever their settings.
_IDLE = (
    nn.Identity,
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(DropBlock2d, DropPath, PatchDropout, StochasticDepth),
)
_BATCH_NORMS = (*NORMS, nn.BatchNorm1d, nn.BatchNorm3d)
# Attributes without effect on outputs in evaluation: of training, names, export and memory.
_WITHOUT_EFFECT = (
    *('training', 'inplace', 'grad_checkpointing', 'process_group', 'fused_attn', 'exportable', 'scriptable'),
    *('pretrained_cfg', 'pretrained_model_args', 'default_cfg', 'folded_norms'),
)
# Private attributes that are compared, too: the padding of torch's convolutions in modes other than 'zeros'.
_PRIVATE = ('_reversed_padding_repeated_twice',)
_MISSING = object()


class Comparison:
    """Comparison of all modules of two models.

    Args:
        model: The train-time model.
        fused: The model that is expected to be its fusion.

    Attributes:
        problems: Differences outside `layers` and `convs`, as sentences that begin with the name of the module.
        layers: Fusible modules and their counterparts, by the ids of both: (names, layer, counterpart).
        convs: Plain convolutions whose tensors differ, by the ids of both: (names, convolution, counterpart,
            differences). They are correct only if a norm was folded into the counterpart.
        folded: Norms that the fused model lacks, by id: (name, norm).
        dtypes: The dtype in the fused model for each floating-point dtype of the train-time model.
    """

    def __init__(self, model: nn.Module, fused: nn.Module) -> None:
        self.problems: list[str] = []
        self.layers: dict[tuple[int, int], tuple[list[str], Fusible, nn.Module]] = {}
        self.convs: dict[tuple[int, int], tuple[list[str], nn.Module, nn.Module, list[str]]] = {}
        self.folded: dict[int, tuple[str, nn.Module]] = {}
        self.dtypes: dict[torch.dtype, torch.dtype] = {}
        self._seen: set[tuple[int, int]] = set()
        self._compare('', model, fused)

    def _compare(self, name: str, module: nn.Module, other: nn.Module) -> None:
        place = (id(module), id(other))
        if isinstance(module, Fusible):
            if place not in self.layers:
                self._note_dtypes(name, module, other)
            self.layers.setdefault(place, ([], module, other))[0].append(name)
            return
        if place in self.convs:
            self.convs[place][0].append(name)
        if place in self._seen:
            return
        self._seen.add(place)
        self._compare_forwards(name, module, other)
        if type(module) in _IDLE and type(other) in _IDLE:
            return
        if type(module) in _BATCH_NORMS:
            if type(other) in _BATCH_NORMS:
                self._compare_norms(name, module, other)
            else:
                self.folded[id(module)] = (name, module)
            self._compare_steps(name, module, other)
            return
        if _kind(module) != _kind(other):
            self._add(name, 'type', *(f'{type(each).__module__}.{type(each).__qualname__}' for each in (module, other)))
            return
        self.problems += [f'{name or "the model"}: {text}' for text in differing_settings(module, other)]
        differing = list(self._differing_tensors(name, module, other))
        if differing and takes_norm(module):
            self.convs[place] = ([name], module, other, differing)
            self._note_dtypes(name, module, other)
        else:
            self.problems += differing
        self._compare_children(name, module, other)

    def _compare_forwards(self, name: str, module: nn.Module, other: nn.Module) -> None:
        """Compare forward methods that were set on instances."""
        ours, theirs = (_plain(vars(each).get('forward')) for each in (module, other))
        if ours != theirs:
            self._add(name, 'forward', *('that of the class' if f is None else 'its own' for f in (ours, theirs)))

    def _compare_children(self, name: str, module: nn.Module, other: nn.Module) -> None:
        if type(module) in (nn.Sequential, nn.ModuleList, nn.ModuleDict):
            orders = [
                [key for key in m._modules if key in module._modules and key in other._modules] for m in (module, other)
            ]
            if orders[0] != orders[1]:
                self._add(name, 'order of the modules', *orders)
        for key in {**module._modules, **other._modules}:
            path = f'{name}.{key}' if name else key
            child, counterpart = module._modules.get(key), other._modules.get(key)
            if child is not None and counterpart is not None:
                self._compare(path, child, counterpart)
            elif not _is_idle(child) or not _is_idle(counterpart):
                self._add(path, 'a module', *('none' if m is None else type(m).__name__ for m in (child, counterpart)))

    def _compare_norms(self, name: str, norm: Any, other: Any) -> None:
        """Compare two BatchNorms of any class: timm's with activation, synchronised and frozen ones."""
        for key in ('eps', 'momentum'):
            ours, theirs = (getattr(module, key, _MISSING) for module in (norm, other))
            if ours != theirs and _MISSING not in (ours, theirs):  # a frozen norm has no momentum
                self._add(name, key, ours, theirs)
        for key, default in (('weight', 1.0), ('bias', 0.0), ('running_mean', None), ('running_var', None)):
            ours, theirs = (getattr(module, key) for module in (norm, other))
            if default is not None:
                ours, theirs = (
                    torch.full_like(norm.running_mean, default)
                    if value is None and norm.running_mean is not None
                    else value
                    for value in (ours, theirs)
                )
            self.problems += self._differing_tensor(f'{name}.{key}', ours, theirs)
        ours, theirs = (getattr(module, 'num_batches_tracked', None) for module in (norm, other))
        if ours is not None and theirs is not None:
            self.problems += self._differing_tensor(f'{name}.num_batches_tracked', ours, theirs)

    def _compare_steps(self, name: str, norm: nn.Module, other: nn.Module) -> None:
        """Compare the activation that timm's norms include; it remains where the norm was folded."""
        steps, others = _steps(norm), _steps(other)
        if len(steps) != len(others):
            texts = (' and '.join(type(step).__name__ for step in found) or 'nothing' for found in (steps, others))
            self._add(name, 'after the norm', *texts)
        for step, counterpart in zip(steps, others):
            self._compare(f'{name}.act', step, counterpart)

    def _differing_tensors(self, name: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
        tensors = [{**m._parameters, **m._buffers} for m in (module, other)]
        for key in {**tensors[0], **tensors[1]}:
            path = f'{name}.{key}' if name else key
            yield from self._differing_tensor(path, *(of_one.get(key) for of_one in tensors))

    def _differing_tensor(self, name: str, ours: torch.Tensor | None, theirs: torch.Tensor | None) -> Iterator[str]:
        if ours is None or theirs is None:
            if ours is not theirs:
                yield f'{name}: expected {_shape(ours)}, got {_shape(theirs)}'
            return
        if ours.shape != theirs.shape:
            yield f'{name}: expected shape {tuple(ours.shape)}, got {tuple(theirs.shape)}'
            return
        expected = self._dtype_of(ours, theirs)
        if theirs.dtype not in (expected, ours.dtype):  # norms may keep their dtype where the rest is cast
            yield f'{name}: expected {expected}, got {theirs.dtype}'
        cast = ours.detach().to(theirs.device, theirs.dtype)
        if not torch.equal(cast, theirs.detach()):
            difference = (cast.to(_wide(cast)) - theirs.to(_wide(theirs))).abs().max().item()
            yield f"{name}: expected the model's values, got others, by up to {difference:.3g}"

    def _dtype_of(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.dtype:
        """The expected dtype of a tensor: the one to which the first tensor of the same dtype was cast."""
        if not ours.is_floating_point():
            return theirs.dtype if ours.is_complex() and theirs.is_complex() else ours.dtype
        return self.dtypes.setdefault(ours.dtype, theirs.dtype)

    def _note_dtypes(self, name: str, layer: nn.Module, other: nn.Module) -> None:
        """Record the dtype to which a layer was cast, and compare it with that of earlier layers."""
        ours, theirs = next(layer.parameters(), None), getattr(other, 'weight', None)
        if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
            expected = self._dtype_of(ours, theirs)
            if theirs.dtype not in (expected, ours.dtype):
                self.problems.append(f'{name}.weight: expected {expected}, got {theirs.dtype}')

    def _add(self, name: str, what: str, expected: Any, found: Any) -> None:
        self.problems.append(f'{name or "the model"}: {what}: expected {expected}, got {found}')


def differing_settings(module: nn.Module, other: nn.Module) -> Iterator[str]:
    """Yield the settings in which two modules of one class differ, if they matter in evaluation.

    Numbers, strings, functions, and sequences and dicts of these are compared. Settings of training and caches are not.

    Args:
        module: The module with the expected settings.
        other: The module to compare with it.

    Yields:
        Texts such as 'stride: expected (1, 1), got (2, 2)'.
    """
    for key in sorted(vars(module).keys() | vars(other).keys()):
        if (key.startswith('_') and key not in _PRIVATE) or key in _WITHOUT_EFFECT or 'drop' in key or key == 'forward':
            continue
        ours, theirs = (getattr(each, key, _MISSING) for each in (module, other))
        expected, found = _plain(ours), _plain(theirs)
        if _MISSING not in (expected, found) and expected != found:
            yield f'{key}: expected {ours}, got {theirs}'
    if isinstance(module, torch.fx.GraphModule) and module.code != getattr(other, 'code', None):
        yield 'code: expected the graph of the model, got another one'


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """A module's class by name and code, since torch.fx, parametrizations and functions create equal classes anew."""
    cls = type(module)
    code = None if isinstance(module, torch.fx.GraphModule) else getattr(cls.forward, '__code__', None)
    return cls.__module__, cls.__qualname__, code


def _is_idle(module: nn.Module | None) -> bool:
    """Whether a module has no effect in evaluation."""
    if type(module) is nn.Sequential:
        return all(_is_idle(child) for child in module)
    return module is None or (type(module) in _IDLE and 'forward' not in vars(module))


def _steps(module: nn.Module) -> list[nn.Module]:
    """The modules with an effect in evaluation that follow the normalisation, or that replace the norm."""
    if type(module) in _BATCH_NORMS:
        steps = [getattr(module, name) for name in ('drop', 'act') if hasattr(module, name)]
    else:
        steps = list(module) if isinstance(module, nn.Sequential) else [module]
    return [step for step in steps if not _is_idle(step)]


def _plain(value: Any) -> Any:
    """A form of the value that can be compared, or _MISSING."""
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, type, torch.dtype)):
        return 'nan' if isinstance(value, float) and math.isnan(value) else value
    if isinstance(value, types.FunctionType):  # each model may have its own copy
        return value.__code__, _plain(value.__defaults__), *map(_content, value.__closure__ or ())
    if isinstance(value, types.BuiltinFunctionType):
        return value
    if isinstance(value, types.MethodType):
        return _plain(value.__func__)
    if isinstance(value, functools.partial):
        return _plain([value.func, list(value.args), value.keywords])
    if isinstance(value, dict):
        parts = [(key, _plain(part)) for key, part in value.items()]
        return _MISSING if any(part is _MISSING for _, part in parts) else parts
    if isinstance(value, (list, tuple)):
        values = tuple(_plain(part) for part in value)
        return _MISSING if _MISSING in values else values
    return _MISSING


def _content(cell: Any) -> Any:
    """The value of a closure's variable, if it can be compared."""
    try:
        value = cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING
    return value.__code__ if isinstance(value, types.FunctionType) else _plain(value)  # a function may refer to itself


def _shape(tensor: torch.Tensor | None) -> str:
    return 'no tensor' if tensor is None else f'a tensor of shape {tuple(tensor.shape)}'


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64
