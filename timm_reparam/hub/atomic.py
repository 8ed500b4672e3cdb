"""Write checkpoint folders so that each of them is complete or absent.

A folder is written under a temporary name beside its place (``.NAME.partial``) and then renamed. A folder that it
replaces is renamed first (``.NAME.previous``), and removed once the new one is in place.

If the process is killed in between, the next save under the same name cleans up: it renames ``.NAME.previous`` back if
``NAME`` is missing, and removes unfinished folders.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import safetensors

from .._files import flush
from ..errors import ReparamError
from .facts import FILES, WEIGHTS_NAME, read_config, sha256_of

try:
    import fcntl
except ImportError:  # POSIX only; elsewhere concurrent saves into one folder are not serialised
    fcntl = None  # type: ignore[assignment]  # a module's name cannot be declared optional

__all__ = ['Writable', 'as_reparam_error', 'check_target', 'locked', 'make_zoo', 'write_all']


class Writable(Protocol):
    """A checkpoint that can be written into a folder.

    Attributes:
        target: The final folder.
    """

    target: Path

    @property
    def architecture(self) -> str:
        """Architecture of the model. A folder with another architecture is not replaced."""

    def write_model(self, folder: Path) -> None:
        """Write the configuration and the weights."""

    def write_texts(self, folder: Path) -> None:
        """Write the facts and the card."""


def write_all(drafts: Sequence[Writable], complete: Callable[[Sequence[str]], None] | None = None) -> None:
    """Write folders that share a parent: all of them under temporary names, then rename one after the other.

    Args:
        drafts: What to write.
        complete: Called with the hashes of all written weights, to complete the facts before they are written.
    """
    target = drafts[0].target
    if not target.parent.is_dir():
        raise ReparamError(f'{target}: its parent is not a folder; make it first, or choose another place')
    with as_reparam_error(target.parent), locked(target.parent):
        for draft in drafts:
            _bring_back(draft.target)
        for draft in drafts:
            check_target(draft.target, {draft.architecture})
        for draft in drafts:
            _remove_leftovers(draft.target)
        try:
            for draft in drafts:
                _partial(draft.target).mkdir()
                draft.write_model(_partial(draft.target))
            if complete is not None:
                complete([sha256_of(_partial(draft.target) / WEIGHTS_NAME) for draft in drafts])
            for draft in drafts:
                draft.write_texts(_partial(draft.target))
                flush(*_partial(draft.target).iterdir(), _partial(draft.target))
            _swap_in([draft.target for draft in drafts])
        finally:
            for draft in drafts:
                shutil.rmtree(_partial(draft.target), ignore_errors=True)


def check_target(target: Path, architectures: Collection[str]) -> None:
    """Raise ReparamError unless the place is free or holds a checkpoint of one of the architectures.

    The caller holds the lock of the parent, because another save may be exchanging the folder.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ReparamError(f'{target}: expected a folder or a free place, got a file or a link; choose another place')
    names = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    if not names:
        return
    foreign = [name for name in names if name not in FILES]
    if foreign:
        raise ReparamError(f'{target}: contains unexpected files, {foreign[:5]}; choose another place')
    found = read_config(target)['architecture']
    if found not in architectures:
        raise ReparamError(
            f'{target}: expected a free place or a checkpoint of {" or ".join(sorted(architectures))}, got one of'
            f' {found}; choose another place'
        )


def _partial(target: Path) -> Path:
    return target.with_name(f'.{target.name}.partial')


def _previous(target: Path) -> Path:
    return target.with_name(f'.{target.name}.previous')


def _bring_back(target: Path) -> None:
    """Undo the rename of a killed process: restore the previous folder if its name is free."""
    if _previous(target).exists() and not target.exists():
        _previous(target).rename(target)


def _remove_leftovers(target: Path) -> None:
    """Remove the temporary folders of a killed process."""
    for leftover in (_partial(target), _previous(target)):
        if leftover.exists():
            shutil.rmtree(leftover)


def _swap_in(targets: Sequence[Path]) -> None:
    """Rename finished folders to their final names; restore the previous ones if a rename fails."""
    try:
        for target in targets:
            if target.exists():
                target.rename(_previous(target))
        for target in targets:
            _partial(target).rename(target)
    except BaseException:
        for target in targets:
            if target.exists() and not _partial(target).exists():
                shutil.rmtree(target)
            _bring_back(target)
        raise
    flush(targets[0].parent)
    for target in targets:
        shutil.rmtree(_previous(target), ignore_errors=True)


def make_zoo(zoo: Path) -> None:
    """Make the folder of a pair if its parent exists."""
    with as_reparam_error(zoo):
        zoo.mkdir(exist_ok=True)


@contextmanager
def as_reparam_error(place: Path) -> Iterator[None]:
    """Turn errors of the file system and of safetensors into a ReparamError."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise ReparamError(f'{place}: cannot be written ({error}); nothing was changed') from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, so that saves into it run one at a time; it is released when the process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # the file system may have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
