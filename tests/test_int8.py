"""Quantisation to 8 bits after training, with torchao (PT2E) and onnxruntime: fuse first, then as the stock model.

The tools are those of the extra `tools`; where one is missing, its tests are skipped. The models are the trained ones
of tests/benchmarks/zoo, fine-tuned on the handwritten digits of scikit-learn, so that accuracy means something.
"""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from layers.cases import relative_difference
from torch import nn

from timm_reparam import fuse_model
from timm_reparam.hub import load_checkpoint
from timm_reparam.timm_model import stock_architecture
from timm_reparam.variants import VARIANTS

pytestmark = pytest.mark.slow

ZOO = Path(__file__).parent / 'benchmarks' / 'zoo'
STATIC = [name for name, variant in VARIANTS.items() if not variant.input_dependent]
CALIBRATION = 256
BATCH = 64
# of the logits, relative to their spread; and of the accuracy that the float model has
ERROR, LOSS = 0.15, 0.025

pytest.importorskip('sklearn')


@cache
def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of 32 px and labels: 1,413 to train on, 384 of other writers to validate on."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    images = F.interpolate(images, size=32, mode='bilinear').expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(loaded.target)
    return images[:-384], labels[:-384], images[-384:], labels[-384:]


@cache
def trained(variant: str) -> nn.Module:
    """A trained model of the zoo, fine-tuned on the digits; 'stock' is the fused one of DO-Conv."""
    model = load_checkpoint(
        ZOO / ('resnet10t_doconv.cifar10_fused' if variant == 'stock' else f'resnet10t_{variant}.cifar10')
    )
    images, labels, *_ = digits()
    torch.manual_seed(0)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1, 0, total_iters=8 * (len(images) // 128))
    model.train()
    for _ in range(8):
        for chosen in torch.randperm(len(images)).split(128)[:-1]:
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def fused(variant: str) -> nn.Module:
    """The trained model as the stock architecture, in which the fused weights lie."""
    model = trained(variant)
    if variant == 'stock':
        return copy.deepcopy(model)
    stock = timm.create_model(stock_architecture(model), **timm.models.get_model_args(fuse_model(model)))
    stock.load_state_dict(fuse_model(model).state_dict(), strict=True)
    return stock.eval()


@torch.no_grad()
def assert_close(quantised: Callable[[torch.Tensor], torch.Tensor], model: nn.Module) -> None:
    """The quantised model errs little on the validation images, in its logits and in what it predicts."""
    *_, images, labels = digits()
    expected = model(images)
    found = torch.cat([quantised(batch) for batch in images.split(BATCH)])
    accuracy, before = ((logits.argmax(1) == labels).double().mean().item() for logits in (found, expected))
    error = ((found - expected).square().mean().sqrt() / expected.std()).item()
    figures = dict(accuracy=accuracy, of_float=before, error=error, largest=relative_difference(found, expected))
    print(' '.join(f'{name} {value:.4f}' for name, value in figures.items()))
    assert before > 0.85
    assert 0 < error < ERROR
    assert accuracy > before - LOSS


def quantised_by_torchao(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    pytest.importorskip('torchao')
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    images = digits()[0][:CALIBRATION]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(model, (images[:BATCH],)).module(), quantizer)
    with torch.no_grad():
        for batch in images.split(BATCH):
            prepared(batch)
    converted = convert_pt2e(prepared)
    steps = [node for node in converted.graph.nodes if 'quantize_per' in str(node.target)]
    assert len(steps) > sum(isinstance(module, nn.Conv2d) for module in model.modules())
    return converted


def quantised_by_onnxruntime(model: nn.Module, folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    from onnxruntime import quantization

    batches = iter([{'images': batch.numpy()} for batch in digits()[0][:CALIBRATION].split(BATCH)])

    class Calibration(quantization.CalibrationDataReader):
        def get_next(self) -> dict | None:
            return next(batches, None)

    paths = [folder / name for name in ('float.onnx', 'folded.onnx', 'int8.onnx')]
    torch.onnx.export(
        model, (digits()[0][:BATCH],), paths[0], dynamo=True, input_names=['images'], dynamic_shapes=({0: 'batch'},)
    )
    quantization.quant_pre_process(*paths[:2])
    # 7 bits for the weights: without VNNI a processor adds products of 8 bits in 16, and they overflow
    quantization.quantize_static(*paths[1:], Calibration(), per_channel=True, reduce_range=True)
    session = runtime.InferenceSession(paths[2], providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


@pytest.mark.parametrize('variant', ['stock', *STATIC])
def test_fused_model_in_int8_by_torchao(variant: str) -> None:
    model = fused(variant)
    assert_close(quantised_by_torchao(model), model)


@pytest.mark.parametrize('variant', ['stock', *STATIC])
def test_fused_model_in_int8_by_onnxruntime(variant: str, tmp_path: Path) -> None:
    model = fused(variant)
    assert_close(quantised_by_onnxruntime(model, tmp_path), model)


@pytest.mark.parametrize('variant', STATIC)
def test_train_time_form_is_refused_by_torchao(variant: str) -> None:
    """Its kernels are computed in the graph, where the quantiser looks for stored ones."""
    with pytest.raises(ValueError, match='Expected get_attr node'):
        quantised_by_torchao(trained(variant))
