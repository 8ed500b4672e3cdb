"""What a model costs: parameters, multiply-adds, time and memory, train-time form beside fused form beside stock."""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._evaluation import evaluating
from ._measure import Runner, Setting, compiled_for, median_and_spread, synchronizer, time_interleaved
from .errors import ReparamError
from .timm_model import architecture_of, config_of

__all__ = [
    'Profile',
    'compare_profiles',
    'format_comparison',
    'format_count',
    'format_csv',
    'format_json',
    'format_profiles',
    'format_table',
    'profile_model',
]


@dataclass(frozen=True)
class Profile:
    """The cost of one model.

    Args:
        name: Architecture of the model, or its class name if it carries none, or the name it was given.
        parameters: All numbers the model computes with: its parameters, plus kernels that it keeps as buffers (the
            frozen base kernels of RefConv). Running statistics do not count. Shared tensors count once.
        trainable_parameters: The parameters that get a gradient.
        macs: Multiply-adds of one forward pass in eval mode, per image of the batch; FLOPs are twice that.
            Convolutions and matrix products count, the composition of a train-time kernel included (once a pass,
            whatever the batch).
        latency_ms: Median time of one forward pass of the whole batch; None if it was not measured.
        latency_spread_ms: Interquartile range of the same runs.
        runs: Number of timed runs.
        batch_size: Images in the batch.
        input_size: (channels, height, width) of one image.
        device: Where it was measured.
        dtype: Type of the input and of the first floating-point parameter.
        precision: How it was run: the dtype, or 'amp' or 'amp_bfloat16' for weights in float32 under autocast.
        channels_last: Whether weights and input were laid out channels last on request.
        torchcompile: Backend that it was compiled with; None if it was not.
        reference: Name of the model that the ratios are to; None if nothing was run.
        latency_ratio: Median, over the rounds, of the latency divided by the reference's in the same round.
        latency_ratio_spread: Interquartile range of the same ratios.
        step_ms: Median time of one training step of the whole batch (forward, loss, backward, SGD with momentum);
            None if it was not measured.
        step_spread_ms: Interquartile range of the same steps.
        step_ratio: As `latency_ratio`, of the training step.
        step_ratio_spread: Interquartile range of the same ratios.
        activation_bytes: What autograd keeps of one forward pass in training for the backward pass, without
            parameters, buffers and the batch; None if it was not measured.
        peak_bytes: Memory of a training step at its fullest: parameters, buffers, gradients, momentum, the batch,
            activations and intermediate results; None if it was not measured or the device does not tell.
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
        """Return the fields as a dict that json can write."""
        return {**asdict(self), 'input_size': list(self.input_size)}


def profile_model(model: nn.Module, **options: Any) -> Profile:
    """Measure one model on the device and in the dtype it is in.

    Args:
        model: Any model that takes a batch of images. It is left as it was.
        **options: As in `compare_profiles`.

    Returns:
        The measured cost.

    Raises:
        ReparamError: The model knows no input size and none is given, or a setting is out of range.
    """
    return compare_profiles(model, **options)[0]


def compare_profiles(
    *models: nn.Module,
    names: Sequence[str] | None = None,
    references: Sequence[int] | None = None,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
    runs: int = 20,
    warmup: int = 3,
    train: bool = False,
    precision: str | None = None,
    channels_last: bool = False,
    torchcompile: str | None = None,
) -> list[Profile]:
    """Measure several models side by side, for instance the stock model, the train-time form and the fused form.

    The timed runs are interleaved: every round runs each model once, and begins with another one. So a busy moment of
    the machine does not fall on one model alone, and the ratios, taken round by round, hardly feel it.

    Args:
        *models: The models. They are left as they were; what is timed or trained is a copy of each.
        names: What to call them; their architectures by default.
        references: For each model the index of the model that its ratios are to; the first one by default.
        input_size: (channels, height, width) for all of them; each model's own by default.
        batch_size: Images in the batch.
        runs: Timed forward passes of each model, and training steps; 0 measures no time.
        warmup: Forward passes of each model, and training steps, before the first timed one.
        train: Whether to measure a training step, too: its time, its peak memory, its activations. The loss is
            cross-entropy of logits, and the mean square of any other output.
        precision: 'float32', 'bfloat16', 'float16', or with weights in float32 under autocast 'amp' (to float16) and
            'amp_bfloat16'; by default each model's own dtype.
        channels_last: Whether to lay weights and input out channels last.
        torchcompile: Backend of torch.compile to run the models with, 'inductor' for instance.

    Returns:
        One profile a model, in the order given.

    Raises:
        ReparamError: A model knows no input size and none is given, or a setting is out of range.
    """
    for flag, value, least in (('batch_size', batch_size, 1), ('runs', runs, 0), ('warmup', warmup, 0)):
        if value < least:
            raise ReparamError(f'{flag}: expected at least {least}, got {value}')
    setting = Setting(precision, channels_last, torchcompile)
    names = names or [_name(model) for model in models]
    references = references or [0] * len(models)
    batches = [_example_batch(model, input_size, batch_size) for model in models]
    with evaluating(*models), torch.no_grad():
        macs = [_count_macs(model, batch) for model, batch in zip(models, batches)]
    measured: list[dict[str, Any]] = [{} for _ in models]
    if runs or train:
        measured = _run_models(models, batches, setting, references, runs, warmup, train)
    profiles = []
    for model, name, batch, total, reference, values in zip(models, names, batches, macs, references, measured):
        parameters, trainable = count_parameters(model)
        dtype = _dtype_name(setting.place(batch[:0]))
        figures = {'latency_ms': None, 'latency_spread_ms': None, **values}
        profiles.append(
            Profile(
                name=name,
                parameters=parameters,
                trainable_parameters=trainable,
                macs=round(total / batch_size),
                runs=runs,
                batch_size=batch_size,
                input_size=(batch.shape[1], batch.shape[2], batch.shape[3]),
                device=str(batch.device),
                dtype=dtype,
                precision=precision or dtype,
                channels_last=channels_last,
                torchcompile=torchcompile,
                reference=names[reference] if runs or train else None,
                **figures,
            )
        )
    return profiles


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Count what a model computes with.

    Args:
        model: Any model.

    Returns:
        The number of all parameters with the kernels that are kept as buffers, and of the trainable parameters.
    """
    parameters = list(model.parameters())
    # a layer's weight or bias that is a buffer is a frozen kernel, every other buffer is state
    kernels = [
        buffer for name, buffer in model.named_buffers() if name.rpartition('.')[2] in ('weight', 'bias')
    ]  # named_buffers and parameters yield a shared tensor once
    total = sum(tensor.numel() for tensor in parameters + kernels)
    return total, sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows of text in columns for a terminal or a log.

    Args:
        rows: Rows of equal length; the first one is the header. The first column is set flush left, the others right.

    Returns:
        The table, lines separated by newlines, no trailing spaces.
    """
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        return '  '.join(cells).rstrip()

    header, *body = rows
    return '\n'.join([line(header), '  '.join('-' * width for width in widths), *(line(row) for row in body)])


def format_count(number: int) -> str:
    """Write a large count with three or four digits and its unit, for instance ``11.69 M``."""
    for unit, size in (('G', 10**9), ('M', 10**6), ('k', 10**3)):
        if number >= size:
            value = number / size
            return f'{value:.2f} {unit}' if value < 100 else f'{value:.1f} {unit}'
    return str(number)


def format_profiles(profiles: Sequence[Profile]) -> str:
    """Lay out profiles one below the other.

    Args:
        profiles: The measured models.

    Returns:
        A table of one line a model, a second one of the training step if that was measured, and where there are
        ratios a line that says what they are.
    """
    compared = any(profile.reference not in (None, profile.name) for profile in profiles)
    tables = [_cost_rows(profiles, compared)]
    if any(profile.activation_bytes is not None for profile in profiles):
        tables.append(_training_rows(profiles, compared))
    parts = [format_table(rows) for rows in tables]
    return '\n\n'.join(parts + [_conditions(profiles)] if compared else parts)


def format_csv(profiles: Sequence[Profile]) -> str:
    """Write profiles as comma-separated values.

    Args:
        profiles: The measured models.

    Returns:
        A header of the fields' names and one line a model; what was not measured is empty, the input size is written
        ``3x224x224``.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Profile)], lineterminator='\n')
    writer.writeheader()
    for profile in profiles:
        writer.writerow({**profile.to_dict(), 'input_size': 'x'.join(map(str, profile.input_size))})
    return text.getvalue().rstrip('\n')


