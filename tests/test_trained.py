"""The trained pairs in tests/benchmarks/zoo: they load, they are verified, and their cards state how they compare."""

import sys
from pathlib import Path

import pytest
import timm

from timm_reparam.hub import load_checkpoint, render_card, verify
from timm_reparam.hub.facts import read_facts, sha256_of
from timm_reparam.hub.gate import check_card
from timm_reparam.results import Summary, format_summary, of_variant, read_results, summarize
from timm_reparam.variants import VARIANTS, variant_of

sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
import accuracy  # noqa: E402

ZOO = Path(__file__).parent / 'benchmarks' / 'zoo'
RESULTS = Path(__file__).parents[1] / 'model_cards' / 'results' / 'cifar10.csv'
# of the methods that the accuracy benchmark was run with
TRAINED = [variant for variant in VARIANTS if of_variant(summarize(read_results(RESULTS)), variant)]
PAIRS = [(ZOO / f'resnet10t_{variant}.cifar10', ZOO / f'resnet10t_{variant}.cifar10_fused') for variant in TRAINED]


def test_there_is_a_pair_of_every_variant_with_results_and_nothing_else():
    assert len(TRAINED) >= 4
    assert sorted(ZOO.iterdir()) == sorted(folder for pair in PAIRS for folder in pair)
    assert sum(file.stat().st_size for file in ZOO.rglob('*')) < 3_000_000


@pytest.mark.filterwarnings('error', 'ignore::ResourceWarning')  # of files that earlier tests left to the collector
@pytest.mark.parametrize('folder, fused', PAIRS, ids=TRAINED)
def test_a_trained_pair(folder: Path, fused: Path):
    assert verify(folder).passed
    facts = read_facts(folder)
    assert facts is not None and facts['metrics']['fused']['top1'] == facts['metrics']['train_time']['top1']
    table = format_summary([Summary.from_dict(entry) for entry in facts['results']])
    expected = accuracy.compared_with(facts['recipe'], summarize(read_results(RESULTS)))
    assert expected and facts['results'] == expected
    for form in (folder, fused):
        assert check_card(form, sha256_of(form / 'model.safetensors')) == []
        card = (form / 'README.md').read_text(encoding='utf-8')
        assert card == render_card(form), 'made with older templates: write what render_card returns'
        assert table in card
    model = load_checkpoint(fused)
    if facts['variant'] != 'dyconv':
        stock = timm.create_model('resnet10t', **timm.models.get_model_args(model))
        assert [type(module) for module in model.modules()] == [type(module) for module in stock.modules()]
    assert variant_of(load_checkpoint(folder)) == facts['variant']
