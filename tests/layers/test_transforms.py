"""What torch's transforms make of every layer: the table of transforms times the table of layers.

Each row is compared with plain reverse mode, one derivative at a time, of the same layer in float64. A convolution
followed by BatchNorm is one of the rows, so that no row asks for more than torch's own layers do.
"""

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from timm_reparam.layers import ACBlock2d, ACConv2d

from .cases import (
    FEW,
    METHODS,
    TRANSPOSED_CASES,
    TRANSPOSED_METHODS,
    Case,
    Method,
    generator,
    has_middle,
    identifier,
    in_float64,
    normal,
    randomise,
)

Tensors = tuple[torch.Tensor, ...]

both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
MEMBERS = 3


class _ConvAndNorm(Method):
    def lift(self, conv: nn.Module, case: Any) -> nn.Module:
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels, dtype=conv.weight.dtype))


class _Block(Method):
    def lift(self, conv: nn.Module, case: Any) -> nn.Module:
        arguments = dict(case.arguments(), dtype=conv.weight.dtype)
        del arguments['bias']
        return ACBlock2d(**arguments, last_norm=True)


PLAIN = _ConvAndNorm('plain', nn.Conv2d)
BLOCK = _Block('acblock', ACBlock2d, admits=lambda case: has_middle(case) and not case.same)
KEPT = Method('acconv_kept', ACConv2d, admits=has_middle)
RECOMPUTED = Method('acconv_recompute', ACConv2d, lambda case: {'recompute': True}, admits=has_middle)
ROWS = (PLAIN, *METHODS, BLOCK, RECOMPUTED)

