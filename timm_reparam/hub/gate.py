"""Verify a pair of checkpoint folders, with the cheap checks first.

It runs before a pair is published, after it was fetched back, before a pulled pair is put in place, and in `verify`.
"""

import copy
import itertools
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
import yaml  # comes with huggingface_hub
from torch import nn

from ..errors import ReparamError
from ..variants import VARIANTS
from ..verify import FusionReport, verify_fusion
from .card import card_text, notes_of
from .client import one_line
from .facts import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    FORMAT_KEY,
    FORMS,
    OF_ONE_FORM,
    WEIGHTS_NAME,
    read_config,
    read_facts,
    sha256_of,
    stated_license,
)
from .load import load_checked
from .names import fused_path, train_time_path
from .untrusted import check_folder

__all__ = [
    'CHECK_NAME',
    'VerifyReport',
    'check_agreement',
    'check_card',
    'check_self_check',
    'front_matter',
    'one_at_a_time',
    'self_check',
    'verify_checkpoint',
    'verify_pair',
]

CHECK_NAME = 'test/rand_tensors.safetensors'
# the tolerance of timm's own tests of such files
_TOLERANCE: dict[str, Any] = dict(rtol=1e-3, atol=1e-4)
# Models run one at a time, because verifying a fusion changes settings of the whole process.
one_at_a_time = threading.RLock()
# Facts that are not compared as a whole between the two forms.
_NOT_SHARED = (*OF_ONE_FORM, 'metrics', 'profile', 'fusion', 'logit_difference')
# Entries of a card's front matter that state facts.
_FACTS = ('base_model', 'base_model_relation', 'license', 'license_name', 'license_link', 'datasets', 'model-index')
_LONGEST_FRONT_MATTER = 2**16
# Half-precision types in the header of a safetensors file.
_DTYPES = {'BF16': torch.bfloat16, 'F16': torch.float16}


