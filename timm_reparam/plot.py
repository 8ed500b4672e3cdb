"""Pictures: what models cost, what variants gain, how they learn, and where their kernels carry weight.

Drawing needs matplotlib (``pip install 'timm-reparam[plot]'``), which is imported when something is drawn; the numbers
behind the pictures do not. The same numbers give the same bytes, text in .svg stays text, and a file appears whole.
"""

import csv
import io
import itertools
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._files import check_folder, open_csv, write_whole
from .errors import ReparamError
from .layers._fusible import Fusible, first_conv
from .layers._tensor import float64_copy, to_float64
from .profile import Profile, reference_words, setting_words
from .results import Summary, setup_words
from .variants import colors, is_variant

__all__ = [
    'Curve',
    'Skeleton',
    'check_plot',
    'commonest_kernel_size',
    'kernel_skeletons',
    'plot_curves',
    'plot_gains',
    'plot_kernels',
    'plot_profiles',
    'read_curves',
]

# Kinds of files, each with what keeps the time of writing out of it.
_KINDS: dict[str, dict[str, None]] = {'.png': {}, '.svg': {'Date': None}, '.pdf': {'CreationDate': None}}
_DPI = 150
# matplotlib's default cycle; lines of no method take the colours that no method has.
_CYCLE = ('blue', 'orange', 'green', 'red', 'purple', 'brown', 'pink', 'gray', 'olive', 'cyan')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P')
_DASHES = ('-', '--', ':', '-.')
# What timm writes of an epoch into summary.csv, without and with a validation, whatever the file's header says.
_SUMMARY_COLUMNS = {
    3: ('epoch', 'train_loss', 'lr'),
    6: ('epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'),
}


def check_plot(path: str | Path) -> None:
    """Check that a picture can be written to a file, before anything is computed.

    Raises:
        ReparamError: matplotlib is not installed, its folder does not exist, or it is of another kind than .png, .svg
            and .pdf.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ReparamError(f"{path}: drawing needs matplotlib; pip install 'timm-reparam[plot]'") from error
    if Path(path).suffix not in _KINDS:
        raise ReparamError(f'{path}: expected a name that ends in {", ".join(_KINDS)}')
    check_folder(path)


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches to draw on; written to the file when the block ends well."""
    check_plot(path)
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    suffix = Path(path).suffix
    # whatever the user's settings are: white behind everything, for dark pages, too
    settings: Any = {'svg.fonttype': 'none', 'svg.hashsalt': 'timm-reparam', 'text.parse_math': False}
    with style.context('default'), rc_context(settings):
        figure = Figure(figsize=(width, height), layout='constrained')
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format=suffix.removeprefix('.'), dpi=_DPI, metadata=_KINDS[suffix])
    write_whole(path, content.getvalue())


