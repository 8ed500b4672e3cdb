"""What holds for every layer: the table of layers times the table of convolutions."""

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn as nn
from timm.layers import Conv2dSame, create_feature_extractor
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from timm_reparam import ReparamError, fuse_model, verify_fusion
from timm_reparam.layers import ACBlock2d, ACConv2d, DynamicConv2d, RefConv2d

from . import oracles
from .cases import (
    ALGEBRA,
    CASES,
    CLEARLY,
    DTYPES,
    FEW,
    METHODS,
    STATIC_METHODS,
    STOCK_NAMES,
    TRANSPOSED_CASES,
    TRANSPOSED_METHODS,
    Case,
    Method,
    assert_same_state,
    assert_within,
    generator,
    identifier,
    in_float64,
    magnitude,
    often,
    products,
    randomise,
    randomised,
    relative_difference,
    state,
    summation_bound,
    unit_roundoff,
)

every_layer = pytest.mark.parametrize('method', METHODS, ids=identifier)
every_static_layer = pytest.mark.parametrize('method', STATIC_METHODS, ids=identifier)
everything = pytest.mark.parametrize('method, case', often(METHODS, CASES), ids=identifier)
every_static_case = pytest.mark.parametrize('method, case', often(STATIC_METHODS, CASES), ids=identifier)
a_few_cases = pytest.mark.parametrize('method, case', often(METHODS, FEW), ids=identifier)
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])

BIASED = Case('biased', 3, padding=1, bias=True)


@pytest.mark.parametrize('case', CASES, ids=identifier)
def test_oracle_of_the_plain_convolution(case: Case) -> None:
    """The tests below lean on this one: padding by hand is what the stock convolutions do."""
    conv, x = case.conv(), case.input()
    expected = oracles.convolution(x, conv.weight, conv.bias, case)
    assert relative_difference(conv(x), expected) <= 1e-14


# Lift -----------------------------------------------------------------------------------------------------------------


@everything
def test_lift_is_exact(method: Method, case: Case) -> None:
    for dtype, training in itertools.product(DTYPES, (False, True)):
        conv, x = case.conv(dtype), case.input(dtype)
        layer = method.lift(conv, case)
        conv.train(training)
        layer.train(training)
        expected, found = conv(x), layer(x)
        assert found.dtype == dtype
        assert found.shape == expected.shape
        if method.dynamic:
            kernels = layer.sample_kernels(x)
            assert kernels.shape == (len(x), *conv.weight.shape)
            assert kernels.dtype == dtype
            assert torch.equal(kernels, conv.weight.expand_as(kernels))
            exact = in_float64(conv)(x.double())
            assert_within(found, exact, summation_bound(conv, x, conv.weight, conv.bias))
        else:
            assert torch.equal(found, expected)


@everything
def test_lift_reuses_the_parameters(method: Method, case: Case) -> None:
    conv = case.conv()
    layer = method.lift(conv, case)
    assert type(layer) is method.cls
    assert isinstance(layer, nn.Conv2d)
    assert layer.bias is conv.bias
    if method.cls is RefConv2d:
        assert not layer.weight.requires_grad
        assert 'weight' in dict(layer.named_buffers())
        assert 'weight' not in dict(layer.named_parameters())
        assert torch.equal(layer.weight, conv.weight)
    else:
        assert layer.weight is conv.weight
    for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups'):
        assert getattr(layer, name) == getattr(conv, name), name
    assert layer.padding_mode == conv.padding_mode
    assert len(list(layer.parameters())) == len(set(layer.parameters()))


@every_layer
@pytest.mark.parametrize('frozen', STOCK_NAMES)
def test_lift_keeps_frozen_parameters_frozen(method: Method, frozen: str) -> None:
    conv = BIASED.conv()
    getattr(conv, frozen).requires_grad_(False)
    layer = method.lift(conv, BIASED)
    for name, parameter in layer.named_parameters():
        # What is added to a frozen kernel is frozen with it: the convolution stays what it was.
        frozen_with = 'bias' if name == 'bias' else 'weight'
        assert parameter.requires_grad == (frozen_with != frozen), name
    fused = layer.fuse()
    assert not fused.get_parameter(frozen).requires_grad


@every_layer
@both_modes
def test_lift_and_fuse_keep_the_training_flag(method: Method, training: bool) -> None:
    layer = method.lift(BIASED.conv().train(training), BIASED)
    assert all(module.training == training for module in layer.modules())
    assert layer.fuse().training == training
    assert all(module.training == training for module in layer.modules())


@every_layer
def test_lift_takes_the_arguments_of_the_new_parameters_from_the_old(method: Method) -> None:
    conv = BIASED.conv(torch.bfloat16).to(memory_format=torch.channels_last)
    layer = method.lift(conv, BIASED)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}


