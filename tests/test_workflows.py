"""Every cell of workflows.csv: a workflow is right with a variant, or refused with a remedy."""

import itertools

import pytest
from stand_in import BRANCHED
from workflows import WORKFLOWS, outcome, read_table

from timm_reparam.variants import VARIANTS


def test_the_table_has_every_workflow() -> None:
    assert list(read_table()) == list(itertools.product(WORKFLOWS, VARIANTS))


@pytest.mark.filterwarnings('ignore:.*without pretrained weights')  # of RefConv
@pytest.mark.filterwarnings('ignore:.*Tracer|Converting a tensor:Warning')
@pytest.mark.parametrize(
    'name, variant',
    [  # the compilers see each layer in the tests of the layers, too; lists of branches take turns
        pytest.param(
            name,
            variant,
            marks=pytest.mark.slow
            if ('compile' in name and variant not in ('dyconv', 'orepaconv'))
            or (variant in BRANCHED and variant != BRANCHED[number % len(BRANCHED)])
            else [],
        )
        for number, name in enumerate(WORKFLOWS)
        for variant in VARIANTS
    ],
)
def test_workflow(name: str, variant: str) -> None:
    assert outcome(name, variant) == read_table()[name, variant]
