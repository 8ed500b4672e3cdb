"""Files that are complete or not there at all, and tables that are read or refused in one line."""

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from .errors import ReparamError

__all__ = ['check_folder', 'flush', 'open_csv', 'write_whole']


def check_folder(path: str | Path) -> None:
    """Say before anything is computed whether a file has a folder to be written into.

    Raises:
        ReparamError: It has none.
    """
    if not Path(path).absolute().parent.is_dir():
        raise ReparamError(f'{path}: expected a file in a folder that exists')


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file under another name and rename it, so that no half of it is ever in its place.

    Args:
        path: The file; one that is there is replaced. A link stays one; a pipe or a device is written into.
        content: What it shall hold.

    Raises:
        ReparamError: It cannot be written; what was there still is.
    """
    path = Path(path)
    if path.is_symlink() and path.is_file():
        path = path.resolve()
    partial = path.with_name(f'.{path.name}.partial')
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        try:
            partial.write_bytes(content)
            flush(partial)
            partial.replace(path)
            flush(path.parent)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ReparamError(f'{path}: cannot be written ({error.strerror})') from error


def flush(*paths: Path) -> None:
    """Wait until files and folders are on the disk."""
    for path in paths:
        if path.is_dir() and os.name == 'nt':
            continue  # folders cannot be opened there
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def open_csv(path: str | Path) -> Iterator[TextIO]:
    """Open a csv file for reading.

    Raises:
        ReparamError: It cannot be read, or what is in it is no csv; also while the block reads on.
    """
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:  # spreadsheets begin with a mark
            yield file
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ReparamError(f'{path}: cannot be read ({reason}); expected a csv file') from error