# Dynamic convolution has four ways of computing it, chosen by the kernel and by the sizes: kernels of many samples are
# mixed, or outputs, either of them by matrix products where kernels are 1x1.
MANY = Case('many_positions', 3, padding=1, bias=True, in_channels=2, out_channels=3, size=(8, 7))
FEW_POSITIONS = Case('few_positions', 3, stride=2, padding=1, groups=2, bias=True, out_channels=4, size=(5, 4))
POINTWISE = Case('pointwise', 1, bias=True, size=(5, 4))
POINTWISE_FEW = Case('pointwise_few', 1, bias=True, size=(3, 2))
WAYS = {MANY: 8, FEW_POSITIONS: 2, POINTWISE: 2, POINTWISE_FEW: 2}
TRANSPOSED = tuple(case for case in TRANSPOSED_CASES if case.name in ('3x3_output_padding', 'groups_2'))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A layer as a pure function of its input and its parameters, and where and along what to differentiate it.

    Attributes:
        layer: The layer, everything that it adds to a convolution randomised.
        values: The input, and the parameters in their order.
        tangents: Two directions of the values.
        cotangents: Three directions of the output, stacked.
    """

    layer: nn.Module
    values: Tensors
    tangents: tuple[Tensors, Tensors]
    cotangents: torch.Tensor

    @classmethod
    def of(cls, method: Method, case: Any, dtype: torch.dtype, training: bool, batch: int) -> 'Problem':
        layer = method.lift(case.conv(dtype), case)
        randomise(layer, generator(2))
        layer.train(training)
        values = (case.input(dtype, batch), *(parameter.detach().clone() for parameter in layer.parameters()))
        rng = generator(5)
        tangents = [tuple(normal(value.shape, rng).to(dtype) for value in values) for _ in range(2)]
        with torch.no_grad():
            shape = copy.deepcopy(layer).eval()(values[0]).shape
        return cls(layer, values, tuple(tangents), normal((3, *shape), rng).to(dtype))

    def in_float64(self) -> 'Problem':
        tangents = tuple(tuple(tensor.double() for tensor in tensors) for tensors in self.tangents)
        values = tuple(value.double() for value in self.values)
        return Problem(in_float64(self.layer), values, tangents, self.cotangents.double())

    def call(self, buffers: dict[str, torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        """The layer with these buffers, which a training pass moves."""
        names = [name for name, _ in self.layer.named_parameters()]
        state = {**dict(zip(names, values[1:], strict=True)), **buffers}
        return torch.func.functional_call(self.layer, state, (values[0],))

    def __call__(self, *values: torch.Tensor) -> torch.Tensor:
        return self.call(self.buffers(), *values)

    def buffers(self) -> dict[str, torch.Tensor]:
        return {name: buffer.clone() for name, buffer in self.layer.named_buffers()}

    def checkpointed(self, *values: torch.Tensor) -> torch.Tensor:
        """The output, computed again in the backward pass, which sees the buffers that the first pass moved."""
        return checkpoint(self.call, self.buffers(), *values, use_reentrant=False)

    def loss(self, *values: torch.Tensor) -> torch.Tensor:
        """One number, not linear in the output."""
        return self.loss_of(self(*values))

    def loss_of(self, y: torch.Tensor) -> torch.Tensor:
        return (self.cotangents[0] * y).sum() + (self.cotangents[1] * y.square()).sum()

    def along(self, steps: torch.Tensor) -> torch.Tensor:
        """The output at so many steps along each of the tangents."""
        moved = [value + steps[0] * one + steps[1] * other for value, one, other in zip(self.values, *self.tangents)]
        return self(*moved)

    def needing_gradients(self) -> Tensors:
        return tuple(value.detach().clone().requires_grad_() for value in self.values)

    def members(self) -> list[Tensors]:
        """Values of several layers."""
        rng = generator(7)
        return [
            tuple(value + (0.3 * normal(value.shape, rng)).to(value) for value in self.values) for _ in range(MEMBERS)
        ]


def stacked(members: list[Tensors]) -> Tensors:
    """The first tensors of all members as one, the second ones, and so on."""
    return tuple(torch.stack(tensors) for tensors in zip(*members, strict=True))


# References: reverse mode, one derivative at a time -------------------------------------------------------------------


def pullback(function: Callable, values: Tensors, cotangent: torch.Tensor) -> Tensors:
    values = tuple(value.detach().clone().requires_grad_() for value in values)
    return torch.autograd.grad(function(*values), values, cotangent)


def pushforward(function: Callable, values: Tensors, tangents: Tensors) -> torch.Tensor:
    """J t, as the gradient of u^T J t with respect to u."""
    values = tuple(value.detach().clone().requires_grad_() for value in values)
    y = function(*values)
    cotangent = torch.zeros_like(y, requires_grad=True)
    gradients = torch.autograd.grad(y, values, cotangent, create_graph=True)
    # of an empty batch a grouped convolution gives none
    return torch.autograd.grad(gradients, cotangent, tangents, materialize_grads=True)[0]


def output_and_tangent(p: Problem) -> Tensors:
    return p(*p.values), pushforward(p, p.values, p.tangents[0])


def both_tangents(p: Problem) -> Tensors:
    return (torch.stack([pushforward(p, p.values, tangents) for tangents in p.tangents], -1),)


def one_gradient(p: Problem) -> Tensors:
    return pullback(p, p.values, p.cotangents[0])


def each_gradient(p: Problem) -> Tensors:
    return stacked([pullback(p, p.values, cotangent) for cotangent in p.cotangents])


def gradient_of_loss(p: Problem) -> Tensors:
    return pullback(p.loss, p.values, torch.ones_like(p.cotangents.sum()))


def hessian_times_tangent(p: Problem) -> Tensors:
    values = p.needing_gradients()
    gradients = torch.autograd.grad(p.loss(*values), values, create_graph=True)
    return torch.autograd.grad(gradients, values, p.tangents[0], materialize_grads=True)


def hessian_of_steps(p: Problem) -> Tensors:
    steps = p.values[0].new_zeros(2).requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of_steps(p, steps), steps, create_graph=True)
    return (torch.stack([torch.autograd.grad(part, steps, retain_graph=True)[0] for part in gradient]),)


def curved(p: Problem, *values: torch.Tensor) -> torch.Tensor:
    """No gradient of it is a constant, as that of a bias is."""
    y = p(*values)
    return y + y.square()


def gradient_of_squared_gradients(p: Problem) -> Tensors:
    values = p.needing_gradients()
    y = curved(p, *values)
    total = y.new_zeros(())
    for cotangent in p.cotangents:
        for gradient in torch.autograd.grad(y, values, cotangent, create_graph=True):
            total = total + gradient.square().sum()
    return torch.autograd.grad(total, values, materialize_grads=True)


def outputs_of(p: Problem, members: list[Tensors]) -> Tensors:
    """The output of each member, and its buffers afterwards."""
    results = []
    for member in members:
        buffers = p.buffers()
        results.append((p.call(buffers, *member), *buffers.values()))
    return stacked(results)


def with_own_inputs(p: Problem) -> list[Tensors]:
    return [(member[0], *p.values[1:]) for member in p.members()]


def with_own_parameters(p: Problem) -> list[Tensors]:
    return [(p.values[0], *member[1:]) for member in p.members()]


def gradients_of_each_member(p: Problem) -> Tensors:
    return stacked([pullback(p.loss, member, torch.ones_like(p.cotangents.sum())) for member in p.members()])


def gradients_of_each_sample(p: Problem) -> Tensors:
    gradients = []
    for sample, cotangent in zip(p.values[0].split(1), p.cotangents[0].split(1), strict=True):
        gradients.append(pullback(p, (sample, *p.values[1:]), cotangent))
    return stacked(gradients)


def tangents_of_each_member(p: Problem) -> Tensors:
    return (torch.stack([pushforward(p, member, p.tangents[0]) for member in p.members()]),)


# The transforms -------------------------------------------------------------------------------------------------------


def dual_numbers(p: Problem) -> Tensors:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(p(*map(forward_ad.make_dual, p.values, p.tangents[0]))))


def dual_input(p: Problem) -> Tensors:
    """The layer itself, not a function of its parameters."""
    layer = copy.deepcopy(p.layer)
    with forward_ad.dual_level():
        y = forward_ad.unpack_dual(layer(forward_ad.make_dual(p.values[0], p.tangents[0][0])))
        for name, tensor in layer.state_dict(keep_vars=True).items():
            assert forward_ad.unpack_dual(tensor).tangent is None, name
    return tuple(y)


def tangent_along_the_input(p: Problem) -> Tensors:
    tangents = (p.tangents[0][0], *(torch.zeros_like(value) for value in p.values[1:]))
    return p(*p.values), pushforward(p, p.values, tangents)


@functools.cache
def torch_checkpoints_dual_numbers() -> bool:
    """Whether the installed torch does for a function of its own; 2.6 does not."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(1, requires_grad=True), torch.ones(1))
        try:
            checkpoint(torch.sin, dual, use_reentrant=False)
        except NotImplementedError:
            return False
    return True


