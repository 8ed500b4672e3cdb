"""The result of a run: both forms, verified, measured, saved and published."""

import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from timm.task import TrainingTask
from torch import nn

from ..errors import ReparamError
from ..hub import base_model_facts, check_pair, folder_name, publish, save_checkpoint, save_pair
from ..hub.client import check_repo_id, limit_requests
from ..hub.facts import missing_license
from ..hub.folder import architecture_of
from ..hub.training import told_settings
from ..profile import compare_profiles, format_comparison, format_profiles
from ..variants import is_variant, variant_of
from ..version import __version__
from .checkpoint import CheckpointState
from .data import class_names
from .engine import fuse_form, noise_images, verify_form
from .flags import build_parser, result_tag
from .rng import VALIDATION, RandomStream, draw
from .setup import Setup

__all__ = ['check_result', 'publish_result', 'save_result']

_logger = logging.getLogger(__name__)


def check_result(args: Namespace, model: nn.Module) -> None:
    """Check before the training that both forms can be saved and published at the end.

    Raises:
        ReparamError: They cannot be saved in the zoo, or their name or licence cannot be published.
    """
    architecture, tag = architecture_of(model), result_tag(args)
    try:
        check_pair(architecture, args.zoo, tag=tag)
    except ReparamError as error:
        raise ReparamError(f'--zoo {args.zoo}: {error}; its parent folder must exist, see also --tag') from error
    if not args.publish:
        return
    if variant_of(model) is None:
        raise ReparamError(f'--publish: expected a model with two forms, got {args.model}; add --variant')
    cfg: Any = model.pretrained_cfg
    place = f'--publish {args.publish}'
    try:
        check_repo_id(f'{args.publish}/{folder_name(architecture, tag, True)}')
        place = f'--license {args.license}'
        missing_license([dict(base_model=base_model_facts(vars(args), cfg))], args.license)
    except ReparamError as error:
        raise ReparamError(f'{place}: {error}') from error


def save_result(
    setup: Setup, state: CheckpointState, weights: dict[str, torch.Tensor], datasets: tuple[Any, Any], loader: Any
) -> str:
    """Fuse the best weights, verify them on the whole validation split, save both forms, and return a table of them.

    Args:
        setup: The setup of the run.
        state: State of the run, with the training task and the arguments as given.
        weights: The best weights.
        datasets: Training split, and validation split or None.
        loader: Loader of the validation split, or None.

    Raises:
        ReparamError: The verification failed, or a folder cannot be written.
    """
    args, form, data_config = setup.args, setup.form, setup.data_config
    fused = fuse_form(setup, weights)
    # Both are saved and measured in contiguous memory format.
    form.to(memory_format=torch.contiguous_format)
    fused.to(memory_format=torch.contiguous_format)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Batches of the validation split, or of seeded noise without targets."""
        if loader is None:
            yield noise_images(setup), None
            return
        stream = RandomStream(setup.device, VALIDATION, args.seed)
        for _, input, target in draw(loader, stream):
            yield input, target

    metrics, difference = _compare_forms(form, fused, state.task, batches())
    settings = state.settings
    zoo, tag, input_size = Path(args.zoo), result_tag(args), data_config['input_size']

    if fused is form:
        zoo.mkdir(exist_ok=True)
        profiles = compare_profiles(form, input_size=input_size)
        folder = zoo / folder_name(architecture_of(form), tag, False)
        facts = {**_facts(args, settings, form, datasets, metrics, difference, profiles), 'tag': tag}
        save_checkpoint(form, folder, facts=facts, data_config=data_config)
        accuracy = f'top-1: {metrics[0]["top1"]:.2f} %\n' if metrics else ''
        return f'{format_profiles(profiles)}\n{accuracy}\nsaved, a stock model with nothing to fuse: {folder}'

    report = verify_form(setup, fused, lambda: (input for input, _ in batches()), 'the best checkpoint')
    _logger.info('%s', report)
    profiles = compare_profiles(form, fused, input_size=input_size)
    facts = _facts(args, settings, form, datasets, metrics, difference, profiles)
    folders = save_pair(form, zoo, tag=tag, fused=fused, report=report, facts=facts, data_config=data_config)
    worst = report.worst_layer
    table = format_comparison(
        *profiles,
        top1=(metrics[0]['top1'], metrics[1]['top1']) if metrics else None,
        logit_difference=difference,
        layer_difference=None if worst is None else worst.stored,
    )
    dynamic = any(is_variant(module) and module.input_dependent for module in form.modules())
    note = ' (dynamic convolutions stay, in their form for inference)' if dynamic else ''
    return f'{table}\n\nsaved, train-time form: {folders[0]}\nsaved, fused form:      {folders[1]}{note}'


@torch.no_grad()
def _compare_forms(
    form: nn.Module, fused: nn.Module, task: TrainingTask, batches: Iterator[tuple[torch.Tensor, torch.Tensor | None]]
) -> tuple[list[dict[str, float]], float]:
    """Metrics of both forms, empty without targets, and the largest difference between their logits."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    evaluators = [task.create_evaluator() for _ in range(2)]
    difference, measured = 0.0, False
    for input, target in batches:
        outputs = [model(input) for model in (form, fused)]
        if target is not None:
            measured = True
            for evaluator, output in zip(evaluators, outputs):
                evaluator.update(output, target)
        difference = max(difference, float((outputs[0] - outputs[1]).abs().max()))
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn
    return [dict(evaluator.compute()) for evaluator in evaluators] if measured else [], difference


def _facts(
    args: Namespace,
    settings: dict[str, Any],
    form: nn.Module,
    datasets: tuple[Any, Any],
    metrics: list[dict[str, float]],
    difference: float,
    profiles: list,
) -> dict[str, Any]:
    """Facts about this training for the saved folders; its recipe holds the flags that differ from their defaults."""
    forms = ('train_time', 'fused')
    cfg: Any = form.pretrained_cfg
    train, validation = datasets
    names = class_names(train)
    defaults = vars(build_parser().parse_args([]))
    return dict(
        base_model=base_model_facts(vars(args), cfg),
        dataset=dict(
            name=args.dataset or Path(args.data_dir).resolve().name,
            split=args.val_split or None,
            train_images=len(train),
            validation_images=len(validation) if validation is not None else None,
            label_names=names if names and len(names) == args.num_classes else None,
        ),
        metrics=dict(zip(forms, metrics)),
        profile={name: profile.to_dict() for name, profile in zip(forms, profiles)},
        recipe={key: value for key, value in told_settings(settings).items() if value != defaults[key]},
        logit_difference=difference,
        environment=dict(
            python='.'.join(map(str, sys.version_info[:3])),
            torch=torch.__version__,
            timm=timm.__version__,
            timm_reparam=__version__,
        ),
    )


def publish_result(args: Namespace, form: nn.Module) -> str:
    """Publish both saved forms; return the report as text."""
    folder = Path(args.zoo) / folder_name(architecture_of(form), result_tag(args), False)
    limit_requests(60.0)  # for the whole process
    return str(publish(folder, args.publish, license=args.license))
