"""Verification of a fusion: each fused layer against its train-time layer, then the two models as a whole.

The outputs of the models are not enough. timm's networks start with gamma = 0 in the last norm of each residual branch,
so an error before that norm does not change the output.
"""

import copy
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch.utils._pytree import tree_flatten

from ._compare import Comparison
from ._differences import MOST_ROUNDINGS, differences, maximum, round_at_random, sizes, worst_ratio
from ._evaluation import default_dtype, evaluating, full_precision, removed_afterwards
from ._layer_check import LayerCheck
from ._reports import ALGEBRA_BOUND, FusionReport, LayerReport
from .convert import unwrap
from .errors import ReparamError
from .fuse import fuse_model, holds_fusible, unwrap_converted, with_fused_layers
from .layers._fusible import Fusible
from .layers._tensor import float64_copy, kept_tensors
from .timm_model import architecture_of, config_of

__all__ = ['FusionReport', 'LayerReport', 'verify_fusion']

_VERIFY_IMAGES = 64
# Limit of the entries of all images. Above about 320 pixels there are fewer images, which bounds time and memory.
_VERIFY_ENTRIES = 64 * 3 * 320**2
_VERIFY_BATCH = 16
_NOISE_SAMPLES = 4
# Ratio by which two rounding errors of a model with few outputs may differ by chance; 5 was observed.
_BY_CHANCE = 16
# Rounding error, relative to the largest output, above which the dtype does not determine the output.
_UNDETERMINED = 0.5


@torch.no_grad()
def verify_fusion(
    model: nn.Module,
    fused: nn.Module | None = None,
    *,
    inputs: torch.Tensor | Iterable[torch.Tensor] | None = None,
) -> FusionReport:
    """Compare a converted model with its fusion, layer by layer and then as a whole.

    Each fused layer or block is compared with its counterpart in the fused model, under all of its names, in each of
    its calls, and together with a BatchNorm that was folded into it:

    - type and settings;
    - every tap of the kernel, against the kernel composed in float64;
    - the function, against the layer computed branch by branch in float64, on the inputs that reach it and on seeded
      noise.

    All other tensors, norms, activations and settings of the two models must be equal after a cast to the fused dtype.
    Modules without effect in evaluation are ignored. Finally the outputs of both models are compared.

    Both models run in evaluation mode, without autocast and TF32. Their modes and the random state are restored. Only
    one batch, and the outputs of one sample of a layer, are in memory at a time.

    Args:
        model: The converted model.
        fused: Its fusion, as it will be saved: in the dtype of the model, or cast to a narrower one, as a whole or
            without some modules such as norms. None fuses the model here.
        inputs: A batch, or an iterable of batches, which is read one batch at a time. None takes 64 seeded random
            images of the model's own input size, and fewer above 320 pixels.

    Returns:
        The figures; the report's `passed` says whether they are within their limits.

    Raises:
        ReparamError: The model holds nothing to fuse; `fused` is the model itself or still holds a layer that should
            have been fused; the input size is unknown; there are no inputs or they are no tensors; one of the models
            cannot run; or the outputs cannot be compared: there are none, their shapes differ from the model's, or
            their number depends on rounding.
    """
    model = unwrap_converted(model, 'verify_fusion')
    remedy = '' if fused is None else '; pass what fuse_model() made of the model'
    fused = fuse_model(model) if fused is None else unwrap(fused, 'verify_fusion: fused')
    _check_fused(model, fused, remedy)
    device = next(model.parameters()).device
    batches = seeded_images(_input_size(model)) if inputs is None else inputs
    if isinstance(batches, torch.Tensor):
        batches = (batches,)
    if not isinstance(batches, Iterable):
        raise ReparamError(
            f'verify_fusion: expected a batch or an iterable of batches as inputs=, got {type(batches).__name__}; '
            'pass a tensor'
        )
    with evaluating(model, fused), full_precision(device):
        return _Verification(model, fused, remedy).run(batches)