def dual_numbers_in_a_checkpoint(p: Problem) -> Tensors:
    if not torch_checkpoints_dual_numbers():
        pytest.skip('the installed torch checkpoints no dual numbers')
    values = p.needing_gradients()
    with forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, values, p.tangents[0]))
        gradients = torch.autograd.grad(p.loss_of(p.checkpointed(*duals)), values)
        return tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)


def jvp(p: Problem) -> Tensors:
    return torch.func.jvp(p, p.values, p.tangents[0])


def linearize(p: Problem) -> Tensors:
    y, function = torch.func.linearize(p, *p.values)
    return y, function(*p.tangents[0])


def jacfwd(p: Problem) -> Tensors:
    return (torch.func.jacfwd(p.along)(p.values[0].new_zeros(2)),)


def functional_jvp(p: Problem) -> Tensors:
    return torch.autograd.functional.jvp(p, p.values, p.tangents[0])


def grad(p: Problem) -> Tensors:
    return torch.func.grad(p.loss, tuple(range(len(p.values))))(*p.values)


def vjp(p: Problem) -> Tensors:
    return torch.func.vjp(p, *p.values)[1](p.cotangents[0])


def projected(p: Problem, *values: torch.Tensor) -> torch.Tensor:
    return (p.cotangents * p(*values)).flatten(1).sum(1)