@every_layer
def test_stock_state_dict_is_taken_as_a_lift(method: Method) -> None:
    conv, layer = BIASED.conv(seed=7), randomised(method, BIASED)
    assert set(conv.state_dict()) < set(layer.state_dict())
    layer.load_state_dict(conv.state_dict())
    x = BIASED.input()
    assert relative_difference(layer.eval()(x), conv(x)) <= (ALGEBRA if method.dynamic else 0)


# The constructor ------------------------------------------------------------------------------------------------------


@every_layer
def test_constructor_is_that_of_conv2d(method: Method) -> None:
    stock = list(inspect.signature(nn.Conv2d).parameters)
    found = inspect.signature(method.cls).parameters
    assert list(found)[: len(stock)] == stock
    for name in list(found)[len(stock) :]:
        assert found[name].kind == inspect.Parameter.KEYWORD_ONLY, name
    for name in stock[3:]:
        assert found[name].default == inspect.signature(nn.Conv2d).parameters[name].default, name


@a_few_cases
def test_constructed_layer_takes_the_state_of_a_lifted_one(method: Method, case: Case) -> None:
    lifted = randomised(method, case)
    arguments = case.arguments()
    constructed = method.cls(*arguments.values(), **method.options(case), dtype=torch.float64).eval()
    assert constructed.weight.shape == lifted.weight.shape
    assert constructed.weight.dtype == torch.float64
    constructed.load_state_dict(lifted.state_dict())
    if not case.same:
        x = case.input()
        assert torch.equal(constructed(x), lifted(x))
    assert repr(constructed).startswith(method.cls.__name__)


EVERY_BIASED = [(method, BIASED) for method in METHODS]
TRANSPOSED_BIASED = next(case for case in TRANSPOSED_CASES if case.name == '4x4_stride_bias')
EVERY_BIASED += [(method, TRANSPOSED_BIASED) for method in TRANSPOSED_METHODS]
# every layer on one convolution
every_layer_of_both_kinds = pytest.mark.parametrize('method, case', EVERY_BIASED, ids=identifier)


