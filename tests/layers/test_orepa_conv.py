"""OREPAConv2d beyond what all layers share: the formula, the starts, what is selected."""

import math

import pytest
import torch
import torch.nn as nn

from timm_reparam import ReparamError
from timm_reparam.layers import OREPAConv2d

from . import oracles
from .cases import ALGEBRA, CASES, CLEARLY, Case, generator, has_middle, identifier, randomise, relative_difference

MANY_GROUPS = Case('groups_6', 3, padding=1, groups=6, in_channels=12, out_channels=18)
OREPA_CASES = (*filter(has_middle, CASES), MANY_GROUPS)
BIASED = Case('biased', 3, padding=1, bias=True)


@pytest.mark.parametrize('case', OREPA_CASES, ids=identifier)
def test_formula(case: Case) -> None:
    layer, x = OREPAConv2d.from_conv(case.conv()), case.input()
    randomise(layer, generator(2))
    kernel = oracles.orepa_kernel(layer)
    assert relative_difference(layer.equivalent_kernel(), kernel) <= ALGEBRA
    expected = oracles.convolution(x, kernel, layer.bias, case)
    assert relative_difference(case.conv()(x), expected) > CLEARLY
    for found in (layer.train()(x), layer.eval()(x), layer.fuse()(x), layer.branch_form()(x)):
        assert relative_difference(found, expected) <= ALGEBRA


def test_parameters() -> None:
    shapes = {name: tuple(value.shape) for name, value in OREPAConv2d(12, 18, (3, 5), groups=6).state_dict().items()}
    assert shapes == {
        'weight': (18, 2, 3, 5),
        'bias': (18,),
        'weight_gamma': (18,),
        'mean_weight': (18, 2, 1, 1),
        'prior_weight': (18, 2, 1, 1),
        'point_weight': (18, 2, 1, 1),
        'inner_weight': (24, 2, 1, 1),
        'outer_weight': (18, 4, 3, 5),
        'depthwise_weight': (96, 1, 3, 5),
        'pointwise_weight': (18, 16, 1, 1),
        'prior': (18, 3, 5),
        **{f'{name}_gamma': (18,) for name in ('mean', 'prior', 'point', 'sequential', 'separable')},
    }
    assert OREPAConv2d(12, 18, 3, groups=3).inner_weight.shape == (12, 4, 1, 1)
    for channels in ((4, 6), (6, 4)):
        layer = OREPAConv2d(*channels, 1, bias=False)
        assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
            'weight': (channels[1], channels[0], 1, 1),
            'weight_gamma': (channels[1],),
            'first_weight': (4, channels[0], 1, 1),
            'second_weight': (channels[1], 4, 1, 1),
            'product_gamma': (channels[1],),
        }


@pytest.mark.parametrize('channels', [5, 6])
@pytest.mark.parametrize('sides', [(3, 3), (3, 5)])
def test_prior(channels: int, sides: tuple[int, int]) -> None:
    layer = OREPAConv2d(4, channels, sides, dtype=torch.float64)
    for channel, row, column in torch.cartesian_prod(*(torch.arange(n) for n in (channels, *sides))).tolist():
        expected = oracles.orepa_cosine(channel, channels, row, column, sides)
        assert math.isclose(layer.prior[channel, row, column].item(), expected, abs_tol=1e-14)
    rounded = OREPAConv2d(4, channels, sides, dtype=torch.bfloat16)
    assert torch.equal(rounded.prior, layer.prior.bfloat16())


STARTS = dict(weight=0.25, mean=0.25, prior=0.0, point=1.0, sequential=0.5, separable=0.5)


def test_starts() -> None:
    scratch, lifted = (OREPAConv2d.from_conv(BIASED.conv(), init=init) for init in ('scratch', 'lift'))
    for name, start in STARTS.items():
        assert (getattr(scratch, f'{name}_gamma') == start).all()
        assert (getattr(lifted, f'{name}_gamma') == (name == 'weight')).all()
    for layer in (scratch, lifted):
        assert not layer.inner_weight.any()
        for name in ('mean', 'prior', 'point', 'outer', 'depthwise', 'pointwise'):
            assert getattr(layer, f'{name}_weight').std() > 0
    bound = math.sqrt(6 / (4 * 9))  # He's uniform, for a ReLU
    assert 0.9 * bound < scratch.outer_weight.abs().max() <= bound
    (lifted.train()(BIASED.input()) * torch.randn(2, 6, 9, 8, generator=generator(3))).sum().backward()
    for name, value in lifted.named_parameters():
        if name.endswith('gamma'):
            assert (value.grad != 0).all()
        elif name not in ('weight', 'bias'):
            assert not value.grad.any()


@pytest.mark.parametrize('channels', [(4, 6), (6, 4), (5, 5)], ids=str)
def test_starts_of_1x1(channels: tuple[int, int]) -> None:
    for init in ('scratch', 'lift'):
        layer = OREPAConv2d.from_conv(nn.Conv2d(*channels, 1), init=init)
        unit, drawn = layer.first_weight, layer.second_weight
        if channels[1] <= channels[0]:
            unit, drawn = drawn, unit
        assert torch.equal(unit[:, :, 0, 0], torch.eye(min(channels)))
        assert drawn.std() > 0
        assert (layer.weight_gamma == 1).all()
        assert (layer.product_gamma == (0.5 if init == 'scratch' else 0)).all()


def test_which_convolutions_are_selected() -> None:
    for conv in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 5, groups=4), nn.Conv2d(4, 4, 1)):
        assert OREPAConv2d.selects(conv, is_stem=False)
        assert not OREPAConv2d.selects(conv, is_stem=True)
    for conv in (nn.Conv2d(4, 4, 7), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, (1, 3))):
        assert not OREPAConv2d.selects(conv, is_stem=False)


@pytest.mark.parametrize('sides', [2, (3, 4)])
def test_even_sides_have_no_middle(sides: int | tuple[int, int]) -> None:
    with pytest.raises(ReparamError, match='OREPAConv2d needs odd kernel sides'):
        OREPAConv2d.from_conv(nn.Conv2d(4, 6, sides))
