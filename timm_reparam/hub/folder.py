"""Checkpoint folders on disk: the train-time form of a model and its fused form.

A folder holds ``config.json`` and ``model.safetensors``, which timm loads as ``local-dir:FOLDER`` or from the Hub, the
card ``README.md``, and ``training.json`` with the facts about the training (see :mod:`timm_reparam.hub.facts`).

``config.json`` names its format (``reparam_format``) and every option of a variant's layers, defaults too
(``model_args.conv_options``): a checkpoint stays the function that it is when a default changes. 0.1.0 named no format,
and only the options that were given; where an option is not named, it is the default of 0.1.0.

A folder is complete or not there at all. It is written under another name beside its place (``.NAME.partial``) and
renamed; a folder that it replaces is set aside first (``.NAME.previous``) and removed when the new one is in place.
Whatever a killed process leaves of that is put right by the next save under the same name: a folder that was set aside
and has no successor comes back, unfinished ones go.
"""

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from timm.data import resolve_input_data_config
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf
from timm.utils import unwrap_model
from torch import nn

from .._files import flush
from ..errors import ReparamError
from ..fuse import fuse_model
from ..timm_model import architecture_of as recorded_architecture
from ..timm_model import record_options, stock_architecture
from ..variants import is_variant, variant_of
from ..verify import FusionReport, seeded_images, verify_fusion
from .card import render_card
from .facts import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    FILES,
    FORMAT,
    FORMAT_KEY,
    OF_ONE_FORM,
    WEIGHTS_NAME,
    check_facts,
    read_config,
    read_facts,
    sha256_of,
    state_license,
)
from .untrusted import build_on_meta, check_folder

try:
    import fcntl
except ImportError:  # only POSIX has it; elsewhere two saves into one folder at the same time are not kept apart
    fcntl = None  # type: ignore[assignment]  # a module's name cannot be declared optional

__all__ = [
    'FUSED_SUFFIX',
    'Draft',
    'add_facts',
    'architecture_of',
    'check_pair',
    'check_tag',
    'copy_checkpoints',
    'folder_name',
    'fused_path',
    'images_for',
    'load_checked',
    'load_checkpoint',
    'origin_of',
    'save_checkpoint',
    'save_pair',
    'stage',
    'train_time_path',
    'write_all',
]

FUSED_SUFFIX = '_fused'
# Names of devices, which no file on Windows can have, whatever follows behind a dot.
_RESERVED = re.compile(r'con|prn|aux|nul|(?:com|lpt)[0-9]', re.IGNORECASE)
# Parts of a pretrained_cfg that tell of the weights a training started from, not of those it made.
_STALE_KEYS = ('origin_url', 'paper_ids', 'paper_name', 'description', 'notes')


def folder_name(model_name: str, tag: str, fused: bool) -> str:
    """Return the name of a checkpoint folder, which is also its repo name on the Hub.

    Args:
        model_name: Architecture of the train-time form.
        tag: Name of the training result.
        fused: Whether it is the fused form.
    """
    return f'{model_name}.{tag}' + (FUSED_SUFFIX if fused else '')


def train_time_path(folder: str | Path) -> Path:
    """Return the folder of the train-time form of a pair, given that of either form."""
    folder = Path(folder).absolute()
    return folder.with_name(folder.name.removesuffix(FUSED_SUFFIX) or folder.name)


def fused_path(folder: Path) -> Path:
    """Return the folder of the fused form, beside that of the train-time form."""
    return folder.with_name(folder.name + FUSED_SUFFIX)


