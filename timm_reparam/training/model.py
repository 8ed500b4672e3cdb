"""The model of a run, its task, optimizer and schedule."""

import logging
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from timm.data import resolve_input_data_config
from timm.layers import convert_splitbn_model, convert_sync_batchnorm
from timm.loss import create_classification_loss
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2, optimizer_kwargs, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, TrainingTask
from torch import nn

from ..errors import ReparamError
from ..hub.folder import architecture_of
from ..layers import ReparamLayer
from ..models import register_variant
from ..variants import VARIANTS, is_variant, variant_of
from .setup import named_errors

__all__ = [
    'added_kernels',
    'clipped_parameters',
    'convert_norms',
    'create_model',
    'create_optimizer',
    'create_scheduler',
    'create_task',
    'input_config',
    'learning_rate',
    'model_name',
    'set_temperature_schedule',
    'wrap_model',
]

_logger = logging.getLogger(__name__)


def model_name(args: Namespace) -> str:
    """Name of the architecture to train, which is registered with timm if necessary."""
    if ':' in args.model:
        if args.variant:
            raise ReparamError(
                f'--variant {args.variant}: expected the name of an architecture, such as resnet18.a1_in1k, got '
                f'{args.model}; give --model without a source'
            )
        return args.model
    architecture, dot, tag = args.model.partition('.')
    stock, _, suffix = architecture.rpartition('_')
    if suffix in VARIANTS and args.variant in (None, suffix):
        wanted = (stock, suffix)
    elif suffix in VARIANTS:
        raise ReparamError(
            f'--variant {args.variant}: {architecture} is a variant already; give the stock architecture, {stock}'
        )
    elif args.variant:
        wanted = (architecture, args.variant)
    else:
        return args.model
    name = '_'.join(wanted)
    return (name if timm.is_model(name) else register_variant(*wanted)) + dot + tag


def create_model(args: Namespace) -> Any:
    """Create the model of a run on the CPU, with its initial weights; sets ``args.num_classes`` if it is None.

    Raises:
        ReparamError: timm cannot create the model, or a flag does not apply to it.
    """
    name = model_name(args)
    conv_options = _conv_options(args)
    if conv_options and ':' not in name and name.partition('.')[0].rpartition('_')[2] not in VARIANTS:
        raise ReparamError(f'--conv-options: {name} has no over-parameterised convolutions; add --variant')
    if ':' not in name and not timm.is_model(name.partition('.')[0]):
        raise ReparamError(f'--model {name}: no architecture of timm, nor a variant of one; see timm.list_models()')
    overlay = None
    if args.pretrained_path:
        path = Path(args.pretrained_path)
        file = path / 'model.safetensors' if path.is_dir() else path
        if not file.is_file():
            raise ReparamError(f'--pretrained-path {file}: no such file')
        overlay = dict(file=str(file), num_classes=-1)  # -1: timm adapts a classifier of any size
    with warnings.catch_warnings(record=True) as caught, named_errors(f'--model {args.model}'):
        warnings.simplefilter('always')
        model: Any = timm.create_model(  # Any: nn.Module does not declare timm's methods
            name,
            pretrained=args.pretrained or bool(args.pretrained_path),
            pretrained_cfg_overlay=overlay,
            in_chans=args.in_chans or (args.input_size[0] if args.input_size else 3),
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **{**args.model_kwargs, **({'conv_options': conv_options} if conv_options else {})},
        )
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        _logger.warning(message)
    if args.variant_lr != 1 and variant_of(model) is None:
        raise ReparamError(f'--variant-lr {args.variant_lr:g}: {name} has no kernels of a variant; add --variant')
    if args.initial_checkpoint:
        _load_initial_checkpoint(model, args.initial_checkpoint)
    if args.num_classes is None:
        args.num_classes = model.num_classes
    if args.grad_checkpointing:
        with named_errors(f'--grad-checkpointing, {name}'):
            model.set_grad_checkpointing(enable=True)
    return model