def format_json(profiles: Sequence[Profile]) -> str:
    """Write profiles as a json list of their fields."""
    return json.dumps([profile.to_dict() for profile in profiles], indent=2)


def format_comparison(
    train_time: Profile,
    fused: Profile,
    *,
    top1: tuple[float, float] | None = None,
    logit_difference: float | None = None,
    layer_difference: float | None = None,
) -> str:
    """Lay out both forms of one model side by side.

    Args:
        train_time: Cost of the train-time form.
        fused: Cost of the fused form.
        top1: Top-1 accuracy of both, in percent.
        logit_difference: Largest absolute difference between the logits of the two.
        layer_difference: Largest difference between the outputs of the worst layer in the two forms, over its largest
            output: `stored` of a :class:`timm_reparam.LayerReport`.

    Returns:
        A table of one line a figure.
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


def _run_models(
    models: Sequence[nn.Module],
    batches: Sequence[torch.Tensor],
    setting: Setting,
    references: Sequence[int],
    runs: int,
    warmup: int,
    train: bool,
) -> list[dict[str, Any]]:
    """What is measured by running copies of the models: fields of their profiles."""
    wait = synchronizer(batch.device for batch in batches)
    devices = {batch.device for batch in batches if batch.device.type == 'cuda'}
    compiled = compiled_for(len(models)) if setting.torchcompile is not None else nullcontext()
    with torch.random.fork_rng(devices=devices), compiled:
        runners = [Runner(model, batch, setting) for model, batch in zip(models, batches)]
        timings = time_interleaved([runner.infer for runner in runners], runs, warmup, synchronize=wait)
        measured = summarize('latency', timings, references)
        if train:
            for runner, values in zip(runners, measured):
                runner.start_training()
                values |= {'activation_bytes': runner.activation_bytes(), 'peak_bytes': runner.peak_bytes()}
            timings = time_interleaved([runner.step for runner in runners], runs, warmup, synchronize=wait)
            for values, figures in zip(measured, summarize('step', timings, references)):
                values |= figures
    return measured


def summarize(
    what: str, timings: Sequence[Sequence[float]], references: Sequence[int]
) -> list[dict[str, float | None]]:
    """Condense interleaved timings.

    Args:
        what: 'latency' or 'step'.
        timings: Seconds of every round, one list a model.
        references: For each model the index of the one that its ratios are to.

    Returns:
        For each model the fields of `Profile` that begin with `what`.
    """
    summaries = []
    for seconds, reference in zip(timings, references):
        time, time_spread = median_and_spread([1e3 * value for value in seconds])
        ratio, ratio_spread = median_and_spread([own / other for own, other in zip(seconds, timings[reference])])
        summaries.append(
            {
                f'{what}_ms': time,
                f'{what}_spread_ms': time_spread,
                f'{what}_ratio': ratio,
                f'{what}_ratio_spread': ratio_spread,
            }
        )
    return summaries


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
    references = {profile.reference for profile in profiles}
    return str(references.pop()) if len(references) == 1 else 'its stock model'


def setting_words(profiles: Sequence[Profile]) -> str:
    profile = profiles[0]
    sizes = {profile.input_size for profile in profiles}
    size = f' ({"x".join(map(str, profile.input_size))})' if len(sizes) == 1 else ''
    words = [f'{profile.runs} runs', f'batch of {profile.batch_size}{size}', profile.device]
    words.append(profile.precision or profile.dtype)
    words += ['channels last'] if profile.channels_last else []
    words += [f'torch.compile ({profile.torchcompile})'] if profile.torchcompile is not None else []
    return ', '.join(words)


def _name(model: nn.Module) -> str:
    return architecture_of(model) or type(model).__name__


def _example_batch(model: nn.Module, input_size: Sequence[int] | None, batch_size: int) -> torch.Tensor:
    if input_size is None:
        input_size = config_of(model).get('input_size')
        if input_size is None:
            raise ReparamError(f'{_name(model)}: it knows no input size; give input_size=(channels, height, width)')
        input_size = (getattr(model, 'in_chans', input_size[0]), *input_size[1:])
    if len(input_size) != 3 or min(input_size) < 1:
        raise ReparamError(f'input_size: expected (channels, height, width), got {tuple(input_size)}')
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # a generator of its own leaves the global random state alone
    return torch.randn(batch_size, *input_size, generator=generator).to(like.device, like.dtype)


def _count_macs(model: nn.Module, batch: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops() // 2


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')
