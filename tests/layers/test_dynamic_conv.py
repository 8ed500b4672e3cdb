"""DynamicConv2d beyond what all layers share: attention, the schedule of its temperature, the inference form."""

import copy
import functools
import itertools
import math
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.utils.parametrize as parametrize
from timm.layers import set_exportable
from timm.utils import ModelEmaV3
from torch.utils.checkpoint import checkpoint

from timm_reparam import ReparamError
from timm_reparam.layers import DynamicConv2d
from timm_reparam.layers._tensor import fast_uniform_

from . import oracles
from .cases import (
    ALGEBRA,
    CASES,
    CLEARLY,
    METHODS,
    OFTEN_NAMES,
    Case,
    Method,
    assert_same_state,
    assert_within,
    generator,
    identifier,
    in_float64,
    magnitude,
    normal,
    often,
    products,
    randomise,
    randomised,
    relative_difference,
    state,
    unit_roundoff,
)

DYNAMIC_METHODS = tuple(method for method in METHODS if method.dynamic)
BIASED = Case('biased', 3, padding=1, bias=True)
POINTWISE = Case('pointwise', 1, bias=True)
DEPTHWISE = Case('depthwise', 3, padding=1, groups=4, out_channels=4)

everything = pytest.mark.parametrize('method, case', products(DYNAMIC_METHODS, CASES), ids=identifier)
most_often = pytest.mark.parametrize('method, case', often(DYNAMIC_METHODS, CASES), ids=identifier)


def temperature_of(layer: DynamicConv2d, start: float = 30.0) -> float:
    """The layer's temperature, after a look at the formula: it may be float32, everything else here is not."""
    found = layer.current_temperature().item()
    expected = oracles.temperature_at(start, int(layer.temperature_position), int(layer.temperature_steps))
    assert found == pytest.approx(expected, rel=1e-6)
    return found


def scheduled(steps: int, case: Case = BIASED, position: int = 0, **options) -> DynamicConv2d:
    """A randomised layer in train mode at some point of its schedule."""
    layer = DynamicConv2d.from_conv(case.conv(), temperature_steps=steps, **options)
    randomise(layer, generator(2))
    layer.temperature_position.fill_(position)
    return layer.train()


# The formula ----------------------------------------------------------------------------------------------------------


@everything
def test_formula(method: Method, case: Case) -> None:
    layer, x = randomised(method, case), case.input(batch=3)
    temperature = temperature_of(layer)
    assert temperature == 15.5
    kernels = oracles.dynamic_kernels(layer, x, temperature)
    expected = oracles.dynamic_conv(layer, x, case, temperature)
    # No two samples see the same kernel.
    assert relative_difference(kernels[0], kernels[1]) > CLEARLY
    assert relative_difference(layer.sample_kernels(x), kernels) <= ALGEBRA
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.train()(x), expected) <= ALGEBRA
    after = oracles.dynamic_conv(layer, x, case, temperature_of(layer))
    assert relative_difference(layer(x), after) <= ALGEBRA


@pytest.mark.parametrize('batch', [1, 2, 9])
@pytest.mark.parametrize('case', [BIASED, POINTWISE, DEPTHWISE], ids=identifier)
@pytest.mark.parametrize('size', [(1, 1), (3, 2), (16, 17)], ids=str)
def test_formula_over_batches_and_sizes(case: Case, batch: int, size: tuple[int, int]) -> None:
    """Which way of computing is fastest depends on the shape; what is computed does not."""
    case = Case(**{**vars(case), 'size': size})
    layer, x = scheduled(10, case, position=3), case.input(batch=batch)
    expected = oracles.dynamic_conv(layer, x, case, temperature_of(layer))
    assert relative_difference(layer(x), expected) <= ALGEBRA
    layer.eval()
    expected = oracles.dynamic_conv(layer, x, case, temperature_of(layer))
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.fuse()(x), expected) <= ALGEBRA
    with torch.no_grad():
        assert relative_difference(layer(x), expected) <= ALGEBRA


WAYS = (DynamicConv2d._mix_kernels, DynamicConv2d._mix_outputs, DynamicConv2d._mix_outputs_1x1)


