"""Fold the BatchNorms of a fused model into the convolutions before them, for deployment.

torch.fx is asked where data flows; the model's own modules are changed, so its forward stays its own code.
"""

import copy
import inspect
import math
from collections import Counter
from collections.abc import Collection

import torch
import torch.fx
import torch.nn as nn
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    FrozenBatchNormAct2d,
    SyncBatchNormAct,
    get_notrace_functions,
    get_notrace_modules,
)
from torchvision.ops.misc import FrozenBatchNorm2d

from .errors import ReparamError
from .layers import ReparamLayer
from .layers._tensor import scale_shift, to_float64
from .variants import VARIANTS

__all__ = ['fold_norms']

# Both by exact type: what derives from them may compute something else.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame, nn.ConvTranspose2d)
NORMS = (
    nn.BatchNorm2d,
    BatchNormAct2d,
    nn.SyncBatchNorm,
    SyncBatchNormAct,
    FrozenBatchNorm2d,
    FrozenBatchNormAct2d,
)


class _Tracer(torch.fx.Tracer):
    """Stops at convolutions, norms, and whatever timm does not trace into."""

    def __init__(self) -> None:
        super().__init__(autowrap_modules=(math,), autowrap_functions=tuple(get_notrace_functions()))
        self.leaves = (*CONVOLUTIONS, *NORMS, *get_notrace_modules())

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, name)


def takes_norm(conv: nn.Module) -> bool:
    """Whether a module of a fused model is a convolution into which a norm can be folded."""
    stay = (layer for variant in VARIANTS.values() for layer in variant.layers if layer.input_dependent)
    return type(conv) in (*CONVOLUTIONS, *stay)


@torch.no_grad()
def fold_norms(model: nn.Module, keep: Collection[int] = ()) -> int:
    """Fold each BatchNorm that alone takes the output of a convolution into it, in place.

    A convolution or norm that runs more than once is left as it is, and so is one whose parameters are read elsewhere,
    one with a hook in between, and a norm without running statistics.

    Args:
        model: Model in evaluation mode.
        keep: Modules to be left as they are, by id.

    Returns:
        How many norms were folded.

    Raises:
        ReparamError: torch.fx cannot trace the model.
    """
    # a copy, without its tensors, is traced: hooks of the model would keep what they see
    graph = _trace(copy.deepcopy(model, {id(tensor): tensor for tensor in _own_tensors(model)}))
    modules = dict(model.named_modules())
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    hooked = [name for name, module in modules.items() if module._forward_hooks or module._forward_pre_hooks]
    calls = Counter(node.target for node in graph.nodes if node.op == 'call_module')
    # a tied parameter is read under its first name
    read = {id(tensors[str(node.target)]) for node in graph.nodes if node.op == 'get_attr' and node.target in tensors}

    def may_fold(conv_node: torch.fx.Node, norm_node: torch.fx.Node) -> bool:
        names = str(conv_node.target), str(norm_node.target)
        conv, norm = (modules[name] for name in names)
        return (
            takes_norm(conv)
            and type(norm) in NORMS
            and norm.running_mean is not None
            and len(conv_node.users) == 1
            and all(calls[name] == 1 and id(modules[name]) not in keep for name in names)
            and not any(id(tensor) in read for module in (conv, norm) for tensor in _own_tensors(module))
            # nobody looks at what lies between the two
            and all(_holds(name, names[0]) == _holds(name, names[1]) for name in hooked)
        )

    rests: dict[int, nn.Module] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        if node.op != 'call_module' or [i.op for i in inputs] != ['call_module'] or not may_fold(inputs[0], node):
            continue
        norm = modules[node.target]
        scale_outputs(modules[inputs[0].target], *scale_shift(norm, to_float64))
        rests[id(norm)] = rest_of_norm(norm)
    for module in modules.values():
        # _modules, because named_children leaves out a child's second name
        for name, child in list(module._modules.items()):
            if id(child) in rests:
                setattr(module, name, rests[id(child)])
    return len(rests)


def _trace(model: nn.Module) -> torch.fx.Graph:
    # an optional argument that becomes a stand-in for a tensor would not be None
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    try:
        return _Tracer().trace(model, concrete_args=defaults)
    except Exception as e:  # it runs the model's code on stand-ins for tensors, which may fail in any way
        raise ReparamError(
            f'{type(model).__name__}: torch.fx cannot trace the model, so it is not known which convolution each '
            f'BatchNorm follows ({type(e).__name__}: {e}); fuse it without fold_bn, or fold the part of it that can be '
            'traced'
        ) from e


def _own_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _holds(outer: str, inner: str) -> bool:
    return not outer or f'{inner}.'.startswith(f'{outer}.')


def scale_outputs(conv: nn.Module, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Make a convolution give ``scale * y + shift``, rounded once. Its parameters become new ones: some may be tied."""
    if isinstance(conv, ReparamLayer):
        conv.scale_outputs(scale, shift)
        return
    assert isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d))
    kernel = to_float64(conv.weight)
    if isinstance(conv, nn.ConvTranspose2d):
        # (in_channels, out_channels/groups, kh, kw), the output channels of each group apart
        kernel = kernel.unflatten(0, (conv.groups, -1)) * scale.view(conv.groups, 1, -1, 1, 1)
        kernel = kernel.flatten(0, 1)
    else:
        kernel = kernel * scale[:, None, None, None]
    bias = shift if conv.bias is None else to_float64(conv.bias) * scale + shift
    trainable = conv.weight.requires_grad
    conv.bias = nn.Parameter(bias.to(conv.weight.device, conv.weight.dtype), trainable)
    conv.weight = nn.Parameter(kernel.to(conv.weight.device, conv.weight.dtype), trainable)


def rest_of_norm(norm: nn.Module) -> nn.Module:
    """What a norm does after normalising: the drop and the activation of timm's."""
    steps = [getattr(norm, name) for name in ('drop', 'act') if hasattr(norm, name)]
    steps = [step for step in steps if not isinstance(step, nn.Identity)]
    if len(steps) > 1:
        return nn.Sequential(*steps).eval()
    return steps[0] if steps else nn.Identity().eval()
