"""Model cards, rendered from the facts in a checkpoint folder and from nothing else.

A card is a pure function of three files of the folder: ``config.json``, ``training.json`` (if there is one) and
``model.safetensors`` (its hash), so rendering again gives the same bytes. What ``training.json`` may say about a
checkpoint is checked by :func:`check_facts`; what it does not say is not in the card. Keys that cards use:

- ``form``: 'train_time' or 'fused'; ``name``: name of the folder; ``tag``; ``variant``; ``stock_architecture``;
- ``repo``: where the folder is published, 'owner/name', as publishing writes it into the published files; without it a
  card tells how to load from a local folder;
- ``base_model``: where the weights started, dict(id=Hub repo, revision=commit or None, license=...), or None when the
  training started from random weights;
- ``license``, ``license_name``, ``license_link``: licence of the weights, where it is not that of the base model
  (see :func:`license_of`);
- ``dataset``: dict(name=..., id=Hub dataset, split=..., train_images=..., validation_images=..., label_names=[...]);
- ``metrics``: by form, for instance dict(train_time=dict(top1=97.5), fused=dict(top1=97.5)), accuracies in percent;
- ``logit_difference``: largest absolute difference between the logits of the two forms;
- ``profile``: by form, as :meth:`timm_reparam.profile.Profile.to_dict` gives it;
- ``fusion``: what verifying the fusion measured, as :meth:`timm_reparam.FusionReport.to_dict` gives it;
- ``sibling``: the other form, dict(name=..., repo=where it is published, by default beside this one, sha256=hash of
  its model.safetensors);
- ``results``: how the method compares with stock over several seeds, entries of :class:`timm_reparam.results.Summary`
  as their ``to_dict`` gives them;
- ``recipe``: settings of the training run; ``environment``: versions it ran with.
"""

import hashlib
import importlib.resources
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..convert import VARIANTS
from ..errors import ReparamError
from ..layers.base import Method
from ..models._registry import is_registered_on_import
from ..results import Summary, format_summary

__all__ = [
    'bibtex',
    'card_text',
    'check_facts',
    'is_size',
    'license_data',
    'license_of',
    'notes_of',
    'read_config',
    'read_facts',
    'render_card',
    'sha256_of',
    'stated_license',
    'template_folder',
]

CONFIG_NAME = 'config.json'
FACTS_NAME = 'training.json'
WEIGHTS_NAME = 'model.safetensors'
CARD_NAME = 'README.md'
# The entry of config.json that says in which format it is, and the newest format, which is the one that is written. In
# format 1, that of 0.1.0, there was no such entry, and the options of the layers were named only where they were given.
FORMAT_KEY = 'reparam_format'
FORMAT = 2
FORMS = ('train_time', 'fused')

_FORM_LABELS = {'train_time': 'Train-time form', 'fused': 'Fused form'}
_IMAGE_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's names, by the number of channels
_METRIC_LABELS = {'top1': 'Top-1 accuracy (%)', 'top5': 'Top-5 accuracy (%)', 'loss': 'Loss'}

# The Hub's licence identifiers (https://huggingface.co/docs/hub/repositories-licenses). One that is missing here does
# no harm: it is then written as 'other' with its name.
_LICENSES = frozenset(
    'afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0'
    ' bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5'
    ' cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0'
    ' cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0'
    ' cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl'
    ' gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by'
    ' ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unlicense wtfpl zlib'.split()
)


def render_card(folder: str | Path) -> str:
    """Render the card of a checkpoint folder.

    Args:
        folder: Folder with ``config.json``, ``model.safetensors`` and, if the training is known, ``training.json``.

    Returns:
        The text of ``README.md``; the same bytes every time for the same files.

    Raises:
        ReparamError: A file is missing, or says something that has the wrong form.
    """
    folder = Path(folder)
    return card_text(
        read_config(folder), read_facts(folder) or {}, sha256_of(folder / WEIGHTS_NAME), notes_of(folder / CARD_NAME)
    )


def notes_of(path: Path) -> str:
    """The marked section of a card that holds somebody's own notes, with its marks; empty if there is none.

    It begins with the line ``<!-- notes -->`` and ends with the line ``<!-- end of notes -->``.
    """
    try:
        text = path.read_bytes().decode('utf-8')
    except (OSError, ValueError):
        return ''
    found = re.search(r'^<!-- notes -->\r?\n.*?^<!-- end of notes -->$', text, re.DOTALL | re.MULTILINE)
    return found[0] if found else ''


