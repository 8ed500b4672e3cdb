"""Check checkpoints against a converted model, and take the kernels out of their entries."""

import os
from collections.abc import Collection, Iterable

import torch
import torch.nn as nn

from .errors import ReparamError
from .layers import ReparamLayer
from .layers._base import conv_arguments
from .timm_model import architecture_of, names_of
from .variants import is_variant

__all__ = [
    'entries_by_module',
    'fresh_layer',
    'lift_state_dict',
    'listed_problems',
    'prefix_remedy',
]


def lift_state_dict(
    state_dict: dict[str, torch.Tensor], model: nn.Module, not_lifted: ReparamError | None = None
) -> dict[str, torch.Tensor]:
    """Check that a checkpoint is one of a converted model, or of its stock architecture.

    The layers take stock entries as a lift while they load; here the keys are compared, because timm drops strictness
    where the classes differ. If the stem of a train-time checkpoint has another number of input channels it is folded
    to the stock kernel, which the caller (timm) adapts, and which lifts again.

    Args:
        state_dict: A stock or a train-time checkpoint.
        model: The model it is for, converted with init='lift'.
        not_lifted: Why the model could not be converted with init='lift', if so; raised if a lift is needed.

    Returns:
        A new state dict for the model, in which a layer has all of its entries or those of a plain convolution.

    Raises:
        ReparamError: keys are missing or unexpected, or shapes differ, the classifier's and the stem's aside.
    """
    own = model.state_dict()
    # under every name, as in a state dict
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_variant(module)}
    added = {f'{name}.{key}' for name, layer in layers.items() for key in layer.state_dict()}
    added -= {f'{name}.{key}' for name in layers for key in ('weight', 'bias')}
    state_dict = dict(state_dict)
    lifted = set() if added & state_dict.keys() else added
    stems = names_of(model, 'first_conv')
    for name in set(stems) & layers.keys():
        weight = state_dict.get(f'{name}.weight')
        if not lifted and weight is not None and weight.shape[1] != layers[name].weight.shape[1]:
            entries = entries_by_module(state_dict, [name])[name]
            state_dict[f'{name}.weight'] = _fold_entries(name, layers[name], entries)
            lifted = {key for key in added if key.startswith(f'{name}.')}
    if lifted and not_lifted is not None:
        raise not_lifted
    state_dict = {key: value for key, value in state_dict.items() if key not in lifted}

    classifiers = tuple(f'{name}.' for name in names_of(model, 'classifier'))
    free = {key for key in own.keys() | state_dict.keys() if key.startswith(classifiers)} if classifiers else set()
    # absent from checkpoints older than PyTorch 0.4.1, and filled in by BatchNorm itself
    counters = {key for key in own if key.endswith('num_batches_tracked')}
    problems = {
        'missing': sorted(own.keys() - state_dict.keys() - lifted - free - counters),
        'unexpected': sorted(state_dict.keys() - own.keys() - free),
        'of another shape': sorted(
            f'{key} (expected {tuple(own[key].shape)}, got {tuple(value.shape)})'
            for key, value in state_dict.items()
            if key in own
            and key not in free
            and value.shape != own[key].shape
            and not (key.removesuffix('.weight') in stems and value.shape[2:] == own[key].shape[2:])
        ),
    }
    if any(problems.values()):
        architecture = architecture_of(model) or type(model).__name__
        if remedy := prefix_remedy(state_dict, own):
            raise ReparamError(f'the checkpoint is not one of {architecture}: of its {len(state_dict)} keys {remedy}')
        raise ReparamError(
            f'the checkpoint is not one of {architecture}, nor of the stock architecture:\n'
            f'{listed_problems(problems)}\n'
            'load it into the architecture and with the conv_options that it was made with'
        )
    return state_dict


def entries_by_module(state_dict: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of each of these modules, under keys without the module's name."""
    entries: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for key, value in state_dict.items():
        parts = key.split('.')
        for length in range(len(parts)):
            name = '.'.join(parts[:length])
            if name in entries:
                entries[name]['.'.join(parts[length:])] = value
    return entries


def prefix_remedy(keys: Collection[str], expected: Collection[str]) -> str:
    """What to do about a prefix that keeps every key of a checkpoint from being one of the model; '' if none does.

    Args:
        keys: Keys of the checkpoint.
        expected: Keys of the model.
    """
    prefix = os.path.commonprefix(list(keys)).rpartition('.')[0] + '.'
    if set(keys) & set(expected) or not {key.removeprefix(prefix) for key in keys} & set(expected):
        return ''
    return f'all of them start with {prefix!r}: take that off, key.removeprefix({prefix!r})'


def listed_problems(problems: dict[str, list[str]]) -> str:
    """Lines of an error: each kind of problem that there is, with its keys."""
    return '\n'.join(f'  {kind}: {", ".join(keys)}' for kind, keys in problems.items() if keys)


def fresh_layer(
    layer: ReparamLayer, weight: torch.Tensor, bias: torch.Tensor | None = None, init: str = 'lift'
) -> ReparamLayer:
    """A new layer with the options of `layer`, for a stock kernel whose number of input channels may be another one."""
    arguments = dict(conv_arguments(layer), bias=bias is not None)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    arguments['in_channels'] = weight.shape[0] if transposed else weight.shape[1] * layer.groups
    conv = layer.conv_types[0](**arguments, device='meta', dtype=weight.dtype)
    conv.weight = nn.Parameter(weight.detach())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return type(layer).from_conv(conv, init=init, **layer.options())


def _fold_entries(name: str, layer: ReparamLayer, entries: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stock kernel that a layer's entries of a checkpoint stand for, whatever its number of input channels."""
    source = fresh_layer(layer, entries['weight'].clone(), entries.get('bias'), init='scratch')
    try:
        source.load_state_dict(entries)
    except RuntimeError as e:
        raise ReparamError(
            f'{name}: the checkpoint does not hold a {type(layer).__name__} with these options: {e}'
        ) from None
    return source.fuse().weight.detach()
