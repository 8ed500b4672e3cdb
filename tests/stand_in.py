"""Stand-ins for the checkpoints that timm publishes: the architecture with random weights, on the loopback Hub."""

import tempfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub.server import HubServer
from timm.models import save_for_hf
from torch import nn

from timm_reparam.layers._branched_conv import BranchedConv2d
from timm_reparam.variants import VARIANTS

# The variants that are lists of branches.
BRANCHED = [name for name, variant in VARIANTS.items() if issubclass(variant.layer, BranchedConv2d)]
# Every variant, for tests of what does not know the methods: there the first list of branches stands for the others,
# which run in the slow checks. What each method computes is tested in layers/.
KINDS = [pytest.param(variant, marks=pytest.mark.slow) if variant in BRANCHED[1:] else variant for variant in VARIANTS]


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Gives every norm random weights and statistics and fills every tensor that starts at zero or one, in place.

    Fresh statistics (mean 0, variance 1) and zero-started parameters would hide what folding or loading gets wrong.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                continue
            if name.endswith('running_mean') or (tensor.ndim == 1 and name.endswith('bias')):
                tensor.normal_(0.0, 0.1, generator=generator)
            elif tensor.ndim == 1:
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif not tensor.any():
                tensor.normal_(0.0, 0.5 * tensor[0].numel() ** -0.5, generator=generator)
    return model


def disturbed(model: nn.Module, seed: int = 3) -> nn.Module:
    """Moves away everything that starts at zero or one, and the temperature's position, in place."""
    randomise(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith('temperature_position'):
            buffer.fill_(4_000)
    return model


# A narrow ResNet.
TINY: dict[str, Any] = dict(num_classes=4, channels=(8, 8, 8, 8), stem_width=4)


def tiny_stock() -> nn.Module:
    """A narrow ResNet, away from its start, in eval mode."""
    torch.manual_seed(5)
    return disturbed(timm.create_model('resnet10t', **TINY), 5).eval()


def tiny_variant(variant: str, **options: Any) -> nn.Module:
    """A variant of it whose every parameter, statistic and schedule is away from its start, in eval mode."""
    torch.manual_seed(6)
    return disturbed(timm.create_model(f'resnet10t_{variant}', **TINY, **options), seed=2).eval()


def images(*size: int, seed: int = 0) -> torch.Tensor:
    """Seeded random numbers of a size."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def random_model(name: str, seed: int | None = None, **options) -> nn.Module:
    """A model with seeded random weights and statistics, in eval mode; options are those of timm.create_model.

    Args:
        name: The name of the architecture, with or without a tag.
        seed: Seed of its weights; by default another one for every name.
        **options: Further arguments for timm.create_model.
    """
    seed = zlib.crc32(name.encode()) if seed is None else seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = timm.create_model(name, **options)
    return randomise(model, seed).eval()


def add_model(hub: HubServer, repo_id: str, model: nn.Module, readme: str = '', **options) -> str:
    """Serves a model as timm saves it (config.json and model.safetensors) and gives the commit's id."""
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model, folder, safe_serialization=True)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return hub.commit(repo_id, {**files, **({'README.md': readme} if readme else {})}, **options)


def add_stock(hub: HubServer, name: str, **options) -> nn.Module:
    """Serves a stand-in for timm's published `timm/<name>` and gives the stock model that it holds, in eval mode.

    Args:
        hub: The Hub to serve it from.
        name: Architecture and tag, `resnet18.a1_in1k`.
        **options: Further arguments for timm.create_model.
    """
    model = random_model(name, **options)
    licence = model.pretrained_cfg.get('license', 'apache-2.0')
    tags = 'tags:\n- image-classification\n- timm\nlibrary_name: timm\npipeline_tag: image-classification'
    add_model(hub, f'timm/{name}', model, f'---\n{tags}\nlicense: {licence}\n---\n# Model card for {name}\n')
    return model
