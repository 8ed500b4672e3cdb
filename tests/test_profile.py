"""Cost of a model: counts against figures worked out by hand, and nothing of the model changed by measuring it."""

import pytest
import timm
import torch
from torch import nn

import timm_reparam
from timm_reparam import RefConv2d, ReparamError
from timm_reparam.profile import (
    Profile,
    compare_profiles,
    count_parameters,
    format_comparison,
    format_count,
    format_profiles,
    format_table,
    profile_model,
)

SIZE = (3, 8, 10)


@pytest.mark.parametrize(
    'layer, parameters, macs',
    [
        # output positions * output channels * kernel area * input channels of a group
        (nn.Conv2d(3, 4, 3, padding=1, bias=False), 108, 8 * 10 * 4 * 9 * 3),
        (nn.Conv2d(3, 4, (1, 3), padding=(0, 1)), 40, 8 * 10 * 4 * 3 * 3),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), 54, 8 * 10 * 6 * 9 * 1),
        (nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False), 108, 4 * 5 * 4 * 9 * 3),
        (nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), 108, 8 * 10 * 4 * 9 * 3),
        (nn.Sequential(nn.Flatten(), nn.Linear(240, 7)), 240 * 7 + 7, 240 * 7),
        (nn.BatchNorm2d(3), 6, 0),
    ],
)
def test_counts(layer: nn.Module, parameters: int, macs: int):
    profile = profile_model(layer, input_size=SIZE, runs=0)
    assert (profile.parameters, profile.trainable_parameters, profile.macs) == (parameters, parameters, macs)
    assert profile.flops == 2 * macs
    assert profile_model(layer, input_size=SIZE, batch_size=3, runs=0).macs == macs  # per image


def test_counts_of_published_model():
    """ResNet-18 at 224 pixels: 11.69 M parameters and 1.81 G multiply-adds, as everyone counts it."""
    profile = profile_model(timm.create_model('resnet18'), runs=0)
    assert (profile.name, profile.input_size) == ('resnet18', (3, 224, 224))
    assert profile.parameters == 11_689_512
    assert profile.macs == 1_814_073_344


def test_frozen_kernels_count_but_are_not_trainable():
    conv = nn.Conv2d(4, 8, 3, bias=False)
    layer = RefConv2d.from_conv(conv)
    assert count_parameters(layer) == (8 * 4 * 9 + 8 * 4 * 9, 8 * 4 * 9)
    assert count_parameters(layer.fuse()) == (8 * 4 * 9, 8 * 4 * 9)


def test_running_statistics_do_not_count():
    assert count_parameters(nn.BatchNorm2d(5, affine=False)) == (0, 0)


def test_shared_and_frozen_parameters():
    shared = nn.Linear(4, 4)
    frozen = nn.Linear(4, 4).requires_grad_(False)
    assert count_parameters(nn.Sequential(shared, shared, frozen)) == (40, 20)


def test_train_time_form_costs_more():
    model = timm.create_model('resnet18_doconv', num_classes=10)
    fused_model = timm_reparam.fuse_model(model)
    train_time, fused = compare_profiles(model, fused_model, input_size=(3, 32, 32), runs=2, warmup=0)
    stock = profile_model(timm.create_model('resnet18', num_classes=10), input_size=(3, 32, 32), runs=0)
    assert (fused.parameters, fused.macs, fused.name) == (stock.parameters, stock.macs, 'resnet18')
    assert train_time.parameters > fused.parameters
    assert train_time.macs > fused.macs
    assert train_time.latency_ms > 0 and fused.latency_ms > 0


def test_measuring_changes_nothing():
    model = timm.create_model('resnet18_acconv', num_classes=10).train()
    model.bn1.eval()  # a norm that its owner has frozen
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    profile_model(model, input_size=(3, 32, 32), runs=1, warmup=1)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_mode_is_restored_after_an_error():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout())
    with pytest.raises(RuntimeError):
        profile_model(model, input_size=(5, 8, 8))
    assert all(module.training for module in model.modules())


def test_runs_are_interleaved():
    calls = []
    first, second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
    first.register_forward_hook(lambda *_: calls.append(1))
    second.register_forward_hook(lambda *_: calls.append(2))
    profiles = compare_profiles(first, second, input_size=SIZE, runs=3, warmup=1)
    assert calls == [1, 2] + [1, 2] * 4  # MACs, then the warm-up round and three timed ones
    assert all(profile.runs == 3 and profile.latency_spread_ms >= 0 for profile in profiles)


def test_own_channels_and_dtype():
    model = timm.create_model('resnet18', in_chans=1, num_classes=2).to(torch.bfloat16)
    profile = profile_model(model, runs=0)
    assert (profile.input_size, profile.dtype, profile.device) == ((1, 224, 224), 'bfloat16', 'cpu')


@pytest.mark.parametrize(
    'options, words',
    [
        ({}, 'input size'),
        ({'input_size': (3, 8)}, 'input_size'),
        ({'input_size': (3, 0, 8)}, 'input_size'),
        ({'input_size': SIZE, 'batch_size': 0}, 'batch_size'),
        ({'input_size': SIZE, 'runs': -1}, 'runs'),
    ],
)
def test_bad_input(options: dict, words: str):
    with pytest.raises(ReparamError, match=words):
        profile_model(nn.Conv2d(3, 4, 3), **options)


@pytest.mark.parametrize(
    'number, text',
    [
        (0, '0'),
        (999, '999'),
        (1000, '1.00 k'),
        (11_689_512, '11.69 M'),
        (123_456_789, '123.5 M'),
        (1_814_073_344, '1.81 G'),
    ],
)
def test_format_count(number: int, text: str):
    assert format_count(number) == text


def test_format_table():
    assert format_table([('a', 'bb'), ('ccc', 'd')]) == 'a    bb\n---  --\nccc   d'


def test_tables_say_what_was_measured():
    cost = dict(runs=20, batch_size=2, input_size=(3, 8, 8), device='cpu', dtype='float32')
    train_time = Profile('resnet18_doconv', 2000, 1500, 3_000_000, 4.0, 0.5, **cost)
    fused = Profile('resnet18', 1000, 1000, 2_000_000, 2.0, 0.2, **cost)
    table = format_comparison(train_time, fused, top1=(97.5, 97.25), logit_difference=1.25e-6)
    for text in ('97.50', '97.25', '1.25e-06', '2.00 k', '1.00 k', '3.00 M', '4.00 ± 0.25 ms', '2.00 ± 0.10 ms'):
        assert text in table
    assert 'top-1' not in format_comparison(train_time, fused)
    assert format_profiles([train_time, fused]).count('\n') == 3
    assert train_time.to_dict()['input_size'] == [3, 8, 8]
