"""What a model costs: parameters, multiply-adds and latency, train-time form beside fused form."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .errors import ReparamError

__all__ = [
    'Profile',
    'compare_profiles',
    'format_comparison',
    'format_count',
    'format_profiles',
    'format_table',
    'profile_model',
]


@dataclass(frozen=True)
class Profile:
    """The cost of one model.

    Args:
        name: Architecture of the model, or its class name if it carries none.
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

    @property
    def flops(self) -> int:
        """Floating-point operations of one forward pass, per image."""
        return 2 * self.macs

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict that json can write."""
        return {**asdict(self), 'input_size': list(self.input_size)}


def profile_model(
    model: nn.Module,
    *,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
    runs: int = 20,
    warmup: int = 3,
) -> Profile:
    """Measure one model on the device and in the dtype it is in.

    Args:
        model: Any model that takes a batch of images. Its training mode is restored, its buffers are not touched.
        input_size: (channels, height, width); the model's own by default.
        batch_size: Images in the batch.
        runs: Timed forward passes; 0 measures no latency.
        warmup: Forward passes before the first timed one.

    Returns:
        The measured cost.

    Raises:
        ReparamError: The model knows no input size and none is given, or a number is out of range.
    """
    return compare_profiles(model, input_size=input_size, batch_size=batch_size, runs=runs, warmup=warmup)[0]


def compare_profiles(
    *models: nn.Module,
    input_size: Sequence[int] | None = None,
    batch_size: int = 1,
    runs: int = 20,
    warmup: int = 3,
) -> list[Profile]:
    """Measure several models side by side, for instance the train-time form and the fused form.

    The timed runs are interleaved (one of each model, then the next round), so that a busy moment of the machine does
    not fall on one model alone.

    Args:
        *models: The models. Their training modes are restored, their buffers are not touched.
        input_size: (channels, height, width) for all of them; each model's own by default.
        batch_size: Images in the batch.
        runs: Timed forward passes of each model; 0 measures no latency.
        warmup: Forward passes of each model before the first timed one.

    Returns:
        One profile a model, in the order given.

    Raises:
        ReparamError: A model knows no input size and none is given, or a number is out of range.
    """
    for flag, value, least in (('batch_size', batch_size, 1), ('runs', runs, 0), ('warmup', warmup, 0)):
        if value < least:
            raise ReparamError(f'{flag}: expected at least {least}, got {value}')
    batches = [_example_batch(model, input_size, batch_size) for model in models]
    with _evaluating(models), torch.no_grad():
        macs = [_count_macs(model, batch) for model, batch in zip(models, batches)]
        timings = _time_interleaved(models, batches, runs, warmup)
    profiles = []
    for model, batch, total, seconds in zip(models, batches, macs, timings):
        parameters, trainable = count_parameters(model)
        profiles.append(
            Profile(
                name=_name(model),
                parameters=parameters,
                trainable_parameters=trainable,
                macs=round(total / batch_size),
                latency_ms=1e3 * median(seconds) if seconds else None,
                latency_spread_ms=1e3 * _interquartile_range(seconds) if seconds else None,
                runs=runs,
                batch_size=batch_size,
                input_size=(batch.shape[1], batch.shape[2], batch.shape[3]),
                device=str(batch.device),
                dtype=str(batch.dtype).removeprefix('torch.'),
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
        A table of one line a model.
    """
    rows = [('model', 'input', 'parameters', 'trainable', 'MACs', 'latency')]
    for profile in profiles:
        rows.append(
            (
                profile.name,
                'x'.join(str(side) for side in (profile.batch_size, *profile.input_size)),
                format_count(profile.parameters),
                format_count(profile.trainable_parameters),
                format_count(profile.macs),
                _format_latency(profile),
            )
        )
    return format_table(rows)


def format_comparison(
    train_time: Profile,
    fused: Profile,
    *,
    top1: tuple[float, float] | None = None,
    logit_difference: float | None = None,
) -> str:
    """Lay out both forms of one model side by side.

    Args:
        train_time: Cost of the train-time form.
        fused: Cost of the fused form.
        top1: Top-1 accuracy of both, in percent.
        logit_difference: Largest absolute difference between the logits of the two.

    Returns:
        A table of one line a figure.
    """
    rows = [('', 'train-time', 'fused'), ('architecture', train_time.name, fused.name)]
    if top1 is not None:
        rows.append(('top-1 (%)', f'{top1[0]:.2f}', f'{top1[1]:.2f}'))
    if logit_difference is not None:
        rows.append(('largest logit difference', '', f'{logit_difference:.2e}'))
    for label, field in (
        ('parameters', 'parameters'),
        ('  of them trainable', 'trainable_parameters'),
        ('MACs per image', 'macs'),
    ):
        rows.append((label, format_count(getattr(train_time, field)), format_count(getattr(fused, field))))
    if train_time.latency_ms is not None and fused.latency_ms is not None:
        rows.append(
            (f'latency, batch of {fused.batch_size}', _format_latency(train_time), _format_latency(fused)),
        )
    return format_table(rows)


def _format_latency(profile: Profile) -> str:
    if profile.latency_ms is None or profile.latency_spread_ms is None:
        return 'not measured'
    return f'{profile.latency_ms:.2f} ± {profile.latency_spread_ms / 2:.2f} ms'


def _name(model: nn.Module) -> str:
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    return cfg.get('architecture') or type(model).__name__


def _example_batch(model: nn.Module, input_size: Sequence[int] | None, batch_size: int) -> torch.Tensor:
    if input_size is None:
        cfg = getattr(model, 'pretrained_cfg', None) or {}
        input_size = cfg.get('input_size')
        if input_size is None:
            raise ReparamError(f'{_name(model)}: it knows no input size; give input_size=(channels, height, width)')
        input_size = (getattr(model, 'in_chans', input_size[0]), *input_size[1:])
    if len(input_size) != 3 or min(input_size) < 1:
        raise ReparamError(f'input_size: expected (channels, height, width), got {tuple(input_size)}')
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # a generator of its own leaves the global random state alone
    return torch.randn(batch_size, *input_size, generator=generator).to(like.device, like.dtype)


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _count_macs(model: nn.Module, batch: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops() // 2


def _time_interleaved(
    models: Sequence[nn.Module],
    batches: Sequence[torch.Tensor],
    runs: int,
    warmup: int,
) -> list[list[float]]:
    timings: list[list[float]] = [[] for _ in models]
    for round_ in range(warmup + runs if runs else 0):
        for model, batch, seconds in zip(models, batches, timings):
            synchronize = _synchronizer(batch.device)
            synchronize()
            start = time.perf_counter()
            model(batch)
            synchronize()
            if round_ >= warmup:
                seconds.append(time.perf_counter() - start)
    return timings


def _synchronizer(device: torch.device) -> Callable[[], None]:
    synchronize = getattr(getattr(torch, device.type, None), 'synchronize', None)
    return synchronize or (lambda: None)


def _interquartile_range(seconds: Sequence[float]) -> float:
    if len(seconds) < 2:
        return 0.0
    first, _, third = quantiles(seconds, n=4, method='inclusive')
    return third - first
