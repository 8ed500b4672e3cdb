"""Ways in which a model leaves eager PyTorch: torch.compile, torch.export, ONNX, TorchScript, FX.

All variants, as they train and fused, on a small network that holds what is special for an export: a strided, a
same-padded depthwise, a grouped and a 1x1 convolution. What depends on the batch is run on other batches than the one
that the export saw.
"""

import copy
import io
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from layers.cases import relative_difference
from stand_in import KINDS, random_model, randomise
from timm.layers import Conv2dSame, create_feature_extractor, set_exportable
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from timm_reparam import convert_model, fuse_model, is_variant
from timm_reparam.layers import DOConvTranspose2d, DynamicConv2d, RefConvTranspose2d
from timm_reparam.variants import VARIANTS

ALGEBRA = 1e-10
STEPS = 5
# falls to 1 within the steps that the tests train
SCHEDULE = 3

variants = pytest.mark.parametrize('variant', KINDS)
# the fused forms are plain convolutions, dynamic convolution's aside, which differs in its temperature only
forms = pytest.mark.parametrize('form', ['train_time', pytest.param('fused', marks=pytest.mark.slow)])


class Net(nn.Module):
    """Two norms, a stem, and one of each kind of convolution behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depthwise = Conv2dSame(6, 6, 3, stride=2, groups=6)
        self.grouped = nn.Conv2d(6, 8, (3, 5), padding=(1, 2), groups=2)
        self.point = nn.Conv2d(8, 6, 1)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.norm2(self.point(self.grouped(self.depthwise(x)))).relu()
        return self.head(x.mean((2, 3)))


def images(batch: int, size: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch)).to(dtype)


def disturbed(model: nn.Module, attention: float = 50.0) -> nn.Module:
    """Away from where the model starts: attention that tells the samples apart, in mid-schedule.

    Args:
        model: The model, changed in place.
        attention: Scale of the attention's logits. A deep network makes chaos of a large one: its rounding grows to the
            size of its outputs.
    """
    randomise(model, 2)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if '.fc2.' in name:
                tensor.normal_(0, attention, generator=generator)
            elif 'residual' in name:
                tensor.normal_(0, min(0.3, tensor[0].numel() ** -0.5), generator=generator)
            elif name.endswith('temperature_position'):
                tensor.copy_(model.get_buffer(name.removesuffix('position') + 'steps') // 3)
    return model


def build(variant: str, form: str = 'train_time', dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """The network as a variant, everything randomised, in eval mode."""
    if variant == 'dyconv':
        options.setdefault('temperature_steps', SCHEDULE)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = disturbed(convert_model(randomise(Net(), 1), variant, **options)).to(dtype).eval()
    if variant == 'dyconv':
        assert attention_varies(model), 'a uniform attention would hide what is wrong with the others'
    return fuse_model(model) if form == 'fused' else model


@torch.no_grad()
def attention_varies(model: nn.Module) -> bool:
    """Whether the dynamic layers give the samples clearly different kernels."""
    inputs = {}
    layers = [m for m in model.modules() if isinstance(m, DynamicConv2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m in layers]
    model(images(4).to(model.head.weight.dtype))
    for hook in hooks:
        hook.remove()
    kernels = [layer.sample_kernels(inputs[layer]) for layer in layers]
    return bool(layers) and all((k.std(0).max() > 1e-2 * k.abs().max()) for k in kernels)


def assert_equal_on_other_batches(function: Callable, model: nn.Module, bound: float, size: int = 16) -> None:
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = images(batch, size)
            assert relative_difference(function(x), model(x)) <= bound, batch


# torch.compile --------------------------------------------------------------------------------------------------------


def train(model: nn.Module, forward: Callable, dtype: torch.dtype) -> None:
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        optimiser.zero_grad()
        # batches of one size, and of other values
        x = images(4, dtype=dtype) + 0.1 * step
        forward(x).square().mean().backward()
        optimiser.step()


def assert_compiled_equals_eager(variant: str, form: str, backend: str, dtype: torch.dtype, bound: float) -> None:
    """Five steps of training and some of evaluation, compiled once for each mode and never again."""
    torch.compiler.reset()
    model = build(variant, form, dtype)
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for module, forward in ((eager, eager), (model, compiled)):
        module.train()
        train(module, forward, dtype)
    assert counter.frame_count == 1, 'recompiled from step to step'
    for name, expected in eager.state_dict().items():
        found = model.state_dict()[name]
        assert (found - expected).abs().max() <= bound * max(1, expected.abs().max()), name
    if variant == 'dyconv' and form == 'train_time':
        assert model.point.temperature_position == SCHEDULE // 3 + STEPS
    model.eval(), eager.eval()
    found = []
    for position in (2, 1):
        for module in (model, eager):
            for name, buffer in module.named_buffers():
                if name.endswith('temperature_position'):
                    buffer.fill_(position)
        x = images(4, dtype=dtype)
        with torch.no_grad():
            found.append(compiled(x))
            assert relative_difference(found[-1], eager(x)) <= bound
    assert counter.frame_count == 2, 'recompiled in evaluation'
    moves = variant == 'dyconv' and form == 'train_time'
    assert torch.equal(*found) != moves, 'evaluation uses the current temperature'


@pytest.mark.parametrize(
    'variant',
    [
        variant if variant in ('acconv', 'dyconv') else pytest.param(variant, marks=pytest.mark.slow)
        for variant in VARIANTS
    ],
)
@forms
def test_compiled(variant: str, form: str) -> None:
    assert_compiled_equals_eager(variant, form, 'aot_eager', torch.float64, ALGEBRA)


@pytest.mark.slow
@variants
@forms
def test_compiled_by_inductor(variant: str, form: str) -> None:
    assert_compiled_equals_eager(variant, form, 'inductor', torch.float32, 1e-4)


# torch.export ---------------------------------------------------------------------------------------------------------


def export(model: nn.Module, size: int = 16) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images(3, size),), dynamic_shapes=({0: torch.export.Dim('batch', max=1024)},))


@variants
@forms
def test_exported(variant: str, form: str) -> None:
    model = build(variant, form)
    program = export(model)
    assert_equal_on_other_batches(program.module(), model, 1e-5)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_equal_on_other_batches(torch.export.load(file).module(), model, 1e-5)


def test_exported_with_a_static_graph() -> None:
    with set_exportable(True):
        model = build('dyconv')
    assert_equal_on_other_batches(export(model).module(), build('dyconv'), 1e-5)


def test_models_created_exportable_have_a_static_graph() -> None:
    """timm sets its configuration only while the model is created; the layers, and the fused ones, remember."""
    options = dict(num_classes=5, stem_width=4, channels=(8, 12, 16, 24))
    model = disturbed(random_model('resnet10t_dyconv', **options, exportable=True))
    other = random_model('resnet10t_dyconv', **options)
    other.load_state_dict(model.state_dict())
    for module, expected in ((model, True), (fuse_model(model), True), (other, False), (fuse_model(other), False)):
        assert {m.exportable for m in module.modules() if isinstance(m, DynamicConv2d)} == {expected}
    assert_equal_on_other_batches(fuse_model(model), other, 1e-5, size=32)


@pytest.mark.parametrize('variant', ['acconv', 'dyconv'])
def test_exported_in_training_mode_keeps_its_state(variant: str) -> None:
    model = build(variant).train()
    program = export(copy.deepcopy(model)).module()  # a program shares the tensors that it was made from
    for batch in (2, 5, 3):
        x = images(batch)
        assert relative_difference(program(x), model(x)) <= 1e-5
    for name, expected in model.state_dict().items():
        assert torch.allclose(program.state_dict()[name], expected, rtol=1e-5, atol=1e-6), name


# ONNX -----------------------------------------------------------------------------------------------------------------


def onnx_function(path: Path, model: nn.Module, dynamo: bool, size: int = 16) -> Callable:
    """The model exported to ONNX with a dynamic batch, as onnxruntime runs it."""
    reason = 'checks ONNX export: needs onnx, onnxscript and onnxruntime (the extra "export")'
    pytest.importorskip('onnx', reason=reason)
    pytest.importorskip('onnxscript', reason=reason)
    onnxruntime = pytest.importorskip('onnxruntime', reason=reason)
    options = (
        dict(dynamo=True, dynamic_shapes=({0: 'batch'},), external_data=False)
        if dynamo
        else dict(dynamo=False, dynamic_axes={'x': {0: 'batch'}, 'y': {0: 'batch'}})
    )
    torch.onnx.export(model, (images(3, size),), path, input_names=['x'], output_names=['y'], verbose=False, **options)
    session = onnxruntime.InferenceSession(path)
    return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy()})[0])


exporters = pytest.mark.parametrize(
    'dynamo', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['dynamo', 'legacy']
)


@cache
def exporter_failure(dynamo: bool) -> str | None:
    """Why the installed exporter cannot export even the stock network, or None."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            onnx_function(Path(folder) / 'stock.onnx', randomise(Net(), 1).eval(), dynamo)
        except Exception as e:  # each version fails in its own way
            return f'the installed torch and onnxscript cannot export the stock network either: {type(e).__name__}'
    return None


