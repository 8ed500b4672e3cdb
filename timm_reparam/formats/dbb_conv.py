"""Checkpoints of DBB's official code (https://github.com/DingXiaoH/DiverseBranchBlock)."""

import torch

from ..errors import ReparamError
from ..layers import DBBConv2d
from ..layers._branches import identity_kernel, per_output, pointwise_then, response_to_constants
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
    groups, area = layer.groups, layer.weight[0, 0].numel()
    square = entries.pop('dbb_origin.conv.weight')
    dtype, square = square.dtype, square.double()
    norms, kernels = {'square': Norm(entries, 'dbb_origin.bn.', layer.eps)}, {'square': square}
    new = {'weight': per_output(norms['square'].scale) * square}
    # what the norm inside a branch adds to the branch's output
    constants = {}

    if layer.point_weight is not None:
        new['point_weight'] = kernels['point'] = entries.pop('dbb_1x1.conv.weight').double()
        norms['point'] = Norm(entries, 'dbb_1x1.bn.', layer.eps)
    inner, norm = _inner(entries), Norm(entries, 'dbb_1x1_kxk.bn1.bn.', layer.eps)
    outer = entries.pop('dbb_1x1_kxk.conv2.weight').double()
    if len(inner) != len(layer.inner_weight):
        raise ReparamError(
            f'the branch of a 1x1 and a square convolution has {len(inner)} channels between them in the checkpoint, '
            f'this layer has {len(layer.inner_weight)}'
        )
    inner = per_output(norm.scale) * inner
    new['inner_weight'] = inner if layer.point_weight is None else inner - identity_kernel(inner)
    new['outer_weight'] = outer
    kernels['sequential'] = pointwise_then(inner, outer, groups)
    constants['sequential'] = response_to_constants(outer, norm.shift, groups)
    norms['sequential'] = Norm(entries, 'dbb_1x1_kxk.bn2.', layer.eps)
    kernels['mean'] = torch.full_like(square[:, :1], 1 / area)
    if layer.point_weight is not None:
        norm = Norm(entries, 'dbb_avg.bn.bn.', layer.eps)
        constants['mean'] = norm.shift
        new['mean_weight'] = per_output(norm.scale) * entries.pop('dbb_avg.conv.weight').double()
        kernels['mean'] = (new['mean_weight'] / area).expand_as(square)
    norms['mean'] = Norm(entries, 'dbb_avg.avgbn.', layer.eps)

    constant = mean = torch.zeros_like(norms['square'].shift)
    for branch, norm in norms.items():
        inside = constants.get(branch, 0)
        constant = constant + norm.scale * inside + norm.shift
        mean = mean + norm.scale * (norm.running_mean - inside)
    for branch in norms.keys() - {'square'}:
        batch = layer.branch_norm == 'batch'
        new[f'{branch}_gamma'] = norms[branch].weight if batch else norms[branch].scale
        if batch:
            new[f'{branch}_running_var'] = norms[branch].running_var
    variance = variance_of_sum(list(kernels.values()), list(norms.values()))
    new = {name: value.to(dtype) for name, value in new.items()}
    return TranslatedEntries(new, constant.to(dtype), mean.to(dtype), variance.to(dtype))


def _inner(entries: Entries) -> torch.Tensor:
    """The 1x1 kernel before the square one; stored as its change from the identity where the channels are as many."""
    if 'dbb_1x1_kxk.idconv1.weight' in entries:
        change = entries.pop('dbb_1x1_kxk.idconv1.weight').double()
        return change + identity_kernel(change)
    return entries.pop('dbb_1x1_kxk.conv1.weight').double()


FORMAT = Format(matches, read)
