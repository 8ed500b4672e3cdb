"""Register variants of timm's architectures in timm's registry.

A variant's entrypoint builds the stock model through the stock entrypoint and converts it. Every tag of the stock
architecture is a tag of the variant and points at the stock weights, which are lifted while they load.
"""

import sys
import types
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
import torch.nn as nn
from timm.models import (
    DefaultCfg,
    build_model_with_cfg,
    get_arch_pretrained_cfgs,
    is_model,
    model_entrypoint,
    register_model,
)
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet

from .._defaults import with_defaults_of_0_1_0
from ..convert import convert_model
from ..errors import ReparamError
from ..importers import import_state_dict
from ..lift import lift_state_dict
from ..timm_model import config_of, record_options
from ..variants import VARIANTS, is_variant, known_variant
from ._backbones import BACKBONES

__all__ = ['register_families', 'register_variant']


def register_families() -> None:
    """Register every variant of every architecture of the backbones' table; what is registered stays as it is."""
    for backbone, stock_names in BACKBONES.items():
        for variant in VARIANTS:
            family = _family(f'{backbone}_{variant}')
            for stock_name in stock_names:
                if not is_variant_name(f'{stock_name}_{variant}'):
                    _register(family, stock_name, variant)


def register_variant(stock_name: str, variant: str) -> str:
    """Register the variant of any timm architecture as ``<stock_name>_<variant>``.

    It is listed under the family ``<stock module>_<variant>``, such as ``convnext_doconv``. What is registered stays as
    it is.

    Args:
        stock_name: Name of the architecture, without a tag.
        variant: A name of `timm_reparam.variants.VARIANTS`.

    Returns:
        The new name, for ``timm.create_model``.

    Raises:
        ReparamError: the architecture or the variant is unknown, or somebody else has registered the name.
    """
    known_variant(variant)
    if not is_model(stock_name):
        raise ReparamError(f'{stock_name!r} is no architecture of timm; see timm.list_models(), and leave out the tag')
    if is_variant_name(stock_name):
        raise ReparamError(f'{stock_name!r} is a variant already; name the stock architecture')
    if is_variant_name(f'{stock_name}_{variant}'):
        return f'{stock_name}_{variant}'
    backbone = model_entrypoint(stock_name).__module__.rpartition('.')[-1]
    return _register(_family(f'{backbone}_{variant}'), stock_name, variant)


def cfg_with_weights(pretrained_cfg: Mapping[str, Any], state_dict: dict[str, torch.Tensor]) -> dict[str, Any]:
    """A pretrained_cfg from which timm loads these weights into any architecture, whatever its own ones were."""
    sources = ('source', 'url', 'file', 'hf_hub_id', 'hf_hub_filename', 'architecture', 'label_offset')
    return {key: value for key, value in pretrained_cfg.items() if key not in sources} | {'state_dict': state_dict}


