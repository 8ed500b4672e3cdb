"""Convert a model's convolutions into variants: which ones, and in place."""

from collections import Counter
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn as nn
from timm.layers import CondConv2d
from torch.nn.modules.conv import _ConvNd

from .errors import ReparamError
from .layers import ReparamLayer
from .layers._base import check_init
from .timm_model import architecture_of, as_tuple, names_of, rename
from .variants import VARIANTS, is_variant, known_variant, variant_of

__all__ = [
    'convert_model',
    'layers_of',
    'plain_modules',
    'plan_conversion',
    'refuse_wrapped',
    'unwrap',
]

# What a block that re-parameterises itself calls its folding: it reads its convolutions' weights, so they stay plain.
_SELF_FOLDING = ('fuse', 'reparameterize', 'switch_to_deploy')

# Channels of an image at most, where nothing names the convolution that sees it.
_IMAGE_CHANNELS = 4

# What counts as a convolution; timm's CondConv2d mixes its kernels itself and derives from none of torch's.
_CONVOLUTIONS = (_ConvNd, CondConv2d)

Skip = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def convert_model(model: nn.Module, variant: str, *, skip: Skip = (), init: str = 'lift', **options: Any) -> nn.Module:
    """Replace a model's convolutions by a variant, in place.

    Which convolutions a method takes is the method's own rule (see the layers): plain ``nn.Conv2d`` and timm's
    ``Conv2dSame``, by exact type, and ``nn.ConvTranspose2d`` where it has a layer for that. Weight-standardised and
    other derived convolutions stay as they are, and so does everything inside blocks that re-parameterise themselves
    (that have ``fuse``, ``reparameterize`` or ``switch_to_deploy``); :func:`plan_conversion` says why for each of them.
    Everything is checked before anything is changed. A timm model records every option of the layers, defaults too, in
    the arguments that it is saved with.

    Args:
        model: Any module; one that is wrapped (DistributedDataParallel, torch.compile) is converted before wrapping.
        variant: A name of `timm_reparam.variants.VARIANTS`.
        skip: What stays plain: names of modules (with everything inside), fnmatch patterns of names, or types. An entry
            that is the name of a module is no pattern.
        init: 'lift' starts as exactly the same function; 'scratch' is the method's own random start.
        **options: The layer's options, such as ``depth_multiplier`` or ``branch_norm``.

    Returns:
        The same model.

    Raises:
        ReparamError: the variant or an option is unknown, the model is converted already, an entry of `skip` matches
            nothing, a layer cannot take a convolution, or there is nothing to convert. The model is unchanged.
    """
    layers = layers_of(variant)
    check_init(f"convert_model('{variant}')", init)
    refuse_wrapped(model, 'convert_model')
    if type(model) in layers:
        raise ReparamError(
            f'the model is itself a convolution, which cannot be replaced in place; use {layers[type(model)].__name__}'
            '.from_conv(model)'
        )
    converted = {name: module for name, module in model.named_modules() if is_variant(module)}
    if converted:
        # those stay variants when they are fused
        dynamic = any(module.input_dependent for module in converted.values())
        remedy = '' if dynamic else ', or fuse_model() this one first'
        raise ReparamError(
            f'{next(iter(converted)) or "the model"}: already a variant ({len(converted)} in all, '
            f'{variant_of(model)}); convert a stock model{remedy}'
        )
    skip_names = _skip_names(model, skip)
    plan = _plan(model, layers, skip_names)
    replacements: dict[int, nn.Module] = {}
    refusals: dict[str, list[str]] = {}
    for name, why_plain in plan.items():
        if why_plain:
            continue
        conv = model.get_submodule(name)
        try:
            replacements[id(conv)] = layers[type(conv)].from_conv(conv, init=init, **options)
        except ReparamError as e:
            refusals.setdefault(str(e), []).append(name)
    if refusals:
        raise ReparamError('\n'.join(f'{", ".join(names)}: {refusal}' for refusal, names in refusals.items()))
    if not replacements:
        expected = ' or '.join(t.__name__ for t in layers)
        reasons = ', '.join(f'{number} {reason}' for reason, number in Counter(plan.values()).items())
        raise ReparamError(
            f'nothing to convert to {variant}: looked for {expected} of the kernel sizes that the method takes; '
            f'{type(model).__name__} holds {len(plan)} convolutions{reasons and f": {reasons}"}'
        )
    for module in list(model.modules()):
        # _modules, because named_children leaves out a child's second name
        for name, child in list(module._modules.items()):
            if id(child) in replacements:
                setattr(module, name, replacements[id(child)])
    options = {**VARIANTS[variant].layer.default_options(), **options}
    if skip_names:
        options['skip'] = skip_names
    rename(model, f'{architecture_of(model)}_{variant}', options)
    return model


