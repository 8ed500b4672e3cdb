"""convert_model, fuse_model and verify_fusion on whole models, timm's and others."""

import copy
import itertools
import logging
import pickle
import weakref
from collections.abc import Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from layers.cases import assert_same_state, state
from stand_in import KINDS, disturbed, images, random_model, randomise
from timm.layers import CondConv2d, Conv2dSame, StdConv2d
from timm.utils import ModelEmaV3, reparameterize_model
from torch import nn
from torch.nn.utils import prune

import timm_reparam
from timm_reparam import ACBlock2d, ReparamError, convert_model, fuse_model, is_variant, verify_fusion
from timm_reparam._measure import cpu_allocations
from timm_reparam.lift import lift_state_dict
from timm_reparam.timm_model import record_options
from timm_reparam.variants import VARIANTS

STATIC = [name for name, variant in VARIANTS.items() if not variant.input_dependent]
# the smallest backbone of each family
SMALLEST = {'resnet': 'resnet10t', 'mobilenetv2': 'mobilenetv2_035'}
FAMILIES = [(stock, variant) for stock in SMALLEST.values() for variant in VARIANTS]
# the second family, whose kernels are depthwise: RefConv, whose map links them there, and dynamic convolution
SOME_FAMILIES = [
    pytest.param(
        *pair,
        marks=pytest.mark.slow
        if pair[0] == SMALLEST['mobilenetv2'] and pair[1] not in ('refconv', 'dyconv', 'orepaconv')
        else [],
    )
    for pair in FAMILIES
]
# what a model is asked for does not depend on its width: a thousandth of the weights, and of the time
RESNET_NARROW = dict(channels=(8, 12, 16, 24), stem_width=4)
NARROW = {'resnet10t': RESNET_NARROW}


class Net(nn.Module):
    """Nothing of timm: shared and tied modules, a transposed convolution, even and 1x1 kernels, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.again = self.body[0]
        self.tied = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.tied.weight = self.again.weight
        self.same = Conv2dSame(8, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.body(self.stem(x)))
        x = self.point(self.up(self.same(self.tied(x))))
        return self.head(x.mean((2, 3)))


class Folding(nn.Module):
    """A block that re-parameterises itself, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def fuse(self) -> nn.Module:
        return self.conv


def stock_model(stock: str, num_classes: int = 10) -> nn.Module:
    return random_model(stock, num_classes=num_classes, **NARROW.get(stock, {}))


def converted(stock: str, variant: str, **options) -> nn.Module:
    return convert_model(stock_model(stock), variant, **options)


