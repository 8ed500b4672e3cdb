"""Ends a save at every one of its steps and checks each time that no checkpoint was lost or is half there.

Run as a script with an empty folder as its argument; prints how each series went. It is a process of its own so that it
can fork children with a single thread.
"""

import errno
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import timm_reparam
from timm_reparam.hub import save_pair

NAMES = ('resnet10t_doconv.t', 'resnet10t_doconv.t_fused')
TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
# What the interpreter announces to audit hooks before it does it; a hook that raises prevents it.
STEPS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')


def snapshot(folder: Path) -> dict[str, str] | None:
    """Hashes of the files of a folder, or None if it is not there."""
    if not folder.is_dir():
        return None
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def end_at_step(number: int, how: str, save: Callable[[], object]) -> str:
    """Save in a child whose step of that number does not come about: it is killed before it, or the step fails.

    Returns:
        'ended', or 'saved' if the save went through all the same.
    """
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, args: tuple) -> None:
            nonlocal seen
            if event not in STEPS or event == 'open' and not (isinstance(args[2], int) and args[2] & os.O_CREAT):
                return
            seen += 1
            if seen == number:
                if how == 'kill':
                    os.kill(os.getpid(), signal.SIGKILL)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        sys.addaudithook(count)
        status = 3
        try:
            save()
            status = 0 if seen < number else 2
        except timm_reparam.ReparamError:
            status = 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return 'ended'
    return {0: 'no such step', 1: 'ended', 2: 'saved', 3: 'another error'}[os.WEXITSTATUS(status)]


def series(zoo: Path, start: Path | None, old: list, new: list, how: str, replace: Callable[[], object]) -> None:
    """End saves at their first step, their second one and so on, from the same start."""
    outcomes = set()
    number = 0
    while True:
        number += 1
        shutil.rmtree(zoo)
        shutil.copytree(start, zoo) if start else zoo.mkdir()
        result = end_at_step(number, how, replace)
        assert result != 'another error', f'{how} at step {number}: not a ReparamError'
        there = [snapshot(zoo / name) for name in NAMES]
        for name, before, after, found in zip(NAMES, old, new, there):
            assert found in (before, after, None), f'{how} at step {number}: {name} is half there'
            if before is not None and found is None:
                aside = snapshot(zoo / f'.{name}.previous')
                assert aside == before, f'{how} at step {number}: {name} is lost'
        if how == 'fail':
            assert there == (old if result == 'ended' else new), f'step {number} failed: not as before'
        outcomes.add(tuple('new' if a == c else 'aside' if a != b else 'old' for a, b, c in zip(there, old, new)))
        replace()
        assert sorted(os.listdir(zoo)) == sorted(NAMES), f'{how} at step {number}: the next save left {os.listdir(zoo)}'
        assert [snapshot(zoo / name) for name in NAMES] == new, f'{how} at step {number}: the next save went wrong'
        if result == 'no such step':
            break
    print(how, 'from nothing' if start is None else 'from a pair', number - 1, *sorted(map('/'.join, outcomes)))


def main(folder: Path) -> None:
    """Saves into an empty zoo and into one that holds the pair already, killed and failing."""
    torch.set_num_threads(1)
    model = timm.create_model('resnet10t_doconv', **TINY).eval()
    images = torch.randn(2, 3, 32, 32)
    zoo, old_zoo = folder / 'zoo', folder / 'old'
    states = []
    for top1 in (50.0, 75.0):
        with torch.no_grad():
            model.fc.weight.add_(1.0)
        fused = timm_reparam.fuse_model(model)
        report = timm_reparam.verify_fusion(model, fused, inputs=images)
        options = dict(tag='t', fused=fused, report=report, facts={'metrics': {'train_time': {'top1': top1}}})
        save_pair(model, zoo, **options)
        states.append([snapshot(zoo / name) for name in NAMES])
        if not old_zoo.exists():
            shutil.copytree(zoo, old_zoo)
    old, new = states
    assert all(before != after for before, after in zip(old, new))
    series(zoo, None, [None, None], new, 'kill', lambda: save_pair(model, zoo, **options))
    for how in ('kill', 'fail'):
        series(zoo, old_zoo, old, new, how, lambda: save_pair(model, zoo, **options))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
