"""Every cell of workflows.csv: a workflow is right with a variant, or refused with a remedy."""

import itertools

import pytest
from workflows import WORKFLOWS, outcome, read_table

from timm_reparam.variants import VARIANTS


def test_the_table_has_every_workflow() -> None:
    assert list(read_table()) == list(itertools.product(WORKFLOWS, VARIANTS))


@pytest.mark.filterwarnings('ignore:.*without pretrained weights')  # of RefConv
@pytest.mark.filterwarnings('ignore:.*Tracer|Converting a tensor:Warning')
@pytest.mark.parametrize(
    'name, variant',
    [  # the compilers see each layer in the tests of the layers, too
        pytest.param(
            name,
            variant,
            marks=pytest.mark.slow if 'compile' in name and variant not in ('dyconv', 'orepaconv') else [],
        )
        for name, variant in itertools.product(WORKFLOWS, VARIANTS)
    ],
)
def test_workflow(name: str, variant: str) -> None:
    assert outcome(name, variant) == read_table()[name, variant]