def _conv_options(args: Namespace) -> dict[str, Any]:
    return {**args.model_kwargs.get('conv_options', {}), **args.conv_options}


def _load_initial_checkpoint(model: nn.Module, path: str) -> None:
    """Load a checkpoint of exactly this architecture, or of its stock architecture as a lift."""
    try:
        load_checkpoint(model, path)
    except FileNotFoundError as error:
        raise ReparamError(f'--initial-checkpoint {path}: no such file') from error
    except RuntimeError as error:
        raise ReparamError(
            f'--initial-checkpoint {path}: expected weights of {architecture_of(model)} or of its stock architecture; '
            f'use --pretrained-path for weights with another number of classes. {error}'
        ) from error


def input_config(args: Namespace, model: nn.Module) -> dict[str, Any]:
    """Preprocessing of the images, from the model and the flags."""
    try:
        return resolve_input_data_config(model, vars(args))
    except ValueError as error:
        raise ReparamError(
            f'--model {args.model}: {error} See --img-size, --input-size and --in-chans, and whether the model takes '
            '--model-kwargs img_size=N'
        ) from error


def variant_layers(model: nn.Module) -> list[ReparamLayer]:
    """The over-parameterised convolutions of a model."""
    return [module for module in model.modules() if is_variant(module)]


def set_temperature_schedule(args: Namespace, model: nn.Module, batches: int, epochs: int) -> None:
    """Anneal the temperature of dynamic convolutions over 10 epochs, or over the first third of a shorter run.

    The layers count forward passes, one for each batch. A length that the user gave is kept, and so is a schedule that
    a loaded checkpoint has begun.
    """
    if 'temperature_steps' in _conv_options(args):
        return
    steps = max(1, round(batches * min(10, epochs / 3)))
    dynamic: list[Any] = [layer for layer in variant_layers(model) if hasattr(layer, 'reset_temperature')]
    fresh = [layer for layer in dynamic if layer.temperature_position is not None and layer.temperature_position == 0]
    for layer in fresh:
        layer.reset_temperature(steps)
    if fresh:
        _logger.info('temperature of %d dynamic convolutions: down to 1 over %d forward passes', len(fresh), steps)


def convert_norms(args: Namespace, model: nn.Module, device: torch.device) -> nn.Module:
    """Replace the batch norms for --split-bn and --sync-bn; the latter switches --dist-bn off."""
    if args.split_bn:
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    if args.sync_bn and args.distributed:
        if device.type == 'cpu':
            raise ReparamError('--sync-bn: PyTorch synchronises batch norms on accelerators only; leave it out')
        args.dist_bn = ''
        model = convert_sync_batchnorm(model)
    return model


def create_task(args: Namespace, model: nn.Module, device: torch.device) -> TrainingTask:
    """Create the training task: the forward pass and its loss."""
    given = {} if args.bce_target_thresh is None else dict(bce_target_thresh=args.bce_target_thresh)
    loss = create_classification_loss(
        'jsd' if args.jsd_loss else 'bce' if args.bce_loss else None,
        smoothing=args.smoothing,
        soft_targets=args.mixup > 0 or args.cutmix > 0,  # mixing applies the label smoothing
        jsd_splits=args.aug_splits,
        **given,
    )
    return ClassificationTask(model, criterion=loss.to(device), device=device, verbose=args.rank == 0)


def learning_rate(args: Namespace) -> float:
    """The learning rate: --lr, or --lr-base scaled to the number of images of an update."""
    if args.lr:
        return args.lr
    images = args.batch_size * args.world_size * args.grad_accum_steps
    scale, power = ('sqrt', 0.5) if any(name in args.opt.lower() for name in ('ada', 'lamb')) else ('linear', 1)
    lr = args.lr_base * (images / args.lr_base_size) ** power
    _logger.info('learning rate: %g, for %g images an update (%s scaling)', lr, images, scale)
    return lr


