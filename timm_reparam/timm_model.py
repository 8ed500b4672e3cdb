"""What a timm model says of itself: the roles of its modules, and the name and arguments it is built again with."""

from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from .variants import variant_of

__all__ = [
    'architecture_of',
    'as_tuple',
    'config_of',
    'names_of',
    'record_options',
    'rename',
    'stock_architecture',
]


def config_of(model: nn.Module) -> dict[str, Any]:
    """timm's configuration of a model, its ``pretrained_cfg``; empty for other models."""
    cfg = getattr(model, 'pretrained_cfg', None)
    return cfg if isinstance(cfg, dict) else {}


def architecture_of(model: nn.Module) -> str | None:
    """Name under which timm would save the model, or None."""
    return config_of(model).get('architecture')


def stock_architecture(model: nn.Module) -> str | None:
    """Name of the stock timm architecture behind a timm model, or None for other models."""
    architecture = architecture_of(model)
    return architecture and architecture.removesuffix(f'_{variant_of(model)}')


def names_of(model: nn.Module, role: str) -> tuple[str, ...]:
    """The modules that timm's configuration of a model names for a role, 'first_conv' or 'classifier'."""
    return as_tuple(config_of(model).get(role) or ())


def as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, type)) else (value,)


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


def rename(model: Any, architecture: str | None, conv_options: dict[str, Any] | None = None) -> None:
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