class ByKeyword(nn.Module):
    """A layer that is called as torch's documentation of convolutions writes it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@every_layer_of_both_kinds
def test_forward_takes_the_arguments_of_the_plain_convolution(method: Method, case: Case) -> None:
    stock, x = inspect.signature(case.conv().forward), case.input()
    model = ByKeyword(randomised(method, case)).eval()
    found = inspect.signature(model.layer.forward)
    assert [(p.name, p.default) for p in found.parameters.values()] == [
        (p.name, p.default) for p in stock.parameters.values()
    ]
    expected = model.layer(x)
    exported = torch.export.export(model, (x,)).module()
    for form in (model, torch.jit.script(copy.deepcopy(model)), exported, torch.fx.symbolic_trace(model)):
        assert relative_difference(form(x), expected) <= 1e-14
    assert verify_fusion(model, inputs=x).layers[0].num_inputs == len(x)


def test_forward_of_the_block_takes_the_argument_of_the_plain_convolution() -> None:
    block, x = ACBlock2d(4, 6, 3).eval(), torch.randn(2, 4, 9, 8)
    assert torch.equal(block(input=x), block(x))


@every_layer
def test_constructor_on_the_meta_device(method: Method) -> None:
    options = method.options(BIASED)
    direct = method.cls(4, 6, 3, padding=1, device='meta', **options)
    with torch.device('meta'):
        in_context = method.cls(4, 6, 3, padding=1, **options)
    lifted = method.lift(nn.Conv2d(4, 6, 3, padding=1, device='meta'), BIASED)
    for layer in (direct, in_context, lifted):
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            assert tensor.is_meta, name
        assert layer(torch.empty(2, 4, 9, 8, device='meta')).shape == (2, 6, 9, 8)


@every_layer
def test_scratch_start_is_seeded_and_complete(method: Method) -> None:
    """Nothing is left as it happened to lie in memory."""

    def converted() -> nn.Module:
        return method.cls.from_conv(nn.Conv2d(4, 6, 3), init='scratch', **method.options(BIASED))

    for build in (converted, lambda: method.cls(4, 6, 3, **method.options(BIASED))):
        states = []
        for _ in range(2):
            torch.manual_seed(5)
            states.append(state(build()))
        assert list(states[0]) == list(states[1])
        for name, tensor in states[0].items():
            assert tensor.isfinite().all(), name
            assert torch.equal(tensor, states[1][name]), name


@every_layer
def test_reset_parameters_draws_a_new_start_in_place(method: Method) -> None:
    torch.manual_seed(5)
    layer = method.cls(4, 6, 3, **method.options(BIASED))
    start, identities = state(layer), {name: id(value) for name, value in layer.named_parameters()}
    randomise(layer, generator(2), keep=())
    layer.reset_parameters()
    # As of nn.Conv2d: an optimiser that holds the parameters goes on with them.
    assert {name: id(value) for name, value in layer.named_parameters()} == identities
    for name, tensor in layer.state_dict().items():
        if start[name].unique().numel() == 1 or name == 'prior':
            assert torch.equal(tensor, start[name]), f'{name} keeps no trace of what was there before'
        else:
            assert not torch.equal(tensor, start[name]), f'{name} is drawn anew'
            assert tensor.abs().max() < 4 * start[name].abs().max(), name


@every_layer_of_both_kinds
@pytest.mark.parametrize('init', ['lift', 'scratch'])
def test_either_start_reuses_the_parameters(method: Method, case: Case, init: str) -> None:
    conv, tied = case.conv(), case.conv()
    tied.weight, tied.bias = conv.weight, conv.bias
    before = state(conv)
    layer, other = (method.cls.from_conv(each, init=init, **method.options(case)) for each in (conv, tied))
    assert layer.bias is conv.bias and other.bias is conv.bias
    if isinstance(layer.weight, nn.Parameter):  # RefConv's base is frozen: a copy
        assert layer.weight is conv.weight and other.weight is conv.weight
    assert_same_state(conv, before)
    for each in (layer, other):
        assert torch.equal(each.weight, before['weight']) and torch.equal(each.bias, before['bias'])


# The function of a randomised layer -----------------------------------------------------------------------------------


@everything
def test_randomised_layer_differs_from_stock_and_fused_agrees(method: Method, case: Case) -> None:
    conv, x = case.conv(), case.input()
    layer = randomised(method, case)
    found = layer(x)
    if method.over_parameterises(case):
        assert relative_difference(found, conv(x)) > CLEARLY
    assert relative_difference(layer.fuse()(x), found) <= ALGEBRA


@every_static_case
def test_fused_kernel_is_rounded_once(method: Method, case: Case) -> None:
    """The kernel is composed in float64 and rounded to its dtype as it is stored."""
    for dtype in (torch.float32, torch.bfloat16):
        conv, x = case.conv(dtype), case.input(dtype)
        layer = randomised(method, case, dtype)
        exact = in_float64(layer)
        kernel, y = exact.equivalent_kernel(), exact(x.double())
        if method.over_parameterises(case):
            assert relative_difference(y, in_float64(conv)(x.double())) > CLEARLY
        fused = layer.fuse()
        roundoff = unit_roundoff(dtype)
        assert_within(fused.weight, kernel, roundoff * kernel.abs())
        one_rounding = roundoff * magnitude(conv, x, kernel)
        assert_within(in_float64(fused)(x.double()), y, one_rounding)
        # As it will run: the stock convolution adds its own rounding of the sums.
        assert_within(fused(x), y, one_rounding + summation_bound(conv, x, kernel * (1 + roundoff), conv.bias))


@torch.no_grad()
def terms_of(layer: nn.Module) -> torch.Tensor:
    """The kernel of the absolute values of all parameters: what each entry's terms can add up to."""
    layer = in_float64(layer)
    for name, parameter in layer.named_parameters():
        if name != 'bias':
            parameter.abs_()
    layer.weight.abs_()
    return layer.equivalent_kernel()


@every_static_case
def test_eval_output_is_right_to_rounding(method: Method, case: Case) -> None:
    """The unfused layer composes its kernel in the dtype of its parameters; its error stays that of the terms.

    A product and a sum of two or three terms are rounded at most six times here; long sums are accumulated in
    float32 at least.
    """
    for dtype in (torch.float32, torch.bfloat16):
        conv, x = case.conv(dtype), case.input(dtype)
        layer = randomised(method, case, dtype)
        exact = in_float64(layer)
        terms = terms_of(layer)
        summands = 4 * case.area + 4
        relative = 6 * unit_roundoff(dtype) + summands * unit_roundoff(torch.float32)
        bound = relative * magnitude(conv, x, terms) + summation_bound(conv, x, terms, conv.bias)
        assert_within(layer(x), exact(x.double()), bound)


@every_static_case
def test_eval_forward_is_the_convolution_with_the_equivalent_kernel(method: Method, case: Case) -> None:
    x = case.input()
    layer = randomised(method, case)
    kernel = layer.equivalent_kernel()
    assert kernel.shape == layer.weight.shape
    assert kernel.requires_grad
    expected = oracles.convolution(x, kernel.detach(), layer.bias, case)
    assert relative_difference(layer(x), expected) <= ALGEBRA


# Fuse -----------------------------------------------------------------------------------------------------------------


@a_few_cases
def test_fused_convolution_is_stock(method: Method, case: Case) -> None:
    for dtype in DTYPES:
        conv = case.conv(dtype).eval()
        layer = randomised(method, case, dtype)
        fused = layer.fuse()
        assert fused.training is False
        if method.dynamic:
            assert type(fused) is DynamicConv2d
            assert set(layer.state_dict()) - set(fused.state_dict()) == {'temperature_position', 'temperature_steps'}
        else:
            assert type(fused) is type(conv)
            assert list(fused.state_dict()) == list(conv.state_dict())
            assert dict(fused.named_buffers()) == {}
        for name, tensor in conv.state_dict().items():
            assert fused.state_dict()[name].shape == tensor.shape, name
            assert fused.state_dict()[name].dtype == dtype, name
            assert fused.state_dict()[name].device == tensor.device, name
        for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation', 'groups'):
            assert getattr(fused, name) == getattr(conv, name), name
        assert fused.padding_mode == conv.padding_mode
        for parameter in fused.parameters():
            assert parameter.is_leaf
            assert parameter.grad_fn is None


