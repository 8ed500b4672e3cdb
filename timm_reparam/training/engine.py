"""One epoch of training, and validation on a fused copy of the model."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm import utils
from timm.data import Mixup
from timm.task import TrainingTask, evaluation_sample_limit
from torch import nn

from ..errors import ReparamError
from ..fuse import fuse_model
from ..variants import variant_of
from ..verify import FusionReport, verify_fusion
from .checkpoint import CheckpointState, Position, Saver
from .data import prepare_batch, set_epoch
from .model import clipped_parameters, named_errors, trained_module
from .rng import TRAINING, VALIDATION, RandomStream, draw, gather_random_states

__all__ = [
    'choose_device',
    'choose_precision',
    'current_rate',
    'distribute_statistics',
    'fuse_form',
    'noise_images',
    'train_one_epoch',
    'updates_done',
    'validate',
    'verify_form',
]

_logger = logging.getLogger(__name__)

# Images that go through the verification of a fusion at a time.
VERIFY_BATCH = 32
# Images of noise that stand in for a validation split, or help out where one is small.
NOISE_IMAGES = 64


def choose_device(args: Namespace) -> torch.device:
    """Join the other processes, if any, and take the device that was asked for, or the best there is.

    Args:
        args: The arguments of the run; timm adds ``rank``, ``world_size`` and ``distributed``.
    """
    asked = args.device
    with named_errors(f'--device {asked}'):
        torch.device(asked or 'cpu')
    if asked is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        args.device = 'cpu' if accelerator is None else accelerator.type
    elif torch.device(asked).type == 'cuda' and not torch.cuda.is_available():
        raise ReparamError(f'--device {asked}: there is no CUDA device here; give --device cpu, or leave the flag out')
    device = utils.init_distributed_device(args)
    if not utils.is_primary(args):
        logging.disable(logging.WARNING)  # one process says it
    note = ', no accelerator was found' if asked is None and device.type == 'cpu' else ''
    _logger.info('device: %s, process %d of %d%s', device, args.rank, args.world_size, note)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def choose_precision(
    args: Namespace, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], utils.NativeScaler | None]:
    """Context of the forward pass, and scaler of the loss where float16 needs one."""
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    scaled = args.amp_dtype == 'float16' and device.type == 'cuda'
    return autocast, utils.NativeScaler(device=device.type) if scaled else None


def train_one_epoch(
    args: Namespace,
    state: CheckpointState,
    loader: Any,
    mixup: Mixup | None,
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    saver: Saver | None,
) -> float:
    """Train from the position of the run to the end of its epoch.

    Args:
        args: The arguments of the run.
        state: Model, task, optimizer and the like, and the position.
        loader: Loader of the training split.
        mixup: Mixing that is not the loader's own.
        autocast: Context of the forward pass.
        device: Device of the model.
        saver: Saver of recovery checkpoints, in the first process.

    Returns:
        Mean of the loss.
    """
    task, optimizer, position, primary = state.task, state.optimizer, state.position, utils.is_primary(args)
    epoch = position.epoch
    set_epoch(args, loader, mixup, epoch)
    trained_module(task).train()
    optimizer.zero_grad()
    batches, accumulation = len(loader), args.grad_accum_steps
    # the last update of an epoch may have fewer batches than the others
    last_group = batches % accumulation or accumulation
    updates = math.ceil(batches / accumulation)
    total, count = position.losses
    stream = RandomStream(device, TRAINING, args.seed, epoch, args.rank)
    prepare = partial(prepare_batch, args, device, mixup)
    images, start = 0, time.monotonic()

    with tqdm(
        total=updates, desc=f'epoch {epoch}', unit='update', leave=False, disable=None if primary else True
    ) as bar:
        bar.update(position.batch // accumulation)
        for index, input, target in draw(loader, stream, prepare, skip=position.batch):
            group = last_group if index >= batches - last_group else accumulation
            need_update = index + 1 == batches or (index + 1) % accumulation == 0
            with nullcontext() if need_update else task.no_sync():
                with autocast():
                    loss = task(input, target)['loss']
                value = loss.item()
                if not math.isfinite(value):
                    raise ReparamError(
                        f'epoch {epoch}, batch {index}: the loss is {value}; the last checkpoint is still good; lower '
                        '--lr, add --clip-grad or a longer --warmup-epochs, or leave out --amp'
                    )
                backward(args, state, loss / group, need_update)
            total, count = total + value * len(input), count + len(input)
            images += len(input) * args.world_size
            if not need_update:
                continue

            optimizer.zero_grad()
            update, done = index // accumulation, epoch * updates + index // accumulation + 1
            if state.ema is not None:
                state.ema.update(state.model, step=done)
            rate = f'{images / (time.monotonic() - start):.0f} images/s'
            text = f'loss {total / count:.4f}  lr {current_rate(optimizer):.2e}  {rate}'
            bar.set_postfix_str(text, refresh=False)
            bar.update()
            if primary and bar.disable and (update % args.log_interval == 0 or update + 1 == updates):
                _logger.info('epoch %d %*d/%d  %s', epoch, len(str(updates)), update + 1, updates, text)
            if state.scheduler is not None:
                state.scheduler.step_update(done)
            if args.recovery_interval and (update + 1) % args.recovery_interval == 0 and index + 1 < batches:
                state.position = Position(
                    epoch, index + 1, (total, count), gather_random_states(device, args.distributed)
                )
                if saver is not None:
                    saver.save_recovery(epoch, batch_idx=update)

    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean = total / max(count, 1)
    if args.distributed:
        mean = utils.reduce_tensor(torch.tensor([mean], device=device), args.world_size).item()
    return mean


def backward(args: Namespace, state: CheckpointState, loss: torch.Tensor, need_update: bool) -> None:
    """Backward pass and, when the gradients of an update are complete, the update."""
    create_graph = getattr(state.optimizer, 'is_second_order', False)
    parameters = clipped_parameters(args, state.model, state.task) if need_update else None
    if state.scaler is not None:
        state.scaler(
            loss,
            state.optimizer,
            clip_grad=args.clip_grad,
            clip_mode=args.clip_mode,
            parameters=parameters,
            create_graph=create_graph,
            need_update=need_update,
        )
        return
    loss.backward(create_graph=create_graph)
    if need_update:
        if parameters is not None:
            utils.dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        state.optimizer.step()


def current_rate(optimizer: torch.optim.Optimizer) -> float:
    """Mean learning rate of the parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def updates_done(args: Namespace, position: Position, batches: int) -> int:
    """Updates of the whole run before a position, in epochs of so many batches."""
    steps = args.grad_accum_steps
    return position.epoch * math.ceil(batches / steps) + math.ceil(position.batch / steps)


