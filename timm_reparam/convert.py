"""Convert a model's convolutions into variants, and fuse them back.

Works on any ``nn.Module``; a timm model also has the names it is saved under kept right.
"""

import copy
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
import torch.nn as nn
from timm.layers import CondConv2d
from torch.nn.modules.conv import _ConvNd

from .errors import ReparamError
from .fold import fold_norms
from .layers import ReparamLayer
from .layers._base import HOOKS, Fusible, check_init, conv_arguments
from .layers._tensor import float64_copy
from .variants import VARIANTS, known_variant

__all__ = [
    'convert_model',
    'fuse_model',
    'is_variant',
    'lift_state_dict',
    'plan_conversion',
    'record_options',
    'stock_architecture',
    'variant_of',
]

_logger = logging.getLogger(__name__)

# What a block that re-parameterises itself calls its folding: it reads its convolutions' weights, so they stay plain.
_SELF_FOLDING = ('fuse', 'reparameterize', 'switch_to_deploy')

# Channels of an image at most, where nothing names the convolution that sees it.
_IMAGE_CHANNELS = 4

# What counts as a convolution; timm's CondConv2d mixes its kernels itself and derives from none of torch's.
_CONVOLUTIONS = (_ConvNd, CondConv2d)

Skip = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def is_variant(module: nn.Module) -> TypeGuard[ReparamLayer]:
    """Whether a module is an over-parameterised convolution of this package."""
    return isinstance(module, ReparamLayer)


def variant_of(model: nn.Module) -> str | None:
    """Name of the variant whose layers a model holds, or None for a model without any."""
    for module in model.modules():
        for name, variant in VARIANTS.items():
            if isinstance(module, variant.layers):
                return name
    return None


def stock_architecture(model: nn.Module) -> str | None:
    """Name of the stock timm architecture behind a timm model, or None for other models."""
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return architecture and architecture.removesuffix(f'_{variant_of(model)}')


def record_options(model: Any, *_: Any) -> None:
    """Name every option of the layers, defaults too, among the arguments that timm saves a model with.

    timm's ``create_model`` comes last, and leaves the options there that its caller gave. So this is done again before
    a model is saved: it is a hook of the state dict, which timm's ``save_for_hf`` takes first.

    Args:
        model: A timm model; nothing is done where the layers' options are not known.
        *_: What a hook is called with besides.
    """
    if hasattr(model, '_conv_options'):
        model._model_args = dict(getattr(model, '_model_args', {}), conv_options=model._conv_options)


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
    _refuse_wrapped(model, 'convert_model')
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
    _rename(model, f'{architecture_of(model)}_{variant}', options)
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
    plain = _plain_modules(model, skip_names)
    stems = _stems(model, layers)
    classifiers = _names_of(model, 'classifier')
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
        _rename(fused, architecture_of(fused), {**getattr(model, '_conv_options', {}), **remaining[0].options()})
    else:
        _rename(fused, stock_architecture(model))
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
    count = fold_norms(folded, keep=_plain_modules(folded, []).keys())
    for number, layer in layers.items():
        like = next(layer.parameters())
        fused[number].to(like.device, like.dtype)
    _logger.info('%d BatchNorms are folded into the convolutions before them', count)
    folded.folded_norms = getattr(model, 'folded_norms', 0) + count
    return folded


