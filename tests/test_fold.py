"""fuse_model(fold_bn=True): BatchNorms folded into the convolutions before them."""

import copy
import logging
import pickle

import pytest
import timm
import torch
from layers.cases import assert_same_state, relative_difference, state
from stand_in import BRANCHED, disturbed, images, random_model
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.utils import reparameterize_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

import timm_reparam
from timm_reparam import ReparamError, convert_model, fuse_model, is_variant, verify_fusion
from timm_reparam.hub import publish, save_checkpoint, save_pair
from timm_reparam.layers._branch_norm import BranchStatistics
from timm_reparam.variants import VARIANTS

# architecture, variant, how many norms fold and how many stay
MODELS = [
    *(('resnet10t', variant, 14, 0) for variant in VARIANTS if variant not in BRANCHED[1:]),
    ('mobilenetv2_050', 'dyconv', 52, 0),
    ('tf_mobilenetv3_small_075', 'doconv', 34, 0),  # Conv2dSame
    ('repghostnet_050', 'doconv', 16, 96),  # blocks that fold their own
]
MORE_MODELS = [
    *(('resnet18', variant, 20, 0) for variant in VARIANTS),
    *(('resnet50', variant, 53, 0) for variant in VARIANTS),
    ('mobilenetv2_050', 'doconv', 52, 0),
    ('efficientnet_b0', 'dyconv', 49, 0),
    ('regnety_002', 'acconv', 44, 0),
    ('densenet121', 'doconv', 59, 62),  # norms before convolutions, and after concatenations
    ('mixnet_s', 'dyconv', 15, 34),  # norms after concatenated convolutions
    ('convnext_atto', 'doconv', 0, 0),  # no BatchNorm
]


class Net(nn.Module):
    """Convolutions and norms of several kinds; the pairs under `kept` must not be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 12, 4, stride=2, groups=2, bias=False)
        self.up_bn = BatchNormAct2d(12, act_layer=nn.SiLU, drop_layer=nn.Dropout)
        self.same = Conv2dSame(12, 8, 3, stride=2)
        self.same_bn = nn.BatchNorm2d(8, affine=False)
        self.reflected = nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect', groups=4)
        self.reflected_bn = nn.SyncBatchNorm(8)
        self.tied = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.tied.weight = self.reflected.weight
        self.tied_bn = nn.BatchNorm2d(8)
        self.kept = nn.ModuleDict()
        for name in ('twice', 'read', 'branching', 'batch', 'hooked', 'inside', 'group'):
            self.kept[name] = nn.Conv2d(8, 8, 1)
            self.kept[f'{name}_bn'] = nn.BatchNorm2d(8, track_running_stats=name != 'batch')
        self.kept['group_bn'] = nn.GroupNorm(1, 8)
        self.kept['other_bn'] = nn.BatchNorm2d(8)
        self.kept['inside'] = nn.Sequential(self.kept['inside'])

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        x = self.up_bn(self.up(self.stem_bn(self.stem(x))))
        x = self.tied_bn(self.tied(self.reflected_bn(self.reflected(self.same_bn(self.same(x))))))
        if scale is not None:
            x = x * scale
        x = self.kept['twice_bn'](self.kept['twice'](x)) + self.kept['other_bn'](self.kept['twice'](x))
        x = self.kept['read_bn'](self.kept['read'](x)) * self.kept['read'].weight.sum()
        y = self.kept['branching'](x)
        x = self.kept['branching_bn'](y) + y
        for name in ('batch', 'hooked', 'inside', 'group'):
            x = self.kept[f'{name}_bn'](self.kept[name](x))
        return x.mean((2, 3))


# what folds does not depend on the width
NARROW = dict(channels=(8, 12, 16, 24), stem_width=4)


def converted(stock: str, variant: str) -> nn.Module:
    options = NARROW if stock == 'resnet10t' else {}
    return disturbed(convert_model(random_model(stock, num_classes=10, **options), variant)).eval()


def norms(model: nn.Module) -> list[nn.Module]:
    found = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [module for module in found if not isinstance(module, BranchStatistics)]  # norms of branches go with these


@torch.no_grad()
def difference(model: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    """Largest difference of two models' outputs, relative to the largest output."""
    return relative_difference(other(x), model(x))


SLOW = [pytest.param(*model, marks=pytest.mark.slow) for model in MORE_MODELS]


@pytest.mark.parametrize('stock, variant, folded, kept', [*MODELS, *SLOW])
def test_folding_is_exact(stock: str, variant: str, folded: int, kept: int) -> None:
    model = converted(stock, variant).double().train()
    before = state(model)
    assert len(norms(model)) == folded + kept
    found = fuse_model(model, fold_bn=True)
    assert_same_state(model, before)
    assert model.training and not any(module.training for module in found.modules())
    assert found.folded_norms == folded and len(norms(found)) == kept
    fused = fuse_model(model).eval()
    modules = dict(fused.named_modules())
    changed = {name for name, module in found.named_modules() if type(module) is not type(modules[name])}
    assert len(changed) == folded and all(isinstance(modules[name], nn.BatchNorm2d) for name in changed)
    x = images(2, 3, 32, 32).double()
    assert difference(model.eval(), found, x) <= 1e-10
    if folded:
        with torch.no_grad():
            norms(fused)[0].running_mean += 1
        assert difference(model, fused, x) > 1e-6, 'the statistics show in the output'


