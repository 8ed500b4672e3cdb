"""Accuracy of variants: means, paired differences to stock and confidence intervals of the runs in a results file."""

import csv
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ._files import open_csv
from ._profile_tables import format_count
from .errors import ReparamError
from .variants import run_methods

__all__ = [
    'COLUMNS',
    'Summary',
    'format_summary',
    'of_variant',
    'options_of',
    'read_results',
    'setup_of',
    'setup_words',
    'student_quantile',
    'summarize',
]

# Columns of a results file, which has one row for each run. Accuracies are in percent; `epochs` is the total.
COLUMNS: dict[str, type] = {
    **dict(model=str, method=str, protocol=str, epochs=int, seed=int),
    **dict(top1=float, top5=float, loss=float, fused_top1=float, differing=int, max_logit_difference=float),
    **dict(train_parameters=int, fused_parameters=int, step_ratio=float, seconds=float),
    **dict(size=int, batch_size=int, lr=float, weight_decay=float, options=str),
    **dict(device=str, torch=str, timm=str, commit=str, data_sha256=str),
}
_REQUIRED = ('model', 'method', 'protocol', 'epochs', 'seed', 'top1', 'size', 'data_sha256')
# Protocol of a run -> protocols of the stock runs that it is compared with, which have as many epochs in total.
# Refocusing starts from a trained model, so it is compared with stock fine-tuned from the same model first.
_AGAINST = {'scratch': ('scratch',), 'refocus': ('finetune', 'scratch'), 'finetune': ('finetune',)}
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """The runs of one method under one protocol, compared with stock runs of the same seeds.

    Args:
        model: Stock architecture.
        size: Side of the images.
        method: One of `timm_reparam.variants.run_methods`.
        protocol: 'scratch', 'refocus' or 'finetune'.
        epochs: Epochs in total, including those of the checkpoint that a run started from.
        n: Number of runs.
        mean: Mean top-1 accuracy in percent.
        std: Standard deviation over the runs (n - 1 in the denominator); None for a single run.
        step_ratio: Time of a training step relative to stock; None if unknown.
        train_parameters: Number of parameters in training; None if unknown.
        fused_parameters: Number of parameters of the fused form; None if unknown.
        against: Protocol of the stock runs; None for stock itself.
        pairs: Number of runs that have a stock run of the same seed.
        difference: Mean difference of top-1 to stock over these pairs, in points; None without pairs.
        low: Lower end of the difference's 95 % confidence interval, by Student's t; None with fewer than two pairs.
        high: Upper end of the interval.
        arguments: Arguments of the architecture that are not defaults.
        options: Options of the layers and of their training that are not the method's defaults.
    """

    model: str
    size: int
    method: str
    protocol: str
    epochs: int
    n: int
    mean: float
    std: float | None
    step_ratio: float | None
    train_parameters: int | None
    fused_parameters: int | None
    against: str | None = None
    pairs: int = 0
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    arguments: str = ''
    options: str = ''

    @property
    def label(self) -> str:
        """The method with its options, which is unique within a protocol and a setup."""
        return _label(self.method, self.options)

    @property
    def setup(self) -> tuple[str, str, int]:
        """The model, its arguments and the size of the images; runs are compared within a setup."""
        return self.model, self.arguments, self.size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, place: str = 'summary') -> 'Summary':
        """Create an entry from the result of `to_dict`.

        Args:
            values: The fields by name.
            place: Origin of the values, for error messages.

        Returns:
            The entry.

        Raises:
            ReparamError: `values` is not a dict, a field is missing, unknown or of the wrong type, or the method or
                protocol is unknown.
        """
        if not isinstance(values, Mapping):
            raise ReparamError(f'{place}: expected a dict, got {type(values).__name__}')
        known = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        missing, unknown = sorted(needed - values.keys()), sorted(values.keys() - known)
        if missing or unknown:
            raise ReparamError(f'{place}: expected the fields of a Summary; missing: {missing}, unknown: {unknown}')
        hints = get_type_hints(cls)
        for name, value in values.items():
            kinds = get_args(hints[name]) or (hints[name],)
            kinds = (*kinds, int) if float in kinds else kinds
            if not isinstance(value, kinds) or isinstance(value, bool):
                words = ' or '.join('None' if kind is type(None) else kind.__name__ for kind in kinds)
                raise ReparamError(f'{place}.{name}: expected {words}, got {value!r}')
        for name, names in (('method', run_methods()), ('protocol', _AGAINST), ('against', (*_AGAINST, None))):
            if values.get(name) not in names:
                raise ReparamError(
                    f'{place}.{name}: expected one of {", ".join(map(str, names))}, got {values[name]!r}'
                )
        if not re.fullmatch(r'[A-Za-z0-9_.-]+', values['model']):
            raise ReparamError(f'{place}.model: expected the name of an architecture, got {values["model"]!r}')
        for name in ('arguments', 'options'):
            if not re.fullmatch(r'[ -_a-{}~]*', values.get(name, '')):  # valid in a code span of a Markdown table
                raise ReparamError(f'{place}.{name}: expected name=value in ASCII, got {values[name]!r}')
        return cls(**values)


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """Read a results file.

    Args:
        path: csv file with the columns of `COLUMNS` and one row for each run.

    Returns:
        The rows, with values of the types in `COLUMNS`; None for an empty cell.

    Raises:
        ReparamError: The file cannot be read or is empty, lacks columns or values, names an unknown method or protocol,
            contains a run twice, or the runs of one model used different data.
    """
    with open_csv(path) as file:
        reader = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise ReparamError(
                f'{path}: expected one row for each run, but the file lacks the columns {", ".join(missing)}'
            )
        rows = [_parsed(row, f'{path}, line {reader.line_num}') for row in reader]
    if not rows:
        raise ReparamError(f'{path}: expected one row for each run, found none')
    data: dict[str, set[str]] = {}
    seen = set()
    for row in rows:
        data.setdefault(row['model'], set()).add(row['data_sha256'])
        run = (*_group(row), row['seed'])
        if run in seen:
            raise ReparamError(f'{path}: expected each run once, found twice: {_words(row)}, seed {row["seed"]}')
        seen.add(run)
    for model, hashes in data.items():
        if len(hashes) > 1:
            raise ReparamError(
                f'{path}: {model}: expected runs on the same data, found data_sha256 {", ".join(sorted(hashes))}'
            )
    return rows