@dataclass
class VerifyReport:
    """The report of a verification of a pair.

    Attributes:
        target: The folder or repo that was verified.
        fusion: The report on the fusion, on fresh inputs; None if it could not be run.
        problems: The problems, one line each.
        checks: The checks by name, and whether each passed.
        warnings: Differences that are not errors, such as a card that was edited by hand.
    """

    target: str
    fusion: FusionReport | None = None
    problems: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether no problem was found."""
        return not self.problems and self.fusion is not None and self.fusion.passed

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for json."""
        fusion = None if self.fusion is None else self.fusion.to_dict()
        return dict(vars(self), passed=self.passed, fusion=fusion)

    def __str__(self) -> str:
        lines = [f'{self.target}: {"verified" if self.passed else "NOT verified"}']
        lines += [f'  {name}: {"ok" if passed else "FAILED"}' for name, passed in self.checks.items()]
        lines += [f'  {problem}' for problem in self.problems]
        lines += [f'  warning: {warning}' for warning in self.warnings]
        return '\n'.join(lines + ([str(self.fusion)] if self.fusion is not None else []))

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Record whether a check passed, and the problem if it raised."""
        try:
            yield
        except Exception as error:  # untrusted files may raise anything
            self.checks[name] = False
            kind = '' if isinstance(error, ReparamError) else f'{name}: cannot be read: {type(error).__name__}: '
            self.problems.append(f'{kind}{one_line(error)[:2000]}')
        else:
            self.checks[name] = True

    def raise_for_problems(self) -> None:
        """Raise ReparamError with the first problem, if any."""
        if not self.passed:
            raise ReparamError(self.problems[0])


def verify_pair(folder: str | Path, fused_folder: str | Path | None = None) -> VerifyReport:
    """Verify that two folders are the two forms of one model, and that their files agree.

    For each form, the configuration is compared with the header of the weights (names, shapes, number of classes, cost
    of a forward pass), and the front matter of the card with the other files. For the pair, the configurations and the
    facts are compared, and the hashes that each form records of the other. The models are built only if both
    configurations pass and the files are from one save. Then the fusion is verified, and the self-check tensors are
    compared if there are any.

    Args:
        folder: Folder of the train-time form; of either form if no other folder is given.
        fused_folder: Folder of the fused form; by default the one beside it whose name ends with ``_fused``.

    Returns:
        The report; its `passed` says whether everything is right.
    """
    report = VerifyReport(str(folder))
    if fused_folder is None:
        folder = train_time_path(folder)
        fused_folder = fused_path(folder)
    folders = Path(folder).absolute(), Path(fused_folder).absolute()
    for one in folders:
        with report.check(f'{one.name}: configuration'):
            check_folder(one)
            read_facts(one)
    if report.problems:
        return report
    with report.check(f'{folders[0].name}: configurations'):
        check_agreement(*folders)
    hashes = [sha256_of(one / WEIGHTS_NAME) for one in folders]
    for one, sha256 in zip(folders, hashes):
        with report.check(f'{one.name}: card'):
            report.warnings += check_card(one, sha256)
    with report.check(f'{folders[0].name}: one save'):
        for one, other, found in zip(folders, reversed(folders), reversed(hashes)):
            _check_sibling(one, other, found)
    if not report.checks[f'{folders[0].name}: one save']:
        return report
    with report.check(f'{folders[0].name}: fusion'), one_at_a_time:
        models = [load_checked(one) for one in folders]
        for one, model in zip(folders, models):
            if (one / CHECK_NAME).is_file():
                with report.check(f'{one.name}: self-check tensors'):
                    check_self_check(model, (one / CHECK_NAME).read_bytes())
        # timm loads weights as float32, but rounding is verified in the dtype that they were fused in
        report.fusion = verify_fusion(*(_as_stored(model, one) for model, one in zip(models, folders)))
        if not report.fusion.passed:
            raise ReparamError(f'the fused model differs from the train-time model: {report.fusion}')
        num_layers = len(report.fusion.layers)
        for one in folders:
            stated = ((read_facts(one) or {}).get('fusion') or {}).get('num_layers')
            if stated not in (None, 0, num_layers):  # older versions recorded 0
                raise ReparamError(
                    f'{one.name}/{FACTS_NAME}: fusion.num_layers: expected {num_layers}, got {stated}; save it again'
                )
    return report


def verify_checkpoint(folder: str | Path, fused_folder: str | Path | None = None) -> FusionReport:
    """Verify that two folders are the two forms of one model; see :func:`verify_pair`.

    Args:
        folder: Train-time checkpoint, or the fused one if its name ends with ``_fused`` and no other folder is given.
        fused_folder: Fused checkpoint; by default the folder beside it whose name ends with ``_fused``.

    Returns:
        The report on the fusion, on fresh inputs.

    Raises:
        ReparamError: A folder cannot be loaded, or a check other than that of the fusion failed.
    """
    report = verify_pair(folder, fused_folder)
    # a failed fusion is one of the problems, and its own report describes it
    if report.fusion is None or len(report.problems) > (not report.fusion.passed):
        raise ReparamError(report.problems[0])
    return report.fusion


def _as_stored(model: nn.Module, folder: Path) -> nn.Module:
    """A model in the dtype of its file, if that is half precision."""
    with safetensors.safe_open(folder / WEIGHTS_NAME, 'pt') as file:
        kinds = {kind for name in file.keys() if 'F' in (kind := file.get_slice(name).get_dtype())}
    return model.to(_DTYPES[kinds.pop()]) if len(kinds) == 1 and kinds <= _DTYPES.keys() else model


def _check_sibling(folder: Path, other: Path, found: str) -> None:
    """Raise ReparamError unless the hash of the other form's weights is the one that a form records."""
    recorded = ((read_facts(folder) or {}).get('sibling') or {}).get('sha256')
    if recorded not in (None, found):
        raise ReparamError(
            f'{other.name}/{WEIGHTS_NAME}: expected the sha256 that {folder.name}/{FACTS_NAME} records, {recorded}, '
            f'got {found}: the two forms are not from one save; fuse the train-time form again, or publish the pair '
            'again'
        )