def plot_profiles(profiles: Sequence[Profile], path: str | Path) -> None:
    """Draw the ratios of latency and training step, a bar each, with the interquartile range as error bars.

    Args:
        profiles: The measured models.
        path: File to write; its suffix says of which kind, .svg or .png for instance.

    Raises:
        ReparamError: Nothing was timed, or what `check_plot` refuses.
    """
    series = [('training step', 'step'), ('inference', 'latency')]
    series = [(label, key) for label, key in series if any(getattr(p, f'{key}_ratio') is not None for p in profiles)]
    if not series:
        raise ReparamError(f'{path}: nothing was timed, so there is nothing to draw; expected at least one run')
    with _figure(path, 8, 1.4 + 0.6 * len(profiles)) as figure:
        axes = figure.add_subplot()
        height = 0.8 / len(series)
        for place, (label, key) in enumerate(series):
            ratios = [getattr(profile, f'{key}_ratio') for profile in profiles]
            spreads = [getattr(profile, f'{key}_ratio_spread') / 2 for profile in profiles]
            rows = [row + (place - (len(series) - 1) / 2) * height for row in range(len(profiles))]
            axes.barh(rows, ratios, height, xerr=spreads, label=label, capsize=2)
            for row, ratio, spread in zip(rows, ratios, spreads):
                text, end = f'{ratio:.2f}', (ratio + spread, row)
                axes.annotate(text, end, (4, 0), textcoords='offset points', va='center', fontsize='small')
        axes.set_yticks(range(len(profiles)), [profile.name for profile in profiles])
        axes.invert_yaxis()  # the first model on top
        axes.axvline(1, color='0.3', linewidth=1, linestyle='--')
        axes.margins(x=0.1)
        axes.set_xlabel(f'ratio to {reference_words(profiles)}')
        axes.set_title(setting_words(profiles), fontsize='small')
        axes.legend(loc='lower center', bbox_to_anchor=(0.5, 1.08), ncols=2, frameon=False)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Where the kernels of a stage carry weight.

    Args:
        stage: Module at whose end the stage ends.
        layers: Number of convolutions that were averaged.
        magnitude: Mean magnitude at each place of the kernel, (size, size) in float64, between 0 and 1.
    """

    stage: str
    layers: int
    magnitude: torch.Tensor


def commonest_kernel_size(*models: nn.Module) -> int:
    """Return the size k > 1 of which the models have most k x k kernels; the smallest of equally common ones.

    Raises:
        ReparamError: There are none.
    """
    sizes = Counter(size for model in models for _, _, size in _square_kernels(model) if size > 1)
    if not sizes:
        raise ReparamError(
            f'{", ".join(type(model).__name__ for model in models)}: looked for kxk convolutions with k > 1, found none'
        )
    return min(sizes, key=lambda size: (-sizes[size], size))


def kernel_skeletons(model: nn.Module, kernel_size: int | None = None) -> list[Skeleton]:
    """Average the magnitude of a model's kernels over each stage, as the ACNet paper does over a model.

    Section 4.4 of `ACNet: Strengthening the Kernel Skeletons for Powerful CNN via Asymmetric Convolution Blocks` -
    https://arxiv.org/abs/1908.03930 - sums the absolute values of a layer's kernels over output and input channels,
    divides the k x k sums by their maximum, so that all layers count equally, and takes the mean over the k x k layers:
    ``A = mean_i(S_i / max(S_i))`` with ``S_i = sum_oc |W_i[o, c, :, :]|``. There i runs over all layers of a model,
    here over those of a stage.

    Over-parameterised layers count by their fused kernel, in float64, dynamic convolutions by the mean of their
    kernels, all others by their weight (weight-standardised ones before standardisation). Norms that follow are left
    out, but `ACBlock2d` has its own in its kernel.

    Stages are those of timm's ``feature_info``: each ends with the module that it names, and takes what comes before,
    back to the end of the stage before (so the first one takes the stem). What comes after the last one, and models
    without, go by the names of their top modules.

    Args:
        model: Any model, in either form; it is left as it was.
        kernel_size: Size of the kernels; the commonest one above 1 by default.

    Returns:
        The stages that have such kernels, in the order of the modules.

    Raises:
        ReparamError: The model has no kernels of this size.
    """
    size = commonest_kernel_size(model) if kernel_size is None else kernel_size
    places = {name: place for place, (name, _) in enumerate(model.named_modules())}
    ends = _stage_ends(model, places)
    stages: dict[str, list[torch.Tensor]] = {}
    found = Counter[int]()
    for name, module, own_size in _square_kernels(model):
        found[own_size] += 1
        if own_size != size:
            continue
        stage = next((stage for stage, end in ends if places[name] <= end), name.partition('.')[0])
        sums = _kernel(module).abs().sum((0, 1))
        stages.setdefault(stage, []).append(sums / sums.max().clamp_min(torch.finfo(sums.dtype).tiny))
    if not stages:
        sizes = ', '.join(f'{number} of {own_size}x{own_size}' for own_size, number in sorted(found.items())) or 'none'
        raise ReparamError(
            f'{type(model).__name__}: looked for {size}x{size} convolutions, found {sizes}; choose another size'
        )
    return [Skeleton(stage, len(maps), torch.stack(maps).mean(0)) for stage, maps in stages.items()]


def plot_kernels(
    models: Sequence[nn.Module], path: str | Path, *, names: Sequence[str], kernel_size: int | None = None
) -> None:
    """Draw `kernel_skeletons` of models, a row of heat maps each.

    Args:
        models: The models.
        path: File to write; its suffix says of which kind, .svg or .png for instance.
        names: What to call them.
        kernel_size: Size of the kernels; the commonest one of all models by default.

    Raises:
        ReparamError: A model has no kernels of this size, or what `check_plot` refuses.
    """
    size = commonest_kernel_size(*models) if kernel_size is None else kernel_size
    rows = []
    for name, model in zip(names, models):
        try:
            rows.append(kernel_skeletons(model, size))
        except ReparamError as error:
            raise ReparamError(f'{name}: {error}') from None
    columns = max(map(len, rows))
    dynamic = [any(is_variant(module) and module.input_dependent for module in model.modules()) for model in models]
    title = f'mean magnitude of {size}x{size} kernels, each layer relative to its largest'
    title += '\ndynamic convolution: its mean kernel' if any(dynamic) else ''
    side = max(1.2, 0.28 * size)  # of a map, for numbers that can be read
    with _figure(path, 1.6 + side * columns, 0.6 + (side + 0.3) * len(rows)) as figure:
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for name, is_dynamic, skeletons, line in zip(names, dynamic, rows, grid):
            for axes in line[len(skeletons) :]:
                axes.set_axis_off()
            for axes, skeleton in zip(line, skeletons):
                _draw_skeleton(axes, skeleton, fontsize=20 * side / size)
            label = f'{name} (mean kernel)' if is_dynamic else name
            line[0].set_ylabel(label.replace(' (', '\n('), rotation='horizontal', ha='right', va='center', fontsize=8)
        figure.suptitle(title, fontsize=9)


def _draw_skeleton(axes: Any, skeleton: Skeleton, fontsize: float) -> None:
    values = skeleton.magnitude.tolist()
    size = len(values)
    axes.pcolormesh(values, vmin=0, vmax=1, cmap='Blues', edgecolors='white', linewidth=0.5)
    for row, column in itertools.product(range(size), repeat=2):
        value = values[row][column]
        color = 'white' if value > 0.6 else 'black'
        place = (column + 0.5, row + 0.5)
        axes.annotate(f'{value:.2f}', place, ha='center', va='center', color=color, fontsize=min(8, fontsize))
    axes.invert_yaxis()
    axes.set_aspect('equal')
    axes.set(xticks=[], yticks=[])
    axes.set_title(f'{skeleton.stage}\n{skeleton.layers} layer{"s" if skeleton.layers > 1 else ""}', fontsize=7)


def _square_kernels(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Layers that stand for one convolution with a square kernel: name, module, size of the kernel."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        conv: Any = module
        if isinstance(module, Fusible):  # its first convolution has the geometry of the fused one
            inside |= {id(part) for part in module.modules()}
            conv = first_conv(module)
        if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d) and conv.kernel_size[0] == conv.kernel_size[1]:
            yield name, module, conv.kernel_size[0]


def _kernel(module: Any) -> torch.Tensor:
    """The kernel that a layer stands for, in float64; the mean one of a dynamic convolution."""
    if isinstance(module, Fusible) and not module.input_dependent:
        layer: Any = float64_copy(module)
        return layer.equivalent_kernel().detach()
    return to_float64(module.weight)


def _stage_ends(model: nn.Module, places: Mapping[str, int]) -> list[tuple[str, int]]:
    """Stages of timm's feature_info, each with the place of the last module inside it, in the order of these."""
    infos = getattr(model, 'feature_info', None) or ()
    ends = {}
    for info in getattr(infos, 'info', infos):
        stage = info.get('module')
        if stage and stage in places:  # some are names of places inside forward
            ends[stage] = max(place for name, place in places.items() if f'{name}.'.startswith(f'{stage}.'))
    return sorted(ends.items(), key=lambda item: item[1])


