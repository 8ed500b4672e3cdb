"""The table of planted faults is current, and its results say that the tests are a net."""

import csv

from mutations import MUTATIONS, RESULTS, ROOT


def test_every_fault_can_be_planted():
    assert len(MUTATIONS) == len({mutation.name for mutation in MUTATIONS}) == 50
    texts = {path: (ROOT / path).read_text() for path in {mutation.path for mutation in MUTATIONS}}
    for mutation in MUTATIONS:
        assert texts[mutation.path].count(mutation.old) == 1, mutation.name
        assert mutation.new != mutation.old, mutation.name


def test_every_named_test_is_there():
    for mutation in MUTATIONS:
        for test in mutation.selection:
            path, _, name = test.partition('::')
            assert f'\ndef {name}' in (ROOT / path).read_text(), test


def test_nearly_all_are_caught():
    with open(RESULTS, newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['name'], row['file']) for row in rows] == [(each.name, each.path) for each in MUTATIONS]
    assert {row['caught'] for row in rows} <= {'yes', 'no'}
    assert all(bool(row['by']) == (row['caught'] == 'yes') for row in rows)
    assert sum(row['caught'] == 'yes' for row in rows) >= 48