def check_card(folder: Path, sha256: str) -> list[str]:
    """Compare the front matter of a card with the other files of its folder.

    Args:
        folder: Checkpoint folder.
        sha256: Hash of its weights.

    Returns:
        Warnings: the card is missing, has notes, or has another text than the templates give.

    Raises:
        ReparamError: The card cannot be read, or its front matter differs from the other files.
    """
    path, place = folder / CARD_NAME, f'{folder.name}/{CARD_NAME}'
    if not path.is_file():
        return [f'{place}: is missing']
    try:
        text = path.read_text(encoding='utf-8')
    except (OSError, ValueError) as error:
        raise ReparamError(f'{place}: cannot be read ({one_line(error)[:200]})') from error
    notes = notes_of(path)
    rendered = card_text(read_config(folder), read_facts(folder) or {}, sha256, notes)
    claimed, expected = front_matter(text, place), front_matter(rendered, place)
    for key in _FACTS:
        if claimed.get(key) != expected.get(key):
            raise ReparamError(
                f'{place}: {key}: expected {expected.get(key)!r:.200}, got {claimed.get(key)!r:.200}; render it again'
            )
    if text != rendered:
        return [f'{place}: differs from what the installed templates render; its text was not compared']
    return [f'{place}: has notes, which were not compared'] if notes else []


def front_matter(card: str, place: str) -> dict[str, Any]:
    """Read the front matter of a card, the yaml between two lines of three dashes.

    Args:
        card: Text of the card.
        place: Origin of the card, for error messages.

    Raises:
        ReparamError: The front matter is missing, is not a mapping, or has aliases, which may expand to any size.
    """
    found = re.match(r'\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)', card, re.DOTALL)
    if not found or len(found[1]) > _LONGEST_FRONT_MATTER:
        raise ReparamError(f'{place}: expected front matter of at most {_LONGEST_FRONT_MATTER} characters')
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(found[1], Loader=yaml.SafeLoader)):
            raise ReparamError(f'{place}: expected front matter without aliases')
        entries = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ReparamError(f'{place}: its front matter cannot be read ({one_line(error)[:200]})') from error
    if not isinstance(entries, dict):
        raise ReparamError(f'{place}: expected front matter with entries, got {type(entries).__name__}')
    return entries


def check_agreement(folder: Path, fused: Path) -> None:
    """Check that the configurations and the facts of two forms agree.

    Args:
        folder: Train-time checkpoint.
        fused: Fused checkpoint.

    Raises:
        ReparamError: They differ; the message names every difference.
    """
    configs = [read_config(one) for one in (folder, fused)]
    facts = [read_facts(one) or {} for one in (folder, fused)]
    stock, _, variant = configs[0]['architecture'].rpartition('_')
    if variant not in VARIANTS:
        raise ReparamError(
            f'{folder.name}/{CONFIG_NAME}: architecture: expected that of a variant, got {configs[0]["architecture"]}'
        )
    layer = VARIANTS[variant].layer
    is_dynamic = layer.input_dependent
    differences: list[str] = []

    def compare(place: str, expected: Any, found: Any) -> None:
        if expected != found:
            differences.append(f'{place}: expected {expected!r:.200}, got {found!r:.200}')

    def compare_entries(place: str, left_out: Collection[str], expected: Any, found: Any) -> None:
        for key in sorted((expected.keys() | found.keys()) - set(left_out)):
            compare(f'{place}{key}', expected.get(key), found.get(key))

    place = f'{fused.name}/{CONFIG_NAME}: '
    compare_entries(place, (FORMAT_KEY, 'architecture', 'model_args', 'pretrained_cfg'), *configs)
    compare_entries(f'{place}pretrained_cfg.', ('architecture',), *(config['pretrained_cfg'] for config in configs))
    compare_entries(f'{place}model_args.', ('conv_options',), *(config['model_args'] for config in configs))
    compare(f'{place}architecture', configs[0]['architecture'] if is_dynamic else stock, configs[1]['architecture'])
    if layer.is_for_inference(configs[0]['model_args'].get('conv_options', {})):
        differences.append(f'{folder.name}/{CONFIG_NAME}: expected the train-time form, got the form for inference')
    for one, form, config, known, other in zip((folder, fused), FORMS, configs, facts, reversed(facts)):
        place = f'{one.name}/{FACTS_NAME}: '
        for key, expected in (('variant', variant), ('stock_architecture', stock), ('form', form)):
            compare(f'{place}{key}', expected, known.get(key, expected))
        sibling, fusion = known.get('sibling') or {}, known.get('fusion') or {}
        if 'name' in sibling and 'name' in other:
            compare(f'{place}sibling.name', other['name'], sibling['name'])
        if not fusion.get('passed', True) or fusion.get('problems') or fusion.get('layers_off'):
            differences.append(f'{place}fusion: expected a report that passed, got one with problems')
        if known:
            license = config['pretrained_cfg'].get('license')
            compare(f'{one.name}/{CONFIG_NAME}: pretrained_cfg.license', stated_license(known), license)
    if all(facts):
        place = f'{fused.name}/{FACTS_NAME}: '
        for key in sorted((facts[0].keys() & facts[1].keys()) - set(_NOT_SHARED)):
            compare(f'{place}{key}', facts[0][key], facts[1][key])
        for key, form in itertools.product(('metrics', 'profile'), FORMS):
            stated = [(known.get(key) or {}).get(form) for known in facts]
            if None not in stated:
                compare(f'{place}{key}.{form}', *stated)
    if differences:
        raise ReparamError(
            f'{"; ".join(differences)} (expected values are those of {folder.name}); save the pair again'
        )