def saved_arguments(name: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a model as a checkpoint records them, with the options that it does not name: 0.1.0's defaults.

    Args:
        name: Name of the architecture, with or without a tag.
        model_args: Arguments of ``timm.create_model``.
    """
    architecture = name.partition('.')[0]
    arguments = dict(model_args)
    options = arguments.get('conv_options') or {}
    if is_variant_name(architecture) and isinstance(options, dict):  # what is none is refused when it is built
        arguments['conv_options'] = with_defaults_of_0_1_0(architecture.rpartition('_')[2], options)
    return arguments


def is_variant_name(name: str) -> bool:
    """Whether this name was registered here."""
    return is_model(name) and model_entrypoint(name).__module__.startswith(f'{__package__}.')


def ensure_registered(name: str) -> bool:
    """Whether timm has an architecture, which is registered first if its name is that of a variant.

    So what was made after `register_variant` is read by a process that did not call it.

    Args:
        name: Name of an architecture, with or without a tag.
    """
    architecture = name.partition('.')[0]
    stock_name, _, variant = architecture.rpartition('_')
    if not is_model(architecture):
        with suppress(ReparamError):  # what cannot be a variant stays unknown
            register_variant(stock_name, variant)
    return is_model(architecture)


def is_registered_on_import(name: str) -> bool:
    """Whether importing this package registers an architecture, so that no call has to."""
    return is_variant_name(name) and any(name.rpartition('_')[0] in stock_names for stock_names in BACKBONES.values())


def _family(name: str) -> types.ModuleType:
    """The module of a family, an attribute of the package as one with a file is; made if there is none yet."""
    module_name = f'{__package__}.{name}'
    module = sys.modules.get(module_name)
    if module is None:
        module = module_from_spec(ModuleSpec(module_name, loader=None))  # timm keys a model by its module's name
        vars(module).update(__doc__=f'{name}: made by the tables.', default_cfgs={}, __all__=[])
        sys.modules[module_name] = module
        setattr(sys.modules[str(__package__)], name, module)
    return module


def _register(module: types.ModuleType, stock_name: str, variant: str) -> str:
    name = f'{stock_name}_{variant}'
    if name.startswith('test_'):
        raise ReparamError(f"{name!r}: names that start with 'test_' are for timm's own tests; register another model")
    if is_model(name):
        raise ReparamError(f'{name!r} is registered already, by somebody else, and would be overwritten')
    cfgs = {tag.partition('.')[2]: cfg for tag, cfg in get_arch_pretrained_cfgs(stock_name).items()}
    if cfgs:
        module.default_cfgs[name] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=True)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(name, stock_name, variant, pretrained, **kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__module__ = module.__name__
    entrypoint.__doc__ = f"timm's {stock_name} with {variant} layers; ``conv_options`` are the layers' options."
    setattr(module, name, register_model(entrypoint))
    return name


def _create(
    name: str,
    stock_name: str,
    variant: str,
    pretrained: bool,
    conv_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the stock architecture, convert it, load the weights, all within timm's own builder."""
    if conv_options is not None and not isinstance(conv_options, dict):
        raise ReparamError(f'{name}: conv_options must be a dict of layer options, got {conv_options!r}')
    options = {**_saved_options(name, kwargs), **(conv_options or {})}
    init = options.pop('init', 'lift' if pretrained else 'scratch')
    loader = _Loader(stock_name, variant)

    def converted(**model_kwargs: Any) -> nn.Module:
        model = model_entrypoint(stock_name)(pretrained=False, **model_kwargs)
        if not pretrained:
            return convert_model(model, variant, init=init, **options)
        if init == 'scratch':
            loader.not_lifted = ReparamError(f"{name}: init='scratch' is a random start, it cannot take stock weights")
        else:
            try:
                return convert_model(model, variant, init=init, **options)
            except ReparamError as e:
                # Options without an exact lift are right for a train-time checkpoint, which brings everything along.
                loader.not_lifted = e
        return convert_model(model, variant, init='scratch', **options)

    def model_cls(**model_kwargs: Any) -> nn.Module:
        loader.model_kwargs = model_kwargs
        model: Any = converted(**model_kwargs)
        loader.conv_options = model._conv_options
        return model

    if kwargs.get('features_only'):
        kwargs.update(_feature_options(stock_name, kwargs))
    model: Any = build_model_with_cfg(model_cls, name, pretrained, pretrained_filter_fn=loader, **kwargs)
    model._conv_options = loader.conv_options  # of a wrapper of features, too
    needing = [module for module in model.modules() if is_variant(module) and module.needs_trained_weights]
    if needing and not pretrained:
        needing[0].training_warning = (
            f'{name} is trained without pretrained weights: its base kernels are frozen at their random start, which '
            'is not the method. Start from trained weights: pretrained=True, or load a checkpoint.'
        )
    if conv_options:
        model.register_state_dict_pre_hook(record_options)
    return model


def _saved_options(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All options of the checkpoint that timm builds a model from; none where it builds an architecture by its name."""
    cfg = kwargs.get('pretrained_cfg')
    if not isinstance(cfg, Mapping) or cfg.get('source') not in ('hf-hub', 'local-dir'):
        return {}
    # timm passes on what is recorded, beside the arguments of its caller
    return saved_arguments(name, kwargs.get('pretrained_model_args') or {})['conv_options']


class _Loader:
    """The checkpoint filter of a variant: takes stock and train-time checkpoints, and those of the official code.

    Attributes:
        model_kwargs: Arguments the stock model was built with.
        not_lifted: Why stock weights cannot be lifted into the model, if so.
        conv_options: Every option of the model's layers.
    """

    def __init__(self, stock_name: str, variant: str) -> None:
        self.stock_name = stock_name
        self.variant = variant
        self.model_kwargs: dict[str, Any] = {}
        self.not_lifted: ReparamError | None = None
        self.conv_options: dict[str, Any] = {}

    def __call__(self, state_dict: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
        state_dict = import_state_dict(state_dict, model)
        try:
            return lift_state_dict(state_dict, model, self.not_lifted)
        except ReparamError:
            translated = self._translate(state_dict, config_of(model))
            if translated is None:
                raise
        return lift_state_dict(translated, model, self.not_lifted)

    def _translate(
        self, state_dict: dict[str, torch.Tensor], pretrained_cfg: dict[str, Any]
    ) -> dict[str, torch.Tensor] | None:
        """A checkpoint as the stock entrypoint's own filter reads it, or None if it cannot."""
        cfg = cfg_with_weights(pretrained_cfg, state_dict)
        # as many classes and channels as the checkpoint has: adapting them is left to the load that is under way
        cfg['num_classes'] = cfg.get('num_classes', 1000) + (pretrained_cfg.get('label_offset') or 0)
        kwargs = dict(self.model_kwargs, num_classes=cfg['num_classes'], in_chans=cfg.get('input_size', (3,))[0])
        try:
            stock = model_entrypoint(self.stock_name)(pretrained=True, pretrained_cfg=cfg, **kwargs)
        except Exception:  # another architecture's filter may fail in any way on a checkpoint that is not for it
            return None
        return stock.state_dict()


def _feature_options(stock_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments for timm's builder that give the features, and the state dict keys, that the stock entrypoint gives.

    The stock entrypoint is asked, on the meta device, because each brings its own defaults along. One that builds a
    class of its own instead of a wrapper (EfficientNet) has its features taken from the whole model.
    """
    about_weights = ('pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'pretrained_model_args')
    with torch.device('meta'):
        stock = model_entrypoint(stock_name)(**{k: v for k, v in kwargs.items() if k not in about_weights})
    options: dict[str, Any] = {}
    feature_cls = kwargs.get('feature_cls')
    if feature_cls is None:
        feature_cls = type(stock) if isinstance(stock, (FeatureDictNet, FeatureHookNet)) else FeatureGetterNet
        options['feature_cls'] = feature_cls
    if 'out_indices' not in kwargs:
        options['out_indices'] = tuple(stock.feature_info.out_indices)
    if any('.' in name for name in stock.feature_info.module_name()):
        options['feature_cfg'] = dict(flatten_sequential=True)  # what timm's list wrapper needs for nested stages
    return options
