"""One layer of a train-time model beside its counterpart in the fused one: what `verify_fusion` measures of them."""

import copy
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._compare import differing_settings
from .fold import scale_outputs
from .layers._fusible import CALL_HOOKS, Fusible, first_conv
from .layers._tensor import float64_copy, scale_shift, to_float64
from .variants import is_variant

__all__ = [
    'ALGEBRA_BOUND',
    'LayerCheck',
    'LayerReport',
    'MOST_ROUNDINGS',
    'differences',
    'maximum',
    'round_at_random',
    'sizes',
    'worst_ratio',
]

# What algebra that is right may leave in float64.
ALGEBRA_BOUND = 1e-10
# Samples of each call of a layer that are compared: their many positions see every tap, at a fraction of the forward.
_SAMPLES_OF_A_CALL = 8
_NOISE_SAMPLES = 4
# Of a layer's input, in float64 and with the several maps of a branch form beside it.
_ELEMENTS_AT_ONCE = 2**14
# Kernels rounded at random are tried until one differs as much as what is stored: a few may all be close by chance.
MOST_ROUNDINGS = 32
# float64 sums in another order, as a share of the largest tap: no unit in the last place of a tap that almost cancels.
_EXACT_SLACK = 2.0**-44


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What :func:`verify_fusion` measured of one layer.

    Differences are the largest one over the layer's largest output, on the inputs that reached it and on seeded noise,
    whichever is larger.

    Attributes:
        name: Name of the module; all of its names where it has several, and that of a norm that was folded into it.
        kernel: Largest difference of an entry of the fused layer's kernel, bias or other parameter from the exact one,
            in units in the last place of its dtype; at most 1.
        algebra: Between the train-time layer in its branch form (:meth:`Fusible.branch_form`) and its fusion
            before rounding, and its own evaluation, all in float64; at most 1e-10 when the algebra is right.
        stored: Between the train-time layer in its branch form and the fused layer as it is stored, both computed in
            float64.
        own: Between the train-time layer in the fused dtype and its branch form in float64: its own rounding. Where
            `stored` is more than twice as large, also that of kernels that are rounded up or down at random.
        bound: What `stored` may be at most: twice `own`, and in float64 what `algebra` may be.
        num_inputs: Samples that reached the layer and were compared; with 0 the figures are those of noise alone.
        problems: What stands in the way of a comparison: another type, shape or setting.
    """

    name: str
    kernel: float
    algebra: float
    stored: float
    own: float
    num_inputs: int
    problems: tuple[str, ...] = ()

    @property
    def bound(self) -> float:
        return max(2 * self.own, ALGEBRA_BOUND)

    @property
    def excess(self) -> float:
        """The largest figure over its bound; the layer fails above 1 and at NaN."""
        if self.problems:
            return math.inf
        shares = (self.kernel, self.algebra / ALGEBRA_BOUND, self.stored / self.bound)
        return math.nan if any(math.isnan(share) for share in shares) else max(shares)

    @property
    def passed(self) -> bool:
        """Whether the fused layer is the train-time layer (NaN is not)."""
        return self.excess <= 1

    def to_dict(self) -> dict[str, Any]:
        """The fields, `bound` and `passed`, as plain values."""
        values = dataclasses.asdict(self)
        return dict(values, problems=list(self.problems), bound=self.bound, passed=self.passed)

    def __str__(self) -> str:
        if self.problems:
            return f'{self.name}: {"; ".join(self.problems)}'
        alone = '' if self.num_inputs else ', on noise alone: no input reached it'
        return (
            f'{self.name}: kernel within {self.kernel:.2g} units in the last place (at most 1), algebra '
            f'{self.algebra:.1e} (at most {ALGEBRA_BOUND:.0e}), stored {self.stored:.1e} (at most {self.bound:.1e})'
            f'{alone}'
        )


class LayerCheck:
    """A layer of the train-time model beside its counterpart in the fused one.

    Args:
        names: Names of the two.
        exact: Variant layer, or a plain convolution into which a norm was folded, in float64.
        exact_fused: Its fusion in float64.
        own: The layer in the fused dtype.
        counterpart: What stands in its place.

    Attributes:
        norm_name: Name of the norm that was folded into the counterpart, if any.
        norm: The norm that was folded into the counterpart, if any, in float64.
        own_norm: The same in the fused dtype.
    """

    def __init__(self, names: list[str], exact: Any, exact_fused: Any, own: Any, counterpart: Any) -> None:
        self.names, self.exact, self.exact_fused = names, exact, exact_fused
        self.own, self.counterpart = own, counterpart
        self.norm_name = ''
        self.norm: Any = None
        self.own_norm: Any = None
        self.kernel = 0.0
        self.problems: list[str] = []
        # by where the inputs come from, whose outputs may be of another size
        self.largest = {kind: dict.fromkeys(('output', 'algebra', 'stored', 'own'), 0.0) for kind in ('noise', 'real')}
        self.num_inputs = 0
        self._samples: Counter[int] = Counter()

    def report(self) -> LayerReport:
        figures = {
            name: maximum(0.0, [_ratio(values[name], values['output']) for values in self.largest.values()])
            for name in ('algebra', 'stored', 'own')
        }
        return LayerReport(
            name=(', '.join(self.names) or type(self.exact).__name__) + (self.norm_name and f' with {self.norm_name}'),
            kernel=self.kernel,
            num_inputs=self.num_inputs,
            problems=tuple(self.problems),
            **figures,
        )

    def expected(self) -> Any:
        """The fusion in float64, before rounding."""
        layer, expected = self.exact, self.exact_fused
        if not isinstance(self.exact, Fusible):
            expected = layer
        elif layer.input_dependent and not is_variant(self.counterpart):
            # beside a plain convolution: right if its attention leaves the mean kernel
            expected = layer.plain_conv(layer.weight, layer.bias)
        if self.norm is not None:
            expected = copy.deepcopy(expected)
            scale_outputs(expected, *scale_shift(self.norm, to_float64))
        return expected

    def compare_kernels(self) -> None:
        """Compare type, settings and every entry of the parameters with those of the exact fusion."""
        expected, found = self.expected(), self.counterpart
        if type(found) is not type(expected):
            self.problems.append(f'type: expected {type(expected).__name__}, got {type(found).__name__}')
            return
        self.problems += differing_settings(expected, found)
        exact_tensors, tensors = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (expected, found))
        for name in sorted(exact_tensors.keys() | tensors.keys()):
            shapes = [tuple(t[name].shape) if name in t else None for t in (exact_tensors, tensors)]
            if shapes[0] != shapes[1]:
                self.problems.append(f'{name}: expected shape {shapes[0]}, got {shapes[1]}')
            else:
                self.kernel = maximum(self.kernel, [_units_in_the_last_place(tensors[name], exact_tensors[name])])
                if tensors[name].is_floating_point() and tensors[name].dtype != found.weight.dtype:
                    self.problems.append(f'{name}: expected {found.weight.dtype}, got {tensors[name].dtype}')

    def compare_on_noise(self) -> None:
        """Compare outputs on seeded noise, in which no channel is dead."""
        if self.problems:
            return
        like = next(self.own.parameters())
        x = self._noise().to(like.device, like.dtype)
        self._compare('noise', x, self.own.forward(x), {})

    def settle(self) -> None:
        """Where only the rounding as stored is large, take that of kernels rounded up or down at random into account.

        What the layer's computation in its dtype rounds may be less by chance, where channels are few, or in wider
        accumulators.
        """
        report = self.report()
        if self.problems or report.stored <= report.bound or report.kernel > 1 or report.algebra > ALGEBRA_BOUND:
            return
        expected = self.expected()
        x = to_float64(self._noise()).to(expected.weight.device)
        rounded, reference, generator = copy.deepcopy(expected), expected.forward(x), torch.Generator().manual_seed(1)
        for _ in range(MOST_ROUNDINGS):
            round_at_random(rounded, expected, generator, self.counterpart.weight.dtype)
            difference = differences([rounded.forward(x)], [reference])
            self.largest['noise']['own'] = maximum(self.largest['noise']['own'], difference)
            report = self.report()
            if not report.stored > report.bound:
                break

    def _noise(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        layer = first_conv(self.exact)
        size = (_NOISE_SAMPLES, layer.in_channels, *self._noise_size(layer))
        x = torch.randn(size, generator=generator, device='cpu')
        # samples that differ in their means, for what depends on those
        return x + torch.randn(*size[:2], 1, 1, generator=generator, device='cpu')

    @staticmethod
    def _noise_size(layer: Any) -> list[int]:
        """Height and width with several places for the kernel, and more than any padding."""
        if layer.transposed:  # whose padding crops the output
            return [2 * pad // stride + 4 + axis for axis, (pad, stride) in enumerate(zip(layer.padding, layer.stride))]
        pads = layer._reversed_padding_repeated_twice
        sides = zip(layer.kernel_size, layer.stride, layer.dilation, (max(pads[2:]), max(pads[:2])))
        return [
            max(dilation * (side - 1) + 1 + (2 + axis) * stride, pad + 1)
            for axis, (side, stride, dilation, pad) in enumerate(sides)
        ]

    def hooks(self) -> Iterator[Any]:
        """Watch the layer for one forward pass of the model, and compare what it makes of its inputs."""
        if self.problems:
            return
        calls = [0]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            calls[0] += 1
            self._see(calls[0], args, kwargs, output)

        yield self.own.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def _see(self, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        if self.problems:
            return
        kwargs = dict(kwargs)
        x = args[0] if args else kwargs.pop('input')
        if len(args) > 1:
            kwargs['output_size'] = args[1]
        if x.dim() == 3:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        number = min(len(x), _SAMPLES_OF_A_CALL - self._samples[call])
        if number > 0:
            self._samples[call] += number
            self.num_inputs += number
            self._compare('real', x[:number], output[:number], kwargs)

    def _compare(self, kind: str, x: torch.Tensor, own: torch.Tensor, kwargs: dict[str, Any]) -> None:
        """Compare outputs for inputs (batch, channels, height, width), of which the layer made `own` in its dtype."""
        expected = self.expected()
        function = self.exact.branch_form() if isinstance(self.exact, Fusible) else self.exact.forward
        stored = _exact_without_hooks(self.counterpart).to(expected.weight.device)
        largest = self.largest[kind]
        at_once = max(1, _ELEMENTS_AT_ONCE // max(x[0].numel(), 1))
        for piece, of_piece in zip(x.split(at_once), own.split(at_once)):
            piece = to_float64(piece).to(expected.weight.device)
            reference = function(piece, **kwargs)
            try:  # forward, so that nobody who watches the model sees these calls
                forms = {'algebra': expected.forward(piece, **kwargs), 'stored': stored.forward(piece, **kwargs)}
                # the layer's own evaluation has to be what its method says; on noise is enough, it composes its kernel
                evaluated = self.exact.forward(piece, **kwargs) if kind == 'noise' else reference
            except Exception as error:  # it may be of any class
                self.problems.append(f'cannot run in float64 ({type(error).__name__}: {error})')
                return
            if self.norm is not None:
                reference, evaluated = (_normalise(self.norm, values) for values in (reference, evaluated))
                of_piece = _normalise(self.own_norm, of_piece)
            largest['output'] = maximum(largest['output'], [reference])
            for name, values in (*forms.items(), ('algebra', evaluated), ('own', of_piece)):
                if values.shape != reference.shape:
                    self.problems.append(f'output: expected shape {tuple(reference.shape)}, got {tuple(values.shape)}')
                    return
                largest[name] = maximum(largest[name], differences([values], [reference]))


def _normalise(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """A BatchNorm in evaluation, without what timm's does after it."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _exact_without_hooks(module: nn.Module) -> Any:
    """A float64 copy of a module without hooks."""
    memo: dict[int, Any] = {id(getattr(part, hooks)): {} for part in module.modules() for hooks in CALL_HOOKS}
    return float64_copy(module, memo).eval()


