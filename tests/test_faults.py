"""Every planted fault is found, and no right fusion is refused; see faults.py."""

import itertools

import pytest
import torch
from faults import DTYPES, FAULTS, Fault, found, right

from timm_reparam import verify_fusion
from timm_reparam.variants import VARIANTS

# every fault in every variant, at every place, in every dtype
ALL = [
    (fault, place, variant, dtype)
    for fault in FAULTS
    for variant, dtype in itertools.product(fault.variants, DTYPES)
    for place in fault.places
]
# every fault once; the variant, the place and the dtype change from one to the next
SOME = [
    (fault, *(choices[number % len(choices)] for choices in (fault.places, fault.variants, DTYPES)))
    for number, fault in enumerate(FAULTS)
]


def identifier(value: object) -> str:
    return str(value).removeprefix('torch.')


@pytest.mark.parametrize('dtype', DTYPES, ids=identifier)
@pytest.mark.parametrize('variant', VARIANTS)
def test_the_right_fusion_is_verified(variant: str, dtype: torch.dtype) -> None:
    model, fused, x = right(variant, dtype)
    report = verify_fusion(model, fused, inputs=x)
    assert report.passed, report
    names = {layer.name: layer for layer in report.layers}
    assert {'blocks.1.conv1', 'block', 'again', 'spare', 'reflect', 'same'} <= names.keys()
    assert not names['spare'].num_inputs and all(names[name].num_inputs for name in names.keys() - {'spare'})
    assert names['again'].num_inputs == 2 * len(x), 'both calls'
    assert ('up' in names) == (variant in ('doconv', 'refconv'))


@pytest.mark.parametrize('fault, place, variant, dtype', SOME, ids=identifier)
def test_a_planted_fault_is_found(fault: Fault, place: str, variant: str, dtype: torch.dtype) -> None:
    said = found(fault, place, variant, dtype)
    assert said, 'a planted fault passes'
    # by the name of the layer, or of the module beside the layers
    assert place.removesuffix('.act').partition('.attention')[0] in said


@pytest.mark.slow
@pytest.mark.parametrize('fault, place, variant, dtype', [case for case in ALL if case not in SOME], ids=identifier)
def test_a_planted_fault_is_found_everywhere(fault: Fault, place: str, variant: str, dtype: torch.dtype) -> None:
    assert found(fault, place, variant, dtype)


def test_there_are_many_kinds_of_faults() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 40
