"""What people do with a convolution's layer or a timm model, and what each variant makes of it.

A workflow is a function of `WORKFLOWS`, which takes the name of a variant. It returns where the outcome is right,
raises ReparamError where it is refused with a remedy, and fails otherwise. ``python tests/workflows.py`` writes
workflows.csv, to which test_workflows.py holds every cell.
"""

import copy
import csv
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from stand_in import TINY, disturbed, images, tiny_stock, tiny_variant
from timm.utils import ModelEmaV3, freeze, reparameterize_model
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from timm_reparam import ReparamError, convert_model, fuse_model, verify_fusion
from timm_reparam.variants import VARIANTS

TABLE = Path(__file__).with_name('workflows.csv')
WORKFLOWS: dict[str, Callable[[str], None]] = {}
BOUND = 1e-10


def workflow(function: Callable[[str], None]) -> Callable[[str], None]:
    WORKFLOWS[function.__name__.replace('_', ' ')] = function
    return function


def stock() -> nn.Module:
    return tiny_stock().double()


def trained(variant: str) -> nn.Module:
    return tiny_variant(variant).double()


def layer_of(variant: str, bias: bool = False) -> Any:
    torch.manual_seed(7)
    return disturbed(VARIANTS[variant].layers[0].from_conv(nn.Conv2d(4, 6, 3, padding=1, bias=bias)), 3).double().eval()


def x_of_model(batch: int = 4) -> torch.Tensor:
    return images(batch, 3, 32, 32).double()


def x_of_layer(batch: int = 3) -> torch.Tensor:
    return images(batch, 4, 7, 6).double()


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= BOUND * expected.abs().max(), (found - expected).abs().max()


def same_function(model: nn.Module, reference: nn.Module) -> None:
    with torch.no_grad():
        same(model.eval()(x_of_model()), reference.eval()(x_of_model()))


def fuses(model: nn.Module, wrapped: nn.Module | None = None) -> nn.Module:
    fused = fuse_model(model if wrapped is None else wrapped)
    report = verify_fusion(model, fused, inputs=x_of_model())
    assert report.passed, report
    same_function(fused, model)
    return fused


# Checkpoints ----------------------------------------------------------------------------------------------------------


