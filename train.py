"""Train a timm backbone with over-parameterised convolutions, fuse it, verify the fusion, save both forms.

    python train.py                                                         # the handwritten digits, no download
    python train.py --data-dir photos --model resnet18_doconv --num-classes 10 --epochs 90 --amp
    python train.py --data-dir photos --model resnet18.a1_in1k --variant refconv --pretrained --num-classes 10
    python train.py --config args.yaml --variant acconv                     # the recipe of a run of timm's own script
    python train.py --config args.yaml --experiment first --resume auto     # go on where a killed run stopped
    torchrun --nproc-per-node 4 train.py --config args.yaml                 # one process for each GPU

Flags have the names, defaults and meanings of timm's train script. A run writes its checkpoints, summary.csv and
args.yaml to OUTPUT/EXPERIMENT/, and the result to ZOO/<model>.<tag>/ and ZOO/<model>.<tag>_fused/. Resumed from any of
its checkpoints it does what it would have done without the interruption, bit for bit.
"""

import argparse
import copy
import gc
import importlib
import logging
import math
import sys
import time
import traceback
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a process group, which it would keep alive in its functions' defaults
from timm import utils

from timm_reparam import ReparamError
from timm_reparam.hub.client import without_secrets
from timm_reparam.hub.folder import architecture_of
from timm_reparam.training.checkpoint import CheckpointState, Position, find_checkpoint, open_saver
from timm_reparam.training.data import create_datasets, create_train_loader, create_validation_loader
from timm_reparam.training.engine import current_rate, distribute_statistics, train_one_epoch, updates_done, validate
from timm_reparam.training.flags import parse_args
from timm_reparam.training.model import (
    convert_norms,
    create_model,
    create_optimizer,
    create_scheduler,
    create_task,
    input_config,
    learning_rate,
    set_temperature_schedule,
    wrap_model,
)
from timm_reparam.training.result import check_result, publish_result, save_result
from timm_reparam.training.rng import gather_random_states
from timm_reparam.training.setup import Setup, choose_device, choose_precision, named_errors

_logger = logging.getLogger('train')


