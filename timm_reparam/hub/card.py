"""Model cards, rendered from the files of a checkpoint folder only.

A card is a pure function of ``config.json``, ``training.json`` (if it exists), the hash of ``model.safetensors`` and
the notes of the present card, so rendering again gives the same bytes. A card states only the facts of
``training.json`` (see :mod:`timm_reparam.hub.facts`).
"""

import functools
import importlib.resources
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2  # comes with torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import ReparamError
from ..layers._base import Method
from ..models._registry import is_registered_on_import
from ..results import Summary, format_summary
from ..variants import VARIANTS
from .facts import (
    CARD_NAME,
    FORMS,
    WEIGHTS_NAME,
    is_published_id,
    is_repo_id,
    is_size,
    license_data,
    plain,
    read_config,
    read_facts,
    sha256_of,
)
from .markdown import code_span, escape, fenced, hub_link

__all__ = ['bibtex', 'card_text', 'notes_of', 'render_card', 'template_folder']

_FORM_LABELS = {'train_time': 'Train-time form', 'fused': 'Fused form'}
_IMAGE_MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}  # PIL's names, by the number of channels
_METRIC_LABELS = {'top1': 'Top-1 accuracy (%)', 'top5': 'Top-5 accuracy (%)', 'loss': 'Loss'}


def render_card(folder: str | Path) -> str:
    """Render the card of a checkpoint folder.

    Args:
        folder: Folder with ``config.json``, ``model.safetensors`` and, if the training is known, ``training.json``.

    Returns:
        The text of ``README.md``; the same bytes every time for the same files.

    Raises:
        ReparamError: A file is missing, or a value in it has the wrong type.
    """
    folder = Path(folder)
    return card_text(
        read_config(folder), read_facts(folder) or {}, sha256_of(folder / WEIGHTS_NAME), notes_of(folder / CARD_NAME)
    )


def notes_of(path: Path) -> str:
    """Return the section of notes of a card, with its marker lines; empty if the card has none.

    The section starts with the line ``<!-- notes -->`` and ends with the line ``<!-- end of notes -->``.
    """
    try:
        text = path.read_bytes().decode('utf-8')
    except (OSError, ValueError):
        return ''
    first = re.search(r'^<!-- notes -->\r?$', text, re.MULTILINE)
    last = re.compile(r'^<!-- end of notes -->$', re.MULTILINE).search(text, first.end()) if first else None
    return text[first.start() : last.end()] if first and last else ''


def card_text(config: dict[str, Any], facts: dict[str, Any], sha256: str, notes: str = '') -> str:
    """Render a card from the content of a checkpoint folder.

    Args:
        config: Content of ``config.json``, see :func:`read_config`.
        facts: Content of ``training.json``, see :func:`read_facts`; empty if there is no such file.
        sha256: Hash of ``model.safetensors``.
        notes: Section of notes, see :func:`notes_of`, which is put at the end without change.

    Returns:
        The text of ``README.md``.
    """
    context = _Context(config, facts, sha256)
    card = ModelCard(_template(context.form).render(card_data=context.card_data().to_yaml(), **context.texts()))
    return str(card).rstrip() + '\n' + (f'\n{notes}\n' if notes else '')


@functools.cache  # compiling a template takes most of the time of rendering
def _template(form: str) -> jinja2.Template:
    """The template of the card of a form."""
    folder = template_folder()
    return jinja2.Template(
        ''.join((folder / name).read_text(encoding='utf-8') for name in (f'{form}.md', 'details.md'))
    )


def template_folder() -> Path:
    """Return the folder of the card templates, in an installed package or in a checkout.

    Raises:
        ReparamError: Neither place has templates.
    """
    package = Path(str(importlib.resources.files('timm_reparam')))
    for folder in (package / 'model_cards', package.parent / 'model_cards'):
        if all((folder / f'{form}.md').is_file() for form in FORMS):
            return folder
    raise ReparamError(
        f'{package}: expected model_cards/ inside the package or beside it, found none; install it again'
    )