@pytest.mark.parametrize('stock, variant', FAMILIES)
def test_lift_keeps_the_function(stock: str, variant: str) -> None:
    model = stock_model(stock)
    reference = copy.deepcopy(model)
    x = images(4, 3, 48, 48)
    assert convert_model(model, variant) is model
    exact = variant != 'dyconv'
    for training in (False, True):
        model.train(training)
        reference.train(training)
        torch.manual_seed(0)
        expected = reference(x)
        torch.manual_seed(0)
        found = model(x)
        assert torch.equal(found, expected) if exact else (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize('stock, variant', SOME_FAMILIES)
def test_fusion_is_verified_and_is_the_stock_architecture(stock: str, variant: str) -> None:
    model = disturbed(converted(stock, variant)).eval()
    reference = stock_model(stock)
    x = images(8, 3, 32, 32)
    before = state(model)
    assert (model(x) - reference(x)).abs().max() > 1e-3 * reference(x).abs().max(), 'the variant does something'
    fused = fuse_model(model)
    assert_same_state(model, before)
    report = verify_fusion(model, fused, inputs=x)
    assert report.passed, report
    assert report.top1_agreement == 1.0 and report.num_inputs == 8
    assert report.stored > 0
    if variant in STATIC:
        assert not any(is_variant(m) for m in fused.modules())
        assert fused.pretrained_cfg['architecture'] == stock
        assert [(k, v.shape) for k, v in fused.state_dict().items()] == [
            (k, v.shape) for k, v in reference.state_dict().items()
        ]
        reference.load_state_dict(fused.state_dict())
        assert torch.equal(reference(x), fused(x))
        assert [type(m) for m in fused.modules()] == [type(m) for m in reference.modules()]
    else:
        assert fused.pretrained_cfg['architecture'] == f'{stock}_dyconv'
        options = dict(num_kernels=4, reduction=4, temperature=None, temperature_steps=10_000)
        assert fused._model_args['conv_options'] == options
        again = timm.create_model(f'{stock}_dyconv', **fused._model_args).eval()
        again.load_state_dict(fused.state_dict())
        assert torch.equal(again(x), fused(x))


@pytest.mark.parametrize('stock, variant', SOME_FAMILIES)
def test_timms_reparameterize_model_gives_the_same(stock: str, variant: str) -> None:
    model = disturbed(converted(stock, variant)).eval()
    assert_same_state(reparameterize_model(model), state(fuse_model(model)))


@pytest.mark.parametrize(
    'variant',
    [
        *('doconv', 'dyconv'),
        *(pytest.param(variant, marks=pytest.mark.slow) for variant in ('acconv', 'refconv')),
    ],
)
def test_blocks_that_fold_themselves_stay_right_in_either_order(variant: str) -> None:
    model = disturbed(converted('repghostnet_050', variant)).double().eval()
    x = images(2, 3, 32, 32).double()
    with torch.no_grad():
        expected = model(x)
        fused = fuse_model(model)
        fused_first, folded_first = reparameterize_model(fused), reparameterize_model(model)
        if variant == 'dyconv':
            folded_first = fuse_model(folded_first)
        else:
            with pytest.raises(ReparamError, match='nothing to fuse'):
                fuse_model(folded_first)
        for folded in (fused_first, folded_first):
            assert len(list(folded.modules())) < len(list(fused.modules())), 'the blocks have folded'
            assert (folded(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize('variant', STATIC)
def test_fine_tuning_the_fused_model_starts_where_the_train_time_model_stood(variant: str) -> None:
    """In training mode, too: the BatchNorms' statistics are those of the fused kernels' outputs."""
    model = converted('resnet10t', variant)
    x, y = images(32, 3, 48, 48), torch.arange(32) % 10
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02)
    model.train()
    for _ in range(12):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    fused = fuse_model(model)
    assert fused.training
    with torch.no_grad():
        train_time, stock = F.cross_entropy(model(x), y), F.cross_entropy(fused(x), y)
    # the running variances of branches lag behind the batch's: a few percent; the others are the same kernel
    assert abs(stock - train_time) < (0.05 if variant in ('acconv', 'dbbconv') else 1e-5) * train_time


def test_any_module() -> None:
    for variant in ('doconv', 'refconv', 'dyconv'):
        model, x = Net().eval(), images(2, 3, 9, 11)
        expected = model(x)
        weight = model.again.weight
        convert_model(model, variant)
        assert model.again is model.body[0], 'shared modules stay shared'
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-6)
        if variant == 'doconv':
            assert model.again.weight is weight and model.tied.weight is weight, 'tied parameters stay tied'
        assert is_variant(model.up) == (variant != 'dyconv')
        assert is_variant(model.point) == (variant == 'dyconv')
        assert is_variant(model.stem) == (variant != 'dyconv')
        disturbed(model)
        fused = fuse_model(model)
        assert fused.again is fused.body[0] and type(fused.same) is type(model.same.fuse())
        report = verify_fusion(model, fused, inputs=x)
        assert report.passed, report


def test_skip_takes_names_patterns_and_types() -> None:
    stock = timm.create_model('resnet10t', **RESNET_NARROW)
    every = {name for name, m in convert_model(copy.deepcopy(stock), 'doconv').named_modules() if is_variant(m)}
    for skip, left_out in (
        ('conv1', {name for name in every if name.startswith('conv1.')}),
        (['layer1.0.conv1', 'layer[34].*'], {'layer1.0.conv1', *(n for n in every if n[:6] in ('layer3', 'layer4'))}),
        (type(stock.layer1[0]), {name for name in every if name.startswith('layer')}),
    ):
        model = convert_model(copy.deepcopy(stock), 'doconv', skip=skip)
        assert left_out and left_out < every
        assert {name for name, m in model.named_modules() if is_variant(m)} == every - left_out
        recorded = model._model_args['conv_options']
        assert recorded == dict(depth_multiplier=None, skip=recorded['skip']) and isinstance(recorded['skip'], list)
        again = timm.create_model('resnet10t_doconv', conv_options=recorded, **RESNET_NARROW)
        assert list(again.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize('init', ['lift', 'scratch'])
@pytest.mark.parametrize('variant', KINDS)
def test_tied_parameters_stay_tied_and_as_they_are(variant: str, init: str) -> None:
    model = Net()
    weight, values = model.tied.weight, model.tied.weight.detach().clone()
    convert_model(model, variant, init=init, **(dict(skip='up') if variant == 'acconv' else {}))
    assert torch.equal(weight, values) and torch.equal(model.tied.weight, values)
    if variant != 'refconv':  # whose base is frozen: a copy
        assert model.again.weight is weight and model.tied.weight is weight


class Named(nn.Module):
    """Modules whose names are patterns, too."""

    def __init__(self) -> None:
        super().__init__()
        for name in ('a[0]', 'a0', 'b*', 'bc', 'c?', 'cd'):
            self.add_module(name, nn.Conv2d(3, 3, 3))


@pytest.mark.parametrize(
    'skip, left_out',
    [
        ('a[0]', {'a[0]'}),
        ('b*', {'b*'}),
        (['c?', 'a0'], {'c?', 'a0'}),
        ('[ab]*', {'a[0]', 'a0', 'b*', 'bc'}),
        ('a[[]0]', {'a[0]'}),
        ('a[0-1]', {'a0'}),
    ],
)
def test_a_name_comes_before_a_pattern(skip, left_out: set[str]) -> None:
    plan = timm_reparam.plan_conversion(Named(), 'doconv', skip=skip)
    assert {name for name, why in plan.items() if why == 'left out by skip'} == left_out
    model = Named()
    model.pretrained_cfg = dict(architecture='named')
    convert_model(model, 'doconv', skip=skip)
    assert {name for name, m in model.named_children() if not is_variant(m)} == left_out
    assert timm_reparam.plan_conversion(Named(), 'doconv', skip=model._conv_options['skip']) == plan


def test_the_names_of_a_type_are_no_patterns() -> None:
    model = Named()
    model.add_module('a[1]', nn.Sequential(nn.Conv2d(3, 3, 3)))
    model.add_module('a1', nn.Conv2d(3, 3, 3))
    plan = timm_reparam.plan_conversion(model, 'doconv', skip=nn.Sequential)
    assert {name for name, why in plan.items() if why} == {'a[1].0'}


class Composed(nn.Module):
    """A network of somebody's own, with ACNet's block, convolutions and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3))
        self.block = ACBlock2d(8, 8, 3, stride=2, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.last = ACBlock2d(8, 6, (3, 5), padding=(1, 2), padding_mode='reflect', last_norm=True)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.norm(self.block(self.stem(x))).relu())
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize('variant', [None, *VARIANTS])
def test_blocks_in_a_network_are_fused_to_convolutions(variant: str | None) -> None:
    model = Composed()
    if variant:
        convert_model(model, variant)
        assert all(type(conv) is nn.Conv2d for conv in (model.block.square_conv, model.last.hor_conv))
    disturbed(model).eval()
    model.block.role = 'body'
    seen: list[nn.Module] = []
    model.block.register_forward_hook(lambda module, args, output: seen.append(module))
    x, before = images(2, 3, 15, 16), state(model)
    with torch.no_grad():
        expected = model(x)
        for fold_bn in (False, True):
            fused = fuse_model(model, fold_bn=fold_bn)
            seen.clear()
            assert torch.allclose(fused(x), expected, rtol=1e-4, atol=1e-5)
            assert seen == [fused.block] and fused.block.role == 'body'
            for conv in (fused.block, fused.last):
                assert type(conv) is nn.Conv2d and conv.bias is not None and not conv.training
            report = verify_fusion(model, fused, inputs=x)
            assert report.passed, report
            assert {'block', 'last'} <= {layer.name.partition(' ')[0] for layer in report.layers}
    assert_same_state(model, before)
    with pytest.raises(ReparamError, match='block: expected a fused layer, got ACBlock2d; pass what fuse_model'):
        unfused = fuse_model(model)
        unfused.block = copy.deepcopy(model.block)
        verify_fusion(model, unfused, inputs=x)
    assert type(fuse_model(model.block)) is nn.Conv2d and verify_fusion(model.block, inputs=images(2, 8, 7, 7)).passed


def test_blocks_that_fold_themselves_are_left_alone() -> None:
    model = nn.Sequential(Folding(), nn.Conv2d(3, 3, 3))
    convert_model(model, 'doconv')
    assert not is_variant(model[0].conv) and is_variant(model[1])
    model = timm.create_model('repvgg_a0', num_classes=3)
    with pytest.raises(ReparamError, match='nothing to convert to doconv.* 44 inside RepVggBlock, which re-param'):
        convert_model(model, 'doconv')


def test_weight_standardised_convolutions_are_left_alone() -> None:
    model = timm.create_model('resnetv2_50x1_bit', num_classes=3)
    with pytest.raises(ReparamError, match='nothing to convert to dyconv.* 53 of type StdConv2d'):
        convert_model(model, 'dyconv')


@pytest.mark.parametrize('channels, sees_images', [(1, True), (4, True), (5, False), (64, False)])
def test_only_a_convolution_of_images_can_be_a_stem(channels: int, sees_images: bool) -> None:
    """A part of a network begins with a convolution of features."""
    plan = timm_reparam.plan_conversion(nn.Sequential(nn.Conv2d(channels, 8, 3), nn.Conv2d(8, 8, 3)), 'dyconv')
    assert plan == {'0': 'which sees the image' if sees_images else '', '1': ''}


def test_every_convolution_that_stays_plain_has_a_reason() -> None:
    def net() -> nn.Module:
        sizes = {'long': (1, 3), 'point': 1, 'square': 5, 'large': 7}
        convs = nn.ModuleDict({name: nn.Conv2d(8, 8, size) for name, size in sizes.items()})
        convs['stem'], convs['up'] = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 2)
        convs['std'], convs['cond'] = StdConv2d(8, 8, 3), CondConv2d(8, 8, 3)
        convs['folding'], convs['skipped'] = nn.Sequential(Folding()), nn.Sequential(nn.Conv2d(8, 8, 3))
        convs.pretrained_cfg = dict(first_conv='stem')
        return convs

    own = {'long': 'with a 1x3 kernel', 'point': 'with a 1x1 kernel'}
    for variant, rule in (
        ('doconv', {'point': own['point']}),
        ('refconv', {'point': own['point']}),
        ('acconv', own | {'large': 'with a 7x7 kernel', 'up': 'of type ConvTranspose2d'}),
        ('dyconv', {'stem': 'which sees the image', 'up': 'of type ConvTranspose2d'}),
    ):
        expected = dict.fromkeys(['long', 'point', 'square', 'large', 'stem', 'up'], '') | rule
        expected |= {'std': 'of type StdConv2d', 'cond': 'of type CondConv2d', 'skipped.0': 'left out by skip'}
        expected |= {'folding.0.conv': 'inside Folding, which re-parameterises itself'}
        model = net()
        assert timm_reparam.plan_conversion(model, variant, skip='skip*') == expected
        convert_model(model, variant, skip='skip*')
        assert {name for name, m in model.named_modules() if is_variant(m)} == {n for n in expected if not expected[n]}


def test_options_reach_the_layers_and_freezing_survives() -> None:
    model = timm.create_model('resnet10t', **RESNET_NARROW)
    model.layer1.requires_grad_(False)
    convert_model(model, 'acconv', branch_norm='none')
    assert all(m.branch_norm == 'none' for m in model.modules() if is_variant(m))
    assert not any(p.requires_grad for p in model.layer1.parameters())
    assert all(p.requires_grad for p in model.layer2.parameters())
    fused = fuse_model(model)
    assert not any(p.requires_grad for p in fused.layer1.parameters())
    assert all(p.requires_grad for p in fused.layer2.parameters())


REFUSED = [
    (lambda: (Net(), 'deconv'), {}, "unknown variant 'deconv'; the variants are: acconv, dbbconv, doconv"),
    (lambda: (Net(), 'doconv'), {'init': 'zero'}, "init must be 'lift'.*'zero'"),
    (
        lambda: (Net(), 'doconv'),
        {'depth': 3},
        'stem, .*: DOConv2d: unknown option depth; its options are: depth_multiplier',
    ),
    (lambda: (Net(), 'doconv'), {'depth_multiplier': 8}, 'stem, .*: DOConv2d: depth_multiplier .* at least 9'),
    (lambda: (Net(), 'doconv'), {'skip': 'layer9'}, "skip: 'layer9' matches no module"),
    (lambda: (Net(), 'doconv'), {'skip': nn.Conv3d}, 'skip: .*Conv3d.* matches no module'),
    (lambda: (Net(), 'doconv'), {'skip': 3 * (4,)}, 'skip: expected a module name, a pattern or a type, got 4'),
    (lambda: (Net(), 'doconv'), {'skip': None}, 'skip: expected a module name, a pattern or a type, got None'),
    (
        lambda: (nn.Sequential(nn.Conv2d(3, 3, 2), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 2)), 'acconv'),
        {},
        r'0, 2: ACConv2d needs odd .* sides, got \(2, 2\); .*skip=',
    ),
    (lambda: (nn.Conv2d(3, 3, 3), 'doconv'), {}, r'itself a convolution.*DOConv2d.from_conv'),
    (lambda: (nn.Sequential(nn.Linear(3, 3)), 'refconv'), {}, 'nothing to convert to refconv: looked for Conv2d'),
    (lambda: (nn.DataParallel(Net()), 'doconv'), {}, 'got a DataParallel; pass the model inside'),
    (lambda: (ModelEmaV3(Net()), 'doconv'), {}, 'got a ModelEmaV3'),
    (lambda: (torch.compile(Net()), 'doconv'), {}, 'got a OptimizedModule'),
    (lambda: (torch.jit.script(Folding()), 'doconv'), {}, 'scripted model'),
    (
        lambda: (convert_model(Net(), 'doconv'), 'refconv'),
        {},
        r'stem: already a variant .*doconv\); convert a stock model, or fuse_model\(\) this one first$',
    ),
    (
        lambda: (fuse_model(convert_model(Net(), 'dyconv')), 'refconv'),
        {},
        r'body.0: already a variant .*dyconv\); convert a stock model$',
    ),
    (
        lambda: (nn.Sequential(nn.Conv2d(3, 3, 3), nn.utils.weight_norm(nn.Conv2d(3, 3, 3))), 'doconv'),
        {},
        '1: DOConv2d: expected a convolution without hooks, got one that carries hooks',
    ),
]


@pytest.mark.parametrize('build, options, message', REFUSED)
def test_what_is_refused_leaves_the_model_alone(build, options, message: str) -> None:
    model, variant = build()
    before, modules = state(model), list(model.modules())
    with pytest.raises(ReparamError, match=message):
        convert_model(model, variant, **options)
    assert_same_state(model, before)
    assert list(model.modules()) == modules


def test_fuse_takes_wrappers_off_and_refuses_what_it_cannot_fuse() -> None:
    model = disturbed(convert_model(Net(), 'doconv'))
    expected = state(fuse_model(model))
    for wrapped in (nn.DataParallel(model), ModelEmaV3(model), torch.compile(model)):
        assert_same_state(fuse_model(wrapped), expected)
    with pytest.raises(ReparamError, match='Net holds no over-parameterised convolution'):
        fuse_model(Net())
    for fused in (3, 'resnet18'):
        with pytest.raises(ReparamError, match='verify_fusion: fused: expected a torch.nn.Module, got a (int|str)'):
            verify_fusion(model, fused)
    single = timm_reparam.DOConv2d(3, 4, 3)
    assert type(fuse_model(single)) is nn.Conv2d


@pytest.mark.parametrize(
    'variant, fold_bn',
    [
        # two variants with each in every run
        pytest.param(variant, fold_bn, marks=[] if (index + fold_bn) % 2 else pytest.mark.slow)
        for index, variant in enumerate(VARIANTS)
        for fold_bn in (False, True)
    ],
)
def test_hooks_of_the_layers_come_along(variant: str, fold_bn: bool) -> None:
    options = dict(features_only=True, feature_cls='hook')
    model = convert_model(timm.create_model('resnet10t', **RESNET_NARROW), variant).eval()
    seen: list = []
    model.layer1[0].conv1.register_forward_hook(lambda module, inputs, output: seen.append(module))
    model.layer1[0].conv1.register_full_backward_hook(lambda module, *gradients: seen.append((module, *gradients)))
    fused = fuse_model(model, fold_bn=fold_bn)
    fused(torch.randn(1, 3, 32, 32)).sum().backward()
    assert seen[0] is fused.layer1[0].conv1 is seen[1][0] and len(seen) == 2
    assert seen[1][1][0].shape == (1, 8, 8, 8), 'the gradient of its input, not of its bias'

    features = convert_model(timm.create_model('mobilenetv2_035', **options), variant)
    features = randomise(features, seed=1).eval().double()
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    fused_features = fuse_model(features, fold_bn=fold_bn)
    for found, expected in zip(fused_features(x), features(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    pickle.dumps(fused_features)


def noted(kind: str, notes: list[tuple[str, nn.Module]]):
    """A hook of a state dict that notes its module."""
    return lambda module, *args: notes.append((kind, module))


STATE_DICT_HOOKS = (
    *('register_state_dict_pre_hook', 'register_state_dict_post_hook'),
    *('register_load_state_dict_pre_hook', 'register_load_state_dict_post_hook'),
)


@pytest.mark.parametrize('fold_bn', [False, True])
@pytest.mark.parametrize('variant', KINDS)
def test_state_dict_hooks_come_along(variant: str, fold_bn: bool) -> None:
    model = convert_model(timm.create_model('resnet10t', **RESNET_NARROW), variant).eval()
    model.register_state_dict_pre_hook(record_options)  # as models made by name have
    notes: list[tuple[str, nn.Module]] = []
    names = ('', 'layer1.0', 'layer1.0.conv1')
    for name, kind in itertools.product(names, STATE_DICT_HOOKS):
        getattr(model.get_submodule(name), kind)(noted(kind, notes))
    fused = fuse_model(model, fold_bn=fold_bn)
    assert not notes, 'fusing runs none'
    fused.load_state_dict(fused.state_dict())
    assert sorted((kind, id(module)) for kind, module in notes) == sorted(
        (kind, id(fused.get_submodule(name))) for name in names for kind in STATE_DICT_HOOKS
    )
    own = [hook for module in fused.modules() for hook in module._state_dict_pre_hooks.values()]
    assert (record_options in own) == (variant == 'dyconv'), 'that of a stock model is gone'


@pytest.mark.parametrize('fold_bn', [False, True])
@pytest.mark.parametrize('variant', KINDS)
def test_attributes_of_the_convolutions_come_along(variant: str, fold_bn: bool) -> None:
    model = Net()
    model.again._is_hf_initialized = True
    model.again.notes = {'body': model.body, 'conv': model.again}
    convert_model(model, variant, **(dict(skip='up') if variant == 'acconv' else {}))
    assert is_variant(model.again) and model.again._is_hf_initialized
    model.again.notes['conv'] = model.again
    fused = fuse_model(model, fold_bn=fold_bn)
    assert fused.again._is_hf_initialized and model.again.notes['conv'] is model.again
    assert fused.again.notes == {'body': fused.body, 'conv': fused.again}, 'a copy, as the hooks are'
    assert verify_fusion(model, fused, inputs=images(2, 3, 9, 11)).passed


def test_modes_survive_a_copy_of_a_traced_model() -> None:
    model = randomise(
        timm.create_model('resnet10t_doconv', features_only=True, feature_cls='fx', **RESNET_NARROW), seed=1
    ).eval()
    fused = fuse_model(model)
    assert not any(module.training for module in fused.modules())
    assert verify_fusion(model, inputs=torch.randn(16, 3, 32, 32)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_a_weight_that_a_hook_computes_is_refused(variant: str) -> None:
    model = convert_model(timm.create_model('resnet10t', **RESNET_NARROW), variant)
    name = 'vertical_weight' if variant == 'acconv' else 'weight'
    if variant == 'refconv':
        name = 'map_weight'
    prune.l1_unstructured(model.layer1[0].conv1, name, 0.5)
    with pytest.raises(ReparamError, match=f'layer1.0.conv1: its {name} is computed by a hook'):
        fuse_model(model)
    prune.remove(model.layer1[0].conv1, name)
    if variant == 'dyconv':
        prune.l1_unstructured(model.layer1[0].conv1.attention.fc1, 'weight', 0.5)
        with pytest.raises(ReparamError, match='layer1.0.conv1.attention.fc1: its weight is computed by a hook'):
            fuse_model(model)
        prune.remove(model.layer1[0].conv1.attention.fc1, 'weight')
    assert verify_fusion(model, inputs=torch.randn(16, 3, 32, 32)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_state_dicts_of_a_layer_with_two_names(variant: str) -> None:
    stock = Net()
    model = convert_model(Net(), variant, **(dict(skip='up') if variant == 'acconv' else {}))
    model.load_state_dict(lift_state_dict(stock.state_dict(), model))
    if variant == 'dyconv':
        model.load_state_dict(timm_reparam.import_state_dict(timm_reparam.export_state_dict(model), model))


def test_a_classifier_that_is_a_convolution_stays_plain() -> None:
    stock = timm.create_model('resnetv2_18', num_classes=5)
    assert isinstance(stock.get_classifier(), nn.Conv2d)
    assert timm_reparam.plan_conversion(stock, 'dyconv')['head.fc'] == 'which is the classifier'
    model = convert_model(stock, 'dyconv')
    weights = model.state_dict()
    model.reset_classifier(7)
    assert model.state_dict().keys() == weights.keys()


@pytest.mark.parametrize(
    'classes, seeds',
    [
        (2, range(3)),
        (10, range(3, 6)),
        pytest.param(2, range(3, 6), marks=pytest.mark.slow),
        pytest.param(10, range(3), marks=pytest.mark.slow),
    ],
)
def test_few_inputs_verify_a_right_fusion_and_not_a_wrong_one(classes: int, seeds: range) -> None:
    for seed in seeds:
        model = timm.create_model('resnet10t_doconv', num_classes=classes, channels=(8, 8, 8, 8), stem_width=4)
        model = randomise(model, seed=seed).eval()
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        assert verify_fusion(model, inputs=x).passed
        wrong = fuse_model(model)
        with torch.no_grad():
            wrong.layer1[0].conv1.weight.mul_(1.001)
        assert not verify_fusion(model, wrong, inputs=x).passed


def test_dynamic_layers_in_inference_form_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = convert_model(Net(), 'dyconv')
    with caplog.at_level(logging.INFO, logger='timm_reparam'):
        fused = fuse_model(model)
    assert len(caplog.records) == 1 and 'inference form' in caplog.text
    assert all(m.temperature is None for m in fused.modules() if is_variant(m))


def test_verify_fusion_notices_a_wrong_fusion() -> None:
    model = disturbed(converted('resnet10t', 'doconv'))
    fused = fuse_model(model)
    with torch.no_grad():
        fused.layer2[0].conv1.weight *= 1.001
    report = verify_fusion(model, fused, inputs=images(4, 3, 48, 48))
    assert not report.passed and report.stored > report.bound and 'NOT verified' in str(report)
    with torch.no_grad():
        fused.layer2[0].conv1.weight[0] = float('nan')
    assert not verify_fusion(model, fused, inputs=images(4, 3, 48, 48)).passed


def test_verify_fusion_of_a_float64_model() -> None:
    model = randomise(convert_model(random_model('mobilenetv2_035', num_classes=5), 'dyconv'), seed=1).double()
    for layer in model.modules():
        if isinstance(layer, timm_reparam.DynamicConv2d):
            layer.temperature_position.fill_(3_001)  # a temperature that does not divide without rounding
            layer.attention.fc2.weight.data *= 10  # and an attention that shows it
    report = verify_fusion(model, inputs=torch.randn(2, 3, 32, 32))
    # its own rounding is none that float64 could show, while the fused attention is rounded in another order
    assert report.own == 0 < report.stored <= report.bound and report.passed


def test_verify_fusion_puts_everything_back() -> None:
    model = converted('resnet10t', 'acconv').train()
    model.layer1.eval()
    fused = fuse_model(model).eval()
    modes = [m.training for m in model.modules()]
    before = state(model)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        report = verify_fusion(model, fused, inputs=images(4, 3, 48, 48))
        assert torch.is_autocast_enabled('cpu')
    assert report.passed, 'autocast would have cost three digits'
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes and not fused.training
    assert_same_state(model, before)


def test_verify_fusion_makes_its_own_inputs() -> None:
    model = timm.create_model('resnet10t_doconv', num_classes=3, in_chans=1, **RESNET_NARROW)
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32))
    report = verify_fusion(model)
    assert report.passed and report.num_inputs == 8 and report.to_dict()['passed']  # conftest.py: few_images
    assert verify_fusion(model) == report, 'seeded'
    batches = (images(2, 1, 32, 32, seed=seed) for seed in range(3))
    assert verify_fusion(model, inputs=batches).num_inputs == 6
    with pytest.raises(ReparamError, match='does not say its input size; pass a batch of images as inputs='):
        verify_fusion(convert_model(Net(), 'doconv'))
    with pytest.raises(ReparamError, match='at least one input'):
        verify_fusion(model, inputs=[])
    for fused in (None, model):
        with pytest.raises(ReparamError, match='nothing to fuse'):
            verify_fusion(fuse_model(model), fused)


def test_verify_fusion_holds_one_batch_at_a_time() -> None:
    model = disturbed(convert_model(Net(), 'doconv'))
    batches: list[weakref.ref] = []

    def stream() -> Iterator[torch.Tensor]:
        for seed in range(3):
            assert all(batch() is None for batch in batches)
            batch = images(2, 3, 9, 11, seed=seed)
            batches.append(weakref.ref(batch))
            yield batch
            del batch

    assert verify_fusion(model, inputs=stream()).num_inputs == 6 and len(batches) == 3


@pytest.mark.parametrize('variant', KINDS)
def test_fusing_allocates_the_fused_weights_and_one_layer_in_float64(variant: str) -> None:
    extra = set()
    for depth in (4, 8):
        model = convert_model(nn.Sequential(*(nn.Conv2d(32, 32, 3, padding=1) for _ in range(depth))), variant)
        model(images(1, 32, 5, 5)).sum().backward()  # gradients are none of the weights
        made: list[nn.Module] = []
        levels = list(
            itertools.accumulate(cpu_allocations(lambda model=model, made=made: made.append(fuse_model(model))))
        )
        (fused,), left, most = made, levels[-1], max(levels)
        weights = sum(tensor.nbytes for tensor in state(fused).values())
        assert left == weights
        extra.add(most - weights)
    assert len(extra) == 1, 'whatever the depth'
    assert extra.pop() < 10 * model[1].double().weight.nbytes


def test_verify_fusion_takes_any_outputs() -> None:
    model = timm.create_model('resnet10t_doconv', features_only=True, **RESNET_NARROW)
    report = verify_fusion(disturbed(model), inputs=images(2, 3, 48, 48))
    assert report.passed and report.top1_agreement is None


class Returns(nn.Module):
    """A convolution whose output goes through a function."""

    def __init__(self, output) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.output = output

    def forward(self, x: torch.Tensor):
        return self.output(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize('output', [lambda y: y.argmax(1), lambda y: None, lambda y: iter([y])])
def test_verify_fusion_refuses_a_model_without_outputs_to_compare(output) -> None:
    model = convert_model(Returns(output), 'doconv')
    with pytest.raises(ReparamError, match='Returns returns no floating-point tensor'):
        verify_fusion(model, inputs=images(2, 3, 8, 8))


@pytest.mark.parametrize('output', [lambda y: y[:, :1], lambda y: ()])
def test_verify_fusion_refuses_a_model_of_other_outputs(output) -> None:
    model = convert_model(Returns(lambda y: y), 'doconv')
    fused = fuse_model(model)
    fused.output = output
    with pytest.raises(ReparamError, match=r'expected the outputs of the model, \[\(2, 5\)\], got .*fuse_model'):
        verify_fusion(model, fused, inputs=images(2, 3, 8, 8))


@pytest.mark.parametrize('inputs', [[(images(2, 3, 8, 8), torch.zeros(2))], images(2, 3, 8, 8).numpy()])
def test_verify_fusion_refuses_batches_that_are_no_tensors(inputs) -> None:
    model = convert_model(Returns(lambda y: y), 'doconv')
    with pytest.raises(ReparamError, match='expected tensors as inputs=, got a batch of type (tuple|ndarray)'):
        verify_fusion(model, inputs=inputs)


@pytest.mark.parametrize('function', [lambda m: convert_model(m, 'doconv'), fuse_model, verify_fusion])
@pytest.mark.parametrize('model', ['resnet18', None])
def test_what_is_no_module_is_refused(function, model) -> None:
    with pytest.raises(ReparamError, match='expected a torch.nn.Module, got a (str|NoneType)'):
        function(model)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = disturbed(converted('resnet10t', 'doconv')).to(dtype)
    fused = fuse_model(model)
    assert {p.dtype for p in fused.parameters()} == {dtype}
    assert verify_fusion(model, fused, inputs=images(4, 3, 48, 48)).passed


def test_channels_last() -> None:
    for variant in VARIANTS:
        model = converted('resnet10t', variant).to(memory_format=torch.channels_last)
        x = images(2, 3, 48, 48).to(memory_format=torch.channels_last)
        assert verify_fusion(disturbed(model), inputs=x).passed
        model.train()(x).sum().backward()


def test_lift_state_dict_keeps_the_given_one() -> None:
    model = convert_model(random_model('resnet10t', **RESNET_NARROW), 'doconv')
    stock = random_model('resnet10t', seed=9, **RESNET_NARROW).state_dict()
    keys = list(stock)
    lifted = lift_state_dict(stock, model)
    assert list(stock) == keys and lifted is not stock
    model.load_state_dict(lifted)
