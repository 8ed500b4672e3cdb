"""verify_fusion beyond planted faults (test_faults.py): what is equal, what is refused, what it says and costs."""

import copy
import itertools
import json
import math

import pytest
import timm
import torch
from faults import Net, right
from layers.cases import assert_same_state, state
from stand_in import KINDS, disturbed, images, random_model
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

import timm_reparam
from timm_reparam import DOConv2d, ReparamError, convert_model, fuse_model, is_variant, verify, verify_fusion
from timm_reparam._measure import cpu_allocations
from timm_reparam.fold import scale_outputs
from timm_reparam.layers import ReparamConv2d
from timm_reparam.layers._tensor import scale_shift, to_float64
from timm_reparam.variants import VARIANTS

STATIC = [name for name, variant in VARIANTS.items() if not variant.input_dependent]


def small(variant: str, **options) -> nn.Module:
    """A small timm model whose every new parameter and statistic is random."""
    options = dict(dict(channels=(4, 4, 8, 8), stem_width=4, num_classes=3), **options)
    return disturbed(convert_model(random_model('resnet10t', **options), variant)).eval()


class Around(nn.Module):
    """A convolution, and a function of its output."""

    def __init__(self, function) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3)
        self.function = function

    def forward(self, x: torch.Tensor):
        return self.function(self.conv(x))


def around(function, variant: str = 'doconv') -> nn.Module:
    return disturbed(convert_model(Around(function), variant)).eval()


# --- what is a fusion of what --------------------------------------------------------------------------------------


@pytest.mark.parametrize('variant', KINDS)
def test_the_model_is_not_its_own_fusion(variant: str) -> None:
    model = small(variant)
    for other in (model, nn.DataParallel(model) if torch.cuda.is_available() else torch.compile(model)):
        with pytest.raises(ReparamError, match='got the model itself as its fusion'):
            verify_fusion(model, other, inputs=images(2, 3, 32, 32))
    if variant in STATIC:
        with pytest.raises(ReparamError, match='conv1.[03]: expected a fused layer, got .*; pass what fuse_model'):
            verify_fusion(model, copy.deepcopy(model), inputs=images(2, 3, 32, 32))
    else:
        report = verify_fusion(model, copy.deepcopy(model), inputs=images(2, 3, 32, 32))
        assert not report.passed and 'temperature: expected None, got 30.0' in str(report)
        inference = fuse_model(model)
        assert verify_fusion(inference, inputs=images(2, 3, 32, 32)).passed, 'the form for inference has one, too'


@pytest.mark.parametrize('variant', STATIC)
def test_what_gamma_hides_is_compared(variant: str) -> None:
    # timm's default: the last norm of each block starts with gamma = 0, so no layer of a block reaches the output
    options = dict(channels=(8, 8, 8, 8), stem_width=4, num_classes=3)
    model = convert_model(timm.create_model('resnet10t', **options), variant).eval()
    for module in model.modules():
        if is_variant(module):
            for name, parameter in module.named_parameters():
                if name not in ('weight', 'bias'):
                    nn.init.normal_(parameter, std=0.1)
    fused = fuse_model(model)
    x = images(2, 3, 32, 32)
    assert verify_fusion(model, fused, inputs=x).passed
    with torch.no_grad():
        for block in (block for stage in (fused.layer1, fused.layer2, fused.layer3, fused.layer4) for block in stage):
            block.conv1.weight.zero_()
            block.conv2.weight.zero_()
    report = verify_fusion(model, fused, inputs=x)
    assert not report.passed and report.stored <= report.bound, 'no output tells'
    assert [layer.name for layer in report.layers_off] == [
        f'layer{stage}.0.conv{number}' for stage, number in itertools.product(range(1, 5), (1, 2))
    ]


