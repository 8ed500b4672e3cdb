"""Cards of the model families: one file a family in ``model_cards/``, generated.

    python tests/benchmarks/family_cards.py                            # count the costs and write the cards
    python tests/benchmarks/family_cards.py --stored-costs             # the same, with the costs of costs.json
    python tests/benchmarks/family_cards.py --check --stored-costs     # write nothing, name the stale cards

A family is what timm calls a module: the variants of one kind of backbone by one method. Its card is made of the
template ``family.md``, the text about the method (``methods/VARIANT.md``), the costs in ``costs.json``, and the
accuracies in ``results/cifar10.csv``, where it has runs of the family. The same files give the same bytes.

Costs are counted on the meta device: nothing is computed, and no memory is taken for weights.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import timm
import torch
from huggingface_hub import ModelCard, ModelCardData
from timm.models import model_entrypoint

from timm_reparam import ReparamError, fuse_model
from timm_reparam._files import write_whole
from timm_reparam.hub.card import bibtex
from timm_reparam.models._backbones import BACKBONES as STOCK_NAMES
from timm_reparam.profile import compare_profiles
from timm_reparam.results import format_summary, of_variant, read_results, setup_of, summarize
from timm_reparam.variants import VARIANTS

FOLDER = Path(__file__).parents[2] / 'model_cards'
COSTS_NAME = 'costs.json'
RESULTS_NAME = 'results/cifar10.csv'
INPUT_SIZE = (3, 224, 224)
NUM_CLASSES = 1000

# Backbone -> what its stock architectures are called, all of them, and the one in the examples.
BACKBONES = {
    'mobilenetv2': ('MobileNetV2s', STOCK_NAMES['mobilenetv2'], 'mobilenetv2_100'),
    'resnet': ('ResNets', STOCK_NAMES['resnet'], 'resnet18'),
}

# Variant of an architecture -> 'stock', 'train_time' or 'fused' -> parameters, trainable ones, MACs for one image.
Costs = Mapping[str, Mapping[str, tuple[int, int, int]]]


def families() -> dict[str, tuple[str, ...]]:
    """Return the families that have a card, each with the names of its models."""
    return {
        f'{backbone}_{variant}': tuple(f'{stock}_{variant}' for stock in stock_names)
        for backbone, (_, stock_names, _) in BACKBONES.items()
        for variant in VARIANTS
    }


def measure_costs(names: Iterable[str]) -> Costs:
    """Count parameters and MACs of registered variants, of the stock architectures and of the fused forms."""
    costs = {}
    for name in names:
        with torch.device('meta'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # these models are counted, not trained
            models = [timm.create_model(model, num_classes=NUM_CLASSES) for model in (name.rpartition('_')[0], name)]
            models.append(fuse_model(models[1]))
        profiles = compare_profiles(*models, input_size=INPUT_SIZE, runs=0)
        counts = [(profile.parameters, profile.trainable_parameters, profile.macs) for profile in profiles]
        costs[name] = dict(zip(('stock', 'train_time', 'fused'), counts))
    return costs


def render_family_card(family: str, folder: Path = FOLDER, costs: Costs | None = None) -> str:
    """Render the card of a family.

    Args:
        family: Name of the family, for instance 'resnet_doconv'.
        folder: Folder of the templates, the results and the stored costs.
        costs: Costs of the family's models, as `measure_costs` returns them; the stored ones by default.

    Returns:
        The text of the card.

    Raises:
        ReparamError: There is no such family, or a file or a cost is missing.
    """
    names = families().get(family)
    if names is None:
        raise ReparamError(f'{family}: expected one of the families {", ".join(families())}')
    costs = _stored_costs(folder) if costs is None else costs
    missing = [name for name in names if name not in costs]
    if missing:
        raise ReparamError(
            f'{folder / COSTS_NAME}: expected the cost of {", ".join(missing)}; run tests/benchmarks/family_cards.py'
        )
    backbone, _, variant = family.rpartition('_')
    backbones, _, stock = BACKBONES[backbone]
    layer = VARIANTS[variant].layer
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


def write_cards(folder: Path = FOLDER, *, recount: bool = True) -> list[str]:
    """Write the cards of all families, and their costs.

    Args:
        folder: Folder of the templates and the cards.
        recount: Count the costs again; otherwise the stored ones are used.

    Returns:
        Names of the files that changed.

    Raises:
        ReparamError: A template or the stored costs are missing, or the folder cannot be written.
    """
    files = _generated(folder, recount)
    stale = _stale(folder, files)
    for name in stale:
        write_whole(folder / name, files[name])
    return stale


def check_cards(folder: Path = FOLDER, *, recount: bool = False) -> list[str]:
    """Check that the cards of all families are current; nothing is written.

    Args:
        folder: Folder of the templates and the cards.
        recount: Check the stored costs, too, by counting again.

    Returns:
        Names of the files that are missing, differ from what `write_cards` would write, or belong to no family.

    Raises:
        ReparamError: A template or the stored costs are missing.
    """
    files = _generated(folder, recount)
    of_no_family = {path.name for variant in VARIANTS for path in folder.glob(f'*_{variant}.md')} - set(files)
    return sorted([*_stale(folder, files), *of_no_family])


def _generated(folder: Path, recount: bool) -> dict[str, bytes]:
    """Content of every generated file."""
    if recount:
        costs = measure_costs(name for names in families().values() for name in names)
    else:
        costs = _stored_costs(folder)
    lines = ',\n'.join(f'  {json.dumps(name)}: {json.dumps(costs[name])}' for name in sorted(costs))
    cards = {f'{family}.md': render_family_card(family, folder, costs).encode() for family in families()}
    return {COSTS_NAME: f'{{\n{lines}\n}}\n'.encode(), **cards}


def _stale(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Names of the files that are missing in the folder, or differ there."""
    return [
        name
        for name, content in files.items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != content
    ]