def check_tag(tag: str, model_name: str = 'model') -> str:
    """Check that both forms of a model can be stored under a tag, here and on the Hub.

    Args:
        tag: Name of the training result.
        model_name: Architecture of the train-time form; its length counts too.

    Returns:
        The tag.

    Raises:
        ReparamError: The tag makes no legal repo name.
    """
    if not isinstance(tag, str) or not re.fullmatch(r'[A-Za-z0-9._-]+', tag):
        raise ReparamError(f'tag: expected letters, digits, ".", "_" and "-", got {tag!r}; give another --tag')
    if _RESERVED.fullmatch(tag.partition('.')[0]):
        raise ReparamError(f'tag: {tag!r} is a reserved name on Windows; give another --tag')
    if tag.endswith(FUSED_SUFFIX):
        raise ReparamError(f'tag: {tag!r} ends with {FUSED_SUFFIX!r}, which marks the fused form; give another --tag')
    for fused in (False, True):
        try:
            validate_repo_id(folder_name(model_name, tag, fused))
        except HFValidationError as error:
            raise ReparamError(f'tag: {tag!r} makes no legal repo name ({error}); give another --tag') from error
    return tag


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
    architecture is replaced; anything else at that place is left alone.

    Args:
        model: A timm model, train-time or stock, that its architecture's name and its model arguments describe fully.
        folder: Where to save it; its parent has to be there.
        card: Text of the model card; rendered from the other files by default.
        data_config: Preprocessing of the inputs (input_size, mean, std, interpolation, crop_pct, ...); the model's own
            by default.
        facts: What is known of the training, stored as ``training.json``. With facts the weights count as trained:
            tag, licence and labels are then what the facts say, not what the base weights came with.

    Returns:
        The folder.

    Raises:
        ReparamError: The model cannot be rebuilt from its name and arguments, holds NaN or infinity, or the place is
            not writable or taken by something else.
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

    Both are complete on disk before either takes its name. The facts of each folder get its ``form``, ``name``,
    ``tag``, ``variant`` and ``stock_architecture``, the figures of the verification (``fusion``) and the name and hash
    of the other (``sibling``).

    Args:
        model: Train-time model.
        zoo: Folder of the pair; made if its parent is there.
        tag: Name of the training result.
        fused: Fused form of the model; fused here by default.
        report: What :func:`timm_reparam.verify_fusion` measured; measured here by default, on images of the size in
            `data_config`.
        facts: What is known of the training, see :mod:`timm_reparam.hub.facts`.
        data_config: Preprocessing of the inputs; the model's own by default.

    Returns:
        The folders of the train-time form and of the fused form.

    Raises:
        ReparamError: The fusion is not verified, or what :func:`save_checkpoint` refuses, for either form.
    """
    architecture = architecture_of(model)
    check_tag(tag, architecture)
    if variant_of(model) is None:
        raise ReparamError(f'{architecture}: expected a train-time model, got one without variant layers; convert it')
    fused = fuse_model(model) if fused is None else fused
    unfused = [name for name, module in fused.named_modules() if is_variant(module) and not _is_inference_form(module)]
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

    def add_what_only_both_know(hashes: Sequence[str]) -> None:
        for draft, sibling, sha256 in zip(drafts, reversed(drafts), reversed(hashes)):
            draft.add_facts(fusion=report.to_dict(), sibling={'name': sibling.target.name, 'sha256': sha256})

    _make_zoo(zoo)
    write_all(drafts, add_what_only_both_know)
    return drafts[0].target, drafts[1].target


def check_pair(model_name: str, zoo: str | Path, *, tag: str) -> None:
    """Check, before a training, that its result can be saved by :func:`save_pair`.

    Args:
        model_name: Architecture of the train-time form.
        zoo: Folder of the pair.
        tag: Name of the training result.

    Raises:
        ReparamError: The tag makes no legal repo name, the zoo is not writable, or another model is in the way.
    """
    check_tag(tag, model_name)
    zoo = Path(zoo).absolute()
    place = zoo if zoo.exists() else zoo.parent
    with _as_reparam_error(zoo), _locked(place):
        for fused in (False, True):
            target = zoo / folder_name(model_name, tag, fused)
            # whether the fused form keeps the variant's name depends on the method; save_pair knows
            _check_target(target, {model_name, model_name.rpartition('_')[0]} if fused else {model_name})
        with tempfile.TemporaryDirectory(dir=place, prefix='.writable-'):
            pass


def load_checkpoint(folder: str | Path) -> nn.Module:
    """Load a checkpoint folder, safetensors only.

    Args:
        folder: Folder with ``config.json`` and ``model.safetensors``.

    Returns:
        The model, in eval mode.

    Raises:
        ReparamError: The folder is no checkpoint, or its weights do not fit its architecture.
    """
    folder = Path(folder)
    check_folder(folder)
    return load_checked(folder)


def load_checked(folder: Path) -> nn.Module:
    """Load a checkpoint folder that :func:`check_folder` has passed; see :func:`load_checkpoint`."""
    try:
        model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        stored = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    except ReparamError:
        raise
    except Exception as error:  # whatever a damaged file or a wrong argument makes of it
        raise ReparamError(f'{folder}: cannot be loaded ({error})') from error
    # timm adapts a classifier or a stem to what the configuration says, and loads what fits: here everything has to
    state = model.state_dict()
    differing = sorted(
        name
        for name in state.keys() | stored.keys()
        if name not in state or name not in stored or not _is_same(stored[name].to(state[name].dtype), state[name])
    )
    if differing:
        raise ReparamError(
            f'{folder}: {differing[0]}: expected the values of {WEIGHTS_NAME}, got others ({len(differing)} tensors); '
            f'{CONFIG_NAME} makes timm change what it loads'
        )
    return model.eval()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal; NaN equals NaN."""
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())


