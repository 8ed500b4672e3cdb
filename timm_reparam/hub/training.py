"""Training checkpoints, ``last.pth.tar`` and the like: what timm's train script saves, and train.py too."""

import argparse
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.data import resolve_input_data_config
from timm.models import clean_state_dict
from torch import nn

from ..errors import ReparamError
from ..models._registry import ensure_registered, saved_arguments
from .cards import WEIGHTS_NAME

__all__ = ['PRIVATE_SETTINGS', 'base_model_facts', 'load_training', 'read_training']

# Settings that tell of a machine or an account, not of a training.
PRIVATE_SETTINGS = (
    *('data', 'data_dir', 'output', 'experiment', 'zoo', 'tag', 'resume', 'pretrained_path', 'initial_checkpoint'),
    *('device', 'device_modules', 'local_rank', 'log_wandb', 'wandb_project', 'wandb_tags', 'wandb_resume_id'),
    *('publish', 'license'),
)


def read_training(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint, without running code from it.

    Args:
        path: The file.
        mmap: Leave the tensors on disk until they are used.

    Returns:
        What the train script saved: ``state_dict``, and ``arch``, ``args``, ``epoch``, ... as far as it did.

    Raises:
        ReparamError: The file is not there, cannot be read, or is no training checkpoint.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except FileNotFoundError as error:
        raise ReparamError(f'{path}: no such file') from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ReparamError(f'{path}: not a readable checkpoint ({str(error).splitlines()[0]})') from error
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise ReparamError(f'{path}: not a training checkpoint; weights alone are for --initial-checkpoint of train.py')
    return checkpoint


def base_model_facts(settings: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> dict[str, str | None] | None:
    """Return the fact ``base_model`` of a training: the weights that it started from.

    Args:
        settings: The settings of the run.
        pretrained_cfg: The ``pretrained_cfg`` of its model.

    Returns:
        None if it started from random weights, otherwise

        id: Repo of the weights; None if they came from elsewhere.
        revision: Commit that they were fetched by, where the client's cache tells it.
        license: Their licence, if it is known.
    """
    if settings.get('pretrained_path') or settings.get('initial_checkpoint'):
        return dict(id=None, revision=None, license=None)
    if not settings.get('pretrained'):
        return None
    repo_id, _, revision = (pretrained_cfg.get('hf_hub_id') or '').partition('@')
    path = try_to_load_from_cache(repo_id, WEIGHTS_NAME, revision=revision or None) if repo_id else None
    commit = Path(path).parent.name if isinstance(path, str) else None
    return dict(id=repo_id or None, revision=commit or revision or None, license=pretrained_cfg.get('license'))


def load_training(path: str | Path) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """Build the model of a training checkpoint of timm's train script or of train.py, with the averaged weights if any.

    Args:
        path: The file.

    Returns:
        The model in eval mode, its preprocessing, and the facts about its training (see
        :mod:`timm_reparam.hub.cards`).

    Raises:
        ReparamError: The file is no training checkpoint, or its weights do not fit the model that its settings name.
    """
    checkpoint = read_training(path)
    settings = checkpoint.get('args') or {}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings  # train.py saves a dict
    # train.py says which model its flags made, and with which arguments; timm says the flags only
    name = checkpoint['arch'] if 'model_args' in checkpoint else settings.get('model')
    if name is None:
        raise ReparamError(f"{path}: expected the settings of the run ('args') beside the weights, found none")
    if not ensure_registered(name):
        raise ReparamError(f'{path}: expected an architecture that timm knows, got {name!r}')
    arguments = saved_arguments(name, checkpoint.get('model_args') or _model_arguments(settings))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # what there is to say about these settings was said to their user
            model = timm.create_model(name, **arguments)
        weights = clean_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
        # norms that --split-bn adds for the augmented images, and that only training uses
        model.load_state_dict({key: value for key, value in weights.items() if '.aux_bn.' not in key})
        data_config = resolve_input_data_config(model, args=settings)
    except ReparamError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        raise ReparamError(f'{path}: its weights do not fit {name} as its settings have it ({error})') from error
    return model.eval(), data_config, _facts(checkpoint, settings, model)


def _model_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of timm.create_model that decide the function, as the train script takes them from its flags."""
    input_size = settings.get('input_size')
    arguments = dict(
        in_chans=settings.get('in_chans') or (input_size[0] if input_size else None),
        num_classes=settings.get('num_classes'),
        global_pool=settings.get('gp'),
        bn_eps=settings.get('bn_eps'),
    )
    given = {key: value for key, value in arguments.items() if value is not None}
    return {**given, **(settings.get('model_kwargs') or {})}


def _facts(checkpoint: dict[str, Any], settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    cfg: Any = model.pretrained_cfg
    base = base_model_facts(settings, cfg)
    if base is not None:
        base['revision'] = None  # the client's cache may hold a later commit than the one that the run started from
    data = settings.get('data_dir') or settings.get('data')
    metric, metric_name = checkpoint.get('metric'), settings.get('eval_metric')
    return dict(
        base_model=base,
        dataset=dict(
            name=settings.get('dataset') or (Path(data).resolve().name if data else None),
            split=settings.get('val_split') or None,
        ),
        metrics=dict(train_time={metric_name: metric}) if metric is not None and metric_name else {},
        recipe={k: v for k, v in settings.items() if k not in PRIVATE_SETTINGS and v not in (None, False, '', [], {})},
    )
