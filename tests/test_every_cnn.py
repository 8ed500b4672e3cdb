"""Every architecture family of timm against the table tests/every_cnn.csv, which `python tests/every_cnn.py` writes."""

import every_cnn
import pytest
import torch

from timm_reparam.variants import VARIANTS

TABLE = every_cnn.read()
ARCHITECTURES = sorted({architecture for architecture, _ in TABLE})
# even kernels, blocks that fold themselves (all of the convolutions, or some), SAME padding in groups of several sizes
IN_HALF_PRECISION = (
    *('convnext_zepto_rms', 'cspnext_tiny', 'densenet121', 'edgenext_xx_small', 'ghostnet_050', 'lcnetv2_small'),
    *('mobilenetv3_small_050', 'regnetx_002', 'repghostnet_050', 'resnetv2_18', 'skresnet18', 'starnet_s050'),
)


def check(architecture: str) -> None:
    expected = [row for (name, _), row in TABLE.items() if name == architecture]
    assert every_cnn.rows(architecture) == expected


def test_the_table_names_every_module_of_timm_and_every_variant() -> None:
    assert {row['module'] for row in TABLE.values()} == set(every_cnn.timm_modules())
    assert TABLE.keys() == {(architecture, variant) for architecture in ARCHITECTURES for variant in VARIANTS}
    assert set(every_cnn.ALSO) < set(ARCHITECTURES)


def test_nothing_fails_and_what_stays_plain_is_explained() -> None:
    for key, row in TABLE.items():
        assert int(row['converted']) or row['plain'], key
        verdicts = [row[column] for column in ('lift', 'fuse', 'strict', 'reparameterize')]
        if row['converted'] == '0':
            assert verdicts == ['-', '-', '-', '-'], key
        else:
            assert verdicts == ['exact', 'exact', '-' if row['variant'] == 'dyconv' else 'loads', 'exact'], key


def test_a_few_rows_are_what_they_were() -> None:
    """Even kernels, large depthwise ones, a stem of patches; the others with -m slow."""
    check('convnext_zepto_rms')


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_every_row_is_what_it_was(architecture: str) -> None:
    check(architecture)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_holds_the_smallest_of_every_module() -> None:
    assert ARCHITECTURES == sorted(every_cnn.architectures())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('architecture', ARCHITECTURES)
def test_the_right_fusion_is_verified(architecture: str) -> None:
    for variant, report in every_cnn.reports(architecture):
        assert report.passed, f'{variant}: {report}'


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bfloat16', 'float16'])
@pytest.mark.parametrize('architecture', IN_HALF_PRECISION)
def test_the_right_fusion_is_verified_in_half_precision(architecture: str, dtype: torch.dtype) -> None:
    for variant, report in every_cnn.reports(architecture, dtype=dtype):
        assert report.passed, f'{variant}: {report}'