@a_few_cases
def test_fuse_leaves_the_layer_as_it_was(method: Method, case: Case) -> None:
    for training in (False, True):
        layer = randomised(method, case).train(training)
        before, identities = state(layer), {name: id(value) for name, value in layer.named_parameters()}
        fused = layer.fuse()
        assert layer.training == training
        assert_same_state(layer, before)
        assert {name: id(value) for name, value in layer.named_parameters()} == identities
        # The fused one is fresh: nothing that happens to it reaches the layer.
        with torch.no_grad():
            for parameter in fused.parameters():
                parameter.fill_(7)
        assert_same_state(layer, before)


@every_layer
def test_fuse_works_under_no_grad_and_inference_mode(method: Method) -> None:
    layer, x = randomised(method, BIASED), BIASED.input()
    expected = layer.fuse()(x)
    with torch.no_grad():
        assert torch.equal(layer.fuse()(x), expected)
    with torch.inference_mode():
        assert torch.equal(layer.fuse()(x), expected)


# Gradients ------------------------------------------------------------------------------------------------------------


@everything
def test_gradients(method: Method, case: Case) -> None:
    layer, x = method.lift(case.conv(), case), case.input()
    projection = projection_of(layer.eval()(x))
    layer.train()
    (layer(x) * projection).sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f'{name} has no gradient on the fresh lift'
        assert parameter.grad.isfinite().all(), name
    randomise(layer, generator(2))
    for training in (True, False):
        layer.train(training)
        layer.zero_grad()
        (layer(x) * projection).sum().backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None, f'{name} has no gradient'
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, f'{name} has a gradient of zeros'


def projection_of(y: torch.Tensor) -> torch.Tensor:
    """Random weights of the outputs: a plain sum has no gradient through a norm."""
    return torch.randn(y.shape, generator=generator(3), dtype=y.dtype)


@every_layer
@both_modes
def test_gradients_are_the_derivatives(method: Method, training: bool) -> None:
    case = Case('tiny', 3, padding=1, groups=2, bias=True, in_channels=4, out_channels=2, size=(4, 3))
    options = dict(method.options(case), temperature=None) if method.dynamic else method.options(case)
    options.pop('temperature_steps', None)
    layer = method.cls.from_conv(case.conv(), **options)
    randomise(layer, generator(2))
    layer.train(training)
    x = case.input().requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def forward(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = tuple(parameter.detach().clone().requires_grad_() for parameter in parameters)
    assert torch.autograd.gradcheck(forward, (x, *values), fast_mode=True)


# Copies, round trips, other ways of running ---------------------------------------------------------------------------


def deepcopied(layer: nn.Module, method: Method, case: Case) -> nn.Module:
    return copy.deepcopy(layer)


def pickled(layer: nn.Module, method: Method, case: Case) -> nn.Module:
    return pickle.loads(pickle.dumps(layer))


def reloaded(layer: nn.Module, method: Method, case: Case) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = method.lift(case.conv(layer.weight.dtype, seed=11), case)
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return fresh.train(layer.training)


@a_few_cases
def test_round_trips(method: Method, case: Case) -> None:
    for dtype, round_trip in itertools.product((torch.float64, torch.bfloat16), (deepcopied, pickled, reloaded)):
        layer, x = randomised(method, case, dtype), case.input(dtype)
        for training in (False, True):
            layer.train(training)
            other = round_trip(layer, method, case)
            assert other.training == training
            assert_same_state(other, state(layer))
            assert torch.equal(other(x), layer(x))
            # A training pass moves buffers: the copy's moved as the layer's did, and they are not shared.
            assert_same_state(other, state(layer))
            other_tensors = {tensor.data_ptr() for tensor in other.state_dict().values()}
            assert not other_tensors & {tensor.data_ptr() for tensor in layer.state_dict().values()}


@pytest.mark.parametrize(
    'method, case',
    [  # other options, in fewer convolutions
        pytest.param(method, case, marks=[] if method.is_default or case.name == 'groups_2' else pytest.mark.slow)
        for method, case in products(METHODS, FEW)
    ],
    ids=identifier,
)
def test_scripted_layer_equals_eager(method: Method, case: Case) -> None:
    for training in (False, True):
        layer, x = randomised(method, case).train(training), case.input()
        scripted = torch.jit.script(copy.deepcopy(layer))
        for _ in range(3):
            assert torch.equal(scripted(x), layer(x))
        for name, tensor in layer.state_dict().items():
            assert torch.equal(scripted.state_dict()[name], tensor), name


# The forward of the others is one in both modes: once with the default options, once with others.
COMPILED_OFTEN = (
    *(('doconv', True), ('doconv_surplus', False), ('acconv', True), ('acconv', False), ('acconv_plain', True)),
    *(('refconv', True), ('dyconv', True), ('dyconv', False), ('dbbconv', True), ('orepaconv', True)),
)


@pytest.mark.parametrize(
    'method, training',
    [
        pytest.param(method, training, marks=[] if (method.name, training) in COMPILED_OFTEN else pytest.mark.slow)
        for method in METHODS
        for training in (False, True)
    ],
    ids=identifier,
)
def test_compiled_layer_equals_eager_without_graph_breaks(method: Method, training: bool) -> None:
    layer, x = randomised(method, BIASED).train(training), BIASED.input()
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(layer), backend='aot_eager', fullgraph=True)
    for _ in range(3):
        found, expected = compiled(x), layer(x)
        assert relative_difference(found, expected) <= ALGEBRA
    for name, tensor in layer.state_dict().items():
        assert torch.allclose(compiled._orig_mod.state_dict()[name], tensor, rtol=ALGEBRA, atol=0), name
    gradients = []
    for module in (compiled, layer):
        module.zero_grad()
        (module(x) * projection_of(expected)).sum().backward()
        gradients.append({name.removeprefix('_orig_mod.'): p.grad for name, p in module.named_parameters()})
    assert list(gradients[0]) == list(gradients[1])
    for name, gradient in gradients[1].items():
        assert relative_difference(gradients[0][name], gradient) <= ALGEBRA, name


