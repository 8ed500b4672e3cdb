"""DBBConv2d and DBBlock2d beyond what all layers share: the formulas, the starts, the options."""

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn

from timm_reparam import ReparamError
from timm_reparam.layers import DBBConv2d, DBBlock2d
from timm_reparam.layers._branches import pointwise_then

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
    has_middle_or_depthwise,
    identifier,
    in_float64,
    randomise,
    relative_difference,
    state,
    unit_roundoff,
)

BIASED = Case('biased', 3, padding=1, bias=True)
DEPTHWISE = Case('depthwise', 3, padding=1, groups=4, out_channels=4)
EVEN = Case('depthwise_even', (2, 4), padding=1, groups=4, out_channels=4)
DBB_CASES = (*filter(has_middle_or_depthwise, CASES), EVEN)

every_case = pytest.mark.parametrize('case', DBB_CASES, ids=identifier)
both_norms = pytest.mark.parametrize('branch_norm', ['batch', 'scale'])


def randomised(case: Case, dtype: torch.dtype = torch.float64, **options) -> DBBConv2d:
    layer = DBBConv2d.from_conv(case.conv(dtype), **options)
    randomise(layer, generator(2))
    return layer


@every_case
@both_norms
def test_formula(case: Case, branch_norm: str) -> None:
    layer, x = randomised(case, branch_norm=branch_norm).eval(), case.input()
    expected, _ = oracles.dbb_conv(layer, x, case, training=False)
    for found in (layer(x), layer.fuse()(x), layer.branch_form()(x)):
        assert relative_difference(found, expected) <= ALGEBRA
    before = state(layer)
    expected, variances = oracles.dbb_conv(layer, x, case, training=True)
    found = layer.train()(x)
    assert relative_difference(found, case.conv()(x)) > CLEARLY
    assert relative_difference(found, expected) <= ALGEBRA
    for name, variance in variances.items():
        updated = 0.9 * before[f'{name}_running_var'] + 0.1 * variance
        assert relative_difference(before[f'{name}_running_var'], updated) > CLEARLY
        assert relative_difference(getattr(layer, f'{name}_running_var'), updated) <= ALGEBRA