def _check_fused(model: nn.Module, fused: nn.Module, remedy: str) -> None:
    """Raise ReparamError if the two models cannot be a model and its fusion."""
    if fused is model:
        raise ReparamError(
            'verify_fusion: got the model itself as its fusion; pass what fuse_model() made of it, or leave it out'
        )
    for each in (model, fused):
        if any(parameter.is_meta for parameter in each.parameters()):
            raise ReparamError(
                f'verify_fusion: expected weights with values, got {type(each).__name__} on the meta device; load them'
            )
    for name, module in fused.named_modules():
        if isinstance(module, Fusible) and not module.input_dependent:
            raise ReparamError(
                f'verify_fusion: {name or "fused"}: expected a fused layer, got {type(module).__name__}{remedy}'
            )


class _Verification:
    """Comparison of two models, both in evaluation mode.

    Args:
        model: The train-time model.
        fused: The model that is expected to be its fusion.
        remedy: Advice for error messages if `fused` is wrong; empty if it was made by `verify_fusion`.
    """

    def __init__(self, model: nn.Module, fused: nn.Module, remedy: str) -> None:
        self.model, self.fused, self.remedy = model, fused, remedy
        comparison = Comparison(model, fused)
        self.problems = comparison.problems
        self.folded, self.convs = comparison.folded, comparison.convs
        # The rounding error of the train-time model is measured in the dtype of the fused model.
        self.own = model
        if any(ours != theirs for ours, theirs in comparison.dtypes.items()):
            self.own = _cast_copy(model, fused).eval()
        self.exact = float64_copy(model).eval()
        # The two share the tensors that fusing does not change.
        shared = {id(tensor): tensor for tensor in (*self.exact.parameters(), *self.exact.buffers())}
        self.exact_fused = with_fused_layers(self.exact, shared)
        self.modules = [
            dict(each.named_modules(remove_duplicate=False)) for each in (self.exact, self.exact_fused, self.own)
        ]
        self.checks = [self._check(names, counterpart) for names, _, counterpart in comparison.layers.values()]
        # One value for each output, since outputs may differ by orders of magnitude.
        self.largest: dict[str, list[float]] = {name: [] for name in ('output', 'algebra', 'stored', 'own')}

    def _figure(self, name: str) -> float:
        """The largest difference of outputs so far, relative to the largest output."""
        return worst_ratio(self.largest[name], self.largest['output'])

    def _check(self, names: list[str], counterpart: nn.Module) -> LayerCheck:
        exact, exact_fused, own = (modules[names[0]] for modules in self.modules)
        return LayerCheck(names, exact, exact_fused, own, counterpart)

    def run(self, batches: Iterable[torch.Tensor]) -> FusionReport:
        """Compare the models on batches of inputs."""
        num_inputs = agreeing = 0
        classifies = True
        for batch in batches:
            if not isinstance(batch, torch.Tensor):
                raise ReparamError(
                    f'verify_fusion: expected tensors as inputs=, got a batch of type {type(batch).__name__}; pass '
                    'the images without labels'
                )
            if not batch.dim():
                raise ReparamError('verify_fusion: expected batches as inputs=, got a single number; pass a batch')
            if not len(batch):
                continue
            if not num_inputs:
                self._prepare_checks(batch)
            outputs = self._outputs(batch)
            num_inputs += len(batch)
            like = batch.shape[1:], batch.dtype
            classifies = classifies and len(outputs['own']) == 1 and outputs['own'][0].dim() == 2
            if classifies:
                agreeing += int((outputs['own'][0].argmax(1).cpu() == outputs['stored'][0].argmax(1).cpu()).sum())
            del batch, outputs  # free their memory before the next batch is made
        if not num_inputs:
            raise ReparamError('verify_fusion: expected at least one input, got none; pass a batch as inputs=')
        for check in self.checks:
            check.measure_random_roundings()
        algebra, stored, own = (self._figure(name) for name in ('algebra', 'stored', 'own'))
        shape, dtype = like
        # The rounding errors of the kernels are the same for all inputs, and may cancel in one model by chance.
        if stored > max(2 * own, ALGEBRA_BOUND) and dtype.is_floating_point:
            own = max(own, self._own_rounding(shape, dtype, enough=stored / 2))
        if not math.isfinite(own):
            self.problems.append(
                f"outputs: the train-time model's own in {_dtype_of(self.own)} are not finite; verify it in a dtype in "
                'which it does not overflow'
            )
        algebra_bound = ALGEBRA_BOUND
        if algebra > algebra_bound and dtype.is_floating_point:
            algebra_bound = max(algebra_bound, 2 * self._rounding_in_float64(shape, dtype))
        return FusionReport(
            algebra=algebra,
            stored=stored,
            own=own,
            bound=None if own > _UNDETERMINED else max(2 * own, ALGEBRA_BOUND),
            top1_agreement=agreeing / num_inputs if classifies else None,
            num_inputs=num_inputs,
            algebra_bound=algebra_bound,
            layers=tuple(check.report() for check in self.checks),
            problems=tuple(self.problems),
        )

    def _prepare_checks(self, batch: torch.Tensor) -> None:
        """Pair the folded norms with their convolutions, then compare all kernels, and all layers on noise."""
        self._find_folded(batch[:1])
        for check in self.checks:
            check.compare_kernels()
            check.compare_on_noise()

    def _find_folded(self, batch: torch.Tensor) -> None:
        """Assign each folded norm to the convolution whose output is its input, as a forward pass shows."""
        taken = self._inputs_of_norms(batch) if self.folded else {}
        checks = {check.names[0]: check for check in self.checks}
        convs = {names[0]: (names, counterpart) for names, _, counterpart, _ in self.convs.values()}
        for name, norm in self.folded.values():
            maker = taken.get(name, '')
            if maker in convs and maker not in checks:
                checks[maker] = self._check(*convs[maker])
                self.checks.append(checks[maker])
            if maker in checks and checks[maker].norm is None:
                checks[maker].norm_name = name
                checks[maker].norm, _, checks[maker].own_norm = (modules[name] for modules in self.modules)
            else:
                self.problems.append(
                    f'{name}: expected {type(norm).__name__}, got neither it nor a convolution that has it folded in'
                )
        for names, _, _, differing in self.convs.values():
            if names[0] not in checks:
                self.problems += differing

    def _inputs_of_norms(self, batch: torch.Tensor) -> dict[str, str]:
        """Name of the convolution that each folded norm follows.

        Every output of that convolution must be the input of the norm, unchanged, and have no other reader.
        """
        made: dict[int, tuple[weakref.ref, int, str]] = {}
        calls: Counter[str] = Counter()
        taken: dict[str, list[str]] = {}

        def note_output(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
                calls[name] += 1
                made[id(output)] = weakref.ref(output), output._version, name

            return hook

        def note_input(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                reference, version, maker = made.get(id(x), (None, 0, ''))
                # The same tensor, not modified in place.
                is_same = reference is not None and reference() is x and x._version == version
                taken.setdefault(name, []).append(maker if is_same else '')

            return hook

        convs = {check.names[0] for check in self.checks} | {names[0] for names, *_ in self.convs.values()}
        modules = self.modules[-1]
        handles = [modules[name].register_forward_hook(note_output(name)) for name in convs]
        handles += [
            modules[name].register_forward_pre_hook(note_input(name), with_kwargs=True)
            for name, _ in self.folded.values()
        ]
        with removed_afterwards(handles):
            self._run(self.own, batch)
        pairs = {name: makers[0] for name, makers in taken.items() if makers == [makers[0]] * calls[makers[0]]}
        if self._are_read_elsewhere(batch, pairs):
            pairs = {norm: conv for norm, conv in pairs.items() if not self._are_read_elsewhere(batch, {norm: conv})}
        return pairs

    def _are_read_elsewhere(self, batch: torch.Tensor, pairs: Mapping[str, str]) -> bool:
        """Whether anything but its norm reads the output of a convolution.

        The outputs of the convolutions are replaced by NaN, and those of the norms by their earlier values. Any other
        reader carries the NaN to an output of the model, even through gamma = 0, because 0 times NaN is NaN.
        """
        kept: dict[str, list[torch.Tensor]] = {norm: [] for norm in pairs}
        modules = self.modules[-1]

        def keep(name: str) -> Any:
            return modules[name].register_forward_hook(lambda module, args, output: kept[name].append(output.clone()))

        def give_back(name: str) -> Any:
            return modules[name].register_forward_hook(lambda module, args, output: kept[name].pop(0))

        def poison(name: str) -> Any:
            return modules[name].register_forward_hook(lambda module, args, output: torch.full_like(output, math.nan))

        with removed_afterwards([keep(norm) for norm in pairs]):
            before = self._run(self.own, batch)
        with removed_afterwards([*map(poison, pairs.values()), *map(give_back, pairs)]):
            after = self._run(self.own, batch)
        return any(map(torch.Tensor.any, differences(after, before)))

    def _outputs(self, batch: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        """Run all models on a batch, update the largest differences, and return the outputs."""
        handles = [handle for check in self.checks for handle in check.hooks()]
        with removed_afterwards(handles):
            outputs = {'own': self._run(self.own, batch)}
        reference = self._run(self.exact, batch)
        outputs['algebra'] = self._run(self.exact_fused, batch)
        outputs['stored'] = self._run(self.fused, batch)
        self._check_shapes(reference, outputs)
        for name, values in (
            ('output', sizes(reference)),
            *((n, differences(v, reference)) for n, v in outputs.items()),
        ):
            before = self.largest[name] or [0.0] * len(values)
            self.largest[name] = [maximum(largest, [value]) for largest, value in zip(before, values, strict=True)]
        return outputs

    def _check_shapes(self, reference: list[torch.Tensor], outputs: Mapping[str, list[torch.Tensor]]) -> None:
        """Raise ReparamError unless there are outputs, and all models return the same shapes."""
        name = type(self.model).__name__
        if not reference:
            raise ReparamError(
                f'verify_fusion: expected floating-point tensors as outputs, alone or in tuples, lists and dicts, but '
                f'{name} returns no floating-point tensor; verify a module that does'
            )
        expected = [tuple(value.shape) for value in reference]
        found = {role: [tuple(value.shape) for value in values] for role, values in outputs.items()}
        rounds = next((role for role in ('own', 'algebra') if found[role] != expected), None)
        if rounds is None and found['stored'] != expected and not self.problems and not self._layers_off():
            rounds = 'stored'  # nothing else differs
        if rounds is not None:
            children = self.model.named_children()
            part = next((path for path, child in children if holds_fusible(child)), '')
            remedy = f'verify_fusion(model.{part}, fused.{part})' if part else 'a module whose outputs are of one shape'
            raise ReparamError(
                f'verify_fusion: {name}: expected outputs whose number does not depend on rounding, got {expected} and '
                f'{found[rounds]} for the same inputs (a detector?); verify the part before that selection: {remedy}'
            )
        if found['stored'] != expected:
            raise ReparamError(
                f'verify_fusion: expected the outputs of the model, {expected}, got {found["stored"]} from the fused '
                f'one{self.remedy}{self._found_so_far()}'
            )

    def _layers_off(self) -> list[LayerReport]:
        return [report for report in (check.report() for check in self.checks) if not report.passed]

    def _found_so_far(self) -> str:
        """The problems so far, for the end of an error message."""
        texts = [*map(str, self._layers_off()), *self.problems]
        return '' if not texts else '. What differs:\n' + '\n'.join(f'  {text}' for text in texts)

    def _run(self, model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
        """Return the floating-point and complex tensors of a model's output, in order; exact models run in float64."""
        is_exact, is_fused = model is self.exact or model is self.exact_fused, model is not self.own
        is_fused = is_fused and model is not self.exact
        dtype = torch.float64 if is_exact else _dtype_of(model)
        try:
            # The default dtype is that of tensors that a forward creates without a dtype.
            with default_dtype(dtype if is_exact else torch.get_default_dtype()):
                return _flat_outputs(model, batch, next(model.parameters()).device, dtype)
        except ReparamError:
            raise
        except Exception as error:  # the model's own code may raise anything
            which = f'the {"fused" if is_fused else "train-time"} {type(model).__name__}'
            remedy = 'pass inputs= and a dtype that it runs with'
            if is_exact and not is_fused:  # it ran in its own dtype before
                remedy = (
                    'a fusion is verified in float64: make the tensors of its forward in the dtype of the input '
                    '(dtype=x.dtype) instead of a fixed one, or verify the part of the model that does'
                )
            raise ReparamError(
                f'verify_fusion: {which} cannot run in {dtype} on a batch of shape {tuple(batch.shape)} '
                f'({type(error).__name__}: {error}); {remedy}{self._found_so_far() if is_fused else ""}'
            ) from error

    def _own_rounding(self, shape: torch.Size, dtype: torch.dtype, enough: float) -> float:
        """Relative rounding error on seeded noise: of the train-time model, and of kernels rounded at random.

        Random rounding changes a kernel by less than one unit in the last place, which the layers may differ by.

        Args:
            shape: Shape of one input.
            dtype: Dtype of the inputs.
            enough: The search stops at an error of this size.
        """
        largest = 0.0
        generator = torch.Generator().manual_seed(0)
        rounded = with_fused_layers(self.own)  # the correct fusion, not the one under test
        modules = dict(rounded.named_modules(remove_duplicate=False))
        for _ in range(MOST_ROUNDINGS):
            noise = torch.randn(_VERIFY_BATCH, *shape, generator=generator, device='cpu').to(dtype)
            for check in self.checks:
                round_at_random(modules[check.names[0]], check.exact_fused, generator)
            reference = self._run(self.exact, noise)
            largest = max(largest, *(self._relative(self._run(each, noise), reference) for each in (self.own, rounded)))
            if largest >= enough or largest < enough / _BY_CHANCE:
                break
        return largest

    @staticmethod
    def _relative(values: list[torch.Tensor], reference: list[torch.Tensor]) -> float:
        """The largest difference of outputs, each relative to the largest entry of its reference."""
        found = ([maximum(0.0, [t]) for t in tensors] for tensors in (differences(values, reference), sizes(reference)))
        return worst_ratio(*found)

    def _rounding_in_float64(self, shape: torch.Size, dtype: torch.dtype) -> float:
        """Relative change of the float64 outputs for a relative change of 2**-40 of the input; large if it rounds."""
        noise = (
            torch.randn(_NOISE_SAMPLES, *shape, generator=torch.Generator().manual_seed(0), device='cpu')
            .to(dtype)
            .double()
        )
        reference, moved = (self._run(self.exact, x) for x in (noise, noise * (1 + 2.0**-40)))
        return self._relative(moved, reference)


def _cast_copy(model: nn.Module, fused: nn.Module) -> nn.Module:
    """A copy of a model whose tensors have the dtypes of its fusion."""
    memo: dict[int, Any] = {}
    default = _dtype_of(fused)
    modules = dict(fused.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        counterpart = modules.get(name)
        for part in module.modules() if isinstance(module, Fusible) else (module,):
            for key, tensor in {**part._parameters, **part._buffers}.items():
                if tensor is None or not tensor.is_floating_point() or id(tensor) in memo:
                    continue
                found = getattr(counterpart, 'weight' if isinstance(module, Fusible) else key, None)
                dtype = found.dtype if isinstance(found, torch.Tensor) else default
                cast = tensor.detach().to(dtype, copy=True)  # the model itself must not change
                memo[id(tensor)] = nn.Parameter(cast) if isinstance(tensor, nn.Parameter) else cast
    memo |= {id(kept): kept.detach().to(default) for kept in kept_tensors(model) if id(kept) not in memo}
    return copy.deepcopy(model, memo)


def _dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of the first real floating-point parameter."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def seeded_images(input_size: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """The default inputs of :func:`verify_fusion`: batches of random images of size (channels, height, width)."""
    generator = torch.Generator().manual_seed(0)
    number = min(_VERIFY_IMAGES, max(2, _VERIFY_ENTRIES // math.prod(input_size)))
    batch = max(1, number * _VERIFY_BATCH // _VERIFY_IMAGES)
    return torch.randn(number, *input_size, generator=generator, device='cpu').split(batch)


def _input_size(model: nn.Module) -> tuple[int, int, int]:
    from timm.data import resolve_input_data_config

    if architecture_of(model) is None and 'input_size' not in config_of(model):
        raise ReparamError(
            f'verify_fusion: {type(model).__name__} does not say its input size; pass a batch of images as inputs='
        )
    return resolve_input_data_config(model)['input_size']


def _flat_outputs(
    model: nn.Module, batch: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    batch = batch.to(device, dtype if batch.is_floating_point() else None)
    values = [value for value in tree_flatten(model(batch))[0] if isinstance(value, torch.Tensor)]
    return [value for value in values if value.is_floating_point() or value.is_complex()]
