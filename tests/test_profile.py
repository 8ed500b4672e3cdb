"""Cost of a model: counts and bytes against figures worked out by hand, ratios against a clock that is told the time,
and nothing of the model changed by measuring it."""

import csv
import json

import pytest
import timm
import torch
from torch import nn

import timm_reparam
from timm_reparam import RefConv2d, ReparamError
from timm_reparam._measure import compiled_for, median_and_spread, time_interleaved
from timm_reparam.profile import (
    Profile,
    compare_profiles,
    count_parameters,
    format_comparison,
    format_count,
    format_csv,
    format_json,
    format_profiles,
    format_table,
    profile_model,
    summarize,
)

SIZE = (3, 8, 10)
TINY = dict(num_classes=10, channels=(8, 8, 8, 8), stem_width=4)


class Network(nn.Sequential):
    """Small enough to count what each layer keeps: convolution, norm, activation, classifier."""

    def __init__(self, features: int = 4, classes: int = 5):
        super().__init__(
            nn.Conv2d(3, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(features * 8 * 10, classes),
        )


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


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'train': True},
        {'train': True, 'precision': 'amp_bfloat16'},
        {'precision': 'bfloat16', 'channels_last': True},
    ],
    ids=lambda options: '-'.join(map(str, options)) or 'plain',
)
def test_measuring_changes_nothing(options: dict):
    """Neither modes, parameters, their layout and gradients, statistics, nor random numbers."""
    model = timm.create_model('resnet10t_dyconv', drop_rate=0.5, **TINY).train()
    model.bn1.eval()  # a norm that its owner has frozen
    modes = [module.training for module in model.modules()]
    state = {name: (tensor.clone(), tensor.stride()) for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    profile_model(model, input_size=(3, 32, 32), batch_size=2, runs=1, warmup=1, **options)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in model.state_dict().items():
        before, stride = state[name]
        assert tensor.dtype == before.dtype and tensor.stride() == stride and torch.equal(tensor, before), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_step_trains():
    """What is timed is a step that moves the weights and the statistics of the copy."""
    states: list[dict[str, torch.Tensor]] = []
    model = Network()
    model.register_forward_hook(
        lambda module, *_: states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    )
    profile = profile_model(model, input_size=SIZE, batch_size=2, runs=1, warmup=0, train=True)
    assert profile.step_ms > 0
    first, last = states[1], states[-1]  # the first pass counts MACs
    assert all(not torch.equal(first[name], last[name]) for name in first)


@pytest.mark.parametrize('batch_size', [2, 3])
def test_activations_worked_out_by_hand(batch_size: int):
    """The norm keeps its input and two statistics of each channel, the activation its output, which is the classifier's
    input; the convolution's input is the batch, and weights and running statistics are the model's."""
    profile = profile_model(Network(), input_size=SIZE, batch_size=batch_size, runs=0, train=True)
    feature_map = batch_size * 4 * 8 * 10 * 4
    assert profile.activation_bytes == 2 * feature_map + 2 * 4 * 4


def test_activations_of_a_checkpointed_part_do_not_count():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            convolution, norm, *rest = self
            x = checkpoint(lambda x: norm(convolution(x)), x, use_reentrant=False)
            return nn.Sequential(*rest)(x)

    profile = profile_model(Checkpointed(), input_size=SIZE, batch_size=2, runs=0, train=True)
    assert profile.activation_bytes == 2 * 4 * 8 * 10 * 4  # the output of the activation


def test_peak_memory():
    """At least weights, gradients and momentum, the batch and the activations; not much more where weights rule; and
    each image more brings at least its activations."""
    wide = Network(features=16, classes=400)
    profiles = [
        profile_model(wide, input_size=SIZE, batch_size=batch_size, runs=0, train=True) for batch_size in (2, 4, 64)
    ]
    weights = 4 * profiles[0].parameters
    image = 4 * 3 * 8 * 10
    least = [3 * weights + profile.batch_size * image + profile.activation_bytes for profile in profiles]
    for profile, floor in zip(profiles, least):
        assert profile.peak_bytes >= floor
    assert profiles[0].peak_bytes < 1.2 * least[0]
    assert profiles[1].peak_bytes > profiles[0].peak_bytes
    assert profiles[2].peak_bytes - profiles[1].peak_bytes >= least[2] - least[1]


def test_memory_of_variants():
    """Normed branches keep maps of their own; fused, the model keeps and takes what the stock model does."""
    stock, model = (timm.create_model(name, **TINY) for name in ('resnet10t', 'resnet10t_acconv'))
    profiles = compare_profiles(
        stock, model, timm_reparam.fuse_model(model), input_size=(3, 32, 32), batch_size=4, runs=0, train=True
    )
    assert format_profiles(profiles).count(' 1.00 ') == 4  # ratios of bytes need no runs
    kept, peaks = ([getattr(p, field) for p in profiles] for field in ('activation_bytes', 'peak_bytes'))
    assert kept[0] == kept[2] < kept[1]
    assert peaks[0] == peaks[2] < peaks[1]


def test_device_that_tells_nothing():
    profile = profile_model(Network().to('meta'), input_size=SIZE, runs=0, train=True)
    assert profile.macs > 0 and profile.activation_bytes is None and profile.peak_bytes is None


def test_output_that_is_no_logits():
    model = timm.create_model('resnet10t_doconv', features_only=True, channels=(8, 8, 8, 8), stem_width=4)
    profile = profile_model(model, input_size=(3, 32, 32), batch_size=2, runs=1, warmup=0, train=True)
    assert profile.step_ms > 0 and profile.activation_bytes > 0 and profile.peak_bytes > 0


@pytest.mark.parametrize(
    'precision, dtype',
    [(None, 'float32'), ('float32', 'float32'), ('bfloat16', 'bfloat16'), ('amp_bfloat16', 'float32')],
)
def test_precision(precision: str | None, dtype: str):
    """What the network is fed, and what its convolution answers."""
    seen = []
    model = Network()
    model[0].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output.dtype)))
    profile = profile_model(model, input_size=SIZE, runs=1, warmup=0, precision=precision)
    assert (profile.precision, profile.dtype) == (precision or 'float32', dtype)
    computed = torch.bfloat16 if 'bfloat16' in str(precision) else torch.float32
    assert seen[-1] == (getattr(torch, dtype), computed)