def distribute_statistics(args: Namespace, model: nn.Module) -> None:
    """Make the running statistics of all processes equal."""
    if args.distributed and args.dist_bn:
        utils.distribute_bn(model, args.world_size, args.dist_bn == 'reduce')


def fuse_form(args: Namespace, form: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Load weights of what trains, or of its average, into its plain form.

    Args:
        args: The arguments of the run.
        form: The model as it was created; it is changed.
        weights: The weights.

    Returns:
        The fusion of the form, or the form itself where it has no variant layers.
    """
    # auxiliary batch norms of --split-bn serve training only
    form.load_state_dict({name: value for name, value in weights.items() if '.aux_bn.' not in name})
    fused = fuse_model(form) if variant_of(form) else form
    if args.channels_last:
        fused.to(memory_format=torch.channels_last)
    return fused.eval()


def verify_form(
    form: nn.Module,
    fused: nn.Module,
    batches: Callable[[], Iterable[torch.Tensor]],
    noise: torch.Tensor,
    where: str,
) -> FusionReport:
    """Compare a fusion with the form that was fused.

    Args:
        form: The train-time form.
        fused: The fused form.
        batches: Gives the images.
        noise: Further images, for where those are few.
        where: What is verified, for the message.

    Raises:
        ReparamError: The fusion is not verified.
    """

    def pieces() -> Iterator[torch.Tensor]:  # small ones, because the exact copies compute in float64
        return (piece for batch in batches() for piece in batch.split(VERIFY_BATCH))

    report = verify_fusion(form, fused, inputs=pieces())
    if not report.passed and report.num_inputs < NOISE_IMAGES:
        # the largest of a few rounding errors is a matter of luck, so look at more of them
        report = verify_fusion(form, fused, inputs=(*pieces(), *noise.split(VERIFY_BATCH)))
    if not report.passed:
        raise ReparamError(f'{where}: the fused copy is not the model that trains; {report}')
    return report


def noise_images(data_config: dict[str, Any], device: torch.device) -> torch.Tensor:
    """Seeded noise in the shape of a batch."""
    noise = torch.randn(NOISE_IMAGES, *data_config['input_size'], generator=torch.Generator().manual_seed(0))
    return noise.to(device)


@torch.no_grad()
def validate(
    args: Namespace,
    epoch: int,
    form: nn.Module,
    weights: dict[str, torch.Tensor],
    task: TrainingTask,
    loader: Any,
    autocast: Callable[[], AbstractContextManager],
    data_config: dict[str, Any],
    device: torch.device,
) -> dict[str, float]:
    """Measure accuracy on the validation split with a fused copy; its first batch goes through both forms.

    Args:
        args: The arguments of the run.
        epoch: The epoch, for messages.
        form: The model as it was created; it is changed.
        weights: Weights of what trains, or of its average.
        task: The training task, which knows its measures.
        loader: Loader of the validation split.
        autocast: Context of the forward pass.
        data_config: Preprocessing.
        device: Device of the model.

    Returns:
        top1, top5 and loss.
    """
    primary = utils.is_primary(args)
    # fusing draws the random start of new layers: not from the numbers that training draws from
    stream = RandomStream(device, VALIDATION, args.seed, args.rank)
    with stream:
        fused = fuse_form(args, form, weights)
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    prepare = partial(prepare_batch, args, device, None)
    with tqdm(
        total=len(loader), desc='validation', unit='batch', leave=False, disable=None if primary else True
    ) as bar:
        for index, input, target in draw(loader, stream, prepare):
            if index == 0 and primary and variant_of(form):
                noise = noise_images(data_config, device)
                with stream:
                    report = verify_form(form, fused, lambda: [input], noise, f'epoch {epoch}')  # noqa: B023
                _logger.debug('epoch %d: %s', epoch, report)
            with autocast():
                output = fused(input)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
            bar.update()
    return dict(evaluator.compute(distributed=args.distributed))
