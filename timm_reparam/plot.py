"""Pictures of costs, gains, learning curves, and the magnitude of kernels.

Drawing needs matplotlib (``pip install 'timm-reparam[plot]'``), which is imported only to draw. The same numbers give
the same bytes, text in .svg files stays text, and files are written atomically.
"""

import io
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ._curves import Curve, read_curves
from ._files import check_folder, write_whole
from ._profile_tables import Profile, reference_words, setting_words
from ._skeletons import Skeleton, commonest_kernel_size, kernel_skeletons
from .errors import ReparamError
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

# File types, each with the metadata that leaves out the time of writing.
_KINDS: dict[str, dict[str, None]] = {'.png': {}, '.svg': {'Date': None}, '.pdf': {'CreationDate': None}}
_DPI = 150
# matplotlib's default colour cycle. Lines that belong to no method take colours that no method has.
_CYCLE = ('blue', 'orange', 'green', 'red', 'purple', 'brown', 'pink', 'gray', 'olive', 'cyan')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P')
_DASHES = ('-', '--', ':', '-.')


def check_plot(path: str | Path) -> None:
    """Check that a picture can be written to a file, before anything is computed.

    Raises:
        ReparamError: matplotlib is not installed, the folder does not exist, or the suffix is not .png, .svg or .pdf.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ReparamError(f"{path}: drawing needs matplotlib; pip install 'timm-reparam[plot]'") from error
    if Path(path).suffix not in _KINDS:
        raise ReparamError(f'{path}: expected a name that ends in {", ".join(_KINDS)}; choose another name')
    check_folder(path)


@contextmanager
def _figure(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure of this size in inches, which is written to the file if the block raises no error."""
    check_plot(path)
    from matplotlib import rc_context, style
    from matplotlib.figure import Figure

    suffix = Path(path).suffix
    # Independent of the user's settings, and with a white background for dark pages.
    settings: Any = {'svg.fonttype': 'none', 'svg.hashsalt': 'timm-reparam', 'text.parse_math': False}
    with style.context('default'), rc_context(settings):
        figure = Figure(figsize=(width, height), layout='constrained')
        yield figure
        content = io.BytesIO()
        figure.savefig(content, format=suffix.removeprefix('.'), dpi=_DPI, metadata=_KINDS[suffix])
    write_whole(path, content.getvalue())


def plot_profiles(profiles: Sequence[Profile], path: str | Path) -> None:
    """Draw the ratios of latency and training step as bars, with the interquartile range as error bars.

    Args:
        profiles: The measured models.
        path: File to write; its suffix selects the file type: .svg, .png or .pdf.

    Raises:
        ReparamError: Nothing was timed, or `check_plot` raises.
    """
    series = [('training step', 'step'), ('inference', 'latency')]
    series = [(label, key) for label, key in series if any(getattr(p, f'{key}_ratio') is not None for p in profiles)]
    if not series:
        raise ReparamError(f'{path}: expected timed profiles, but nothing was timed; measure at least one run')
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


def plot_kernels(
    models: Sequence[nn.Module], path: str | Path, *, names: Sequence[str], kernel_size: int | None = None
) -> None:
    """Draw the `kernel_skeletons` of models as heat maps, one row for each model.

    Args:
        models: The models.
        path: File to write; its suffix selects the file type: .svg, .png or .pdf.
        names: Labels of the models.
        kernel_size: Size of the kernels; the most common size of all models by default.

    Raises:
        ReparamError: A model has no kernels of this size, or `check_plot` raises.
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
    side = max(1.2, 0.28 * size)  # of a heat map, in inches: large enough for readable numbers
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


# ----------------------------------------------------------------------------------------------------------------------
# Learning curves
# ----------------------------------------------------------------------------------------------------------------------


def plot_curves(folders: Sequence[str | Path], path: str | Path) -> None:
    """Draw eval top-1 and train loss of training runs against the epoch; see `read_curves`.

    A line is the mean over seeds. The band around it reaches from the smallest to the largest value.

    Args:
        folders: Folders of runs.
        path: File to write; its suffix selects the file type: .svg, .png or .pdf.

    Raises:
        ReparamError: `read_curves` or `check_plot` raises.
    """
    panels = [('eval_top1', 'top-1 (%)'), ('train_loss', 'train loss')]
    curves = [(label, read_curves(folders, column)) for column, label in panels]
    with _figure(path, 9, 3.6 + 0.2 * len(curves[0][1])) as figure:
        handles: dict[str, Any] = {}  # passed explicitly, because a legend skips names that start with '_'
        for axes, (label, drawn) in zip(figure.subplots(1, len(panels)), curves):
            for curve, style in zip(drawn, _line_styles([curve.name for curve in drawn])):
                runs = f' ({curve.runs} runs)' if curve.runs > 1 else ''
                if len(curve.epochs) == 1:
                    style['marker'] = 'o'  # a line through one point is invisible
                (handles[curve.name + runs],) = axes.plot(curve.epochs, curve.mean, **style)
                if curve.runs > 1:
                    axes.fill_between(curve.epochs, curve.low, curve.high, color=style['color'], alpha=0.2, linewidth=0)
            axes.set_xlabel('epoch')
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.grid(alpha=0.3)
        figure.legend(handles.values(), handles, loc='outside lower center', ncols=2, frameon=False, fontsize='small')


def _line_styles(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """For each name the colour of its method, and a line style that differs from other names of that colour."""
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
    """Draw the accuracy that variants gain against the cost of their training step, one panel for each model.

    Error bars are 95 % confidence intervals of the paired difference. A hollow point has a single pair and no interval.
    Entries without a pair are not drawn, but named below the panel.

    Args:
        summaries: As `timm_reparam.results.summarize` returns them.
        path: File to write; its suffix selects the file type: .svg, .png or .pdf.

    Raises:
        ReparamError: There is no difference to draw, the step ratio of a variant is unknown, or `check_plot` raises.
    """
    panels: dict[tuple[str, str, int], list[Summary]] = {}
    for summary in summaries:
        if summary.against is not None:
            panels.setdefault(summary.setup, []).append(summary)
    compared = [summary for summary in summaries if summary.difference is not None]
    if not compared:
        raise ReparamError(
            f'{path}: expected runs of a variant and of stock with the same seed and epochs, found none; add them'
        )
    unknown = {summary.label: None for summary in compared if summary.step_ratio is None}
    if unknown:
        raise ReparamError(f'{path}: step_ratio: expected a ratio to stock, found none for {", ".join(unknown)}')
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
        beside = offset_copy(
            axes.transData, axes.figure, x=6 * drawn[place], units='points'
        )  # so that error bars do not overlap
        drawn[place] += 1
        style: dict[str, Any] = dict(fmt=marker, color=color, markerfacecolor=face, capsize=3, label=label)
        axes.errorbar([entry.step_ratio], [entry.difference], yerr=bars, transform=beside, **style)
        ends = [value for value in (entry.low, entry.difference, entry.high) if value is not None]
        axes.update_datalim([(entry.step_ratio, value) for value in ends])  # errorbar does not with another transform
    axes.plot([1], [0], 'o', color=colors()['stock'], label='stock')
    axes.axhline(0, color='0.3', linewidth=1, linestyle='--')
    axes.margins(x=0.15)
    axes.set_xlabel('training step, relative to stock' + (f'\nno pairs: {", ".join(missing)}' if missing else ''))
    axes.set_ylabel('top-1, difference to stock (points)')
    axes.grid(alpha=0.3)
    below = dict(loc='upper center', bbox_to_anchor=(0.5, -0.2))
    axes.legend(**below, ncols=2, fontsize='x-small', frameon=False)
