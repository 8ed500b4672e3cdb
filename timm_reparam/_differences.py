"""Differences of outputs, relative to the largest output, and of parameters, in units in the last place."""

import math
from collections.abc import Iterable

import torch
import torch.nn as nn

__all__ = [
    'MOST_ROUNDINGS',
    'differences',
    'maximum',
    'ratio',
    'round_at_random',
    'sizes',
    'units_in_the_last_place',
    'worst_ratio',
]

# Number of random roundings that are tried: the error of a few of them may be small by chance.
MOST_ROUNDINGS = 32
# Allowance for float64 sums in another order, relative to the largest tap. Without it, a tap that almost cancels would
# differ by more than a unit in its last place.
_EXACT_SLACK = 2.0**-44


def units_in_the_last_place(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference between `found` and exact values, in units in the last place of the dtype of `found`."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found.to(expected.device), expected) else math.inf
    nearest = expected.to(found.dtype)
    if torch.equal(found.to(expected.device), nearest):  # rounded correctly: at most half a unit
        return 0.5 if bool((nearest.to(torch.float64) != expected).any()) else 0.0
    size = expected.abs()
    slack = _EXACT_SLACK * (size.amax(tuple(range(1, size.dim())), keepdim=True) if size.dim() > 1 else size.max())
    difference = (found.to(expected.device, torch.float64) - expected).abs()
    return float(((difference - slack).clamp(min=0) / _unit(expected, found.dtype)).max())


def _unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place of float64 values in another dtype."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def round_at_random(
    module: nn.Module, exact_module: nn.Module, generator: torch.Generator, dtype: torch.dtype | None = None
) -> None:
    """Set a module's parameters to exact values, each rounded up or down at random, more often to the nearer one."""
    for name, values in exact_module.named_parameters():
        tensor = module.get_parameter(name)
        unit = _unit(values, tensor.dtype if dtype is None else dtype)
        # Drawn on the CPU, so that a GPU gives the same figures.
        draws = torch.rand(values.shape, generator=generator, device='cpu').to(unit)
        tensor.copy_((values / unit + draws).floor() * unit)


def worst_ratio(differences: Iterable[float], sizes: Iterable[float]) -> float:
    """The largest ratio of a difference to its size; NaN if there is one."""
    return maximum(0.0, [ratio(*pair) for pair in zip(differences, sizes, strict=True)])


def ratio(difference: float, scale: float) -> float:
    """A difference relative to a scale; 0 if there is no difference."""
    if not difference:
        return 0.0
    return difference / scale if scale else math.inf


def differences(values: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Subtract reference outputs from outputs, in the reference's dtype (float64 or complex128) and on its device.

    Infinities and NaN at the same places, as in masked outputs, count as equal if the reference has finite values, too.
    """
    found = []
    for value, expected in zip(values, reference, strict=True):
        value = value.to(expected.device, expected.dtype)
        difference = value - expected
        finite = expected.isfinite()
        if not finite.all() and finite.any():
            same = (value == expected) | (value.isnan() & expected.isnan())
            difference = torch.where(same, torch.zeros_like(difference), difference)
        found.append(difference)
    return found


def sizes(reference: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Reference outputs with zeros in place of the infinities and NaN that `differences` counts as equal."""
    return [torch.where(t.isfinite(), t, torch.zeros_like(t)) if t.isfinite().any() else t for t in reference]


def maximum(value: float, values: Iterable[torch.Tensor | float]) -> float:
    """The largest magnitude of `value` and `values`; NaN if one of them is NaN."""
    magnitudes = [value]
    for each in values:
        if not isinstance(each, torch.Tensor):
            magnitudes.append(each)
        elif each.numel():
            magnitudes.append(float(each.abs().max()))
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)
