"""Other people's libraries around the models: each trains a variant, and takes its fused form as the stock model.

The libraries are those of the extra `tools`; where one is missing, its tests are skipped. Weights are random: nothing
is fetched.
"""

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from layers.cases import relative_difference
from stand_in import disturbed, images, random_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from timm_reparam import convert_model, fuse_model, import_state_dict, is_variant
from timm_reparam.hub import save_pair
from timm_reparam.variants import VARIANTS

pytestmark = [
    pytest.mark.slow,
    # RefConv means nothing without trained weights; here they are random, as in every other model
    pytest.mark.filterwarnings('ignore:.*without pretrained weights:UserWarning'),
]

variants = pytest.mark.parametrize('variant', VARIANTS)
static_variants = pytest.mark.parametrize(
    'variant', [name for name, variant in VARIANTS.items() if not variant.input_dependent]
)

# float32, relative to the largest output: what fusing may change, and what the variant has to change of stock
ROUNDING = 1e-4
CLEARLY = 1e-3
SMALL = dict(stem_width=4, channels=(8, 12, 16, 24), num_classes=5)


def small(variant: str, seed: int | None = None) -> nn.Module:
    """A small timm model of a variant, everything away from where it starts."""
    return disturbed(random_model(f'resnet10t_{variant}', seed, **SMALL), 3 if seed is None else seed)


@torch.no_grad()
def with_attention(model: nn.Module) -> nn.Module:
    """The model; its dynamic convolutions, if any, get kernels that differ and attention that tells inputs apart."""
    for name, parameter in model.named_parameters():
        if name.endswith('residual_weight'):
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        elif '.attention.fc2.' in name:
            parameter.normal_(0, 5)
    return model


def holds_variants(model: nn.Module) -> bool:
    return any(is_variant(module) for module in model.modules())


def train_a_step(model: nn.Module, x: torch.Tensor) -> None:
    """A step of SGD in training mode; every parameter that is trained has a gradient."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimiser = torch.optim.SGD(trained.values(), lr=1e-3)
    model.train()(x).square().mean().backward()
    assert not [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    optimiser.step()
    model.eval()


def saved(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@torch.no_grad()
def assert_fuses(model: nn.Module, stock: Callable[[], nn.Module], x: torch.Tensor, is_dynamic: bool = False) -> None:
    """The fused form loads strictly into the stock model, and is the same function there.

    Args:
        model: A converted model; what its layers add has to matter.
        stock: Makes the stock model anew. Dynamic convolutions are put into it in their form for inference.
        x: An input.
        is_dynamic: Whether the model is one of dynamic convolutions.
    """
    expected = model.eval()(x)
    plain = stock().eval()
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert relative_difference(plain(x), expected) > CLEARLY
    fused = fuse_model(model)
    reloaded = stock()
    if is_dynamic:
        convert_model(reloaded, 'dyconv', temperature=None)
    else:
        assert not holds_variants(fused)
    reloaded.load_state_dict(saved(fused.state_dict()), strict=True)
    for found in (fused, reloaded):
        assert relative_difference(found.eval()(x), expected) <= ROUNDING


# segmentation_models_pytorch ------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize('by_name', [True, False], ids=['named', 'converted'])
def test_encoder_of_a_segmentation_model(variant: str, by_name: bool) -> None:
    smp = pytest.importorskip('segmentation_models_pytorch')

    def stock() -> nn.Module:
        return smp.Unet('tu-resnet18', encoder_weights=None)

    if by_name:
        model = smp.Unet(f'tu-resnet18_{variant}', encoder_weights=None)
    else:
        model = stock()
        convert_model(model.encoder, variant)
    assert holds_variants(model.encoder)
    with_attention(disturbed(model))
    x = images(2, 3, 64, 64)
    train_a_step(model, x)
    assert_fuses(model, stock, x, variant == 'dyconv')


@static_variants
def test_fused_segmentation_model_is_loaded_under_the_stock_name(variant: str, tmp_path: Path) -> None:
    """smp saves the arguments of the train-time model; the name of its encoder is given again."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = disturbed(smp.Unet(f'tu-resnet18_{variant}', encoder_weights=None)).eval()
    fuse_model(model).save_pretrained(tmp_path)
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        for options, is_stock in ((dict(encoder_name='tu-resnet18'), True), ({}, False)):
            # without the name it is lifted: the same function, in the train-time form
            loaded = smp.from_pretrained(tmp_path, **options).eval()
            assert holds_variants(loaded) != is_stock
            assert relative_difference(loaded(x), expected) <= ROUNDING


# Lightning ------------------------------------------------------------------------------------------------------------