def summarize(rows: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Summarise runs in one entry for each method, and compare them with stock run by run.

    A pair has the same model, arguments, size, epochs and seed. Runs from scratch are compared with stock from scratch,
    and fine-tuned runs with fine-tuned stock. Refocused runs are compared with fine-tuned stock, and in a second entry
    with stock from scratch.

    Args:
        rows: As `read_results` returns them.

    Returns:
        The entries, sorted by model, arguments, size and epochs, then in the order of the protocols and of the table of
        variants. Each set of options of a method has its own entry.

    Raises:
        ReparamError: Runs of one entry have different numbers of parameters.
    """
    groups: dict[tuple, dict[int, Mapping[str, Any]]] = {}
    methods = list(run_methods())
    for row in rows:
        groups.setdefault(_group(row), {})[row['seed']] = row

    def place(group: tuple) -> tuple:
        *setup, epochs, protocol, method, options = group
        return *setup, epochs, list(_AGAINST).index(protocol), methods.index(method), options

    summaries = []
    for group in sorted(groups, key=place):
        model, arguments, size, epochs, protocol, method, options = group
        runs = groups[group]
        top1 = [row['top1'] for row in runs.values()]
        ratios = [row['step_ratio'] for row in runs.values() if row['step_ratio'] is not None]
        common: dict[str, Any] = dict(
            **dict(model=model, arguments=arguments, size=size, method=method, protocol=protocol, epochs=epochs),
            options=options,
            n=len(runs),
            mean=statistics.fmean(top1),
            std=statistics.stdev(top1) if len(top1) > 1 else None,
            step_ratio=statistics.fmean(ratios) if ratios else None,
            **{name: _one_value(runs.values(), name) for name in ('train_parameters', 'fused_parameters')},
        )
        if method == 'stock':
            summaries.append(Summary(**common))
            continue
        for against in _AGAINST[protocol]:
            stock = groups.get((model, arguments, size, epochs, against, 'stock', ''), {})
            differences = [row['top1'] - stock[seed]['top1'] for seed, row in runs.items() if seed in stock]
            mean, low, high = _interval(differences)
            compared: dict[str, Any] = dict(difference=mean, low=low, high=high, pairs=len(differences))
            summaries.append(Summary(**common, against=against, **compared))
    return summaries


def setup_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    """The setup of a run, as `Summary.setup`.

    Args:
        row: A row of `read_results`.

    Returns:
        The model, ``model_kwargs`` of its options in the form ``name=value …``, and the size of the images.
    """
    arguments = json.loads(row['options'] or '{}').get('model_kwargs') or {}
    return row['model'], _assignments(arguments), row['size']


def options_of(row: Mapping[str, Any]) -> str:
    """The options of a run's method, as `Summary.options`.

    Args:
        row: A row of `read_results`.

    Returns:
        ``conv_options`` of its options, and ``map_lr`` if it is not 0, in the form ``name=value …``.
    """
    options = json.loads(row['options'] or '{}')
    map_lr = options.get('map_lr')
    return _assignments({**(options.get('conv_options') or {}), **(dict(map_lr=map_lr) if map_lr else {})})


def _assignments(values: Mapping[str, Any]) -> str:
    return ' '.join(f'{name}={str(value).replace(" ", "")}' for name, value in values.items())


def of_variant(summaries: Iterable[Summary], variant: str) -> list[Summary]:
    """Select the entries of one variant, and those of the stock runs that they are compared with.

    Args:
        summaries: As `summarize` returns them.
        variant: A name of `timm_reparam.variants.VARIANTS`.

    Returns:
        These entries in their order; empty if there are none of the variant.
    """
    summaries, methods = list(summaries), run_methods()
    chosen = [summary for summary in summaries if methods[summary.method] == variant]
    compared = {(summary.setup, summary.epochs, summary.against) for summary in chosen}
    return [
        summary
        for summary in summaries
        if summary in chosen
        or (summary.method == 'stock' and (summary.setup, summary.epochs, summary.protocol) in compared)
    ]


def format_summary(summaries: Sequence[Summary]) -> str:
    """Format summaries as a Markdown table.

    Args:
        summaries: As `summarize` returns them.

    Returns:
        The table, one line for each summary. It has a column for the model if there are several setups.
    """
    setups = setup_words(summaries)
    header = ['method', 'epochs', 'runs', 'top-1 (%)', 'difference to stock (95 % interval)', 'training step']
    header.append('parameters, train-time / fused')
    rows = [['model', *header] if len(setups) > 1 else header]
    for summary in summaries:
        row = [
            f'`{summary.label}`' + ('' if summary.protocol == 'scratch' else f', {summary.protocol}'),
            str(summary.epochs),
            str(summary.n),
            f'{summary.mean:.2f}' + ('' if summary.std is None else f' ± {summary.std:.2f}'),
            _difference_words(summary),
            '' if summary.step_ratio is None else f'{summary.step_ratio:.2f}',
            ' / '.join(
                '?' if number is None else format_count(number)
                for number in (summary.train_parameters, summary.fused_parameters)
            ),
        ]
        rows.append([setups[summary.setup], *row] if len(setups) > 1 else row)
    texts = rows[0].index('epochs')
    rows.insert(1, ['---'] * texts + ['---:'] * (len(rows[0]) - texts))
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)


def setup_words(summaries: Iterable[Summary]) -> dict[tuple[str, str, int], str]:
    """Short names of the setups of summaries.

    Args:
        summaries: As `summarize` returns them.

    Returns:
        For each `Summary.setup` the model and the size in Markdown, with the arguments in which it differs from other
        setups of the model.
    """
    setups = list(dict.fromkeys(summary.setup for summary in summaries))
    words = {}
    for model, arguments, size in setups:
        others = [other.split() for name, other, _ in setups if name == model]
        own = [word for word in arguments.split() if not all(word in other for other in others)]
        words[model, arguments, size] = f'`{" ".join([model, *own])}`, {size} px'
    return words


def student_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: Probability of a value below the quantile, from 0.5 up to, not including, 1.
        degrees: Degrees of freedom, a positive integer.

    Returns:
        The quantile.

    Raises:
        ReparamError: The probability or the degrees are out of range.
    """
    if not 0.5 <= probability < 1:
        raise ReparamError(f'probability: expected at least 0.5 and less than 1, got {probability}')
    if degrees < 1:
        raise ReparamError(f'degrees: expected at least 1, got {degrees}')
    # With t = sqrt(degrees) tan(angle), P(|T| <= t) is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4) that
    # increases with the angle. Bisection stops when no floating-point number lies between the ends.
    low, high = 0.0, math.pi / 2
    while low < (angle := (low + high) / 2) < high:
        if _within(angle, degrees) < 2 * probability - 1:
            low = angle
        else:
            high = angle
    return math.sqrt(degrees) * math.tan(low)


def _within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(angle)) of Student's t."""
    odd = degrees % 2
    cosine = math.cos(angle)
    term = total = 0.0 if degrees == 1 else math.sin(angle) * (cosine if odd else 1)
    for power in range(2 + odd, degrees, 2):
        term *= (power - 1) / power * cosine**2
        total += term
    return (angle + total) * 2 / math.pi if odd else total


