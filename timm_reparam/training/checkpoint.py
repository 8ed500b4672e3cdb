"""The folder of a run: its checkpoints, their contents, and how to resume from one."""

import logging
import os
import re
import shutil
from argparse import Namespace
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.models import clean_state_dict, get_model_args, safe_model_name
from timm.task import TrainingTask
from torch import nn

from .._files import write_whole
from ..errors import ReparamError
from ..hub.folder import architecture_of
from ..hub.training import read_training
from ..timm_model import record_options
from .rng import set_random_state
from .setup import Setup

__all__ = ['CheckpointState', 'Position', 'Saver', 'checkpoints_in', 'find_checkpoint', 'open_saver', 'position_of']

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Position of a run, from which it resumes.

    Args:
        epoch: The epoch.
        batch: Index of the first batch that has not been trained on.
        losses: Sum and number of the losses of the images before that batch.
        random_states: Random states of all processes.
    """

    epoch: int = 0
    batch: int = 0
    losses: tuple[float, int] = (0.0, 0)
    random_states: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class CheckpointState:
    """Contents of a checkpoint: the entries of timm's checkpoints, and the position of the run in `train_state`.

    It has plain values and tensors only, so that torch.load(weights_only=True) and timm's loaders read it.

    Args:
        settings: The arguments as given, before others were derived from them.
        model: The plain module; a wrapper around it may be trained.
        task: The training task.
        optimizer: The optimizer.
        scheduler: Schedule of the learning rate.
        ema: Moving average of the weights.
        scaler: Scaler of the loss.
        position: Position of the run.
    """

    settings: dict[str, Any]
    model: nn.Module
    task: TrainingTask
    optimizer: torch.optim.Optimizer
    scheduler: Any = None
    ema: utils.ModelEmaV3 | None = None
    scaler: utils.NativeScaler | None = None
    position: Position = field(default_factory=Position)

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights to validate: the moving average, if there is one."""
        return (self.model if self.ema is None else self.ema.module).state_dict()

    def get_checkpoint_state(self, ema: bool = False, unwrap_fn: Any = None) -> dict[str, Any]:
        """The entries that timm's saver adds to its own; it calls this method."""
        if ema:
            return {} if self.ema is None else dict(state_dict_ema=self.ema.module.state_dict())
        record_options(self.model)
        state = dict(
            arch=architecture_of(self.model),
            model_args=get_model_args(self.model),
            args=self.settings,
            state_dict=self.model.state_dict(),
        )
        if task_state := self.task.get_task_state():
            state['task_state'] = task_state
        total, count = self.position.losses
        state['train_state'] = dict(
            epoch=self.position.epoch,
            next_batch=self.position.batch,
            losses=(float(total), int(count)),
            random_states=self.position.random_states,
        )
        return state

    def check_finite(self) -> None:
        """Raise ReparamError if the weights contain NaN or infinity, before a checkpoint replaces a good one."""
        damaged = [name for name, value in self.model.state_dict().items() if not torch.isfinite(value).all()]
        if damaged:
            raise ReparamError(
                f'epoch {self.position.epoch}: expected finite weights, got NaN or infinity in {len(damaged)} tensors '
                f'({", ".join(damaged[:3])}); nothing was saved; lower --lr or add --clip-grad, and --resume from the '
                'last checkpoint'
            )

    def resume(self, setup: Setup, path: Path, checkpoint: dict[str, Any]) -> None:
        """Load a checkpoint, including the random states.

        Raises:
            ReparamError: The checkpoint does not match this run, or is damaged.
        """
        _check_history(checkpoint.get('saver') or {}, path)
        found, architecture = checkpoint.get('arch'), architecture_of(self.model)
        if found not in (None, architecture, setup.args.model):
            raise ReparamError(f'--resume {path}: expected a checkpoint of {architecture}, got {found}; change --model')
        try:
            self.position = self._load(setup, path, checkpoint)
        except ReparamError:
            raise
        except Exception as error:  # a file of another origin may contain anything
            raise ReparamError(
                f'--resume {path}: does not fit this model or optimizer; give the flags of that run '
                f'({type(error).__name__}: {error})'
            ) from error
        _logger.info('resumed from %s: epoch %d, batch %d', path, self.position.epoch, self.position.batch)

    def _load(self, setup: Setup, path: Path, checkpoint: dict[str, Any]) -> Position:
        args = setup.args
        _load_whole(self.model, checkpoint['state_dict'], path)
        self.task.load_task_state(checkpoint.get('task_state'))
        if self.ema is not None:
            _load_whole(self.ema.module, checkpoint.get('state_dict_ema') or checkpoint['state_dict'], path)
        if not args.no_resume_opt and 'optimizer' in checkpoint:
            scales = [group.get('lr_scale') for group in self.optimizer.param_groups]
            self.optimizer.load_state_dict(checkpoint['optimizer'])
            for group, scale in zip(self.optimizer.param_groups, scales):
                if scale is not None:  # as --lr, --variant-lr and --layer-decay are those of this run
                    group['lr_scale'] = scale
        if not args.no_resume_opt and self.scaler is not None and self.scaler.state_dict_key in checkpoint:
            self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])
        epoch, batch = position_of(checkpoint, path)
        state = checkpoint.get('train_state')
        if state is None:  # a checkpoint of timm's script
            return Position(epoch, batch)
        states = state['random_states']
        if len(states) == args.world_size:
            set_random_state(states[args.rank], setup.device)
        else:
            _logger.warning('the checkpoint is of %d processes: random states are not restored', len(states))
        total, count = state['losses'] if batch else (0.0, 0)
        return Position(epoch, batch, (total, count), states)


