"""Random numbers: separate streams for training and validation, and random states for checkpoints."""

import random
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from timm import utils

__all__ = ['TRAINING', 'VALIDATION', 'RandomStream', 'draw', 'gather_random_states', 'set_random_state']

# Purpose of a stream. Together with seed, epoch and rank it seeds the stream.
TRAINING, VALIDATION = 0, 1


def random_state(device: torch.device) -> dict[str, Any]:
    """Random states of Python, NumPy, torch and the device, in types that torch.load(weights_only=True) reads."""
    name, keys, *rest = cast(tuple, np.random.get_state())
    numpy = (str(name), torch.from_numpy(keys.astype(np.int64)), *(type(value)(value) for value in rest))
    accelerator = None
    if device.type != 'cpu':
        accelerator = torch.get_device_module(device).get_rng_state(*_arguments(device))
    return dict(python=random.getstate(), numpy=numpy, torch=torch.get_rng_state(), accelerator=accelerator)


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore random states."""
    version, keys, gauss = state['python']
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['accelerator'] is not None:
        torch.get_device_module(device).set_rng_state(state['accelerator'], *_arguments(device))


def _arguments(device: torch.device) -> tuple:
    return () if device.type == 'mps' else (device,)  # there is only one mps device


def gather_random_states(device: torch.device, distributed: bool = False) -> list[dict[str, Any]]:
    """Random states of all processes, by rank."""
    states: list[Any] = [random_state(device)]
    if distributed:
        states *= dist.get_world_size()
        dist.all_gather_object(states, states[0])
    return states


class RandomStream:
    """A separate stream of random numbers.

    Inside ``with stream:`` all random numbers come from the stream, and the state outside does not change. The batches
    of an epoch then depend on their seeds only, not on the random numbers of dropout in between, and can be drawn again
    after a restart in the middle of the epoch.

    Args:
        device: Device whose random state is part of the stream.
        *seeds: Non-negative numbers that seed the stream.
    """

    def __init__(self, device: torch.device, *seeds: int):
        self.device = device
        outer = random_state(device)
        utils.random_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        self.state = random_state(device)
        set_random_state(outer, device)

    def __enter__(self) -> None:
        self.outer = random_state(self.device)
        set_random_state(self.state, self.device)

    def __exit__(self, *error) -> None:
        self.state = random_state(self.device)
        set_random_state(self.outer, self.device)


def draw(loader: Any, stream: RandomStream, skip: int = 0) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (index, input, target) for the batches of an epoch after the first `skip`, drawn with the stream."""
    with stream:
        iterator = iter(loader)
    index = 0
    while True:
        with stream:
            batch = next(iterator, None)
        if batch is None:
            return
        if index >= skip:
            yield index, *batch
        index += 1
