"""Results files: what is read and refused, and the arithmetic against numpy's and scipy's."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from timm_reparam import ReparamError
from timm_reparam.results import (
    COLUMNS,
    Summary,
    format_summary,
    read_results,
    setup_words,
    student_quantile,
    summarize,
)


def row(method: str, seed: float, top1: float | None, **changes: Any) -> dict[str, Any]:
    """A run's row, with empty cells where nothing else is said."""
    given = dict(model='resnet18', method=method, protocol='scratch', epochs=40, seed=seed, top1=top1, size=32)
    given |= dict(train_parameters=1500, fused_parameters=1000, step_ratio=1.25, data_sha256='aa', batch_size=128)
    return {**dict.fromkeys(COLUMNS), **given, **changes}


def write(path: Path, rows: list[dict[str, Any]], columns: Any = COLUMNS) -> Path:
    with open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(columns), extrasaction='ignore')
        writer.writeheader()
        writer.writerows(rows)
    return path


def entry(summaries: list[Summary], method: str, against: str | None = 'scratch', **fields: Any) -> Summary:
    """The one entry with these fields."""
    wanted = dict(method=method, against=against, **fields)
    found = [each for each in summaries if all(getattr(each, name) == value for name, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize('degrees', [*range(1, 13), 29, 30, 99, 100, 1001])
def test_student_quantile(degrees: int):
    for probability in (0.5, 0.6, 0.9, 0.95, 0.975, 0.995, 0.9999):
        expected = stats.t.ppf(probability, degrees)
        assert student_quantile(probability, degrees) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize('probability, degrees', [(0.4, 3), (1.0, 3), (0.975, 0), (float('nan'), 3)])
def test_no_such_quantile(probability: float, degrees: int):
    with pytest.raises(ReparamError, match='expected at least'):
        student_quantile(probability, degrees)


def test_paired_difference():
    """Pairs are runs of one seed, not of one place in the file; the interval is the paired t-test's."""
    stock, variant = np.array([90.1, 90.9, 89.7, 90.4]), np.array([90.8, 91.2, 90.5, 90.6])
    rows = [row('stock', seed, value, step_ratio=1.0, train_parameters=1000) for seed, value in enumerate(stock)]
    rows += [row('doconv', seed, variant[seed]) for seed in (2, 0, 3, 1)]
    summaries = summarize(rows)
    assert [summary.method for summary in summaries] == ['stock', 'doconv']
    base, found = summaries
    assert (base.n, base.against, base.difference, base.low, base.pairs) == (4, None, None, None, 0)
    assert base.mean == pytest.approx(stock.mean()) and base.std == pytest.approx(stock.std(ddof=1))
    expected = stats.ttest_rel(variant, stock)
    low, high = expected.confidence_interval(0.95)
    assert (found.n, found.pairs, found.against) == (4, 4, 'scratch')
    assert found.difference == pytest.approx((variant - stock).mean())
    assert (found.low, found.high) == pytest.approx((low, high))
    assert high - low < stats.ttest_ind(variant, stock).confidence_interval(0.95).high * 2  # pairing tells more
    assert (found.step_ratio, found.train_parameters, found.fused_parameters) == (1.25, 1500, 1000)


def test_only_pairs_count():
    """Neither another seed, nor other epochs, sizes or models are a pair; the mean is of all runs."""
    rows = [row('stock', seed, 90.0 + seed) for seed in (0, 1, 2)]
    rows += [row('stock', 5, 70.0, epochs=20), row('stock', 5, 60.0, size=64), row('stock', 5, 50.0, model='resnet34')]
    rows += [row('doconv', 1, 91.5), row('doconv', 2, 92.7), row('doconv', 5, 99.0)]
    rows += [row('acconv', 1, 91.4), row('acconv', 5, 92.0), row('dyconv', 5, 93.0)]
    summaries = summarize(rows)
    doconv, acconv, dyconv = (entry(summaries, method) for method in ('doconv', 'acconv', 'dyconv'))
    assert (doconv.n, doconv.pairs) == (3, 2) and doconv.mean == pytest.approx(np.mean([91.5, 92.7, 99.0]))
    assert doconv.difference == pytest.approx(0.6)
    assert doconv.high - doconv.difference == pytest.approx(stats.t.ppf(0.975, 1) * 0.1)  # of 0.5 and 0.7
    assert acconv.pairs == 1 and acconv.difference == pytest.approx(0.4) and acconv.low is acconv.high is None
    assert (dyconv.n, dyconv.pairs, dyconv.std) == (1, 0, None) and dyconv.difference is dyconv.low is None


def test_refocusing_is_compared_twice():
    """With stock that was fine-tuned for as long, and with stock from scratch for as long."""
    rows = [row('stock', seed, 90.0, epochs=40) for seed in (0, 1)]
    rows += [row('stock', seed, 80.0, epochs=20) for seed in (0, 1)]
    rows += [row('stock', seed, 91.0, epochs=40, protocol='finetune') for seed in (0, 1)]
    rows += [row('refconv', seed, 91.5 + seed, epochs=40, protocol='refocus') for seed in (0, 1)]
    rows += [row('doconv', seed, 91.2, epochs=40, protocol='finetune') for seed in (0, 1)]
    summaries = summarize(rows)
    assert [(s.method, s.protocol, s.against, s.epochs) for s in summaries] == [
        ('stock', 'scratch', None, 20),
        ('stock', 'scratch', None, 40),
        ('refconv', 'refocus', 'finetune', 40),
        ('refconv', 'refocus', 'scratch', 40),
        ('stock', 'finetune', None, 40),
        ('doconv', 'finetune', 'finetune', 40),
    ]
    assert entry(summaries, 'refconv', 'finetune').difference == pytest.approx(1.0)
    assert entry(summaries, 'refconv', 'scratch').difference == pytest.approx(2.0)
    assert entry(summaries, 'doconv', 'finetune').difference == pytest.approx(0.2)


def test_read(tmp_path: Path):
    rows = [row('stock', 0, 90.25), row('acconv_none', 0, 91.5, step_ratio=None, fused_parameters=None)]
    found = read_results(write(tmp_path / 'r.csv', rows))
    assert found == rows  # numbers as numbers, None where a cell is empty
    assert summarize(found) == summarize(rows)
    unknown = entry(summarize(found), 'acconv_none')
    assert unknown.step_ratio is None and unknown.fused_parameters is None


@pytest.mark.parametrize(
    'rows, words',
    [
        ([], 'found none'),
        ([row('stock', 0, None)], 'line 2: top1: expected a value'),
        ([row('stock', 0, float('nan'))], "line 2: top1: expected a finite number, got 'nan'"),
        ([row('stock', 0, 90.0), row('stock', 1.5, 90.0)], "line 3: seed: expected int, got '1.5'"),
        ([row('repvgg', 0, 90.0)], "line 2: method: expected one of stock, .*, got 'repvgg'"),
        ([row('stock', 0, 90.0, protocol='distil')], "protocol: expected one of scratch, .*, got 'distil'"),
        ([row('stock', 0, 90.0), row('stock', 0, 91.0)], 'found twice: resnet18, stock, scratch, 40 epochs.*, seed 0'),
        ([row('stock', 0, 90.0), row('doconv', 0, 91.0, data_sha256='bb')], 'resnet18.* data_sha256 aa, bb'),
    ],
)
def test_refused(tmp_path: Path, rows: list[dict[str, Any]], words: str):
    with pytest.raises(ReparamError, match=words):
        read_results(write(tmp_path / 'r.csv', rows))


def test_refused_files(tmp_path: Path):
    columns = [column for column in COLUMNS if column not in ('seed', 'size')]
    with pytest.raises(ReparamError, match=r'r\.csv: .*lacks the columns seed, size'):
        read_results(write(tmp_path / 'r.csv', [row('stock', 0, 90.0)], columns))
    with pytest.raises(ReparamError, match='none.csv: cannot be read'):
        read_results(tmp_path / 'none.csv')
    (tmp_path / 'empty.csv').touch()
    with pytest.raises(ReparamError, match='lacks the columns model'):
        read_results(tmp_path / 'empty.csv')
    other_data = [row('stock', 0, 90.0), row('stock', 0, 90.0, model='resnet34', data_sha256='bb')]
    assert len(read_results(write(tmp_path / 'r.csv', other_data))) == 2  # each model on its own


def test_runs_of_different_models():
    with pytest.raises(ReparamError, match='doconv, .*same train_parameters, got 1500, 1600'):
        summarize([row('doconv', 0, 90.0), row('doconv', 1, 90.0, train_parameters=1600)])


def test_table():
    rows = [row('stock', seed, 90.0 + seed, train_parameters=1000, step_ratio=1.0) for seed in (0, 1)]
    rows += [row('stock', 0, 91.0, protocol='finetune', step_ratio=None, train_parameters=None)]
    rows += [row('doconv', 0, 90.5), row('doconv', 1, 91.7), row('doconv', 7, 91.7)]
    rows += [row('refconv', 0, 91.25, protocol='refocus')]
    half = stats.t.ppf(0.975, 1) * 0.1
    assert format_summary(summarize(rows)).splitlines() == [
        '| method | epochs | runs | top-1 (%) | difference to stock (95 % interval) | training step '
        '| parameters, train-time / fused |',
        '| --- | ---: | ---: | ---: | ---: | ---: | ---: |',
        '| `stock` | 40 | 2 | 90.50 ± 0.71 |  | 1.00 | 1.00 k / 1.00 k |',
        f'| `doconv` | 40 | 3 | 91.30 ± 0.69 | +0.60 [{0.6 - half:+.2f}, {0.6 + half:+.2f}] (2 pairs) | 1.25 '
        '| 1.50 k / 1.00 k |',
        '| `refconv`, refocus | 40 | 1 | 91.25 | +0.25 (one pair, no interval) to finetune | 1.25 | 1.50 k / 1.00 k |',
        '| `refconv`, refocus | 40 | 1 | 91.25 | +1.25 (one pair, no interval) to scratch | 1.25 | 1.50 k / 1.00 k |',
        '| `stock`, finetune | 40 | 1 | 91.00 |  |  | ? / 1.00 k |',
    ]
    two = format_summary(summarize([*rows, row('doconv', 0, 90.0, model='resnet34')]))
    assert (
        two.startswith('| model | method |') and '\n| `resnet34`, 32 px | `doconv` | 40 | 1 | 90.00 | no pairs |' in two
    )


def test_the_committed_results_are_those_of_the_table():
    folder = Path(__file__).parents[1] / 'model_cards' / 'results'
    table = format_summary(summarize(read_results(folder / 'cifar10.csv')))
    assert table in (folder / 'README.md').read_text(encoding='utf-8')


def test_summaries_come_back_from_json():
    rows = [row('stock', 0, 90.0, train_parameters=1000), row('doconv', 0, 91.0), row('doconv', 1, 92.0)]
    for summary in summarize(rows):
        assert Summary.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary


@pytest.mark.parametrize(
    'changes, words',
    [
        (None, 'expected a dict'),
        ({'model': ...}, r"missing: \['model'\]"),
        ({'top1': 90.0}, r"unknown: \['top1'\]"),
        ({'n': 1.5}, 'n: expected int, got 1.5'),
        ({'mean': '90'}, 'mean: expected float or int'),
        ({'mean': True}, 'mean: expected float or int'),
        ({'std': '0'}, 'std: expected float or None or int'),
        ({'method': 'other'}, 'method: expected one of stock, doconv'),
        ({'protocol': 'other'}, 'protocol: expected one of scratch'),
        ({'against': 'other'}, 'against: expected one of scratch'),
        ({'model': 'a`|b'}, 'model: expected the name of an architecture'),
        ({'arguments': 'a=1`'}, 'arguments: expected name=value'),
        ({'arguments': 'a=1\n# owned'}, 'arguments: expected name=value'),
        ({'arguments': 'a|b'}, 'arguments: expected name=value'),
        ({'options': 'a`b'}, 'options: expected name=value'),
    ],
)
def test_summaries_of_the_wrong_form(changes: dict[str, Any] | None, words: str):
    values = {**summarize([row('stock', 0, 90.0)])[0].to_dict(), **(changes or {})}
    given = None if changes is None else {name: value for name, value in values.items() if value is not ...}
    with pytest.raises(ReparamError, match=words):
        Summary.from_dict(given)


def test_networks_of_one_architecture_are_compared_each_with_its_own(tmp_path: Path):
    wide, narrow = ({'options': f'{{"model_kwargs": {{"width": {width}, "kind": [1, 2]}}}}'} for width in (64, 8))
    rows = [row('stock', 0, 90.0, train_parameters=1000, **wide), row('doconv', 0, 91.0, **wide)]
    assert setup_words(summarize(rows)) == {('resnet18', 'width=64 kind=[1,2]', 32): '`resnet18`, 32 px'}
    rows += [row('stock', 0, 70.0, train_parameters=100, **narrow), row('doconv', 0, 73.0, **narrow)]
    summaries = summarize(read_results(write(tmp_path / 'r.csv', rows)))
    assert [(one.arguments[:8], one.difference) for one in summaries if one.method == 'doconv'] == [
        ('width=64', 1.0),
        ('width=8 ', 3.0),
    ]
    lines = format_summary(summaries).splitlines()
    assert [line.split(' | ')[0] for line in lines[2:]] == [
        *['| `resnet18 width=64`, 32 px'] * 2,
        *['| `resnet18 width=8`, 32 px'] * 2,
    ]


def test_options_of_the_layers_are_told_apart(tmp_path: Path):
    """Each set of options is compared with the same stock runs; what does not concern the layers is no option."""
    given = [
        '{"conv_options": {}, "map_lr": 0.0, "warmup": 1.0}',
        '{"conv_options": {"gamma_init": 1.0, "bias": [1, 2]}}',
        '{"map_lr": 3.0}',
    ]
    rows = [row('stock', seed, 90.0 + seed, options=given[0]) for seed in (0, 1)]
    rows += [
        row('acconv', seed, 91.0 + gain + seed, options=options)
        for gain, options in enumerate(given)
        for seed in (0, 1)
    ]
    summaries = summarize(read_results(write(tmp_path / 'r.csv', rows)))
    assert [(one.label, one.difference, one.pairs) for one in summaries[1:]] == [
        ('acconv', 1.0, 2),
        ('acconv gamma_init=1.0 bias=[1,2]', 2.0, 2),
        ('acconv map_lr=3.0', 3.0, 2),
    ]
    assert '\n| `acconv gamma_init=1.0 bias=[1,2]` | 40 | 2 |' in format_summary(summaries)
    with pytest.raises(ReparamError, match='found twice: resnet18, acconv map_lr=3.0, scratch'):
        read_results(write(tmp_path / 'r.csv', [*rows, rows[-1]]))


@pytest.mark.parametrize('options', ['{', '[]', '{"model_kwargs": 3}', '{"conv_options": [1]}'])
def test_options_that_are_no_json_object(tmp_path: Path, options: str):
    with pytest.raises(ReparamError, match='line 2: options: expected a json object'):
        read_results(write(tmp_path / 'r.csv', [row('stock', 0, 90.0, options=options)]))
