"""RefConv: re-parameterised refocusing convolution

Paper: `Refconv: Re-parameterized Refocusing Convolution for Powerful ConvNets` - https://arxiv.org/abs/2310.10563
Official code: https://github.com/Aiolus-X/RefConv (this is an implementation of our own, from the paper)
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch.nn.modules.conv import _ConvNd

from ..errors import ReparamError
from ._base import Method, PaddingMode, ReparamConv2d, ReparamConvTranspose2d, ReparamLayer

__all__ = ['RefConv2d', 'RefConvTranspose2d']


_METHOD = Method(
    name='RefConv',
    summary=(
        'The trained kernels are frozen and a small learned map over the kernels refocuses them; a frozen '
        'kernel and its mapped change add up to one kernel.'
    ),
    title='RefConv: Re-parameterized Refocusing Convolution for Powerful ConvNets',
    authors='Cai, Zhicheng and Ding, Xiaohan and Shen, Qiu and Cao, Xun',
    venue='IEEE Transactions on Neural Networks and Learning Systems',
    year='2025',
    arxiv='2310.10563',
)

# Of a kernels' image, whose unfolded pixels are many times the kernels.
_GROUPS_AT_ONCE = 4096


class _Refocusing(ReparamLayer):
    """What the convolution and the transposed convolution share: the frozen base, the map, the kernel."""

    method = _METHOD
    needs_trained_weights = True

    def _add_map(self, map_kernel_size: int | tuple[int, int], device=None, dtype=None) -> None:
        sides = to_2tuple(map_kernel_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side >= 1 for side in sides):
            raise ReparamError(
                f'{type(self).__name__}: map_kernel_size must be one or two positive integers, got {map_kernel_size!r}'
            )
        self.map_kernel_size = map_kernel_size
        # odd, and no larger than the kernel, so that the map keeps the kernel's size
        map_h, map_w = ((min(side, kernel_side) - 1) // 2 * 2 + 1 for side, kernel_side in zip(sides, self.kernel_size))
        self._map_sides = (map_h, map_w)
        self._freeze_base()
        kernels_2d = self.in_channels * self.out_channels // self.groups
        self.map_weight = nn.Parameter(torch.empty(kernels_2d, self.groups, map_h, map_w, device=device, dtype=dtype))
        self._complete = True

    def _freeze_base(self) -> None:
        # The trained kernel is data from now on, not a parameter: it is saved and moved, never updated. A copy, because
        # another module that is tied to the parameter goes on training it.
        weight = self.weight.detach().clone()
        del self.weight
        self.register_buffer('weight', weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == 'weight' and getattr(self, '_complete', False) and param is not None:
            # assigned by load_state_dict(assign=True) with the parameters of a model: it stays frozen
            self.register_buffer(name, param.detach())
            return
        super().register_parameter(name, param)

    def _assign_from_conv(self, conv: _ConvNd) -> None:
        super()._assign_from_conv(conv)
        self._freeze_base()

    @torch.no_grad()
    def _init_variant_parameters(self, init: str) -> None:
        if init == 'lift':
            self._close_gates()
        else:
            nn.init.kaiming_uniform_(self.map_weight, a=math.sqrt(5))

    @torch.no_grad()
    def _close_gates(self) -> None:
        self.map_weight.zero_()

    @classmethod
    def selects(cls, conv: _ConvNd, is_stem: bool) -> bool:
        return max(conv.kernel_size) > 1

    def _compose(self) -> torch.Tensor:
        base = self.weight
        map_weight = self.map_weight
        map_h, map_w = self._map_sides  # numbers, where a shape is not one while torch.jit.trace runs
        image = base.reshape(-1, base.shape[2], base.shape[3])
        if self.groups == 1 and (base.dtype == torch.float64 or map_h * map_w == 1):
            # The same sum, written out, where a CPU convolution of this many groups is far slower. The kernels lie side
            # by side in the last dimension, so that each pass is one long loop.
            image = image.permute(1, 2, 0)
            padded = F.pad(image, [0, 0, map_w // 2, map_w // 2, map_h // 2, map_h // 2])
            change = image  # for TorchScript; not zeros, to which vmap cannot add in place what is batched
            for row in range(map_h):
                for column in range(map_w):
                    shifted = padded[row : row + image.shape[0], column : column + image.shape[1]]
                    if row == column == 0:
                        change = map_weight[:, 0, row, column] * shifted
                    else:
                        change.addcmul_(map_weight[:, 0, row, column], shifted)
            change = change.permute(2, 0, 1)
        else:
            groups = map_weight.shape[0] // map_weight.shape[1]
            change = F.conv2d(image.unsqueeze(0), map_weight, None, 1, [map_h // 2, map_w // 2], 1, groups)
        return base + change.reshape(base.shape)

    def branch_form(self) -> Callable[..., torch.Tensor]:
        # the frozen kernel and its mapped change, a convolution each
        convolve: Any = self._convolve  # of either subclass
        mapped = self._mapped()
        return lambda x, **size: convolve(x, self.weight, self.bias, **size) + convolve(x, mapped, None, **size)

    def _mapped(self) -> torch.Tensor:
        """Map(W) by matrix products: every pixel of the kernels' image from the pixels around it in its group."""
        map_h, map_w = self._map_sides
        padding = [map_w // 2, map_w // 2, map_h // 2, map_h // 2]
        image = self.weight.reshape(-1, self.groups, *self.kernel_size)
        maps = self.map_weight.reshape(len(image), self.groups, self.groups, map_h, map_w)
        mapped = []
        for piece, of_map in zip(image.split(_GROUPS_AT_ONCE), maps.split(_GROUPS_AT_ONCE)):
            around = F.pad(piece, padding).unfold(2, map_h, 1).unfold(3, map_w, 1)
            mapped.append(torch.einsum('nihwab,noiab->nohw', around, of_map))
        return torch.cat(mapped).reshape(self.weight.shape)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, map_kernel_size={self.map_kernel_size}'


class RefConv2d(_Refocusing, ReparamConv2d):
    """Refocusing convolution, ``K = W + Map(W)`` with W frozen and the map learned.

    The base kernel W (out_channels, in_channels/groups, kh, kw), a trained one, is viewed as one image of
    out_channels * in_channels/groups channels and kh x kw pixels; Map is a bias-free convolution of that image with a
    small kernel (each side the smaller of map_kernel_size and the kernel's side, rounded down to odd), padded to keep
    the size, in out_channels * in_channels / groups**2 groups. So a dense layer gets one filter for each of its 2-D
    kernels, and a depthwise layer a map that links each of its channels to every other.

    Paper: `Refconv: Re-parameterized Refocusing Convolution for Powerful ConvNets` - https://arxiv.org/abs/2310.10563
    Official code: https://github.com/Aiolus-X/RefConv

    Differences from the official code: lifted layers start with a zero map (exactly the trained function) where the
    official code starts with a random one (here init='scratch'); bias, dilation, padding modes and kernels that are not
    square are supported.

    Args:
        in_channels, ..., dtype: As in ``nn.Conv2d``.
        map_kernel_size: Sides of the map's kernel, at most.

    Raises:
        ReparamError: map_kernel_size is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = 'zeros',
        device=None,
        dtype=None,
        *,
        map_kernel_size: int | tuple[int, int] = 3,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        )
        self._add_map(map_kernel_size, device, dtype)
        self._reset_variant_parameters('scratch')


class RefConvTranspose2d(_Refocusing, ReparamConvTranspose2d):
    """Refocusing transposed convolution, ``K = W + Map(W)`` with W frozen and the map learned.

    :class:`RefConv2d` in the kernel space of ``nn.ConvTranspose2d``, whose weight is (in_channels, out_channels/groups,
    kh, kw).

    Args:
        in_channels, ..., dtype: As in ``nn.ConvTranspose2d``.
        map_kernel_size: Sides of the map's kernel, at most.

    Raises:
        ReparamError: map_kernel_size is not positive.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        output_padding: int | tuple[int, int] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, int] = 1,
        padding_mode: PaddingMode = 'zeros',
        device=None,
        dtype=None,
        *,
        map_kernel_size: int | tuple[int, int] = 3,
    ) -> None:
        geometry = (kernel_size, stride, padding, output_padding, groups, bias, dilation, padding_mode)
        super().__init__(in_channels, out_channels, *geometry, device, dtype)
        self._add_map(map_kernel_size, device, dtype)
        self._reset_variant_parameters('scratch')