def self_check(model: nn.Module, sha256: str) -> bytes:
    """Return the self-check file of a checkpoint: an image and the outputs of the model, as in timm's own repos.

    The outputs are computed in float64 and rounded, so that the bytes do not depend on the machine.

    Args:
        model: The model.
        sha256: Hash of its weights, which seeds the image.

    Returns:
        A safetensors file of `input`, `features`, `pre_logits` and `output`.

    Raises:
        ReparamError: The model does not run on images of its input size.
    """
    generator = torch.Generator().manual_seed(int(sha256[:12], 16))
    size = timm.data.resolve_data_config(model=model)['input_size']
    image = torch.randn(1, *size, generator=generator)
    tensors = {'input': image, **_outputs(copy.deepcopy(model).double(), image.double())}
    contiguous = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={'weights_sha256': sha256})


def check_self_check(model: nn.Module, content: bytes) -> None:
    """Run a model on the image of a self-check file and compare the outputs.

    Args:
        model: The model.
        content: Content of the file.

    Raises:
        ReparamError: The file cannot be read, or its outputs differ from those of the model.
    """
    remedy = 'delete this file on the Hub, then publish the pair again'  # a pair without changes is not sent again
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise ReparamError(f'{CHECK_NAME}: cannot be read ({one_line(error)}); {remedy}') from error
    lacking = sorted({'input', 'output', 'features', 'pre_logits'} - tensors.keys())
    size = tuple(timm.data.resolve_data_config(model=model)['input_size'])
    image = tensors.get('input')
    if lacking or image is None or tuple(image.shape[1:]) != size or not 1 <= len(image) <= 4:
        raise ReparamError(f'{CHECK_NAME}: expected an input of {size} with its outputs; missing: {lacking}; {remedy}')
    dtype = next(model.parameters()).dtype
    for name, found in _outputs(model, image.to(dtype)).items():
        expected = tensors[name]
        if found.shape != expected.shape:
            raise ReparamError(
                f'{CHECK_NAME}: {name}: expected shape {list(found.shape)}, got {list(expected.shape)}; {remedy}'
            )
        if not torch.allclose(found.float(), expected.float(), **_TOLERANCE):
            difference = float((found.float() - expected.float()).abs().max())
            raise ReparamError(f'{CHECK_NAME}: {name}: differs from that of the model by {difference:.3g}; {remedy}')


@torch.no_grad()
def _outputs(model: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    model.eval()
    try:
        with torch.autocast('cpu', enabled=False):
            features = model.forward_features(image)
            return {
                'features': features,
                'pre_logits': model.forward_head(features, pre_logits=True),
                'output': model(image),
            }
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ReparamError(f'self-check: the model does not run on {list(image.shape)} ({one_line(error)})') from error