@most_often
@pytest.mark.parametrize('batch', [1, 9], ids=['one_image', 'images'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['', 'channels_last'])
def test_every_way_of_computing_is_the_same_function(
    method: Method, case: Case, batch: int, memory_format: torch.memory_format
) -> None:
    """Output and gradients."""
    results = []
    for way in WAYS if case.area == 1 and case.groups == 1 and case.padding == 0 else WAYS[:2]:
        layer, x = randomised(method, case), case.input(batch=batch)
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        coefficients = normal((batch, layer.num_kernels - 1), generator(3)).requires_grad_()
        y = way(layer, x, coefficients)
        (y * normal(y.shape, generator(4))).sum().backward()
        gradients = [value.grad for value in (x, coefficients, layer.weight, layer.residual_weight)]
        if layer.bias is not None:
            gradients += [layer.bias.grad, layer.residual_bias.grad]
        results.append([y, *gradients])
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert relative_difference(found, expected) <= ALGEBRA


@pytest.mark.parametrize('batch', [1, 9])
@pytest.mark.parametrize('case', [POINTWISE, BIASED], ids=identifier)
def test_memory_format_of_the_output_is_that_of_the_input(case: Case, batch: int) -> None:
    """So that no layer of a model in channels-last order copies its input."""
    layer, x = DynamicConv2d.from_conv(case.conv()), torch.randn(batch, 4, 9, 9, dtype=torch.float64)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert layer._is_pointwise() == (case is POINTWISE) and not layer._has_few_positions(x)
        if case is POINTWISE or batch == 1:
            assert layer(x.to(memory_format=memory_format)).is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    'case, positions, few',
    [
        (POINTWISE, (3, 4), True),
        (POINTWISE, (4, 4), False),
        (Case('strided', 1, stride=2), (6, 8), True),
        (BIASED, (7, 7), True),
        (BIASED, (7, 8), False),
        (DEPTHWISE, (1, 1), False),
    ],
    ids=str,
)
def test_outputs_are_mixed_where_they_are_few(case: Case, positions: tuple[int, int], few: bool) -> None:
    layer = DynamicConv2d.from_conv(case.conv())
    assert layer._has_few_positions(torch.empty(2, 4, *positions)) == few
    assert not layer._has_few_positions(torch.empty(1, 4, *positions))


