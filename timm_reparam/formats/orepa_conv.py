"""Checkpoints of OREPA's official code (https://github.com/JUGGHM/OREPA_CVPR2022)."""

import torch
import torch.nn.functional as F

from ..errors import ReparamError
from ..layers import OREPAConv2d
from ..layers._branches import per_output
from ._format import Entries, Format, TranslatedEntries
from ._norms import Norm

__all__ = ['FORMAT']

# As in torch's BatchNorm, which the official blocks use; the layer has no norm of its own.
_EPS = 1e-5
_FUSED = ('orepa_reparam', 'or1x1_reparam', 'or_large_reparam')
# Entries of a k x k layer, by the names in the official code.
_WEIGHTS = {
    'origin': 'weight',
    'avg_conv': 'mean_weight',
    'pfir_conv': 'prior_weight',
    '1x1': 'point_weight',
    '1x1_kxk_idconv1': 'inner_weight',
    '1x1_kxk_conv2': 'outer_weight',
    'gconv_dw': 'depthwise_weight',
    'gconv_pw': 'pointwise_weight',
}
# The rows of its factors, in order.
_FACTORS = ('weight', 'mean', 'prior', 'sequential', 'point', 'separable')


def matches(entries: Entries) -> bool:
    """Whether there is a block of any kind, or a fused block."""
    keys = ('weight_orepa_origin', 'weight_or1x1_origin', 'weight0.weight_orepa_origin')
    return any(key in entries for key in (*keys, *(f'{fused}.weight' for fused in _FUSED)))


def read(layer: OREPAConv2d, entries: Entries) -> TranslatedEntries:
    """Read a block of a k x k or a 1x1 convolution, the kernel of one that stacks 3x3 convolutions, or a fused block.

    The block's BatchNorm becomes part of the factors, which leaves a constant.
    """
    for fused in _FUSED:
        if f'{fused}.weight' in entries:
            return TranslatedEntries({'weight': entries.pop(f'{fused}.weight')}, entries.pop(f'{fused}.bias'))
    norm = Norm(entries, 'bn.', _EPS)
    if 'weight0.weight_orepa_origin' in entries:
        kernel = _stacked(entries)
        new = {'weight': per_output(norm.scale.to(kernel.dtype)) * kernel}
    else:
        new = _read_1x1(entries) if 'weight_or1x1_origin' in entries else _read(entries, '', layer.groups)
        for name in [name for name in new if name.endswith('gamma')]:
            new[name] = (norm.scale * new[name].double()).to(new[name].dtype)
    dtype = new['weight'].dtype
    mean, variance = norm.scale * norm.running_mean, norm.scale.square() * norm.running_var
    return TranslatedEntries(new, norm.shift.to(dtype), mean.to(dtype), variance.to(dtype))


def _read(entries: Entries, prefix: str, groups: int) -> Entries:
    """The entries of a k x k layer."""
    for constant in ('weight_orepa_avg_avg', 'id_tensor'):
        entries.pop(f'{prefix}{constant}', None)
    new = {ours: entries.pop(f'{prefix}weight_orepa_{theirs}') for theirs, ours in _WEIGHTS.items()}
    if new['weight'].shape[2:] != (3, 3):
        raise ReparamError(
            f'expected 3x3 kernels, got {tuple(new["weight"].shape[2:])}: the official code defines its cosines for '
            '3x3 only'
        )
    new['prior'] = entries.pop(f'{prefix}weight_orepa_prior')
    # the official code counts the output channels of the last 1x1 convolution across the groups
    pointwise = new['pointwise_weight']
    new['pointwise_weight'] = pointwise.unflatten(0, (-1, groups)).transpose(0, 1).flatten(0, 1).contiguous()
    factors = entries.pop(f'{prefix}vector')
    return new | {f'{name}_gamma': row.clone() for name, row in zip(_FACTORS, factors, strict=True)}


def _read_1x1(entries: Entries) -> Entries:
    factors = entries.pop('vector')
    return {
        'weight': entries.pop('weight_or1x1_origin'),
        'first_weight': entries.pop('weight_or1x1_l2i_conv1'),
        'second_weight': entries.pop('weight_or1x1_l2i_conv2'),
        'weight_gamma': factors[0].clone(),
        'product_gamma': factors[1].clone(),
    }


def _stacked(entries: Entries) -> torch.Tensor:
    """The kernel of 3x3 layers in a row, which the official code has in place of a large convolution."""
    kernels: list[torch.Tensor] = []
    while f'weight{len(kernels)}.weight_orepa_origin' in entries:
        found = _read(entries, f'weight{len(kernels)}.', groups=1)
        dtype, (out_channels, in_channels) = found['weight'].dtype, found['weight'].shape[:2]
        layer = OREPAConv2d(in_channels, out_channels, 3, bias=False, dtype=torch.float64)
        layer.load_state_dict(found)
        kernels.append(layer.equivalent_kernel().detach())
    total = kernels[0].transpose(0, 1)
    for kernel in kernels[1:]:
        total = F.conv2d(total, kernel, padding=2)
    return total.transpose(0, 1).to(dtype)


FORMAT = Format(matches, read)