def lift_state_dict(
    state_dict: dict[str, torch.Tensor], model: nn.Module, not_lifted: ReparamError | None = None
) -> dict[str, torch.Tensor]:
    """Check that a checkpoint is one of a converted model, or of its stock architecture.

    The layers take stock entries as a lift while they load; here the keys are compared, because timm drops strictness
    where the classes differ. If the stem of a train-time checkpoint has another number of input channels it is folded
    to the stock kernel, which the caller (timm) adapts, and which lifts again.

    Args:
        state_dict: A stock or a train-time checkpoint.
        model: The model it is for, converted with init='lift'.
        not_lifted: Why the model could not be converted with init='lift', if so; raised if a lift is needed.

    Returns:
        A new state dict for the model, in which a layer has all of its entries or those of a plain convolution.

    Raises:
        ReparamError: keys are missing or unexpected, or shapes differ, the classifier's and the stem's aside.
    """
    own = model.state_dict()
    # under every name, as in a state dict
    layers = {name: module for name, module in model.named_modules(remove_duplicate=False) if is_variant(module)}
    added = {f'{name}.{key}' for name, layer in layers.items() for key in layer.state_dict()}
    added -= {f'{name}.{key}' for name in layers for key in ('weight', 'bias')}
    state_dict = dict(state_dict)
    lifted = set() if added & state_dict.keys() else added
    stems = _names_of(model, 'first_conv')
    for name in set(stems) & layers.keys():
        weight = state_dict.get(f'{name}.weight')
        if not lifted and weight is not None and weight.shape[1] != layers[name].weight.shape[1]:
            entries = entries_by_module(state_dict, [name])[name]
            state_dict[f'{name}.weight'] = _fold_entries(name, layers[name], entries)
            lifted = {key for key in added if key.startswith(f'{name}.')}
    if lifted and not_lifted is not None:
        raise not_lifted
    state_dict = {key: value for key, value in state_dict.items() if key not in lifted}

    classifiers = tuple(f'{name}.' for name in _names_of(model, 'classifier'))
    free = {key for key in own.keys() | state_dict.keys() if key.startswith(classifiers)} if classifiers else set()
    # absent from checkpoints older than PyTorch 0.4.1, and filled in by BatchNorm itself
    counters = {key for key in own if key.endswith('num_batches_tracked')}
    problems = {
        'missing': sorted(own.keys() - state_dict.keys() - lifted - free - counters),
        'unexpected': sorted(state_dict.keys() - own.keys() - free),
        'of another shape': sorted(
            f'{key} (expected {tuple(own[key].shape)}, got {tuple(value.shape)})'
            for key, value in state_dict.items()
            if key in own
            and key not in free
            and value.shape != own[key].shape
            and not (key.removesuffix('.weight') in stems and value.shape[2:] == own[key].shape[2:])
        ),
    }
    if any(problems.values()):
        architecture = architecture_of(model) or type(model).__name__
        if remedy := prefix_remedy(state_dict, own):
            raise ReparamError(f'the checkpoint is not one of {architecture}: of its {len(state_dict)} keys {remedy}')
        raise ReparamError(
            f'the checkpoint is not one of {architecture}, nor of the stock architecture:\n'
            f'{listed_problems(problems)}\n'
            'load it into the architecture and with the conv_options that it was made with'
        )
    return state_dict


def entries_by_module(state_dict: dict[str, torch.Tensor], names: Iterable[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What a checkpoint holds of each of these modules, under keys without the module's name."""
    entries: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for key, value in state_dict.items():
        parts = key.split('.')
        for length in range(len(parts)):
            name = '.'.join(parts[:length])
            if name in entries:
                entries[name]['.'.join(parts[length:])] = value
    return entries


def prefix_remedy(keys: Collection[str], expected: Collection[str]) -> str:
    """What to do about a prefix that keeps every key of a checkpoint from being one of the model; '' if none does.

    Args:
        keys: Keys of the checkpoint.
        expected: Keys of the model.
    """
    prefix = os.path.commonprefix(list(keys)).rpartition('.')[0] + '.'
    if set(keys) & set(expected) or not {key.removeprefix(prefix) for key in keys} & set(expected):
        return ''
    return f'all of them start with {prefix!r}: take that off, key.removeprefix({prefix!r})'


def listed_problems(problems: dict[str, list[str]]) -> str:
    """Lines of an error: each kind of problem that there is, with its keys."""
    return '\n'.join(f'  {kind}: {", ".join(keys)}' for kind, keys in problems.items() if keys)


def fresh_layer(
    layer: ReparamLayer, weight: torch.Tensor, bias: torch.Tensor | None = None, init: str = 'lift'
) -> ReparamLayer:
    """A new layer with the options of `layer`, for a stock kernel whose number of input channels may be another one."""
    arguments = dict(conv_arguments(layer), bias=bias is not None)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    arguments['in_channels'] = weight.shape[0] if transposed else weight.shape[1] * layer.groups
    conv = layer.conv_types[0](**arguments, device='meta', dtype=weight.dtype)
    conv.weight = nn.Parameter(weight.detach())
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach())
    return type(layer).from_conv(conv, init=init, **layer.options())


def _fold_entries(name: str, layer: ReparamLayer, entries: dict[str, torch.Tensor]) -> torch.Tensor:
    """The stock kernel that a layer's entries of a checkpoint stand for, whatever its number of input channels."""
    source = fresh_layer(layer, entries['weight'].clone(), entries.get('bias'), init='scratch')
    try:
        source.load_state_dict(entries)
    except RuntimeError as e:
        raise ReparamError(
            f'{name}: the checkpoint does not hold a {type(layer).__name__} with these options: {e}'
        ) from None
    return source.fuse().weight.detach()


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, type)) else (value,)