def test_pooling_does_not_overflow_in_float16() -> None:
    layer = DynamicConv2d.from_conv(POINTWISE.conv(torch.float16))
    randomise(layer, generator(2))
    assert layer(torch.full((1, 4, 64, 64), 60.0, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize('batch', [1, 2, 9])
def test_mix(batch: int) -> None:
    layer = DynamicConv2d(1, 1, 1, num_kernels=4)
    inputs = [normal(shape, generator(i)).requires_grad_() for i, shape in enumerate([(batch, 3), (2, 3), (6, 3)])]
    expected = inputs[1] + torch.einsum('bk,koi->boi', inputs[0], inputs[2].view(3, 2, 3))
    assert relative_difference(layer._mix(*inputs), expected) <= ALGEBRA
    assert torch.autograd.gradcheck(layer._mix, inputs)
    assert torch.autograd.gradgradcheck(layer._mix, inputs)
    coefficients, mean, residuals = (value.detach() for value in inputs)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        mean, residuals = mean.to(dtype), residuals.to(dtype)
        uniform = layer._mix(torch.zeros_like(coefficients, dtype=dtype), mean, residuals)
        assert torch.equal(uniform, mean.expand(batch, 2, 3))


@pytest.mark.parametrize('num_kernels', [2, 3, 4, 8])
@pytest.mark.parametrize(
    'in_channels, reduction, hidden', [(3, 4, 4), (4, 4, 4), (16, 4, 4), (32, 4, 8), (36, 5, 7), (32, 1, 32)]
)
def test_parameters(num_kernels: int, in_channels: int, reduction: int, hidden: int) -> None:
    options = {'num_kernels': num_kernels, 'reduction': reduction}
    for bias in (False, True):
        conv = nn.Conv2d(in_channels, 6, (3, 5), bias=bias)
        for layer in (
            DynamicConv2d.from_conv(conv, **options),
            DynamicConv2d(in_channels, 6, (3, 5), bias=bias, **options),
        ):
            shapes = {name: tuple(value.shape) for name, value in layer.named_parameters()}
            assert shapes['weight'] == (6, in_channels, 3, 5)
            assert shapes['residual_weight'] == ((num_kernels - 1) * 6, in_channels, 3, 5)
            assert shapes['attention.fc1.weight'] == (hidden, in_channels)
            assert shapes['attention.fc2.weight'] == (num_kernels, hidden)
            assert ('residual_bias' in shapes) == ('bias' in shapes) == bias
            if bias:
                assert shapes['residual_bias'] == ((num_kernels - 1) * 6,)
            buffers = {name: value for name, value in layer.state_dict().items() if name not in shapes}
            assert set(buffers) == {'temperature_position', 'temperature_steps'}
            assert {buffer.dtype for buffer in buffers.values()} == {torch.int64}
            assert int(buffers['temperature_position']) == 0
            assert int(buffers['temperature_steps']) == 10_000


def test_lift_starts_with_uniform_attention_and_residuals_apart() -> None:
    """Residuals of zero would leave attention without a gradient, and the K kernels without a difference."""
    layer = DynamicConv2d.from_conv(BIASED.conv())
    assert (layer.attention.fc2.weight == 0).all()
    assert (layer.attention.fc2.bias == 0).all()
    assert (layer.attention.fc1.weight != 0).any()
    assert (layer.residual_weight != 0).all()
    assert layer.residual_weight.std() < layer.weight.std()
    x = BIASED.input()
    (layer.train()(x) * torch.randn(2, 6, 9, 8, generator=generator(3), dtype=torch.float64)).sum().backward()
    assert (layer.attention.fc2.weight.grad != 0).any()


def test_scratch_start_is_k_kernels_around_that_of_the_convolution() -> None:
    """They differ as independent draws of its spread do, and their mean is the kernel of the convolution itself."""
    torch.manual_seed(3)
    conv = nn.Conv2d(16, 32, 3, dtype=torch.float64)
    spread, before = conv.weight.std().item(), state(conv)
    for layer in (DynamicConv2d(16, 32, 3, dtype=torch.float64), DynamicConv2d.from_conv(conv, init='scratch')):
        kernels = torch.stack(oracles.stacked(layer.weight, layer.residual_weight))
        biases = torch.stack(oracles.stacked(layer.bias, layer.residual_bias))
        assert layer.weight.std().item() == pytest.approx(spread, rel=0.05)
        for drawn, mean in ((kernels, layer.weight), (biases, layer.bias)):
            assert torch.allclose(drawn.mean(dim=0), mean, rtol=0, atol=1e-12)
            assert (drawn - mean).std() > 0
        for one, other in itertools.combinations(kernels, 2):
            assert (one - other).std().item() == pytest.approx(2**0.5 * spread, rel=0.05)
        # Independent of the mean; of each other as deviations from it can be.
        deviations = torch.corrcoef(torch.stack([layer.weight, *(kernels - layer.weight)]).flatten(1))
        expected = torch.full((5, 5), -1 / 3, dtype=torch.float64)
        expected[0] = expected[:, 0] = 0
        assert (deviations - expected.fill_diagonal_(1)).abs().max() < 0.1
    assert_same_state(conv, before)


def test_stem_with_three_channels() -> None:
    case = Case('stem', 3, stride=2, padding=1, in_channels=3)
    layer, x = scheduled(10, case, position=5), case.input()
    assert layer.attention.fc1.out_features == 4
    assert relative_difference(layer(x), oracles.dynamic_conv(layer, x, case, 15.5)) <= ALGEBRA


def test_uniform_attention_leaves_no_trace_in_any_dtype() -> None:
    """Every coefficient of a residual is exactly zero, however large the residuals and the input are."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        conv, x = BIASED.conv(dtype), 100 * BIASED.input(dtype, batch=3)
        for num_kernels in (2, 3, 4, 7):
            layer = DynamicConv2d.from_conv(conv, num_kernels=num_kernels)
            with torch.no_grad():
                layer.residual_weight.mul_(1000)
            assert torch.equal(layer.sample_kernels(x), conv.weight.expand(3, *conv.weight.shape))


def test_autocast_does_not_reach_the_composition() -> None:
    x = BIASED.input(torch.float32)
    lifted = DynamicConv2d.from_conv(BIASED.conv(torch.float32))
    layer = randomised(DYNAMIC_METHODS[0], BIASED, torch.float32)
    outside = layer.sample_kernels(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(lifted.sample_kernels(x), lifted.weight.expand(2, *lifted.weight.shape))
        found = layer.sample_kernels(x)
        assert layer(x).dtype == torch.bfloat16
    assert found.dtype == torch.float32
    assert (found != found.bfloat16().float()).any()
    assert relative_difference(found, outside) < 0.02


# Temperature ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('start, steps', [(30.0, 10), (30.0, 1), (4.5, 3), (1.0, 5)])
def test_temperature_falls_linearly_and_never_below_one(start: float, steps: int) -> None:
    layer = DynamicConv2d(4, 6, 1, temperature=start, temperature_steps=steps).train()
    x = torch.ones(1, 4, 2, 2)
    for position in range(steps + 4):
        found = layer.current_temperature()
        assert found.shape == ()
        assert int(layer.temperature_position) == position
        assert found.item() == pytest.approx(oracles.temperature_at(start, position, steps), rel=1e-6)
        assert found >= 1
        layer(x)
    assert layer.current_temperature() == 1


def test_forward_uses_the_temperature_before_it_advances() -> None:
    layer, x = scheduled(4), BIASED.input()
    for temperature in (30, 22.75, 15.5, 8.25, 1, 1):
        expected = oracles.dynamic_conv(layer, x, BIASED, temperature)
        assert relative_difference(layer(x), expected) <= ALGEBRA


def test_only_training_passes_count() -> None:
    layer, x = scheduled(100), BIASED.input()
    layer(x)
    layer(x)
    with torch.no_grad():  # as update_bn does
        layer(x)
    assert int(layer.temperature_position) == 2
    layer.eval()
    before = state(layer)
    first = layer(x)
    layer.sample_kernels(x)
    layer.current_temperature()
    with torch.inference_mode():
        assert torch.equal(layer(x), first)
    assert_same_state(layer, before)
    layer.train().sample_kernels(x)
    layer.fuse()
    assert_same_state(layer, before)


def test_eval_uses_the_current_temperature() -> None:
    x = BIASED.input()
    outputs = {}
    for position in (0, 5, 10):
        layer = scheduled(10, position=position).eval()
        outputs[position] = layer(x)
        expected = oracles.dynamic_conv(layer, x, BIASED, temperature_of(layer))
        assert relative_difference(outputs[position], expected) <= ALGEBRA
    assert relative_difference(outputs[0], outputs[5]) > CLEARLY
    assert relative_difference(outputs[5], outputs[10]) > CLEARLY


def test_schedule_counts_past_256_in_bfloat16() -> None:
    """A counter of the layer's own dtype would stand still at 256."""
    layer = DynamicConv2d(4, 4, 1, temperature_steps=600).bfloat16().train()
    assert layer.temperature_position.dtype == layer.temperature_steps.dtype == torch.int64
    x = torch.ones(1, 4, 1, 1, dtype=torch.bfloat16)
    for _ in range(300):
        layer(x)
    assert int(layer.temperature_position) == 300
    assert layer.current_temperature().item() == pytest.approx(15.5, rel=0.01)
    layer.float()
    assert layer.current_temperature().item() == pytest.approx(15.5, rel=1e-6)


@pytest.mark.parametrize('convert', ['half', 'bfloat16', 'float', 'double'])
def test_schedule_survives_a_change_of_dtype(convert: str) -> None:
    layer = scheduled(1000, position=601)
    getattr(layer, convert)()
    assert int(layer.temperature_position) == 601
    assert int(layer.temperature_steps) == 1000
    assert layer.temperature_position.dtype == torch.int64


def test_schedule_is_in_the_checkpoint() -> None:
    """Length and position both: a layer built with another length resumes the one that was saved."""
    layer, x = scheduled(10, position=4), BIASED.input()
    fresh = DynamicConv2d.from_conv(BIASED.conv(seed=9))
    fresh.load_state_dict(layer.state_dict())
    assert fresh.current_temperature() == layer.current_temperature()
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.train()
        trained = copy.deepcopy(layer)
        for _ in range(8):
            assert torch.equal(other(x), trained(x))
        assert int(other.temperature_position) == 12
    assert int(layer.temperature_position) == 4


def test_schedule_survives_model_ema() -> None:
    model = nn.Sequential(scheduled(10), nn.ReLU())
    ema = ModelEmaV3(model, decay=0.9)
    for step in range(1, 4):
        model(BIASED.input())
        ema.update(model, step=step)
        assert int(ema.module[0].temperature_position) == step
        assert int(ema.module[0].temperature_steps) == 10
        assert ema.module[0].current_temperature() == model[0].current_temperature()
    assert int(model[0].temperature_position) == 3


def test_reset_temperature() -> None:
    layer, x = scheduled(10, position=7), BIASED.input()
    layer.reset_temperature()
    assert (int(layer.temperature_position), int(layer.temperature_steps)) == (0, 10)
    assert layer.current_temperature() == 30
    layer(x)
    layer.reset_temperature(steps=2)
    assert (int(layer.temperature_position), int(layer.temperature_steps)) == (0, 2)
    layer(x)
    assert layer.current_temperature() == 15.5
    layer(x)
    assert layer.current_temperature() == 1
    assert layer.temperature_position.dtype == layer.temperature_steps.dtype == torch.int64


def test_buffers_are_not_replaced() -> None:
    """A graph that was captured, or a broadcast of buffers, holds on to the tensors themselves."""
    layer = scheduled(10)
    position, steps = layer.temperature_position, layer.temperature_steps
    layer(BIASED.input())
    layer.reset_temperature(steps=5)
    layer(BIASED.input())
    assert layer.temperature_position is position
    assert layer.temperature_steps is steps


# Gradient checkpointing -----------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Two dynamic layers in checkpointed segments, behind a layer that makes their input require a gradient."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = Case('first', 1, out_channels=4).conv()
        self.segments = nn.ModuleList(
            nn.Sequential(scheduled(6, Case('dynamic', 3, padding=1, out_channels=4, bias=bias)), nn.Tanh())
            for bias in (False, True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for segment in self.segments:
            if self.use_reentrant is None:
                x = segment(x)
            else:
                x = checkpoint(segment, x, use_reentrant=self.use_reentrant)
        return x


def train_steps(model: Network, steps: int, passes: int) -> list[dict[str, torch.Tensor]]:
    """The gradients of some steps of SGD, each over some accumulated passes."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    gradients = []
    for step in range(steps):
        optimiser.zero_grad()
        for index in range(passes):
            x = BIASED.input(seed=30 + step * passes + index)
            (model(x).square().mean() / passes).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        for segment in model.segments:
            assert int(segment[0].temperature_position) == (step + 1) * passes
        optimiser.step()
    return gradients


@pytest.mark.parametrize('passes', [1, 2], ids=['every_pass', 'accumulated'])
@pytest.mark.parametrize('use_reentrant', [True, False], ids=['reentrant', 'non_reentrant'])
def test_checkpointing_repeats_the_pass_with_its_own_temperature(use_reentrant: bool, passes: int) -> None:
    expected = train_steps(Network(None), 4, passes)
    found = train_steps(Network(use_reentrant), 4, passes)
    for expected_step, found_step in zip(expected, found, strict=True):
        for name, gradient in expected_step.items():
            assert relative_difference(found_step[name], gradient) <= ALGEBRA, name


@pytest.mark.parametrize('use_reentrant', [True, False], ids=['reentrant', 'non_reentrant'])
def test_a_pass_without_gradients_in_between_changes_nothing(use_reentrant: bool) -> None:
    """It looks like the first pass of reentrant checkpointing, and no backward pass repeats it."""
    model = Network(use_reentrant)
    for step in range(1, 4):
        with torch.no_grad():
            model(BIASED.input(seed=90 + step))
        model(BIASED.input(seed=30 + step).requires_grad_()).square().mean().backward()
        for segment in model.segments:
            assert int(segment[0].temperature_position) == step


def test_options_name_the_length_of_the_schedule() -> None:
    layer = scheduled(100)
    layer.reset_temperature(70)
    assert layer.options()['temperature_steps'] == 70
    other = scheduled(5)
    other.load_state_dict(layer.state_dict())
    for each in (layer, other):
        assert each.options()['temperature_steps'] == 70
        each.reset_parameters()
        assert (int(each.temperature_position), int(each.temperature_steps)) == (0, 70)


def test_a_wrong_temperature_would_be_seen() -> None:
    """What the test above rests on: one step further in the schedule the gradients clearly are others."""
    early, late = Network(None), Network(None)
    for segment in late.segments:
        segment[0].temperature_position.add_(1)
    gradients = []
    for model in (early, late):
        model(BIASED.input()).square().mean().backward()
        gradients.append(model.segments[0][0].residual_weight.grad)
    assert relative_difference(*gradients) > CLEARLY


COMPILED = {
    'plain': lambda layer: torch.compile(layer, backend='aot_eager', fullgraph=True),
    'checkpoint_in_graph': lambda layer: torch.compile(
        lambda x: checkpoint(layer, x, use_reentrant=False), backend='aot_eager', fullgraph=True
    ),
    'checkpoint_of_graph': lambda layer: functools.partial(
        checkpoint, torch.compile(layer, backend='aot_eager', fullgraph=True), use_reentrant=False
    ),
    'reentrant_checkpoint_of_graph': lambda layer: functools.partial(
        checkpoint, torch.compile(layer, backend='aot_eager', fullgraph=True), use_reentrant=True
    ),
}


@pytest.mark.parametrize('compile_layer', COMPILED.values(), ids=COMPILED.keys())
def test_compiled_backward_sees_the_temperature_of_its_forward(compile_layer) -> None:
    """A compiled backward pass may compute T again, from a position that has moved on by then."""
    torch.compiler.reset()
    layer = scheduled(4)
    compiled_layer = copy.deepcopy(layer)
    compiled = compile_layer(compiled_layer)
    for step in range(1, 4):
        for module, forward in ((layer, layer), (compiled_layer, compiled)):
            module.zero_grad()
            forward(BIASED.input(seed=step).requires_grad_()).square().mean().backward()
            assert int(module.temperature_position) == step
        for name, parameter in layer.named_parameters():
            found = compiled_layer.get_parameter(name).grad
            assert relative_difference(found, parameter.grad) <= ALGEBRA, name


# The static graph for export ------------------------------------------------------------------------------------------


@most_often
def test_static_graph_is_the_same_function(method: Method, case: Case) -> None:
    for training in (False, True):
        layer, x = randomised(method, case).train(training), case.input(batch=3)
        with set_exportable(True):
            static = randomised(method, case).train(training)
        assert static.exportable and not layer.exportable
        for _ in range(2):
            found, expected = static(x), layer(x)
            assert relative_difference(found, expected) <= ALGEBRA
        assert_same_state(static, state(layer))
        for y in (found, expected):
            (y * normal(y.shape, generator(3))).sum().backward()
        for name, parameter in layer.named_parameters():
            # where one kernel has won the attention's gradient may be 0
            bound = ALGEBRA * max(parameter.grad.abs().max().item(), ALGEBRA)
            assert (static.get_parameter(name).grad - parameter.grad).abs().max() <= bound, name


@pytest.mark.parametrize('case', CASES, ids=identifier)
def test_static_graph_lifts_bit_for_bit(case: Case) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        conv, x = case.conv(dtype), case.input(dtype)
        with set_exportable(True):
            layer = DynamicConv2d.from_conv(conv)
        assert torch.equal(layer(x), conv(x))


def test_static_graph_stays_with_the_layer() -> None:
    with set_exportable(True):
        layer = scheduled(10)
    x = BIASED.input()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.fuse()):
        assert other.exportable
    assert relative_difference(layer.fuse()(x), layer.eval()(x)) <= ALGEBRA
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
    assert relative_difference(layer(x[0]), layer(x)[0]) <= ALGEBRA


def test_static_graph_under_autocast() -> None:
    with set_exportable(True):
        layer = randomised(DYNAMIC_METHODS[0], BIASED, torch.float32)
    x = BIASED.input(torch.float32)
    expected = in_float64(layer)(x.double())
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_difference(y.double(), expected) < 0.05


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning', 'ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
@pytest.mark.parametrize('case', [BIASED, POINTWISE, DEPTHWISE], ids=identifier)
def test_static_graph_is_traced_and_scripted(case: Case) -> None:
    with set_exportable(True):
        layer = randomised(DYNAMIC_METHODS[0], case)
    traced = torch.jit.trace(layer, case.input(batch=2))
    scripted = torch.jit.script(copy.deepcopy(layer))
    for batch in (1, 2, 5):
        x = case.input(batch=batch)
        assert relative_difference(traced(x), layer(x)) <= ALGEBRA
        assert relative_difference(scripted(x), layer(x)) <= ALGEBRA


@pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning', 'ignore:.*torch.jit.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('groups', [1, 2, 4])
def test_a_traced_1x1_layer_takes_any_batch(groups: int, batch: int) -> None:
    """Whatever the batch that it was traced with, one image included; larger kernels have a static graph."""
    layer = randomised(DYNAMIC_METHODS[0], Case('traced', 1, out_channels=8, groups=groups))
    traced = torch.jit.trace(layer, torch.randn(batch, 4, 5, 5, dtype=torch.float64))
    for other in (1, 2, 5):
        x = torch.randn(other, 4, 5, 5, dtype=torch.float64)
        assert relative_difference(traced(x), layer(x)) <= ALGEBRA


# The inference form ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('position', [0, 1, 4, 9, 10, 50])
@pytest.mark.parametrize('case', [BIASED, POINTWISE, DEPTHWISE], ids=identifier)
def test_inference_form(case: Case, position: int) -> None:
    layer, x = scheduled(10, case, position=position).eval(), case.input()
    fused = layer.fuse()
    assert type(fused) is DynamicConv2d
    assert dict(fused.named_buffers()) == {}
    assert fused.current_temperature() == 1
    assert relative_difference(fused(x), layer(x)) <= ALGEBRA
    assert relative_difference(fused.sample_kernels(x), layer.sample_kernels(x)) <= ALGEBRA
    # It has no schedule that could move, and nothing left to fold.
    before = state(fused)
    fused.train()(x)
    assert_same_state(fused, before)
    assert_same_state(fused.fuse(), before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=identifier)
@pytest.mark.parametrize(
    'case',
    [
        pytest.param(case, marks=[] if case.name in OFTEN_NAMES else pytest.mark.slow)
        for case in CASES
        if not case.name.startswith('7x7')
    ],
    ids=identifier,
)
def test_inference_form_is_rounded_once(case: Case, dtype: torch.dtype) -> None:
    """One rounding of fc2/T moves each logit by at most u·Σ|terms| = δ, each share by a factor within exp(±2δ)."""
    layer, x = randomised(DYNAMIC_METHODS[0], case, dtype), case.input(dtype)
    exact, fused = in_float64(layer), in_float64(layer.fuse())
    x = x.double()
    temperature = temperature_of(layer)
    roundoff = unit_roundoff(dtype)
    for name in ('weight', 'bias'):
        folded = getattr(exact.attention.fc2, name) / temperature
        assert_within(getattr(fused.attention.fc2, name), folded, roundoff * folded.abs())
    for name in ('weight', 'residual_weight', 'bias', 'residual_bias'):
        before, after = getattr(layer, name), getattr(layer.fuse(), name)
        assert (before is None and after is None) or torch.equal(before, after)

    hidden = exact.attention.fc1(x.mean(dim=(2, 3))).relu()
    terms = hidden @ exact.attention.fc2.weight.abs().T + exact.attention.fc2.bias.abs()
    delta = roundoff * terms.max(dim=1).values / temperature
    shares = torch.tensor(oracles.attention(exact, x, temperature), dtype=torch.float64)
    spread = torch.expm1(2 * delta)[:, None] * shares
    found, expected = fused(x), exact(x)
    zero = torch.zeros_like(exact.weight)
    kernels = torch.stack(oracles.stacked(zero, exact.residual_weight)).abs()
    biases = None
    if exact.bias is not None:
        biases = torch.stack(oracles.stacked(torch.zeros_like(exact.bias), exact.residual_bias)).abs()
    for b in range(len(x)):
        kernel = torch.einsum('k,koihw->oihw', spread[b], kernels)
        bias = None if biases is None else spread[b] @ biases
        bound = magnitude(case.conv(), x[b : b + 1], kernel, bias)
        assert_within(found[b : b + 1], expected[b : b + 1], bound)


def test_inference_form_has_no_schedule() -> None:
    layer = DynamicConv2d(4, 6, 3, temperature=None)
    assert dict(layer.named_buffers()) == {}
    assert layer.current_temperature().shape == ()
    assert layer.current_temperature() == 1
    conv, x = BIASED.conv(), BIASED.input()
    lifted = DynamicConv2d.from_conv(conv, temperature=None)
    randomise(lifted, generator(2))
    expected = oracles.dynamic_conv(lifted, x, BIASED, 1.0)
    for training in (True, False):
        assert relative_difference(lifted.train(training)(x), expected) <= ALGEBRA
    with pytest.raises(ReparamError, match='temperature'):
        lifted.reset_temperature(steps=5)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_there_is_no_equivalent_kernel() -> None:
    layer = DynamicConv2d(4, 6, 3)
    with pytest.raises(ReparamError) as error:
        layer.equivalent_kernel()
    for fragment in ('DynamicConv2d', 'kernel', 'sample'):
        assert fragment in str(error.value)


BAD_OPTIONS = [
    ({'num_kernels': 1}, ['num_kernels', '1', '2']),
    ({'num_kernels': 0}, ['num_kernels', '0', '2']),
    ({'num_kernels': -4}, ['num_kernels', '-4', '2']),
    ({'reduction': 0}, ['reduction', '0']),
    ({'temperature_steps': -1}, ['temperature_steps', '-1']),
    ({'temperature_steps': 2.5}, ['temperature_steps', '2.5']),
    ({'temperature_steps': '10'}, ['temperature_steps', "'10'"]),
    ({'temperature': 0.5}, ['temperature', '0.5', '1']),
    ({'temperature': -30.0}, ['temperature', '-30', '1']),
    ({'temperature': math.nan}, ['temperature', 'nan']),
    ({'temperature': math.inf}, ['temperature', 'inf']),
]


@pytest.mark.parametrize('options, fragments', BAD_OPTIONS, ids=identifier)
def test_bad_options(options: dict, fragments: list[str]) -> None:
    for build in (
        lambda: DynamicConv2d(4, 6, 3, **options),
        lambda: DynamicConv2d.from_conv(nn.Conv2d(4, 6, 3), **options),
        lambda: DynamicConv2d.from_conv(nn.Conv2d(4, 6, 3), init='scratch', **options),
    ):
        with pytest.raises(ReparamError) as error:
            build()
        for fragment in ['DynamicConv2d', *fragments]:
            assert fragment in str(error.value)


@pytest.mark.parametrize('steps', [-1, 2.5, '10'], ids=repr)
def test_reset_temperature_refuses_the_same_lengths(steps: object) -> None:
    layer = scheduled(10, position=3)
    before = state(layer)
    with pytest.raises(ReparamError) as error:
        layer.reset_temperature(steps=steps)
    assert repr(steps) in str(error.value)
    assert_same_state(layer, before)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_small_random_starts(dtype: torch.dtype) -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        values = torch.empty(3, 5, 7001, dtype=dtype)
        fast_uniform_(values, 0.25)
        drawn.append(values)
    assert torch.equal(*drawn)
    values = drawn[0].double()
    assert values.abs().max() <= 0.25
    assert abs(values.mean()) < 0.002
    assert values.std() == pytest.approx(0.25 / math.sqrt(3), rel=0.02)
    assert (torch.corrcoef(values.flatten(1)) - torch.eye(3)).abs().max() < 0.03
    following = torch.corrcoef(torch.stack([values.flatten()[:-1], values.flatten()[1:]]))
    assert following[0, 1].abs() < 0.02


def test_kernels_of_an_input_without_a_batch() -> None:
    layer = scheduled(10, position=5).eval()
    x = torch.randn(3, layer.in_channels, 5, 5, dtype=layer.weight.dtype)
    for kernel, sample in zip(layer.sample_kernels(x), x):
        torch.testing.assert_close(layer.sample_kernels(sample), kernel)


def test_a_parametrised_layer_is_fused() -> None:
    layer = scheduled(10, position=5)
    layer.attention.fc2.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, 'residual_weight', nn.Tanh())
    parametrize.register_parametrization(layer.attention.fc1, 'weight', nn.Tanh())
    parametrize.register_parametrization(layer.attention.fc2, 'bias', nn.Tanh())
    fused = layer.fuse()
    assert type(fused) is DynamicConv2d and fused.temperature is None
    assert torch.equal(fused.residual_weight, layer.residual_weight)
    assert fused.residual_weight.requires_grad and not fused.attention.fc2.weight.requires_grad
    x = torch.randn(3, layer.in_channels, 5, 5, dtype=layer.weight.dtype)
    torch.testing.assert_close(fused.eval()(x), layer.eval()(x))
