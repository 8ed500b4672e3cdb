"""Stock checkpoints load into variants by themselves, through every loader that ends in `load_state_dict`."""

from pathlib import Path

import loading_faults
import pytest
import timm
import torch
from safetensors.torch import save_file
from stand_in import KINDS, TINY, disturbed, images, tiny_stock, tiny_variant
from torch import nn

import timm_reparam.hub
from timm_reparam import ReparamError, convert_model, fuse_model, verify_fusion
from timm_reparam.layers._base import ReparamLayer
from timm_reparam.variants import VARIANTS


def assert_same_function(model: nn.Module, reference: nn.Module) -> None:
    x = images(2, 3, 32, 32).double()
    with torch.no_grad():
        expected = reference.double().eval()(x)
        difference = (model.double().eval()(x) - expected).abs().max() / expected.abs().max()
    assert difference <= 1e-12, float(difference)


@pytest.mark.parametrize(
    'variant, strict',
    [
        pytest.param(variant, strict, marks=[] if strict == index % 2 else pytest.mark.slow)
        for index, variant in enumerate(VARIANTS)
        for strict in (True, False)
    ],
)
def test_load_state_dict(variant: str, strict: bool) -> None:
    model, reference = tiny_variant(variant), tiny_stock()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    drawn = torch.random.get_rng_state()
    found = model.load_state_dict(reference.state_dict(), strict=strict)
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(torch.random.get_rng_state(), drawn), 'loading draws no random numbers'
    assert_same_function(model, reference)
    fused = fuse_model(model)
    assert verify_fusion(model, fused).passed
    # what the closed gates hide is as it was
    hidden = [
        name for name in before if name.endswith(('vertical_weight', 'outer_weight', 'residual_weight', 'fc1.weight'))
    ]
    assert bool(hidden) == (variant in ('acconv', 'dbbconv', 'dyconv', 'orepaconv'))
    assert all(torch.equal(before[name], model.state_dict()[name].to(before[name].dtype)) for name in hidden)


@pytest.mark.parametrize('variant', KINDS)
def test_under_prefixes_and_wrappers(variant: str) -> None:
    reference = tiny_stock()
    wrapped = nn.ModuleDict({'encoder': nn.Sequential(tiny_variant(variant))})
    wrapped.load_state_dict({f'encoder.0.{name}': value for name, value in reference.state_dict().items()})
    assert_same_function(wrapped['encoder'][0], reference)
    averaged = torch.optim.swa_utils.AveragedModel(tiny_variant(variant))
    state = {f'module.{name}': value for name, value in tiny_stock().state_dict().items()}
    averaged.load_state_dict({**state, 'n_averaged': torch.tensor(0)})
    assert_same_function(averaged.module, tiny_stock())


@pytest.mark.parametrize('kind', ['safetensors', 'pth', 'pth.tar'])
@pytest.mark.parametrize('variant', KINDS)
def test_checkpoint_path(tmp_path: Path, variant: str, kind: str) -> None:
    """Also what timm's train script calls for --initial-checkpoint."""
    reference, path = tiny_stock(), tmp_path / f'stock.{kind}'
    if kind == 'safetensors':
        save_file(reference.state_dict(), path)
    else:
        state = reference.state_dict()
        torch.save({'state_dict': state, 'epoch': 3} if kind == 'pth.tar' else state, path)
    model = timm.create_model(f'resnet10t_{variant}', checkpoint_path=str(path), **TINY)
    assert_same_function(model, tiny_stock())


@pytest.mark.parametrize('variant', KINDS)
def test_assigned_and_from_the_meta_device(variant: str) -> None:
    model = tiny_variant(variant)
    model.load_state_dict(tiny_stock().state_dict(), assign=True)
    assert_same_function(model, tiny_stock())
    with torch.device('meta'):
        model = timm.create_model(f'resnet10t_{variant}', **TINY)
    model.load_state_dict({name: value.double() for name, value in tiny_stock().state_dict().items()}, assign=True)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    assert not [name for name, tensor in tensors.items() if tensor.is_meta]
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float64}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert not frozen
    assert_same_function(model, tiny_stock())
    assert verify_fusion(model, fuse_model(model)).passed


@pytest.mark.parametrize('variant', KINDS)
def test_parameters_that_are_assigned(variant: str) -> None:
    """A frozen kernel stays one."""
    model, reference = tiny_variant(variant), tiny_stock()
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    model.load_state_dict(reference.state_dict(keep_vars=True), assign=True)
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trainable
    assert_same_function(model, reference)