@pytest.mark.parametrize(
    'variant, dtype',
    [
        # one of them in every run, each dtype with two variants
        pytest.param(variant, dtype, marks=[] if (index + number) % 2 == 0 else pytest.mark.slow)
        for index, variant in enumerate(VARIANTS)
        for number, dtype in enumerate((torch.bfloat16, torch.float16))
    ],
)
def test_the_fused_model_may_be_in_another_dtype(variant: str, dtype: torch.dtype) -> None:
    model = small(variant)
    fused = fuse_model(model).to(dtype)
    x = images(4, 3, 32, 32)
    before = state(model)
    report = verify_fusion(model, fused, inputs=x)
    assert report.passed, report
    assert report.own > 1e-5, 'its own rounding is that of the fused dtype'
    assert_same_state(model, before)
    with torch.no_grad():
        fused.layer3[0].conv1.weight.mul_(1.02)
    report = verify_fusion(model, fused, inputs=x)
    assert [layer.name for layer in report.layers_off] == ['layer3.0.conv1']
    assert verify_fusion(model.to(dtype), fuse_model(copy.deepcopy(model).float()), inputs=x).passed, 'a wider one'


def test_a_lifted_dynamic_model_is_its_stock_model() -> None:
    stock = random_model('resnet10t', channels=(4, 4, 8, 8), stem_width=4, num_classes=3)
    model = convert_model(copy.deepcopy(stock), 'dyconv')
    x = images(2, 3, 32, 32)
    report = verify_fusion(model, stock, inputs=x)
    assert report.passed, report
    with torch.no_grad():
        model.layer1[0].conv1.attention.fc2.bias[0] = 1.0
    report = verify_fusion(model, stock, inputs=x)
    assert [layer.name for layer in report.layers_off] == ['layer1.0.conv1']


# --- what counts as equal ------------------------------------------------------------------------------------------


def test_modules_that_are_idle_in_evaluation_are_left_out() -> None:
    options = dict(channels=(4, 4, 8, 8), stem_width=4, num_classes=3)
    dropping = dict(drop_rate=0.5, drop_path_rate=0.2, drop_block_rate=0.1)
    model = disturbed(convert_model(random_model('resnet10t', seed=0, **options, **dropping), 'doconv'))
    stock = timm.create_model('resnet10t', **options)
    stock.load_state_dict(fuse_model(model).state_dict())
    model.set_grad_checkpointing()
    for other in (stock, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(stock)), freeze_batch_norm_2d(stock)):
        report = verify_fusion(model, other, inputs=images(2, 3, 32, 32))
        assert report.passed, report


def test_every_place_of_a_shared_layer_is_compared() -> None:
    model, fused, x = right('doconv', torch.float32)
    shared = nn.Sequential(model.again, nn.ReLU(), model.again)
    names = [layer.name for layer in verify_fusion(shared, inputs=images(2, 6, 5, 5)).layers]
    assert names == ['0, 2']
    wrong = fuse_model(shared)
    wrong[2] = copy.deepcopy(wrong[0])
    assert verify_fusion(shared, wrong, inputs=images(2, 6, 5, 5)).passed, 'equal, though not the same'
    with torch.no_grad():
        wrong[2].weight[0, 0, 0, 0] += 1
    assert [layer.name for layer in verify_fusion(shared, wrong, inputs=images(2, 6, 5, 5)).layers_off] == ['2']


