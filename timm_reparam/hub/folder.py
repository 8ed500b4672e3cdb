"""Save checkpoint folders: the train-time form of a model and its fused form.

A folder holds ``config.json`` and ``model.safetensors``, which timm loads as ``local-dir:FOLDER`` or from the Hub, the
card ``README.md``, and ``training.json`` with the facts about the training (see :mod:`timm_reparam.hub.facts`).

``config.json`` names its format (``reparam_format``) and every option of a variant's layers, defaults included
(``model_args.conv_options``), so that a checkpoint keeps its function when a default changes. Version 0.1.0 wrote no
format, and only the options that were given; a missing option has the default of 0.1.0.

A folder is either complete or absent; see :mod:`timm_reparam.hub.atomic`.
"""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import resolve_input_data_config
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from ..errors import ReparamError
from ..fuse import fuse_model
from ..timm_model import architecture_of as recorded_architecture
from ..timm_model import config_of, record_options, stock_architecture
from ..variants import is_variant, variant_of
from ..verify import FusionReport, seeded_images, verify_fusion
from .atomic import as_reparam_error, check_target, locked, make_zoo, write_all
from .card import render_card
from .facts import (
    CARD_NAME,
    CONFIG_NAME,
    FORMAT,
    FORMAT_KEY,
    WEIGHTS_NAME,
    check_facts,
    state_license,
    write_facts,
    write_text,
)
from .names import check_tag, folder_name
from .untrusted import build_on_meta

__all__ = [
    'Draft',
    'architecture_of',
    'check_pair',
    'images_for',
    'origin_of',
    'save_checkpoint',
    'save_pair',
]

# Entries of a pretrained_cfg that describe the weights that a training started from, not its result.
_STALE_KEYS = ('origin_url', 'paper_ids', 'paper_name', 'description', 'notes')


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    *,
    card: str | None = None,
    data_config: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Path:
    """Save a timm model as a folder that ``timm.create_model('local-dir:FOLDER', pretrained=True)`` loads.

    Everything is checked before anything is written, and the folder appears all at once. A folder that holds the same
    architecture is replaced; anything else at that place is an error.

    Args:
        model: A timm model, train-time or stock, that can be rebuilt from its architecture name and model arguments.
        folder: Where to save it; its parent must exist.
        card: Text of the model card; rendered from the other files by default.
        data_config: Preprocessing of the inputs (input_size, mean, std, interpolation, crop_pct, ...); the model's own
            by default.
        facts: Facts about the training, stored as ``training.json``. With facts the weights count as trained: tag,
            licence and labels are taken from the facts, not from the base weights.

    Returns:
        The folder.

    Raises:
        ReparamError: The model cannot be rebuilt from its name and arguments, or contains NaN or infinity. Or the place
            is not writable, or taken by something else.
    """
    target = Path(folder).absolute()
    write_all([Draft(target, model, data_config, facts, card)])
    return target