def _stored_costs(folder: Path) -> Costs:
    path = folder / COSTS_NAME
    try:
        return {
            name: {form: (int(p), int(t), int(m)) for form, (p, t, m) in forms.items()}
            for name, forms in json.loads(_read(path)).items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ReparamError(f'{path}: expected three counts for each form of each model ({error})') from error


def _results(folder: Path, backbone: str, variant: str) -> list[dict[str, str]]:
    """What the card says of the runs of a family: the settings and a table of each network at each image size."""
    path = folder / RESULTS_NAME
    if not path.is_file():
        return []
    module = f'timm.models.{backbone}'
    of_family = [row for row in read_results(path) if model_entrypoint(row['model']).__module__ == module]
    chosen = of_variant(summarize(of_family), variant)
    results = []
    for setup in dict.fromkeys(summary.setup for summary in chosen):
        model, arguments, size = setup
        summaries = [summary for summary in chosen if summary.setup == setup]
        methods = {summary.method for summary in summaries}
        rows = [row for row in of_family if setup_of(row) == setup and row['method'] in methods]
        map_lrs = [json.loads(row['options'] or '{}').get('map_lr') for row in rows]
        results.append(
            {
                **{name: _values(row[name] for row in rows) for name in ('batch_size', 'lr', 'weight_decay', 'device')},
                'model': f'`{model}`' + (f' ({arguments})' if arguments else ''),
                'map_lr': _values(filter(None, map_lrs)),
                'size': str(size),
                'seeds': str(max(summary.n for summary in summaries)),
                'table': format_summary(summaries),
            }
        )
    return results


def _values(values: Iterable[object]) -> str:
    return ', '.join(sorted({str(value) for value in values}))


def _cost_rows(costs: Costs, is_dynamic: bool) -> list[list[str]]:
    labels = {'stock': 'stock', 'train_time': 'train-time', 'fused': 'for inference' if is_dynamic else 'fused'}
    if not is_dynamic:  # what is fused is the stock architecture
        del labels['stock']
    columns = [(f'Parameters, {label}', form, 0) for form, label in labels.items()]
    columns.append(('Trainable, train-time', 'train_time', 1))
    columns += [(f'MACs, {label}', form, 2) for form, label in labels.items()]
    rows = [['Architecture', *(label for label, _, _ in columns)]]
    for name, counts in costs.items():
        rows.append([f'`{name}`', *(f'{counts[form][index]:,}' for _, form, index in columns)])
    return rows


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding='utf-8')
    except OSError as error:
        raise ReparamError(f'{path}: cannot be read ({error.strerror}); expected the templates of the cards') from error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Write the cards of the families; counting takes a few minutes.')
    where = 'templates and cards (default: model_cards)'
    parser.add_argument('folder', nargs='?', type=Path, default=FOLDER, metavar='FOLDER', help=where)
    parser.add_argument('--check', action='store_true', help='write nothing; exit 1 and name the cards that are stale')
    parser.add_argument('--stored-costs', action='store_true', help='take the costs from costs.json')
    args = parser.parse_args(argv)
    make = check_cards if args.check else write_cards
    try:
        names = make(args.folder, recount=not args.stored_costs)
    except ReparamError as error:
        raise SystemExit(str(error)) from None
    for name in names:
        print(f'{"stale" if args.check else "written"}: {name}')
    if not names:
        print('all cards are current')
    return 1 if args.check and names else 0


if __name__ == '__main__':
    sys.exit(main())
