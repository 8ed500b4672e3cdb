"""The cost of a model, and its tables: text for a terminal, csv and json."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = [
    'Profile',
    'format_comparison',
    'format_count',
    'format_csv',
    'format_json',
    'format_profiles',
    'format_table',
    'reference_words',
    'setting_words',
]


@dataclass(frozen=True)
class Profile:
    """The cost of one model.

    Args:
        name: Given name, or the architecture of the model, or its class name.
        parameters: Number of parameters, including kernels that are buffers (the frozen kernels of RefConv). Running
            statistics are not counted. Shared tensors are counted once.
        trainable_parameters: Number of parameters that require a gradient.
        macs: Multiply-adds of one forward pass in eval mode, per image of the batch; FLOPs are twice that.
            Convolutions and matrix products are counted, including those that compose a train-time kernel (once per
            pass, whatever the batch size).
        latency_ms: Median time of one forward pass of the whole batch; None if it was not measured.
        latency_spread_ms: Interquartile range of the same runs.
        runs: Number of timed runs.
        batch_size: Images in the batch.
        input_size: (channels, height, width) of one image.
        device: Device of the measurement.
        dtype: Dtype of the input and of the first floating-point parameter.
        precision: The dtype, or 'amp' or 'amp_bfloat16' for autocast with weights in float32.
        channels_last: Whether channels_last memory format was requested.
        torchcompile: Backend of torch.compile; None if the model was not compiled.
        reference: Name of the reference of the ratios; None if nothing was run.
        latency_ratio: Median over the rounds of the latency divided by that of the reference in the same round.
        latency_ratio_spread: Interquartile range of the same ratios.
        step_ms: Median time of one training step of the whole batch (forward, loss, backward, SGD with momentum);
            None if it was not measured.
        step_spread_ms: Interquartile range of the same steps.
        step_ratio: Ratio of the training step, as `latency_ratio`.
        step_ratio_spread: Interquartile range of the same ratios.
        activation_bytes: Memory that autograd saves for the backward pass in one forward pass in training, without
            parameters, buffers and the batch; None if it was not measured.
        peak_bytes: Peak memory of a training step: parameters, buffers, gradients, momentum, the batch, activations
            and intermediate results; None if it was not measured or the device does not report it.
    """

    name: str
    parameters: int
    trainable_parameters: int
    macs: int
    latency_ms: float | None
    latency_spread_ms: float | None
    runs: int
    batch_size: int
    input_size: tuple[int, int, int]
    device: str
    dtype: str
    precision: str | None = None
    channels_last: bool = False
    torchcompile: str | None = None
    reference: str | None = None
    latency_ratio: float | None = None
    latency_ratio_spread: float | None = None
    step_ms: float | None = None
    step_spread_ms: float | None = None
    step_ratio: float | None = None
    step_ratio_spread: float | None = None
    activation_bytes: int | None = None
    peak_bytes: int | None = None

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass, per image."""
        return 2 * self.macs

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict of JSON values."""
        return {**asdict(self), 'input_size': list(self.input_size)}


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a plain-text table.

    Args:
        rows: Rows of equal length; the first one is the header. The first column is aligned left, the others right.

    Returns:
        The table, without trailing spaces.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return '  '.join(cells).rstrip()

    header, *body = rows
    return '\n'.join([line(header), '  '.join('-' * width for width in widths), *(line(row) for row in body)])


def format_count(number: int) -> str:
    """Format a large count with three or four digits and a unit, such as ``11.69 M``."""
    for unit, size in (('G', 10**9), ('M', 10**6), ('k', 10**3)):
        if number >= size:
            value = number / size
            return f'{value:.2f} {unit}' if value < 100 else f'{value:.1f} {unit}'
    return str(number)


def format_profiles(profiles: Sequence[Profile]) -> str:
    """Format profiles as a plain-text table.

    Args:
        profiles: The measured models.

    Returns:
        A table with one line for each model, a second table for the training step if it was measured, and a line that
        explains the ratios if there are any.
    """
    compared = any(profile.reference not in (None, profile.name) for profile in profiles)
    tables = [_cost_rows(profiles, compared)]
    if any(profile.activation_bytes is not None for profile in profiles):
        tables.append(_training_rows(profiles, compared))
    parts = [format_table(rows) for rows in tables]
    return '\n\n'.join(parts + [_conditions(profiles)] if compared else parts)


def format_csv(profiles: Sequence[Profile]) -> str:
    """Format profiles as comma-separated values.

    Args:
        profiles: The measured models.

    Returns:
        A header of field names and one line for each model. Values that were not measured are empty; the input size is
        written as ``3x224x224``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Profile)], lineterminator='\n')
    writer.writeheader()
    for profile in profiles:
        writer.writerow({**profile.to_dict(), 'input_size': 'x'.join(map(str, profile.input_size))})
    return text.getvalue().rstrip('\n')


def format_json(profiles: Sequence[Profile]) -> str:
    """Format profiles as a JSON list of their fields."""
    return json.dumps([profile.to_dict() for profile in profiles], indent=2)


