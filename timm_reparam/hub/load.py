"""Load a checkpoint folder after its files were checked."""

from pathlib import Path

import safetensors.torch
import timm
import torch
from torch import nn

from ..errors import ReparamError
from .facts import CONFIG_NAME, WEIGHTS_NAME
from .untrusted import check_folder

__all__ = ['load_checked', 'load_checkpoint']


def load_checkpoint(folder: str | Path) -> nn.Module:
    """Load a checkpoint folder, safetensors only.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``.

    Returns:
        The model, in eval mode.

    Raises:
        ReparamError: The folder is not a checkpoint, or its weights do not fit its architecture.
    """
    folder = Path(folder)
    check_folder(folder)
    return load_checked(folder)


def load_checked(folder: Path) -> nn.Module:
    """Load a checkpoint folder that :func:`check_folder` has accepted; see :func:`load_checkpoint`."""
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        stored = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    except ReparamError:
        raise
    except Exception as error:  # a damaged file or a wrong argument may raise anything
        raise ReparamError(f'{folder}: cannot be loaded ({error})') from error
    # timm adapts the stem and the classifier to the configuration and skips what does not fit, so compare every value.
    state = model.state_dict()
    differing = sorted(
        name
        for name in state.keys() | stored.keys()
        if name not in state or name not in stored or not _is_same(stored[name].to(state[name].dtype), state[name])
    )
    if differing:
        raise ReparamError(
            f'{folder}: {differing[0]}: expected the values of {WEIGHTS_NAME}, got others ({len(differing)} tensors); '
            f'{CONFIG_NAME} makes timm change what it loads'
        )
    return model.eval()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())