def save_pair(
    model: nn.Module,
    zoo: str | Path,
    *,
    tag: str,
    fused: nn.Module | None = None,
    report: FusionReport | None = None,
    facts: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
) -> tuple[Path, Path]:
    """Save both forms of a variant, ``ZOO/<model>.<tag>`` and ``ZOO/<model>.<tag>_fused``.

    Both are complete on disk before either gets its final name. To the facts of each folder are added its ``form``,
    ``name``, ``tag``, ``variant`` and ``stock_architecture``, the figures of the verification (``fusion``) and the name
    and hash of the other form (``sibling``).

    Args:
        model: Train-time model.
        zoo: Folder of the pair; made if its parent exists.
        tag: Name of the training result.
        fused: Fused form of the model; by default it is made here.
        report: Report of :func:`timm_reparam.verify_fusion`; by default the fusion is verified here, on images of the
            size in `data_config`.
        facts: Facts about the training, see :mod:`timm_reparam.hub.facts`.
        data_config: Preprocessing of the inputs; the model's own by default.

    Returns:
        The folders of the train-time form and of the fused form.

    Raises:
        ReparamError: The fusion is not verified, or :func:`save_checkpoint` would reject one of the forms.
    """
    architecture = architecture_of(model)
    check_tag(tag, architecture)
    if variant_of(model) is None:
        raise ReparamError(
            f'{architecture}: expected a train-time model, got one without variant layers; use convert_model'
        )
    fused = fuse_model(model) if fused is None else fused
    unfused = [
        name
        for name, module in fused.named_modules()
        if is_variant(module) and not module.is_for_inference(module.options())
    ]
    if unfused:
        raise ReparamError(f'{architecture}: {unfused[0]}: expected a fused model, got a variant layer; use fuse_model')
    expected = architecture if variant_of(fused) else stock_architecture(unwrap_model(model))
    if architecture_of(fused) != expected:
        raise ReparamError(f'{architecture}: expected the fused model to be {expected}, got {architecture_of(fused)}')
    common = {**check_facts(facts or {}), **origin_of(model), 'tag': tag}
    zoo = Path(zoo).absolute()
    drafts = []
    for form, form_model in (('train_time', model), ('fused', fused)):
        name = folder_name(architecture, tag, form == 'fused')
        drafts.append(Draft(zoo / name, form_model, data_config, {**common, 'form': form, 'name': name}))
    report = verify_fusion(model, fused, inputs=images_for(data_config)) if report is None else report
    if not report.passed:
        raise ReparamError(f'{architecture}: the fused model differs from the train-time model, not saved: {report}')

    def add_fusion_and_siblings(hashes: Sequence[str]) -> None:
        for draft, sibling, sha256 in zip(drafts, reversed(drafts), reversed(hashes)):
            draft.add_facts(fusion=report.to_dict(), sibling={'name': sibling.target.name, 'sha256': sha256})

    make_zoo(zoo)
    write_all(drafts, add_fusion_and_siblings)
    return drafts[0].target, drafts[1].target


def check_pair(model_name: str, zoo: str | Path, *, tag: str) -> None:
    """Check before a training that :func:`save_pair` will be able to save its result.

    Args:
        model_name: Architecture of the train-time form.
        zoo: Folder of the pair.
        tag: Name of the training result.

    Raises:
        ReparamError: The tag does not give a valid repo name, the zoo is not writable, or another model is in the way.
    """
    check_tag(tag, model_name)
    zoo = Path(zoo).absolute()
    place = zoo if zoo.exists() else zoo.parent
    with as_reparam_error(zoo), locked(place):
        for fused in (False, True):
            target = zoo / folder_name(model_name, tag, fused)
            # the fused form of an input-dependent method keeps the variant's name
            check_target(target, {model_name, model_name.rpartition('_')[0]} if fused else {model_name})
        with tempfile.TemporaryDirectory(dir=place, prefix='.writable-'):
            pass


def images_for(data_config: Mapping[str, Any] | None) -> tuple[torch.Tensor, ...] | None:
    """Images for verification, of the size in a data_config; None if it names no size."""
    size = (data_config or {}).get('input_size')
    return seeded_images(size) if size else None


