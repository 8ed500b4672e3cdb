"""Convert checkpoints: a train-time form to the fused form, and any other checkpoint to a train-time form."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import load_state_dict
from timm.models._hub import load_model_config_from_path
from torch import nn

from ..errors import ReparamError
from ..fuse import fuse_model
from ..lift import prefix_remedy
from ..models._registry import cfg_with_weights, ensure_registered, is_variant_name, saved_arguments
from ..timm_model import as_tuple, config_of, names_of, stock_architecture
from ..variants import VARIANTS, variant_of
from ..verify import FusionReport, verify_fusion
from .atomic import write_all
from .facts import WEIGHTS_NAME, read_config, read_facts, sha256_of
from .folder import Draft, architecture_of, images_for, origin_of, save_pair
from .load import load_checkpoint
from .names import FUSED_SUFFIX, folder_name
from .training import load_training, why_unreadable
from .untrusted import build_on_meta, check_folder

__all__ = ['convert_checkpoint', 'fuse_checkpoint']


def fuse_checkpoint(source: str | Path, target: str | Path) -> tuple[Path, FusionReport]:
    """Turn a train-time checkpoint into a fused one, after verifying the fusion.

    For a folder, only the fused form is saved. For a training checkpoint of timm's train script, both forms are saved,
    as :func:`save_pair` does.

    Args:
        source: Train-time checkpoint: a folder, or a file such as ``last.pth.tar``.
        target: Folder of the fused checkpoint; its parent must exist. For a file, the name must be
            ``<model>.<tag>_fused``, and the parent is made if its own parent exists.

    Returns:
        The fused folder and the report of the verification.

    Raises:
        ReparamError: The checkpoint cannot be loaded or has nothing to fuse, the fusion is not verified, or
            :func:`save_checkpoint` rejects the result.
    """
    source, target = Path(source), Path(target).absolute()
    if source.is_file():
        return _fuse_training(source, target)
    model = load_checkpoint(source)
    fused, report = _fuse_and_verify(model, source)
    facts = read_facts(source)
    known = ((facts or {}).get('sibling') or {}).get('sha256')
    if facts is not None:
        sibling = {'sha256': sha256_of(source / WEIGHTS_NAME)}
        if repo := facts.pop('repo', None):  # the repo of the source; the fused form is not published yet
            sibling['repo'] = repo
        if facts.get('name'):
            sibling['name'] = facts['name']
            facts['name'] += FUSED_SUFFIX
        facts |= {**origin_of(model), 'form': 'fused', 'fusion': report.to_dict(), 'sibling': sibling}
    draft = Draft(target, fused, None, facts)

    def drop_unmeasured(hashes: Sequence[str]) -> None:
        if draft.facts is not None and hashes[0] != known:  # the metrics are those of another fused file
            draft.facts.pop('logit_difference', None)
            for key in ('metrics', 'profile'):
                (draft.facts.get(key) or {}).pop('fused', None)

    write_all([draft], drop_unmeasured)
    return target, report


def convert_checkpoint(
    source: str | Path, target: str | Path, model_name: str, **model_args: Any
) -> tuple[Path, FusionReport]:
    """Turn a checkpoint into a train-time folder, the inverse of :func:`fuse_checkpoint`.

    A checkpoint of the stock architecture, fused or not, is lifted. A checkpoint in the layout of the method's official
    code is translated (see :func:`timm_reparam.import_state_dict`). A checkpoint of the variant, for instance a file of
    timm's train script, is loaded without change.

    Args:
        source: Checkpoint folder, or file (safetensors, or a pickle of tensors only).
        target: Folder of the train-time checkpoint; its parent must exist.
        model_name: Name of the variant, such as 'resnet18_doconv'.
        **model_args: Further arguments for ``timm.create_model``, such as ``conv_options``; by default those of the
            folder. The number of classes is that of the checkpoint.

    Returns:
        The new folder and the report of the verification. A stock checkpoint is compared with the new model; otherwise
        the new model is compared with its own fusion.

    Raises:
        ReparamError: The checkpoint cannot be read or does not fit the model, the new model is not verified, or
            :func:`save_checkpoint` rejects it.
    """
    source, target = Path(source), Path(target).absolute()
    if not (ensure_registered(model_name) and is_variant_name(model_name)):
        raise ReparamError(
            f'{model_name!r}: expected the name of a variant, such as resnet18_doconv; see timm-reparam list'
        )
    cfg: dict[str, Any] | None = None
    facts: dict[str, Any] = {}
    wanted = model_args.get('num_classes')
    if source.is_dir():
        check_folder(source)
        cfg, model_args, facts = _read_folder(source, model_name, model_args)
    state = _read_weights(source / WEIGHTS_NAME if source.is_dir() else source)
    skeleton: Any = build_on_meta(model_name, model_args, str(source))
    if remedy := prefix_remedy(state, skeleton.state_dict()):
        raise ReparamError(f'{source}: expected keys of {model_name}, got {len(state)} others: {remedy}')
    cfg = {**cfg_with_weights(config_of(skeleton) if cfg is None else cfg, state), 'architecture': model_name}
    classifiers = as_tuple(cfg.get('classifier') or ()) or names_of(skeleton, 'classifier')
    heads = [state[f'{name}.weight'] for name in classifiers if f'{name}.weight' in state]
    num_classes = len(heads[0]) if heads else 0
    if wanted not in (None, num_classes):
        raise ReparamError(
            f'{source}: num_classes: expected {num_classes}, as in the checkpoint, got {wanted}; leave it out, and '
            'give num_classes to timm.create_model for a new classifier'
        )
    model_args['num_classes'] = cfg['num_classes'] = num_classes
    if 'in_chans' in model_args:
        cfg['input_size'] = (model_args['in_chans'], *cfg['input_size'][1:])
    model = _load(source, model_name, cfg, model_args)
    stock_name = stock_architecture(model)
    assert stock_name is not None  # timm.create_model records the name
    stock_args = {name: value for name, value in model_args.items() if name != 'conv_options'}
    stock = None
    if build_on_meta(stock_name, stock_args, str(source)).state_dict().keys() == state.keys():
        stock = _load(source, stock_name, {**cfg, 'architecture': stock_name}, stock_args)
    report = verify_fusion(model, stock)
    if not report.passed:
        raise ReparamError(f'{source}: the converted model is not verified, not saved: {report}')
    facts |= {**origin_of(model), 'form': 'train_time', 'name': target.name}
    write_all([Draft(target, model, None, facts)])
    return target, report


def _read_folder(
    source: Path, model_name: str, model_args: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read what a new model takes over from a folder: pretrained_cfg, model arguments, and the facts that stay true."""
    architecture = read_config(source)['architecture']
    same = architecture == model_name
    cfg, _, own_args = load_model_config_from_path(source)
    own_args = saved_arguments(architecture, own_args)
    options = own_args.pop('conv_options', {})
    variant = VARIANTS.get(architecture.rpartition('_')[2])
    if variant is not None and variant.layer.is_for_inference(options):  # the new model needs a schedule of its own
        options = {name: value for name, value in options.items() if name not in variant.layer.schedule_options}
    options = {**(options if same else {}), **model_args.get('conv_options', {})}
    model_args = {**own_args, **model_args, 'conv_options': options}
    if not options:
        del model_args['conv_options']
    known = read_facts(source) or {'license': cfg.get('license')}
    kept = ('tag', 'base_model', 'dataset', 'license', 'license_name', 'license_link', 'recipe', 'environment')
    return cfg, model_args, {key: known[key] for key in kept if key in known}


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ReparamError(f'{path}: not found; expected a checkpoint folder with {WEIGHTS_NAME}, or a file')
    try:
        state = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # a damaged or an unsafe file may raise anything
        raise ReparamError(f'{path}: cannot be read ({why_unreadable(error)})') from error
    strays = [name for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if strays or not state:
        raise ReparamError(f'{path}: expected a state dict of tensors, got other values under {strays[:5]}')
    return state


def _load(source: Path, name: str, cfg: Mapping[str, Any], model_args: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=True, pretrained_cfg=dict(cfg), **model_args).eval()
    except ReparamError as error:
        raise ReparamError(f'{source}: {error}') from error
    except Exception as error:  # a wrong argument or shape may raise anything
        raise ReparamError(f'{source}: cannot be loaded into {name} ({error})') from error


def _fuse_training(path: Path, target: Path) -> tuple[Path, FusionReport]:
    """Save both forms of the model in a training checkpoint."""
    model, data_config, facts = load_training(path)
    architecture = architecture_of(model)
    tag = target.name.removeprefix(f'{architecture}.').removesuffix(FUSED_SUFFIX)
    if not tag or folder_name(architecture, tag, True) != target.name:
        raise ReparamError(
            f'{target}: expected a name for the fused form, {folder_name(architecture, "<tag>", True)}, got'
            f' {target.name!r}; the train-time form is saved beside it, without the {FUSED_SUFFIX!r}'
        )
    fused, report = _fuse_and_verify(model, path, data_config)
    save_pair(model, target.parent, tag=tag, fused=fused, report=report, facts=facts, data_config=data_config)
    return target, report


def _fuse_and_verify(
    model: nn.Module, source: Path, data_config: Mapping[str, Any] | None = None
) -> tuple[nn.Module, FusionReport]:
    if variant_of(model) is None:
        raise ReparamError(f'{source}: expected a train-time checkpoint, got {architecture_of(model)}, nothing to fuse')
    fused = fuse_model(model)
    report = verify_fusion(model, fused, inputs=images_for(data_config))
    if not report.passed:
        raise ReparamError(f'{source}: the fused model differs from the train-time model, not saved: {report}')
    return fused, report