@pytest.mark.parametrize(
    'variant',
    # test_exported exports all of them, by the same capture; dynamic convolution has a graph of its own for ONNX
    [v if v == 'dyconv' else pytest.param(v, marks=pytest.mark.slow) for v in VARIANTS],
)
@forms
@exporters
@pytest.mark.filterwarnings('error::torch.jit.TracerWarning')
@pytest.mark.filterwarnings('ignore:.*TorchScript-based ONNX export.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:The feature will be removed.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:Constant folding - Only steps=1.*:UserWarning')
def test_onnx(tmp_path: Path, variant: str, form: str, dynamo: bool) -> None:
    if failure := exporter_failure(dynamo):
        pytest.skip(failure)
    model = build(variant, form)
    function = onnx_function(tmp_path / 'model.onnx', model, dynamo)
    assert_equal_on_other_batches(function, model, 1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of dynamic convolution's 50 layers, most of it in torch's own tracing
@variants
@pytest.mark.parametrize('stock', ['resnet10t', 'mobilenetv2_035'])
@exporters
@pytest.mark.filterwarnings('ignore:.*TorchScript-based ONNX export.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:The feature will be removed.*:DeprecationWarning')
@pytest.mark.filterwarnings('ignore:Constant folding - Only steps=1.*:UserWarning')
def test_onnx_of_backbones(tmp_path: Path, variant: str, stock: str, dynamo: bool) -> None:
    """Whole backbones in the form that is deployed."""
    if failure := exporter_failure(dynamo):
        pytest.skip(failure)
    fused = fuse_model(disturbed(convert_model(random_model(stock, num_classes=10), variant), attention=1.0))
    function = onnx_function(tmp_path / 'model.onnx', fused, dynamo, size=64)
    assert_equal_on_other_batches(function, fused, 1e-4, size=64)


# TorchScript ----------------------------------------------------------------------------------------------------------


@variants
@forms
@pytest.mark.filterwarnings('ignore:.*torch.jit.*:FutureWarning', 'ignore:.*torch.jit.*:DeprecationWarning')
def test_scripted(variant: str, form: str) -> None:
    """Trained, saved, loaded and trained on: what a forward pass moves moves in the script, too."""
    model = build(variant, form, torch.float64).train()
    scripted = torch.jit.script(copy.deepcopy(model))
    train(model, model, torch.float64)
    train(scripted, scripted, torch.float64)
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    scripted = torch.jit.load(file)
    for module in (model, scripted):
        module.train()(images(3, dtype=torch.float64))
    for name, expected in model.state_dict().items():
        found = scripted.state_dict()[name]
        assert (found - expected).abs().max() <= ALGEBRA * max(1, expected.abs().max()), name
    x = images(5, dtype=torch.float64)
    assert relative_difference(scripted.eval()(x), model.eval()(x)) <= ALGEBRA


# FX -------------------------------------------------------------------------------------------------------------------


@variants
@forms
def test_traced_by_fx(variant: str, form: str) -> None:
    """Tracing moves nothing, and the graph trains as the model does: it anneals, and its variances run."""
    model = build(variant, form, torch.float64)
    eager = copy.deepcopy(model)
    graph = create_feature_extractor(model, return_nodes={'head': 'logits'})
    for name, expected in eager.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected), name
    for module, forward in ((eager, eager), (graph, lambda x: graph(x)['logits'])):
        module.train()
        train(module, forward, torch.float64)
    found = graph.state_dict()
    for name, expected in eager.state_dict().items():
        assert torch.equal(found[name], expected), name
    if variant == 'dyconv' and form == 'train_time':
        assert found['point.temperature_position'] == SCHEDULE // 3 + STEPS
    x = images(5, dtype=torch.float64)
    assert torch.equal(graph.eval()(x)['logits'], eager.eval()(x))


