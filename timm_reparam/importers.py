"""Whole checkpoints of the methods' official code, for models of this package and from them.

The convolutions' entries are read and written by :mod:`timm_reparam.formats`; the keys of the rest of the model are
timm's.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from timm.models import clean_state_dict
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ._evaluation import evaluating, removed_afterwards
from .errors import ReparamError
from .formats import FORMATS, Entries, TranslatedEntries
from .layers import ReparamLayer
from .layers._base import conv_arguments
from .lift import entries_by_module, fresh_layer, listed_problems, prefix_remedy
from .timm_model import config_of
from .variants import is_variant

__all__ = ['export_state_dict', 'import_state_dict']

_logger = logging.getLogger(__name__)


def import_state_dict(state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Translate a checkpoint that was trained with a method's official code.

    DO-Conv's ``W``, ``D`` and ``d_diag``, ACNet's blocks (train-time or fused), RefConv's ``convmap.weight``, and K
    stacked kernels with their attention become entries of this package's layers. Where the model has no layer of that
    method in that place, or one that cannot hold the parameters, it gets the kernel that they stand for.

    ACNet's blocks replace a convolution *and* its BatchNorm. Where the checkpoint has no entries of the BatchNorm that
    follows in the model, they are made: in evaluation they are exact; in training they normalise as the block did as
    far as the checkpoint knows (exact means; variances as if the branches' inputs had no structure). Where it has
    them, the block's constant, which that norm removes, is taken from its mean.

    Args:
        state_dict: Any checkpoint with timm's names around the convolutions, those of a wrapper (``module.`` and
            ``_orig_mod.``) before them or not. Left as it was.
        model: The model it is for: a variant, a stock model or one with ACBlock2d.

    Returns:
        A new state dict in the model's layout; the same entries if no convolution is in an official format.

    Raises:
        ReparamError: entries of an official convolution are missing, or the model cannot hold what it computes.
    """
    own = model.state_dict().keys()
    wrapped = any(key.startswith(('module.', '_orig_mod.')) for key in own)  # the model itself is
    translated = dict(state_dict) if wrapped else clean_state_dict(state_dict)
    imported: dict[str, TranslatedEntries] = {}
    missing = []
    convolutions = dict(_convolutions(model))
    for name, given in entries_by_module(translated, convolutions).items():
        conv, entries = convolutions[name], dict(given)
        method = _method_of(conv, entries)
        if method is None:
            continue
        try:
            imported[name] = _translate(conv, method, entries)
        except KeyError as error:
            missing.append(_key(name, error.args[0]))
            continue
        except ReparamError as error:
            raise ReparamError(f'{name or "the model"}: {error}') from None
        for key in given.keys() - entries.keys():
            del translated[_key(name, key)]
        translated.update(_prefixed(name, imported[name].entries))
    if missing:
        raise ReparamError(
            f'the checkpoint lacks entries of the official layers:\n{listed_problems(dict(missing=sorted(missing)))}'
        )
    if not imported:
        if not own & translated.keys():
            remedy = prefix_remedy(translated, own)
            _logger.warning(
                'nothing is read: no key of the checkpoint is one of the model; %s', remedy or 'look at both'
            )
        return translated
    _place_constants(translated, imported, model)
    # What the checkpoint has plain, or as a kernel only, starts as in a lift.
    composed = []
    for name, entries in entries_by_module(translated, convolutions).items():
        layer = convolutions[name]
        if is_variant(layer) and 'weight' in entries and entries.keys() <= {'weight', 'bias'}:
            composed += [name] if name in imported else []
            translated.update(_prefixed(name, {**fresh_layer(layer, entries['weight']).state_dict(), **entries}))
    if composed:
        _logger.info(
            'only the kernels of %d of %d official layers are taken over: %s',
            len(composed),
            len(imported),
            ', '.join(composed),
        )
    return translated


def export_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's state dict with its variants in the layout of the method's official (or most common) code.

    Args:
        model: A model with dynamic convolutions; each becomes K stacked kernels, ``attention.fc1`` and
            ``attention.fc2``, with the current temperature folded in.

    Returns:
        A new state dict; keys other than the convolutions' are unchanged.

    Raises:
        ReparamError: the model holds no variant, or one whose method has no such way.
    """
    layers = [(name, layer) for name, layer in _convolutions(model) if is_variant(layer)]
    if not layers:
        raise ReparamError(
            f'{type(model).__name__} holds no over-parameterised convolution: there is nothing to export'
        )
    state = dict(model.state_dict())
    for name, layer in layers:
        for key in layer.state_dict():
            del state[_key(name, key)]
        state.update(_prefixed(name, _written(layer)))
    return state


def _written(layer: ReparamLayer) -> Entries:
    """A layer's entries in the format of its method's code; ReparamError if the method has no such way."""
    for method, layout in FORMATS.items():
        if isinstance(layer, method) and layout.write is not None:
            return layout.write(layer)
    raise ReparamError(f'{type(layer).__name__}: only dynamic convolution is exported; fuse_model() gives stock keys')


def _convolutions(model: nn.Module) -> Iterator[tuple[str, _ConvNd]]:
    for name, module in model.named_modules(remove_duplicate=False):  # under every name, as in a state dict
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            yield name, module


def _key(name: str, key: str) -> str:
    return f'{name}.{key}' if name else key


def _prefixed(name: str, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_key(name, key): value for key, value in entries.items()}


def _method_of(conv: _ConvNd, entries: Entries) -> type[ReparamLayer] | None:
    """The layer in whose official format a convolution's entries are, or None."""
    for layer, layout in FORMATS.items():
        if isinstance(conv, layer.conv_types) and layout.matches(entries):
            return layer
    return None