@every_static_layer
def test_autocast_does_not_reach_the_composition(method: Method) -> None:
    layer, x = randomised(method, BIASED, torch.float32), BIASED.input(torch.float32)
    kernel = layer.equivalent_kernel()
    with torch.autocast('cpu', torch.bfloat16):
        found_kernel, found = layer.equivalent_kernel(), layer(x)
    assert found_kernel.dtype == torch.float32
    assert torch.equal(found_kernel, kernel)
    assert found.dtype == torch.bfloat16
    plain = BIASED.conv(torch.float32)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        plain.weight.copy_(kernel)
        assert torch.equal(plain(x), found)


@every_layer
@both_modes
def test_autocast_takes_inputs_of_its_own_dtype(method: Method, training: bool) -> None:
    """Within a network the input of all layers but the first is already in the dtype of autocast."""
    layer = randomised(method, BIASED, torch.float32).train(training)
    x = BIASED.input(torch.bfloat16)
    expected = in_float64(layer)(x.double())
    with torch.autocast('cpu', torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert relative_difference(y.double(), expected) < 0.05
    y.float().square().mean().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


@a_few_cases
def test_channels_last(method: Method, case: Case) -> None:
    """No parameter may have five dimensions: `.to(memory_format=…)` of a whole model refuses them."""
    for training in (False, True):
        layer, x = randomised(method, case).train(training), case.input()
        other = copy.deepcopy(layer).to(memory_format=torch.channels_last)
        found = other(x.contiguous(memory_format=torch.channels_last))
        assert relative_difference(found, layer(x)) <= ALGEBRA


@a_few_cases
def test_input_without_a_batch_dimension(method: Method, case: Case) -> None:
    for training in (False, True):
        layer, x = randomised(method, case).train(training), case.input(batch=1)
        other = copy.deepcopy(layer)
        assert relative_difference(other(x[0]), layer(x)[0]) <= ALGEBRA


@a_few_cases
def test_empty_batch(method: Method, case: Case) -> None:
    for training in (False, True):
        layer, x = randomised(method, case).train(training), case.input()
        expected = case.conv()(x[:0])
        found = layer(x[:0])
        assert found.shape == expected.shape
        for name, tensor in layer.state_dict().items():
            assert tensor.isfinite().all(), f'{name} is poisoned by an empty batch'
        found.sum().backward()
        for name, parameter in layer.named_parameters():
            if parameter.grad is not None:
                assert parameter.grad.isfinite().all(), name
        assert layer.eval()(x).isfinite().all()


def changes_a_buffer(method: Method) -> bool:
    return method.dynamic or method.has_statistics


@every_layer
def test_traced(method: Method) -> None:
    """Tracing runs the model, on stand-ins: a layer has to be a leaf for it, or its state moves and is baked in."""
    model, x = nn.Sequential(randomised(method, BIASED), nn.ReLU()).train(), BIASED.input()
    before = state(model)
    extractor = create_feature_extractor(model, return_nodes=['1'])
    assert_same_state(model, before)
    for _ in range(2):
        extractor.train()(x)
    moved = not all(torch.equal(tensor, before[name]) for name, tensor in extractor.state_dict().items())
    assert moved == changes_a_buffer(method)
    assert torch.equal(extractor.eval()(x)['1'], model.eval()(x))


@a_few_cases
def test_training_moves_every_parameter(method: Method, case: Case) -> None:
    """A start of zeros must not be a saddle: a few steps of plain SGD move everything."""
    layer, x = method.lift(case.conv(), case).train(), case.input(batch=8)
    start = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.05)
    projection = projection_of(layer(x))
    for _ in range(3):
        optimiser.zero_grad()
        (layer(x) * projection).mean().backward()
        optimiser.step()
    for name, parameter in layer.named_parameters():
        assert not torch.equal(parameter, start[name]), f'{name} did not move'