# ----------------------------------------------------------------------------------------------------------------------
# Learning curves
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A figure against the epoch, over the runs that differ in their seed only.

    Args:
        name: Name of the runs' folders without the seed.
        runs: Number of runs.
        epochs: The epochs that every run has.
        mean: Mean over the runs at each of them.
        low: Smallest value; high: largest value.
    """

    name: str
    runs: int
    epochs: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def read_curves(folders: Sequence[str | Path], column: str) -> list[Curve]:
    """Read learning curves from the ``summary.csv`` of training runs, of `train.py` or of timm's train script.

    Of an epoch that is there twice, as after resuming, the last row counts; epochs without a value are left out.

    Args:
        folders: Folders of runs. Those beside each other whose names differ only in a seed at the end (``…-s0``,
            ``…_s1``) are one curve.
        column: Column of the file, 'eval_top1' or 'train_loss' for instance.

    Returns:
        The curves, in the order of their first folders.

    Raises:
        ReparamError: A file cannot be read, has no values in the column or some that are no numbers, or the runs of a
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
            raise ReparamError(f'{stem}: {column}: expected an epoch that each of {len(runs)} runs has, found none')
        values = [[run[epoch] for run in runs.values()] for epoch in epochs]
        name = stem.name if names[stem.name] == 1 else f'{stem.parent.name}/{stem.name}'
        mean, low, high = ([function(v) for v in values] for function in (statistics.fmean, min, max))
        curves.append(Curve(name, len(runs), epochs, mean, low, high))
    return curves


