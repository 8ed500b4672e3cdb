"""Checkpoints of DO-Conv's official code (https://github.com/yangyanli/DO-Conv)."""

import torch
import torch.nn.functional as F

from ..layers import DOConv2d
from ._format import Entries, Format, TranslatedEntries

__all__ = ['FORMAT']


def matches(entries: Entries) -> bool:
    """Whether there is a W, which has the columns of every kernel."""
    return 'W' in entries


def read(layer: DOConv2d, entries: Entries) -> TranslatedEntries:
    """Read W (O, I/g, s), D (I, m, s) and d_diag, the identity E, of D's shape; 1x1 kernels have no D."""
    columns = entries.pop('W')
    out_channels, group_channels, num_columns = columns.shape
    shape, area = (out_channels, group_channels, *layer.kernel_size), layer._area
    if area == 1:
        return TranslatedEntries({'weight': columns.reshape(shape)})
    depthwise, identity = entries.pop('D'), entries.pop('d_diag')
    if layer.groups in (1, out_channels) and num_columns == layer.depth_multiplier:
        eye = torch.eye(area, dtype=identity.dtype, device=identity.device)
        eye = F.pad(eye.repeat(1, num_columns // area), (0, num_columns % area))
        new = {'weight': columns[..., :area].reshape(shape), 'depthwise_weight': depthwise + (identity - eye)}
        if layer.surplus_weight is not None:
            new['surplus_weight'] = columns[..., area:].contiguous()
        return TranslatedEntries(new)
    # The layer has another number of columns, or several outputs in a group. In the official code those do not share
    # their D: its reshape to (O/g, I, s) pairs the n-th kernel in storage with the D of input channel n mod I.
    transform = (depthwise.double() + identity).repeat(out_channels * group_channels // len(depthwise), 1, 1)
    kernels = torch.einsum('nms,ns->nm', transform, columns.double().flatten(0, 1))
    return TranslatedEntries({'weight': kernels.to(columns.dtype).reshape(shape)})


FORMAT = Format(matches, read)