class _Context:
    """The values that a template is rendered with: the front matter, and texts that are safe in Markdown."""

    def __init__(self, config: dict[str, Any], facts: dict[str, Any], sha256: str):
        self.config, self.facts, self.sha256 = config, facts, sha256
        architecture = config['architecture']
        stock, _, suffix = architecture.rpartition('_')
        is_variant = bool(stock) and suffix in VARIANTS
        self.variant = facts.get('variant') or (suffix if is_variant else None)
        self.stock_architecture = facts.get('stock_architecture') or (stock if is_variant else architecture)
        # the card of a stock model uses the template of the fused form, with fewer facts
        self.form = facts.get('form') or ('train_time' if is_variant else 'fused')
        self.is_stock = self.variant is None
        self.is_dynamic = is_variant and VARIANTS[suffix].input_dependent
        self.name = facts['name'] if _is_repo_name(facts.get('name')) else None
        self.repo = facts['repo'] if is_published_id(facts.get('repo')) else None
        self.license = license_data(facts)

    def card_data(self) -> ModelCardData:
        """The front matter."""
        facts = self.facts
        base = facts.get('base_model') or {}
        dataset = facts.get('dataset') or {}
        tags = ['image-classification', 'timm', 'timm-reparam', *([self.variant] if self.variant else [])]
        base_id = base.get('id') if is_repo_id(base.get('id')) else None
        data: dict[str, Any] = {
            'library_name': 'timm',
            'pipeline_tag': 'image-classification',
            'tags': [plain(tag) for tag in tags],
            **self.license,
            'datasets': [dataset['id']] if is_repo_id(dataset.get('id')) else None,
            'base_model': base_id,
            'base_model_relation': 'finetune' if base_id else None,
        }
        results = self._eval_results(dataset)
        if results:
            data |= {'metrics': ['accuracy'], 'model_name': self._title(), 'eval_results': results}
        return ModelCardData(**{key: value for key, value in data.items() if value is not None})

    def texts(self) -> dict[str, Any]:
        """The variables of the template."""
        facts, config = self.facts, self.config
        method = VARIANTS[self.variant].method if self.variant in VARIANTS else None
        input_size = config['pretrained_cfg'].get('input_size')
        input_size = input_size if is_size(input_size) else None
        sibling = facts.get('sibling') or {}
        return {
            'title': escape(self._title()),
            'source': f'hf-hub:{self.repo}' if self.repo else f'local-dir:path/to/{self.name or "this-folder"}',
            'needs_plugin': self.form == 'train_time' or self.is_dynamic,
            'registration': self._registration(),
            'image_mode': _IMAGE_MODES.get(input_size[0]) if input_size else None,
            'architecture': code_span(config['architecture']),
            'stock_architecture': code_span(self.stock_architecture),
            'method': method,
            'citation': bibtex(self.variant, method) if method and self.variant else None,
            'is_dynamic': self.is_dynamic,
            'start': self._base_model_line(),
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
            'sibling_sha256': escape(sibling['sha256']) if sibling.get('sha256') else None,
            'sha256': self.sha256,
            'recipe': fenced(json.dumps(facts['recipe'], indent=2), 'json') if facts.get('recipe') else None,
            'environment': ', '.join(
                f'{escape(name)} {escape(version)}'
                for name, version in (facts.get('environment') or {}).items()
                if version is not None
            ),
        }

    def _registration(self) -> str | None:
        """The call that registers the architecture; None if importing the package registers it."""
        stock, _, variant = self.config['architecture'].rpartition('_')
        if variant not in VARIANTS or not re.fullmatch(r'[A-Za-z0-9_]+', stock):
            return None
        if is_registered_on_import(self.config['architecture']):
            return None
        return f"timm_reparam.register_variant('{stock}', '{variant}')"

    def _base_model_line(self) -> str | None:
        """Where the weights come from; None if the facts do not say."""
        if 'base_model' not in self.facts:
            return None
        base = self.facts['base_model']
        if base is None:
            return 'random weights'
        if not base.get('id'):
            return 'trained weights of which nothing is recorded'
        text = hub_link(base['id'])
        return f'{text}, revision {escape(base["revision"])}' if base.get('revision') else text

    def _license_line(self) -> str:
        if not self.license:
            return 'none is stated'
        text = escape(self.license.get('license_name') or self.license['license'])
        if self.license.get('license_link'):
            text += f' ({code_span(self.license["license_link"])})'
        return text if self.facts.get('license') else f'{text}, that of the weights it started from'

    def _sibling(self, sibling: dict[str, Any]) -> str | None:
        """The other form, as a link if it is published."""
        repo, name = sibling.get('repo'), sibling.get('name')
        if not repo and self.repo and _is_repo_name(name):
            repo = f'{self.repo.partition("/")[0]}/{name}'  # both forms are published under one namespace
        if repo and is_published_id(repo):
            return hub_link(repo)
        return escape(name) if name else None

    def _title(self) -> str:
        return self.name or plain(self.config['architecture'])

    def _measured(self, kind: str) -> dict[str, dict[str, Any]]:
        """Measured values by the label of the form; a stock model has one form only, with the label 'Value'."""
        measured = {form: values for form, values in (self.facts.get(kind) or {}).items() if form in FORMS and values}
        if self.is_stock:
            return dict(zip(['Value'], measured.values()))
        return {_FORM_LABELS[form]: measured[form] for form in FORMS if form in measured}

    def _metrics(self) -> list[tuple[str, float, str]]:
        measured = self._measured('metrics').get('Value' if self.is_stock else _FORM_LABELS[self.form]) or {}
        measured = {key: value for key, value in measured.items() if value is not None}
        known = {key: measured[key] for key in _METRIC_LABELS if key in measured}  # these come first, in this order
        measured = known | measured
        return [(_METRIC_LABELS.get(key) or escape(key), round(value, 4), key) for key, value in measured.items()]

    def _eval_results(self, dataset: dict[str, Any]) -> list[EvalResult]:
        name = plain(dataset.get('name') or '')
        if not name:
            return []
        slug = re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()
        kind = dataset['id'] if is_repo_id(dataset.get('id')) else slug
        return [
            EvalResult(
                task_type='image-classification',
                dataset_type=kind or 'dataset',
                dataset_name=name,
                dataset_split=plain(dataset['split']) if dataset.get('split') else None,
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
            lines.append(f'Dataset: {escape(dataset["name"])}')
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
                'Labels: ' + ', '.join([escape(label) for label in labels[:20]] + ['...'] * (len(labels) > 20))
            )
        return lines

    def _layer_lines(self) -> list[str]:
        """Results of the comparison layer by layer; empty if an older version wrote the facts, without them."""
        fusion = self.facts.get('fusion') or {}
        lines = []
        if fusion.get('num_layers'):
            lines.append(f'Layers compared, each with its own train-time layer in float64: {fusion["num_layers"]}')
        if fusion.get('worst_layer'):
            lines.append(f'Worst layer: {self._layer_line(fusion["worst_layer"])}')
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
    def _layer_line(layer: Mapping[str, Any]) -> str:
        words = [code_span(layer['name'])] if plain(layer.get('name') or '') else []
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
        """Rows of the table of costs, with the header first; empty if nothing was measured."""
        profiles = self._measured('profile')
        rows = [
            self._cost_row(label, key, layout, profiles, conditions)
            for label, key, layout, conditions in (
                ('Parameters', 'parameters', '{:,}', None),
                ('Trainable parameters', 'trainable_parameters', '{:,}', None),
                ('MACs per image', 'macs', '{:,}', _macs_conditions),
                ('Latency, median', 'latency_ms', '{:.4g} ms', _latency_conditions),
                ('Interquartile range', 'latency_spread_ms', '{:.3g} ms', None),
            )
            if any(profile.get(key) is not None for profile in profiles.values())
        ]
        return [['', *profiles], *rows] if rows else []

    @staticmethod
    def _cost_row(
        label: str,
        key: str,
        layout: str,
        profiles: Mapping[str, dict[str, Any]],
        conditions: Callable[[dict[str, Any]], str] | None,
    ) -> list[str]:
        """A row; the conditions of the measurement stand beside the label, or beside each figure if they differ."""
        cells = {
            form: layout.format(profile[key]) for form, profile in profiles.items() if profile.get(key) is not None
        }
        where = {form: conditions(profiles[form]) if conditions else '' for form in cells}
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
    where += [escape(profile[key]) for key in ('device', 'dtype') if isinstance(profile.get(key), str)]
    return ', '.join(where)


def _is_repo_name(text: Any) -> bool:
    """Whether a value is a valid repo name, without a namespace."""
    return is_repo_id(text) and '/' not in text


def _size(value: Sequence[int]) -> str:
    return ' x '.join(str(side) for side in value)


def bibtex(key: str, method: Method) -> str:
    """Return the BibTeX entry of a method's paper.

    Args:
        key: Citation key, without the year.
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