def plot_curves(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw eval top-1 and train loss of training runs against the epoch; see `read_curves`.

    A line is the mean over seeds, the band around it reaches from the smallest to the largest value.

    Args:
        folders: Folders of runs.
        path: File to write; its suffix says of which kind, .svg or .png for instance.

    Raises:
        ReparamError: What `read_curves` and `check_plot` refuse.
    """
    panels = [('eval_top1', 'top-1 (%)'), ('train_loss', 'train loss')]
    curves = [(label, read_curves(folders, column)) for column, label in panels]
    with _figure(path, 9, 3.6 + 0.2 * len(curves[0][1])) as figure:
        handles: dict[str, Any] = {}  # given by name, since the legend would leave out names that start with '_'
        for axes, (label, drawn) in zip(figure.subplots(1, len(panels)), curves):
            for curve, style in zip(drawn, _line_styles([curve.name for curve in drawn])):
                runs = f' ({curve.runs} runs)' if curve.runs > 1 else ''
                if len(curve.epochs) == 1:
                    style['marker'] = 'o'  # a line of one point is not seen
                (handles[curve.name + runs],) = axes.plot(curve.epochs, curve.mean, **style)
                if curve.runs > 1:
                    axes.fill_between(curve.epochs, curve.low, curve.high, color=style['color'], alpha=0.2, linewidth=0)
            axes.set_xlabel('epoch')
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.legend(handles.values(), handles, loc='outside lower center', ncols=2, frameon=False, fontsize='small')


def _read_summary(path: Path, column: str) -> dict[int, float]:
    """Values of a column by epoch."""
    values: dict[int, float] = {}
    with open_csv(path) as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for cells in reader:
            if not cells or cells[0] == 'epoch':  # a header again, where a run was resumed
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


def _line_styles(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each name the colour of its method, and dashes and marks that tell names of one colour apart."""
    known = colors()
    free = [color for color in (f'tab:{name}' for name in _CYCLE) if color not in known.values()]
    others = itertools.cycle(free or ['black'])
    used = Counter[str]()
    for name in names:
        found = [method for method in known if re.search(rf'(?<![a-z0-9]){method}(?![a-z0-9])', name)]
        color = known[max(found, key=len)] if found else next(others)
        marks, dashes = divmod(used[color], len(_DASHES))
        used[color] += 1
        marker = _MARKERS[(marks - 1) % len(_MARKERS)] if marks else ''
        yield dict(color=color, linestyle=_DASHES[dashes], marker=marker)


# ----------------------------------------------------------------------------------------------------------------------
# Gains
# ----------------------------------------------------------------------------------------------------------------------


def plot_gains(summaries: Sequence[Summary], path: str | Path) -> None:
    """Draw what variants gain against what their training step costs, a point each, a panel a model.

    The bar is the 95 % confidence interval of the paired difference; a hollow point has one pair and no interval. What
    has no pair is named below its panel, not drawn.

    Args:
        summaries: What was measured.
        path: File to write; its suffix says of which kind, .svg or .png for instance.

    Raises:
        ReparamError: There is no difference to draw, a variant's step ratio is not known, or what `check_plot` refuses.
    """
    panels: dict[tuple[str, str, int], list[Summary]] = {}
    for summary in summaries:
        if summary.against is not None:
            panels.setdefault(summary.setup, []).append(summary)
    compared = [summary for summary in summaries if summary.difference is not None]
    if not compared:
        raise ReparamError(f'{path}: expected runs of a variant and of stock with the same seed and epochs, found none')
    unknown = {summary.label: None for summary in compared if summary.step_ratio is None}
    if unknown:
        raise ReparamError(f'{path}: step_ratio: expected a ratio to stock, found none of {", ".join(unknown)}')
    columns = min(len(panels), 2)
    with _figure(path, 1 + 5 * columns, 4.2 * math.ceil(len(panels) / columns)) as figure:
        grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        titles = setup_words(summaries)
        for axes, (setup, entries) in zip(grid.flat, panels.items()):
            _draw_gains(axes, entries)
            axes.set_title(titles[setup].replace('`', ''), fontsize='small')


def _draw_gains(axes: Any, entries: Sequence[Summary]) -> None:
    from matplotlib.transforms import offset_copy

    several = len({entry.epochs for entry in entries}) > 1
    drawn = Counter[tuple[str, float | None]]()
    settings = list(dict.fromkeys((entry.protocol, entry.against, entry.epochs) for entry in entries))
    missing = []
    for entry in entries:
        words = entry.label
        words += '' if entry.protocol == entry.against == 'scratch' else f', {entry.protocol} to {entry.against}'
        words += f', {entry.epochs} epochs' if several else ''
        if entry.difference is None:
            missing.append(words)
            continue
        color = colors()[entry.method]
        bars = None
        if entry.low is not None and entry.high is not None:
            bars = [[entry.difference - entry.low], [entry.high - entry.difference]]
        marker = _MARKERS[settings.index((entry.protocol, entry.against, entry.epochs)) % len(_MARKERS)]
        face = color if bars else 'none'
        label = f'{words} ({entry.pairs} {"pairs" if entry.pairs > 1 else "pair, no interval"})'
        place = (entry.method, entry.step_ratio)
        beside = offset_copy(axes.transData, axes.figure, x=6 * drawn[place], units='points')  # or bars hide bars
        drawn[place] += 1
        style: dict[str, Any] = dict(fmt=marker, color=color, markerfacecolor=face, capsize=3, label=label)
        axes.errorbar([entry.step_ratio], [entry.difference], yerr=bars, transform=beside, **style)
        ends = [value for value in (entry.low, entry.difference, entry.high) if value is not None]
        axes.update_datalim([(entry.step_ratio, value) for value in ends])  # for lines beside it does not do so itself
    axes.plot([1], [0], 'o', color=colors()['stock'], label='stock')
    axes.axhline(0, color='0.3', linewidth=1, linestyle='--')
    axes.margins(x=0.15)
    axes.set_xlabel('training step, relative to stock' + (f'\nno pairs: {", ".join(missing)}' if missing else ''))
    axes.set_ylabel('top-1, difference to stock (points)')
    axes.grid(alpha=0.3)
    below = dict(loc='upper center', bbox_to_anchor=(0.5, -0.2))
    axes.legend(**below, ncols=2, fontsize='x-small', frameon=False)