def card_text(config: dict[str, Any], facts: dict[str, Any], sha256: str, notes: str = '') -> str:
    """Render a card from what lies in a checkpoint folder.

    Args:
        config: Content of ``config.json``, see :func:`read_config`.
        facts: Content of ``training.json``, see :func:`read_facts`; empty if there is none.
        sha256: Hash of ``model.safetensors``.
        notes: Section of notes, see :func:`notes_of`, kept as it is.

    Returns:
        The text of ``README.md``.
    """
    context = _Context(config, facts, sha256)
    templates = template_folder()
    template = ''.join((templates / name).read_text(encoding='utf-8') for name in (f'{context.form}.md', 'details.md'))
    card = ModelCard.from_template(context.card_data(), template_str=template, **context.texts())
    return str(card).rstrip() + '\n' + (f'\n{notes}\n' if notes else '')


def license_of(folder: str | Path) -> str | None:
    """Return the licence under which the weights of a checkpoint folder may be passed on, as far as it is known.

    That is what the facts state, or else the licence of the base weights. Without facts nothing is known, and weights
    that were trained from scratch have no licence until somebody states one.

    Args:
        folder: Checkpoint folder.

    Returns:
        The licence as the card's front matter has it, one of the Hub's identifiers ('other' for a licence that the Hub
        has none for), or None: a licence has to be stated before the folder is published.

    Raises:
        ReparamError: A file of the folder says something that has the wrong form.
    """
    return license_data(read_facts(folder) or {}).get('license')


def stated_license(facts: Mapping[str, Any]) -> str | None:
    """Return the licence in its own words: what the facts state, or else that of the base weights; None if neither."""
    return facts.get('license') or (facts.get('base_model') or {}).get('license')