def position_of(checkpoint: dict[str, Any], path: Path) -> tuple[int, int]:
    """Epoch and batch at which a run resumes from a checkpoint."""
    state = checkpoint.get('train_state')
    if state is not None:
        found = state.get('epoch'), state.get('next_batch')
        if not all(type(number) is int and number >= 0 for number in found):
            raise ReparamError(
                f'--resume {path}: train_state: expected an epoch and a batch, got {found!r:.80}; resume from another '
                'file'
            )
        return found
    epoch = checkpoint.get('epoch', -1)
    return epoch + (1 if checkpoint.get('version', 1) > 1 or epoch < 0 else 0), 0


def _load_whole(model: nn.Module, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Load weights that must have exactly the keys of the model; a variant would accept stock weights as a lift."""
    weights, expected = clean_state_dict(weights), model.state_dict().keys()
    if weights.keys() != expected:
        lacking, strange = sorted(expected - weights.keys()), sorted(weights.keys() - expected)
        raise ReparamError(
            f'--resume {path}: state_dict: does not fit this model, missing: {lacking[:3]}, unexpected: '
            f'{strange[:3]}; use --initial-checkpoint for weights alone, including stock weights'
        )
    model.load_state_dict(weights)


def _check_history(saved: dict[str, Any], path: Path) -> None:
    """Raise ReparamError unless a history names checkpoints of the run only, since timm's saver deletes the worst."""
    try:
        files = [name for name, _ in saved.get('checkpoint_files', ())]
        epoch, metric = saved.get('pending', (None, None))
        numbers = [saved.get('best_metric'), metric, *(metric for _, metric in saved.get('checkpoint_files', ()))]
        right = all(isinstance(name, str) and re.fullmatch(r'checkpoint-\d+\.pth\.tar', name) for name in files)
        right = right and all(each is None or type(each) is int for each in (epoch, saved.get('best_epoch')))
        right = right and all(each is None or type(each) in (int, float) for each in numbers)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise ReparamError(
            f"--resume {path}: saver: expected names such as 'checkpoint-1.pth.tar' with numbers; the file is damaged, "
            'resume from another one'
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoint files in the folder of a run."""
    return [path for path in folder.glob('*.pth.tar') if not path.name.endswith('tmp.pth.tar')]


def find_checkpoint(args: Namespace) -> tuple[Path, dict[str, Any]] | None:
    """Return the path and the contents of the checkpoint that --resume names, or None for a new run."""
    path = Path(args.resume) if args.resume else None
    if args.resume == 'auto':
        found = checkpoints_in(_output_root(args) / args.experiment) if utils.is_primary(args) else []
        path = max(found, default=None, key=lambda file: position_of(read_training(file, mmap=True), file))
        if args.distributed:  # all processes use the choice of the first one
            shared = [path]
            dist.broadcast_object_list(shared, 0)
            path = shared[0]
    return None if path is None else (path, read_training(path))


class Saver(utils.CheckpointSaver):
    """timm's checkpoint saver with atomic writes: a kill leaves either the previous file or the new one."""

    def __init__(self, folder: Path, state: CheckpointState, decreasing: bool, max_history: int):
        super().__init__(
            model=state.model,
            optimizer=state.optimizer,
            amp_scaler=state.scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=decreasing,
            max_history=max_history,
            task=state,
        )
        self.folder, self.state = folder, state

    def _save(self, save_path: str, epoch: int, metric: float | None = None) -> None:
        self.state.check_finite()
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as error:
            with suppress(OSError):
                os.unlink(save_path)
            raise ReparamError(
                f'{self.checkpoint_dir}: the checkpoint of epoch {epoch} cannot be written ({error}); the last one is '
                'still good; free disk space, then --resume from it'
            ) from error

    def _replace(self, src: str, dst: str) -> None:
        os.replace(src, dst)

    def _duplicate(self, src: str, dst: str) -> None:
        partial_file = f'{dst}.partial'
        if os.path.exists(partial_file):
            os.unlink(partial_file)
        try:
            os.link(src, partial_file)
        except OSError:  # a file system without hard links
            shutil.copy2(src, partial_file)
        os.replace(partial_file, dst)
        if os.path.exists(partial_file):  # both are links to the same file: nothing was replaced
            os.unlink(partial_file)

    def restore_history(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Restore which checkpoints are kept and which is best, even if the run was killed while it sorted them."""
        # The next recovery checkpoints replace the remaining ones.
        left = sorted(self.folder.glob('recovery-*.pth.tar'), key=lambda file: file.stat().st_mtime)
        self.prev_recovery_file, self.curr_recovery_file = ['', '', *map(str, left)][-2:]
        saved = checkpoint.get('saver')
        if saved is None:
            return
        epoch, metric = saved.get('pending', (None, None))
        if metric is not None:
            kept = self._checkpoint_path(epoch)
            if not os.path.exists(kept):
                self._duplicate(str(path), kept)
        # A recovery checkpoint has no metric and is not part of the history.
        self.load_state_dict({**saved, 'pending': (None if metric is None else epoch, metric)})
        self._cleanup_checkpoints()
        names = (f'checkpoint-{self.best_epoch}{self.extension}', f'model_best{self.extension}')
        best = next((file for name in names if (file := path.parent / name).exists()), None)
        if best is not None:
            self._duplicate(str(best), str(self.folder / names[1]))

    def newest(self) -> Path | None:
        """The checkpoint that was written last."""
        return max(checkpoints_in(self.folder), default=None, key=lambda path: path.stat().st_mtime)

    def best(self) -> dict[str, Any] | None:
        """The contents of the best checkpoint, or of the last one; None if there are no checkpoints."""
        for name in ('model_best', 'last'):
            path = self.folder / f'{name}{self.extension}'
            if path.exists():
                return read_training(path)
        return None


def open_saver(setup: Setup, state: CheckpointState, resumed: tuple[Path, dict[str, Any]] | None) -> Saver:
    """Create the folder of a run with args.yaml and summary.csv, and restore the history of a resumed run.

    Raises:
        ReparamError: The folder cannot be written, or belongs to another run.
    """
    args, side = setup.args, setup.data_config['input_size'][-1]
    path = None if resumed is None else resumed[0]
    name = f'{datetime.now().strftime("%Y%m%d-%H%M%S")}-{safe_model_name(architecture_of(state.model))}-{side}'
    folder = _output_root(args) / (args.experiment or name)
    try:
        if path is not None and not args.experiment and not args.output:
            folder = path.parent
        elif not args.experiment:
            folder = _make_new(folder)
        folder.mkdir(parents=True, exist_ok=True)
        is_resumed = path is not None and path.parent.samefile(folder)
        # --resume auto also continues a run that was killed before its first checkpoint.
        claims = not is_resumed and args.resume != 'auto'
        if (checkpoints_in(folder) and not is_resumed) or (claims and not _claim(folder)):
            raise ReparamError(
                f'--experiment {args.experiment}: another run has begun in {folder}; continue it with --resume auto, '
                'or choose another name'
            )
    except OSError as error:
        raise ReparamError(f'--output {folder}: cannot be written ({error.strerror})') from error
    write_whole(folder / 'args.yaml', yaml.safe_dump(state.settings).encode())
    _logger.info('checkpoints: %s', folder)
    saver = Saver(folder, state, args.eval_metric == 'loss' or not args.val_split, args.checkpoint_hist)
    if resumed is not None:
        saver.restore_history(*resumed)
    utils.trim_summary(str(folder / 'summary.csv'), state.position.epoch)
    return saver


def _output_root(args: Namespace) -> Path:
    return Path(args.output or 'output/train')


def _make_new(folder: Path) -> Path:
    """Create a folder of this name, or with the first free number after it; return its path."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    name, number = folder.name, 0
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1
            folder = folder.with_name(f'{name}-{number}')


def _claim(folder: Path) -> bool:
    """Create args.yaml; return False if another run has created it already."""
    try:
        (folder / 'args.yaml').touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