def _units_in_the_last_place(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference from exact values in units in the last place of the dtype of what was found."""
    if not found.is_floating_point():
        return 0.0 if torch.equal(found.to(expected.device), expected) else math.inf
    nearest = expected.to(found.dtype)
    if torch.equal(found.to(expected.device), nearest):  # half a unit at most, whatever the entries
        return 0.5 if bool((nearest.to(torch.float64) != expected).any()) else 0.0
    size = expected.abs()
    slack = _EXACT_SLACK * (size.amax(tuple(range(1, size.dim())), keepdim=True) if size.dim() > 1 else size.max())
    difference = (found.to(expected.device, torch.float64) - expected).abs()
    return float(((difference - slack).clamp(min=0) / _unit(expected, found.dtype)).max())


def _unit(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The unit in the last place that float64 values have in another dtype."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))[1] - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def round_at_random(
    module: nn.Module, exact_module: nn.Module, generator: torch.Generator, dtype: torch.dtype | None = None
) -> None:
    """Set a module's parameters to exact ones, each rounded up or down at random, the nearer value more often."""
    for name, values in exact_module.named_parameters():
        tensor = module.get_parameter(name)
        unit = _unit(values, tensor.dtype if dtype is None else dtype)
        # drawn on the CPU, so that a GPU gives the same figures
        draws = torch.rand(values.shape, generator=generator, device='cpu').to(unit)
        tensor.copy_((values / unit + draws).floor() * unit)


def worst_ratio(differences: Iterable[float], sizes: Iterable[float]) -> float:
    return maximum(0.0, [_ratio(*pair) for pair in zip(differences, sizes, strict=True)])


def _ratio(difference: float, scale: float) -> float:
    if not difference:
        return 0.0
    return difference / scale if scale else math.inf


def differences(values: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs less those of a reference, in its dtype (float64 or complex128) and on its device.

    Infinities and NaN at the same places, as in masked outputs, are equal where the reference has finite values, too.
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
    """Outputs of a reference without the infinities and NaN that `differences` takes as equal."""
    return [torch.where(t.isfinite(), t, torch.zeros_like(t)) if t.isfinite().any() else t for t in reference]


def maximum(value: float, values: Iterable[torch.Tensor | float]) -> float:
    """Largest magnitude so far; NaN once there was one."""
    magnitudes = [value]
    for each in values:
        if not isinstance(each, torch.Tensor):
            magnitudes.append(each)
        elif each.numel():
            magnitudes.append(float(each.abs().max()))
    return math.nan if any(map(math.isnan, magnitudes)) else max(magnitudes)
