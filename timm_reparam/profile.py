"""The cost of models, measured side by side: parameters, multiply-adds, time and memory."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ._evaluation import evaluating
from ._measure import Runner, Setting, compiled_for, median_and_spread, synchronizer, time_interleaved
from ._profile_tables import (
    Profile,
    format_comparison,
    format_count,
    format_csv,
    format_json,
    format_profiles,
    format_table,
)
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


def profile_model(model: nn.Module, **options: Any) -> Profile:
    """Measure one model on its device and in its dtype.

    Args:
        model: Any model that takes a batch of images. It is not changed.
        **options: As in `compare_profiles`.

    Returns:
        The measured cost.

    Raises:
        ReparamError: The input size is neither given nor known to the model, or a setting is out of range.
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

    The timed runs are interleaved: every round runs each model once, starting with another model each time. A busy
    moment of the machine then affects all models, and has little effect on the ratios, which are taken round by round.

    Args:
        *models: The models. They are not changed: copies of them are timed and trained.
        names: Names of the models; their architectures by default.
        references: For each model the index of the reference of its ratios; the first model by default.
        input_size: (channels, height, width) for all of them; each model's own by default.
        batch_size: Images in the batch.
        runs: Timed forward passes of each model, and training steps; 0 measures no time.
        warmup: Forward passes of each model, and training steps, before the first timed one.
        train: Whether to also measure a training step: its time, peak memory and activations. The loss is
            cross-entropy for logits, and the mean square of any other output.
        precision: 'float32', 'bfloat16' or 'float16', or autocast with weights in float32: 'amp' (to float16) or
            'amp_bfloat16'. By default each model runs in its own dtype.
        channels_last: Whether weights and input are in channels_last memory format.
        torchcompile: Backend of torch.compile to run the models with, such as 'inductor'.

    Returns:
        One profile for each model, in the order given.

    Raises:
        ReparamError: The input size is neither given nor known to a model, or a setting is out of range.
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
    """Count the parameters of a model.

    Args:
        model: Any model.

    Returns:
        The number of all parameters, including kernels that are buffers, and the number of trainable parameters.
    """
    parameters = list(model.parameters())
    # A weight or bias that is a buffer is a frozen kernel. All other buffers are state.
    kernels = [
        buffer for name, buffer in model.named_buffers() if name.rpartition('.')[2] in ('weight', 'bias')
    ]  # named_buffers() and parameters() yield a shared tensor once
    total = sum(tensor.numel() for tensor in parameters + kernels)
    return total, sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def _run_models(
    models: Sequence[nn.Module],
    batches: Sequence[torch.Tensor],
    setting: Setting,
    references: Sequence[int],
    runs: int,
    warmup: int,
    train: bool,
) -> list[dict[str, Any]]:
    """Measure copies of the models; return fields of their profiles."""
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
    """Summarise interleaved timings.

    Args:
        what: 'latency' or 'step'.
        timings: Seconds of every round, one list for each model.
        references: For each model the index of the reference of its ratios.

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


def _name(model: nn.Module) -> str:
    return architecture_of(model) or type(model).__name__


def _example_batch(model: nn.Module, input_size: Sequence[int] | None, batch_size: int) -> torch.Tensor:
    if input_size is None:
        input_size = config_of(model).get('input_size')
        if input_size is None:
            raise ReparamError(f'{_name(model)}: input size unknown; give input_size=(channels, height, width)')
        input_size = (getattr(model, 'in_chans', input_size[0]), *input_size[1:])
    if len(input_size) != 3 or min(input_size) < 1:
        raise ReparamError(f'input_size: expected (channels, height, width), got {tuple(input_size)}')
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)  # the global random state stays as it is
    return torch.randn(batch_size, *input_size, generator=generator).to(like.device, like.dtype)


def _count_macs(model: nn.Module, batch: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        model(batch)
    return counter.get_total_flops() // 2


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix('torch.')