def license_data(facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the licence as front matter: 'other' with its name if the Hub has no identifier for it.

    Args:
        facts: What is known of a checkpoint, see the head of this module.

    Returns:
        Entries of the front matter; empty if no licence is known.
    """
    base = facts.get('base_model') or {}
    name = _plain(stated_license(facts) or '').lower()
    stated = bool(facts.get('license'))
    link = _plain(facts['license_link']) if stated and facts.get('license_link') else None
    if name in _LICENSES - {'other'}:
        return {'license': name}
    if name == 'other':
        name = _plain((facts.get('license_name') if stated else None) or '').lower()
    name = re.sub(r'[^a-z0-9.]+', '-', name).strip('-.')
    if not name or name in ('unknown', 'none', 'other'):
        return {}
    data = {'license': 'other', 'license_name': name}
    if link is None and not stated and _is_published_id(base.get('id')):
        link = f'https://huggingface.co/{base["id"]}'
    if link is not None and re.fullmatch(r'https://[A-Za-z0-9][A-Za-z0-9._~/?#=&%+-]*|LICEN[CS]E[A-Za-z0-9._-]*', link):
        data['license_link'] = link
    return data


def template_folder() -> Path:
    """Return the folder of the card templates, of an installed package or of a checkout.

    Raises:
        ReparamError: There are no templates in either place.
    """
    package = Path(str(importlib.resources.files('timm_reparam')))
    for folder in (package / 'model_cards', package.parent / 'model_cards'):
        if all((folder / f'{form}.md').is_file() for form in FORMS):
            return folder
    raise ReparamError(
        f'{package}: expected model_cards/ inside the package or beside it, found none; install it again'
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        The configuration; ``architecture`` is a text and ``model_args`` and ``pretrained_cfg`` are dicts.

    Raises:
        ReparamError: There is no such file, it does not describe a timm model, or it is in a format that this version
            does not know.
    """
    path = Path(folder) / CONFIG_NAME
    config = _read_json(path)
    if config is None:
        raise ReparamError(f'{path}: not found; expected a checkpoint folder with {CONFIG_NAME} and {WEIGHTS_NAME}')
    config.setdefault('model_args', {})
    config.setdefault('pretrained_cfg', {})
    for key, kind in (('architecture', str), ('model_args', dict), ('pretrained_cfg', dict)):
        _expect(config, key, kind, str(path), required=True)
    version = config.get(FORMAT_KEY, 1)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ReparamError(
            f'{path}.{FORMAT_KEY}: expected a positive integer, got {version!r}; save or fetch the checkpoint again'
        )
    if version > FORMAT:
        raise ReparamError(
            f'{path}.{FORMAT_KEY}: expected at most {FORMAT}, got {version}, of a newer version; upgrade timm-reparam'
        )
    return config


def read_facts(folder: str | Path) -> dict[str, Any] | None:
    """Read ``training.json`` of a checkpoint folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        The facts, or None if the folder has no such file.

    Raises:
        ReparamError: The file is not json or says something that has the wrong form.
    """
    path = Path(folder) / FACTS_NAME
    facts = _read_json(path)
    return facts if facts is None else check_facts(facts, str(path))


def check_facts(facts: Mapping[str, Any], place: str = 'facts') -> dict[str, Any]:
    """Check that the facts about a checkpoint have the form that cards rely on.

    Args:
        facts: What is known of a checkpoint, see the head of this module. Other keys are kept as they are.
        place: Where they come from, for the message.

    Returns:
        The same facts as plain json values.

    Raises:
        ReparamError: A value is of the wrong type or cannot be written as json; the message names its key.
    """
    if not isinstance(facts, Mapping):
        raise ReparamError(f'{place}: expected a dict, got {type(facts).__name__}')
    plain: dict[str, Any] = {}
    for key, value in facts.items():
        try:
            plain[key] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ReparamError(f'{place}.{key}: expected finite json values, got {value!r} ({error})') from error
    for key in ('name', 'tag', 'variant', 'stock_architecture', 'repo', 'license', 'license_name', 'license_link'):
        _expect(plain, key, str, place)
    for key in ('base_model', 'dataset', 'metrics', 'profile', 'fusion', 'sibling', 'recipe', 'environment'):
        _expect(plain, key, dict, place)
    _expect(plain, 'logit_difference', float, place)
    if plain.get('form', FORMS[0]) not in FORMS:
        raise ReparamError(f'{place}.form: expected one of {FORMS}, got {plain["form"]!r}')
    for outer, keys, kind in (
        ('base_model', ('id', 'revision', 'license'), str),
        ('dataset', ('name', 'id', 'split'), str),
        ('dataset', ('train_images', 'validation_images'), int),
        ('dataset', ('label_names',), list),
        ('metrics', FORMS, dict),
        ('profile', FORMS, dict),
        ('sibling', ('name', 'repo', 'sha256'), str),
        ('fusion', ('algebra', 'algebra_bound', 'stored', 'own', 'bound', 'top1_agreement'), float),
        ('fusion', ('num_inputs', 'num_layers'), int),
        ('fusion', ('layers_without_input', 'layers_off', 'problems'), list),
        ('fusion', ('worst_layer',), dict),
    ):
        for key in keys:
            _expect(plain.get(outer) or {}, key, kind, f'{place}.{outer}')
    _expect(plain, 'results', list, place)
    for index, entry in enumerate(plain.get('results') or ()):
        Summary.from_dict(entry, f'{place}.results[{index}]')
    for name, value in (plain.get('environment') or {}).items():
        _expect({name: value}, name, str, f'{place}.environment')
    _expect_texts(plain.get('dataset') or {}, 'label_names', f'{place}.dataset')
    _check_layers(plain.get('fusion') or {}, f'{place}.fusion')
    for form in FORMS:
        for name, value in ((plain.get('metrics') or {}).get(form) or {}).items():
            _expect({name: value}, name, float, f'{place}.metrics.{form}')
        profile = (plain.get('profile') or {}).get(form) or {}
        for name in ('parameters', 'trainable_parameters', 'macs', 'batch_size', 'runs'):
            _expect(profile, name, int, f'{place}.profile.{form}', required=name in profile)
        for name in ('latency_ms', 'latency_spread_ms'):
            _expect(profile, name, float, f'{place}.profile.{form}')
    return plain


def _check_layers(fusion: Mapping[str, Any], place: str) -> None:
    """Check what the facts of a fusion say of its layers."""
    for key in ('layers_without_input', 'problems'):
        _expect_texts(fusion, key, place)
    layers = {f'layers_off[{index}]': layer for index, layer in enumerate(fusion.get('layers_off') or ())}
    if fusion.get('worst_layer') is not None:
        layers['worst_layer'] = fusion['worst_layer']
    for where, layer in layers.items():
        if not isinstance(layer, dict):
            raise ReparamError(f'{place}.{where}: expected dict, got {layer!r}')
        inside = f'{place}.{where}'
        _expect(layer, 'name', str, inside)
        for key in ('kernel', 'algebra', 'stored', 'own', 'bound'):
            _expect(layer, key, float, inside)
        _expect(layer, 'num_inputs', int, inside)
        _expect(layer, 'problems', list, inside)
        _expect_texts(layer, 'problems', inside)


def sha256_of(path: str | Path) -> str:
    """Return the sha256 of a file in hexadecimal digits.

    Raises:
        ReparamError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, 'rb') as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ReparamError(
            f'{path}: cannot be read ({error.strerror}); expected the weights of a checkpoint'
        ) from error
    return digest.hexdigest()


class _Context:
    """The facts of one folder, turned into front matter and into texts that are safe to put into Markdown."""

    def __init__(self, config: dict[str, Any], facts: dict[str, Any], sha256: str):
        self.config, self.facts, self.sha256 = config, facts, sha256
        architecture = config['architecture']
        stock, _, suffix = architecture.rpartition('_')
        is_variant = bool(stock) and suffix in VARIANTS
        self.variant = facts.get('variant') or (suffix if is_variant else None)
        self.stock_architecture = facts.get('stock_architecture') or (stock if is_variant else architecture)
        # a model that was never a variant is described as a fused one of which less is known
        self.form = facts.get('form') or ('train_time' if is_variant else 'fused')
        self.is_plain = self.variant is None
        self.is_dynamic = is_variant and VARIANTS[suffix][0].input_dependent
        self.name = facts['name'] if _is_repo_name(facts.get('name')) else None
        self.repo = facts['repo'] if _is_published_id(facts.get('repo')) else None
        self.license = license_data(facts)

    def card_data(self) -> ModelCardData:
        facts = self.facts
        base = facts.get('base_model') or {}
        dataset = facts.get('dataset') or {}
        tags = ['image-classification', 'timm', 'timm-reparam', *([self.variant] if self.variant else [])]
        base_id = base.get('id') if _is_repo_id(base.get('id')) else None
        data: dict[str, Any] = {
            'library_name': 'timm',
            'pipeline_tag': 'image-classification',
            'tags': [_plain(tag) for tag in tags],
            **self.license,
            'datasets': [dataset['id']] if _is_repo_id(dataset.get('id')) else None,
            'base_model': base_id,
            'base_model_relation': 'finetune' if base_id else None,
        }
        results = self._eval_results(dataset)
        if results:
            data |= {'metrics': ['accuracy'], 'model_name': self._title(), 'eval_results': results}
        return ModelCardData(**{key: value for key, value in data.items() if value is not None})

    def texts(self) -> dict[str, Any]:
        facts, config = self.facts, self.config
        method = VARIANTS[self.variant][0].method if self.variant in VARIANTS else None
        input_size = config['pretrained_cfg'].get('input_size')
        input_size = input_size if is_size(input_size) else None
        sibling = facts.get('sibling') or {}
        return {
            'title': _markdown(self._title()),
            'source': f'hf-hub:{self.repo}' if self.repo else f'local-dir:path/to/{self.name or "this-folder"}',
            'needs_plugin': self.form == 'train_time' or self.is_dynamic,
            'registration': self._registration(),
            'image_mode': _IMAGE_MODES.get(input_size[0]) if input_size else None,
            'architecture': _code(config['architecture']),
            'stock_architecture': _code(self.stock_architecture),
            'method': method,
            'citation': bibtex(self.variant, method) if method and self.variant else None,
            'is_dynamic': self.is_dynamic,
            'start': self._start(),
            'license': self._license_line(),
            'input_size': _size(input_size) if input_size else None,
            'num_classes': config['num_classes'] if isinstance(config.get('num_classes'), int) else None,
            'dataset': self._dataset_lines(),
            'metrics': [(label, value) for label, value, _ in self._metrics()],
            'results': format_summary([Summary.from_dict(entry) for entry in facts['results']])
            if facts.get('results')
            else None,
            'layers': self._layer_lines(),
            'fusion': self._fusion_lines(),
            'cost': self._cost_rows(),
            'sibling': self._sibling(sibling),
            'sibling_sha256': _markdown(sibling['sha256']) if sibling.get('sha256') else None,
            'sha256': self.sha256,
            'recipe': _fenced(json.dumps(facts['recipe'], indent=2), 'json') if facts.get('recipe') else None,
            'environment': ', '.join(
                f'{_markdown(name)} {_markdown(version)}' for name, version in (facts.get('environment') or {}).items()
            ),
        }

    def _registration(self) -> str | None:
        """The call that registers the architecture, or None if importing the package does."""
        stock, _, variant = self.config['architecture'].rpartition('_')
        if variant not in VARIANTS or not re.fullmatch(r'[A-Za-z0-9_]+', stock):
            return None
        if is_registered_on_import(self.config['architecture']):
            return None
        return f"timm_reparam.register_variant('{stock}', '{variant}')"

    def _start(self) -> str | None:
        """Where the weights started, or None if the facts do not say."""
        if 'base_model' not in self.facts:
            return None
        base = self.facts['base_model']
        if base is None:
            return 'random weights'
        if not base.get('id'):
            return 'trained weights of which nothing is recorded'
        text = _hub_link(base['id'])
        return f'{text}, revision {_markdown(base["revision"])}' if base.get('revision') else text

    def _license_line(self) -> str:
        if not self.license:
            return 'none is stated'
        text = _markdown(self.license.get('license_name') or self.license['license'])
        if self.license.get('license_link'):
            text += f' ({_code(self.license["license_link"])})'
        return text if self.facts.get('license') else f'{text}, that of the weights it started from'

    def _sibling(self, sibling: dict[str, Any]) -> str | None:
        """The other form: a link if it is known to be published."""
        repo, name = sibling.get('repo'), sibling.get('name')
        if not repo and self.repo and _is_repo_name(name):
            repo = f'{self.repo.partition("/")[0]}/{name}'  # the two forms of a pair are published side by side
        if repo and _is_published_id(repo):
            return _hub_link(repo)
        return _markdown(name) if name else None

    def _title(self) -> str:
        return self.name or _plain(self.config['architecture'])

    def _measured(self, kind: str) -> dict[str, dict[str, Any]]:
        """What was measured of each form, by the label of the form; a plain model has one form only."""
        measured = {form: values for form, values in (self.facts.get(kind) or {}).items() if form in FORMS and values}
        if self.is_plain:
            return dict(zip(['Value'], measured.values()))
        return {_FORM_LABELS[form]: measured[form] for form in FORMS if form in measured}

    def _metrics(self) -> list[tuple[str, float, str]]:
        measured = self._measured('metrics').get('Value' if self.is_plain else _FORM_LABELS[self.form]) or {}
        known = {key: measured[key] for key in _METRIC_LABELS if key in measured}  # these first, in this order
        measured = known | measured
        return [(_METRIC_LABELS.get(key) or _markdown(key), round(value, 4), key) for key, value in measured.items()]

    def _eval_results(self, dataset: dict[str, Any]) -> list[EvalResult]:
        name = _plain(dataset.get('name') or '')
        if not name:
            return []
        slug = re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()
        kind = dataset['id'] if _is_repo_id(dataset.get('id')) else slug
        return [
            EvalResult(
                task_type='image-classification',
                dataset_type=kind or 'dataset',
                dataset_name=name,
                dataset_split=_plain(dataset['split']) if dataset.get('split') else None,
                metric_type='accuracy',
                metric_name=_METRIC_LABELS[key],
                metric_value=value,
            )
            for _, value, key in self._metrics()
            if key in ('top1', 'top5')
        ]

    def _dataset_lines(self) -> list[str]:
        dataset = self.facts.get('dataset') or {}
        lines = []
        if dataset.get('name'):
            lines.append(f'Dataset: {_markdown(dataset["name"])}')
        images = [
            f'{dataset[key]} for {use}'
            for key, use in (('train_images', 'training'), ('validation_images', 'validation'))
            if dataset.get(key) is not None
        ]
        if images:
            lines.append(f'Images: {", ".join(images)}')
        labels = dataset.get('label_names') or []
        if labels:
            lines.append(
                'Labels: ' + ', '.join([_markdown(label) for label in labels[:20]] + ['...'] * (len(labels) > 20))
            )
        return lines

    def _layer_lines(self) -> list[str]:
        """What was compared layer by layer; none if the facts are older than that comparison."""
        fusion = self.facts.get('fusion') or {}
        lines = []
        if fusion.get('num_layers'):
            lines.append(f'Layers compared, each with its own train-time layer in float64: {fusion["num_layers"]}')
        if fusion.get('worst_layer'):
            lines.append(f'Worst layer: {self._layer_words(fusion["worst_layer"])}')
        if not lines:
            return []
        for label, key in (
            ('Layers that no input reached, compared on noise alone', 'layers_without_input'),
            ('Layers that are not verified', 'layers_off'),
            ('Differences between the two forms beside these layers', 'problems'),
        ):
            if fusion.get(key) is not None:
                lines.append(f'{label}: {len(fusion[key]) or "none"}')
        return lines

    @staticmethod
    def _layer_words(layer: Mapping[str, Any]) -> str:
        words = [_code(layer['name'])] if _plain(layer.get('name') or '') else []
        if layer.get('kernel') is not None:
            words.append(f'kernel within {layer["kernel"]:.3g} units in the last place')
        if layer.get('algebra') is not None:
            words.append(f'algebra {layer["algebra"]:.3g}')
        if layer.get('stored') is not None:
            words.append(f'stored {layer["stored"]:.3g}')
        if layer.get('bound') is not None:
            words.append(f'allowed {layer["bound"]:.3g}')
        if layer.get('num_inputs') == 0:
            words.append('on noise alone')
        text = ', '.join(words)
        return text if layer.get('own') is None else f"{text} (the train-time layer's own rounding: {layer['own']:.3g})"

    def _fusion_lines(self) -> list[str]:
        fusion = self.facts.get('fusion') or {}
        lines = []
        if fusion.get('algebra') is not None:
            text = f'Algebra, both forms in float64: relative difference {fusion["algebra"]:.3g}'
            if fusion.get('algebra_bound') is not None:
                text += f', allowed {fusion["algebra_bound"]:.3g}'
            lines.append(text)
        if fusion.get('stored') is not None:
            text = f'As stored, against the train-time form in float64: relative difference {fusion["stored"]:.3g}'
            if fusion.get('bound') is not None:
                text += f', allowed {fusion["bound"]:.3g}'
            if fusion.get('own') is not None:
                text += f" (the train-time form's own rounding: {fusion['own']:.3g})"
            lines.append(text)
        if fusion.get('top1_agreement') is not None:
            lines.append(f'Same top-1 class in both forms: {100 * fusion["top1_agreement"]:.4g} %')
        if self.facts.get('logit_difference') is not None:
            lines.append(f'Largest absolute difference between logits: {self.facts["logit_difference"]:.3g}')
        if lines and fusion.get('num_inputs') is not None:
            lines.append(f'Inputs compared: {fusion["num_inputs"]}')
        return lines

    def _cost_rows(self) -> list[list[str]]:
        """Rows of the table of costs, its header first; none if nothing was measured."""
        profiles = self._measured('profile')
        rows = []
        for label, key in (('Parameters', 'parameters'), ('Trainable parameters', 'trainable_parameters')):
            if any(profile.get(key) is not None for profile in profiles.values()):
                rows.append([label, *(f'{profile[key]:,}' if key in profile else '' for profile in profiles.values())])
        if any(profile.get('macs') is not None for profile in profiles.values()):
            rows.append(self._cost_row('MACs per image', 'macs', '{:,}', profiles, _macs_conditions))
        if any(profile.get('latency_ms') is not None for profile in profiles.values()):
            rows.append(self._cost_row('Latency, median', 'latency_ms', '{:.4g} ms', profiles, _latency_conditions))
        if any(profile.get('latency_spread_ms') is not None for profile in profiles.values()):
            rows.append(self._cost_row('Interquartile range', 'latency_spread_ms', '{:.3g} ms', profiles))
        return [['', *profiles], *rows] if rows else []

    @staticmethod
    def _cost_row(
        label: str,
        key: str,
        layout: str,
        profiles: Mapping[str, dict[str, Any]],
        conditions: Callable[[dict[str, Any]], str] = lambda profile: '',
    ) -> list[str]:
        """A row, with what it was measured under beside its label, or beside each figure where that differs."""
        cells = {
            form: layout.format(profile[key]) for form, profile in profiles.items() if profile.get(key) is not None
        }
        where = {form: conditions(profiles[form]) for form in cells}
        if len(set(where.values())) == 1:
            shared = next(iter(where.values()))
            label += f' ({shared})' if shared else ''
        else:
            cells = {form: f'{cell} ({where[form]})' if where[form] else cell for form, cell in cells.items()}
        return [label, *(cells.get(form, '') for form in profiles)]


def _macs_conditions(profile: dict[str, Any]) -> str:
    return _size(profile['input_size']) if is_size(profile.get('input_size')) else ''


def _latency_conditions(profile: dict[str, Any]) -> str:
    where = [f'{profile["runs"]} runs'] if profile.get('runs') is not None else []
    where += [f'batch of {profile["batch_size"]}'] if profile.get('batch_size') is not None else []
    where += [_markdown(profile[key]) for key in ('device', 'dtype') if isinstance(profile.get(key), str)]
    return ', '.join(where)


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ReparamError(f'{path}: cannot be read as json ({error})') from error
    if not isinstance(value, dict):
        raise ReparamError(f'{path}: expected a json object, got {type(value).__name__}')
    return value


def _expect(mapping: Mapping[str, Any], key: str, kind: type, place: str, *, required: bool = False) -> None:
    value = mapping.get(key)
    if value is None and not required:
        return
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        raise ReparamError(f'{place}.{key}: expected {kind.__name__}, got {value!r}')
    # json has whole numbers of any size
    if isinstance(value, int) and kind is float and abs(value) > sys.float_info.max:
        raise ReparamError(f'{place}.{key}: expected a float, got a whole number beyond the largest one')


def _expect_texts(mapping: Mapping[str, Any], key: str, place: str) -> None:
    for index, text in enumerate(mapping.get(key) or ()):
        if not isinstance(text, str):
            raise ReparamError(f'{place}.{key}[{index}]: expected a text, got {text!r}')


def _is_repo_id(text: Any) -> bool:
    # the client's own rule, and ascii only: older clients let other letters pass
    if not isinstance(text, str) or not text.isascii():
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def _is_repo_name(text: Any) -> bool:
    return _is_repo_id(text) and '/' not in text


def _is_published_id(text: Any) -> bool:
    return _is_repo_id(text) and text.count('/') == 1


def is_size(value: Any) -> bool:
    """Whether a value is three whole numbers: channels, height and width of images."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 3
        and all(isinstance(side, int) and not isinstance(side, bool) for side in value)
    )