def images_for(data_config: Mapping[str, Any] | None) -> tuple[torch.Tensor, ...] | None:
    """Images of the size that a checkpoint will name, for verification; None for the model's own."""
    size = (data_config or {}).get('input_size')
    return seeded_images(size) if size else None


def copy_checkpoints(folders: Sequence[str | Path], zoo: str | Path) -> list[Path]:
    """Copy checkpoint folders into a zoo under their own names, all of them or none.

    A folder of that name is replaced if it holds the same architecture.

    Args:
        folders: Checkpoint folders that load; what else lies in them stays behind.
        zoo: Where to copy them; made if its parent is there.

    Returns:
        The copies.

    Raises:
        ReparamError: A folder is no checkpoint, or the place is not writable or taken by something else.
    """
    zoo = Path(zoo).absolute()
    drafts = [_Copy(Path(folder), zoo / Path(folder).name) for folder in folders]
    _make_zoo(zoo)
    write_all(drafts)
    return [draft.target for draft in drafts]


def stage(source: Path, place: Path, facts: Mapping[str, Any]) -> Path:
    """Describe a checkpoint with more facts in a folder of its own: weights as a hard link, card rendered anew.

    Args:
        source: Checkpoint folder, with facts.
        place: Folder to put it into, under its own name.
        facts: Facts that are new or other than before.

    Returns:
        The new folder.

    Raises:
        ReparamError: The source is no checkpoint, or a fact has the wrong form.
    """
    folder = place / source.name
    with _as_reparam_error(place):
        folder.mkdir()
        copy = _Copy(source, folder, facts)
        copy.write_model(folder, link=True)
        copy.write_texts(folder, render=True)
    return folder


