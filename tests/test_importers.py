"""Checkpoints in the layouts of the methods' official code, written here by formula: the same function comes in."""

import itertools
import logging
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from layers import oracles
from layers.cases import Case
from stand_in import random_model, randomise
from torch import nn

from timm_reparam import (
    ACBlock2d,
    ACConv2d,
    DBBConv2d,
    DBBlock2d,
    DOConv2d,
    DynamicConv2d,
    OREPAConv2d,
    ReparamError,
    export_state_dict,
    fuse_model,
    import_state_dict,
)
from timm_reparam.convert import convert_model

STOCK = 'resnet10t'
TINY = dict(num_classes=3, channels=(8, 8, 8, 8), stem_width=4)
State = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-12 * expected.abs().max())


def loaded(model: nn.Module, state: State) -> nn.Module:
    """The model with a foreign checkpoint, which is left as it was."""
    before = {name: value.clone() for name, value in state.items()}
    model.load_state_dict(import_state_dict(state, model))
    assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)
    return model.eval()


# The official layouts, by formula -------------------------------------------------------------------------------------


def do_entries(shape: tuple[int, int, int, int], groups: int, columns: int) -> tuple[State, torch.Tensor]:
    """W, D and d_diag of DO-Conv, and the kernel: stored kernel n = (o, i) meets the D of input channel n mod I."""
    out_channels, group_channels, kh, kw = shape
    area, in_channels = kh * kw, group_channels * groups
    w = normal(out_channels, group_channels, columns)
    if area == 1:
        return {'W': w}, w.reshape(shape)
    d, identity = normal(in_channels, area, columns), torch.zeros(in_channels, area, columns, dtype=torch.float64)
    for i, m, s in itertools.product(range(in_channels), range(area), range(columns // area * area)):
        identity[i, m, s] = float(s % area == m)
    kernel = torch.zeros(out_channels, group_channels, area, dtype=torch.float64)
    for o, i, m in itertools.product(range(out_channels), range(group_channels), range(area)):
        channel = (o * group_channels + i) % in_channels
        kernel[o, i, m] = sum((d[channel, m, s] + identity[channel, m, s]) * w[o, i, s] for s in range(columns))
    return {'W': w, 'D': d, 'd_diag': identity}, kernel.reshape(shape)


def norm_entries(name: str, channels: int, affine: bool = True) -> State:
    state = {f'{name}.running_mean': normal(channels), f'{name}.running_var': torch.rand(channels).double() + 0.5}
    if affine:
        state |= {f'{name}.weight': normal(channels), f'{name}.bias': normal(channels)}
    return state | {f'{name}.num_batches_tracked': torch.tensor(7)}


def norm_line(state: State, name: str, channel: int) -> tuple[float, float]:
    """Slope and constant of a norm in evaluation, for one channel."""
    mean, variance = (float(state[f'{name}.{key}'][channel]) for key in ('running_mean', 'running_var'))
    gamma = float(state[f'{name}.weight'][channel]) if f'{name}.weight' in state else 1.0
    beta = float(state[f'{name}.bias'][channel]) if f'{name}.bias' in state else 0.0
    slope = gamma / math.sqrt(variance + 1e-5)
    return slope, beta - mean * slope


def ac_entries(
    shape: tuple[int, int, int, int], affine: bool = True, last: bool = False
) -> tuple[State, torch.Tensor, torch.Tensor]:
    """An asymmetric block, and the kernel and the constant that it equals in evaluation."""
    out_channels, group_channels, kh, kw = shape
    state = {'square_conv.weight': normal(*shape)}
    state |= {'ver_conv.weight': normal(*shape[:3], 1), 'hor_conv.weight': normal(*shape[:2], 1, shape[3])}
    for name in ('square_bn', 'ver_bn', 'hor_bn'):
        state |= norm_entries(name, out_channels, affine)
    if last:
        state |= norm_entries('last_bn', out_channels)
    kernel, constant = torch.zeros(shape, dtype=torch.float64), torch.zeros(out_channels, dtype=torch.float64)
    for o in range(out_channels):
        (square, a), (vertical, b), (horizontal, c) = (
            norm_line(state, f'{branch}_bn', o) for branch in ('square', 'ver', 'hor')
        )
        gain, shift = norm_line(state, 'last_bn', o) if last else (1.0, 0.0)
        constant[o] = gain * (a + b + c) + shift
        for i, row, column in itertools.product(range(group_channels), range(kh), range(kw)):
            value = square * state['square_conv.weight'][o, i, row, column]
            if column == kw // 2:
                value = value + vertical * state['ver_conv.weight'][o, i, row, 0]
            if row == kh // 2:
                value = value + horizontal * state['hor_conv.weight'][o, i, 0, column]
            kernel[o, i, row, column] = gain * value
    return state, kernel, constant


def ref_entries(shape: tuple[int, int, int, int], groups: int) -> tuple[State, torch.Tensor]:
    state = {'weight': normal(*shape), 'convmap.weight': normal(shape[0] * shape[1], groups, 3, 3)}
    return state, oracles.ref_kernel(state['weight'], state['convmap.weight'], groups)


def dynamic_entries(case: Case, hidden: int, num_kernels: int, names: tuple[str, str] = ('fc1', 'fc2')) -> State:
    shape = (case.out_channels, case.in_channels // case.groups, *case.sides)
    state = {'weight': normal(num_kernels, *shape)}
    if case.bias:
        state['bias'] = normal(num_kernels, case.out_channels)
    state[f'attention.{names[0]}.weight'] = normal(hidden, case.in_channels, 1, 1)
    state[f'attention.{names[1]}.weight'] = normal(num_kernels, hidden, 1, 1)
    if names[1] == 'fc2':
        state['attention.fc2.bias'] = normal(num_kernels)
    return state


def dynamic_output(state: State, x: torch.Tensor, case: Case, names: tuple[str, str] = ('fc1', 'fc2')) -> torch.Tensor:
    """Stacked kernels, mixed for each sample by the attention at temperature 1."""
    first, second = (state[f'attention.{name}.weight'][:, :, 0, 0] for name in names)
    biases = [state.get(f'attention.{name}.bias', torch.zeros(len(w))) for name, w in zip(names, (first, second))]
    outputs = []
    for sample in x:
        pooled = [float(channel.mean()) for channel in sample]
        hidden = [
            max(0.0, float(biases[0][h]) + sum(float(first[h, i]) * value for i, value in enumerate(pooled)))
            for h in range(len(first))
        ]
        logits = [
            float(biases[1][k]) + sum(float(second[k, h]) * value for h, value in enumerate(hidden))
            for k in range(len(second))
        ]
        total = sum(math.exp(logit) for logit in logits)
        shares = [math.exp(logit) / total for logit in logits]
        kernel = sum(share * kernel for share, kernel in zip(shares, state['weight']))
        bias = sum(share * bias for share, bias in zip(shares, state['bias'])) if 'bias' in state else None
        outputs.append(oracles.convolution(sample.unsqueeze(0), kernel, bias, case))
    return torch.cat(outputs)


# DO-Conv --------------------------------------------------------------------------------------------------------------

DO_CASES = [
    # channels out and in, groups, sides, columns of D; whether D is taken over
    ((4, 6), 1, (3, 3), 9, True),
    ((4, 6), 1, (3, 5), 15, True),
    ((4, 6), 1, (3, 3), 22, True),
    ((6, 6), 6, (3, 3), 9, True),
    ((4, 8), 4, (3, 3), 12, True),
    ((12, 6), 6, (3, 3), 9, False),
    ((8, 8), 2, (3, 3), 9, False),
    ((6, 4), 2, (3, 3), 20, False),
    ((4, 6), 1, (1, 1), 1, True),
]


@pytest.mark.parametrize('channels, groups, sides, columns, taken', DO_CASES, ids=str)
def test_doconv(channels, groups, sides, columns, taken):
    """D with its own channels where the official code pairs them so, the composed kernel where it does not."""
    out_channels, in_channels = channels
    state, kernel = do_entries((out_channels, in_channels // groups, *sides), groups, columns)
    state['bias'] = normal(out_channels)
    options = dict(depth_multiplier=columns, dtype=torch.float64)
    layer = loaded(DOConv2d(in_channels, out_channels, sides, groups=groups, **options), state)
    assert close(layer.equivalent_kernel(), kernel) and torch.equal(layer.bias, state['bias'])
    if 'D' in state:
        assert torch.equal(layer.depthwise_weight, state['D'] if taken else torch.zeros_like(state['D']))
        assert not close(layer.weight, kernel) or not taken


@pytest.mark.parametrize('columns', [None, 9, 12])
def test_doconv_with_other_columns_than_the_layer_keeps_its_kernel(columns, caplog):
    state, kernel = do_entries((4, 6, 3, 3), 1, 15)
    model = nn.Sequential(DOConv2d(6, 4, 3, bias=False, depth_multiplier=columns, dtype=torch.float64))
    with caplog.at_level(logging.INFO, 'timm_reparam'):
        layer = loaded(model, {f'0.{key}': value for key, value in state.items()})[0]
    assert close(layer.equivalent_kernel(), kernel) and not layer.depthwise_weight.any()
    assert 'only the kernels of 1 of 1' in caplog.text


def test_doconv_whose_stored_identity_was_trained_too():
    state, _ = do_entries((4, 6, 3, 3), 1, 9)
    state['d_diag'] = normal(6, 9, 9)
    kernel = torch.zeros(4, 6, 9, dtype=torch.float64)
    for o, i, m, s in itertools.product(range(4), range(6), range(9), range(9)):
        kernel[o, i, m] += (state['D'][i, m, s] + state['d_diag'][i, m, s]) * state['W'][o, i, s]
    layer = loaded(DOConv2d(6, 4, 3, bias=False, dtype=torch.float64), state)
    assert close(layer.equivalent_kernel().flatten(2), kernel)


# ACNet ----------------------------------------------------------------------------------------------------------------


def ac_model(bias: bool, norm: bool, variant: bool = True, groups: int = 1, sides=(3, 5), **options) -> nn.Module:
    conv = (ACConv2d if variant else nn.Conv2d)(
        4, 6, sides, padding=1, groups=groups, bias=bias, dtype=torch.float64, **options
    )
    return nn.Sequential(conv, *([nn.BatchNorm2d(6, dtype=torch.float64)] if norm else []), nn.ReLU())


@pytest.mark.parametrize('options', [{}, dict(last=True), dict(affine=False)], ids=str)
@pytest.mark.parametrize(
    'target', [{}, dict(branch_norm='none'), dict(branch_norm='none', scale=0.5), dict(variant=False)], ids=str
)
@pytest.mark.parametrize('place', ['the norm it replaced', 'the norm that follows', 'the bias'])
@pytest.mark.parametrize('groups', [1, 2])
def test_asymmetric_block(place, target, options, groups):
    """Into the variant and into a plain convolution; its constant goes where the model has a place for it."""
    model = ac_model(bias=place == 'the bias', norm=place != 'the bias', groups=groups, **target)
    entries, kernel, constant = ac_entries((6, 4 // groups, 3, 5), **options)
    state = {f'0.{key}': value for key, value in entries.items()}
    if place == 'the norm that follows':
        state |= norm_entries('1', 6)
    loaded(model, state)
    x = normal(2, 4, 7, 8)
    expected = F.conv2d(x, kernel, constant, padding=1, groups=groups)
    if place == 'the norm that follows':
        lines = [norm_line(state, '1', channel) for channel in range(6)]
        expected = torch.stack([a * expected[:, o] + b for o, (a, b) in enumerate(lines)], 1)
    assert close(model(x), expected.relu())
    if target.get('variant', True):
        assert close(fuse_model(model)(x), expected.relu())


@pytest.mark.parametrize('last', [False, True])
def test_norm_made_for_an_asymmetric_block(last):
    """Its statistics are those of the block's outputs, as far as they are known: it is right in training, too."""
    model = ac_model(bias=False, norm=True)
    entries, _, _ = ac_entries((6, 4, 3, 5), last=last)
    for branch in ('ver', 'hor'):  # with one branch the variance is known
        entries[f'{branch}_conv.weight'].zero_()
        entries[f'{branch}_bn.running_mean'].zero_()
    norm = loaded(model, {f'0.{key}': value for key, value in entries.items()})[1]
    for o in range(6):
        slope, _ = norm_line(entries, 'square_bn', o)
        gain, _ = norm_line(entries, 'last_bn', o) if last else (1.0, 0.0)
        mean = gain * slope * entries['square_bn.running_mean'][o]
        variance = slope**2 * entries['square_bn.running_var'][o]
        if last:
            variance = gain**2 * entries['last_bn.running_var'][o]
        assert close(norm.running_mean[o], mean) and close(norm.running_var[o], variance)
        assert close(norm.weight[o] ** 2, variance + norm.eps)


def test_norm_made_for_an_asymmetric_block_has_the_variance_of_inputs_without_structure():
    """All branches see independent pixels of variance 1: the estimate is then the true variance."""
    model = ac_model(bias=False, norm=True)
    entries, kernel, _ = ac_entries((6, 4, 3, 5))
    for branch in ('square', 'ver', 'hor'):
        entries[f'{branch}_bn.running_var'] = entries[f'{branch}_conv.weight'].square().sum((1, 2, 3))
    for o in range(6):
        scales = [norm_line(entries, f'{branch}_bn', o)[0] for branch in ('square', 'ver', 'hor')]
        kernel[o] = scales[0] * entries['square_conv.weight'][o]
        kernel[o, :, :, 2] += scales[1] * entries['ver_conv.weight'][o, :, :, 0]
        kernel[o, :, 1, :] += scales[2] * entries['hor_conv.weight'][o, :, 0, :]
    norm = loaded(model, {f'0.{key}': value for key, value in entries.items()})[1]
    assert close(norm.running_var, kernel.square().sum((1, 2, 3)))


@pytest.mark.parametrize('variant', [True, False])
@pytest.mark.parametrize('followed', [True, False])
def test_fused_block(variant, followed, caplog):
    model = ac_model(bias=False, norm=True, variant=variant)
    entries = {'fused_conv.weight': normal(6, 4, 3, 5), 'fused_conv.bias': normal(6)}
    state = {f'0.{key}': value for key, value in entries.items()} | (norm_entries('1', 6) if followed else {})
    loaded(model, state)
    x = normal(2, 4, 7, 8)
    expected = F.conv2d(x, entries['fused_conv.weight'], entries['fused_conv.bias'], padding=1)
    if followed:
        lines = [norm_line(state, '1', channel) for channel in range(6)]
        expected = torch.stack([a * expected[:, o] + b for o, (a, b) in enumerate(lines)], 1)
    assert close(model(x), expected.relu())
    assert ('evaluation only' in caplog.text) is not followed


def test_asymmetric_block_stays_one_where_the_model_has_one():
    model = nn.Sequential(ACBlock2d(4, 6, (3, 5), padding=1, dtype=torch.float64), nn.ReLU())
    entries, kernel, constant = ac_entries((6, 4, 3, 5))
    state = {f'0.{key}': value for key, value in entries.items()}
    assert import_state_dict(state, model) == state
    x = normal(2, 4, 7, 8)
    assert close(loaded(model, state)(x), F.conv2d(x, kernel, constant, padding=1).relu())


def test_constant_without_a_place():
    entries, _, _ = ac_entries((6, 4, 3, 5))
    with pytest.raises(ReparamError, match=r'^0: .*no bias.*no BatchNorm'):
        loaded(ac_model(bias=False, norm=False), {f'0.{key}': value for key, value in entries.items()})


# DBB ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('channels, groups', [((4, 6), 1), ((4, 6), 2), ((4, 4), 4)], ids=str)
@pytest.mark.parametrize('target', [{}, dict(branch_norm='scale'), dict(variant=False)], ids=str)
@pytest.mark.parametrize('place', ['the norm it replaced', 'the norm that follows', 'the bias'])
def test_diverse_branch_block(channels, groups, target, place):
    """DBBlock2d has the official keys."""
    block = DBBlock2d(*channels, 3, padding=1, groups=groups, dtype=torch.float64).eval()
    randomise(block, 1)
    options = {name: value for name, value in target.items() if name != 'variant'}
    conv = (DBBConv2d if target.get('variant', True) else nn.Conv2d)(
        *channels, 3, padding=1, groups=groups, bias=place == 'the bias', dtype=torch.float64, **options
    )
    norm = [nn.BatchNorm2d(channels[1], dtype=torch.float64)] if place != 'the bias' else []
    model = nn.Sequential(conv, *norm, nn.ReLU())
    state = {f'0.{key}': value for key, value in block.state_dict().items()}
    if place == 'the norm that follows':
        state |= norm_entries('1', channels[1])
    x = normal(2, 4, 7, 8)
    expected = block(x)
    if place == 'the norm that follows':
        lines = [norm_line(state, '1', channel) for channel in range(channels[1])]
        expected = torch.stack([a * expected[:, o] + b for o, (a, b) in enumerate(lines)], 1)
    assert close(loaded(model, state)(x), expected.relu())
    if target.get('variant', True):
        assert close(fuse_model(model)(x), expected.relu())


def test_norm_made_for_a_diverse_branch_block():
    """The mean is that of the block's outputs in training, without the constant that the norm takes away."""
    block = DBBlock2d(4, 6, 3, padding=1, momentum=1.0, dtype=torch.float64)
    randomise(block, 1)
    y = block.train()(normal(8, 4, 9, 9))
    model = nn.Sequential(DBBConv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)).double()
    norm = loaded(model, {f'0.{key}': value for key, value in block.state_dict().items()})[1]
    # each branch ends in a norm, so that the mean of the sum is the sum of their biases
    ends = (block.dbb_origin.bn, block.dbb_1x1.bn, block.dbb_avg.avgbn, block.dbb_1x1_kxk.bn2)
    assert close(norm.bias, sum(end.bias for end in ends)) and close(norm.bias, y.mean((0, 2, 3)))


@pytest.mark.parametrize('variant', [True, False])
def test_fused_diverse_branch_block(variant):
    conv = (DBBConv2d if variant else nn.Conv2d)(4, 6, 3, padding=1, dtype=torch.float64)
    kernel, bias = normal(6, 4, 3, 3), normal(6)
    model = loaded(nn.Sequential(conv), {'0.dbb_reparam.weight': kernel, '0.dbb_reparam.bias': bias})
    x = normal(2, 4, 7, 8)
    assert close(model(x), F.conv2d(x, kernel, bias, padding=1))


def test_diverse_branch_block_with_other_inner_channels():
    block = DBBlock2d(4, 6, 3, inner_channels=7, dtype=torch.float64)
    model = nn.Sequential(DBBConv2d(4, 6, 3, dtype=torch.float64))
    with pytest.raises(ReparamError, match=r'^0: .*has 7 channels between them in the checkpoint, this layer has 4'):
        import_state_dict({f'0.{key}': value for key, value in block.state_dict().items()}, model)


# OREPA ----------------------------------------------------------------------------------------------------------------


def orepa_entries(channels: tuple[int, int], groups: int = 1) -> tuple[State, torch.Tensor]:
    """A k x k layer, and its kernel; the official code has the last 1x1 kernel as (O/groups, groups, I/groups, 8)."""
    (in_channels, out_channels), of_group = channels, channels[0] // groups
    inner = in_channels if groups <= 4 else 2 * in_channels
    state = {
        'weight_orepa_origin': normal(out_channels, of_group, 3, 3),
        'weight_orepa_avg_conv': normal(out_channels, of_group, 1, 1),
        'weight_orepa_pfir_conv': normal(out_channels, of_group, 1, 1),
        'weight_orepa_1x1': normal(out_channels, of_group, 1, 1),
        'weight_orepa_1x1_kxk_idconv1': normal(inner, of_group, 1, 1),
        'weight_orepa_1x1_kxk_conv2': normal(out_channels, inner // groups, 3, 3),
        'weight_orepa_gconv_dw': normal(8 * in_channels, 1, 3, 3),
        'weight_orepa_gconv_pw': normal(out_channels, 8 * of_group, 1, 1),
        'vector': normal(6, out_channels),
        'weight_orepa_avg_avg': torch.full((3, 3), 1 / 9, dtype=torch.float64),
        'id_tensor': oracles.identity_of(inner, of_group)[:, :, None, None],
        'weight_orepa_prior': normal(out_channels, 3, 3),
    }
    short = {name.removeprefix('weight_orepa_'): value for name, value in state.items()}
    first = short['1x1_kxk_idconv1'][:, :, 0, 0] + state['id_tensor'][:, :, 0, 0]
    kernels = [
        short['origin'],
        short['avg_conv'] / 9 * torch.ones(3, 3),
        short['pfir_conv'] * short['prior'][:, None],
        oracles.one_after_the_other(first, short['1x1_kxk_conv2'], groups),
        oracles.on_the_middle(short['1x1'], short['origin'].shape),
        torch.zeros(short['origin'].shape, dtype=torch.float64),
    ]
    out_group = out_channels // groups
    for group, o, i, e in itertools.product(range(groups), range(out_group), range(of_group), range(8)):
        pointwise = short['gconv_pw'].reshape(out_group, groups, of_group, 8)[o, group, i, e]
        kernels[5][group * out_group + o, i] += pointwise * short['gconv_dw'][8 * (group * of_group + i) + e, 0]
    return state, sum(factor.view(-1, 1, 1, 1) * kernel for factor, kernel in zip(state['vector'], kernels))


def orepa_1x1_entries(channels: tuple[int, int]) -> tuple[State, torch.Tensor]:
    in_channels, out_channels = channels
    middle = min(channels)
    state = {
        'weight_or1x1_origin': normal(out_channels, in_channels, 1, 1),
        'weight_or1x1_l2i_conv1': normal(middle, in_channels, 1, 1),
        'weight_or1x1_l2i_conv2': normal(out_channels, middle, 1, 1),
        'vector': normal(2, out_channels),
    }
    product = state['weight_or1x1_l2i_conv2'][:, :, 0, 0] @ state['weight_or1x1_l2i_conv1'][:, :, 0, 0]
    kernels = (state['weight_or1x1_origin'], product[:, :, None, None])
    return state, sum(factor.view(-1, 1, 1, 1) * kernel for factor, kernel in zip(state['vector'], kernels))


@pytest.mark.parametrize('variant', [True, False])
@pytest.mark.parametrize('place', ['the norm it replaced', 'the bias'])
@pytest.mark.parametrize(
    'sides, channels, groups',
    [(3, (4, 6), 1), (3, (4, 6), 2), (3, (12, 12), 6), (3, (6, 6), 6), (1, (4, 6), 1), (1, (6, 4), 1)],
    ids=str,
)
def test_orepa(sides, channels, groups, place, variant):
    entries, kernel = orepa_entries(channels, groups) if sides == 3 else orepa_1x1_entries(channels)
    entries |= norm_entries('bn', channels[1])
    conv = (OREPAConv2d if variant else nn.Conv2d)(
        *channels, sides, padding=sides // 2, groups=groups, bias=place == 'the bias', dtype=torch.float64
    )
    norm = [nn.BatchNorm2d(channels[1], dtype=torch.float64)] if place != 'the bias' else []
    model = loaded(nn.Sequential(conv, *norm), {f'0.{key}': value for key, value in entries.items()})
    x = normal(2, channels[0], 7, 8)
    lines = [norm_line(entries, 'bn', channel) for channel in range(channels[1])]
    y = F.conv2d(x, kernel, padding=sides // 2, groups=groups)
    expected = torch.stack([a * y[:, o] + b for o, (a, b) in enumerate(lines)], 1)
    assert close(model(x), expected)
    if variant:
        assert close(fuse_model(model)(x), expected)


def test_orepa_of_a_large_convolution():
    """Three 3x3 layers in a row are one 7x7 kernel, which a plain stem takes."""
    entries, kernels, channels = norm_entries('bn', 6), [], (3, 6, 6, 6)
    for index in range(3):
        state, kernel = orepa_entries(channels[index : index + 2])
        entries |= {f'weight{index}.{key}': value for key, value in state.items()}
        kernels.append(kernel)
    kernel = kernels[0].transpose(0, 1)
    for later in kernels[1:]:
        kernel = F.conv2d(kernel, later, padding=2)
    model = nn.Sequential(nn.Conv2d(3, 6, 7, 2, 3, bias=False), nn.BatchNorm2d(6)).double()
    loaded(model, {f'0.{key}': value for key, value in entries.items()})
    x = normal(2, 3, 9, 11)
    y = F.conv2d(x, kernel.transpose(0, 1), stride=2, padding=3)
    lines = [norm_line(entries, 'bn', channel) for channel in range(6)]
    assert close(model(x), torch.stack([a * y[:, o] + b for o, (a, b) in enumerate(lines)], 1))


@pytest.mark.parametrize('fused, sides', [('orepa_reparam', 3), ('or1x1_reparam', 1), ('or_large_reparam', 7)])
def test_fused_orepa(fused, sides):
    kernel, bias = normal(6, 4, sides, sides), normal(6)
    conv = OREPAConv2d(4, 6, sides, padding=sides // 2, dtype=torch.float64)
    model = loaded(nn.Sequential(conv), {f'0.{fused}.weight': kernel, f'0.{fused}.bias': bias})
    x = normal(2, 4, 7, 8)
    assert close(model(x), F.conv2d(x, kernel, bias, padding=sides // 2))


def test_orepa_with_other_sides_than_3():
    entries = {**orepa_entries((4, 6))[0], **norm_entries('bn', 6), 'weight_orepa_origin': normal(6, 4, 5, 5)}
    with pytest.raises(ReparamError, match='^0: expected 3x3 kernels, got .5, 5.'):
        import_state_dict({f'0.{key}': value for key, value in entries.items()}, nn.Sequential(OREPAConv2d(4, 6, 5)))


# RefConv --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('plain', [False, True])
def test_refconv(groups, plain):
    state, kernel = ref_entries((8, 4 // groups, 3, 3), groups)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, bias=False, dtype=torch.float64))
    model = model if plain else convert_model(model, 'refconv')
    layer = loaded(model, {f'0.{key}': value for key, value in state.items()})[0]
    assert close(layer.weight if plain else layer.equivalent_kernel(), kernel)
    if not plain:
        assert torch.equal(layer.weight, state['weight']) and torch.equal(layer.map_weight, state['convmap.weight'])


# Dynamic convolution --------------------------------------------------------------------------------------------------

DYNAMIC = [
    Case('dense', 3, padding=1, in_channels=8),
    Case('grouped', 3, padding=1, groups=2, bias=True, in_channels=8),
    Case('pointwise', 1, in_channels=8),
]


@pytest.mark.parametrize('names', [('fc1', 'fc2'), ('net.0', 'net.2')], ids=str)
@pytest.mark.parametrize('num_kernels, hidden', [(4, 4), (3, 2)])
@pytest.mark.parametrize('case', DYNAMIC, ids=str)
def test_stacked_kernels(case, num_kernels, hidden, names):
    """A narrower attention than the layer's, too; the temperature has fallen to 1."""
    state = dynamic_entries(case, hidden, num_kernels, names)
    layer = loaded(DynamicConv2d(**case.arguments(), num_kernels=num_kernels, dtype=torch.float64), state)
    assert layer.current_temperature() == 1
    x = case.input()
    assert close(layer(x), dynamic_output(state, x, case, names))


@pytest.mark.parametrize('case', DYNAMIC, ids=str)
def test_stacked_kernels_out_and_in_again(case):
    layer = randomise(DynamicConv2d(**case.arguments(), dtype=torch.float64, temperature_steps=10), 3)
    with torch.no_grad():
        layer.attention.fc1.weight.mul_(20)
        for _ in range(3):
            layer.train()(case.input())
    model = nn.Sequential(layer, nn.BatchNorm2d(case.out_channels, dtype=torch.float64)).eval()
    assert layer.current_temperature() > 1
    state = export_state_dict(model)
    entries = {key.removeprefix('0.'): value for key, value in state.items() if key.startswith('0.')}
    assert entries['weight'].shape == (4, *layer.weight.shape) and entries['attention.fc1.weight'].dim() == 4
    x = case.input()
    assert close(dynamic_output(entries, x, case), layer(x))
    assert len({tuple(row) for row in layer.attention(x.mean((2, 3))).softmax(1).tolist()}) > 1
    again = nn.Sequential(
        DynamicConv2d(**case.arguments(), dtype=torch.float64), nn.BatchNorm2d(case.out_channels, dtype=torch.float64)
    )
    assert close(loaded(again, state)(x), model(x))


def test_inference_form_can_be_trained_again():
    layer = randomise(DynamicConv2d(8, 6, 3, dtype=torch.float64, temperature_steps=10), 3)
    fused = layer.fuse()
    again = loaded(DynamicConv2d(8, 6, 3, dtype=torch.float64, temperature_steps=20), fused.state_dict())
    assert again.current_temperature() == 1 and again.temperature_steps == 20
    x = normal(2, 8, 5, 5)
    assert torch.equal(again(x), fused.eval()(x))
    again.reset_temperature()
    assert again.current_temperature() == 30


def test_wider_attention_than_the_layers():
    case = DYNAMIC[0]
    with pytest.raises(ReparamError, match=r'5 hidden features, this layer has 4.*reduction=3'):
        loaded(DynamicConv2d(**case.arguments(), dtype=torch.float64), dynamic_entries(case, 5, 4))


def test_dynamic_convolution_where_the_model_has_none():
    case = DYNAMIC[0]
    state = {f'0.{key}': value for key, value in dynamic_entries(case, 4, 4).items()}
    with pytest.raises(ReparamError, match=r'^0: .*dynamic convolution'):
        import_state_dict(state, nn.Sequential(nn.Conv2d(**case.arguments())))


@pytest.mark.parametrize('model', [nn.Conv2d(1, 1, 1), DOConv2d(2, 2, 3)], ids=['plain', 'doconv'])
def test_what_is_not_exported(model):
    with pytest.raises(ReparamError, match=r'nothing to export|only dynamic'):
        export_state_dict(model)


# Whole models of timm -------------------------------------------------------------------------------------------------


def foreign_checkpoint(variant: str) -> tuple[State, nn.Module]:
    """A resnet10t in official layers' layout, and a stock model with the kernels that they stand for."""
    stock = random_model(STOCK, **TINY).double()
    state = dict(stock.state_dict())
    norm_of = {'conv1.0': 'conv1.1', 'conv1.3': 'conv1.4', 'conv1.6': 'bn1'}
    for name, conv in stock.named_modules():
        if not isinstance(conv, nn.Conv2d) or (variant != 'doconv' and conv.kernel_size == (1, 1)):
            continue
        shape = tuple(conv.weight.shape)
        del state[f'{name}.weight']
        if variant == 'doconv':
            entries, kernel = do_entries(shape, 1, shape[2] * shape[3])
        elif variant == 'refconv':
            entries, kernel = ref_entries(shape, 1)
        else:
            entries, kernel, constant = ac_entries(shape)
            norm_name = norm_of.get(name, name.replace('conv', 'bn'))
            norm = stock.get_submodule(norm_name)
            for key in norm.state_dict():
                del state[f'{norm_name}.{key}']
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.data.fill_(1.0)
            norm.bias.data.copy_(constant)
        conv.weight.data.copy_(kernel)
        state |= {f'{name}.{key}': value for key, value in entries.items()}
    return state, stock.eval()


@pytest.mark.parametrize(
    'source, target',
    [('acconv', 'acconv'), ('doconv', 'doconv'), ('refconv', 'refconv'), ('acconv', 'doconv'), ('doconv', 'acconv')],
)
def test_create_model_takes_official_checkpoints(source, target):
    """A variant takes those of its method with everything trained, and of the other methods the kernels."""
    state, stock = foreign_checkpoint(source)
    overlay = dict(state_dict=state, num_classes=3)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **TINY)
    model = timm.create_model(f'{STOCK}_{target}', **options).eval()
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        expected = stock(x)
        assert close(model(x), expected)
        assert close(fuse_model(model)(x), expected)
    layer = model.layer1[0].conv1
    added = [value for name, value in layer.state_dict().items() if name not in ('weight', 'bias')]
    gammas = layer.vertical_gamma if target == 'acconv' else None
    trained = gammas.any() if gammas is not None else all(value.any() for value in added)
    assert bool(trained) is (source == target)


@pytest.mark.parametrize('source', ['acconv', 'doconv', 'refconv'])
def test_stock_models_take_official_checkpoints(source):
    state, stock = foreign_checkpoint(source)
    model = timm.create_model(STOCK, **TINY).double().train()
    translated = import_state_dict(state, model)
    assert model.training and translated.keys() == model.state_dict().keys()
    model.load_state_dict(translated)
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        assert close(model.eval()(x), stock(x))


def test_norms_that_carry_the_activation():
    """MobileNetV2 with blocks in place of its depthwise convolutions and their norms."""
    stock = random_model('mobilenetv2_035', num_classes=3).double().eval()
    state = dict(stock.state_dict())
    for name, conv in stock.named_modules():
        if isinstance(conv, nn.Conv2d) and conv.groups > 1:
            norm_name = name.replace('conv_dw', 'bn1' if name.startswith('blocks.0.') else 'bn2')
            norm = stock.get_submodule(norm_name)
            for key in [f'{name}.weight', *(f'{norm_name}.{key}' for key in norm.state_dict())]:
                del state[key]
            entries, kernel, constant = ac_entries(tuple(conv.weight.shape))
            state |= {f'{name}.{key}': value for key, value in entries.items()}
            conv.weight.data.copy_(kernel)
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            norm.weight.data.fill_(1.0)
            norm.bias.data.copy_(constant)
    overlay = dict(state_dict=state, num_classes=3)
    model = timm.create_model(
        'mobilenetv2_035_acconv',
        pretrained=True,
        pretrained_cfg_overlay=overlay,
        num_classes=3,
        dtype=torch.float64,
    ).eval()
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        assert close(model(x), stock(x))


def test_official_checkpoint_with_other_input_channels_and_classes():
    """timm's own adaptation of the stem and the head, after the translation."""
    state, stock = foreign_checkpoint('doconv')
    overlay = dict(pretrained=True, dtype=torch.float64, **dict(TINY, num_classes=5), in_chans=1)
    model, expected = (
        timm.create_model(name, pretrained_cfg_overlay=dict(state_dict=each, num_classes=3), **overlay).eval()
        for name, each in ((f'{STOCK}_doconv', state), (STOCK, stock.state_dict()))
    )
    x = normal(2, 1, 32, 32)
    with torch.no_grad():
        assert close(model.forward_features(x), expected.forward_features(x))


def test_convolutions_that_stayed_plain_are_lifted():
    state, stock = foreign_checkpoint('doconv')
    for key in ('W', 'D', 'd_diag'):
        del state[f'layer2.0.conv1.{key}']
    state['layer2.0.conv1.weight'] = stock.layer2[0].conv1.weight.detach()
    overlay = dict(state_dict=state, num_classes=3)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **TINY)
    model = timm.create_model(f'{STOCK}_doconv', **options).eval()
    assert not model.layer2[0].conv1.depthwise_weight.any() and model.layer2[0].conv2.depthwise_weight.any()
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        assert close(model(x), stock(x))


@pytest.mark.parametrize('source, key', [('doconv', 'D'), ('acconv', 'hor_bn.running_var'), ('refconv', 'weight')])
def test_missing_and_unexpected_keys_are_listed(source, key):
    state, _ = foreign_checkpoint(source)
    create = dict(pretrained=True, dtype=torch.float64, **TINY)
    stray = dict(state, **{'layer1.0.conv1.stray': torch.zeros(1), 'other.W': torch.zeros(1)})
    with pytest.raises(ReparamError, match=r'(?s)unexpected: layer1\.0\.conv1\.stray, other\.W'):
        timm.create_model(f'{STOCK}_{source}', pretrained_cfg_overlay=dict(state_dict=stray, num_classes=3), **create)
    missing = [f'layer1.0.conv2.{key}', f'layer3.0.conv1.{key}']
    for name in missing:
        del state[name]
    with pytest.raises(ReparamError) as error:
        timm.create_model(f'{STOCK}_{source}', pretrained_cfg_overlay=dict(state_dict=state, num_classes=3), **create)
    assert f'missing: {", ".join(missing)}' in str(error.value)


def test_dynamic_model_both_ways():
    model = random_model(f'{STOCK}_dyconv', **TINY).double()
    state = export_state_dict(model)
    assert state['layer1.0.conv1.weight'].dim() == 5 and state['conv1.0.weight'].dim() == 4
    overlay = dict(state_dict=state, num_classes=3)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, dtype=torch.float64, **TINY)
    again = timm.create_model(f'{STOCK}_dyconv', **options).eval()
    x = normal(2, 3, 32, 32)
    with torch.no_grad():
        assert close(again(x), model(x))


def test_other_checkpoints_pass_through():
    model = timm.create_model(f'{STOCK}_doconv', **TINY)
    for state in (model.state_dict(), timm.create_model(STOCK, **TINY).state_dict()):
        translated = import_state_dict(state, model)
        assert translated.keys() == state.keys() and all(translated[key] is state[key] for key in state)