@pytest.mark.parametrize('variant, dtype', [('doconv', torch.float32), ('dyconv', torch.bfloat16)])
def test_folding_rounds_once(variant: str, dtype: torch.dtype) -> None:
    model = converted('resnet10t', variant).to(dtype)
    exact = fuse_model(copy.deepcopy(model).double(), fold_bn=True)
    found = fuse_model(model, fold_bn=True)
    for (name, value), expected in zip(found.state_dict().items(), exact.state_dict().values(), strict=True):
        if value.is_floating_point():
            assert value.dtype == dtype and torch.equal(value, expected.to(dtype)), name
    assert verify_fusion(model, found, inputs=images(4, 3, 32, 32)).passed


def test_channels_last() -> None:
    model = converted('resnet10t', 'dyconv').to(memory_format=torch.channels_last)
    x = images(2, 3, 32, 32).to(memory_format=torch.channels_last)
    found = fuse_model(model, fold_bn=True)
    assert found.folded_norms == 14 and verify_fusion(model, found, inputs=x).passed
    for module in found.modules():
        if type(module) is nn.Conv2d:
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize('variant', ['doconv', 'dyconv'])
def test_what_can_be_folded_is_and_nothing_else(variant: str, caplog: pytest.LogCaptureFixture) -> None:
    model = disturbed(convert_model(Net(), variant)).double().eval()
    for name in ('hooked_bn', 'inside'):
        model.kept[name].register_forward_hook(lambda module, inputs, output: None)
    with caplog.at_level(logging.INFO, logger='timm_reparam'):
        found = fuse_model(model, fold_bn=True)
    assert '5 BatchNorms are folded' in caplog.text
    assert {name for name, m in found.named_children() if type(m) is nn.Identity} == {
        'stem_bn',
        'same_bn',
        'reflected_bn',
        'tied_bn',
    }
    assert [type(m) for m in found.up_bn] == [nn.Dropout, nn.SiLU]
    assert [type(m) for name, m in found.kept.items() if name.endswith('_bn')] == [
        type(m) for name, m in model.kept.items() if name.endswith('_bn')
    ]
    x = images(2, 3, 9, 11).double()
    assert difference(model, found, x) <= 1e-10
    for name in ('hooked_bn', 'inside'):
        found.kept[name]._forward_hooks.clear()  # a lambda cannot be pickled
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert torch.equal(other(x), found(x)) and other.folded_norms == 5
        other.load_state_dict(found.state_dict())
    with torch.no_grad():
        assert relative_difference(found(x, 2.0), model(x, 2.0)) <= 1e-10, 'an argument still is one'


def test_frozen_norms_and_frozen_weights() -> None:
    model = converted('resnet10t', 'doconv').double().requires_grad_(False)
    model = freeze_batch_norm_2d(model)
    x = images(2, 3, 32, 32).double()
    found = fuse_model(model, fold_bn=True)
    assert found.folded_norms == 14 and difference(model, found, x) <= 1e-10
    assert not any(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize(
    'options', [dict(features_only=True), dict(num_classes=0), dict(num_classes=0, global_pool='')]
)
def test_models_without_a_classifier(options: dict) -> None:
    model = disturbed(timm.create_model('resnet10t_doconv', **options, **NARROW)).double().eval()
    found = fuse_model(model, fold_bn=True)
    x = images(2, 3, 32, 32).double()
    assert found.folded_norms == 14
    with torch.no_grad():
        expected, outputs = model(x), found(x)
    for a, b in zip(expected, outputs, strict=True):
        assert relative_difference(b, a) <= 1e-10


def test_blocks_that_fold_themselves_may_do_so_before_or_after() -> None:
    model = converted('repghostnet_050', 'doconv').double()
    x = images(2, 3, 32, 32).double()
    folded_last = fuse_model(model, fold_bn=True)
    found = reparameterize_model(folded_last)
    assert len(list(found.modules())) < len(list(folded_last.modules())) and difference(model, found, x) <= 1e-10


def test_a_folded_model_is_folded_again_without_harm() -> None:
    model = converted('mobilenetv2_035', 'dyconv').double()
    found = fuse_model(model, fold_bn=True)
    again = fuse_model(found, fold_bn=True)
    assert again.folded_norms == found.folded_norms == 52
    assert difference(model, again, images(2, 3, 32, 32).double()) <= 1e-10


def test_a_folded_model_is_not_saved(tmp_path) -> None:
    for variant in ('doconv', 'dyconv'):
        model = converted('resnet10t', variant)
        found = fuse_model(model, fold_bn=True)
        for save in (
            lambda model=model, found=found: save_pair(model, tmp_path, tag='a', fused=found),
            lambda found=found: save_pair(found, tmp_path, tag='a'),
            lambda found=found: publish(found, 'owner', tag='a', license='mit'),
            lambda found=found: save_checkpoint(found, tmp_path / 'folder'),
        ):
            with pytest.raises(ReparamError, match=r'got a model with folded BatchNorms.*; save the train-time model'):
                save()
    assert not list(tmp_path.iterdir())


class Branching(nn.Module):
    """What torch.fx cannot trace: a decision on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.conv(x)) if x.sum() > 0 else x


def test_what_cannot_be_folded_is_refused() -> None:
    model = convert_model(nn.Sequential(Branching()), 'doconv')
    with pytest.raises(ReparamError, match='Sequential: torch.fx cannot trace the model.*; fuse it without fold_bn'):
        fuse_model(model, fold_bn=True)
    assert not any(is_variant(m) for m in fuse_model(model).modules())
    with pytest.raises(ReparamError, match='nothing to fuse'):
        fuse_model(timm.create_model('resnet10t'), fold_bn=True)
    layer = fuse_model(timm_reparam.DOConv2d(3, 4, 3), fold_bn=True)
    assert type(layer) is nn.Conv2d and not layer.training
