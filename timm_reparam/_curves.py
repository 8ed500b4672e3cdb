"""Learning curves of training runs, from the ``summary.csv`` files that timm writes."""

import csv
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ._files import open_csv
from .errors import ReparamError

__all__ = ['Curve', 'read_curves']

# Columns of a row of summary.csv by their number, without and with a validation. timm writes the header once only.
_SUMMARY_COLUMNS = {
    3: ('epoch', 'train_loss', 'lr'),
    6: ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'),
}


@dataclass(frozen=True)
class Curve:
    """Values of a column against the epoch, over runs that differ only in their seed.

    Args:
        name: Name of the runs' folders without the seed.
        runs: Number of runs.
        epochs: The epochs that all runs have.
        mean: Mean over the runs in each epoch.
        low: Smallest value in each epoch.
        high: Largest value in each epoch.
    """

    name: str
    runs: int
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_curves(folders: Sequence[str | Path], column: str) -> list[Curve]:
    """Read learning curves from the ``summary.csv`` of training runs, of `train.py` or of timm's train script.

    If an epoch occurs twice, as after resuming, the last row counts. Epochs without a value are skipped.

    Args:
        folders: Folders of runs. Folders with the same parent whose names differ only in a seed at the end (``…-s0``,
            ``…_s1``) form one curve.
        column: Column of the file, such as 'eval_top1' or 'train_loss'.

    Returns:
        The curves, in the order of their first folders.

    Raises:
        ReparamError: A file cannot be read, has no values in the column or some that are not numbers, or the runs of a
            curve have no epoch in common.
    """
    groups: dict[Path, dict[Path, dict[int, float]]] = {}
    for folder in folders:
        folder = Path(folder).absolute()
        stem = folder.with_name(re.sub(r'[-_]s\d+$', '', folder.name))
        groups.setdefault(stem, {})[folder] = _read_summary(folder / 'summary.csv', column)
    names = Counter(stem.name for stem in groups)
    curves = []
    for stem, runs in groups.items():
        epochs = sorted(set.intersection(*(set(run) for run in runs.values())))
        if not epochs:
            raise ReparamError(
                f'{stem}: {column}: expected an epoch that each of {len(runs)} runs has, found none; draw them apart'
            )
        values = [[run[epoch] for run in runs.values()] for epoch in epochs]
        name = stem.name if names[stem.name] == 1 else f'{stem.parent.name}/{stem.name}'
        mean, low, high = ([function(v) for v in values] for function in (statistics.fmean, min, max))
        curves.append(Curve(name, len(runs), epochs, mean, low, high))
    return curves


def _read_summary(path: Path, column: str) -> dict[int, float]:
    """Values of a column by epoch."""
    values: dict[int, float] = {}
    with open_csv(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for cells in reader:
            if not cells or cells[0] == 'epoch':  # a second header, written when a run was resumed
                continue
            names = header if len(cells) == len(header) else _SUMMARY_COLUMNS.get(len(cells), ())
            row = dict(zip(names, cells))
            try:
                epoch = int(float(row['epoch']))
                values.pop(epoch, None)
                if row.get(column):
                    values[epoch] = float(row[column])
            except (KeyError, ValueError) as error:
                place, got = f'{path}, line {reader.line_num}', ','.join(cells)
                raise ReparamError(f'{place}: expected numbers under {",".join(header)}, got {got}') from error
    if not values:
        raise ReparamError(f'{path}: expected epochs with {column}, found none; its columns are {",".join(header)}')
    return values