def plan_conversion(model: nn.Module, variant: str, *, skip: Skip = ()) -> dict[str, str]:
    """Say of every convolution of a model why :func:`convert_model` leaves it plain.

    Args:
        model: A stock model, left as it was.
        variant: A name of `timm_reparam.variants.VARIANTS`.
        skip: What is to stay plain, as in `convert_model`.

    Returns:
        The convolutions by name, in the order of the modules, each with the reason why it stays plain: it is left out
        by skip, inside a block that re-parameterises itself, of a type that the method does not take, the classifier,
        of a kernel size that the method does not take, or it sees the image. Those that become a variant have the empty
        string, and so do those that the layer refuses (ACNet's refuses even kernels), which `convert_model` asks to be
        left out by skip.

    Raises:
        ReparamError: the variant is unknown, or an entry of `skip` matches nothing.
    """
    return _plan(model, layers_of(variant), _skip_names(model, skip))


def _plan(model: nn.Module, layers: dict[type[nn.Module], type[ReparamLayer]], skip_names: list[str]) -> dict[str, str]:
    plain = plain_modules(model, skip_names)
    stems = _stems(model, layers)
    classifiers = names_of(model, 'classifier')
    plan = {}
    for name, conv in model.named_modules():
        if not isinstance(conv, _CONVOLUTIONS):
            continue
        layer = layers.get(type(conv))
        if id(conv) in plain:
            plan[name] = plain[id(conv)]
        elif layer is None or not isinstance(conv, _ConvNd):
            plan[name] = f'of type {type(conv).__name__}'
        elif name in classifiers:  # timm makes it anew for another number of classes
            plan[name] = 'which is the classifier'
        elif layer.selects(conv, is_stem=id(conv) in stems):
            plan[name] = ''
        elif layer.selects(conv, is_stem=False):
            plan[name] = 'which sees the image'
        else:
            plan[name] = f'with a {"x".join(map(str, conv.kernel_size))} kernel'
    return plan


def refuse_wrapped(model: nn.Module, caller: str) -> None:
    if not isinstance(model, nn.Module):
        raise ReparamError(f'{caller}: expected a torch.nn.Module, got a {type(model).__name__}; pass the model itself')
    if isinstance(model, torch.jit.ScriptModule):
        raise ReparamError(f'{caller}: got a scripted model, whose code is fixed; pass the model it was made from')
    if _inner(model) is not None:
        raise ReparamError(f'{caller}: got a {type(model).__name__}; pass the model inside, and wrap it afterwards')


def _inner(model: nn.Module) -> nn.Module | None:
    """The model inside a wrapper, or None."""
    from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
    from torch.optim.swa_utils import AveragedModel

    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel, ModelEma, ModelEmaV2, ModelEmaV3)
    if isinstance(model, wrappers):
        return model.ema if isinstance(model, ModelEma) else model.module
    return getattr(model, '_orig_mod', None)


def unwrap(model: nn.Module, caller: str = 'fuse_model') -> nn.Module:
    """The model inside wrappers; ReparamError if there is none, in the name of the caller."""
    while (inner := _inner(model)) is not None:
        model = inner
    refuse_wrapped(model, caller)
    return model


def layers_of(variant: str) -> dict[type[nn.Module], type[ReparamLayer]]:
    """The layers of a variant, by the exact type of convolution that they replace; ReparamError if it is unknown."""
    return {conv_type: layer for layer in known_variant(variant).layers for conv_type in layer.conv_types}


def _skip_names(model: nn.Module, skip: Skip) -> list[str]:
    """The entries of `skip` as names and patterns, a type as the names of its modules; each matches something."""
    names: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in as_tuple(skip):
        if isinstance(entry, str):
            matches = [entry] if _matching(modules, entry) else []
        elif isinstance(entry, type):
            matches = [name for name, module in modules.items() if name and isinstance(module, entry)]
        else:
            raise ReparamError(f'skip: expected a module name, a pattern or a type, got {entry!r}')
        if not matches:
            raise ReparamError(
                f'skip: {entry!r} matches no module of {type(model).__name__}; see model.named_modules()'
            )
        names.extend(matches)
    return names


def _matching(names: Collection[str], entry: str) -> set[str]:
    """The module that has this name, or else those whose names match it as a pattern; never the model itself."""
    return ({entry} if entry in names else {name for name in names if fnmatchcase(name, entry)}) - {''}


def plain_modules(model: nn.Module, skip_names: list[str]) -> dict[int, str]:
    """Modules that stay plain whatever they are, by id, and why."""
    plain: dict[int, str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    skipped = {name for entry in skip_names for name in _matching(modules, entry)}
    for name, module in modules.items():
        if not name:
            continue
        if name in skipped:
            why = 'left out by skip'
        elif not is_variant(module) and any(callable(getattr(type(module), method, None)) for method in _SELF_FOLDING):
            why = f'inside {type(module).__name__}, which re-parameterises itself'
        else:
            continue
        for inside in module.modules():
            plain.setdefault(id(inside), why)
    return plain


def _stems(model: nn.Module, conv_types: Iterable[type[nn.Module]]) -> set[int]:
    """The convolutions that see the image, by id: timm's first_conv, elsewhere the first one if it can be an image."""
    modules = dict(model.named_modules())
    stems = {id(modules[name]) for name in names_of(model, 'first_conv') if name in modules}
    if not stems:
        convs = (module for module in modules.values() if isinstance(module, tuple(conv_types)))
        first: Any = next(convs, None)  # that of a part of a network takes features
        stems = {id(first)} if first is not None and first.in_channels <= _IMAGE_CHANNELS else set()
    return stems
