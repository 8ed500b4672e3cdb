"""Statistics and schedules of the layers under the tools that average weights, freeze norms or synchronise them."""

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from stand_in import KINDS
from timm.utils import ModelEmaV3, freeze, unfreeze
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, update_bn

from timm_reparam import fuse_model, is_variant, verify_fusion
from timm_reparam.layers import ACConv2d
from timm_reparam.variants import VARIANTS

pytestmark = pytest.mark.filterwarnings('ignore:.*without pretrained weights')  # of RefConv


def build(variant: str) -> nn.Module:
    """A small network with everything in it moved away from its start."""
    torch.manual_seed(0)
    model = timm.create_model(f'resnet10t_{variant}', num_classes=5, channels=(8, 8, 12, 12)).double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.train()


def batches(number: int = 4) -> list[torch.Tensor]:
    return [(1 + index) * torch.randn(6, 3, 32, 32, dtype=torch.float64) for index in range(number)]


def branch_variances(layer: ACConv2d, inputs: list[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The mean of the variances that BatchNorms would have seen behind the branches, unbiased, a batch each."""
    for branch, kernel in (('vertical', layer.vertical_weight), ('horizontal', layer.horizontal_weight)):
        padding = (layer.padding[0] * (kernel.shape[2] > 1), layer.padding[1] * (kernel.shape[3] > 1))
        seen = []
        for x in inputs:
            output = F.conv2d(x, kernel, None, layer.stride, padding, layer.dilation, layer.groups)
            seen.append(output.transpose(0, 1).flatten(1).var(1))
        yield f'{branch}_running_var', torch.stack(seen).mean(0)


@pytest.mark.parametrize('wrap', [copy.deepcopy, AveragedModel], ids=['model', 'averaged'])
def test_update_bn_gives_the_branches_the_statistics_of_the_data(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(build('acconv'))
    seen: dict[ACConv2d, list[torch.Tensor]] = {m: [] for m in model.modules() if isinstance(m, ACConv2d)}
    data = batches()
    update_bn(data[:2], model)  # of other batches, and soon forgotten
    for layer in seen:
        layer.register_forward_pre_hook(lambda layer, args: seen[layer].append(args[0]))
    update_bn(data, model)
    assert seen
    for layer, inputs in seen.items():
        for name, expected in branch_variances(layer, inputs):
            assert torch.allclose(layer.get_buffer(name), expected, rtol=1e-9), name
    momenta = {module.momentum for module in model.modules() if isinstance(module, _BatchNorm)}
    assert momenta == {0.1}


@pytest.mark.parametrize('variant', KINDS)
def test_update_bn_moves_nothing_else(variant: str) -> None:
    model = build(variant)
    before = copy.deepcopy(model.state_dict())
    update_bn(batches(), model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if 'running_' in name or name.endswith('num_batches_tracked')}


@pytest.mark.parametrize(
    'variant, use_buffers',
    [
        # two variants with each in every run
        pytest.param(variant, use_buffers, marks=[] if (index + use_buffers) % 2 else pytest.mark.slow)
        for index, variant in enumerate(VARIANTS)
        for use_buffers in (False, True)
    ],
)
def test_averaged_weights_fuse(variant: str, use_buffers: bool) -> None:
    model, data = build(variant).float(), [batch.float() for batch in batches(2)]
    averaged = AveragedModel(model, use_buffers=use_buffers)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x in data:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
    update_bn(data, averaged)
    model(data[0])
    averaged.update_parameters(model)
    ema = ModelEmaV3(model)
    ema.update(model)
    for wrapped in (averaged, ema):
        assert verify_fusion(wrapped.eval(), fuse_model(wrapped), inputs=data[0]).passed


def test_what_a_tool_reads_and_writes_is_the_layers_own() -> None:
    layer = ACConv2d(4, 6, 3, padding=1)
    for branch in ('vertical', 'horizontal'):
        norm = layer.get_submodule(f'{branch}_norm')
        assert isinstance(norm, nn.BatchNorm2d) and not list(norm.state_dict())
        assert norm.weight is layer.get_parameter(f'{branch}_gamma')
        assert norm.running_var is layer.get_buffer(f'{branch}_running_var')
        nn.init.constant_(norm.bias, 0)
        assert not norm.running_mean.any() and not norm.num_batches_tracked.zero_()
        norm.running_var = torch.full((6,), 3.0)
        assert (layer.get_buffer(f'{branch}_running_var') == 3).all()
        norm.reset_running_stats()
        assert (layer.get_buffer(f'{branch}_running_var') == 1).all()


def saved_and_loaded(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('copied', [copy.deepcopy, copy.copy, saved_and_loaded])
def test_the_norms_of_a_copy_are_its_own(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = ACConv2d(4, 6, 3)
    other = copied(layer)
    for each in (layer, other):
        assert each.vertical_norm.running_var is each.vertical_running_var
        assert each.horizontal_norm.weight is each.horizontal_gamma


@pytest.mark.parametrize('of', [nn.BatchNorm2d, _BatchNorm])
def test_norms_in_evaluation_keep_their_statistics(of: type[nn.Module]) -> None:
    """As of a fine-tuning script that leaves the statistics of the first training alone."""
    model = build('acconv')
    with torch.no_grad():
        for layer in model.modules():
            if is_variant(layer):
                layer.vertical_gamma.fill_(1)
    x = batches(1)[0]
    expected = copy.deepcopy(model).eval()(x)
    for module in model.modules():
        if isinstance(module, of):
            module.eval()
    before = copy.deepcopy(model.state_dict())
    found = model(x)
    assert torch.allclose(found, expected, rtol=1e-9)
    found.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for module in model.modules():
        if isinstance(module, of):
            module.train()
    assert not torch.allclose(model(x), expected, rtol=1e-3)


def a_layer(recompute: bool) -> ACConv2d:
    torch.manual_seed(0)
    layer = ACConv2d(4, 6, 3, padding=1, dtype=torch.float64, recompute=recompute)
    with torch.no_grad():
        for gamma in (layer.vertical_gamma, layer.horizontal_gamma):
            gamma.uniform_(-2, 2)
    return layer


def results(layer: ACConv2d, x: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output, gradients of a weighted sum of it, and the statistics afterwards."""
    x.requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {'y': y.detach(), 'x': x.grad, **gradients, **dict(layer.named_buffers())}


def one_process(rank: int, folder: str, recompute: bool, x: torch.Tensor, weights: torch.Tensor) -> None:
    torch.distributed.init_process_group('gloo', f'file://{folder}/store', rank=rank, world_size=2)
    network = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(a_layer(recompute)))
    share = slice(0, 5) if rank == 0 else slice(5, None)
    torch.save(results(network[0], x[share].clone(), weights[share]), f'{folder}/{rank}.pt')
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('recompute', [False, True])
def test_synchronised_branches_see_one_batch(tmp_path: Path, recompute: bool) -> None:
    """Two processes with five and three images compute what one computes with eight."""
    x, weights = torch.randn(8, 4, 7, 6, dtype=torch.float64), torch.randn(8, 6, 7, 6, dtype=torch.float64)
    expected = results(a_layer(recompute), x.clone(), weights)
    args = (str(tmp_path), recompute, x, weights)
    torch.multiprocessing.start_processes(one_process, args, nprocs=2, start_method='forkserver')
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    for name, value in expected.items():
        if name in ('y', 'x'):
            found = torch.cat([first[name], second[name]])
        elif 'running' in name:
            assert torch.equal(first[name], second[name])
            found = first[name]
        else:
            found = first[name] + second[name]
        assert torch.allclose(found, value, rtol=1e-10, atol=1e-12), name


def test_frozen_norms_keep_their_statistics() -> None:
    model = build('acconv')
    keys = list(model.state_dict())
    freeze(model, ['layer1'])
    model.train()
    before = copy.deepcopy(model.layer1.state_dict())
    running = model.layer2[0].conv1.vertical_running_var.clone()
    x = batches(1)[0]
    model(x)
    assert all(torch.equal(value, before[name]) for name, value in model.layer1.state_dict().items())
    assert not torch.equal(model.layer2[0].conv1.vertical_running_var, running)
    assert verify_fusion(model.eval(), inputs=x).passed
    unfreeze(model, ['layer1'])
    assert sorted(model.state_dict()) == sorted(keys)
    model.train()(x)
    assert not torch.equal(model.layer1[0].conv1.vertical_running_var, before['0.conv1.vertical_running_var'])