def run(args: argparse.Namespace) -> None:
    """Train, fuse, verify and save. Nothing is written before everything that a run needs has been made."""
    settings = {key: value for key, value in vars(args).items() if key not in ('config', 'verbose')}
    with named_errors('--device-modules'):
        for module in args.device_modules or ():
            importlib.import_module(module)
    device = choose_device(args)  # joins the other processes of torchrun
    primary = utils.is_primary(args)
    utils.random_seed(args.seed, args.rank)

    # the model, and the form of it that is fused, verified and saved
    model = create_model(args)
    data_config = input_config(args, model)
    if primary:
        check_result(args, model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        _logger.info('model: %s, %s parameters to train', architecture_of(model), f'{parameters:,}')
    model.to(device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    autocast, scaler = choose_precision(args, device)
    setup = Setup(args, copy.deepcopy(model).eval(), device, data_config, autocast)
    model = convert_norms(args, model, device)

    # the data
    datasets = create_datasets(setup)
    train_loader = create_train_loader(setup, datasets[0])
    validation_loader = create_validation_loader(setup, datasets[1])
    metric_name = 'loss' if validation_loader is None else args.eval_metric

    # task, optimizer and schedule
    args.lr = learning_rate(args)
    task = create_task(args, model, device)
    optimizer = create_optimizer(args, model)
    updates = math.ceil(len(train_loader) / args.grad_accum_steps)
    scheduler, epochs = create_scheduler(args, optimizer, updates)
    set_temperature_schedule(args, model, len(train_loader), epochs)
    ema = None
    if args.model_ema:
        ema = utils.ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)

    # resume; the schedule is a function of the epoch and the update
    state = CheckpointState(settings, model, task, optimizer, scheduler, ema, scaler)
    resumed = find_checkpoint(args)
    if resumed is not None:
        state.resume(setup, *resumed)
        if scheduler is not None:
            scheduler.step(state.position.epoch)
            scheduler.step_update(updates_done(args, state.position, len(train_loader)))
    wrap_model(args, model, task, device)
    saver = None
    if primary:
        saver = open_saver(setup, state, resumed)
        if args.log_wandb:
            import wandb

            wandb.init(project=args.wandb_project, name=saver.folder.name, config=settings)

    # the epochs, each with validation of a fused copy, a line of summary.csv and a checkpoint
    last = args.stop_epoch or epochs
    try:
        while state.position.epoch < last:
            epoch, start = state.position.epoch, time.monotonic()
            loss = train_one_epoch(setup, state, train_loader, saver)
            distribute_statistics(args, model)
            metrics = None
            due = (epoch + 1) % args.val_interval == 0 or epoch + 1 == last
            if due and validation_loader is not None:
                if ema is not None:
                    distribute_statistics(args, ema.module)
                metrics = validate(setup, state, validation_loader)
            lr = current_rate(optimizer)
            text = f'epoch {epoch}: loss {loss:.4f}, lr {lr:.2e}'
            if metrics is not None:
                text += ', validation loss {loss:.4f}, top-1 {top1:.2f}, top-5 {top5:.2f}'.format(**metrics)
            _logger.info('%s, %.1f s', text, time.monotonic() - start)
            if scheduler is not None:
                scheduler.step(epoch + 1)
            random_states = gather_random_states(device, args.distributed) if due else []
            state.position = Position(epoch + 1, random_states=random_states)
            if due and saver is not None:
                file = str(saver.folder / 'summary.csv')
                utils.update_summary(epoch, dict(loss=loss), metrics, filename=file, lr=lr, log_wandb=args.log_wandb)
                saver.save_checkpoint(epoch, metric=loss if metrics is None else metrics[metric_name])
    except KeyboardInterrupt:
        newest = saver and saver.newest()
        raise KeyboardInterrupt(f'; go on with --resume {newest}' if newest else '') from None

    # the result, by the first process alone
    if args.distributed:
        leave_processes(args, task)
    if saver is None:
        return
    best = saver.best()
    if best is None:
        _logger.warning('no epoch was trained: the result is what the model started as')
        weights = model.state_dict()
    else:
        measured = '' if best.get('metric') is None else f', {metric_name} {best["metric"]:.4g}'
        _logger.info('best checkpoint: epoch %d%s', best['epoch'], measured)
        weights = best['state_dict' if ema is None else 'state_dict_ema']
    validation_loader = create_validation_loader(setup, datasets[1])  # of the whole split, in one process
    print(save_result(setup, state, weights, datasets, validation_loader), flush=True)
    if args.publish:  # after the result is out: the Hub may not be in reach
        print(f'\n{publish_result(args, setup.form)}')


def leave_processes(args: argparse.Namespace, task) -> None:
    """End the collective work and its threads: one that lets go of a tensor while Python shuts down is an abort."""
    dist.barrier()
    task.trainable_module = task.trainable_module.module
    gc.collect()  # the wrapper holds the group, and is part of reference cycles
    dist.destroy_process_group()
    args.distributed = False


def start_logging(verbose: bool) -> None:
    """Log to standard error, unless whoever imported this script has set up logging."""
    handler = logging.StreamHandler()
    handler.setFormatter(utils.FormatterNoInfo())
    logging.basicConfig(handlers=[handler], level=logging.INFO)
    for name in ('timm', 'timm_reparam', 'httpx', 'httpx2'):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    for name in ('train', 'timm_reparam.training'):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: Command line without the name of the script; sys.argv by default.

    Returns:
        Exit status: 0, 1 after an error, 130 after Ctrl-C.
    """
    verbose = bool({'-v', '--verbose'} & set(sys.argv[1:] if argv is None else argv))
    start_logging(verbose)
    try:
        run(parse_args(argv, __doc__))
        return 0
    except ReparamError as error:
        if verbose:
            print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        print(f'train.py: error: {without_secrets(" ".join(str(error).split()))}', file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f'train.py: stopped{error}', file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            gc.collect()
            dist.destroy_process_group()


if __name__ == '__main__':
    try:
        sys.exit(main())
    except Exception:  # a defect: shown as Python shows it, but for secrets
        print(without_secrets(traceback.format_exc()), end='', file=sys.stderr)
        sys.exit(1)
