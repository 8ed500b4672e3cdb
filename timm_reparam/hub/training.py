"""Read training checkpoints, such as ``last.pth.tar``, of timm's train script and of train.py."""

import argparse
import math
import re
import warnings
import zipfile
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
from ..timm_model import config_of
from .client import one_line
from .facts import WEIGHTS_NAME
from .untrusted import build_for_shapes, check_arguments, check_cost, check_size

__all__ = ['base_model_facts', 'load_training', 'read_training', 'told_settings', 'why_unreadable']

# Settings of timm's train script and of train.py that go into a recipe: model, training and augmentation. The others
# may reveal a machine, its folders or an account.
_RECIPE = (
    'model pretrained num_classes gp img_size in_chans input_size crop_pct mean std interpolation model_kwargs'
    ' variant conv_options variant_lr head_init_scale head_init_bias drop drop_connect drop_path drop_block'
    ' bn_momentum bn_eps sync_bn dist_bn split_bn task target_format multilabel_threshold batch_size'
    ' validation_batch_size grad_accum_steps fast_norm grad_checkpointing channels_last amp amp_dtype model_dtype'
    ' synchronize_step torchcompile torchscript torchcompile_mode opt opt_eps opt_betas momentum weight_decay'
    ' clip_grad clip_mode layer_decay layer_decay_min_scale layer_decay_no_opt_scale opt_kwargs sched sched_on_updates'
    ' lr lr_base lr_base_size lr_base_scale lr_noise lr_noise_pct lr_noise_std lr_cycle_mul lr_cycle_decay'
    ' lr_cycle_limit lr_k_decay lr_decay_fn lr_stable_timescale warmup_lr min_lr epochs epoch_repeats start_epoch'
    ' stop_epoch decay_milestones decay_epochs warmup_epochs warmup_prefix cooldown_epochs patience_epochs decay_rate'
    ' no_aug train_crop_mode scale ratio hflip vflip color_jitter color_jitter_prob grayscale_prob gaussian_blur_prob'
    ' aa aug_repeats aug_splits reprob remode recount resplit mixup cutmix cutmix_minmax mixup_prob mixup_switch_prob'
    ' mixup_mode mixup_off_epoch smoothing train_interpolation loss jsd_loss bce_loss bce_sum bce_target_thresh'
    ' bce_pos_weight loss_pos_weight loss_class_weight loss_weight_power loss_weight_beta loss_weight_max'
    ' asl_gamma_pos asl_gamma_neg asl_clip asl_reduction poly_epsilon poly_gamma poly_alpha twoway_tp twoway_tn'
    ' db_neg_scale db_init_bias db_focal_gamma model_ema model_ema_decay model_ema_warmup seed worker_seeding'
    ' eval_metric tta train_img_sizes train_batch_sizes train_size_probs train_size_schedule'
    ' train_size_schedule_spread train_size_random_mix train_batches_per_epoch variable_batch_loss_scale'
    ' kd_distill_type kd_loss_type kd_temperature kd_token_distill_type kd_student_feature_dim kd_teacher_feature_dim'
    ' distill_loss_weight task_loss_weight'
).split()
# Names and words, but no paths and no addresses.
_WORD = re.compile(r'[\w.*?\[\]!,:;+= -]{0,200}', re.ASCII)
# Types of the entries of a training checkpoint. Only `state_dict` is required.
_ENTRIES: dict[str, tuple[type, ...]] = {
    'state_dict': (dict,),
    'state_dict_ema': (dict,),
    'args': (dict, argparse.Namespace),
    'arch': (str,),
    'model_args': (dict,),
    'epoch': (int,),
    'metric': (int, float),
    'train_state': (dict,),
    'saver': (dict,),
}


