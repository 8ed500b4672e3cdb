"""The benchmark beside reference implementations: what it takes out of their files, and where it puts it."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from timm_reparam import plan_conversion
from timm_reparam.layers import RefConv2d

sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
import map_rates  # noqa: E402
import training_step  # noqa: E402

SCRIPT = """
import torch
import a_package_of_nobody, math
from another_of_nobody import thing
from torch import nn

def _make(n):
    return n
_one = _make(1)
data = thing.load()
raise SystemExit('a training script that ran')

class Other(nn.Module):
    pass

class DOConv2d(nn.Conv2d):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.scale = nn.Parameter(torch.full((_one,), math.pi))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / 'code').mkdir()
    (tmp_path / 'code' / 'do_conv_pytorch.py').write_text(SCRIPT)
    (tmp_path / 'acb.py').write_text('# the class is elsewhere')
    return tmp_path


def test_references_are_found_and_put_in_place(folder: Path):
    """Exactly where the variant has its layers, and nothing of the script around the class runs."""
    found = training_step.find_references([folder])
    assert set(found) == {'DOConv2d', 'CondConv2d'}
    model = training_step.build_reference('resnet10t', 'DOConv2d', found['DOConv2d'], num_classes=2)
    places = {name for name, module in model.named_modules() if type(module) is found['DOConv2d']}
    plan = plan_conversion(timm.create_model('resnet10t', num_classes=2), 'doconv')
    assert places == {name for name, reason in plan.items() if not reason}


def test_reference_that_cannot_run_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The others are measured beside the stock model, by their names."""

    class Refusing(nn.Conv2d):
        def forward(self, x):
            raise RuntimeError('view size is not compatible\nwith anything')

    monkeypatch.setitem(
        training_step.ROWS, 'resnet10t', ([('acconv', {'branch_norm': 'none'})], ['DOConv2d', 'Dynamic_conv2d'])
    )
    found = {**training_step.find_references([folder]), 'Dynamic_conv2d': Refusing}
    profiles, left_out = training_step.measure(
        'resnet10t', found, 'cpu', 2, train=True, runs=1, warmup=0, batch_size=2, input_size=(3, 32, 32)
    )
    assert left_out == {'reference Dynamic_conv2d': 'view size is not compatible'}
    assert [profile.name for profile in profiles] == [
        'resnet10t',
        "resnet10t_acconv, branch_norm='none'",
        'reference DOConv2d',
    ]
    assert all(profile.reference == 'resnet10t' and profile.step_ratio > 0 for profile in profiles)


@pytest.mark.parametrize('groups', [1, 2, 6])
def test_rates_of_a_map_are_those_of_gradient_descent(groups: int):
    """A step of the map by its gradient moves the kernels by P times their own gradient, P's eigenvalues the rates."""
    torch.manual_seed(0)
    layer = RefConv2d(6, 6, 3, groups=groups, bias=False).double()

    rows = [
        torch.autograd.grad(element, layer.map_weight, retain_graph=True)[0].flatten()
        for element in layer.equivalent_kernel().flatten()
    ]
    jacobian = torch.stack(rows)
    expected = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    found = map_rates.map_rates(layer).repeat(layer.map_weight.shape[1], 1).flatten().sort().values
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
    ((name, linked, ratio, slow),) = map_rates.rows_of(nn.Sequential(layer))
    assert (name, linked) == ('0', groups) and ratio > 1 and 0 <= slow < 1