class Draft:
    """A model that was checked and can be written as a checkpoint folder. Making a draft changes nothing on disk.

    Args:
        target: The folder.
        model: The model, see :func:`save_checkpoint`.
        data_config: Preprocessing of the inputs.
        facts: Facts about the training.
        card: Text of the card.
    """

    def __init__(
        self,
        target: Path,
        model: nn.Module,
        data_config: Mapping[str, Any] | None,
        facts: Mapping[str, Any] | None,
        card: str | None = None,
    ):
        model = unwrap_model(model)
        self.target = target
        self.card = card
        self.facts = None if facts is None else check_facts(facts)
        self.data_config = None if data_config is None else dict(data_config)
        self.architecture = architecture_of(model)
        self.tensors = _tensors_to_save(model, self.architecture)
        self.skeleton = _rebuild(model, self.architecture, self.tensors)
        self.labels = self._describe_weights()
        try:
            resolve_input_data_config(self.skeleton, args=self.data_config)
        except (AttributeError, TypeError, ValueError) as error:
            raise ReparamError(f'{self.architecture}: data_config: cannot be used ({error})') from error

    def _describe_weights(self) -> list[str] | None:
        """Make the skeleton's pretrained_cfg describe these weights; return the labels of its classes if known."""
        cfg = self.skeleton.pretrained_cfg
        for key in _STALE_KEYS:
            cfg.pop(key, None)
        if self.facts is None:
            return None
        cfg['tag'] = self.facts.get('tag')
        state_license(cfg, self.facts)
        cfg.pop('label_names', None)
        cfg.pop('label_descriptions', None)
        labels = (self.facts.get('dataset') or {}).get('label_names')
        if labels and len(labels) != self.skeleton.num_classes:
            raise ReparamError(
                f'facts.dataset.label_names: expected {self.skeleton.num_classes} labels, one a class of'
                f' {self.architecture}, got {len(labels)}'
            )
        return labels

    def add_facts(self, **facts: Any) -> None:
        """Add facts to those that the draft was made with."""
        self.facts = check_facts({**(self.facts or {}), **facts})

    def write_model(self, folder: Path) -> None:
        """Write the configuration and the weights."""
        config = folder / CONFIG_NAME
        model_config = {FORMAT_KEY: FORMAT, **({'label_names': self.labels} if self.labels else {})}
        try:
            save_config_for_hf(self.skeleton, str(config), model_config=model_config, data_config=self.data_config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReparamError(f'{self.architecture}: its configuration cannot be saved ({error})') from error
        safetensors.torch.save_file(self.tensors, folder / WEIGHTS_NAME, metadata={'format': 'pt'})
        shutil.copymode(config, folder / WEIGHTS_NAME)  # safetensors makes files that only their owner may read

    def write_texts(self, folder: Path) -> None:
        """Write the facts, and the card that is rendered from the files in the folder."""
        if self.facts is not None:
            write_facts(folder, self.facts)
        write_text(folder / CARD_NAME, render_card(folder) if self.card is None else self.card)


def architecture_of(model: nn.Module) -> str:
    """Return the architecture name to save a model under.

    Raises:
        ReparamError: The model has no such name, or its norms are folded, so that its keys are not the architecture's.
    """
    model = unwrap_model(model)
    architecture = recorded_architecture(model)
    if not architecture:
        raise ReparamError(
            f'{type(model).__name__}: expected a model of timm.create_model, got one without pretrained_cfg'
        )
    if getattr(model, 'folded_norms', 0):
        raise ReparamError(
            f'{architecture}: expected the keys of the architecture, got a model with folded BatchNorms, which is for '
            'inference only; save the train-time model, or fuse it without fold_bn'
        )
    return architecture


def origin_of(model: nn.Module) -> dict[str, str | None]:
    """The facts about the method of a model and its stock architecture."""
    return {'variant': variant_of(model), 'stock_architecture': stock_architecture(unwrap_model(model))}


def _tensors_to_save(model: nn.Module, architecture: str) -> dict[str, torch.Tensor]:
    """Return the state of a model as contiguous tensors on the CPU that share no memory."""
    tensors, storages, damaged = {}, set(), []
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
            raise ReparamError(f'{architecture}: {name}: expected a dense tensor with values, got {value!r:.80}')
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # safetensors does not store shared memory
        storages.add(tensor.untyped_storage().data_ptr())
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not wide.isfinite().all():
                damaged.append(name)
        tensors[name] = tensor
    if damaged:
        more = f' and {len(damaged) - 5} more' if len(damaged) > 5 else ''
        raise ReparamError(
            f'{architecture}: NaN or infinity in {", ".join(damaged[:5])}{more}; not saved; use an earlier checkpoint'
        )
    return tensors


def _rebuild(model: nn.Module, architecture: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build the model on the meta device from the name and arguments to be saved; check that the weights fit it."""
    record_options(model)
    try:
        args = json.loads(json.dumps(get_model_args(model)))
    except (TypeError, ValueError) as error:
        raise ReparamError(f'{architecture}: its model arguments cannot be saved as json ({error})') from error
    skeleton: Any = build_on_meta(architecture, args, 'the model to be saved')
    expected = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        raise ReparamError(
            f'{architecture}: its weights do not fit the model that is built from its name and arguments;'
            f' missing: {sorted(expected.keys() - found.keys())}, unexpected: {sorted(found.keys() - expected.keys())},'
            f' of another shape: {sorted(name for name in expected.keys() & found if expected[name] != found[name])};'
            ' create it with timm.create_model under the name of the variant (register_variant adds names)'
        )
    skeleton.pretrained_cfg = copy.deepcopy({k: v for k, v in config_of(model).items() if k != 'state_dict'})
    return skeleton
