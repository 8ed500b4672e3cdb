"""A method of somebody's own: one class and one line of the table, and everything else takes it."""

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from hub.server import HubServer
from stand_in import add_stock, images, randomise
from timm.models import _registry as timm_registry
from timm.models import model_entrypoint

from timm_reparam import fuse_model, is_variant, verify_fusion
from timm_reparam.cli import main
from timm_reparam.hub import publish, pull, save_pair, verify, verify_pair
from timm_reparam.layers import Method, ReparamConv2d
from timm_reparam.models import register_families, register_variant
from timm_reparam.models._backbones import BACKBONES
from timm_reparam.plot import plot_gains
from timm_reparam.results import of_variant, summarize
from timm_reparam.variants import VARIANTS, Variant

TINY = dict(num_classes=4, channels=(8, 8, 8, 8), stem_width=4)
NAMES = ('resnet10t_toyconv.t', 'resnet10t_toyconv.t_fused')


class ToyConv2d(ReparamConv2d):
    """``y = W*x + s_p (W_p*x) + s_f (W_f*x)``, W_p 1x1, W_f of W's size, ``s = gamma / sqrt(var + eps)``.

    var is the variance of that branch's output: the batch's in training, the running one in evaluation.
    """

    method = Method(
        name='Toy',
        summary='A pointwise branch and one of full size, each over its own deviation.',
        title='A Toy of Two Branches',
        authors='Doe, Jane',
        venue='Journal of Examples',
        year='2020',
        arxiv='0000.00000',
    )

    def __init__(self, *args, eps: float = 1e-5, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.eps = eps
        shape, factory = self.weight.shape, dict(device=self.weight.device, dtype=self.weight.dtype)
        self.point_weight = nn.Parameter(torch.empty(*shape[:2], 1, 1, **factory))
        self.full_weight = nn.Parameter(torch.empty(shape, **factory))
        self.gamma = nn.Parameter(torch.empty(2, shape[0], **factory))
        self.register_buffer('running_var', torch.empty(2, shape[0], **factory))
        self._complete = True
        self._reset_variant_parameters('scratch')

    @classmethod
    def selects(cls, conv: nn.Conv2d, is_stem: bool) -> bool:
        return max(conv.kernel_size) > 1 and all(side % 2 for side in conv.kernel_size)

    @torch.no_grad()
    def _init_variant_parameters(self, init: str) -> None:
        for weight in (self.point_weight, self.full_weight):
            nn.init.kaiming_uniform_(weight, a=5**0.5)
        self.running_var.fill_(1)
        self.gamma.fill_(0 if init == 'lift' else 0.5)

    @torch.no_grad()
    def _close_gates(self) -> None:
        self.gamma.zero_()

    def _kernels(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = (side // 2 for side in self.kernel_size)
        return F.pad(self.point_weight, (columns, columns, rows, rows)), self.full_weight

    def _compose(self) -> torch.Tensor:
        scales = self.gamma * torch.rsqrt(self.running_var + self.eps)
        return self.weight + sum(s[:, None, None, None] * k for s, k in zip(scales, self._kernels()))

    def _sum_of_branches(self, x: torch.Tensor) -> torch.Tensor:
        branches = [self._convolve(x, kernel, None) for kernel in self._kernels()]
        variances = self.running_var
        if self.training:
            variances = torch.stack([branch.var((0, 2, 3), unbiased=False) for branch in branches])
            self.running_var.lerp_(variances.detach(), 0.1)
        scales = self.gamma / (variances + self.eps).sqrt()
        y = self._convolve(x, self.weight, self.bias)
        return y + sum(s[:, None, None] * branch for s, branch in zip(scales, branches))

    def branch_form(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return self._sum_of_branches

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._sum_of_branches(input) if self.training else super().forward(input)


@pytest.fixture(scope='module', autouse=True)
def toy() -> Iterator[None]:
    """The line of the table, and the families that come of it; timm's registry is as it was afterwards."""
    patch = pytest.MonkeyPatch()
    for name, table in vars(timm_registry).items():
        if name.startswith('_m') and isinstance(table, dict | set):
            patch.setattr(timm_registry, name, copy.copy(table))
    patch.setitem(VARIANTS, 'toyconv', Variant((ToyConv2d,), 'tab:pink'))
    register_families()
    yield
    patch.undo()
    for name in [name for name in sys.modules if name.endswith('_toyconv')]:
        del sys.modules[name]


def train_one_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.train().parameters(), 0.1)
    F.cross_entropy(model(images(8, 3, 32, 32)), torch.arange(8) % 4).backward()
    optimizer.step()
    model.eval()


@pytest.fixture(scope='module')
def trained() -> nn.Module:
    """A small model away from every start, after one step; tests leave it as it is."""
    torch.manual_seed(0)
    model = randomise(timm.create_model('resnet10t_toyconv', **TINY), seed=1)
    train_one_step(model)
    return model


@pytest.fixture(scope='module')
def pair(trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    data_config = dict(input_size=(3, 32, 32), crop_pct=1.0)
    return save_pair(
        trained, tmp_path_factory.mktemp('zoo'), tag='t', facts={'license': 'mit'}, data_config=data_config
    )


def test_every_backbone_is_registered_and_listed(capsys: pytest.CaptureFixture) -> None:
    for backbone, stock_names in BACKBONES.items():
        names = [f'{stock}_toyconv' for stock in stock_names]
        assert sorted(timm.list_models(module=f'{backbone}_toyconv')) == sorted(names)
        assert main(['list', f'{backbone}*_toyconv']) == 0
        printed = capsys.readouterr().out.split()
        assert printed and set(printed) <= set(names)
    assert model_entrypoint('resnet18_toyconv').__module__ == 'timm_reparam.models.resnet_toyconv'
    assert register_variant('convnext_atto', 'toyconv') == 'convnext_atto_toyconv'
    assert timm.list_models(module='convnext_toyconv') == ['convnext_atto_toyconv']


def test_lift_is_exact(hub: HubServer, cache_dir: Path) -> None:
    expected = add_stock(hub, 'resnet10t.c3_in1k')
    model = timm.create_model('resnet10t_toyconv', pretrained=True, cache_dir=cache_dir)
    assert sum(isinstance(module, ToyConv2d) for module in model.modules()) == 11
    x = images(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected(x))
        assert torch.equal(model.train()(x), copy.deepcopy(expected).train()(x))


def test_a_step_moves_what_the_method_adds() -> None:
    model = timm.create_model('resnet10t_toyconv', **TINY, conv_options=dict(eps=1e-4))
    layer: ToyConv2d = next(module for module in model.modules() if is_variant(module))
    assert layer.eps == 1e-4
    before = copy.deepcopy(layer.state_dict())
    train_one_step(model)
    unmoved = [name for name, value in layer.state_dict().items() if torch.equal(value, before[name])]
    assert unmoved == []


def test_fusion_is_exact_and_verified(trained: nn.Module) -> None:
    fused = fuse_model(trained)
    stock = timm.create_model('resnet10t', **TINY)
    stock.load_state_dict(fused.state_dict())
    x = images(4, 3, 32, 32, seed=2)
    with torch.no_grad():
        expected = trained(x)
        torch.testing.assert_close(stock.eval()(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fuse_model(trained, fold_bn=True)(x), expected, rtol=1e-4, atol=1e-5)
        for name, layer in trained.named_modules():
            assert not is_variant(layer) or not torch.allclose(fused.get_submodule(name).weight, layer.weight, rtol=0.1)
    report = verify_fusion(trained, fused)
    assert report.passed and len(report.layers) == 11


def test_planted_faults_are_found(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = fuse_model(trained)
    with torch.no_grad():
        fused.layer3[0].conv1.weight[0, 0, 0, 0] += 1e-3
    assert not verify_fusion(trained, fused).passed
    compose = ToyConv2d._compose

    def without_the_pointwise_branch(self: ToyConv2d) -> torch.Tensor:
        scaled = self.gamma[0] * torch.rsqrt(self.running_var[0] + self.eps)
        return compose(self) - scaled[:, None, None, None] * self._kernels()[0]

    monkeypatch.setattr(ToyConv2d, '_compose', without_the_pointwise_branch)
    assert not verify_fusion(trained, fuse_model(trained)).passed


def test_pair_and_cards(pair: tuple[Path, Path]) -> None:
    assert tuple(folder.name for folder in pair) == NAMES
    assert verify_pair(pair[0]).passed
    for folder in pair:
        facts = json.loads((folder / 'training.json').read_text())
        assert (facts['variant'], facts['stock_architecture']) == ('toyconv', 'resnet10t')
        card = (folder / 'README.md').read_text()
        assert ToyConv2d.method.title in card and ToyConv2d.method.summary in card and 'toyconv' in card
    config = json.loads((pair[0] / 'config.json').read_text())
    assert config['model_args']['conv_options'] == {'eps': 1e-5}
    assert json.loads((pair[1] / 'config.json').read_text())['architecture'] == 'resnet10t'


def test_published_and_pulled(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    report = publish(pair[0], 'owner')
    assert report.ok and [result.repo_id for result in report.sent] == [f'owner/{name}' for name in NAMES]
    assert verify(f'owner/{NAMES[0]}').passed
    assert pull(f'owner/{NAMES[1]}', tmp_path).ok
    assert verify_pair(tmp_path / NAMES[0]).passed
    for name in NAMES:
        del hub.repos[f'owner/{name}']


def test_pictures_and_costs(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    to_hex = pytest.importorskip('matplotlib.colors').to_hex
    assert main(['plot', 'kernels', str(pair[0]), str(pair[1]), '--output', str(tmp_path / 'kernels.svg')]) == 0
    assert main(['profile', str(pair[0]), '--runs', '0']) == 0
    assert f'{pair[0]}, fused' in capsys.readouterr().out
    common = dict(model='resnet10t', size=32, protocol='scratch', epochs=1, seed=0, top5=None, options=None)
    rows = [
        {**common, 'method': method, 'top1': top1, 'step_ratio': 1.5, 'train_parameters': 1, 'fused_parameters': 1}
        for method, top1 in (('stock', 50.0), ('toyconv', 51.0))
    ]
    summaries = summarize(rows)
    assert of_variant(summaries, 'toyconv') == summaries
    plot_gains(summaries, tmp_path / 'gains.svg')
    assert to_hex('tab:pink') in (tmp_path / 'gains.svg').read_text()