# Bad input ------------------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize('init', ['lifted', '', None])
def test_unknown_init(method: Method, init: str | None) -> None:
    conv = BIASED.conv()
    before = state(conv)
    with pytest.raises(ReparamError, match='init') as error:
        method.cls.from_conv(conv, init=init, **method.options(BIASED))
    message = str(error.value)
    assert repr(init) in message
    assert 'lift' in message and 'scratch' in message
    assert_same_state(conv, before)
    assert type(conv) is nn.Conv2d


def with_a_norm_of_its_weight() -> nn.Module:
    return nn.utils.spectral_norm(nn.Conv2d(4, 6, 3))


def with_a_hook() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.register_forward_hook(lambda module, inputs, output: output * 2)
    return conv


def with_a_forward_of_its_own() -> nn.Module:
    conv = nn.Conv2d(4, 6, 3)
    conv.forward = lambda x: 2 * nn.Conv2d.forward(conv, x)
    return conv


class Subclass(nn.Conv2d):
    """A convolution that may do anything in its forward."""


NOT_CONVOLUTIONS = [
    (lambda: nn.Linear(4, 6), ['Conv2d', 'Linear']),
    (lambda: nn.Conv1d(4, 6, 3), ['Conv2d', 'Conv1d']),
    (lambda: nn.ConvTranspose2d(4, 6, 3), ['Conv2d', 'ConvTranspose2d']),
    (lambda: Subclass(4, 6, 3), ['Conv2d', 'Subclass']),
    (lambda: ACConv2d(4, 6, 3), ['Conv2d', 'ACConv2d']),
    (with_a_norm_of_its_weight, ['hook']),
    (with_a_hook, ['hook']),
    (with_a_forward_of_its_own, ['forward']),
    (lambda: nn.Conv2d(4, 6, 3, dtype=torch.complex64), ['complex64']),
]


@every_layer
@pytest.mark.parametrize('init', ['lift', 'scratch'])
def test_only_plain_convolutions_are_replaced(method: Method, init: str) -> None:
    for build, fragments in NOT_CONVOLUTIONS:
        with pytest.raises(ReparamError) as error:
            method.cls.from_conv(build(), init=init, **method.options(BIASED))
        for fragment in [method.cls.__name__, *fragments]:
            assert fragment in str(error.value)


@every_layer
def test_unknown_option(method: Method) -> None:
    with pytest.raises(ReparamError) as error:
        method.cls.from_conv(nn.Conv2d(4, 6, 3), kernels=4)
    assert method.cls.__name__ in str(error.value)
    assert 'kernels' in str(error.value)


def test_conv2d_same_stays_conv2d_same_from_scratch() -> None:
    case = next(case for case in CASES if case.same)
    for cls in (ACConv2d, RefConv2d):
        layer = cls.from_conv(case.conv(), init='scratch')
        assert type(layer.fuse()) is Conv2dSame
        assert layer(case.input()).shape == case.conv()(case.input()).shape