@variants
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_traced_by_fx_without_timm(variant: str, training: bool) -> None:
    """torch's own tracer sees each layer as it sees torch's, also where it is asked for a model in training mode."""
    model = build(variant, 'train_time', torch.float64).train(training)
    eager = copy.deepcopy(model)
    graph = torch.fx.symbolic_trace(model)
    called = {node.target for node in graph.graph.nodes if node.op == 'call_module'}
    assert called >= {name for name, module in model.named_modules() if is_variant(module)}
    x = images(3, dtype=torch.float64)
    assert torch.equal(graph(x), eager(x))
    state = graph.state_dict()
    for name, expected in eager.state_dict().items():
        assert torch.equal(state[name], expected), name
    fused = fuse_model(graph)
    assert relative_difference(fused.eval()(x), eager.eval()(x)) <= ALGEBRA
    assert variant == 'dyconv' or not any(is_variant(module) for module in fused.modules())


def test_transposed_layers_traced_by_fx() -> None:
    for method in (DOConvTranspose2d, RefConvTranspose2d):
        layer = randomise(method(3, 4, 3, stride=2).double(), seed=1)
        x = images(2, dtype=torch.float64)
        assert torch.equal(torch.fx.symbolic_trace(nn.Sequential(layer))(x), layer(x))


@pytest.mark.parametrize('variant', ['acconv', 'dyconv'])
def test_features_traced_by_fx_train_on(variant: str) -> None:
    """The backbone that features_only gives with timm's FX wrapper, beside the one with hooks."""
    x = images(2, 32)
    outputs = []
    for feature_cls in ('fx', 'hook'):
        options = dict(features_only=True, feature_cls=feature_cls, out_indices=(1, 2), channels=(8, 12, 16, 24))
        model = random_model(f'resnet10t_{variant}', stem_width=4, **options)
        model = disturbed(model).train()
        outputs.append([y for _ in range(2) for y in model(x)])
        if variant == 'dyconv':
            positions = [b for name, b in model.named_buffers() if name.endswith('temperature_position')]
            assert {int(position) for position in positions} == {10_000 // 3 + 2}
    for found, expected in zip(*outputs, strict=True):
        assert torch.equal(found, expected)
