"""Fuse a converted model back into the stock architecture."""

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from .convert import plain_modules, unwrap
from .errors import ReparamError
from .fold import fold_norms
from .layers._fusible import HOOKS, Fusible
from .layers._tensor import float64_copy
from .timm_model import architecture_of, rename, stock_architecture
from .variants import is_variant

__all__ = [
    'fuse_model',
    'holds_fusible',
    'unwrap_converted',
    'with_fused_layers',
]

_logger = logging.getLogger(__name__)


def fuse_model(model: nn.Module, *, fold_bn: bool = False) -> nn.Module:
    """Fold a converted model into the stock architecture.

    Blocks such as `ACBlock2d`, in a network of one's own, become convolutions with bias. Hooks, and attributes that
    somebody has set on the layers, come along.

    With `fold_bn` each BatchNorm that alone takes the output of one convolution is folded into it, too, dynamic ones
    included: faster, the same function in evaluation, and for inference only. Where the norms were, identities are
    left, or their activations, and the convolutions have biases, so the keys are not the stock ones: it is no form to
    save as a checkpoint of the architecture, and the Hub functions refuse it. How many norms were folded is its
    attribute `folded_norms`. Blocks that re-parameterise themselves keep theirs: timm's ``reparameterize_model`` folds
    them, before or after.

    Args:
        model: A model that holds variant layers or blocks, left as it was. DistributedDataParallel, torch.compile and
            weight-averaging wrappers are taken off.
        fold_bn: Whether to fold the BatchNorms, for deployment.

    Returns:
        A new model with plain convolutions: the stock keys and shapes, and on a timm model the stock architecture's
        name and arguments. Dynamic convolutions cannot become plain ones: they come back in their form for inference.
        With `fold_bn` it is in evaluation mode, and of the same module classes otherwise.

    Raises:
        ReparamError: the model holds nothing to fuse, or is scripted; or its norms are to be folded and torch.fx
            cannot trace it.
    """
    model = unwrap_converted(model)
    if isinstance(model, Fusible):
        layer = with_fused_layers(model)
        return layer.eval() if fold_bn else layer
    fused: Any = _fold_norms(model) if fold_bn else with_fused_layers(model)
    remaining = [module for module in fused.modules() if is_variant(module)]
    if remaining:
        _logger.info('%d dynamic convolutions depend on their input and stay, in inference form', len(remaining))
        rename(fused, architecture_of(fused), {**getattr(model, '_conv_options', {}), **remaining[0].options()})
    else:
        rename(fused, stock_architecture(model))
    return fused


def with_fused_layers(model: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model with its layers fused; what is in the memo is not copied."""
    layers = _fusible(model)
    fused = {number: layer.fuse() for number, layer in layers.items()}
    return _copy_around(model, layers, fused, memo)


def _fusible(model: nn.Module) -> dict[int, Fusible]:
    """What is to be fused, by id; ReparamError if a hook of torch.nn.utils computes a parameter of it."""
    layers = {}
    for name, module in model.named_modules():
        if not isinstance(module, Fusible):
            continue
        for part_name, part in module.named_modules(prefix=name):
            for key in vars(part):  # pruning and spectral norm keep its origin as _orig, weight norm as _g
                if part._parameters.keys() & {f'{key}_orig', f'{key}_g'}:
                    raise ReparamError(
                        f'{part_name or "the model"}: its {key} is computed by a hook (pruning, weight norm), which '
                        'cannot be fused; make it permanent first, with torch.nn.utils.prune.remove or '
                        'remove_weight_norm'
                    )
        layers[id(module)] = module
    return layers


def _copy_around(
    model: nn.Module,
    layers: Mapping[int, Fusible],
    fused: Mapping[int, nn.Module],
    memo: Mapping[int, Any] | None = None,
) -> nn.Module:
    """A deep copy of a model with fused layers in the place of its own; hooks, attributes and modes as they were."""
    # Deep-copying with the fused layers already in the memo puts them wherever the model refers to the old ones, so
    # what was shared stays shared, and nothing else is special.
    copied: dict[int, Any] = {**(memo or {}), **fused}
    modes = {name: module.training for name, module in model.named_modules()}
    new = copy.deepcopy(model, copied)
    for number, layer in layers.items():
        # the flag says of which kind the backward hooks are
        names = (*HOOKS, '_is_full_backward_hook')
        kept = {name: getattr(layer, name) for name in names if getattr(layer, name)}
        vars(fused[number]).update(copy.deepcopy({**kept, **layer.added_attributes()}, copied))
    for name, module in new.named_modules():
        module.training = modes.get(name, module.training)  # torch.fx's copies of graphs are in training mode
    return new


def _fold_norms(model: nn.Module) -> nn.Module:
    """As `with_fused_layers`, in evaluation mode and with the BatchNorms folded, too."""
    layers = _fusible(model)
    # in float64 until the norms are folded, so that they are rounded once
    fused = {number: float64_copy(layer).fuse() for number, layer in layers.items()}
    folded: Any = _copy_around(model, layers, fused).eval()
    count = fold_norms(folded, keep=plain_modules(folded, []).keys())
    for number, layer in layers.items():
        like = next(layer.parameters())
        fused[number].to(like.device, like.dtype)
    _logger.info('%d BatchNorms are folded into the convolutions before them', count)
    folded.folded_norms = getattr(model, 'folded_norms', 0) + count
    return folded


def holds_fusible(module: nn.Module) -> bool:
    """Whether there is something in a module that is fused."""
    return any(isinstance(part, Fusible) for part in module.modules())


def unwrap_converted(model: nn.Module, caller: str = 'fuse_model') -> nn.Module:
    """The model inside wrappers; ReparamError, in the name of the caller, if it holds nothing to fuse."""
    model = unwrap(model, caller)
    if not holds_fusible(model):
        raise ReparamError(f'{type(model).__name__} holds no over-parameterised convolution: there is nothing to fuse')
    return model