@variants
def test_lightning_fits_resumes_and_its_checkpoint_is_fused(
    variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lightning = pytest.importorskip('lightning')

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], number: int) -> torch.Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)

    def fit(model: nn.Module, epochs: int, **options) -> tuple[nn.Module, Path]:
        quiet = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator='cpu', default_root_dir=tmp_path, **quiet)
        trainer.fit(Task(model.train()), DataLoader(data, batch_size=4), **options)
        path = tmp_path / f'{epochs}.ckpt'
        trainer.save_checkpoint(path)
        return model, path

    data = TensorDataset(images(12, 3, 32, 32), torch.arange(12) % 5)
    at_once, _ = fit(small(variant), 2)
    _, path = fit(small(variant), 1)
    resumed, path = fit(small(variant, seed=9), 2, ckpt_path=path)
    for name, expected in at_once.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], expected), name

    state = torch.load(path, weights_only=True)['state_dict']
    model = small(variant, seed=8)
    import_state_dict(state, model)
    assert "all of them start with 'model.': take that off" in caplog.text
    model.load_state_dict({name.removeprefix('model.'): tensor for name, tensor in state.items()})
    x = images(2, 3, 32, 32, seed=4)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), resumed.eval()(x))
    assert_fuses(with_attention(model), lambda: timm.create_model('resnet10t', **SMALL), x, variant == 'dyconv')


# torchvision ----------------------------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2'])
def test_torchvision_model(variant: str, name: str) -> None:
    models = pytest.importorskip('torchvision.models')

    def stock() -> nn.Module:
        return models.get_model(name, weights=None, num_classes=5)

    model = with_attention(disturbed(convert_model(stock(), variant)))
    x = images(4, 3, 64, 64)
    train_a_step(model, x)
    assert_fuses(model, stock, x, variant == 'dyconv')


# transformers ---------------------------------------------------------------------------------------------------------


@variants
def test_saved_pair_in_the_timm_wrapper_of_transformers(variant: str, tmp_path: Path) -> None:
    """Both forms, from folders; timm 1.0.31 names `num_classes` twice in them, which transformers refuses."""
    transformers = pytest.importorskip('transformers')
    model = with_attention(small(variant)).eval()
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        logits, features = model(x), model.forward_head(model.forward_features(x), pre_logits=True)
        for folder in save_pair(model, tmp_path / 'zoo', tag='random'):
            config = transformers.TimmWrapperConfig.from_pretrained(folder)
            config.model_args.pop('num_classes', None)
            options = dict(config=config, local_files_only=True, output_loading_info=True)
            for cls, field, expected in (
                (transformers.TimmWrapperForImageClassification, 'logits', logits),
                (transformers.TimmWrapperModel, 'pooler_output', features),
            ):
                loaded, info = cls.from_pretrained(folder, **options)
                assert not info['missing_keys'] and not info['mismatched_keys']
                assert holds_variants(loaded) != (folder.name.endswith('_fused') and variant != 'dyconv')
                assert relative_difference(loaded.eval()(x)[field], expected) <= ROUNDING


# peft -----------------------------------------------------------------------------------------------------------------


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip('peft')
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=r'.*\.conv\d')).eval()


@torch.no_grad()
def disturb_lora(model: nn.Module) -> nn.Module:
    """Moves the second factor of every adapter away from zero, where it starts."""
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if 'lora_B' in name and name.endswith('default.weight'):
            tensor.normal_(0, 0.1, generator=generator)
    return model


@static_variants
def test_lora_is_right_on_the_fused_model(variant: str) -> None:
    model, x = small(variant), images(4, 3, 32, 32)
    lora = with_lora(fuse_model(model))
    with torch.no_grad():
        before = model(x)
        assert relative_difference(lora(x), before) <= ROUNDING
    train_a_step(disturb_lora(lora), x)
    with torch.no_grad():
        expected = lora(x)
        assert relative_difference(expected, before) > CLEARLY
        stock = timm.create_model('resnet10t', **SMALL)
        stock.load_state_dict(lora.merge_and_unload().state_dict(), strict=True)
        assert relative_difference(stock.eval()(x), expected) <= ROUNDING


@variants
@torch.no_grad()
def test_lora_merged_into_a_variant_is_wrong_and_fusing_before_the_merge_is_right(variant: str) -> None:
    """peft adds to `weight`, one part of the kernel, and builds the adapters from the class of the layer itself."""
    model, x = with_attention(small(variant)), images(4, 3, 32, 32)
    lora = disturb_lora(with_lora(model))
    assert any(is_variant(module) for name, module in lora.named_modules() if 'lora_A' in name)
    expected = lora(x)
    fused = fuse_model(lora)
    assert relative_difference(lora.merge_and_unload()(x), expected) > CLEARLY
    if variant != 'dyconv':
        assert relative_difference(fused.merge_and_unload()(x), expected) <= ROUNDING


def test_lora_on_a_variant_starts_elsewhere_or_stands_still() -> None:
    x = images(4, 3, 32, 32)
    with torch.no_grad():
        model = small('acconv')
        expected = model(x)
        # the branches of the adapter's second factor do not start at zero
        assert relative_difference(with_lora(model)(x), expected) > CLEARLY
    lora = with_lora(small('refconv'))
    lora(x).square().mean().backward()
    # its frozen base is zero, and so is every change of it
    assert not any(p.grad.any() for name, p in lora.named_parameters() if p.requires_grad and p.grad is not None)