def jacrev(p: Problem) -> Tensors:
    return torch.func.jacrev(functools.partial(projected, p), tuple(range(len(p.values))))(*p.values)


def batched_gradients(p: Problem) -> Tensors:
    values = p.needing_gradients()
    return torch.autograd.grad(p(*values), values, p.cotangents, is_grads_batched=True)


def batched_gradients_of_a_checkpoint(p: Problem) -> Tensors:
    values = p.needing_gradients()
    return torch.autograd.grad(p.checkpointed(*values), values, p.cotangents, is_grads_batched=True)


def vmap_of_backward(p: Problem) -> Tensors:
    values = p.needing_gradients()
    y = p(*values)
    return torch.func.vmap(lambda cotangent: torch.autograd.grad(y, values, cotangent, retain_graph=True))(p.cotangents)


def vmap_of_backward_of_a_checkpoint(p: Problem) -> Tensors:
    values = p.needing_gradients()
    y = p.checkpointed(*values)
    return torch.func.vmap(lambda cotangent: torch.autograd.grad(y, values, cotangent))(p.cotangents)


def dual_cotangents_of_a_checkpoint(p: Problem) -> Tensors:
    values = p.needing_gradients()
    y = p.checkpointed(*values)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(y, values, forward_ad.make_dual(p.cotangents[1], p.cotangents[0]))
        return tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)


def gradient_of_batched_gradients(p: Problem) -> Tensors:
    values = p.needing_gradients()
    y = curved(p, *values)
    gradients = torch.autograd.grad(y, values, p.cotangents, is_grads_batched=True, create_graph=True)
    total = sum(gradient.square().sum() for gradient in gradients)
    return torch.autograd.grad(total, values, materialize_grads=True)


def vectorised_jacobian(p: Problem) -> Tensors:
    return torch.autograd.functional.jacobian(functools.partial(projected, p), p.values, vectorize=True)


def vectorised_jacobian_forward(p: Problem) -> Tensors:
    steps = p.values[0].new_zeros(2)
    return (torch.autograd.functional.jacobian(p.along, steps, vectorize=True, strategy='forward-mode'),)


def dual_cotangents(p: Problem) -> Tensors:
    """Forward mode only over the backward pass."""
    values = p.needing_gradients()
    y = p(*values)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(y, values, forward_ad.make_dual(p.cotangents[1], p.cotangents[0]))
        return tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)


def dual_numbers_over_reverse(p: Problem) -> Tensors:
    values = p.needing_gradients()
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(p.loss(*map(forward_ad.make_dual, values, p.tangents[0])), values)
        return tuple(forward_ad.unpack_dual(gradient).tangent for gradient in gradients)


def reverse_over_dual_numbers(p: Problem) -> Tensors:
    values = p.needing_gradients()
    with forward_ad.dual_level():
        loss = p.loss(*map(forward_ad.make_dual, values, p.tangents[0]))
        return torch.autograd.grad(forward_ad.unpack_dual(loss).tangent, values)


def jvp_of_grad(p: Problem) -> Tensors:
    return torch.func.jvp(torch.func.grad(p.loss, tuple(range(len(p.values)))), p.values, p.tangents[0])[1]