def test_a_layer_that_is_the_model() -> None:
    layer = disturbed(DOConv2d(3, 4, 3))
    report = verify_fusion(layer, inputs=images(2, 3, 6, 6))
    assert report.passed and [layer.name for layer in report.layers] == ['DOConv2d']
    wrong = fuse_model(layer)
    with torch.no_grad():
        wrong.weight[0] += 1
    assert not verify_fusion(layer, wrong, inputs=images(2, 3, 6, 6)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_a_folded_norm_is_compared_with_its_convolution(variant: str) -> None:
    model = small(variant)
    folded = fuse_model(model, fold_bn=True)
    x = images(2, 3, 32, 32)
    report = verify_fusion(model, folded, inputs=x)
    assert report.passed, report
    assert len(report.layers) == folded.folded_norms == 15
    assert 'layer1.0.conv1 with layer1.0.bn1' in [layer.name for layer in report.layers]
    assert verify_fusion(model, fuse_model(model.bfloat16(), fold_bn=True), inputs=x).passed


FAULTS_OF_FOLDED = (
    ('layer2.0.conv1', lambda conv: conv.bias.mul_(1.001)),
    ('layer3.0.conv1', lambda conv: conv.weight[1].mul_(1.001)),
    ('layer1.0.conv2', lambda conv: conv.bias.zero_()),
    ('layer2.0.downsample.1', lambda conv: conv.weight[0].neg_()),
)


@pytest.mark.parametrize(
    'variant, place, change',
    [
        # each variant with one of them in every run
        pytest.param(variant, *fault, marks=[] if number == index % 4 else pytest.mark.slow)
        for index, variant in enumerate(VARIANTS)
        for number, fault in enumerate(FAULTS_OF_FOLDED)
    ],
)
def test_a_fault_in_a_folded_convolution_is_found(variant: str, place: str, change) -> None:
    model, x = small(variant), images(2, 3, 32, 32)
    with torch.no_grad():
        for block in (model.layer2[0], model.layer3[0]):
            block.bn2.weight.zero_()  # what lies before it is hidden
    folded = fuse_model(model, fold_bn=True)
    assert verify_fusion(model, folded, inputs=x).passed
    with torch.no_grad():
        change(folded.get_submodule(place))
    report = verify_fusion(model, folded, inputs=x)
    assert len(report.layers_off) == 1 and report.layers_off[0].name.startswith(f'{place} with '), report


def test_a_norm_that_was_not_folded_is_missed() -> None:
    model = small('doconv')
    wrong = fuse_model(model)
    wrong.layer1[0].bn1 = nn.Identity()
    report = verify_fusion(model, wrong, inputs=images(2, 3, 32, 32))
    assert not report.passed and 'layer1.0.conv1 with layer1.0.bn1' in str(report)
    wrong = fuse_model(model)
    wrong.layer2[0].downsample[2] = nn.Identity()
    assert 'layer2.0.downsample.2' in str(verify_fusion(model, wrong, inputs=images(2, 3, 32, 32)))


class Hidden(nn.Module):
    """A convolution and a norm, which looks as if it were folded, with something between or beside them."""

    def __init__(self, between, kernel_size: int) -> None:
        super().__init__()
        self.between = between
        self.conv = nn.Conv2d(5, 5, kernel_size, padding=kernel_size // 2)
        self.bn = nn.BatchNorm2d(5)
        self.other = nn.Conv2d(5, 5, 3, padding=1)
        self.last = nn.BatchNorm2d(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.other(self.between(self.conv(x), self.bn)))


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize(
    'between, is_right',
    [
        (lambda y, bn: bn(y), True),
        (lambda y, bn: bn(y.relu_()), False),
        (lambda y, bn: bn(y.mul_(2).add_(1)), False),
        (lambda y, bn: bn(y) + y, False),
        (lambda y, bn: bn(y + 1), False),
    ],
    ids=['alone', 'relu in place', 'arithmetic in place', 'read twice', 'another tensor'],
)
def test_a_norm_takes_the_output_of_its_convolution_alone(between, is_right: bool, kernel_size: int) -> None:
    model = disturbed(convert_model(Hidden(between, kernel_size), 'doconv')).eval()
    nn.init.zeros_(model.last.weight)
    folded = copy.deepcopy(model).double()
    scale_outputs_of = folded.conv.fuse() if is_variant(folded.conv) else folded.conv
    scale_outputs(scale_outputs_of, *scale_shift(model.bn, to_float64))
    wrong = fuse_model(model)
    wrong.conv, wrong.bn = scale_outputs_of.float(), nn.Identity()
    x = images(2, 5, 6, 6)
    report = verify_fusion(model, wrong, inputs=x)
    assert report.passed == is_right and report.stored <= report.bound
    assert (
        is_right
        or 'bn: expected BatchNorm2d, got neither it nor a convolution that has it folded in' in report.problems
    )


class Twice(nn.Module):
    """A norm that takes one of two outputs of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3, padding=1)
        self.bn = nn.BatchNorm2d(5)
        self.last = nn.BatchNorm2d(5)
        nn.init.zeros_(self.last.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return x + self.last(self.conv(self.bn(y)))


def test_a_norm_that_could_not_be_folded_is_missed() -> None:
    model = convert_model(Twice(), 'doconv').eval()
    nn.init.normal_(model.conv.depthwise_weight, std=0.1)
    nn.init.uniform_(model.bn.running_var, 0.5, 1.5)
    x = images(2, 5, 6, 6)
    assert verify_fusion(model, fuse_model(model, fold_bn=True), inputs=x).passed
    wrong = fuse_model(model)
    scale_outputs(wrong.conv, *scale_shift(wrong.bn, to_float64))
    wrong.bn = nn.Identity()
    report = verify_fusion(model, wrong, inputs=x)
    assert report.stored <= report.bound, 'hidden'
    assert 'bn: expected BatchNorm2d, got neither it nor a convolution that has it folded in' in report.problems


# --- outputs -------------------------------------------------------------------------------------------------------


def test_nobody_is_told_to_pass_what_was_made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = around(lambda y: y), images(2, 5, 8, 8)
    wrong = fuse_model(model)
    wrong.function = lambda y: y[:, :1]
    with pytest.raises(ReparamError, match=r'got \[\(2, 1, 6, 6\)\] from the fused one; pass what fuse_model\(\) made'):
        verify_fusion(model, wrong, inputs=x)
    monkeypatch.setattr(verify, 'fuse_model', lambda model: wrong)
    with pytest.raises(
        ReparamError, match=r'got \[\(2, 1, 6, 6\)\] from the fused one. What differs:\n  the model: func'
    ):
        verify_fusion(model, inputs=x)
    monkeypatch.setattr(verify, 'fuse_model', copy.deepcopy)
    with pytest.raises(ReparamError, match='conv: expected a fused layer, got DOConv2d$'):
        verify_fusion(model, inputs=x)


def test_complex_outputs_are_compared() -> None:
    model = around(lambda y: torch.fft.fft2(y))
    x = images(2, 5, 8, 8)
    assert verify_fusion(model, inputs=x).passed
    wrong = fuse_model(model)
    wrong.function = lambda y: torch.fft.fft2(y) * (1 + 1e-3j)
    report = verify_fusion(model, wrong, inputs=x)
    assert report.stored > report.bound and not report.passed


def test_a_number_of_outputs_that_depends_on_rounding_is_refused() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Around(lambda y: y)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            y = self.backbone(x)
            return [y[(y * 2**12) % 1 < 0.5]]  # as good as random

    model = disturbed(convert_model(Detector(), 'acconv')).eval()
    with pytest.raises(ReparamError, match=r'depend on rounding.*verify_fusion\(model.backbone, fused.backbone\)'):
        verify_fusion(model, inputs=images(4, 5, 32, 32))
    assert verify_fusion(model.backbone, fuse_model(model).backbone, inputs=images(4, 5, 32, 32)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_tensors_that_a_forward_makes(variant: str) -> None:
    x = images(4, 5, 8, 8)
    assert verify_fusion(around(lambda y: y + torch.ones(8, 8).mm(torch.eye(8))[0, 0], variant), inputs=x).passed
    assert verify_fusion(around(lambda y: y.flatten(1) @ torch.eye(180), variant), inputs=x).passed
    assert torch.get_default_dtype() == torch.float32
    model = around(lambda y: y.flatten(1) @ torch.eye(180, dtype=torch.float32), variant)
    with pytest.raises(ReparamError, match=r'cannot run in torch.float64.*\(dtype=x.dtype\) instead of a fixed one'):
        verify_fusion(model, inputs=x)
    assert torch.get_default_dtype() == torch.float32


def test_a_forward_that_rounds_to_float32_has_its_own_algebra_bound() -> None:
    # the train-time and the inference form of a dynamic layer differ in float64, by rounding, which float32 amplifies
    model = around(lambda y: (y * 1e4).float().to(y.dtype).sin(), 'dyconv')
    with torch.no_grad():
        model.conv.attention.fc2.weight.mul_(10)
    report = verify_fusion(model, inputs=images(64, 5, 40, 40))
    assert report.passed, report
    assert report.algebra_bound >= report.ALGEBRA_BOUND


def test_a_model_that_cannot_run_is_said() -> None:
    model = small('doconv')
    with pytest.raises(ReparamError, match=r'the train-time ResNet cannot run in torch.float32 on a batch of shape'):
        verify_fusion(model, inputs=images(2, 4, 32, 32))
    wrong = fuse_model(model)
    wrong.layer2[0].conv1.stride = (1, 1)
    with pytest.raises(
        ReparamError, match=r'(?s)the fused ResNet cannot run.*layer2.0.conv1: stride: expected \(2, 2\)'
    ):
        verify_fusion(model, wrong, inputs=images(2, 3, 32, 32))


def test_a_complex_parameter_is_not_cast_to_a_real_one() -> None:
    class Spectral(Around):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.weight = nn.Parameter(torch.randn(5, 6, 6, dtype=torch.complex64))
            self.gain = 1.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.fft2(self.conv(x).float()) * self.weight * self.gain

    model = disturbed(convert_model(Spectral(), 'doconv')).eval()
    x = images(2, 5, 8, 8)
    for dtype in (torch.float32, torch.bfloat16):
        fused = fuse_model(model)
        for parameter in fused.parameters():
            if not parameter.is_complex():
                parameter.data = parameter.data.to(dtype)
        report = verify_fusion(model, fused, inputs=x)
        assert report.passed and report.own < 0.1, report
        fused.gain = 1.5
        assert not verify_fusion(model, fused, inputs=x).stored <= 0.4


def test_outputs_of_different_sizes_are_compared_each_by_its_own() -> None:
    model = around(lambda y: {'big': y * 1e10, 'small': y})
    wrong = fuse_model(model)
    wrong.function = lambda y: {'big': y * 1e10, 'small': 1.001 * y}
    report = verify_fusion(model, wrong, inputs=images(2, 5, 8, 8))
    assert report.stored > report.bound


def test_outputs_that_are_masked() -> None:
    mask = torch.tensor([0.0, -math.inf, 0.0, math.nan, 0.0])[:, None, None]
    model = around(lambda y: y + mask.to(y))
    assert verify_fusion(model, inputs=images(2, 5, 8, 8)).passed
    wrong = fuse_model(model)
    wrong.function = lambda y: y + mask.flip(0).roll(1).to(y)
    assert not verify_fusion(model, wrong, inputs=images(2, 5, 8, 8)).passed
    nothing = around(lambda y: y * math.nan)
    assert not verify_fusion(nothing, inputs=images(2, 5, 8, 8)).passed


def test_outputs_that_the_dtype_does_not_determine_have_no_bound() -> None:
    """The layers have: what is right is verified whatever its outputs are, and what is wrong is not."""
    model, x = around(lambda y: (y * 1e9).sin()), images(2, 5, 8, 8)
    report = verify_fusion(model, inputs=x)
    assert report.passed and report.own > 0.5 and report.bound is None, report
    assert 'no bound' in str(report) and json.dumps(report.to_dict(), allow_nan=False)
    wrong = fuse_model(model)
    with torch.no_grad():
        wrong.conv.weight[0, 0, 0, 0] *= 1 + 1e-5
    assert not verify_fusion(model, wrong, inputs=x).passed


def test_a_model_that_overflows_in_its_dtype_is_said() -> None:
    model = around(lambda y: y * 1e30 * 1e30)
    report = verify_fusion(model, inputs=images(2, 5, 8, 8))
    assert not report.passed and "the train-time model's own in torch.float32 are not finite" in str(report)
    assert verify_fusion(model.double(), inputs=images(2, 5, 8, 8)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_tensors_that_a_model_keeps_beside_its_own_follow_the_dtype(variant: str) -> None:
    """As timm's models with attention biases do, in a dict for each device."""

    class Keeping(Around):
        def __init__(self) -> None:
            super().__init__(lambda y: y)
            self.bias = nn.Parameter(torch.eye(6))
            self.kept: dict[torch.device, list[torch.Tensor]] = {}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = self.kept.setdefault(x.device, [self.bias.abs()])
            return self.conv(x) @ kept[0]

    model = disturbed(convert_model(Keeping(), variant)).eval()
    x = images(2, 5, 8, 8)
    with torch.no_grad():
        model(x)  # it keeps one in float32
    assert verify_fusion(model, inputs=x).passed
    assert next(iter(model.kept.values()))[0].dtype == torch.float32
    fused = fuse_model(model)
    with torch.no_grad():
        fused.conv.weight *= 1.001
    assert not verify_fusion(model, fused, inputs=x).passed
    fused = fuse_model(model).half()
    fused.kept.clear()
    assert verify_fusion(model, fused, inputs=x).passed


def test_batches_without_samples_are_skipped() -> None:
    model = small('doconv')
    report = verify_fusion(model, fuse_model(model, fold_bn=True), inputs=[images(0, 3, 32, 32), images(2, 3, 32, 32)])
    assert report.passed and report.num_inputs == 2
    with pytest.raises(ReparamError, match='at least one input'):
        verify_fusion(model, inputs=[images(0, 3, 32, 32)])
    with pytest.raises(ReparamError, match='got a single number'):
        verify_fusion(model, inputs=torch.tensor(1.0))
    with pytest.raises(ReparamError, match='got int; pass a tensor'):
        verify_fusion(model, inputs=3)
    with pytest.raises(ReparamError, match='got ResNet on the meta device'):
        verify_fusion(copy.deepcopy(model).to('meta'), fuse_model(model))


def test_norms_may_stay_in_float32() -> None:
    model = small('acconv')
    fused = fuse_model(model).bfloat16()
    for module in fused.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    stock = fuse_model(model)
    for module, other in zip(fused.modules(), stock.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.load_state_dict(other.state_dict())
    report = verify_fusion(model, fused, inputs=images(2, 3, 32, 32))
    assert report.passed, report


def test_functions_that_are_made_with_each_model() -> None:
    def make(factor: float) -> nn.Module:
        torch.manual_seed(0)
        return Around(lambda y: factor * y)

    model = disturbed(convert_model(make(2.0), 'refconv')).eval()
    x = images(2, 5, 8, 8)
    for factor in (2.0, 2.5):
        other = make(factor)
        other.load_state_dict(fuse_model(model).state_dict())
        assert verify_fusion(model, other, inputs=x).passed == (factor == 2.0)


def test_settings_of_torch_that_are_switched_meanwhile_are_put_back() -> None:
    model, x = around(lambda y: y), images(2, 5, 8, 8)
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, 'fp32_precision'):
        pytest.skip('this torch has only the older function')
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = 'tf32'
        assert verify_fusion(model, inputs=x).passed
        assert matmul.fp32_precision == 'tf32'
    finally:
        matmul.fp32_precision = before
    torch.get_float32_matmul_precision()


def test_transposed_convolutions_that_crop_much() -> None:
    model = disturbed(convert_model(nn.Sequential(nn.ConvTranspose2d(5, 6, 3, padding=10)), 'doconv')).eval()
    assert verify_fusion(model, inputs=images(2, 5, 40, 40)).passed


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_names_the_worst_layer_and_every_one_that_is_off() -> None:
    model, fused, x = right('acconv', torch.float32)
    report = verify_fusion(model, fused, inputs=x)
    assert report.worst_layer in report.layers and report.worst_layer.excess == max(x.excess for x in report.layers)
    assert f'the worst one {report.worst_layer.name}: kernel within' in str(report)
    assert 'reached by no input, compared on noise alone: spare' in str(report)
    assert str(report).startswith('fusion verified on 4 inputs: ')
    wrong = copy.deepcopy(fused)
    with torch.no_grad():
        wrong.stem.weight.mul_(1.01)
        wrong.spare.weight.mul_(1.5)
        wrong.reflect.weight[0, 0, 0, 0] = math.nan
    report = verify_fusion(model, wrong, inputs=x)
    assert [layer.name for layer in report.layers_off] == ['stem', 'reflect', 'spare']
    assert report.worst_layer.name == 'reflect'
    assert str(report).startswith('fusion NOT verified') and all(
        f'\n  {layer}' in str(report) for layer in report.layers_off
    )


def test_the_report_as_plain_values() -> None:
    model, fused, x = right('refconv', torch.float32)
    report = verify_fusion(model, fused, inputs=x)
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values == report.to_dict()
    assert (
        values['passed'] and values['num_layers'] == len(report.layers) and values['layers_without_input'] == ['spare']
    )
    assert values['worst_layer'] == report.worst_layer.to_dict() and values['worst_layer']['passed']
    assert values['layers_off'] == values['problems'] == []
    assert {'name', 'kernel', 'algebra', 'stored', 'own', 'bound', 'num_inputs'} <= values['worst_layer'].keys()


def test_the_images_that_are_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, '_VERIFY_IMAGES', 64)  # conftest.py: few_images
    monkeypatch.setattr(verify, '_VERIFY_BATCH', 16)
    for side, sizes in ((32, [16] * 4), (320, [16] * 4), (640, [4] * 4), (2048, [1, 1])):
        batches = verify.seeded_images((3, side, side))
        assert [batch.shape for batch in batches] == [(size, 3, side, side) for size in sizes]


# --- side effects and costs ----------------------------------------------------------------------------------------


def test_hooks_see_only_the_forward_passes_of_the_model() -> None:
    model = small('acconv')
    seen: list[nn.Module] = []
    layer = model.layer1[0].conv1
    layer.register_forward_hook(lambda module, args, output: seen.append(module) or 2 * output)
    fused = fuse_model(model)
    hooks = [copy.copy(module._forward_hooks) for module in model.modules()]
    report = verify_fusion(model, fused, inputs=[images(16, 3, 32, 32) for _ in range(2)])
    assert report.passed, report
    assert seen.count(layer) == 2 == seen.count(fused.layer1[0].conv1), 'once a batch'
    assert [module._forward_hooks for module in model.modules()] == hooks


def test_inputs_by_keyword_and_without_a_batch() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose2d(3, 3, 3, stride=2)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.stack([self.conv(sample) for sample in self.up(x, output_size=[18, 18])])
            return y.mean((2, 3))

    model = disturbed(convert_model(Calls(), 'refconv')).eval()
    report = verify_fusion(model, inputs=images(3, 3, 8, 8))
    assert report.passed, report
    assert {layer.name: layer.num_inputs for layer in report.layers} == {'up': 3, 'conv': 3}


def test_a_norm_that_was_folded_may_take_its_input_by_keyword() -> None:
    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(input=self.conv(input=x))

    model = disturbed(convert_model(Calls(), 'refconv')).eval()
    fused = fuse_model(model, fold_bn=True)
    assert verify_fusion(model, fused, inputs=images(3, 3, 8, 8)).passed
    with torch.no_grad():
        fused.conv.bias[0] += 1
    assert not verify_fusion(model, fused, inputs=images(3, 3, 8, 8)).passed


def test_a_class_has_to_say_what_its_method_computes() -> None:
    class Nothing(ReparamConv2d):
        """A method that says only what its kernel is."""

    with pytest.raises(ReparamError, match='Nothing: no branch_form to verify its fusion against; define it'):
        Nothing(3, 4, 3).branch_form()


@pytest.mark.parametrize(
    'variant',  # one of a kind; what is kept of the models does not depend on the method
    [pytest.param(variant, marks=[] if variant in ('acconv', 'dyconv') else pytest.mark.slow) for variant in VARIANTS],
)
def test_verification_holds_few_activations(variant: str) -> None:
    """At most two activations above a forward pass in float64, whatever the depth and the number of batches."""
    torch.set_num_threads(1)
    activation = 16 * 8 * 32 * 32 * 8

    def most(function) -> int:
        return max(itertools.accumulate(cpu_allocations(function)), default=0)

    for depth, batches in ((3, 1), (6, 3)):
        stock = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(depth)))
        model = disturbed(convert_model(stock, variant, **(dict(skip='0') if variant == 'dyconv' else {}))).eval()
        fused = fuse_model(model)
        exact = copy.deepcopy(model).double()
        x = images(16, 8, 32, 32)
        with torch.no_grad():
            forward = most(lambda exact=exact, x=x: exact(x.double()))
        verification = most(lambda m=model, f=fused, x=x, n=batches: verify_fusion(m, f, inputs=[x] * n))
        assert verification - forward <= 2 * activation, (verification - forward) / activation


def test_net_has_every_kind_of_layer() -> None:
    kinds = {type(module) for module in convert_model(Net(), 'doconv').modules()}
    assert {timm_reparam.DOConv2d, timm_reparam.DOConvTranspose2d, nn.BatchNorm2d} <= kinds
