"""The setup of a run, its device and its precision."""

import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm import utils
from torch import nn

from ..errors import ReparamError
from ..hub.client import CLIENT_ERRORS, one_line

__all__ = ['TIMM_ERRORS', 'Setup', 'choose_device', 'choose_precision', 'named_errors']

_logger = logging.getLogger(__name__)

# Errors that timm raises, including those of the Hub's client, whose connection errors are classes of its own.
TIMM_ERRORS: tuple[type[Exception], ...] = (
    *(AssertionError, ImportError, LookupError, TypeError, ValueError),
    *CLIENT_ERRORS,
)


@contextmanager
def named_errors(place: str) -> Iterator[None]:
    """Turn an error of timm into one that begins with the flags in `place`."""
    try:
        yield
    except ReparamError:
        raise
    except TIMM_ERRORS as error:
        raise ReparamError(f'{place}: {one_line(error)} ({type(error).__name__})') from error


@dataclass(frozen=True)
class Setup:
    """The parts of a run that do not change from its first epoch to its result.

    Args:
        args: The arguments of the run, including derived ones.
        form: The model as created, without wrappers. The weights to fuse, verify and save are loaded into it.
        device: Device of this process.
        data_config: Preprocessing of the images.
        autocast: Context of the forward pass.
    """

    args: Namespace
    form: nn.Module
    device: torch.device
    data_config: dict[str, Any]
    autocast: Callable[[], AbstractContextManager] = nullcontext


def choose_device(args: Namespace) -> torch.device:
    """Initialise distributed training, if any, and return the requested device, or the best available one.

    timm adds ``rank``, ``world_size`` and ``distributed`` to the arguments.
    """
    asked = args.device
    with named_errors(f'--device {asked}'):
        torch.device(asked or 'cpu')
    if asked is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        args.device = 'cpu' if accelerator is None else accelerator.type
    elif torch.device(asked).type == 'cuda' and not torch.cuda.is_available():
        raise ReparamError(f'--device {asked}: there is no CUDA device; give --device cpu, or leave the flag out')
    device = utils.init_distributed_device(args)
    if not utils.is_primary(args):
        logging.disable(logging.WARNING)  # only the first process logs them
    note = ', no accelerator was found' if asked is None and device.type == 'cpu' else ''
    _logger.info('device: %s, process %d of %d%s', device, args.rank, args.world_size, note)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def choose_precision(
    args: Namespace, device: torch.device
) -> tuple[Callable[[], AbstractContextManager], utils.NativeScaler | None]:
    """Return the context of the forward pass, and a scaler of the loss if float16 needs one."""
    if not args.amp:
        return nullcontext, None
    autocast = partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype))
    scaled = args.amp_dtype == 'float16' and device.type == 'cuda'
    return autocast, utils.NativeScaler(device=device.type) if scaled else None
