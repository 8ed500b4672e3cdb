"""Comparison of one train-time layer with its counterpart in the fused model, for `verify_fusion`."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from ._compare import differing_settings
from ._differences import MOST_ROUNDINGS, differences, maximum, ratio, round_at_random, units_in_the_last_place
from ._reports import ALGEBRA_BOUND, LayerReport
from .fold import scale_outputs
from .layers._fusible import CALL_HOOKS, Fusible, first_conv
from .layers._tensor import float64_copy, scale_shift, to_float64
from .variants import is_variant

__all__ = ['LayerCheck']

# Samples that are compared for each call of a layer. Their many positions reach every tap, and cost a fraction of the
# forward pass of the model.
_SAMPLES_OF_A_CALL = 8
_NOISE_SAMPLES = 4
# Entries of a layer's input that are compared at a time, in float64 and with the outputs of all branches in memory.
_ELEMENTS_AT_ONCE = 2**14


class LayerCheck:
    """Comparison of a layer of the train-time model with its counterpart in the fused model.

    Args:
        names: Names of both.
        exact: Variant layer, or a plain convolution into which a norm was folded, in float64.
        exact_fused: Its fusion in float64.
        own: The layer in the fused dtype.
        counterpart: The module of that name in the fused model.

    Attributes:
        norm_name: Name of the norm that was folded into the counterpart, if any.
        norm: That norm in float64.
        own_norm: That norm in the fused dtype.
    """

    def __init__(self, names: list[str], exact: Any, exact_fused: Any, own: Any, counterpart: Any) -> None:
        self.names, self.exact, self.exact_fused = names, exact, exact_fused
        self.own, self.counterpart = own, counterpart
        self.norm_name = ''
        self.norm: Any = None
        self.own_norm: Any = None
        self.kernel = 0.0
        self.problems: list[str] = []
        # Separate for noise and for real inputs, whose outputs may differ in magnitude.
        self.largest = {kind: dict.fromkeys(('output', 'algebra', 'stored', 'own'), 0.0) for kind in ('noise', 'real')}
        self.num_inputs = 0
        self._samples: Counter[int] = Counter()

    def report(self) -> LayerReport:
        """The figures so far."""
        figures = {
            name: maximum(0.0, [ratio(values[name], values['output']) for values in self.largest.values()])
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
        """The correct fusion in float64, before rounding."""
        layer, expected = self.exact, self.exact_fused
        if not isinstance(self.exact, Fusible):
            expected = layer
        elif layer.input_dependent and not is_variant(self.counterpart):
            # A plain convolution can stand for it if the attention leaves the mean kernel.
            expected = layer.plain_conv(layer.weight, layer.bias)
        if self.norm is not None:
            expected = copy.deepcopy(expected)
            scale_outputs(expected, *scale_shift(self.norm, to_float64))
        return expected

    def compare_kernels(self) -> None:
        """Compare type, settings and every entry of the tensors with the exact fusion."""
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
                self.kernel = maximum(self.kernel, [units_in_the_last_place(tensors[name], exact_tensors[name])])
                if tensors[name].is_floating_point() and tensors[name].dtype != found.weight.dtype:
                    self.problems.append(f'{name}: expected {found.weight.dtype}, got {tensors[name].dtype}')

    def compare_on_noise(self) -> None:
        """Compare outputs on seeded noise, in which every channel is active."""
        if self.problems:
            return
        like = next(self.own.parameters())
        x = self._noise().to(like.device, like.dtype)
        self._compare('noise', x, self.own.forward(x), {})

    def measure_random_roundings(self) -> None:
        """If only `stored` is above its limit, measure the rounding error of random roundings of the kernel, too.

        The rounding error of the layer in its dtype may be smaller than that of a rounded kernel: by chance, with few
        channels, or because of wider accumulators.
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
        # The samples differ in their means, on which an attention depends.
        return x + torch.randn(*size[:2], 1, 1, generator=generator, device='cpu')

    @staticmethod
    def _noise_size(layer: Any) -> list[int]:
        """Height and width that give several positions of the kernel, and are larger than any padding."""
        if layer.transposed:  # here padding crops the output
            return [2 * pad // stride + 4 + axis for axis, (pad, stride) in enumerate(zip(layer.padding, layer.stride))]
        pads = layer._reversed_padding_repeated_twice
        sides = zip(layer.kernel_size, layer.stride, layer.dilation, (max(pads[2:]), max(pads[:2])))
        return [
            max(dilation * (side - 1) + 1 + (2 + axis) * stride, pad + 1)
            for axis, (side, stride, dilation, pad) in enumerate(sides)
        ]

    def hooks(self) -> Iterator[Any]:
        """Register a hook that compares the layer's outputs during one forward pass of the model."""
        if self.problems:
            return
        calls = [0]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            calls[0] += 1
            self._compare_call(calls[0], args, kwargs, output)

        yield self.own.register_forward_hook(hook, with_kwargs=True, prepend=True)

    def _compare_call(self, call: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
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
        """Compare outputs for the input x (batch, channels, height, width), where `own` is the layer's own output."""
        expected = self.expected()
        function = self.exact.branch_form() if isinstance(self.exact, Fusible) else self.exact.forward
        stored = _exact_without_hooks(self.counterpart).to(expected.weight.device)
        largest = self.largest[kind]
        at_once = max(1, _ELEMENTS_AT_ONCE // max(x[0].numel(), 1))
        for piece, of_piece in zip(x.split(at_once), own.split(at_once)):
            piece = to_float64(piece).to(expected.weight.device)
            reference = function(piece, **kwargs)
            try:  # .forward runs no hooks
                forms = {'algebra': expected.forward(piece, **kwargs), 'stored': stored.forward(piece, **kwargs)}
                # The layer's own evaluation must match its branch form. Noise suffices: it composes its kernel anew.
                evaluated = self.exact.forward(piece, **kwargs) if kind == 'noise' else reference
            except Exception as error:  # the counterpart may be any module
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
    """A BatchNorm in evaluation, without the activation that timm's has."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _exact_without_hooks(module: nn.Module) -> Any:
    """A float64 copy of a module without hooks."""
    memo: dict[int, Any] = {id(getattr(part, hooks)): {} for part in module.modules() for hooks in CALL_HOOKS}
    return float64_copy(module, memo).eval()