@pytest.mark.parametrize(
    'method, case', [*often(METHODS, CASES), *products(TRANSPOSED_METHODS, TRANSPOSED_CASES)], ids=identifier
)
def test_the_branch_form_is_the_layer_in_evaluation(
    method: Method, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = randomised(method, case), case.input()

    def refused(*args: object) -> None:
        raise AssertionError('the branch form shares a step with what fuses')

    with torch.no_grad():
        expected = layer(x)
        for name in ('_compose', '_mix', '_coefficients', 'equivalent_kernel', 'fuse'):
            monkeypatch.setattr(type(layer), name, refused, raising=False)
        assert relative_difference(layer.branch_form()(x), expected) <= 1e-12


@every_layer_of_both_kinds
def test_a_convolution_without_channels_is_refused(method: Method, case: Case) -> None:
    for channels in ((0, 4), (4, 0)):
        for device in ('cpu', 'meta'):
            with pytest.raises(ReparamError, match=f'{method.cls.__name__}: expected at least one .*channel'):
                method.cls(*channels, 3, device=device)
            with pytest.raises(ReparamError, match=f'{method.cls.__name__}: expected at least one .*channel'):
                method.cls.from_conv(type(case.conv())(*channels, 3, device=device))


@every_layer_of_both_kinds
def test_a_weight_that_is_no_parameter_is_refused(method: Method, case: Case) -> None:
    for name, found in itertools.product(STOCK_NAMES, ('buffer', 'Tensor')):
        conv = case.conv()
        value = getattr(conv, name).detach()
        delattr(conv, name)
        if found == 'buffer':
            conv.register_buffer(name, value)
        else:
            setattr(conv, name, value)
        with pytest.raises(ReparamError, match=f'expected {name} to be a parameter, got a {found}; leave it out'):
            method.cls.from_conv(conv, **method.options(case))
    for weight_norm in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        conv = weight_norm(case.conv())
        with pytest.raises(ReparamError, match=f'{method.cls.__name__} replaces .*, got Parametrized'):
            method.cls.from_conv(conv, **method.options(case))


@pytest.mark.parametrize('method', [*METHODS, *TRANSPOSED_METHODS], ids=lambda method: method.cls.__name__)
def test_a_norm_folded_into_part_of_the_kernel_is_refused(method: Method) -> None:
    transposed = method in TRANSPOSED_METHODS
    case = next(case for case in (TRANSPOSED_CASES if transposed else CASES) if case.name == '3x3')
    layer = randomised(method, case)
    before = state(layer)
    with pytest.raises(ReparamError, match=f'{method.cls.__name__}: got a bias, .*fuse_model') as error:
        fuse_conv_bn_eval(layer, a_norm(case.out_channels), transpose=transposed)
    assert 'fold_bn=True' in str(error.value)
    assert_same_state(layer, before)


def a_norm(channels: int) -> nn.Module:
    """A BatchNorm in evaluation, its scale and statistics away from where they start."""
    norm = nn.BatchNorm2d(channels, dtype=torch.float64).eval()
    randomise(norm, generator(5), keep=())
    return norm


@every_static_layer
def test_a_norm_is_folded_into_the_fused_convolution_by_torch(method: Method) -> None:
    case = Case('3x3', 3, padding=1)
    layer, norm, x = randomised(method, case), a_norm(case.out_channels), case.input()
    with torch.no_grad():
        assert relative_difference(fuse_conv_bn_eval(layer.fuse(), norm)(x), norm(layer(x))) <= ALGEBRA


@every_layer
def test_torch_fx_leaves_the_norm_behind_a_layer(method: Method) -> None:
    case = Case('3x3', 3, padding=1)
    model = nn.Sequential(randomised(method, case), a_norm(case.out_channels)).eval()
    folded, x = torch.fx.experimental.optimization.fuse(model), case.input()
    assert [type(module) for module in folded.children()] == [method.cls, nn.BatchNorm2d]
    with torch.no_grad():
        assert torch.equal(folded(x), model(x))


def replace(layer: nn.Module) -> None:
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, nn.Parameter(parameter.detach().clone()))


def prune_nothing(layer: nn.Module) -> None:
    for name, _ in list(layer.named_parameters(recurse=False)):
        prune.identity(layer, name)
        prune.remove(layer, name)


def parametrise(layer: nn.Module) -> None:
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.dim() > 1:
            parametrizations.weight_norm(layer, name)
            parametrize.remove_parametrizations(layer, name)
        else:
            parametrize.register_parametrization(layer, name, nn.Identity())
            parametrize.remove_parametrizations(layer, name)


@every_layer
@pytest.mark.parametrize('with_bias', [False, True], ids=['plain', 'bias'])
@pytest.mark.parametrize(
    'change',
    [
        replace,
        prune_nothing,
        parametrise,
        lambda layer: layer.register_parameter('bias', layer.bias),
        lambda layer: layer.load_state_dict(state(layer), assign=True),
    ],
    ids=['replaced', 'pruned', 'parametrised', 'registered', 'assigned'],
)
def test_parameters_are_replaced_as_in_any_module(method: Method, with_bias: bool, change) -> None:
    case = BIASED if with_bias else Case('plain', 3, padding=1)
    layer, x = randomised(method, case), case.input()
    with torch.no_grad():
        expected = layer(x)
        change(layer)
        assert relative_difference(layer(x), expected) <= ALGEBRA


# What somebody has set on a convolution or a layer -------------------------------------------------------------------


@every_layer_of_both_kinds
@pytest.mark.parametrize('init', ['lift', 'scratch'])
def test_attributes_that_somebody_has_set_are_carried_over(method: Method, case: Case, init: str) -> None:
    conv = case.conv()
    stock = set(vars(conv))
    conv._is_hf_initialized, conv.role, conv.notes = True, 'stem', ['a note']
    layer = method.cls.from_conv(conv, init=init, **method.options(case))
    assert layer._is_hf_initialized is True and layer.role == 'stem' and layer.notes is conv.notes
    layer.role, layer.later = 'body', (1, 2)
    layer.forward = lambda input: input
    for changed in (layer, copy.deepcopy(layer), method.cls.from_conv(case.conv(), **method.options(case))):
        fused = changed.fuse()
        added = {'_is_hf_initialized': True, 'role': 'body', 'notes': ['a note'], 'later': (1, 2)}
        if 'role' not in vars(changed):
            added = {}
        assert {name: value for name, value in vars(fused).items() if name in added} == added
        if not method.dynamic:
            assert set(vars(fused)) == stock | added.keys(), 'nothing of the layer'
        else:
            assert set(vars(fused)) == set(vars(method.cls(4, 6, 3))) | {'tf_same'} | added.keys()


