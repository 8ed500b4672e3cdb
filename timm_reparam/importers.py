"""Import and export of whole checkpoints in the formats of the methods' official code.

:mod:`timm_reparam.formats` reads and writes the entries of the convolutions. The other keys of a model are timm's.
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

    Entries of the official layers, such as DO-Conv's ``W``, ``D`` and ``d_diag``, ACNet's blocks (train-time or fused),
    RefConv's ``convmap.weight``, and K stacked kernels with their attention, become entries of this package's layers.
    If the model has no layer of that method in that place, or one that cannot hold the parameters, it gets the
    equivalent kernel.

    The official blocks of ACNet replace a convolution *and* its BatchNorm. If the checkpoint has no entries for the
    BatchNorm that follows in the model, they are computed. They are exact in evaluation. In training mode the scale is
    approximate: it comes from a variance that is estimated as if the input were white noise, and is unknown for fused
    blocks. If the checkpoint has entries for the BatchNorm, the bias of the block, which that norm removes, is
    subtracted from its running mean.

    Args:
        state_dict: Any checkpoint with timm's names around the convolutions, with or without the prefixes of wrappers
            (``module.`` and ``_orig_mod.``). It is not changed.
        model: The model to load it into: a variant, a stock model or one with ACBlock2d.

    Returns:
        A new state dict in the model's layout; the same entries if no convolution is in an official format.

    Raises:
        ReparamError: Entries of an official convolution are missing, or the model cannot represent it.
    """
    own = model.state_dict().keys()
    wrapped = any(key.startswith(('module.', '_orig_mod.')) for key in own)  # the model itself is wrapped
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
                'no key of the checkpoint matches the model: nothing will be loaded; %s', remedy or 'compare the keys'
            )
        return translated
    _place_constants(translated, imported, model)
    # Layers with nothing but a plain kernel start as in a lift.
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
    """Return the state dict of a model in the format of the method's official (or most common) code.

    Args:
        model: A model with dynamic convolutions. Each becomes K stacked kernels, ``attention.fc1`` and
            ``attention.fc2``, with the current temperature folded in.

    Returns:
        A new state dict; keys other than the convolutions' are unchanged.

    Raises:
        ReparamError: The model holds no variant, or one whose method cannot be exported.
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
    """A layer's entries in the format of its method's code; ReparamError if the method cannot be exported."""
    for method, layout in FORMATS.items():
        if isinstance(layer, method) and layout.write is not None:
            return layout.write(layer)
    raise ReparamError(
        f'{type(layer).__name__}: only dynamic convolution can be exported; use fuse_model() for stock keys'
    )


def _convolutions(model: nn.Module) -> Iterator[tuple[str, _ConvNd]]:
    for name, module in model.named_modules(remove_duplicate=False):  # under every name, as in a state dict
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            yield name, module


def _key(name: str, key: str) -> str:
    return f'{name}.{key}' if name else key


def _prefixed(name: str, entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {_key(name, key): value for key, value in entries.items()}


def _method_of(conv: _ConvNd, entries: Entries) -> type[ReparamLayer] | None:
    """The layer class whose official format matches a convolution's entries, or None."""
    for layer, layout in FORMATS.items():
        if isinstance(conv, layer.conv_types) and layout.matches(entries):
            return layer
    return None


def _translate(conv: _ConvNd, method: type[ReparamLayer], entries: Entries) -> TranslatedEntries:
    if isinstance(conv, method):
        return FORMATS[method].read(conv, entries)
    if method.input_dependent:
        raise ReparamError(
            'expected a dynamic convolution as in the checkpoint, which has no single kernel, but the model has none '
            'here; choose the model and its skip= as for the checkpoint'
        )
    # The equivalent kernel is taken from a temporary layer of that method.
    layer = method.from_conv(nn.Conv2d(**conv_arguments(conv), device='meta'))
    found = FORMATS[method].read(layer, entries)
    layer = fresh_layer(layer, found.entries['weight'])
    try:
        layer.load_state_dict({**layer.state_dict(), **found.entries})
    except RuntimeError as error:
        raise ReparamError(
            f'expected a {method.__name__} with its default options in the checkpoint; build the model with '
            f'this layer and the options of the checkpoint: {error}'
        ) from None
    return dataclasses.replace(found, entries={'weight': layer.fuse().weight.detach()})


def _place_constants(state: dict[str, torch.Tensor], imported: dict[str, TranslatedEntries], model: nn.Module) -> None:
    """Put the constants that official layers add into the bias, or into the norm that follows; changes `state`."""
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
            # The norm subtracts its mean, and with it the constant.
            state[f'{norm_name}.running_mean'] = state[f'{norm_name}.running_mean'] - constant
            continue
        if norm.weight is None or norm.running_mean is None or norm.num_batches_tracked is None:
            raise ReparamError(
                f'{norm_name}: the official block adds a constant to each channel, but this norm has no '
                'bias; build the model with affine norms'
            )
        mean, variance = imported[name].mean, imported[name].variance
        if mean is None or variance is None:
            unknown.append(name)
            mean, variance = torch.zeros_like(constant), torch.ones_like(constant)
        made = dict(running_mean=mean, running_var=variance, bias=constant + mean)
        # This scale cancels the division by the standard deviation in evaluation.
        made['weight'] = (variance.double() + norm.eps).sqrt().to(variance.dtype)
        made['num_batches_tracked'] = norm.num_batches_tracked.detach().clone()
        state.update(_prefixed(norm_name, made))
    if unknown:
        _logger.warning(
            'a fused block stores no statistics, so the norms that follow are correct in evaluation only; to train on, '
            'import the train-time checkpoint: %s',
            ', '.join(unknown),
        )


def _norms_after(model: nn.Module, names: set[str]) -> dict[str, tuple[str, _BatchNorm]]:
    """The BatchNorm that directly follows each convolution, by the convolution's name, from a pass on meta tensors."""
    modules = dict(model.named_modules())
    first = next(conv for _, conv in _convolutions(model))
    image = torch.empty(1, first.in_channels, *(config_of(model).get('input_size') or (3, 224, 224))[1:], device='meta')
    made: dict[int, tuple[str, torch.Tensor]] = {}  # holds the outputs, so that their ids stay unique
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