def added_kernels(model: nn.Module) -> list[nn.Parameter]:
    """Return the kernels and maps that a variant adds, to which --variant-lr applies.

    These are the parameters of variant layers with more than one dimension, except the stock weight and the layers of
    an attention. Gammas, scales and biases have one dimension.
    """
    return [
        parameter
        for layer in variant_layers(model)
        for name, parameter in layer.named_parameters()
        if name != 'weight' and parameter.dim() > 1 and not name.startswith('attention.')
    ]


def create_optimizer(args: Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Create timm's optimizer; with --variant-lr, the kernels that a variant adds are in separate groups."""
    options: dict[str, Any] = {}
    if args.variant_lr != 1:
        options['param_group_fn'] = partial(_groups_with_factor, args)
    with named_errors(f'--opt {args.opt}'):
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **options, **args.opt_kwargs)


def _groups_with_factor(args: Namespace, model: Any) -> list[dict[str, Any]]:
    """Split timm's parameter groups, so that the kernels that a variant adds have their own learning rate."""
    added = {id(parameter) for parameter in added_kernels(model)}
    rules = dict(weight_decay=args.weight_decay)
    if hasattr(model, 'no_weight_decay'):
        rules['no_weight_decay_list'] = model.no_weight_decay()
    if args.layer_decay is None:
        timms = param_groups_weight_decay(model, **rules)
    else:
        timms = param_groups_layer_decay(model, **rules, layer_decay=args.layer_decay)
    split = []
    for group in timms:
        scale = group.get('lr_scale', 1.0)
        for members, factor in ((False, 1.0), (True, args.variant_lr)):
            chosen = [parameter for parameter in group['params'] if (id(parameter) in added) == members]
            if chosen:  # timm's schedules multiply the learning rate of a group by lr_scale
                split.append({**group, 'params': chosen, 'lr_scale': scale * factor})
    return split


def create_scheduler(args: Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> tuple[Any, int]:
    """Create timm's schedule, None with --sched none; return it and its number of epochs."""
    with named_errors(f'--sched {args.sched}'):
        scheduler, epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch
        )
    if args.stop_epoch and args.stop_epoch > epochs:
        raise ReparamError(f'--stop-epoch {args.stop_epoch}: the schedule has {epochs} epochs; give fewer')
    return scheduler, epochs


def wrap_model(args: Namespace, model: nn.Module, task: TrainingTask, device: torch.device) -> None:
    """Compile and distribute the task's model, which shares parameters and buffers with the plain model."""
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
    if args.distributed:
        _share_frozen_kernels(model, task)
        task.prepare_distributed(device_ids=None if device.type == 'cpu' else [device])


def _share_frozen_kernels(model: nn.Module, task: TrainingTask) -> None:
    """Broadcast frozen kernels (RefConv) from the first process once.

    They are buffers, which DistributedDataParallel would broadcast in every step.
    """
    frozen = [layer.weight for layer in variant_layers(model) if not isinstance(layer.weight, nn.Parameter)]
    for kernel in frozen:
        dense = kernel.contiguous()
        dist.broadcast(dense, 0)
        kernel.copy_(dense)
    addresses = {kernel.data_ptr() for kernel in frozen}
    module: Any = task.get_trainable_module()  # the module that DistributedDataParallel wraps
    names = [name for name, buffer in module.named_buffers() if buffer.data_ptr() in addresses]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)


def clipped_parameters(args: Namespace, model: nn.Module, task: TrainingTask) -> list[nn.Parameter] | None:
    """Parameters whose gradients are clipped; None without --clip-grad.

    Adaptive clipping limits a gradient in proportion to the parameter. The parameters that a variant adds start at or
    near zero, where it would almost freeze them. They are exempt, like the classifier.
    """
    if args.clip_grad is None:
        return None
    adaptive = args.clip_mode == 'agc'
    parameters = list(task.get_clip_parameters(exclude_head=adaptive))
    if not adaptive:
        return parameters
    added = {
        parameter.data_ptr()
        for layer in variant_layers(model)
        for name, parameter in layer.named_parameters()
        if name not in ('weight', 'bias')
    }
    return [parameter for parameter in parameters if parameter.data_ptr() not in added]