def grad_of_jvp(p: Problem) -> Tensors:
    def tangent(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(p.loss, values, p.tangents[0])[1]

    return torch.func.grad(tangent, tuple(range(len(p.values))))(*p.values)


def loss_of_steps(p: Problem, steps: torch.Tensor) -> torch.Tensor:
    return p.loss_of(p.along(steps))


def hessian(p: Problem) -> Tensors:
    return (torch.func.hessian(functools.partial(loss_of_steps, p))(p.values[0].new_zeros(2)),)


def jacrev_of_jacfwd(p: Problem) -> Tensors:
    function = torch.func.jacfwd(functools.partial(loss_of_steps, p))
    return (torch.func.jacrev(function)(p.values[0].new_zeros(2)),)


def vectorised_hessian(p: Problem) -> Tensors:
    function, steps = functools.partial(loss_of_steps, p), p.values[0].new_zeros(2)
    return (torch.autograd.functional.hessian(function, steps, vectorize=True),)


def vmapped(p: Problem, values: Tensors, in_dims: tuple[int | None, ...]) -> Tensors:
    """As an ensemble: the buffers that a training pass moves have to be stacked too, as those of BatchNorm."""
    before, after = p.buffers(), p.buffers()
    p.call(after, *p.values)
    dims = {name: None if torch.equal(before[name], moved) else 0 for name, moved in after.items()}
    buffers = {name: value if dims[name] is None else torch.stack([value] * MEMBERS) for name, value in before.items()}

    def function(buffers: dict[str, torch.Tensor], *values: torch.Tensor) -> Tensors:
        return p.call(buffers, *values), *buffers.values()

    return torch.func.vmap(function, (dims, *in_dims))(buffers, *values)


def vmap_over_inputs(p: Problem) -> Tensors:
    values = (stacked(p.members())[0], *p.values[1:])
    return vmapped(p, values, (0, *(None for _ in p.values[1:])))


def vmap_over_parameters(p: Problem) -> Tensors:
    values = (p.values[0], *stacked(p.members())[1:])
    return vmapped(p, values, (None, *(0 for _ in p.values[1:])))


def vmap_over_everything(p: Problem) -> Tensors:
    return vmapped(p, stacked(p.members()), tuple(0 for _ in p.values))


def stacked_buffers(p: Problem) -> dict[str, torch.Tensor]:
    return {name: torch.stack([buffer] * MEMBERS) for name, buffer in p.layer.named_buffers()}


def loss_with(p: Problem, buffers: dict[str, torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
    return p.loss_of(p.call({name: buffer.clone() for name, buffer in buffers.items()}, *values))


def vmap_of_grad(p: Problem) -> Tensors:
    function = torch.func.grad(functools.partial(loss_with, p), tuple(range(1, len(p.values) + 1)))
    return torch.func.vmap(function)(stacked_buffers(p), *stacked(p.members()))


def grad_of_vmap(p: Problem) -> Tensors:
    def total(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(functools.partial(loss_with, p))(stacked_buffers(p), *values).sum()

    return torch.func.grad(total, tuple(range(len(p.values))))(*stacked(p.members()))


def vmap_of_jvp(p: Problem) -> Tensors:
    def tangent(buffers: dict[str, torch.Tensor], *values: torch.Tensor) -> torch.Tensor:
        def function(*values: torch.Tensor) -> torch.Tensor:
            return p.call({name: buffer.clone() for name, buffer in buffers.items()}, *values)

        return torch.func.jvp(function, values, p.tangents[0])[1]

    return (torch.func.vmap(tangent)(stacked_buffers(p), *stacked(p.members())),)


def jvp_of_vmap(p: Problem) -> Tensors:
    def function(*values: torch.Tensor) -> torch.Tensor:
        return torch.func.vmap(p.call)({name: b.clone() for name, b in stacked_buffers(p).items()}, *values)

    members = stacked(p.members())
    tangents = tuple(tangent.expand_as(value) for tangent, value in zip(p.tangents[0], members))
    return (torch.func.jvp(function, members, tangents)[1],)


def per_sample_gradients(p: Problem) -> Tensors:
    def product(sample: torch.Tensor, cotangent: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return (p(sample[None], *parameters)[0] * cotangent).sum()

    arguments = (0, *range(2, len(p.values) + 1))
    function = torch.func.vmap(torch.func.grad(product, arguments), (0, 0, *(None for _ in p.values[1:])))
    gradients = function(p.values[0], p.cotangents[0], *p.values[1:])
    return (gradients[0][:, None], *gradients[1:])


@dataclasses.dataclass(frozen=True)
class Transform:
    """What torch makes of a layer, and the same from plain reverse mode.

    Args:
        found: The transform.
        expected: Its reference.
        in_training: Whether it is defined in training, where BatchNorm knows no single sample.
        of_norms: Whether torch gets it right for its own BatchNorm in training, whose forward mode it differentiates as
            if the mean and the variance of the batch were constants.
    """

    found: Callable[[Problem], Tensors]
    expected: Callable[[Problem], Tensors]
    in_training: bool = True
    of_norms: bool = True

    def __str__(self) -> str:
        return self.found.__name__


TRANSFORMS = (
    Transform(dual_numbers, output_and_tangent),
    Transform(dual_input, tangent_along_the_input),
    Transform(dual_numbers_in_a_checkpoint, hessian_times_tangent),
    Transform(jvp, output_and_tangent),
    Transform(linearize, output_and_tangent),
    Transform(functional_jvp, output_and_tangent),
    Transform(jacfwd, both_tangents),
    Transform(vectorised_jacobian_forward, both_tangents),
    Transform(grad, gradient_of_loss),
    Transform(vjp, one_gradient),
    Transform(dual_cotangents, one_gradient),
    Transform(jacrev, each_gradient),
    Transform(vectorised_jacobian, each_gradient),
    Transform(batched_gradients, each_gradient),
    Transform(batched_gradients_of_a_checkpoint, each_gradient),
    Transform(vmap_of_backward, each_gradient),
    Transform(vmap_of_backward_of_a_checkpoint, each_gradient),
    Transform(dual_cotangents_of_a_checkpoint, one_gradient),
    Transform(gradient_of_batched_gradients, gradient_of_squared_gradients),
    Transform(dual_numbers_over_reverse, hessian_times_tangent),
    Transform(reverse_over_dual_numbers, hessian_times_tangent, of_norms=False),
    Transform(jvp_of_grad, hessian_times_tangent),
    Transform(grad_of_jvp, hessian_times_tangent, of_norms=False),
    Transform(hessian, hessian_of_steps, of_norms=False),
    Transform(jacrev_of_jacfwd, hessian_of_steps, of_norms=False),
    Transform(vectorised_hessian, hessian_of_steps),
    Transform(vmap_over_inputs, lambda p: outputs_of(p, with_own_inputs(p))),
    Transform(vmap_over_parameters, lambda p: outputs_of(p, with_own_parameters(p))),
    Transform(vmap_over_everything, lambda p: outputs_of(p, p.members())),
    Transform(vmap_of_grad, gradients_of_each_member),
    Transform(grad_of_vmap, gradients_of_each_member),
    Transform(vmap_of_jvp, tangents_of_each_member),
    Transform(jvp_of_vmap, tangents_of_each_member),
    Transform(per_sample_gradients, gradients_of_each_sample, in_training=False),
)


@functools.cache
def reference(expected: Callable[[Problem], Tensors], *problem: Any) -> Tensors:
    return expected(Problem.of(*problem).in_float64())


def assert_transforms(transform: Transform, method: Method, case: Any, dtype: torch.dtype, *where: Any) -> None:
    with warnings.catch_warnings():
        # a rule that torch lacks is run sample by sample, and linearize warns of itself: so for torch's own layers
        warnings.simplefilter('ignore')
        found = transform.found(Problem.of(method, case, dtype, *where))
    expected = reference(transform.expected, method, case, dtype, *where)
    assert len(found) == len(expected)
    # of the largest of all: the gradient of a bias in front of a BatchNorm, say, is zero
    bound = TOLERANCE[dtype] * max([1.0, *(tensor.abs().max().item() for tensor in expected if tensor.numel() > 0)])
    for index, (ours, wanted) in enumerate(zip(found, expected)):
        assert ours.dtype == (dtype if wanted.is_floating_point() else wanted.dtype), index
        name = f'{transform} of {method}, {case}, {dtype}, training and batch {where}, {index}'
        torch.testing.assert_close(
            ours.to(wanted), wanted, rtol=0, atol=bound, msg=lambda message, name=name: f'{name}: {message}'
        )


# In every run what a method has of its own, in the mode and dtype in which it does most; all of it takes minutes.
OFTEN_SLOW = (linearize, jacrev_of_jacfwd, vectorised_hessian, vectorised_jacobian_forward, vmap_over_everything)
often = pytest.mark.parametrize(
    'transform',
    [pytest.param(t, marks=[pytest.mark.slow] if t.found in OFTEN_SLOW else []) for t in TRANSFORMS],
    ids=str,
)


def is_defined(transform: Transform, method: Method, training: bool, batch: int) -> bool:
    if batch == 0 and transform.found is per_sample_gradients:
        return False
    return not training or (transform.in_training and (transform.of_norms or method not in (PLAIN, BLOCK)))


@often
@pytest.mark.parametrize('method', [method for method in ROWS if method.is_default], ids=str)
def test_transform(transform: Transform, method: Method) -> None:
    training = is_defined(transform, method, True, 8)
    assert_transforms(transform, method, MANY, torch.float64, training, WAYS[MANY])


@often
@pytest.mark.parametrize('method', TRANSPOSED_METHODS, ids=str)
def test_transform_of_a_transposed_layer(transform: Transform, method: Method) -> None:
    assert_transforms(transform, method, TRANSPOSED[0], torch.float64, False, 2)


# But linearize, which takes long, and which torch gets wrong for its own convolution with circular padding.
every_transform = pytest.mark.parametrize('transform', [t for t in TRANSFORMS if t.found is not linearize], ids=str)
TABLE = [
    *((method, case, batch) for method in ROWS for case, batch in WAYS.items() if method.admits(case)),
    *((method, case, 2) for method in ROWS for case in FEW if method.admits(case)),
    *((method, case, 2) for method in TRANSPOSED_METHODS for case in TRANSPOSED if method.admits(case)),
]


@pytest.mark.slow
@every_transform
@pytest.mark.parametrize('dtype', TOLERANCE, ids=identifier)
@both_modes
def test_transform_of_everything(transform: Transform, dtype: torch.dtype, training: bool) -> None:
    for method, case, batch in TABLE:
        if is_defined(transform, method, training, batch):
            assert_transforms(transform, method, case, dtype, training, batch)


@pytest.mark.slow
@every_transform
@both_modes
def test_transform_of_an_empty_batch(transform: Transform, training: bool) -> None:
    for method, case, _ in TABLE:
        # torch refuses batched gradients of its own convolution with circular padding there
        if is_defined(transform, method, training, 0) and getattr(case, 'padding_mode', '') != 'circular':
            assert_transforms(transform, method, case, torch.float64, training, 0)


@pytest.mark.parametrize('method', [method for method in ROWS if method.is_default], ids=str)
@both_modes
def test_gradients_of_an_empty_batch(method: Method, training: bool) -> None:
    """They are there, and are zero, as those of a plain convolution: processes wait for the gradients of each other."""
    transform = next(transform for transform in TRANSFORMS if transform.found is batched_gradients)
    for case in WAYS:
        assert_transforms(transform, method, case, torch.float64, training, 0)


@pytest.mark.parametrize(
    'method, training',
    [
        pytest.param(
            method, training, marks=[] if training and method.name in ('acconv', 'dyconv') else pytest.mark.slow
        )
        for method in ROWS
        for training in (False, True)
    ],
    ids=str,
)
def test_derivatives_are_those_of_finite_differences(method: Method, training: bool) -> None:
    case = Case('tiny', 3, padding=1, groups=2, bias=True, in_channels=4, out_channels=2, size=(4, 3))
    problem = Problem.of(method, case, torch.float64, training, 2)
    values, checks = problem.needing_gradients(), dict(fast_mode=True, check_batched_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert torch.autograd.gradcheck(
            problem, values, check_forward_ad=True, check_batched_forward_grad=True, **checks
        )
        assert torch.autograd.gradgradcheck(problem, values, check_fwd_over_rev=True, **checks)


def assert_traced(method: Method, case: Any, training: bool, batch: int, others: tuple[int, ...]) -> None:
    layer = Problem.of(method, case, torch.float64, training, 2).layer
    traced = torch.jit.trace(copy.deepcopy(layer), case.input(batch=batch), check_trace=False)
    # tracing is a pass; a trace saves every buffer
    traced.load_state_dict({**layer.state_dict(), **dict(layer.named_buffers())})
    for other in others:
        name = f'{method}, {case}, traced at {batch}, called at {other}'
        found, expected = traced(case.input(batch=other)), layer(case.input(batch=other))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f'{name}: {m}')
        for entry, tensor in layer.state_dict().items():
            # a trace divides the counts of values, which are integers, in float32
            torch.testing.assert_close(traced.state_dict()[entry], tensor, rtol=1e-7, atol=0, msg=f'{name}: {entry}')


without_warnings_of_traces = pytest.mark.filterwarnings(
    'ignore:.*torch.jit.*', 'ignore::torch.jit.TracerWarning', 'ignore:Converting a tensor'
)


@without_warnings_of_traces
@pytest.mark.parametrize('method', [method for method in METHODS if method.is_default], ids=str)
@both_modes
def test_traced_at_one_batch_size_and_called_at_others(method: Method, training: bool) -> None:
    for case in WAYS:
        assert_traced(method, case, training, 2, (1, 2, 9, 0))


@without_warnings_of_traces
@pytest.mark.slow
@pytest.mark.parametrize('batch', [1, 2, 8])
@both_modes
def test_everything_traced_at_one_batch_size_and_called_at_others(training: bool, batch: int) -> None:
    for method, case, _ in TABLE:
        assert_traced(method, case, training, batch, (1, 2, 9, 0))


def test_recomputed_branches_are_those_of_functional_call() -> None:
    """The second pass comes when the layer has its own parameters again."""
    where = (MANY, torch.float64, True, 2)
    plain, recomputed = (Problem.of(method, *where) for method in (KEPT, RECOMPUTED))
    values = recomputed.members()[0]
    cotangent = recomputed.cotangents[0]
    for found, expected in zip(pullback(recomputed, values, cotangent), pullback(plain, values, cotangent)):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('method', ROWS, ids=str)
def test_buffers_that_a_pass_moves_are_arguments_of_a_transform(method: Method) -> None:
    """As of BatchNorm: torch refuses to move what a transformed function only refers to."""
    problem = Problem.of(method, MANY, torch.float64, True, 2)
    before = problem.buffers()
    problem.layer(problem.values[0])
    moves = any(not torch.equal(tensor, before[name]) for name, tensor in problem.buffers().items())
    moved = problem.buffers()
    assert moves == (method in (PLAIN, BLOCK, RECOMPUTED) or method.has_statistics or method.dynamic)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return problem.layer(x).sum()

    with pytest.raises(RuntimeError, match='mutate a captured Tensor') if moves else contextlib.nullcontext():
        torch.func.grad(loss)(problem.values[0])
    # nothing of the transform is left behind in the layer
    for name, tensor in problem.buffers().items():
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor), name
        assert tensor.isfinite().all() and tensor.shape == moved[name].shape
    torch.func.grad(lambda x: problem.layer.eval()(x).sum())(problem.values[0])
