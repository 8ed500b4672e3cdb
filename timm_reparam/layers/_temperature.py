"""The temperature of an attention over kernels, which falls while the layer trains."""

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ReparamError
from ._base import ReparamLayer
from ._tensor import inside_backward

__all__ = ['TemperatureSchedule', 'check_integer']


def _temperature(position: torch.Tensor, steps: torch.Tensor, start: float) -> torch.Tensor:
    """Temperature at a position of the schedule, falling linearly from `start` to 1 over `steps`, in float32."""
    # not the quotient of the integers, which is of whatever dtype is the default one
    return 1 + (start - 1) * (1 - position.float() / steps).clamp(min=0)


def _take_step(
    position: torch.Tensor, pending: torch.Tensor, steps: torch.Tensor, start: float, counts: bool
) -> torch.Tensor:
    """Temperature of a training-mode forward pass, which moves the schedule if the pass counts.

    Gradient checkpointing runs a pass twice, the second time inside the backward pass. A first pass with gradients
    counts at once. One without (reentrant checkpointing) is pending, and the second one counts. So a pass without
    gradients that no backward pass repeats, as in ``update_bn``, never counts.
    """
    if inside_backward():
        temperature = _temperature(position - 1 + pending, steps, start)
        position.add_(pending)
        pending.zero_()
        return temperature
    temperature = _temperature(position, steps, start)
    if counts:
        position.add_(1)
    pending.fill_(0 if counts else 1)
    return temperature


# One opaque operation for torch.compile: it would otherwise recompute the temperature in the backward pass, from a
# position that has moved on by then, and could not tell a repeated pass, which only shows at run time.
_take_step_compiled = torch.library.custom_op(
    'timm_reparam::take_step', _take_step, mutates_args={'position', 'pending'}
)


@_take_step_compiled.register_fake
def _(position: torch.Tensor, pending: torch.Tensor, steps: torch.Tensor, start: float, counts: bool) -> torch.Tensor:
    return torch.empty((), device=position.device)


class TemperatureSchedule(ReparamLayer):
    """Mixin of a layer whose temperature falls linearly to 1 over its own training-mode forward passes.

    Position and length are buffers, so the schedule is saved, moved and resumed with the model in any training loop. A
    pass that gradient checkpointing repeats counts once, at one temperature (that of the latest one, where a layer runs
    several times before the backward pass). A pass under ``torch.no_grad``, as in ``torch.optim.swa_utils.update_bn``,
    does not count. Without a schedule (``temperature=None``) the temperature is 1.
    """

    schedule_options = ('temperature', 'temperature_steps')
    if TYPE_CHECKING:  # not for TorchScript, which then would not know whether they are None
        temperature: float | None
        temperature_position: torch.Tensor | None
        temperature_steps: torch.Tensor  # None with temperature_position
        temperature_pending: torch.Tensor  # likewise

    @staticmethod
    def check_schedule(owner: str, temperature: float | None, temperature_steps: int) -> None:
        """Raise ReparamError unless these are the options of a schedule."""
        check_integer(owner, 'temperature_steps', temperature_steps, 1)
        is_number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
        if temperature is not None and not (is_number and 1 <= temperature < math.inf):
            raise ReparamError(f'{owner}: temperature must be a number of at least 1, or None, got {temperature!r}')

    def _add_schedule(self, temperature: float | None, temperature_steps: int, device=None) -> None:
        self.temperature = None if temperature is None else float(temperature)
        # Integers: a float counter stops at 256 in bfloat16, and weight averaging would average it.
        schedule = dict(dtype=torch.int64, device=device)
        scheduled = temperature is not None
        self.register_buffer('temperature_position', torch.zeros((), **schedule) if scheduled else None)
        self.register_buffer('temperature_steps', torch.zeros((), **schedule) if scheduled else None)
        # whether a pass without gradients waits to be repeated, see _take_step
        self.register_buffer(
            'temperature_pending', torch.zeros((), **schedule) if scheduled else None, persistent=False
        )
        self._length = temperature_steps

    def options(self) -> dict[str, Any]:
        return dict(super().options(), temperature_steps=self._length)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.temperature_steps is not None and not self.temperature_steps.is_meta:
            self._length = int(self.temperature_steps)

    def reset_temperature(self, steps: int | None = None) -> None:
        """Start the temperature's schedule again.

        Args:
            steps: New length of the schedule in training-mode forward passes; None keeps it.

        Raises:
            ReparamError: steps is not a positive integer, or the layer has no schedule.
        """
        if self.temperature_position is None:
            raise ReparamError(
                f'{type(self).__name__}: this layer has no temperature schedule (temperature=None) to start again'
            )
        if steps is not None:
            check_integer(type(self).__name__, 'steps', steps, 1)
            self.temperature_steps.fill_(steps)
            self._length = steps
        self.temperature_position.zero_()
        self.temperature_pending.zero_()

    def current_temperature(self) -> torch.Tensor:
        """The temperature of evaluation and of the next training-mode forward pass, as a 0-dim tensor."""
        return self._temperature_at(self.temperature_position)

    def _temperature_at(self, position: torch.Tensor | None) -> torch.Tensor:
        if position is None or self.temperature is None or self.temperature_steps is None:
            return torch.ones((), device=self.weight.device)
        return _temperature(position, self.temperature_steps, self.temperature)

    def _next_temperature(self) -> torch.Tensor | None:
        """Temperature of this forward pass, which counts if it is one of training; None without a schedule."""
        position = self.temperature_position
        if position is None or self.temperature is None:
            return None
        if not self.training:
            return self._temperature_at(position)
        counts = torch.is_grad_enabled()
        if not torch.jit.is_scripting():
            take_step = _take_step_compiled if torch.compiler.is_compiling() else _take_step
            return take_step(position, self.temperature_pending, self.temperature_steps, self.temperature, counts)
        temperature = self._temperature_at(position)
        if counts:
            position.add_(1)
        return temperature


def check_integer(owner: str, name: str, value: Any, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ReparamError(f'{owner}: {name} must be an integer of at least {at_least}, got {value!r}')