def _interval(differences: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """Mean of differences and its confidence interval; None for what their number does not allow."""
    if not differences:
        return None, None, None
    mean = statistics.fmean(differences)
    if len(differences) == 1:
        return mean, None, None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_quantile((1 + _CONFIDENCE) / 2, len(differences) - 1) * error
    return mean, mean - half, mean + half


def _parsed(row: Mapping[str, str | None], place: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for column, kind in COLUMNS.items():
        text = row[column]
        if not text:
            if column in _REQUIRED:
                raise ReparamError(f'{place}: {column}: expected a value, found none')
            values[column] = None
            continue
        try:
            values[column] = kind(text)
        except ValueError as error:
            raise ReparamError(f'{place}: {column}: expected {kind.__name__}, got {text!r}') from error
        if column in _REQUIRED and kind is float and not math.isfinite(values[column]):
            raise ReparamError(f'{place}: {column}: expected a finite number, got {text!r}')
    try:
        setup_of(values), options_of(values)
    except (AttributeError, TypeError, ValueError) as error:
        raise ReparamError(f'{place}: options: expected a json object, got {values["options"]!r}') from error
    for column, known in (('method', run_methods()), ('protocol', _AGAINST)):
        if values[column] not in known:
            raise ReparamError(f'{place}: {column}: expected one of {", ".join(known)}, got {values[column]!r}')
    return values


def _group(row: Mapping[str, Any]) -> tuple:
    return *setup_of(row), row['epochs'], row['protocol'], row['method'], options_of(row)


def _label(method: str, options: str) -> str:
    return f'{method} {options}'.rstrip()


def _words(row: Mapping[str, Any]) -> str:
    label = _label(row['method'], options_of(row))
    return f'{row["model"]}, {label}, {row["protocol"]}, {row["epochs"]} epochs, {row["size"]} px'


def _one_value(rows: Iterable[Mapping[str, Any]], column: str) -> Any:
    """The value that all rows share in a column; empty cells are ignored."""
    values = {row[column]: row for row in rows if row[column] is not None}
    if len(values) > 1:
        words = _words(next(iter(values.values())))
        raise ReparamError(f'{words}: expected runs of the same {column}, got {", ".join(map(str, sorted(values)))}')
    return next(iter(values), None)


def _difference_words(summary: Summary) -> str:
    if summary.against is None:
        return ''
    if summary.difference is None:
        words = 'no pairs'
    elif summary.low is None or summary.high is None:
        words = f'{summary.difference:+.2f} (one pair, no interval)'
    else:
        words = f'{summary.difference:+.2f} [{summary.low:+.2f}, {summary.high:+.2f}]'
        words += '' if summary.pairs == summary.n else f' ({summary.pairs} pairs)'
    return words if summary.protocol == summary.against == 'scratch' else f'{words} to {summary.against}'
