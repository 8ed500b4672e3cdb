"""Checkpoints of DBB's official code (https://github.com/DingXiaoH/DiverseBranchBlock)."""

import torch

from ..errors import ReparamError
from ..layers import DBBConv2d
from ..layers._branches import pointwise_then
from ._format import Entries, Format, TranslatedEntries
from ._norms import Norm, variance_of_sum

__all__ = ['FORMAT']


def matches(entries: Entries) -> bool:
    """Whether there is a block or a fused block."""
    return 'dbb_origin.conv.weight' in entries or 'dbb_reparam.weight' in entries


def read(layer: DBBConv2d, entries: Entries) -> TranslatedEntries:
    """Read a block (its keys are those of DBBlock2d) or a fused block.

    The norms inside the branches become part of the 1x1 kernels before the square convolution and the mean. The eps of
    the block's norms is not in a checkpoint; the layer's own is used.
    """
    if 'dbb_reparam.weight' in entries:
        return TranslatedEntries({'weight': entries.pop('dbb_reparam.weight')}, entries.pop('dbb_reparam.bias'))
    groups, (height, width) = layer.groups, layer.kernel_size
    square = entries.pop('dbb_origin.conv.weight')
    dtype, square = square.dtype, square.double()
    norms = {'square': Norm(entries, 'dbb_origin.bn.', layer.eps)}
    constant, mean = norms['square'].shift, norms['square'].scale * norms['square'].running_mean
    new, kernels = {'weight': norms['square'].scale.view(-1, 1, 1, 1) * square}, {'square': square}

    if layer.point_weight is not None:
        new['point_weight'] = kernels['point'] = entries.pop('dbb_1x1.conv.weight').double()
        norms['point'] = Norm(entries, 'dbb_1x1.bn.', layer.eps)
        constant, mean = constant + norms['point'].shift, mean + norms['point'].scale * norms['point'].running_mean
    inner, inner_norm = _inner(layer, entries), Norm(entries, 'dbb_1x1_kxk.bn1.bn.', layer.eps)
    outer = entries.pop('dbb_1x1_kxk.conv2.weight').double()
    if len(inner) != len(layer.inner_weight):
        raise ReparamError(
            f'the branch of a 1x1 and a square convolution has {len(inner)} channels between them in the checkpoint, '
            f'this layer has {len(layer.inner_weight)}'
        )
    inner = inner_norm.scale.view(-1, 1, 1, 1) * inner
    new['inner_weight'] = inner if layer.point_weight is None else inner - layer._identity(inner)
    new['outer_weight'] = outer
    kernels['sequential'] = pointwise_then(inner, outer, groups)
    norms['sequential'] = Norm(entries, 'dbb_1x1_kxk.bn2.', layer.eps)
    taps = outer.sum((2, 3)).view(groups, len(outer) // groups, -1)
    constants = {'sequential': torch.matmul(taps, inner_norm.shift.view(groups, -1, 1)).flatten()}
    constants['mean'] = torch.zeros_like(constant)
    kernels['mean'] = torch.full_like(square[:, :1], 1 / (height * width))
    if layer.point_weight is not None:
        norm = Norm(entries, 'dbb_avg.bn.bn.', layer.eps)
        constants['mean'] = norm.shift
        new['mean_weight'] = norm.scale.view(-1, 1, 1, 1) * entries.pop('dbb_avg.conv.weight').double()
        kernels['mean'] = (new['mean_weight'] / (height * width)).expand_as(square)
    norms['mean'] = Norm(entries, 'dbb_avg.avgbn.', layer.eps)
    for branch in ('sequential', 'mean'):
        norm = norms[branch]
        constant = constant + norm.scale * constants[branch] + norm.shift
        mean = mean + norm.scale * (norm.running_mean - constants[branch])

    for branch in norms.keys() - {'square'}:
        batch = layer.branch_norm == 'batch'
        new[f'{branch}_gamma'] = norms[branch].weight if batch else norms[branch].scale
        if batch:
            new[f'{branch}_running_var'] = norms[branch].running_var
    variance = variance_of_sum(list(kernels.values()), list(norms.values()))
    new = {name: value.to(dtype) for name, value in new.items()}
    return TranslatedEntries(new, constant.to(dtype), mean.to(dtype), variance.to(dtype))


def _inner(layer: DBBConv2d, entries: Entries) -> torch.Tensor:
    """The 1x1 kernel before the square one; stored as its change from the identity where the channels are as many."""
    if 'dbb_1x1_kxk.idconv1.weight' in entries:
        change = entries.pop('dbb_1x1_kxk.idconv1.weight').double()
        return change + layer._identity(change)
    return entries.pop('dbb_1x1_kxk.conv1.weight').double()


FORMAT = Format(matches, read)