CONTENTS = [
    (lambda conv: conv.register_parameter('gain', nn.Parameter(torch.ones(6))), 'also holds gain, which'),
    (lambda conv: conv.register_buffer('mask', torch.ones(6)), 'also holds mask, which'),
    (lambda conv: setattr(conv, 'act', nn.ReLU()), 'also holds act, which'),
    (lambda conv: setattr(conv, '_conv_forward', lambda *args: None), 'with its own _conv_forward'),
    (lambda conv: conv.register_state_dict_post_hook(lambda *args: None), 'carries hooks'),
    (lambda conv: conv.register_load_state_dict_pre_hook(lambda *args: None), 'carries hooks'),
]


@every_layer
@pytest.mark.parametrize('add, message', CONTENTS)
def test_what_would_be_lost_is_refused(method: Method, add, message: str) -> None:
    conv = BIASED.conv()
    add(conv)
    with pytest.raises(ReparamError, match=f'{method.cls.__name__}: .*{message}.* skip='):
        method.cls.from_conv(conv, **method.options(BIASED))


@every_layer
def test_an_attribute_of_the_name_of_one_of_the_layer_is_refused(method: Method) -> None:
    for name in (*method.cls.option_names()[:1], 'tf_same', 'equivalent_kernel'):
        conv = BIASED.conv()
        setattr(conv, name, 2)
        with pytest.raises(ReparamError, match=f'{method.cls.__name__}: .*got a convolution with {name} set on it'):
            method.cls.from_conv(conv, **method.options(BIASED))


# Parametrised layers --------------------------------------------------------------------------------------------------

PARAMETRISATIONS = {
    name: getattr(nn.utils.parametrizations, name) for name in ('weight_norm', 'spectral_norm', 'orthogonal')
}


def parametrised(layer: nn.Module, each: bool) -> Iterator[tuple[str, nn.Module]]:
    """Copies of a layer with one tensor under a parametrisation of torch: each under each, or they take turns."""
    names = dict.fromkeys(['weight', *(name for name, _ in layer.named_parameters())])
    pairs = list(itertools.product(names, PARAMETRISATIONS.items()))
    for name, (kind, parametrise) in pairs if each else [*pairs[:3], *pairs[4::4]]:
        other = copy.deepcopy(layer)
        owner, _, leaf = name.rpartition('.')
        try:
            parametrise(other.get_submodule(owner), leaf)
        except (ValueError, IndexError):  # vectors have no spectral norm of a transposed layer, nor are they orthogonal
            assert layer.state_dict()[name].dim() == 1
            continue
        yield f'{kind} of {name}', other


@pytest.mark.parametrize('each', [False, pytest.param(True, marks=pytest.mark.slow)], ids=['some', 'each'])
@pytest.mark.parametrize(
    'method, case',
    [pytest.param(method, case, marks=[] if method.is_default else pytest.mark.slow) for method, case in EVERY_BIASED],
    ids=identifier,
)
def test_a_parametrised_layer_fuses_to_what_it_computes(method: Method, case: Case, each: bool) -> None:
    layer, x = randomised(method, case, torch.float32), case.input(torch.float32)
    found = 0
    for what, other in parametrised(layer, each):
        found += 1
        model = nn.Sequential(other, nn.BatchNorm2d(case.out_channels))
        randomise(model[1], generator(5), keep=())
        # a spectral norm is one that changes as it is read in training
        for training, fold_bn in ((False, True), (True, bool(found % 2))):
            before = state(model.train(training))
            fused = fuse_model(model, fold_bn=fold_bn)
            assert type(fused[0]) is type(layer.fuse()), what
            assert_same_state(model, before)
            exact = in_float64(model).eval()(x.double())
            assert relative_difference(in_float64(fused).eval()(x.double()), exact) <= 1e-6, what
        report = verify_fusion(model, fused, inputs=x)
        assert report.passed, f'{what}: {report}'
        assert_same_state(model, before)
        model.eval()
        assert torch.equal(copy.deepcopy(model)(x), model(x)), what
        assert (
            relative_difference(in_float64(other).branch_form()(x.double()), in_float64(other)(x.double())) <= ALGEBRA
        )
    assert found >= (5 if each else 3)
    with torch.no_grad():
        fused[0].weight[0, 0, 0, 0] += 0.1
    assert not verify_fusion(model, fused, inputs=x).passed