def format_comparison(
    train_time: Profile,
    fused: Profile,
    *,
    top1: tuple[float, float] | None = None,
    logit_difference: float | None = None,
    layer_difference: float | None = None,
) -> str:
    """Format both forms of one model side by side.

    Args:
        train_time: Cost of the train-time form.
        fused: Cost of the fused form.
        top1: Top-1 accuracy of both forms, in percent.
        logit_difference: Largest absolute difference between their logits.
        layer_difference: Largest difference between the outputs of the worst layer in the two forms, relative to its
            largest output: `stored` of a :class:`timm_reparam.LayerReport`.

    Returns:
        A table with one line for each figure.
    """
    rows = [('', 'train-time', 'fused'), ('architecture', train_time.name, fused.name)]
    if top1 is not None:
        rows.append(('top-1 (%)', f'{top1[0]:.2f}', f'{top1[1]:.2f}'))
    if logit_difference is not None:
        rows.append(('largest logit difference', '', f'{logit_difference:.2e}'))
    if layer_difference is not None:
        rows.append(('worst layer, relative difference', '', f'{layer_difference:.2e}'))
    for label, field in (
        ('parameters', 'parameters'),
        ('  of them trainable', 'trainable_parameters'),
        ('MACs per image', 'macs'),
    ):
        rows.append((label, format_count(getattr(train_time, field)), format_count(getattr(fused, field))))
    if train_time.latency_ms is not None and fused.latency_ms is not None:
        latencies = [_format_time(form.latency_ms, form.latency_spread_ms) for form in (train_time, fused)]
        rows.append((f'latency, batch of {fused.batch_size}', latencies[0], latencies[1]))
    return format_table(rows)


def _cost_rows(profiles: Sequence[Profile], compared: bool) -> list[list[str]]:
    rows = [['model', 'input', 'parameters', 'trainable', 'MACs', 'latency', *(['ratio'] if compared else [])]]
    for profile in profiles:
        row = [
            profile.name,
            'x'.join(str(side) for side in (profile.batch_size, *profile.input_size)),
            format_count(profile.parameters),
            format_count(profile.trainable_parameters),
            format_count(profile.macs),
            _format_time(profile.latency_ms, profile.latency_spread_ms),
        ]
        row += [_format_ratio(profile.latency_ratio, profile.latency_ratio_spread)] if compared else []
        rows.append(row)
    return rows


def _training_rows(profiles: Sequence[Profile], compared: bool) -> list[list[str]]:
    ratio = ['ratio'] if compared else []
    rows = [['model', 'activations', *ratio, 'peak memory', *ratio, 'training step', *ratio]]
    by_name = {profile.name: profile for profile in profiles}
    for profile in profiles:
        reference = by_name.get(profile.reference or '')
        row = [profile.name]
        for field in ('activation_bytes', 'peak_bytes'):
            row.append(_format_bytes(getattr(profile, field)))
            row += [_format_ratio(_quotient(profile, reference, field))] if compared else []
        row.append(_format_time(profile.step_ms, profile.step_spread_ms))
        row += [_format_ratio(profile.step_ratio, profile.step_ratio_spread)] if compared else []
        rows.append(row)
    return rows


def _format_time(milliseconds: float | None, spread: float | None) -> str:
    if milliseconds is None or spread is None:
        return 'not measured'
    return f'{milliseconds:.2f} ± {spread / 2:.2f} ms'


def _format_ratio(ratio: float | None, spread: float | None = None) -> str:
    if ratio is None:
        return ''
    return f'{ratio:.2f}' if spread is None else f'{ratio:.2f} ± {spread / 2:.2f}'


def _format_bytes(number: int | None) -> str:
    return '' if number is None else f'{format_count(number)}B'


def _quotient(profile: Profile, reference: Profile | None, field: str) -> float | None:
    own, other = getattr(profile, field), getattr(reference, field, None)
    return own / other if own is not None and other else None


def _conditions(profiles: Sequence[Profile]) -> str:
    ratio = f'ratio: to {reference_words(profiles)} in the same round, median of all rounds'
    return f'{setting_words(profiles)}\n{ratio}; ±: half the interquartile range'


def reference_words(profiles: Sequence[Profile]) -> str:
    """The reference of the ratios, for a label."""
    references = {profile.reference for profile in profiles}
    return str(references.pop()) if len(references) == 1 else 'its stock model'


def setting_words(profiles: Sequence[Profile]) -> str:
    """The settings of a measurement, for a label."""
    profile = profiles[0]
    sizes = {profile.input_size for profile in profiles}
    size = f' ({"x".join(map(str, profile.input_size))})' if len(sizes) == 1 else ''
    words = [f'{profile.runs} runs', f'batch of {profile.batch_size}{size}', profile.device]
    words.append(profile.precision or profile.dtype)
    words += ['channels last'] if profile.channels_last else []
    words += [f'torch.compile ({profile.torchcompile})'] if profile.torchcompile is not None else []
    return ', '.join(words)
