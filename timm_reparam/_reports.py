"""What `verify_fusion` returns: the figures of each layer, and of the two models as a whole."""

import dataclasses
import math
from typing import Any

__all__ = ['ALGEBRA_BOUND', 'FusionReport', 'LayerReport']

# Upper limit of the rounding error of correct algebra in float64.
ALGEBRA_BOUND = 1e-10


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """Figures of :func:`verify_fusion` for one layer.

    A difference is the largest difference of outputs, relative to the largest output of the layer. It is measured on
    the inputs that reach the layer and on seeded noise; the larger value counts.

    Attributes:
        name: Name of the module: all of its names if it has several, and the name of a norm that was folded into it.
        kernel: Largest difference between an entry of the fused layer's parameters and the exact value, in units in the
            last place of its dtype; at most 1.
        algebra: Difference in float64 between the train-time layer in its branch form (:meth:`Fusible.branch_form`)
            and its fusion before rounding, and between the branch form and the layer's own evaluation; at most 1e-10.
        stored: Difference between the train-time layer in its branch form and the stored fused layer, both computed in
            float64.
        own: Rounding error of the train-time layer: the difference between the layer in the fused dtype and its branch
            form in float64. Where `stored` is more than twice as large, kernels that are rounded up or down at random
            are measured, too.
        bound: Upper limit of `stored`: twice `own`, and at least the limit of `algebra`.
        num_inputs: Number of samples that reached the layer and were compared; 0 if only noise was.
        problems: Differences that make a comparison impossible: another type, shape or setting.
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
        """The largest ratio of a figure to its limit; the layer fails above 1 and at NaN."""
        if self.problems:
            return math.inf
        shares = (self.kernel, self.algebra / ALGEBRA_BOUND, self.stored / self.bound)
        return math.nan if any(math.isnan(share) for share in shares) else max(shares)

    @property
    def passed(self) -> bool:
        """Whether every figure is within its limit; NaN is not."""
        return self.excess <= 1

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, `bound` and `passed` as plain values."""
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


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """Figures of :func:`verify_fusion`.

    A difference is the largest difference of outputs, relative to the largest output.

    Attributes:
        algebra: Difference between the model in float64 and its fusion in float64; at most `algebra_bound`.
        stored: Difference between the fused model in its own dtype and the train-time model in float64.
        own: Rounding error of the train-time model: the difference between the model in the fused dtype and the model
            in float64. It may be small by chance. Where `stored` is more than twice as large, seeded noise and kernels
            that are rounded up or down at random are measured, too.
        bound: Upper limit of `stored`: twice `own`, and at least 1e-10. None if `own` is more than half of the output:
            the dtype does not determine the output then, and only the layers are compared.
        top1_agreement: Share of inputs for which both models, in their own dtype, predict the same class; None if the
            output is not one batch of logits.
        num_inputs: Number of inputs that were compared.
        algebra_bound: 1e-10, or more for a model that rounds to float32 whatever its dtype: twice the change of its
            output in float64 when its input changes by rounding.
        layers: The reports of the fused layers.
        problems: Differences between the two models outside these layers.
    """

    algebra: float
    stored: float
    own: float
    bound: float | None
    top1_agreement: float | None
    num_inputs: int
    algebra_bound: float = ALGEBRA_BOUND
    layers: tuple[LayerReport, ...] = ()
    problems: tuple[str, ...] = ()

    ALGEBRA_BOUND = ALGEBRA_BOUND

    @property
    def passed(self) -> bool:
        """Whether every layer passed, nothing else differs, and the outputs are within their limits; NaN is not."""
        outputs = self.algebra <= self.algebra_bound and (self.bound is None or self.stored <= self.bound)
        return outputs and not self.problems and not self.layers_off

    @property
    def layers_off(self) -> tuple[LayerReport, ...]:
        """The layers that failed."""
        return tuple(layer for layer in self.layers if not layer.passed)

    @property
    def layers_without_input(self) -> list[str]:
        """Names of the layers that no input reached; they were compared on noise only."""
        return [layer.name for layer in self.layers if not layer.num_inputs and not layer.problems]

    @property
    def worst_layer(self) -> LayerReport | None:
        """The layer with the largest `excess`; None if there are no layers."""
        return max(self.layers, key=lambda layer: math.inf if math.isnan(layer.excess) else layer.excess, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as plain values; of the layers the number, the worst one and those that failed."""
        names = ('algebra', 'stored', 'own', 'bound', 'top1_agreement', 'num_inputs', 'algebra_bound')
        return dict(
            {name: getattr(self, name) for name in names},
            num_layers=len(self.layers),
            layers_without_input=self.layers_without_input,
            worst_layer=None if self.worst_layer is None else self.worst_layer.to_dict(),
            layers_off=[layer.to_dict() for layer in self.layers_off],
            problems=list(self.problems),
            passed=self.passed,
        )

    def __str__(self) -> str:
        agreement = '' if self.top1_agreement is None else f', top-1 agreement {self.top1_agreement:.2%}'
        allowed = 'no bound' if self.bound is None else f'at most {self.bound:.1e}'
        text = (
            f'fusion {"verified" if self.passed else "NOT verified"} on {self.num_inputs} inputs: '
            f'algebra {self.algebra:.1e} (at most {self.algebra_bound:.0e}), stored {self.stored:.1e} '
            f"({allowed}; the train-time model's own rounding is {self.own:.1e}){agreement}"
        )
        if self.worst_layer is not None:
            text += f'\n{len(self.layers)} layers, the worst one {self.worst_layer}'
        if self.layers_without_input:
            text += f'\nreached by no input, compared on noise alone: {", ".join(self.layers_without_input)}'
        return '\n'.join([text, *(f'  {layer}' for layer in self.layers_off), *(f'  {text}' for text in self.problems)])
