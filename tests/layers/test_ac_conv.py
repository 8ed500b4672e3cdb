"""ACConv2d and ACBlock2d beyond what all layers share: the formulas, the running variances, the options."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn

from timm_reparam import ReparamError
from timm_reparam.layers import ACBlock2d, ACConv2d
from timm_reparam.layers._branches import add_on_middle, add_scaled

from . import oracles
from .cases import (
    ALGEBRA,
    CASES,
    CLEARLY,
    DTYPES,
    Case,
    assert_same_state,
    assert_within,
    generator,
    has_middle,
    identifier,
    in_float64,
    magnitude,
    randomise,
    relative_difference,
    state,
    unit_roundoff,
)

SIDES = ('vertical', 'horizontal')
AC_CASES = tuple(filter(has_middle, CASES))
BIASED = Case('biased', 3, padding=1, bias=True)

every_case = pytest.mark.parametrize('case', AC_CASES, ids=identifier)
both_modes = pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])


def randomised(case: Case, dtype: torch.dtype = torch.float64, **options) -> ACConv2d:
    layer = ACConv2d.from_conv(case.conv(dtype), **options)
    randomise(layer, generator(2))
    return layer


# The variant form -----------------------------------------------------------------------------------------------------


@every_case
def test_formula_in_eval(case: Case) -> None:
    layer, x = randomised(case).eval(), case.input()
    before = state(layer)
    expected = oracles.ac_conv(layer, x, case, training=False)
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.fuse()(x), expected) <= ALGEBRA
    assert_same_state(layer, before)


@every_case
def test_formula_in_train(case: Case) -> None:
    layer, x = randomised(case).train(), case.input()
    before = state(layer)
    expected = oracles.ac_conv(layer, x, case, training=True)
    found = layer(x)
    assert relative_difference(found, case.conv()(x)) > CLEARLY
    assert relative_difference(found, expected) <= ALGEBRA
    for side in SIDES:
        name = f'{side}_running_var'
        updated = oracles.ac_running_var(layer, side, before[name], x, case, momentum=0.1)
        assert relative_difference(before[name], updated) > CLEARLY
        assert relative_difference(layer.state_dict()[name], updated) <= ALGEBRA


@pytest.mark.parametrize('momentum', [0.1, 0.3, 1.0])
def test_running_variance_is_kept_as_batch_norm_keeps_it(momentum: float) -> None:
    case = Case('momentum', (3, 5), stride=2, padding=(1, 2), dilation=(2, 1), groups=2)
    layer = ACConv2d.from_conv(case.conv(), momentum=momentum, eps=1e-3)
    for side in SIDES:
        assert (getattr(layer, f'{side}_running_var') == 1).all()
    norms = {side: nn.BatchNorm2d(6, eps=1e-3, momentum=momentum, dtype=torch.float64) for side in SIDES}
    for step in range(3):
        x = case.input(seed=20 + step)
        layer.train()(x)
        for side in SIDES:
            kernel = oracles.in_the_middle(getattr(layer, f'{side}_weight'), layer.weight.shape)
            norms[side](oracles.convolution(x, kernel, None, case))
            assert relative_difference(getattr(layer, f'{side}_running_var'), norms[side].running_var) <= ALGEBRA
            assert getattr(layer, f'{side}_running_var').grad_fn is None


def test_gradient_flows_through_the_variance_of_the_batch() -> None:
    """The normalised branch does not depend on the size of its kernel: the gradient along the kernel vanishes."""
    layer, x = randomised(BIASED, eps=0.0).train(), BIASED.input()
    projection = torch.randn(2, 6, 9, 8, generator=generator(3), dtype=torch.float64)
    (layer(x) * projection).sum().backward()
    for side in SIDES:
        weight = getattr(layer, f'{side}_weight')
        along = (weight * weight.grad).sum(dim=(1, 2, 3))
        across = (weight.abs() * weight.grad.abs()).sum(dim=(1, 2, 3))
        assert (along.abs() <= ALGEBRA * across).all()


@pytest.mark.parametrize('options', [dict(momentum=None), dict(momentum=1.5), dict(eps=-1.0), dict(eps='small')])
def test_eps_and_momentum_are_checked(options: dict) -> None:
    with pytest.raises(ReparamError, match=f'{next(iter(options))} must be a number from 0'):
        ACConv2d(2, 2, 3, **options)


def test_transforms_of_torch_func() -> None:
    layer, x = randomised(BIASED).eval(), BIASED.input()
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict, sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        for name, gradient in torch.func.grad(loss)(parameters, sample).items():
            torch.testing.assert_close(each[name][index], gradient)


@pytest.mark.parametrize('eps', [1e-5, 1e-3])
@both_modes
def test_eps_is_within_the_root(eps: float, training: bool) -> None:
    layer, x = randomised(BIASED, eps=eps).train(training), BIASED.input()
    with torch.no_grad():
        layer.vertical_weight.mul_(1e-3)
        layer.vertical_running_var.mul_(1e-3)
    assert layer.eps == eps
    expected = oracles.ac_conv(layer, x, BIASED, training)
    assert relative_difference(layer(x), expected) <= ALGEBRA


def test_variance_is_float32_under_autocast() -> None:
    layer, x = randomised(BIASED, torch.float32, momentum=1.0).train(), BIASED.input(torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        layer(x)
    for side in SIDES:
        found = getattr(layer, f'{side}_running_var')
        expected = oracles.ac_running_var(layer, side, found, x, BIASED, momentum=1.0)
        assert found.dtype == torch.float32
        assert (found != found.bfloat16().float()).any()
        assert relative_difference(found.double(), expected) <= 2 * unit_roundoff(torch.bfloat16)


def test_variance_of_large_means_is_accurate() -> None:
    """Branch outputs far from zero: the difference of two means of squares would lose all digits in float32."""
    case = Case('offset', 3)
    layer, x = randomised(case, torch.float32, momentum=1.0).train(), case.input(torch.float32) + 1000
    layer(x)
    for side in SIDES:
        found = getattr(layer, f'{side}_running_var')
        expected = oracles.ac_running_var(layer, side, found, x, case, momentum=1.0)
        assert relative_difference(found.double(), expected) < 1e-2


def test_one_value_per_channel_does_not_poison_the_running_variance() -> None:
    """BatchNorm2d refuses such a batch in training: an unbiased variance of one value does not exist."""
    layer = randomised(Case('one', 3)).train()
    try:
        y = layer(torch.ones(1, 4, 3, 3, dtype=torch.float64))
    except ValueError:
        pass
    else:
        assert y.isfinite().all()
    for name, tensor in layer.state_dict().items():
        assert tensor.isfinite().all(), name


def test_fused_kernel_is_right_in_train_mode_before_a_norm() -> None:
    """Fine-tuning the fused weights starts where the layer stood: the following norm removes every constant."""
    case = Case('offset', 3, padding=0)
    layer, x = randomised(case, momentum=1.0), case.input() + 3
    norm = nn.BatchNorm2d(6, dtype=torch.float64).train()
    expected = norm(layer.train()(x))
    count = expected[:, 0].numel()
    with torch.no_grad():
        # The very batch's biased variances, so that nothing but the missing constants could differ.
        for side in SIDES:
            getattr(layer, f'{side}_running_var').mul_((count - 1) / count)
    assert relative_difference(norm(layer.fuse()(x)), expected) <= ALGEBRA


def test_parameters() -> None:
    for layer in (ACConv2d(4, 6, (3, 5), groups=2), ACConv2d.from_conv(nn.Conv2d(4, 6, (3, 5), groups=2))):
        assert {name: tuple(value.shape) for name, value in layer.named_parameters()} == {
            'weight': (6, 2, 3, 5),
            'bias': (6,),
            'vertical_weight': (6, 2, 3, 1),
            'horizontal_weight': (6, 2, 1, 5),
            'vertical_gamma': (6,),
            'horizontal_gamma': (6,),
        }
        assert {name: tuple(value.shape) for name, value in layer.named_buffers()} == {
            'vertical_running_var': (6,),
            'horizontal_running_var': (6,),
        }
    plain = ACConv2d(4, 6, (3, 5), groups=2, branch_norm='none')
    assert set(plain.state_dict()) == {'weight', 'bias', 'vertical_weight', 'horizontal_weight'}


@pytest.mark.parametrize('gamma_init, expected', [(None, 1.0), (1 / 3, 1 / 3), (0.0, 0.0), (2, 2.0)])
def test_scratch_start(gamma_init: float | None, expected: float) -> None:
    direct = ACConv2d(4, 6, 3, gamma_init=gamma_init, dtype=torch.float64)
    converted = ACConv2d.from_conv(BIASED.conv(), init='scratch', gamma_init=gamma_init)
    for layer in (direct, converted):
        for side in SIDES:
            assert (getattr(layer, f'{side}_gamma') == expected).all()
            assert (getattr(layer, f'{side}_running_var') == 1).all()
            assert getattr(layer, f'{side}_weight').std() > 0
    x = BIASED.input()
    expected_output = oracles.ac_conv(converted, x, BIASED, training=True)
    assert relative_difference(converted.train()(x), expected_output) <= ALGEBRA


def test_lift_starts_with_fresh_side_kernels_and_gamma_zero() -> None:
    """A side kernel of zeros has no variance, and γ would get no gradient."""
    layer = ACConv2d.from_conv(BIASED.conv())
    for side in SIDES:
        assert (getattr(layer, f'{side}_gamma') == 0).all()
        assert getattr(layer, f'{side}_weight').std() > 0
    (layer.train()(BIASED.input()) * torch.randn(2, 6, 9, 8, generator=generator(3))).sum().backward()
    for side in SIDES:
        assert (getattr(layer, f'{side}_gamma').grad != 0).all()


def kept_for_backward(function: Callable, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Output of a function, and what autograd keeps of it for the backward pass."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        return function(x), kept


def inputs_of_branches(*shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """A sum so far, two branches whose means are not zero, their gammas."""
    random = generator(1)
    y, vertical, horizontal = (mean + torch.randn(shape, generator=random) for mean in (0, 3, -2))
    gammas = torch.randn(2, shape[-3], generator=random)
    return [tensor.to(dtype).requires_grad_() for tensor in (y, vertical, horizontal, gammas)]


def added(y: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
    return add_scaled(y.clone(), [vertical, horizontal], gammas, 1e-2)[0]


@pytest.mark.parametrize('shape', [(2, 3, 4, 5), (3, 4, 5), (0, 3, 4, 5)], ids=identifier)
def test_branches_are_added_as_torch_adds_them(shape: tuple[int, ...]) -> None:
    y, *branches, gammas = inputs = inputs_of_branches(*shape)
    dims = (0, 2, 3) if len(shape) == 4 else (1, 2)
    sum_, variances = add_scaled(y.clone(), branches, gammas, 1e-2)
    if y.numel() > 0:
        wanted = y
        for branch, gamma, variance in zip(branches, gammas, variances, strict=True):
            expected = branch.var(dims, unbiased=False)
            assert relative_difference(variance, branch.var(dims)) <= ALGEBRA
            scaled = (gamma / (expected + 1e-2).sqrt()).view(-1, 1, 1) * branch
            assert relative_difference(wanted + scaled, wanted) > CLEARLY
            wanted = wanted + scaled
        assert relative_difference(sum_, wanted) <= ALGEBRA
    assert sum_.shape == shape and not variances.requires_grad
    assert torch.autograd.gradcheck(added, inputs)
    assert torch.autograd.gradgradcheck(added, inputs)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients_of_branches_in_either_layout(layout: torch.memory_format) -> None:
    """As autograd derives them from plain operations, also where gradient and branches lie differently in memory."""
    gradients = []
    for ours in (True, False):
        y, *branches, gammas = inputs = inputs_of_branches(2, 3, 4, 5)
        branches = [branch.contiguous(memory_format=layout) for branch in branches]
        if ours:
            sum_ = added(y, *branches, gammas)
        else:
            sum_ = y
            for branch, gamma in zip(branches, gammas):
                sum_ = sum_ + (gamma / (branch.var((0, 2, 3), unbiased=False) + 1e-2).sqrt()).view(-1, 1, 1) * branch
        sum_.backward(torch.randn(sum_.shape, generator=generator(2), dtype=sum_.dtype))
        gradients.append([tensor.grad for tensor in inputs])
    for found, expected in zip(*gradients, strict=True):
        assert relative_difference(found, expected) <= ALGEBRA


@pytest.mark.parametrize('count', [1, 3])
def test_any_number_of_branches(count: int) -> None:
    random = generator(1)
    tensors = [torch.randn(2, 3, 4, 5, generator=random, dtype=torch.float64) for _ in range(count + 1)]
    gammas = torch.randn(count, 3, generator=random, dtype=torch.float64)
    gradients = []
    for ours in (True, False):
        y, *branches, scales = inputs = [tensor.clone().requires_grad_() for tensor in (*tensors, gammas)]
        if ours:
            sum_, variances = add_scaled(y.clone(), branches, scales, 1e-2)
            assert variances.shape == (count, 3)
        else:
            norms = [branch.var((0, 2, 3), unbiased=False) for branch in branches]
            factors = [(scale / (norm + 1e-2).sqrt()).view(-1, 1, 1) for scale, norm in zip(scales, norms)]
            sum_ = y + sum(factor * branch for factor, branch in zip(factors, branches))
        gradients.append([sum_, *torch.autograd.grad(sum_.square().sum(), inputs)])
    for found, expected in zip(*gradients, strict=True):
        assert relative_difference(found, expected) <= ALGEBRA


def test_kernels_of_any_size_are_added_on_the_middle() -> None:
    kernel = torch.zeros(1, 1, 5, 3, requires_grad=True)
    sizes = [(5, 1), (1, 3), (3, 3), (1, 1), (5, 3)]
    branches = [torch.ones(1, 1, *size, requires_grad=True) for size in sizes]
    found = add_on_middle(kernel, branches)
    assert found[0, 0].tolist() == [[1, 2, 1], [2, 3, 2], [3, 5, 3], [2, 3, 2], [1, 2, 1]]
    assert not kernel.any()  # it is the stock weight itself
    found.sum().backward()
    assert all(torch.equal(each.grad, torch.ones_like(each)) for each in (kernel, *branches))


def test_gradients_of_a_1x1_kernel_accumulate() -> None:
    """The three kernels get the same gradient, and each needs memory of its own for it."""
    layer = ACConv2d(2, 2, 1, branch_norm='none')
    for passes in (1, 2, 3):
        layer(torch.ones(1, 2, 1, 1)).sum().backward()
        for weight in (layer.weight, layer.vertical_weight, layer.horizontal_weight):
            assert torch.equal(weight.grad, torch.full_like(weight, passes))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_branches_of_low_precision_are_scaled_in_float32_and_not_copied(dtype: torch.dtype) -> None:
    inputs = inputs_of_branches(2, 3, 8, 8, dtype=dtype)
    inputs[3] = inputs[3].detach().float().requires_grad_()  # the dtypes of autocast
    sum_, kept = kept_for_backward(lambda y: added(y, *inputs[1:]), inputs[0])
    assert [tensor.data_ptr() for tensor in kept if tensor.dim() == 4] == [branch.data_ptr() for branch in inputs[1:3]]
    projection = torch.randn(sum_.shape, generator=generator(2)).to(dtype)
    sum_.backward(projection)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = added(*exact)
    expected.backward(projection.double())
    assert sum_.dtype == dtype
    assert relative_difference(sum_.double(), expected) <= 4 * unit_roundoff(dtype)
    for found, wanted in zip(inputs, exact):
        assert found.grad.dtype == found.dtype
        assert relative_difference(found.grad.double(), wanted.grad) <= 4 * unit_roundoff(found.dtype) + 1e-6


@every_case
def test_recomputed_branches_are_the_kept_ones(case: Case) -> None:
    layers = [randomised(case, recompute=recompute).train() for recompute in (False, True)]
    outputs, inputs, sizes = [], [], []
    for layer in layers:
        x = case.input(batch=8).requires_grad_()
        y, kept = kept_for_backward(layer, x)
        y.square().sum().backward()
        outputs.append(y)
        inputs.append(x.grad)
        kept = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in kept}
        own = {value.untyped_storage().data_ptr() for value in (*layer.parameters(), x)}
        sizes.append(sum(numel for pointer, numel in kept.items() if pointer not in own))
    assert relative_difference(*outputs) <= ALGEBRA
    assert relative_difference(*inputs) <= ALGEBRA
    if case.padding_mode == 'zeros' and not case.same:  # elsewhere the padded input is kept, too
        assert sizes[0] - sizes[1] >= 2 * outputs[0].numel()
    for (name, kept), (_, recomputed) in zip(layers[0].named_parameters(), layers[1].named_parameters(), strict=True):
        assert relative_difference(kept.grad, recomputed.grad) <= ALGEBRA, name
    assert_same_state(layers[0], state(layers[1]))  # the running variances moved once


# Factors without statistics ------------------------------------------------------------------------------------------


@every_case
def test_formula_with_factors(case: Case) -> None:
    layer, x = randomised(case, branch_norm='scale').train(), case.input()
    expected = oracles.ac_conv(layer, x, case, training=True)
    assert relative_difference(case.conv()(x), expected) > CLEARLY
    for found in (layer(x), layer.fuse()(x), layer.eval()(x), layer.branch_form()(x)):
        assert relative_difference(found, expected) <= ALGEBRA
    assert not [name for name in layer.state_dict() if 'running_var' in name]


def test_starts_with_factors() -> None:
    for init, gamma in (('lift', 0.0), ('scratch', 1.0)):
        layer = ACConv2d.from_conv(BIASED.conv(), branch_norm='scale', init=init)
        for side in SIDES:
            assert (getattr(layer, f'{side}_gamma') == gamma).all()
            assert getattr(layer, f'{side}_weight').std() > 0


# The plain form -------------------------------------------------------------------------------------------------------


@every_case
@both_modes
def test_plain_form(case: Case, training: bool) -> None:
    layer, x = randomised(case, branch_norm='none').train(training), case.input()
    expected = oracles.ac_plain(layer, x, case, scale=1.0)
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert relative_difference(layer.fuse()(x), expected) <= ALGEBRA


@pytest.mark.parametrize('scale', [1.0, 1 / 3])
@both_modes
def test_plain_form_with_a_scale(scale: float, training: bool) -> None:
    conv, x = BIASED.conv(), BIASED.input()
    layer = ACConv2d.from_conv(conv, init='scratch', branch_norm='none', scale=scale).train(training)
    assert relative_difference(layer(x), conv(x)) > CLEARLY
    for _ in range(2):
        expected = oracles.ac_plain(layer, x, BIASED, scale)
        assert relative_difference(layer(x), expected) <= ALGEBRA
        assert relative_difference(layer.fuse()(x), expected) <= ALGEBRA
        randomise(layer, generator(2))


# The paper's block ----------------------------------------------------------------------------------------------------

BLOCK_CASES = tuple(case for case in AC_CASES if not case.same)
BLOCK_OPTIONS = {
    'default': {},
    'gamma_init': {'gamma_init': 0.5},
    'reduce_gamma': {'reduce_gamma': True},
    'single_init': {'single_init': True},
    'non_affine': {'affine': False},
    'last_norm': {'last_norm': True},
    'non_affine_last_norm': {'affine': False, 'last_norm': True},
    'reduce_gamma_last_norm_eps': {'reduce_gamma': True, 'last_norm': True, 'eps': 1e-2, 'momentum': 0.4},
}
every_block = pytest.mark.parametrize('options', BLOCK_OPTIONS.values(), ids=BLOCK_OPTIONS.keys())


def block_of(case: Case, dtype: torch.dtype = torch.float64, **options) -> ACBlock2d:
    arguments = case.arguments()
    del arguments['bias']
    torch.manual_seed(4)
    block = ACBlock2d(**arguments, dtype=dtype, **options)
    randomise(block, generator(2), keep=())
    return block


def check_block(block: ACBlock2d, case: Case) -> None:
    x = case.input()
    expected = oracles.ac_block(block.train(), x, case, training=True)
    assert relative_difference(block(x), expected) <= ALGEBRA
    expected = oracles.ac_block(block.eval(), x, case, training=False)
    before = state(block)
    assert relative_difference(block(x), expected) <= ALGEBRA
    fused = block.fuse()
    assert type(fused) is nn.Conv2d
    assert set(fused.state_dict()) == {'weight', 'bias'}
    assert not fused.training
    assert relative_difference(fused(x), expected) <= ALGEBRA
    assert relative_difference(block.equivalent_kernel(), fused.weight) <= ALGEBRA
    assert relative_difference(block.equivalent_bias(), fused.bias) <= ALGEBRA
    assert_same_state(block, before)


@every_block
def test_block_with_all_options(options: dict) -> None:
    for case in (BIASED, next(case for case in BLOCK_CASES if case.name == 'groups_2_5x3_bias')):
        check_block(block_of(case, **options), case)


@pytest.mark.parametrize('case', BLOCK_CASES, ids=identifier)
def test_block_formula(case: Case) -> None:
    check_block(block_of(case, last_norm=case.bias), case)


@pytest.mark.parametrize('last_norm', [False, True], ids=['sum', 'last_norm'])
@pytest.mark.parametrize('dtype', DTYPES, ids=identifier)
def test_fused_block_is_rounded_once(dtype: torch.dtype, last_norm: bool) -> None:
    block, x = block_of(BIASED, dtype, last_norm=last_norm).eval(), BIASED.input(dtype)
    fused, exact = block.fuse(), in_float64(block)
    kernel, bias = exact.equivalent_kernel(), exact.equivalent_bias()
    roundoff = unit_roundoff(dtype)
    assert fused.weight.dtype == fused.bias.dtype == dtype
    assert_within(fused.weight, kernel, roundoff * kernel.abs())
    assert_within(fused.bias, bias, roundoff * bias.abs())
    bound = roundoff * magnitude(fused, x, kernel, bias)
    assert_within(in_float64(fused)(x.double()), exact(x.double()), bound)


@pytest.mark.parametrize(
    'options, square, side',
    [
        ({}, 1.0, 1.0),
        ({'gamma_init': 0.5}, 0.5, 0.5),
        ({'reduce_gamma': True}, 1 / 3, 1 / 3),
        ({'single_init': True}, 1.0, 0.0),
    ],
)
def test_block_starts(options: dict, square: float, side: float) -> None:
    block = ACBlock2d(4, 6, (3, 5), padding=(1, 2), groups=2, dtype=torch.float64, **options)
    assert torch.allclose(block.square_bn.weight, torch.full((6,), square, dtype=torch.float64), rtol=1e-15, atol=0)
    for norm in (block.ver_bn, block.hor_bn):
        assert torch.allclose(norm.weight, torch.full((6,), side, dtype=torch.float64), rtol=1e-15, atol=0)
    for norm in (block.square_bn, block.ver_bn, block.hor_bn):
        assert (norm.bias == 0).all()
        assert (norm.eps, norm.momentum) == (1e-5, 0.1)
    assert block.last_bn is None
    assert block.square_conv.weight.shape == (6, 2, 3, 5)
    assert block.ver_conv.weight.shape == (6, 2, 3, 1)
    assert block.hor_conv.weight.shape == (6, 2, 1, 5)
    assert block.square_conv.bias is block.ver_conv.bias is block.hor_conv.bias is None


@every_block
def test_block_gradients_and_round_trips(options: dict) -> None:
    block, x = block_of(BIASED, **options).train(), BIASED.input()
    projection = torch.randn(2, 6, 9, 8, generator=generator(3), dtype=torch.float64)
    (block(x) * projection).sum().backward()
    # A last norm that is fed the batch's own statistics removes the constants that come before it.
    removed = {f'{name}.bias' for name in ('square_bn', 'ver_bn', 'hor_bn')} if options.get('last_norm') else set()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert name in removed or parameter.grad.abs().max() > 0, name
    for other in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert_same_state(other, state(block))
        assert torch.equal(other.eval()(x), copy.deepcopy(block).eval()(x))
    fresh = block_of(BIASED, **options)
    fresh.load_state_dict(block.state_dict())
    assert torch.equal(fresh.eval()(x), block.eval()(x))


@pytest.mark.parametrize('last_norm', [False, True], ids=['sum', 'last_norm'])
@both_modes
def test_scripted_block_equals_eager(training: bool, last_norm: bool) -> None:
    case = Case('script', 5, stride=2, padding=0, dilation=(1, 2), size=(9, 12), padding_mode='circular')
    block, x = block_of(case, last_norm=last_norm).train(training), case.input()
    scripted = torch.jit.script(copy.deepcopy(block))
    for _ in range(2):
        assert torch.equal(scripted(x), block(x))
    assert_same_state(scripted, state(block))


@both_modes
def test_block_edge_inputs(training: bool) -> None:
    block, x = block_of(BIASED).train(training), BIASED.input()
    assert block(x[:0]).shape == (0, 6, 9, 8)
    meta = ACBlock2d(4, 6, 3, padding=1, device='meta')
    assert all(tensor.is_meta for tensor in meta.state_dict().values())
    assert meta(torch.empty(2, 4, 9, 8, device='meta')).shape == (2, 6, 9, 8)


# Bad input ------------------------------------------------------------------------------------------------------------

BAD_KERNELS = [
    (2, ['odd', '(2, 2)']),
    ((2, 3), ['odd', '(2, 3)']),
    ((3, 4), ['odd', '(3, 4)']),
    ((1, 2), ['odd', '(1, 2)']),
]


@pytest.mark.parametrize('kernel_size, fragments', BAD_KERNELS, ids=identifier)
def test_even_sides_have_no_middle(kernel_size: int | tuple[int, int], fragments: list[str]) -> None:
    conv = nn.Conv2d(4, 6, kernel_size)
    for name, build in (
        ('ACConv2d', lambda: ACConv2d(4, 6, kernel_size)),
        ('ACConv2d', lambda: ACConv2d(4, 6, kernel_size, branch_norm='none')),
        ('ACConv2d', lambda: ACConv2d.from_conv(conv)),
        ('ACConv2d', lambda: ACConv2d.from_conv(conv, init='scratch')),
        ('ACBlock2d', lambda: ACBlock2d(4, 6, kernel_size)),
    ):
        with pytest.raises(ReparamError) as error:
            build()
        for fragment in [name, *fragments]:
            assert fragment in str(error.value)


# Options that no lift is exact with, and options that belong to the other form.
BAD_LIFT_OPTIONS = [
    ({'gamma_init': 1.0}, ['gamma_init', '1.0', 'scratch']),
    ({'gamma_init': 1 / 3}, ['gamma_init', 'scratch']),
    ({'branch_norm': 'none', 'scale': 1 / 3}, ['scale', 'scratch']),
    ({'branch_norm': 'none', 'scale': 0.0}, ['scale', '0.0', 'scratch']),
]
BAD_OPTIONS = [
    ({'branch_norm': 'none', 'recompute': True}, ["branch_norm='none'", 'recompute=True']),
    ({'branch_norm': 'layer'}, ['branch_norm', "'layer'", 'batch', 'none']),
    ({'branch_norm': None}, ['branch_norm', 'None', 'batch']),
    ({'branch_norm': 'none', 'gamma_init': 1.0}, ['gamma_init', 'branch_norm']),
    ({'branch_norm': 'batch', 'scale': 0.5}, ['scale', 'branch_norm']),
    ({'branch_norm': 'none', 'eps': 1e-3}, ['eps', '0.001', 'branch_norm']),
    ({'branch_norm': 'none', 'momentum': 0.5}, ['momentum', '0.5', 'branch_norm']),
    ({'branch_norm': 'scale', 'momentum': 0.5}, ['momentum', '0.5', 'branch_norm']),
    ({'branch_norm': 'scale', 'recompute': True}, ['recompute=True', 'branch_norm']),
    ({'branch_norm': 'scale', 'scale': 0.5}, ['scale=0.5', 'branch_norm']),
]


@pytest.mark.parametrize('options, fragments', BAD_LIFT_OPTIONS, ids=identifier)
def test_options_without_an_exact_lift(options: dict, fragments: list[str]) -> None:
    conv = nn.Conv2d(4, 6, 3)
    with pytest.raises(ReparamError) as error:
        ACConv2d.from_conv(conv, **options)
    for fragment in ['ACConv2d', *fragments]:
        assert fragment in str(error.value)
    ACConv2d.from_conv(conv, init='scratch', **options)


@pytest.mark.parametrize('options, fragments', BAD_OPTIONS, ids=identifier)
def test_bad_options(options: dict, fragments: list[str]) -> None:
    for build in (
        lambda: ACConv2d(4, 6, 3, **options),
        lambda: ACConv2d.from_conv(nn.Conv2d(4, 6, 3), init='scratch', **options),
    ):
        with pytest.raises(ReparamError) as error:
            build()
        for fragment in ['ACConv2d', *fragments]:
            assert fragment in str(error.value)


BAD_BLOCK_OPTIONS = [
    ({'gamma_init': 0.5, 'reduce_gamma': True}, ['gamma_init', 'reduce_gamma']),
    ({'gamma_init': 0.5, 'single_init': True}, ['gamma_init', 'single_init']),
    ({'reduce_gamma': True, 'single_init': True}, ['reduce_gamma', 'single_init']),
    ({'affine': False, 'gamma_init': 0.5}, ['gamma_init', 'affine']),
    ({'affine': False, 'reduce_gamma': True}, ['reduce_gamma', 'affine']),
    ({'affine': False, 'single_init': True}, ['single_init', 'affine']),
]


@pytest.mark.parametrize('options, fragments', BAD_BLOCK_OPTIONS, ids=identifier)
def test_block_options_that_contradict_each_other(options: dict, fragments: list[str]) -> None:
    with pytest.raises(ReparamError) as error:
        ACBlock2d(4, 6, 3, **options)
    for fragment in ['ACBlock2d', *fragments]:
        assert fragment in str(error.value)