def add_facts(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Add to what is known of a saved checkpoint, for instance its licence, and render its card again.

    Of a pair both forms get the facts, but for those of one form (``form``, ``name``, ``repo``, ``sibling``). A card
    that somebody has written stays as it is. A licence is written into ``config.json``, too, where timm looks.

    Args:
        folder: Checkpoint folder.
        facts: Facts that are new or other than before, see :mod:`timm_reparam.hub.facts`.

    Returns:
        The folder.

    Raises:
        ReparamError: The folder is no checkpoint or cannot be written, or a fact has the wrong form.
    """
    folder = Path(folder).absolute()
    copies = [_Copy(folder, folder, facts)]
    other = fused_path(folder) if train_time_path(folder) == folder else train_time_path(folder)
    if ((read_facts(other) or {}).get('sibling') or {}).get('name') == folder.name:
        shared = {key: value for key, value in facts.items() if key not in OF_ONE_FORM}
        copies.append(_Copy(other, other, shared))
    write_all(copies)
    return folder


class Draft:
    """A checkpoint that is checked and ready to be written; nothing on disk has changed yet."""

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
        """Make the skeleton's pretrained_cfg that of these weights, and return the labels of its classes if known."""
        cfg = self.skeleton.pretrained_cfg
        for key in _STALE_KEYS:
            cfg.pop(key, None)
        if self.facts is None:
            return None
        cfg['tag'] = self.facts.get('tag')
        state_license({'pretrained_cfg': cfg}, self.facts)
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
        """Add facts that were not known when the draft was made."""
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
        """Write the facts and the card, which is rendered from what lies in the folder."""
        if self.facts is not None:
            _write_facts(folder, self.facts)
        _write_text(folder / CARD_NAME, render_card(folder) if self.card is None else self.card)


class _Copy:
    """A checkpoint folder that is ready to be copied, with more facts if there are any."""

    def __init__(self, source: Path, target: Path, facts: Mapping[str, Any] | None = None):
        self.source, self.target = source, target
        self.facts = None if facts is None else check_facts(facts)

    @property
    def architecture(self) -> str:
        """What the source holds; read when it is asked for, with the lock held, for the source may be the target."""
        return read_config(self.source)['architecture']

    def write_model(self, folder: Path, link: bool = False) -> None:
        """Copy the configuration, and copy the weights or link to them."""
        shutil.copyfile(self.source / CONFIG_NAME, folder / CONFIG_NAME)
        place = _link_or_copy if link else shutil.copyfile
        place(self.source / WEIGHTS_NAME, folder / WEIGHTS_NAME)
        if self.facts is not None and {'license', 'base_model'} & self.facts.keys():
            config = read_config(folder)
            state_license(config, {**(read_facts(self.source) or {}), **self.facts})
            _write_text(folder / CONFIG_NAME, json.dumps(config, indent=2))

    def write_texts(self, folder: Path, render: bool = False) -> None:
        """Copy facts and card, if they are there; with more facts the card is rendered if asked for, or if it was."""
        for name in (FACTS_NAME, CARD_NAME):
            if (self.source / name).is_file():
                shutil.copyfile(self.source / name, folder / name)
        if self.facts is not None:
            card = folder / CARD_NAME
            renders = render or not card.is_file() or card.read_bytes() == render_card(folder).encode()
            _write_facts(folder, {**(read_facts(folder) or {}), **self.facts})
            if renders:
                _write_text(card, render_card(folder))


def _link_or_copy(source: Path, target: Path) -> None:
    """Hard-link a file. A save replaces files and never writes into one, so the link keeps its contents."""
    try:
        os.link(source, target)
    except OSError:  # on another disk, for instance
        shutil.copyfile(source, target)


def architecture_of(model: nn.Module) -> str:
    """The name a model is saved under; ReparamError if it has none, or is not what the name stands for."""
    model = unwrap_model(model)
    architecture = recorded_architecture(model)
    if not architecture:
        raise ReparamError(
            f'{type(model).__name__}: expected a model of timm.create_model, got one without pretrained_cfg'
        )
    if getattr(model, 'folded_norms', 0):
        raise ReparamError(
            f'{architecture}: expected the keys of the architecture, got a model whose BatchNorms are folded, which is '
            'for inference only; save the train-time model, or what fuse_model makes of it without fold_bn'
        )
    return architecture


def origin_of(model: nn.Module) -> dict[str, str | None]:
    """The facts that tell which method a model has, and of which stock architecture it is."""
    return {'variant': variant_of(model), 'stock_architecture': stock_architecture(unwrap_model(model))}


def _is_inference_form(module: nn.Module) -> bool:
    return is_variant(module) and module.is_for_inference(module.options())


def _tensors_to_save(model: nn.Module, architecture: str) -> dict[str, torch.Tensor]:
    """Return the state of a model as tensors on the CPU that are contiguous and share no memory."""
    tensors, storages, damaged = {}, set(), []
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
            raise ReparamError(f'{architecture}: {name}: expected a dense tensor with values, got {value!r:.80}')
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a file holds each name by itself
        storages.add(tensor.untyped_storage().data_ptr())
        if tensor.is_floating_point() or tensor.is_complex():
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not wide.isfinite().all():
                damaged.append(name)
        tensors[name] = tensor
    if damaged:
        more = f' and {len(damaged) - 5} more' if len(damaged) > 5 else ''
        raise ReparamError(
            f'{architecture}: NaN or infinity in {", ".join(damaged[:5])}{more}; not saved, use an earlier checkpoint'
        )
    return tensors


def _rebuild(model: nn.Module, architecture: str, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Build the model that the saved name and arguments stand for, without memory; check that the weights fit it."""
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
            f'{architecture}: its weights do not fit the model that its name and arguments stand for;'
            f' missing: {sorted(expected.keys() - found.keys())}, unexpected: {sorted(found.keys() - expected.keys())},'
            f' of another shape: {sorted(name for name in expected.keys() & found if expected[name] != found[name])};'
            ' create it with timm.create_model under the name of the variant (register_variant adds names)'
        )
    cfg: Any = model.pretrained_cfg
    skeleton.pretrained_cfg = copy.deepcopy({k: v for k, v in cfg.items() if k != 'state_dict'})
    return skeleton


def _partial(target: Path) -> Path:
    return target.with_name(f'.{target.name}.partial')


def _previous(target: Path) -> Path:
    return target.with_name(f'.{target.name}.previous')


def _check_target(target: Path, architectures: Collection[str]) -> None:
    """Raise ReparamError unless the place is free or taken by a checkpoint of one of the architectures.

    Called with the parent locked: another save may be exchanging the folder.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ReparamError(f'{target}: expected a folder or a free place, got a file or a link; choose another place')
    names = sorted(entry.name for entry in target.iterdir()) if target.exists() else []
    if not names:
        return
    foreign = [name for name in names if name not in FILES]
    if foreign:
        raise ReparamError(f'{target}: contains unexpected files, {foreign[:5]}; choose another place')
    found = read_config(target)['architecture']
    if found not in architectures:
        raise ReparamError(
            f'{target}: expected a free place or a checkpoint of {" or ".join(sorted(architectures))}, got one of'
            f' {found}; choose another place'
        )


def write_all(drafts: Sequence[Draft | _Copy], complete: Callable[[Sequence[str]], None] | None = None) -> None:
    """Write folders that lie beside each other: all of them under another name, then rename one after the other.

    Args:
        drafts: What to write.
        complete: Called with the hashes of the weights once all of them are written, to complete the facts.
    """
    target = drafts[0].target
    if not target.parent.is_dir():
        raise ReparamError(f'{target}: its parent is not a folder; make it first, or choose another place')
    with _as_reparam_error(target.parent), _locked(target.parent):
        for draft in drafts:
            _bring_back(draft.target)
        for draft in drafts:
            _check_target(draft.target, {draft.architecture})
        for draft in drafts:
            _remove_leftovers(draft.target)
        try:
            for draft in drafts:
                _partial(draft.target).mkdir()
                draft.write_model(_partial(draft.target))
            if complete is not None:
                complete([sha256_of(_partial(draft.target) / WEIGHTS_NAME) for draft in drafts])
            for draft in drafts:
                draft.write_texts(_partial(draft.target))
                flush(*_partial(draft.target).iterdir(), _partial(draft.target))
            _swap_in([draft.target for draft in drafts])
        finally:
            for draft in drafts:
                shutil.rmtree(_partial(draft.target), ignore_errors=True)


def _bring_back(target: Path) -> None:
    """Rename a folder that a killed process had set aside back to its name, if the name is free."""
    if _previous(target).exists() and not target.exists():
        _previous(target).rename(target)


def _remove_leftovers(target: Path) -> None:
    """Remove the leftovers of a killed process."""
    for leftover in (_partial(target), _previous(target)):
        if leftover.exists():
            shutil.rmtree(leftover)


def _swap_in(targets: Sequence[Path]) -> None:
    """Rename finished folders to their names; what they replace is set aside first, and removed in the end."""
    try:
        for target in targets:
            if target.exists():
                target.rename(_previous(target))
        for target in targets:
            _partial(target).rename(target)
    except BaseException:
        for target in targets:
            if target.exists() and not _partial(target).exists():
                shutil.rmtree(target)
            _bring_back(target)
        raise
    flush(targets[0].parent)
    for target in targets:
        shutil.rmtree(_previous(target), ignore_errors=True)


def _write_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    _write_text(folder / FACTS_NAME, json.dumps(facts, indent=2) + '\n')


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding='utf-8', newline='\n')


def _make_zoo(zoo: Path) -> None:
    """Make the folder of a pair if its parent is there."""
    with _as_reparam_error(zoo):
        zoo.mkdir(exist_ok=True)


@contextmanager
def _as_reparam_error(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise ReparamError(f'{place}: cannot be written ({error}); nothing was changed') from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder against a second save; the lock is released when its process ends."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