def _names_of(model: nn.Module, role: str) -> tuple[str, ...]:
    """The modules that timm's configuration of a model names for a role, 'first_conv' or 'classifier'."""
    cfg = getattr(model, 'pretrained_cfg', None)
    return _as_tuple((cfg.get(role) if isinstance(cfg, dict) else None) or ())


def architecture_of(model: nn.Module) -> str | None:
    """Name under which timm would save the model, or None."""
    cfg = getattr(model, 'pretrained_cfg', None)
    return cfg.get('architecture') if isinstance(cfg, dict) else None


def _rename(model: Any, architecture: str | None, conv_options: dict[str, Any] | None = None) -> None:
    """Give a timm model the name and the arguments under which it can be built again."""
    if architecture_of(model) is None:
        return
    model.pretrained_cfg = dict(model.pretrained_cfg, architecture=architecture)
    model.default_cfg = model.pretrained_cfg  # timm keeps both names
    model_args = getattr(model, '_model_args', {})
    model._model_args = {name: value for name, value in model_args.items() if name != 'conv_options'}
    if conv_options is not None:
        model._conv_options = conv_options
        record_options(model)
        return
    vars(model).pop('_conv_options', None)
    hooks = model._state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is record_options]:
        del hooks[key]  # a stock model is pickled without this package


def _refuse_wrapped(model: nn.Module, caller: str) -> None:
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
    _refuse_wrapped(model, caller)
    return model


def unwrap_converted(model: nn.Module, caller: str = 'fuse_model') -> nn.Module:
    """The same of a model that has to hold variant layers."""
    model = unwrap(model, caller)
    if not any(isinstance(module, Fusible) for module in model.modules()):
        raise ReparamError(f'{type(model).__name__} holds no over-parameterised convolution: there is nothing to fuse')
    return model


def layers_of(variant: str) -> dict[type[nn.Module], type[ReparamLayer]]:
    """The layers of a variant, by the exact type of convolution that they replace; ReparamError if it is unknown."""
    return {conv_type: layer for layer in known_variant(variant).layers for conv_type in layer.conv_types}


def _skip_names(model: nn.Module, skip: Skip) -> list[str]:
    """The entries of `skip` as names and patterns, a type as the names of its modules; each matches something."""
    names: list[str] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in _as_tuple(skip):
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


def _plain_modules(model: nn.Module, skip_names: list[str]) -> dict[int, str]:
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
    stems = {id(modules[name]) for name in _names_of(model, 'first_conv') if name in modules}
    if not stems:
        convs = (module for module in modules.values() if isinstance(module, tuple(conv_types)))
        first: Any = next(convs, None)  # that of a part of a network takes features
        stems = {id(first)} if first is not None and first.in_channels <= _IMAGE_CHANNELS else set()
    return stems
