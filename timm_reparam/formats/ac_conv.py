"""Checkpoints of ACNet's official code (https://github.com/DingXiaoH/ACNet)."""

import torch

from ..layers import ACConv2d
from ..layers._branches import per_output
from ._format import Entries, Format, TranslatedEntries
from ._norms import Norm, variance_of_sum

__all__ = ['FORMAT']


def matches(entries: Entries) -> bool:
    """Whether there is a block or a fused block."""
    return 'square_conv.weight' in entries or 'fused_conv.weight' in entries


def read(layer: ACConv2d, entries: Entries) -> TranslatedEntries:
    """Read a block (its keys are those of ACBlock2d) or a fused block.

    The eps of the block's norms is not in a checkpoint; the layer's own is used.
    """
    if 'fused_conv.weight' in entries:
        return TranslatedEntries({'weight': entries.pop('fused_conv.weight')}, entries.pop('fused_conv.bias'))
    dtype = entries['square_conv.weight'].dtype
    kernels, norms = {}, {}
    for branch in ('square', 'ver', 'hor'):
        kernels[branch] = entries.pop(f'{branch}_conv.weight').double()
        norms[branch] = Norm(entries, f'{branch}_bn.', layer.eps)
    zero = torch.zeros_like(norms['square'].running_mean)
    mean = sum((norm.scale * norm.running_mean for norm in norms.values()), zero)
    variance = variance_of_sum(list(kernels.values()), list(norms.values()))
    constant = sum((norm.shift for norm in norms.values()), zero)
    gain = torch.ones_like(mean)
    if 'last_bn.running_var' in entries:
        last = Norm(entries, 'last_bn.', layer.eps)
        gain, variance = last.scale, last.scale**2 * last.running_var
        mean, constant = gain * mean, gain * constant + last.shift
    new = {}
    for branch, name in (('square', ''), ('ver', 'vertical_'), ('hor', 'horizontal_')):
        norm = norms[branch]
        if branch != 'square' and layer.branch_norm == 'batch':
            new[f'{name}gamma'] = gain * norm.weight
            new[f'{name}running_var'] = norm.running_var
            new[f'{name}weight'] = kernels[branch]
        elif branch != 'square' and layer.branch_norm == 'scale':
            new[f'{name}gamma'] = gain * norm.scale
            new[f'{name}weight'] = kernels[branch]
        else:
            new[f'{name}weight'] = per_output(gain * norm.scale / layer.scale) * kernels[branch]
    new = {name: value.to(dtype) for name, value in new.items()}
    return TranslatedEntries(new, constant.to(dtype), mean.to(dtype), variance.to(dtype))


FORMAT = Format(matches, read)