@pytest.mark.parametrize('size', [(2, 2), (40, 40)], ids=str)
@pytest.mark.parametrize('groups', [1, 2, 8])
def test_both_ways_of_the_sequential_branch(
    size: tuple[int, int], groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two convolutions on a small map, the composed kernel on a large one."""
    case = Case('ways', 3, padding=1, groups=groups, in_channels=8, out_channels=8, size=size)
    layer, x = randomised(case).train(), case.input()
    composed = []
    monkeypatch.setattr(
        'timm_reparam.layers.dbb_conv.pointwise_then',
        lambda *args, right=pointwise_then: composed.append(args) or right(*args),
    )
    expected, _ = oracles.dbb_conv(layer, x, case, training=True)
    assert relative_difference(layer(x), expected) <= ALGEBRA
    assert bool(composed) == (size == (40, 40))


def test_kernels_are_composed_outside_autocast() -> None:
    """E + Q in bfloat16 would lose a small Q."""
    layer = DBBConv2d(64, 64, 3, padding=1, branch_norm='scale')
    with torch.autocast('cpu', torch.bfloat16):
        found = pointwise_then(layer.inner_weight, layer.outer_weight, 1)
        kernel = layer.equivalent_kernel()
    assert found.dtype == kernel.dtype == torch.float32


@pytest.mark.parametrize('case', [BIASED, DEPTHWISE], ids=identifier)
def test_recomputed_branches_are_the_kept_ones(case: Case) -> None:
    gradients = []
    layers = [randomised(case, recompute=recompute).train() for recompute in (False, True)]
    for layer in layers:
        x = case.input().requires_grad_()
        layer(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for kept, recomputed in zip(*gradients, strict=True):
        assert relative_difference(kept, recomputed) <= ALGEBRA
    assert_same_state(layers[0], state(layers[1]))


def test_parameters() -> None:
    shapes = {name: tuple(value.shape) for name, value in DBBConv2d(4, 6, (3, 5), groups=2).state_dict().items()}
    names = ('point', 'sequential', 'mean')
    assert shapes == {
        'weight': (6, 2, 3, 5),
        'bias': (6,),
        'point_weight': (6, 2, 1, 1),
        'inner_weight': (4, 2, 1, 1),
        'outer_weight': (6, 2, 3, 5),
        'mean_weight': (6, 2, 1, 1),
        **{f'{name}_gamma': (6,) for name in names},
        **{f'{name}_running_var': (6,) for name in names},
    }
    shapes = {name: tuple(value.shape) for name, value in DBBConv2d(4, 4, 3, groups=4, bias=False).state_dict().items()}
    assert shapes == {
        'weight': (4, 1, 3, 3),
        'inner_weight': (8, 1, 1, 1),
        'outer_weight': (4, 2, 3, 3),
        **{f'{name}_gamma': (4,) for name in names[1:]},
        **{f'{name}_running_var': (4,) for name in names[1:]},
    }
    assert not [name for name in DBBConv2d(4, 6, 3, branch_norm='scale').state_dict() if 'running_var' in name]


@both_norms
def test_starts(branch_norm: str) -> None:
    """γ = 0 hides kernels that are drawn, so that it moves first; E + Q starts at the identity."""
    for case in (BIASED, DEPTHWISE):
        lifted = DBBConv2d.from_conv(case.conv(), branch_norm=branch_norm)
        scratch = DBBConv2d.from_conv(case.conv(), branch_norm=branch_norm, init='scratch')
        third = DBBConv2d.from_conv(case.conv(), branch_norm=branch_norm, init='scratch', gamma_init=1 / 3)
        for layer, start in ((lifted, 0), (scratch, 1), (third, 1 / 3)):
            for name, value in layer.state_dict().items():
                if name.endswith('gamma'):
                    assert (value == start).all()
                elif name == 'inner_weight' and case is BIASED:
                    assert not value.any()
                elif name.endswith('_weight'):
                    assert value.std() > 0
        (lifted.train()(case.input()) * torch.randn(2, 1, 9, 8, generator=generator(3))).sum().backward()
        for name, value in lifted.named_parameters():
            if name.endswith('gamma'):
                assert (value.grad != 0).all()
            elif name not in ('weight', 'bias'):
                assert not value.grad.any()


def test_which_convolutions_are_selected() -> None:
    assert DBBConv2d.selects(nn.Conv2d(4, 4, 3), is_stem=False)
    assert DBBConv2d.selects(nn.Conv2d(4, 4, 5, groups=4), is_stem=False)
    for conv, is_stem in (
        (nn.Conv2d(3, 4, 3), True),
        (nn.Conv2d(4, 4, 7), False),
        (nn.Conv2d(4, 4, 1), False),
        (nn.Conv2d(4, 4, (1, 3)), False),
    ):
        assert not DBBConv2d.selects(conv, is_stem)


@pytest.mark.parametrize(
    'options, fragments',
    [
        (dict(branch_norm='none'), ["'batch' or 'scale'", "'none'"]),
        (dict(branch_norm='scale', eps=1e-3), ['no variances', 'eps=0.001']),
        (dict(branch_norm='scale', recompute=True), ['recompute=True']),
        (dict(gamma_init=1.0), ['gamma 0', "init='scratch'"]),
    ],
    ids=identifier,
)
def test_bad_options(options: dict, fragments: list[str]) -> None:
    with pytest.raises(ReparamError) as error:
        DBBConv2d.from_conv(BIASED.conv(), **options)
    for fragment in ['DBBConv2d', *fragments]:
        assert fragment in str(error.value)


def test_even_sides_have_no_middle() -> None:
    for build in (lambda: DBBConv2d(4, 6, (3, 2)), lambda: DBBlock2d(4, 6, 4)):
        with pytest.raises(ReparamError, match='needs odd kernel sides'):
            build()


# The paper's block ----------------------------------------------------------------------------------------------------

BLOCK_CASES = (
    Case('dense', 3, padding=1),
    Case('stride', (3, 5), stride=(2, 1), padding=(1, 2), in_channels=6),
    Case('other_padding', 3, padding=(0, 2)),
    Case('groups', 3, padding=1, groups=2),
    Case('depthwise', 3, padding=1, groups=4, out_channels=4),
    Case('depthwise_5x5', 5, padding=2, stride=2, groups=4, out_channels=4),
    Case('depthwise_multiplier', 3, padding=1, groups=4, out_channels=8),
)
every_block = pytest.mark.parametrize('case', BLOCK_CASES, ids=identifier)


def block_of(case: Case, dtype: torch.dtype = torch.float64, **options) -> DBBlock2d:
    arguments = {
        name: value for name, value in case.arguments().items() if name not in ('bias', 'dilation', 'padding_mode')
    }
    block = DBBlock2d(**arguments, dtype=dtype, **options)
    randomise(block, generator(2), keep=())
    return block


@every_block
def test_block_formula(case: Case) -> None:
    block, x = block_of(case, eps=1e-2, momentum=0.4), case.input()
    for training in (True, False):
        block.train(training)
        found = block(x)  # first: the border takes the statistics that this batch is part of
        assert relative_difference(found, oracles.dbb_block(block, x, case, training)) <= ALGEBRA
    before = state(block)
    fused = block.fuse()
    assert type(fused) is nn.Conv2d and set(fused.state_dict()) == {'weight', 'bias'}
    assert relative_difference(fused(x), found) <= ALGEBRA
    assert relative_difference(block.equivalent_kernel(), fused.weight) <= ALGEBRA
    assert relative_difference(block.equivalent_bias(), fused.bias) <= ALGEBRA
    assert_same_state(block, before)


def test_block_with_other_inner_channels() -> None:
    case = BLOCK_CASES[0]
    block, x = block_of(case, inner_channels=7).eval(), case.input()
    assert block.dbb_1x1_kxk.conv1.weight.shape == (7, 4, 1, 1)
    assert relative_difference(block(x), oracles.dbb_block(block, x, case, training=False)) <= ALGEBRA
    assert relative_difference(block.fuse()(x), block(x)) <= ALGEBRA


@pytest.mark.parametrize('single_init', [False, True])
@pytest.mark.parametrize('case', [BLOCK_CASES[0], BLOCK_CASES[4]], ids=identifier)
def test_block_starts(case: Case, single_init: bool) -> None:
    arguments = dict(in_channels=4, out_channels=case.out_channels, kernel_size=3, groups=case.groups)
    block = DBBlock2d(**arguments, single_init=single_init)
    starts = {name: value for name, value in block.named_parameters() if value.dim() == 1 and name.endswith('weight')}
    for name, value in starts.items():
        inner = '.bn.bn.' in name or '.bn1.bn.' in name
        expected = 1 if inner or not single_init or name.startswith('dbb_origin') else 0
        assert (value == expected).all(), name
    if case.groups == 1:
        assert not block.dbb_1x1_kxk.idconv1.weight.any()


@pytest.mark.parametrize('dtype', DTYPES, ids=identifier)
def test_fused_block_is_rounded_once(dtype: torch.dtype) -> None:
    block = block_of(BLOCK_CASES[0], dtype).eval()
    fused, exact = block.fuse(), in_float64(block)
    for found, expected in ((fused.weight, exact.equivalent_kernel()), (fused.bias, exact.equivalent_bias())):
        assert found.dtype == dtype
        assert_within(found, expected, unit_roundoff(dtype) * expected.abs())


@pytest.mark.parametrize('case', [BLOCK_CASES[1], BLOCK_CASES[4]], ids=identifier)
@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
def test_scripted_block_equals_eager(case: Case, training: bool) -> None:
    block, x = block_of(case).train(training), case.input()
    scripted = torch.jit.script(copy.deepcopy(block))
    for _ in range(2):
        assert torch.equal(scripted(x), block(x))
    assert_same_state(scripted, state(block))


def test_every_parameter_of_a_block_learns() -> None:
    for case in (BLOCK_CASES[0], BLOCK_CASES[4]):
        block = block_of(dataclasses.replace(case, size=(6, 6))).train()
        y = block(torch.randn(2, 4, 6, 6, generator=generator(3), dtype=torch.float64))
        (y * torch.randn(y.shape, generator=generator(4), dtype=torch.float64)).sum().backward()
        for name, parameter in block.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_cases_have_a_middle() -> None:
    assert all(map(has_middle, BLOCK_CASES))
