"""Time of interleaved runs of models, and memory of a training step."""

import copy
import json
import os
import platform
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_flatten

from .errors import ReparamError

# Dtype of weights and input, and dtype of autocast, by the names of timm's benchmark.py.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    'float32': (torch.float32, None),
    'bfloat16': (torch.bfloat16, None),
    'float16': (torch.float16, None),
    'amp': (torch.float32, torch.float16),
    'amp_bfloat16': (torch.float32, torch.bfloat16),
}


def device_name(device: torch.device) -> str:
    """The model of a GPU or processor, if the system reports it."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8', errors='replace').splitlines() if info.is_file() else []
    models = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return models[0] if models else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Setting:
    """Precision, memory format and compilation of the runs.

    Args:
        precision: One of `PRECISIONS`; None keeps the dtype of each model.
        channels_last: Whether to convert weights and input to channels_last.
        torchcompile: Backend of torch.compile; None runs the models uncompiled.
    """

    precision: str | None = None
    channels_last: bool = False
    torchcompile: str | None = None

    def __post_init__(self) -> None:
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ReparamError(f'precision: expected one of {", ".join(PRECISIONS)}, got {self.precision!r}')

    def place(self, value: Any) -> Any:
        """Convert a module or a batch of images to the dtype and memory format."""
        if self.precision is not None:
            value = value.to(PRECISIONS[self.precision][0])
        return value.to(memory_format=torch.channels_last) if self.channels_last else value

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """The autocast context of a forward pass."""
        dtype = PRECISIONS[self.precision][1] if self.precision is not None else None
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class Runner:
    """Runs a copy of a model, so that the model itself does not change.

    Args:
        model: Any model that takes a batch of images.
        batch: The batch, on the model's device.
        setting: Precision, memory format and compilation.
    """

    def __init__(self, model: nn.Module, batch: torch.Tensor, setting: Setting):
        self.model = setting.place(copy.deepcopy(model)).eval()
        self.batch = setting.place(batch)
        self.call: Callable[[torch.Tensor], Any] = self.model
        if setting.torchcompile is not None:
            self.call = torch.compile(self.model, backend=setting.torchcompile)
        self._setting = setting
        self._optimizer: torch.optim.Optimizer | None = None

    @torch.no_grad()
    def infer(self) -> None:
        """Run one forward pass without gradients."""
        with self._setting.autocast(self.batch.device):
            self.call(self.batch)

    def start_training(self) -> None:
        """Switch to training mode and take the first step, which creates the optimizer's state."""
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trainable:
            raise ReparamError(
                f'{type(self.model).__name__}: expected a trainable parameter, got none; measure it without train'
            )
        self.model.train()
        self._optimizer = torch.optim.SGD(trainable, lr=1e-6, momentum=0.9)
        self.step()

    def step(self) -> None:
        """Train on the batch once: forward, loss, backward, optimizer."""
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        with self._setting.autocast(self.batch.device):
            loss = _loss(self.call(self.batch))
        loss.backward()
        self._optimizer.step()

    def activation_bytes(self) -> int | None:
        """Measure the tensors that autograd saves for the backward pass in one forward pass in training mode.

        Returns:
            Bytes of the distinct storages, without those of parameters, buffers and the batch; None on the meta device,
            which stores nothing.
        """
        if self.batch.is_meta:
            return None
        kept: weakref.WeakSet[_Kept] = weakref.WeakSet()  # tensors of freed parts of the graph drop out

        def keep(tensor: torch.Tensor) -> _Kept:
            held = _Kept(tensor)
            kept.add(held)
            return held

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
            with self._setting.autocast(self.batch.device):
                output = self.call(self.batch)
            storages = _storages(held.tensor for held in kept)
            del output  # not earlier: it keeps the graph alive
        own = _storages([*self.model.parameters(), *self.model.buffers(), self.batch])
        return sum(size for place, size in storages.items() if place not in own)

    def peak_bytes(self) -> int | None:
        """Measure the peak memory of one training step.

        Returns:
            Bytes of the model, the optimizer's state and the batch, plus the peak of the allocations of the step; None
            if the device does not report it.
        """
        assert self._optimizer is not None
        self._optimizer.zero_grad()  # a step begins by freeing the old gradients
        rise = _allocation_peak(self.step, self.batch.device)
        if rise is None:
            return None
        state = tree_flatten(self._optimizer.state_dict()['state'])[0]
        tensors = [*self.model.parameters(), *self.model.buffers(), *state, self.batch]
        standing = _storages(tensor for tensor in tensors if isinstance(tensor, torch.Tensor))
        return sum(standing.values()) + rise


class _Kept:
    """Wrapper of a saved tensor, which lives as long as autograd keeps the tensor."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def time_interleaved(
    calls: Sequence[Callable[[], object]],
    runs: int,
    warmup: int,
    *,
    synchronize: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Time several functions side by side.

    Every round runs each function once, starting with another function each time, so that a busy moment of the machine
    affects all of them.

    Args:
        calls: The functions.
        runs: Number of timed rounds.
        warmup: Number of rounds before the timed ones.
        synchronize: Waits until the devices have finished.
        clock: Returns the time in seconds.

    Returns:
        The seconds of each timed round, in order, one list for each function.
    """
    timings: list[list[float]] = [[] for _ in calls]
    for round_ in range(warmup + runs if runs else 0):
        for turn in range(len(calls)):
            index = (round_ + turn) % len(calls)
            synchronize()
            start = clock()
            calls[index]()
            synchronize()
            if round_ >= warmup:
                timings[index].append(clock() - start)
    return timings


def median_and_spread(values: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    """Return the median and the interquartile range, or None for both if there are no values."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], 0.0
    first, _, third = quantiles(values, n=4, method='inclusive')
    return median(values), third - first


def synchronizer(devices: Iterable[torch.device]) -> Callable[[], None]:
    """Return a function that waits for the devices that run asynchronously."""
    accelerators = {device for device in devices if device.type not in ('cpu', 'meta')}

    def synchronize() -> None:
        for device in accelerators:
            torch.accelerator.synchronize(device)

    return synchronize


@contextmanager
def compiled_for(models: int) -> Iterator[None]:
    """Raise the recompile limit of torch.compile, for several models of one class in several modes.

    Above the limit (8) torch.compile silently runs a model uncompiled.
    """
    import torch._dynamo.config as config  # imported here because it takes a second

    limit = 'recompile_limit' if hasattr(config, 'recompile_limit') else 'cache_size_limit'
    with config.patch({limit: max(getattr(config, limit), 8 * models)}):
        yield


def _loss(output: Any) -> torch.Tensor:
    """Cross-entropy for a batch of logits, the mean square for any other output."""
    if isinstance(output, torch.Tensor) and output.ndim == 2:
        return F.cross_entropy(output, torch.zeros(len(output), dtype=torch.long, device=output.device))
    values = [value for value in tree_flatten(output)[0] if isinstance(value, torch.Tensor) and value.requires_grad]
    return torch.stack([value.float().square().mean() for value in values]).sum()


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Bytes of the distinct storages, by address."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _allocation_peak(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak of the bytes that a function allocates, or None if the device does not report it."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type == 'cpu':
        return max(accumulate(cpu_allocations(call)), default=0)
    return None


def cpu_allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of the tensors that a function allocates on the CPU, in order; freed bytes are negative."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # silences the profiler's log
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())['traceEvents']
    changes = [event for event in events if event.get('name') == '[memory]' and event['args']['Device Type'] == 0]
    return [event['args']['Bytes'] for event in sorted(changes, key=lambda event: event['ts'])]