def _size(value: Sequence[int]) -> str:
    return ' x '.join(str(side) for side in value)


def _hub_link(repo: str) -> str:
    """A link to a repo on the Hub; the bare text if no repo can have this name."""
    return f'[{_markdown(repo)}](https://huggingface.co/{repo})' if _is_published_id(repo) else _markdown(repo)


def _plain(text: str) -> str:
    """One line without control characters, for front matter, where yaml does the quoting."""
    return ' '.join(''.join(character if character.isprintable() else ' ' for character in text).split())


# Every ascii punctuation mark may be escaped in Markdown. Left as they are: those that can do no harm, the dot, dash
# and underscore inside of a word, and the colon, but not those that would make an address a link.
_MARKUP = re.compile(
    r"""[!#$&()*;<=>?@\[\]\\^`{|}~]|(?<![A-Za-z0-9])[._-]|[._-](?![A-Za-z0-9])|(?<=www)\.|:(?=/)""", re.IGNORECASE
)
_ENTITIES = {'<': '&lt;', '>': '&gt;', '&': '&amp;'}


def _markdown(text: str) -> str:
    """One line of text in which Markdown and HTML see no markup, wherever in a line it is put."""
    return _MARKUP.sub(lambda match: _ENTITIES.get(match[0], '\\' + match[0]), _plain(text))


def _code(text: str) -> str:
    """One line of text as a code span, its fence longer than any run of backticks inside."""
    text = _plain(text)
    fence = '`' * (_longest_backticks(text) + 1)
    padding = ' ' if text.startswith('`') or text.endswith('`') else ''
    return f'{fence}{padding}{text}{padding}{fence}'


def _fenced(text: str, language: str) -> str:
    fence = '`' * max(3, _longest_backticks(text) + 1)
    return f'{fence}{language}\n{text}\n{fence}'


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall('`+', text)), default=0)


def bibtex(key: str, method: Method) -> str:
    """Return the BibTeX entry of a method's paper.

    Args:
        key: What the entry is cited by, its year aside.
        method: The method.
    """
    fields = {
        'title': f'{{{method.title}}}',
        'author': method.authors,
        'journal': method.venue,
        'year': method.year,
        'eprint': method.arxiv,
        'archivePrefix': 'arXiv',
    }
    lines = ',\n'.join(f'  {name} = {{{value}}}' for name, value in fields.items())
    return f'@article{{{key}{method.year},\n{lines}\n}}'