@workflow
def load_a_stock_state_dict(variant: str) -> None:
    model = trained(variant)
    found = model.load_state_dict(stock().state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    same_function(model, stock())


@workflow
def load_it_with_strict_False(variant: str) -> None:
    model = trained(variant)
    model.load_state_dict(stock().state_dict(), strict=False)
    same_function(model, stock())


@workflow
def load_it_with_assign_True(variant: str) -> None:
    model = trained(variant)
    model.load_state_dict(stock().state_dict(keep_vars=True), assign=True)
    same_function(model, stock())


@workflow
def create_model_with_a_stock_checkpoint_path(variant: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(stock().float().state_dict(), f'{folder}/stock.pth')
        model = timm.create_model(f'resnet10t_{variant}', checkpoint_path=f'{folder}/stock.pth', **TINY)
    same_function(model.double(), stock())


@workflow
def deepcopy_pickle_and_torch_save(variant: str) -> None:
    model, file = trained(variant), io.BytesIO()
    torch.save(copy.deepcopy(model), file)
    file.seek(0)
    same_function(torch.load(file, weights_only=False), model)


@workflow
def load_the_fused_weights_into_the_architecture_they_name(variant: str) -> None:
    fused: Any = fuse_model(trained(variant))
    name = fused.pretrained_cfg['architecture']
    assert name == ('resnet10t_dyconv' if variant == 'dyconv' else 'resnet10t')
    model = timm.create_model(name, **{**TINY, **fused._model_args}).double()
    model.load_state_dict(fused.state_dict())
    same_function(model, trained(variant))


# Averaging and norms --------------------------------------------------------------------------------------------------


@workflow
def AveragedModel_and_update_bn(variant: str) -> None:
    model = trained(variant).train()
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    positions = [b.clone() for name, b in averaged.named_buffers() if name.endswith('temperature_position')]
    once = copy.deepcopy(averaged)
    for module in once.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the latest batch
    once(x_of_model())
    update_bn([x_of_model()], averaged)
    assert positions == [b for name, b in averaged.named_buffers() if name.endswith('temperature_position')]
    for name, value in averaged.named_buffers():
        if 'running_' in name:
            same(value, once.get_buffer(name))
    fuses(averaged.module, averaged)


@workflow
def average_with_ModelEmaV3(variant: str) -> None:
    model = trained(variant)
    ema = ModelEmaV3(model, decay=0.5)
    ema.update(disturbed(model, 9))
    fuses(ema.module, ema)


@workflow
def freeze_norms_with_timm(variant: str) -> None:
    model = trained(variant)
    freeze(model)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if 'running_' in name}
    model(x_of_model())
    assert before and all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@workflow
def switch_norms_to_evaluation(variant: str) -> None:
    model = trained(variant)
    expected = model(x_of_model())
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    same(model(x_of_model()), expected)


@workflow
def convert_to_SyncBatchNorm(variant: str) -> None:
    model = trained(variant)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert converted.state_dict().keys() == model.state_dict().keys()
    same_function(converted, model)
    fuses(converted)


# Transforms -----------------------------------------------------------------------------------------------------------


@workflow
def torch_func_grad_and_vmap(variant: str) -> None:
    layer, x = layer_of(variant), x_of_layer()
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: dict[str, torch.Tensor], sample: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, values, (sample[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, value in layer.named_parameters():
        expected = [torch.autograd.grad(layer(sample[None]).square().sum(), value)[0] for sample in x]
        same(each[name], torch.stack(expected))


@workflow
def forward_mode(variant: str) -> None:
    layer, x = layer_of(variant), x_of_layer()
    direction = images(3, 4, 7, 6, seed=4).double()
    _, found = torch.func.jvp(layer, (x,), (direction,))
    step = 1e-6
    with torch.no_grad():
        up, down = (layer(x + sign * step * direction) for sign in (1, -1))
    assert (found - (up - down) / (2 * step)).abs().max() <= 1e-6 * found.abs().max()


@workflow
def trace_and_call_at_another_batch_size(variant: str) -> None:
    layer = layer_of(variant)
    traced = torch.jit.trace(layer, x_of_layer(2))
    same(traced(x_of_layer(5)), layer(x_of_layer(5)))


@workflow
def an_empty_batch(variant: str) -> None:
    for layer in (layer_of(variant), layer_of(variant).train()):
        y = layer(x_of_layer(0).requires_grad_())
        assert y.shape == (0, 6, 7, 6)
        y.sum().backward()


@workflow
def gradient_checkpointing(variant: str) -> None:
    found = []
    for use in (None, True, False):
        layer, x = layer_of(variant).train(), x_of_layer().requires_grad_()
        y = layer(x) if use is None else checkpoint(layer, x, use_reentrant=use)
        y.square().sum().backward()
        found.append((x.grad, [b.clone() for name, b in layer.named_buffers() if 'position' in name]))
    for gradient, positions in found[1:]:
        same(gradient, found[0][0])
        assert positions == found[0][1]


@workflow
def compile_and_export(variant: str) -> None:
    layer, x = layer_of(variant), x_of_layer()
    same(torch.compile(layer, backend='aot_eager', fullgraph=True)(x), layer(x))
    same(torch.export.export(layer, (x,)).module()(x), layer(x))


# The layer as a convolution -------------------------------------------------------------------------------------------


@workflow
def call_it_with_input_by_name(variant: str) -> None:
    layer = layer_of(variant)
    same(layer(input=x_of_layer()), layer(x_of_layer()))


@workflow
def attributes_and_hooks_survive_conversion_and_fusion(variant: str) -> None:
    net, called = nn.Sequential(nn.Conv2d(8, 6, 3)), []
    net[0].role = 'stem'
    convert_model(net, variant)
    net[0].register_forward_hook(lambda *_: called.append('forward'))
    net[0].register_state_dict_post_hook(lambda *_: called.append('state dict'))
    fused = fuse_model(net)
    fused(torch.ones(1, 8, 5, 5))
    fused.state_dict()
    assert fused[0].role == 'stem' and called == ['forward', 'state dict']


@workflow
def convert_a_convolution_that_holds_more(variant: str) -> None:
    conv = nn.Conv2d(8, 6, 3)
    conv.register_buffer('mask', torch.ones(6))
    convert_model(nn.Sequential(conv), variant)


@workflow
def weight_norm_on_a_layer(variant: str) -> None:
    model = trained(variant)
    parametrizations.weight_norm(model.layer1[0].conv1, 'weight' if variant != 'refconv' else 'map_weight')
    fuses(model)


@workflow
def prune_a_layer(variant: str) -> None:
    model = trained(variant)
    prune.l1_unstructured(model.layer1[0].conv1, 'weight' if variant != 'refconv' else 'map_weight', 0.3)
    fuse_model(model)


@workflow
def fuse_conv_bn_eval_of_torch(variant: str) -> None:
    fusion.fuse_conv_bn_eval(layer_of(variant), disturbed(nn.BatchNorm2d(6), 4).double().eval())


@workflow
def ties_survive_conversion(variant: str) -> None:
    first, second = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    second.bias = first.bias
    net = convert_model(nn.Sequential(first, second), variant, init='scratch')
    assert net[0].bias is net[1].bias


# Models ---------------------------------------------------------------------------------------------------------------


@workflow
def channels_last_and_bfloat16(variant: str) -> None:
    model = trained(variant).float().to(memory_format=torch.channels_last)
    expected = model(x_of_model().float())
    found = model.bfloat16()(x_of_model().bfloat16().contiguous(memory_format=torch.channels_last))
    assert (found.float() - expected).abs().max() <= 0.1 * expected.abs().max()


@workflow
def reparameterize_model_of_timm(variant: str) -> None:
    model = trained(variant)
    same_function(reparameterize_model(model), model)


@workflow
def fold_the_norms_for_inference(variant: str) -> None:
    model = trained(variant)
    same_function(fuse_model(model, fold_bn=True), model)


@workflow
def features_only(variant: str) -> None:
    model = timm.create_model(f'resnet10t_{variant}', features_only=True, **{**TINY, 'num_classes': 0})
    model = disturbed(model, 2).double().eval()
    for found, expected in zip(fuse_model(model)(x_of_model()), model(x_of_model()), strict=True):
        same(found, expected)


@workflow
def convert_a_converted_model(variant: str) -> None:
    convert_model(trained(variant), variant)


def outcome(name: str, variant: str) -> str:
    """'right', or 'refused' where a ReparamError says what to do; anything else is raised."""
    try:
        WORKFLOWS[name](variant)
    except ReparamError:
        return 'refused'
    return 'right'


def read_table() -> dict[tuple[str, str], str]:
    with TABLE.open(newline='') as file:
        return {(row['workflow'], variant): row[variant] for row in csv.DictReader(file) for variant in VARIANTS}


def main() -> int:
    with TABLE.open('w', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['workflow', *VARIANTS])
        for name in WORKFLOWS:
            writer.writerow([name, *(outcome(name, variant) for variant in VARIANTS)])
    return 0


if __name__ == '__main__':
    sys.exit(main())