def _translate(conv: _ConvNd, method: type[ReparamLayer], entries: Entries) -> TranslatedEntries:
    if isinstance(conv, method):
        return FORMATS[method].read(conv, entries)
    if method.input_dependent:
        raise ReparamError(
            'the checkpoint has a dynamic convolution here, which is no single kernel, and the model has none; '
            'choose the model and its skip= as the checkpoint was made'
        )
    # a stand-in of that method, of which the kernel is taken
    layer = method.from_conv(nn.Conv2d(**conv_arguments(conv), device='meta'))
    found = FORMATS[method].read(layer, entries)
    layer = fresh_layer(layer, found.entries['weight'])
    try:
        layer.load_state_dict({**layer.state_dict(), **found.entries})
    except RuntimeError as error:
        raise ReparamError(
            f'the checkpoint does not hold a {method.__name__} with its default options: {error}'
        ) from None
    return dataclasses.replace(found, entries={'weight': layer.fuse().weight.detach()})


def _place_constants(state: dict[str, torch.Tensor], imported: dict[str, TranslatedEntries], model: nn.Module) -> None:
    """Put what official layers add to each channel into the bias, or into the norm that follows, in place."""
    modules = dict(model.named_modules())
    constants = {name: found.constant for name, found in imported.items() if found.constant is not None}
    without_bias = {name for name in constants if modules[name].bias is None}
    norms = _norms_after(model, without_bias) if without_bias else {}
    unknown = []
    for name, constant in constants.items():
        if name not in without_bias:
            state[_key(name, 'bias')] = constant
            continue
        if name not in norms:
            raise ReparamError(
                f'{name}: the official block adds a constant to each channel, but the convolution here has no bias, '
                'and no BatchNorm follows it; build the model with biases'
            )
        norm_name, norm = norms[name]
        if f'{norm_name}.running_mean' in state:
            # The norm takes the constant away again.
            state[f'{norm_name}.running_mean'] = state[f'{norm_name}.running_mean'] - constant
            continue
        if norm.weight is None or norm.running_mean is None or norm.num_batches_tracked is None:
            raise ReparamError(
                f'{norm_name}: the official block adds a constant to each channel, but this norm has no bias'
            )
        mean, variance = imported[name].mean, imported[name].variance
        if mean is None or variance is None:
            unknown.append(name)
            mean, variance = torch.zeros_like(constant), torch.ones_like(constant)
        made = dict(running_mean=mean, running_var=variance, bias=constant + mean)
        # this scale undoes the division in evaluation, whatever the variance
        made['weight'] = (variance.double() + norm.eps).sqrt().to(variance.dtype)
        made['num_batches_tracked'] = norm.num_batches_tracked.detach().clone()
        state.update(_prefixed(norm_name, made))
    if unknown:
        _logger.warning(
            'fused blocks do not tell the statistics of their outputs, so the norms behind them are right in '
            'evaluation only: %s',
            ', '.join(unknown),
        )


def _norms_after(model: nn.Module, names: set[str]) -> dict[str, tuple[str, _BatchNorm]]:
    """The BatchNorm that takes a convolution's output itself, by the convolution's name, from a pass without values."""
    modules = dict(model.named_modules())
    first = next(conv for _, conv in _convolutions(model))
    image = torch.empty(1, first.in_channels, *(config_of(model).get('input_size') or (3, 224, 224))[1:], device='meta')
    made: dict[int, tuple[str, torch.Tensor]] = {}  # the outputs are kept, so that no id comes twice
    found: dict[str, tuple[str, _BatchNorm]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def forward_hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if name in names:
                made[id(output)] = name, output
            elif isinstance(module, _BatchNorm) and inputs and id(inputs[0]) in made:
                found[made[id(inputs[0])][0]] = name, module

        return forward_hook

    watched = [(n, m) for n, m in modules.items() if n in names or isinstance(m, _BatchNorm)]
    handles = [module.register_forward_hook(hook(name)) for name, module in watched]
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with removed_afterwards(handles), evaluating(model), torch.no_grad():
        meta = {name: tensor.to('meta') for name, tensor in tensors.items()}
        torch.func.functional_call(model, meta, (image.to(first.weight.dtype),))
    return found