def told_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a training run that go into its recipe.

    Args:
        settings: All settings of the run, by the names of timm's train script and train.py.

    Returns:
        The settings that describe the training, if they are numbers, words, or lists and dicts of those.
    """
    return {key: settings[key] for key in _RECIPE if key in settings and _is_plain_value(settings[key])}


def _is_plain_value(value: Any, depth: int = 2) -> bool:
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None
    if isinstance(value, (list, tuple)) and depth:
        return len(value) <= 64 and all(_is_plain_value(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth:
        return len(value) <= 64 and all(_is_plain_value(part, depth - 1) for item in value.items() for part in item)
    return value is None or (isinstance(value, (bool, int, float)) and abs(value) < math.inf)


def read_training(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a training checkpoint without running code from it.

    Args:
        path: The file.
        mmap: Leave the tensors on disk until they are used.

    Returns:
        The entries of the checkpoint: ``state_dict``, and optionally ``arch``, ``args``, ``epoch``, ...

    Raises:
        ReparamError: The file does not exist, cannot be read, or is not a training checkpoint.
    """
    try:
        _check_archive(path)
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter('ignore')  # a damaged file may warn; the content is checked below
            checkpoint = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except ReparamError:
        raise
    except FileNotFoundError as error:
        raise ReparamError(f'{path}: no such file') from error
    except Exception as error:  # a damaged pickle may raise anything
        raise ReparamError(f'{path}: not a readable checkpoint ({why_unreadable(error)})') from error
    if not isinstance(checkpoint, dict) or 'state_dict' not in checkpoint:
        raise ReparamError(
            f'{path}: not a training checkpoint; weights alone are for timm-reparam convert, and for '
            '--initial-checkpoint of train.py'
        )
    for key, kinds in _ENTRIES.items():
        value = checkpoint.get(key)
        if not (value is None and key != 'state_dict') and (not isinstance(value, kinds) or isinstance(value, bool)):
            expected = ' or '.join(kind.__name__ for kind in kinds)
            raise ReparamError(
                f"{path}: {key}: expected {expected}, got {type(value).__name__}; use a file of timm's train script or "
                'of train.py'
            )
    largest = 2 * Path(path).stat().st_size  # names may share a tensor
    for key in ('state_dict', 'state_dict_ema'):
        weights = checkpoint.get(key) or {}
        for name, value in weights.items():
            if not isinstance(name, str) or not _is_tensor(value):
                kind = f' ({value.layout}, {value.device})' if isinstance(value, torch.Tensor) else ''
                raise ReparamError(
                    f'{path}: {key}: expected dense tensors by name, got {type(value).__name__}{kind} for {name!r:.80}'
                )
        if (size := sum(value.nbytes for value in weights.values())) > largest:
            raise ReparamError(
                f'{path}: {key}: expected tensors of at most {largest} bytes, got {size}: they share their memory'
            )
    return checkpoint


def why_unreadable(error: Exception) -> str:
    """The reason why torch cannot read a file, in one line."""
    if 'weights_only' in str(error):  # raised by torch, or by timm around it
        return (
            'it contains Python objects other than tensors, perhaps a whole model, and reading those may run any code; '
            'save model.state_dict() instead'
        )
    return f'{type(error).__name__}: {one_line(error)[:200]}'


def _check_archive(path: str | Path) -> None:
    """Raise ReparamError if an archive of torch.save has compressed entries, which may be far larger in memory."""
    if not zipfile.is_zipfile(path):
        return  # torch's legacy format has no compression
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ReparamError(
                f'{path}: expected entries without compression, as torch.save writes them, got compressed entries'
            )