def test_channels_last():
    seen = []
    model = nn.Conv2d(3, 4, 3)
    model.register_forward_hook(
        lambda module, inputs, _: seen.append(
            [t.is_contiguous(memory_format=torch.channels_last) for t in (inputs[0], module.weight)]
        )
    )
    assert profile_model(model, input_size=SIZE, batch_size=2, runs=1, warmup=0, channels_last=True).channels_last
    assert seen == [[False, False], [True, True]]  # counted as it is, timed as asked


def test_compiled_models_all_are():
    """More models of one class than torch.compile holds by default; beyond that it runs them as they are."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    models = [Network(features=features) for features in range(2, 12)]
    with compiled_for(len(models)):
        for model in models:
            torch.compile(model, backend=backend)(torch.randn(2, *SIZE))
    assert len(graphs) == len(models)


def test_compile():
    profiles = compare_profiles(
        Network(), Network(), input_size=SIZE, batch_size=2, runs=1, train=True, torchcompile='aot_eager'
    )
    for profile in profiles:
        assert profile.torchcompile == 'aot_eager' and profile.step_ms > 0
        assert profile.activation_bytes > 0 and profile.peak_bytes > 0


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
    # MACs, then the warm-up round and three timed ones, each beginning with the next model
    assert calls == [1, 2] + [1, 2] + [2, 1] + [1, 2] + [2, 1]
    assert all(profile.runs == 3 and profile.latency_spread_ms >= 0 for profile in profiles)


def test_rounds_by_a_clock_that_is_told():
    """Each round takes twice as long as the one before: that spreads the times, and leaves the ratios alone."""
    now, order = 0.0, []

    def model(index: int, cost: float):
        def call() -> None:
            nonlocal now
            now += cost * 2 ** order.count(index)
            order.append(index)

        return call

    calls = [model(0, 1.0), model(1, 1.5), model(2, 3.0)]
    timings = time_interleaved(calls, runs=4, warmup=2, clock=lambda: now)
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1] * 2
    assert timings == [[4.0, 8.0, 16.0, 32.0], [6.0, 12.0, 24.0, 48.0], [12.0, 24.0, 48.0, 96.0]]
    first, second, third = summarize('latency', timings, [0, 0, 0])
    assert (first['latency_ms'], first['latency_spread_ms']) == (12e3, 13e3)
    assert [values['latency_ratio'] for values in (first, second, third)] == [1.0, 1.5, 3.0]
    assert all(values['latency_ratio_spread'] == 0 for values in (first, second, third))
    assert time_interleaved(calls, runs=0, warmup=2) == [[], [], []]


def test_ratios_are_taken_round_by_round():
    timings = [
        [1.0, 2.0, 4.0, 8.0, 16.0],
        [1.5, 3.0, 6.0, 12.0, 32.0],
        [2.0, 2.0, 2.0, 2.0, 2.0],
        [1.0, 3.0, 2.0, 5.0, 4.0],
    ]
    stock, slower, other, beside_other = summarize('step', timings, [0, 0, 2, 2])
    assert stock == {'step_ms': 4e3, 'step_spread_ms': 6e3, 'step_ratio': 1.0, 'step_ratio_spread': 0.0}
    assert (slower['step_ratio'], slower['step_ratio_spread']) == (1.5, 0.0)  # four rounds of 1.5, one of 2
    assert (other['step_ratio'], other['step_ms']) == (1.0, 2e3)
    assert (beside_other['step_ratio'], beside_other['step_ratio_spread']) == (1.5, 1.0)  # of 0.5, 1, 1.5, 2, 2.5
    assert median_and_spread([]) == (None, None) and median_and_spread([3.0]) == (3.0, 0.0)


def test_names_and_references():
    models = [Network(features) for features in (2, 3, 4, 5)]
    profiles = compare_profiles(
        *models, names=['a', 'b', 'c', 'd'], references=[0, 0, 2, 2], input_size=SIZE, runs=2, warmup=0
    )
    assert [(profile.name, profile.reference) for profile in profiles] == [
        ('a', 'a'),
        ('b', 'a'),
        ('c', 'c'),
        ('d', 'c'),
    ]
    assert profiles[0].latency_ratio == profiles[2].latency_ratio == 1
    assert profiles[1].latency_ratio > 0 and profiles[1].step_ratio is None
    counted = compare_profiles(*models, input_size=SIZE, runs=0)
    assert all(profile.reference is profile.latency_ms is profile.latency_ratio is None for profile in counted)


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
        ({'input_size': SIZE, 'precision': 'float8'}, "expected one of float32, .*amp_bfloat16, got 'float8'"),
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
    assert 'top-1' not in format_comparison(train_time, fused) and 'layer' not in table
    both = format_comparison(train_time, fused, logit_difference=1.25e-6, layer_difference=6.5e-8).splitlines()
    at = next(index for index, line in enumerate(both) if line.startswith('largest logit difference'))
    assert both[at + 1].split() == ['worst', 'layer,', 'relative', 'difference', '6.50e-08']
    assert len(both[at + 1]) > both[0].index('fused')  # in the column of the fused form, as the row before it
    assert format_profiles([train_time, fused]).count('\n') == 3
    assert train_time.to_dict()['input_size'] == [3, 8, 8]


def measured_profiles() -> list[Profile]:
    cost = dict(runs=20, batch_size=32, input_size=(3, 224, 224), device='cuda:0', dtype='float32', precision='amp')
    cost |= dict(channels_last=True, torchcompile='inductor', reference='mobilenetv2_100')
    figures = dict(step_ms=1234.56, step_spread_ms=10.0, activation_bytes=10**9, peak_bytes=15 * 10**8)
    ratios = dict(latency_ratio=1.5, latency_ratio_spread=0.5, step_ratio=1.25, step_ratio_spread=0.02)
    stock = dict(latency_ratio=1.0, latency_ratio_spread=0.0, step_ratio=1.0, step_ratio_spread=0.0)
    return [
        Profile('mobilenetv2_100', 35 * 10**5, 35 * 10**5, 3 * 10**8, 123.45, 1.0, **cost, **figures, **stock),
        Profile(
            'mobilenetv2_100_dyconv',
            11 * 10**6,
            10**7,
            4 * 10**8,
            185.2,
            3.0,
            **cost,
            **{**figures, 'peak_bytes': 3 * 10**9},
            **ratios,
        ),
        Profile(
            'mobilenetv2_100_dyconv, fused',
            11 * 10**6,
            10**7,
            4 * 10**8,
            185.2,
            3.0,
            **cost,
            **{**figures, 'peak_bytes': None},
            **ratios,
        ),
    ]


def test_table_of_a_comparison():
    table = format_profiles(measured_profiles())
    assert max(map(len, table.splitlines())) <= 120
    costs, training, conditions = table.split('\n\n')
    assert '185.20 ± 1.50 ms  1.50 ± 0.25' in costs.splitlines()[3]
    assert training.splitlines()[3].split('  ')[-1] == '1.25 ± 0.01'
    assert training.splitlines()[3].split()[1:6] == ['1.00', 'GB', '1.00', '3.00', 'GB']
    assert training.splitlines()[3].split()[6] == '2.00' and '3.00 GB' not in training.splitlines()[4]
    for word in (
        '20 runs',
        'batch of 32 (3x224x224)',
        'cuda:0',
        'amp',
        'channels last',
        'inductor',
        'to mobilenetv2_100 ',
    ):
        assert word in conditions


def test_csv_and_json():
    profiles = measured_profiles()
    rows = list(csv.DictReader(format_csv(profiles).splitlines()))
    assert [row['name'] for row in rows] == [profile.name for profile in profiles]
    assert (rows[1]['input_size'], rows[1]['peak_bytes'], rows[2]['peak_bytes']) == ('3x224x224', '3000000000', '')
    assert float(rows[1]['step_ratio']) == 1.25
    assert json.loads(format_json(profiles)) == [profile.to_dict() for profile in profiles]
