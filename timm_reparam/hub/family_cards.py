"""Cards of the model families: one file a family in ``model_cards/``, generated.

A family is what timm calls a module: the variants of one kind of backbone by one method. Its card is made of the
template ``family.md``, the text about the method (``methods/VARIANT.md``) and counted costs. The costs lie in
``costs.json`` beside the cards, so that rendering a card is quick and a card is current if it is what these files make;
:func:`measure_costs` counts them again. Accuracies come from ``results/cifar10.csv``, where it has runs of the family.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData

from .._files import write_whole
from ..convert import VARIANTS, fuse_model
from ..errors import ReparamError
from ..models._backbones import MOBILENETV2S, RESNETS
from ..profile import compare_profiles
from ..results import format_summary, of_variant, read_results, setup_of, summarize
from .card import bibtex, template_folder

__all__ = ['check_cards', 'families', 'measure_costs', 'render_family_card', 'write_cards']

COSTS_NAME = 'costs.json'
RESULTS_NAME = 'results/cifar10.csv'
INPUT_SIZE = (3, 224, 224)
NUM_CLASSES = 1000

# What the backbones of a family are called, all of them, and the one that examples are written with.
_BACKBONES = {
    'mobilenetv2': ('MobileNetV2s', MOBILENETV2S, 'mobilenetv2_100'),
    'resnet': ('ResNets', RESNETS, 'resnet18'),
}
_FORMS = ('stock', 'train_time', 'fused')

# Architecture of the train-time form -> form -> parameters, trainable parameters, MACs for one image.
Costs = Mapping[str, Mapping[str, tuple[int, int, int]]]


def families() -> dict[str, tuple[str, ...]]:
    """Return the families that have a card, each with the names of its models."""
    return {
        f'{backbone}_{variant}': tuple(f'{stock}_{variant}' for stock in stock_names)
        for backbone, (_, stock_names, _) in _BACKBONES.items()
        for variant in VARIANTS
    }


def render_family_card(family: str, *, folder: str | Path | None = None, costs: Costs | None = None) -> str:
    """Render the card of a family.

    Args:
        family: Name of the family, for instance 'resnet_doconv'.
        folder: Folder of the templates and of the stored costs; the package's own by default.
        costs: Costs as :func:`measure_costs` counts them; the stored ones by default.

    Returns:
        The text of the card; the same bytes every time for the same files and costs.

    Raises:
        ReparamError: There is no such family, or a file or a cost is missing.
    """
    names = families().get(family)
    if names is None:
        raise ReparamError(f'{family}: expected one of the families {", ".join(families())}')
    folder = template_folder() if folder is None else Path(folder)
    costs = _stored_costs(folder) if costs is None else costs
    missing = [name for name in names if name not in costs]
    if missing:
        raise ReparamError(f'{folder / COSTS_NAME}: expected the cost of {", ".join(missing)}; run timm-reparam cards')
    backbone, _, variant = family.rpartition('_')
    backbones, _, stock = _BACKBONES[backbone]
    layer = VARIANTS[variant][0]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-reparam', variant],
    )
    card = ModelCard.from_template(
        data,
        template_str=_read(folder / 'family.md'),
        family=family,
        backbones=backbones,
        variant=variant,
        stock=stock,
        example=f'{stock}_{variant}',
        method=layer.method,
        text=_read(folder / 'methods' / f'{variant}.md').strip(),
        layer=layer.__name__,
        options=', '.join(f'`{name}={default!r}`' for name, default in layer.default_options().items()),
        is_dynamic=layer.input_dependent,
        results=_results(folder, backbone, variant),
        input_size=' x '.join(map(str, INPUT_SIZE)),
        num_classes=NUM_CLASSES,
        cost=_cost_rows({name: costs[name] for name in names}, layer.input_dependent),
        citation=bibtex(variant, layer.method),
    )
    return str(card).rstrip() + '\n'


def measure_costs(
    names: Iterable[str], *, report: Callable[[str], object] | None = None
) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Count parameters and MACs of models, their stock architectures and their fused forms.

    Nothing is computed and no memory is taken for weights: the models are built and run on the meta device.

    Args:
        names: Names of registered variants.
        report: Called with each name when it is counted.

    Returns:
        For each name and each of the forms 'stock', 'train_time' and 'fused': all parameters, trainable parameters, and
        the MACs of one image.
    """
    costs = {}
    for name in names:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # these models are counted, not trained
            models = [timm.create_model(model, num_classes=NUM_CLASSES) for model in (name.rpartition('_')[0], name)]
            models.append(fuse_model(models[1]))
        profiles = compare_profiles(*models, input_size=INPUT_SIZE, runs=0)
        costs[name] = {
            form: (profile.parameters, profile.trainable_parameters, profile.macs)
            for form, profile in zip(_FORMS, profiles)
        }
        if report is not None:
            report(name)
    return costs


