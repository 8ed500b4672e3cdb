"""One epoch of training, and validation on a fused copy of the model."""

import logging
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from timm import utils
from timm.task import evaluation_sample_limit
from torch import nn

from ..errors import ReparamError
from ..fuse import fuse_model
from ..variants import variant_of
from ..verify import FusionReport, verify_fusion
from .checkpoint import CheckpointState, Position, Saver
from .data import set_epoch
from .model import clipped_parameters
from .rng import TRAINING, VALIDATION, RandomStream, draw, gather_random_states
from .setup import Setup

__all__ = [
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

# Number of images in a batch of the verification.
VERIFY_BATCH = 32
# Number of images of noise that replace a missing validation split or supplement a small one.
NOISE_IMAGES = 64


def train_one_epoch(setup: Setup, state: CheckpointState, loader: Any, saver: Saver | None) -> float:
    """Train from the position of the run to the end of its epoch, and return the mean loss.

    `saver` writes recovery checkpoints; only the first process has one.
    """
    args, device, task, optimizer, position = setup.args, setup.device, state.task, state.optimizer, state.position
    epoch, primary = position.epoch, utils.is_primary(args)
    set_epoch(args, loader, epoch)
    task.train()
    optimizer.zero_grad()
    batches, accumulation = len(loader), args.grad_accum_steps
    # The last update of an epoch may have fewer batches than the others.
    last_group = batches % accumulation or accumulation
    updates = math.ceil(batches / accumulation)
    total, count = position.losses
    stream = RandomStream(device, TRAINING, args.seed, epoch, args.rank)
    images, start = 0, time.monotonic()

    with _progress_bar(updates, f'epoch {epoch}', 'update', primary) as bar:
        bar.update(position.batch // accumulation)
        for index, input, target in draw(loader, stream, skip=position.batch):
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            group = last_group if index >= batches - last_group else accumulation
            need_update = index + 1 == batches or (index + 1) % accumulation == 0
            with nullcontext() if need_update else task.no_sync():
                with setup.autocast():
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
                random_states = gather_random_states(device, args.distributed)
                state.position = Position(epoch, index + 1, (total, count), random_states)
                if saver is not None:
                    saver.save_recovery(epoch, batch_idx=update)

    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    mean = total / max(count, 1)
    if args.distributed:
        mean = utils.reduce_tensor(torch.tensor([mean], device=device), args.world_size).item()
    return mean


def _progress_bar(total: int, name: str, unit: str, primary: bool) -> tqdm:
    """Progress bar, which only the first process shows, and only on a terminal."""
    return tqdm(total=total, desc=name, unit=unit, leave=False, disable=None if primary else True)


def backward(args: Namespace, state: CheckpointState, loss: torch.Tensor, need_update: bool) -> None:
    """Run the backward pass and, with `need_update`, update the parameters."""
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
    """Mean learning rate over the parameter groups."""
    rates = [group['lr'] for group in optimizer.param_groups]
    return sum(rates) / len(rates)


def updates_done(args: Namespace, position: Position, batches: int) -> int:
    """Number of updates of the whole run before a position, with `batches` batches in an epoch."""
    steps = args.grad_accum_steps
    return position.epoch * math.ceil(batches / steps) + math.ceil(position.batch / steps)


def distribute_statistics(args: Namespace, model: nn.Module) -> None:
    """Make the running statistics of all processes equal."""
    if args.distributed and args.dist_bn:
        utils.distribute_bn(model, args.world_size, args.dist_bn == 'reduce')


def fuse_form(setup: Setup, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Load weights into the form, and return its fusion, or the form itself if it has no variant layers."""
    form = setup.form
    # The auxiliary batch norms of --split-bn are for training only.
    form.load_state_dict({name: value for name, value in weights.items() if '.aux_bn.' not in name})
    fused = fuse_model(form) if variant_of(form) else form
    if setup.args.channels_last:
        fused.to(memory_format=torch.channels_last)
    return fused.eval()


def verify_form(
    setup: Setup, fused: nn.Module, batches: Callable[[], Iterable[torch.Tensor]], where: str
) -> FusionReport:
    """Verify a fusion against the train-time form, on the images of `batches`.

    Raises:
        ReparamError: The verification failed; the message starts with `where`.
    """

    def pieces() -> Iterator[torch.Tensor]:  # small batches, because verification computes in float64
        return (piece for batch in batches() for piece in batch.split(VERIFY_BATCH))

    report = verify_fusion(setup.form, fused, inputs=pieces())
    if not report.passed and report.num_inputs < NOISE_IMAGES:
        # The largest of a few rounding errors varies by chance, so more images are compared.
        report = verify_fusion(setup.form, fused, inputs=(*pieces(), *noise_images(setup).split(VERIFY_BATCH)))
    if not report.passed:
        raise ReparamError(f'{where}: expected a fused copy that equals the trained model; {report}')
    return report


def noise_images(setup: Setup) -> torch.Tensor:
    """A batch of seeded noise."""
    noise = torch.randn(NOISE_IMAGES, *setup.data_config['input_size'], generator=torch.Generator().manual_seed(0))
    return noise.to(setup.device)


@torch.no_grad()
def validate(setup: Setup, state: CheckpointState, loader: Any) -> dict[str, float]:
    """Measure top1, top5 and loss with a fused copy, which is verified on the first batch."""
    args, primary = setup.args, utils.is_primary(setup.args)
    # Fusing creates layers with random weights; the random state of training must not change.
    stream = RandomStream(setup.device, VALIDATION, args.seed, args.rank)
    with stream:
        fused = fuse_form(setup, state.weights())
    evaluator = state.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    with _progress_bar(len(loader), 'validation', 'batch', primary) as bar:
        for index, input, target in draw(loader, stream):
            if args.channels_last:
                input = input.contiguous(memory_format=torch.channels_last)
            if index == 0 and primary and variant_of(setup.form):
                with stream:
                    report = verify_form(setup, fused, lambda: [input], f'epoch {state.position.epoch}')  # noqa: B023
                _logger.debug('epoch %d: %s', state.position.epoch, report)
            with setup.autocast():
                output = fused(input)
            evaluator.update(output[0] if isinstance(output, (tuple, list)) else output, target)
            bar.update()
    return dict(evaluator.compute(distributed=args.distributed))
