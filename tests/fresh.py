"""Commands in processes of their own, forked from a server that has imported timm: a start of Python takes seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def run_module(name: str, *words: str) -> None:
    """``python -m <name> <words>``."""
    sys.argv = [name, *words]
    runpy.run_module(name, run_name='__main__', alter_sys=True)


def run_code(code: str, *words: str) -> None:
    """``python -c <code> <words>``."""
    sys.argv = ['-c', *words]
    exec(code, {'__name__': '__main__'})


def run_module_unread(name: str, *words: str) -> None:
    """The same, with nobody at the other end of the pipe that it prints into."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = open(1, 'w')  # buffered, whatever PYTHONUNBUFFERED says
    run_module(name, *words)


def finished(target: Callable[..., None], *args: str, folder: Path) -> subprocess.CompletedProcess:
    """Call a function of this module in a process of its own, in a folder; say how that ended and what it printed."""
    with started(target, *args, folder=folder) as (process, streams):
        process.join(120)
        printed = [stream.read_text() for stream in streams]
    return subprocess.CompletedProcess(args, process.exitcode, *printed)


@contextmanager
def started(
    target: Callable[..., None], *args: str, folder: Path
) -> Iterator[tuple[multiprocessing.process.BaseProcess, list[Path]]]:
    """The same while it runs: the process, which ends with the block, and the files of its two streams."""
    with tempfile.TemporaryDirectory() as printed:
        streams = [Path(printed, name) for name in ('stdout', 'stderr')]
        process = multiprocessing.get_context('forkserver').Process(target=_call, args=(target, args, folder, streams))
        process.start()
        try:
            yield process, streams
        finally:
            process.kill()
            process.join()


def _call(target: Callable[..., None], args: tuple[str, ...], folder: Path, streams: list[Path]) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    target(*args)