def _is_tensor(value: Any) -> bool:
    """Whether a value is a dense tensor with values."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        and not value.is_quantized
    )


def base_model_facts(settings: Mapping[str, Any], pretrained_cfg: Mapping[str, Any]) -> dict[str, str | None] | None:
    """Return the fact ``base_model`` of a training: the weights that it started from.

    Args:
        settings: The settings of the run.
        pretrained_cfg: The ``pretrained_cfg`` of its model.

    Returns:
        None if it started from random weights, otherwise

        id: Repo of the weights; None if they are not from a repo.
        revision: Commit of the weights, if the client's cache contains it.
        license: Licence of the weights, if known.
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
    """Build the model of a training checkpoint, with the averaged weights if there are any.

    Args:
        path: The file.

    Returns:
        The model in eval mode, its preprocessing, and the facts about its training (see
        :mod:`timm_reparam.hub.facts`).

    Raises:
        ReparamError: The file is not a training checkpoint, or its weights do not fit the model of its settings.
    """
    checkpoint = read_training(path)
    settings = checkpoint.get('args') or {}
    settings = vars(settings) if isinstance(settings, argparse.Namespace) else settings  # train.py saves a dict
    # train.py records the architecture and its arguments, timm's script only its flags
    name = checkpoint.get('arch') if checkpoint.get('model_args') is not None else settings.get('model')
    if name is None:
        raise ReparamError(
            f"{path}: expected the settings of the run ('args') beside the weights, got none; timm-reparam convert "
            'takes weights of a model that you name'
        )
    arguments = check_arguments(name, checkpoint.get('model_args') or _model_arguments(settings, path), str(path))
    weights = clean_state_dict(checkpoint.get('state_dict_ema') or checkpoint['state_dict'])
    # --split-bn adds norms for augmented images, which only training uses
    weights = {key: value for key, value in weights.items() if '.aux_bn.' not in key}
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    skeleton: Any = build_for_shapes(name, arguments, shapes, f'{path}: its weights do not fit its settings')
    try:
        data_config = resolve_input_data_config(skeleton, args=settings)
        size = check_size(data_config['input_size'], f'{path}: input_size')
        _check_preprocessing(data_config, size[0], path)
        check_cost(skeleton, size, str(path))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the training run has already shown warnings about its settings
            model = timm.create_model(name, **arguments)
        model.load_state_dict(weights)
        facts = _facts(checkpoint, settings, model)
    except ReparamError:
        raise
    except Exception as error:  # wrong settings may raise anything
        text = f'{type(error).__name__}: {one_line(error)[:200]}'
        raise ReparamError(f'{path}: its settings cannot be used ({text})') from error
    return model.eval(), data_config, facts


def _check_preprocessing(data_config: Mapping[str, Any], channels: int, path: str | Path) -> None:
    """Raise ReparamError unless mean and std are numbers, one or one a channel, and the rest numbers and words."""
    for key, value in data_config.items():
        is_valid = _is_plain_value(value)
        if key in ('mean', 'std'):
            numbers = list(value) if isinstance(value, (list, tuple)) else []
            is_valid = is_valid and len(numbers) in (1, channels)
            is_valid = is_valid and all(isinstance(each, (int, float)) for each in numbers)
        if not is_valid:
            raise ReparamError(f'{path}: {key}: expected numbers or a name, got {value!r:.80}')


def _model_arguments(settings: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The arguments of timm.create_model that decide the function, as timm's script derives them from its flags."""
    input_size = settings.get('input_size')
    if input_size:
        check_size(input_size, f'{path}: input_size')
    if not isinstance(settings.get('model_kwargs') or {}, dict):
        raise ReparamError(f'{path}: model_kwargs: expected a dict, got {settings["model_kwargs"]!r:.80}')
    arguments = dict(
        in_chans=settings.get('in_chans') or (input_size[0] if input_size else None),
        num_classes=settings.get('num_classes'),
        global_pool=settings.get('gp'),
        bn_eps=settings.get('bn_eps'),
    )
    given = {key: value for key, value in arguments.items() if value is not None}
    return {**given, **(settings.get('model_kwargs') or {})}


def _facts(checkpoint: dict[str, Any], settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    base = base_model_facts(settings, config_of(model))
    if base is not None:
        base['revision'] = None  # the client's cache may contain a later commit than the one the run started from
    data = settings.get('data_dir') or settings.get('data')
    metric, metric_name = checkpoint.get('metric'), settings.get('eval_metric')
    return dict(
        base_model=base,
        dataset=dict(
            name=settings.get('dataset') or (Path(data).resolve().name if data else None),
            split=settings.get('val_split') or None,
        ),
        metrics=dict(train_time={metric_name: metric}) if metric is not None and metric_name else {},
        recipe={key: value for key, value in told_settings(settings).items() if value not in (None, False, '', [], {})},
    )