def write_cards(
    folder: str | Path | None = None, *, recount: bool = True, report: Callable[[str], object] | None = None
) -> list[str]:
    """Write the cards of all families, and the costs that they state.

    Args:
        folder: Folder of the templates and the cards; the package's own by default.
        recount: Count the costs again; otherwise the stored ones are used.
        report: Called with the name of each model when it is counted.

    Returns:
        Names of the files that changed.

    Raises:
        ReparamError: A template is missing, or the folder cannot be written.
    """
    folder = template_folder() if folder is None else Path(folder)
    changed = []
    for name, text in _generated(folder, recount, report).items():
        path = folder / name
        if path.is_file() and path.read_bytes() == text.encode():
            continue
        write_whole(path, text.encode())
        changed.append(name)
    return changed


def check_cards(
    folder: str | Path | None = None, *, recount: bool = False, report: Callable[[str], object] | None = None
) -> list[str]:
    """Check that the cards of all families are current; nothing is written.

    Args:
        folder: Folder of the templates and the cards; the package's own by default.
        recount: Check the stored costs, too, by counting again.
        report: Called with the name of each model when it is counted.

    Returns:
        Names of the files that are missing, differ from what :func:`write_cards` would write, or belong to no family.

    Raises:
        ReparamError: A template or the stored costs are missing.
    """
    folder = template_folder() if folder is None else Path(folder)
    generated = _generated(folder, recount, report)
    stale = {
        name
        for name, text in generated.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != text.encode()
    }
    of_no_family = {path.name for variant in VARIANTS for path in folder.glob(f'*_{variant}.md')} - set(generated)
    return sorted(stale | of_no_family)


def _generated(folder: Path, recount: bool, report: Callable[[str], object] | None) -> dict[str, str]:
    """Text of every generated file."""
    costs: Costs
    if recount:
        costs = measure_costs((name for names in families().values() for name in names), report=report)
    else:
        costs = _stored_costs(folder)
    lines = ',\n'.join(f'  {json.dumps(name)}: {json.dumps(costs[name])}' for name in sorted(costs))
    cards = {f'{family}.md': render_family_card(family, folder=folder, costs=costs) for family in families()}
    return {COSTS_NAME: f'{{\n{lines}\n}}\n', **cards}


def _stored_costs(folder: Path) -> Costs:
    path = folder / COSTS_NAME
    try:
        costs = json.loads(_read(path))
        return {
            name: {form: (int(p), int(t), int(m)) for form, (p, t, m) in forms.items()} for name, forms in costs.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ReparamError(f'{path}: expected three counts for each form of each model ({error})') from error


def _results(folder: Path, backbone: str, variant: str) -> list[dict[str, str]]:
    """What the card says of the runs of a family: of each network at each image size its settings and a table."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return []
    of_family = [
        row
        for row in read_results(path)
        if timm.models.model_entrypoint(row['model']).__module__.endswith(f'.{backbone}')
    ]
    chosen = of_variant(summarize(of_family), variant)
    results = []
    for setup in dict.fromkeys(summary.setup for summary in chosen):
        model, arguments, size = setup
        summaries = [summary for summary in chosen if summary.setup == setup]
        methods = {summary.method for summary in summaries}
        rows = [row for row in of_family if setup_of(row) == setup and row['method'] in methods]
        options = [json.loads(row['options'] or '{}') for row in rows]
        words = {
            name: ', '.join(sorted({str(row[name]) for row in rows}))
            for name in ('batch_size', 'lr', 'weight_decay', 'device')
        }
        results.append(
            {
                **words,
                'model': f'`{model}`' + (f' ({arguments})' if arguments else ''),
                'map_lr': ', '.join(sorted({str(given['map_lr']) for given in options if given.get('map_lr')})),
                'size': str(size),
                'seeds': str(max(summary.n for summary in summaries)),
                'table': format_summary(summaries),
            }
        )
    return results


def _cost_rows(costs: Costs, is_dynamic: bool) -> list[list[str]]:
    labels = dict(zip(_FORMS, ('stock', 'train-time', 'for inference' if is_dynamic else 'fused')))
    forms = [form for form in _FORMS if is_dynamic or form != 'stock']  # else what is fused is the stock architecture
    columns = [
        (f'{label}, {labels[form]}', form, index)
        for label, index in (('Parameters', 0), ('Trainable', 1), ('MACs', 2))
        for form in (['train_time'] if index == 1 else forms)
    ]
    rows = [['Architecture', *(label for label, _, _ in columns)]]
    for name, counts in costs.items():
        rows.append([f'`{name}`', *(f'{counts[form][index]:,}' for _, form, index in columns)])
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise ReparamError(f'{path}: cannot be read ({error.strerror}); expected the templates of the cards') from error
