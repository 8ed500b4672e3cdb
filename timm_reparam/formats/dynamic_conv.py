"""Checkpoints of public code for dynamic convolution: K stacked kernels and an attention of 1x1 convolutions."""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import ReparamError
from ..layers import DynamicConv2d
from ..layers._tensor import float64_copy
from ._format import Entries, Format, TranslatedEntries

__all__ = ['FORMAT']

_SCHEDULE = {'temperature_position', 'temperature_steps'}


def matches(entries: Entries) -> bool:
    """Whether the kernels are stacked, or it is the form for inference, which lacks the schedule."""
    stacked = 'weight' in entries and entries['weight'].dim() == 5
    return stacked or ('residual_weight' in entries and 'temperature_position' not in entries)


def read(layer: DynamicConv2d, entries: Entries) -> TranslatedEntries:
    """Read K stacked kernels and biases, or the form for inference of this package.

    Neither has a temperature, so it is 1: the end of the schedule.
    """
    new = {}
    if 'residual_weight' in entries:
        for name in layer.state_dict().keys() - _SCHEDULE:
            new[name] = entries.pop(name)
    else:
        for name in ('weight', 'bias'):
            if name in entries:
                stack = entries.pop(name)
                mean = stack.double().mean(0)
                new[name] = mean.to(stack.dtype)
                new[f'residual_{name}'] = (stack[:-1].double() - mean).to(stack.dtype).flatten(0, 1)
        new.update(_read_attention(layer, entries))
    if layer.temperature is not None:
        steps = layer.temperature_steps.detach().clone()
        new.update(temperature_steps=steps, temperature_position=steps.clone())
    return TranslatedEntries(new)


def _read_attention(layer: DynamicConv2d, entries: Entries) -> Entries:
    # two 1x1 convolutions, called fc1 and fc2, or net.0 and net.2; the first usually has no bias
    names = ('net.0', 'net.2') if 'attention.net.0.weight' in entries else ('fc1', 'fc2')
    first, second = (entries.pop(f'attention.{name}.weight').flatten(1) for name in names)
    known = [entries.pop(f'attention.{name}.bias', None) for name in names]
    biases = [w.new_zeros(len(w)) if b is None else b for w, b in zip((first, second), known)]
    spare = layer.attention.fc1.out_features - len(first)
    if spare < 0:
        raise ReparamError(
            f'the attention in the checkpoint has {len(first)} hidden features, this layer has '
            f'{layer.attention.fc1.out_features}, from reduction={layer.reduction}; use a smaller reduction '
            '(conv_options=dict(reduction=3) is wide enough for a ratio of 1/4)'
        )
    if spare:
        # hidden features that the checkpoint lacks: fc2 ignores them at first, training may use them
        fresh = nn.Linear(first.shape[1], spare, device=first.device, dtype=first.dtype)
        first = torch.cat([first, fresh.weight.detach()])
        biases[0] = torch.cat([biases[0], fresh.bias.detach()])
        second = F.pad(second, (0, spare))
    return {
        'attention.fc1.weight': first,
        'attention.fc1.bias': biases[0],
        'attention.fc2.weight': second,
        'attention.fc2.bias': biases[1],
    }


@torch.no_grad()
def write(layer: DynamicConv2d) -> Entries:
    """Write K stacked kernels and an attention of 1x1 convolutions, for temperature 1: the current one is folded in.

    ``attention.fc1.bias``, which most of that code lacks, is left out where it is zero.

    Returns:
        `weight` (num_kernels, out_channels, in_channels/groups, kh, kw), `bias` (num_kernels, out_channels) if
        there is one, ``attention.fc1`` and ``attention.fc2``.
    """
    exact = float64_copy(layer.fuse())
    state = exact._stacks()
    for name, value in exact.attention.state_dict().items():
        if name != 'fc1.bias' or value.any():
            state[f'attention.{name}'] = value[:, :, None, None] if value.dim() == 2 else value
    return {name: value.to(layer.weight.device, layer.weight.dtype) for name, value in state.items()}


FORMAT = Format(matches, read, write)