@pytest.mark.parametrize('variant', KINDS)
def test_train_time_checkpoints_load_as_they_are(variant: str) -> None:
    model, other = tiny_variant(variant), timm.create_model(f'resnet10t_{variant}', **TINY)
    other.load_state_dict(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.parametrize('variant', KINDS)
def test_incomplete_and_foreign_entries_are_missing_as_ever(variant: str) -> None:
    model = tiny_variant(variant)
    name, layer = next((name, m) for name, m in model.named_modules() if isinstance(m, ReparamLayer))
    added = [f'{name}.{key}' for key in layer.state_dict() if key not in ('weight', 'bias')]
    if len(added) > 1:  # some but not all
        state = {key: value for key, value in model.state_dict().items() if key != added[0]}
        with pytest.raises(RuntimeError, match=f'Missing key.*{added[0]}'):
            model.load_state_dict(state)
    other = tiny_variant('refconv' if variant == 'doconv' else 'doconv')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=f'(?s)Missing key.*{added[0]}.*Unexpected key'):
        model.load_state_dict(other.state_dict())
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in added), 'gates of a failed load stay'
    # a kernel of another shape is no stock one
    with pytest.raises(RuntimeError, match='size mismatch'):
        model.load_state_dict({**tiny_stock().state_dict(), f'{name}.weight': torch.zeros(1, 1, 1, 1)})
    assert all(torch.equal(before[key], model.state_dict()[key]) for key in added)


@pytest.mark.parametrize('strict', [True, False])
def test_options_without_an_exact_lift(strict: bool) -> None:
    options = dict(branch_norm='none', scale=1 / 3)
    model = timm.create_model('resnet10t_acconv', conv_options=options, **TINY)
    with pytest.raises(
        RuntimeError, match=r'layer1\.0\.conv1\.weight: of a plain convolution: .*exact at scale 1 only'
    ):
        model.load_state_dict(tiny_stock().state_dict(), strict=strict)


def test_part_of_a_model() -> None:
    """What the given entries name is lifted, and nothing else."""
    model = tiny_variant('acconv')
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = {name: value for name, value in tiny_stock().state_dict().items() if name.startswith('layer1.')}
    found = model.load_state_dict(given, strict=False)
    assert found.missing_keys and not any(name.startswith('layer1.') for name in found.missing_keys)
    for name, value in model.state_dict().items():
        if not name.startswith('layer1.'):
            assert torch.equal(value, before[name]), name
    assert not model.layer1[0].conv1.vertical_gamma.any() and before['layer2.0.conv1.vertical_gamma'].any()


def test_shared_and_transposed_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 3, padding=1)
            self.again = self.a
            self.up = nn.ConvTranspose2d(3, 2, 3, stride=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(self.again(self.a(x)))

    torch.manual_seed(0)
    reference = Net()
    model = disturbed(convert_model(Net(), 'doconv'), seed=3)
    assert isinstance(model.up, timm_reparam.DOConvTranspose2d)
    model.load_state_dict(reference.state_dict())
    assert_same_function(model, reference)


@pytest.mark.parametrize('variant', KINDS)
def test_where_completeness_is_promised_stock_files_are_refused(tmp_path: Path, variant: str) -> None:
    folder = timm_reparam.hub.save_checkpoint(tiny_variant(variant), tmp_path / 'folder')
    save_file(tiny_stock().state_dict(), folder / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ReparamError, match='folder'):
        timm_reparam.hub.load_checkpoint(folder)


@pytest.mark.parametrize('prefix', ['model.', 'backbone.encoder.'])
def test_a_prefix_that_no_key_of_the_model_has_is_named(tmp_path: Path, prefix: str) -> None:
    path = tmp_path / 'lightning.pth'
    torch.save({f'{prefix}{name}': value for name, value in tiny_stock().state_dict().items()}, path)
    overlay = dict(file=str(path))
    with pytest.raises(ReparamError, match=f"all of them start with '{prefix}': take that off") as raised:
        timm.create_model('resnet10t_doconv', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize('num_classes', [None, 4])
def test_convert_names_such_a_prefix(tmp_path: Path, num_classes: int | None) -> None:
    path = tmp_path / 'last.ckpt'
    torch.save({f'model.{name}': value for name, value in tiny_stock().state_dict().items()}, path)
    arguments = dict(TINY, num_classes=num_classes)
    with pytest.raises(ReparamError, match="last.ckpt: expected keys of .*all of them start with 'model.'"):
        timm_reparam.hub.convert_checkpoint(path, tmp_path / 'out', 'resnet10t_doconv', **arguments)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'])
def test_official_layouts_under_wrappers(prefix: str) -> None:
    model = tiny_variant('dyconv')
    official = timm_reparam.export_state_dict(model)
    wrapped = {f'{prefix}{name}': value for name, value in official.items()}
    assert list(timm_reparam.import_state_dict(wrapped, model)) == list(timm_reparam.import_state_dict(official, model))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    state = averaged.state_dict()
    assert timm_reparam.import_state_dict(state, averaged).keys() == state.keys()


def test_what_is_not_recognised_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_variant('dyconv')
    state = {f'net.{name}': value for name, value in model.state_dict().items()}
    with caplog.at_level('WARNING'):
        assert timm_reparam.import_state_dict(state, model) == state
    assert "all of them start with 'net.'" in caplog.text
    caplog.clear()
    timm_reparam.import_state_dict(model.state_dict(), model)
    assert not caplog.text


@pytest.mark.parametrize('variant', KINDS)
def test_loading_is_right(variant: str) -> None:
    assert loading_faults.problems(variant) == []


@pytest.mark.parametrize(
    'fault, variant',
    [(fault, variant) for fault, (variants, _) in loading_faults.LOADING_FAULTS.items() for variant in variants],
)
def test_a_planted_fault_in_loading_is_found(fault: str, variant: str) -> None:
    assert loading_faults.found(fault, variant)
