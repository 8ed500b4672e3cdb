"""Pictures: the numbers behind them against direct computations, and files that are whole, repeatable and readable."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from stand_in import random_model, randomise
from timm.utils import update_summary
from torch import nn

from timm_reparam import ACBlock2d, ReparamError, convert_model, fuse_model
from timm_reparam.plot import (
    Curve,
    _line_styles,
    check_plot,
    commonest_kernel_size,
    kernel_skeletons,
    plot_curves,
    plot_gains,
    plot_kernels,
    plot_profiles,
    read_curves,
)
from timm_reparam.profile import Profile, compare_profiles
from timm_reparam.results import Summary

TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
SETTING = dict(runs=20, batch_size=32, input_size=(3, 8, 8), device='cpu', dtype='float32', precision='float32')
PROFILES = [
    Profile('a', 10, 10, 10, 1.0, 0.1, **SETTING, reference='a', latency_ratio=1.0, latency_ratio_spread=0.0),
    Profile('b', 10, 10, 10, 1.5, 0.1, **SETTING, reference='a', latency_ratio=1.5, latency_ratio_spread=0.1),
]


def magnitude(*kernels: torch.Tensor) -> torch.Tensor:
    """The paper's formula, place by place."""
    size = kernels[0].shape[-1]
    mean = torch.zeros(size, size, dtype=torch.float64)
    for kernel in kernels:
        sums = [
            [sum(abs(value) for value in kernel[:, :, i, j].flatten().tolist()) for j in range(size)]
            for i in range(size)
        ]
        largest = max(map(max, sums))
        mean += torch.tensor([[value / largest for value in line] for line in sums], dtype=torch.float64)
    return mean / len(kernels)


def maps(model: nn.Module, *args: Any) -> dict[str, torch.Tensor]:
    return {skeleton.stage: skeleton.magnitude for skeleton in kernel_skeletons(model, *args)}


def test_skeletons_of_a_stock_model():
    model = random_model('resnet10t', **TINY)
    found = kernel_skeletons(model)
    assert [(s.stage, s.layers) for s in found] == [(n, 3 if n == 'act1' else 2) for n in ('act1', *layers(4))]
    weights = dict(model.named_parameters())
    for stage in found:
        names = {'act1': ['conv1.0', 'conv1.3', 'conv1.6']}.get(
            stage.stage, [f'{stage.stage}.0.conv1', f'{stage.stage}.0.conv2']
        )
        expected = magnitude(*(weights[f'{name}.weight'] for name in names))
        assert stage.magnitude.dtype == torch.float64
        torch.testing.assert_close(stage.magnitude, expected, rtol=1e-12, atol=0)


def layers(number: int) -> list[str]:
    return [f'layer{index}' for index in range(1, number + 1)]


@pytest.mark.parametrize('variant', ['acconv', 'doconv', 'refconv'])
def test_skeletons_of_a_variant(variant: str):
    """By the fused kernel, and clearly others than those of its weights."""
    model = random_model('resnet10t', **TINY)
    stock = maps(model)
    model = randomise(convert_model(model, variant), 5).double()
    found, fused = maps(model), maps(fuse_model(model))
    assert found.keys() == stock.keys()
    for stage, values in found.items():
        torch.testing.assert_close(values, fused[stage], rtol=1e-12, atol=0)
        assert (values - stock[stage]).abs().max() > 1e-2
    kernels = [model.get_submodule(f'layer2.0.conv{index}').equivalent_kernel() for index in (1, 2)]
    torch.testing.assert_close(found['layer2'], magnitude(*kernels), rtol=1e-12, atol=0)


def test_skeletons_are_composed_in_float64():
    model = randomise(convert_model(random_model('resnet10t', **TINY), 'acconv'), 5)
    with torch.no_grad():
        for parameter in model.parameters():  # so large beside one another that float32 would lose the smaller ones
            parameter.mul_(1 + 1e4 * (parameter.ndim == 4 and parameter.shape[-1] == 1))
    found = maps(model)
    for stage, values in maps(model.double()).items():
        torch.testing.assert_close(found[stage], values, rtol=1e-12, atol=0)


def test_skeletons_of_dynamic_convolution():
    """By the mean of all kernels; fusing, which scales the attention only, changes nothing."""
    model = randomise(convert_model(random_model('resnet10t', **TINY), 'dyconv'), 5).double()
    found = maps(model)
    layer = model.layer3[0].conv1
    residuals = layer.residual_weight.unflatten(0, (layer.num_kernels - 1, -1))
    kernels = [layer.weight + residual for residual in (*residuals, -residuals.sum(0))]
    mean = torch.stack(kernels).mean(0)
    torch.testing.assert_close(found['layer3'], magnitude(mean, model.layer3[0].conv2.weight), rtol=1e-10, atol=0)
    torch.testing.assert_close(maps(fuse_model(model))['layer3'], found['layer3'], rtol=1e-12, atol=0)


def test_skeletons_of_the_papers_block():
    """One layer, its norms in the kernel; what is inside it does not count by itself."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), ACBlock2d(4, 4, 3)), 2).double()
    found = kernel_skeletons(model)
    assert [(s.stage, s.layers) for s in found] == [('0', 1), ('1', 1)]  # no feature_info: names of the modules
    torch.testing.assert_close(found[1].magnitude, magnitude(model[1].fuse().weight), rtol=1e-12, atol=0)


def test_stages():
    """Kernels of the asked size alone, shared ones once, each in the stage that ends behind it."""
    model = timm.create_model('mobilenetv3_small_050', num_classes=2)
    assert commonest_kernel_size(model) == 5
    assert [(s.stage, s.layers) for s in kernel_skeletons(model)] == [('blocks.3', 5), ('blocks.5', 3)]
    small = [(s.stage, s.layers) for s in kernel_skeletons(model, 3)]
    assert small == [('bn1', 1), ('blocks.0', 1), ('blocks.1', 2)]
    shared = nn.Conv2d(2, 2, 3)
    model = nn.Sequential(shared, shared, nn.Conv2d(2, 2, (1, 3)), nn.ConvTranspose2d(2, 2, 3), nn.Conv2d(2, 2, 5))
    assert commonest_kernel_size(model) == 3
    assert [(s.stage, s.layers) for s in kernel_skeletons(model)] == [('0', 1), ('3', 1)]
    with torch.no_grad():
        shared.weight.zero_()
    assert maps(model)['0'].tolist() == [[0.0] * 3] * 3  # not NaN


def test_every_kind_of_stages():
    """Names of places that are no modules, of the whole model, and convolutions behind the last one."""
    for name in ('hrnet_w18_small', 'tresnet_m', 'inception_v4', 'legacy_xception', 'vgg11', 'densenet121'):
        with torch.device('meta'):
            model = timm.create_model(name)
        found = kernel_skeletons(model, 3)
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        assert sum(skeleton.layers for skeleton in found) == len(convolutions)
        assert 4 <= len(found) <= 8


def test_no_such_kernels(tmp_path: Path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    with pytest.raises(ReparamError, match='Sequential: expected 5x5 convolutions, found 2 of 1x1, 1 of 3x3'):
        kernel_skeletons(model, 5)
    with pytest.raises(ReparamError, match='Linear: expected kxk convolutions with k > 1, found none'):
        kernel_skeletons(nn.Linear(2, 2))
    with pytest.raises(ReparamError, match='second: Linear: expected 3x3 convolutions, found none'):
        plot_kernels([model, nn.Linear(2, 2)], tmp_path / 'k.svg', names=['first', 'second'])
    assert not list(tmp_path.iterdir())


def run(folder: Path, values: list[tuple[int, float, float | None]]) -> Path:
    """A training run's folder, its summary written by timm; each value: epoch, train loss, top-1."""
    folder.mkdir(parents=True)
    for epoch, loss, top1 in values:
        validation = None if top1 is None else dict(loss=1.0, top1=top1, top5=99.0)
        update_summary(epoch, dict(loss=loss), validation, filename=str(folder / 'summary.csv'), lr=0.1)
    return folder


def test_curves(tmp_path: Path):
    """Seeds of one run are one curve, over the epochs that all of them have."""
    runs = [
        run(tmp_path / 'resnet18-doconv-s0', [(0, 2.0, 50.0), (1, 1.0, 60.0), (2, 0.5, 70.0)]),
        run(tmp_path / 'other', [(0, 3.0, 10.0)]),
        run(tmp_path / 'resnet18-doconv-s12', [(0, 1.0, 54.0), (1, 0.5, 61.0)]),
        run(tmp_path / 'resnet18-stock_s0', [(0, 1.0, 1.0)]),
    ]
    curves = read_curves(runs, 'eval_top1')
    assert curves == [
        Curve('resnet18-doconv', 2, [0, 1], [52.0, 60.5], [50.0, 60.0], [54.0, 61.0]),
        Curve('other', 1, [0], [10.0], [10.0], [10.0]),
        Curve('resnet18-stock', 1, [0], [1.0], [1.0], [1.0]),
    ]
    assert read_curves(runs, 'train_loss')[0].mean == [1.5, 0.75]
    elsewhere = run(tmp_path / 'b' / 'other', [(0, 3.0, 20.0)])
    assert [c.name for c in read_curves([runs[1], elsewhere], 'train_loss')] == [f'{tmp_path.name}/other', 'b/other']


def test_the_legend_has_every_curve(tmp_path: Path):
    names = ('one', '_two')
    plot_curves([run(tmp_path / name, [(0, 2.0, 50.0), (1, 1.0, 60.0)]) for name in names], tmp_path / 'curves.svg')
    text = (tmp_path / 'curves.svg').read_text()
    assert all(f'<!-- {name} -->' in text or f'>{name}<' in text for name in names)


def test_the_last_row_of_an_epoch_counts(tmp_path: Path):
    folder = run(tmp_path / 'a', [(0, 2.0, 50.0), (1, 1.0, 60.0), (1, 0.9, 61.0), (2, 0.8, 62.0)])
    text = (folder / 'summary.csv').read_text()
    (folder / 'summary.csv').write_text(f'{text}\n{text.splitlines()[0]}\n0,2.5,1.0,55.0,99.0,0.1\n')
    assert read_curves([folder], 'eval_top1')[0].mean == [55.0, 61.0, 62.0]
    update_summary(1, dict(loss=0.7), None, filename=str(folder / 'summary.csv'), lr=0.1)
    assert read_curves([folder], 'eval_top1')[0].epochs == [0, 2]  # it has no validation after all
    assert read_curves([folder], 'train_loss')[0].mean == [2.5, 0.7, 0.8]


@pytest.mark.parametrize('first', [50.0, None])
def test_epochs_without_validation(tmp_path: Path, first: float | None):
    """timm writes fewer cells then, under whatever header the first epoch left."""
    folder = run(tmp_path / 'a', [(0, 2.0, first), (1, 1.0, None), (2, 0.5, 70.0)])
    curve = read_curves([folder], 'eval_top1')[0]
    assert (curve.epochs, curve.mean) == (([0, 2], [50.0, 70.0]) if first else ([2], [70.0]))
    assert read_curves([folder], 'train_loss')[0].mean == [2.0, 1.0, 0.5]
    assert read_curves([folder], 'lr')[0].mean == [0.1, 0.1, 0.1]


def test_no_curves(tmp_path: Path):
    with pytest.raises(ReparamError, match='summary.csv: cannot be read'):
        read_curves([tmp_path], 'eval_top1')
    folder = run(tmp_path / 'a-s0', [(0, 2.0, None)])
    with pytest.raises(
        ReparamError, match='expected epochs with eval_top1, found none; its columns are epoch,train_loss'
    ):
        read_curves([folder], 'eval_top1')
    other = run(tmp_path / 'a-s1', [(1, 2.0, None)])
    with pytest.raises(ReparamError, match='a: train_loss: expected an epoch that each of 2 runs has'):
        read_curves([folder, other], 'train_loss')
    (folder / 'summary.csv').write_text('epoch,train_loss\n0,1.0\n1,low\n')
    with pytest.raises(ReparamError, match='line 3: expected numbers under epoch,train_loss, got 1,low'):
        read_curves([folder], 'train_loss')
    (folder / 'summary.csv').write_text('epoch,train_loss\n0\n')
    with pytest.raises(ReparamError, match='line 2: expected numbers'):
        read_curves([folder], 'train_loss')


def summary(method: str, difference: float | None, half: float | None = 0.1, **fields: Any) -> Summary:
    ends = (None, None) if difference is None or half is None else (difference - half, difference + half)
    values = dict(model='resnet18', size=32, protocol='scratch', epochs=40, n=5, mean=90.0, std=0.1, step_ratio=1.25)
    values |= dict(train_parameters=10, fused_parameters=10, against=None if method == 'stock' else 'scratch')
    values |= dict(pairs=5 if half else 1, difference=difference, low=ends[0], high=ends[1])
    return Summary(method=method, **{**values, **fields})


SUMMARIES = [
    summary('stock', None),
    summary('doconv', 0.5),
    summary('acconv', None),
    summary('dyconv', 0.25, None),
    summary('refconv', 0.5, protocol='refocus', against='finetune'),
    summary('refconv', 0.75, protocol='refocus', against='scratch'),
    summary('doconv', 0.5, model='resnet34'),
    summary('doconv', 0.5, model='resnet50'),
]


def draw_profiles(path: Path) -> None:
    plot_profiles(PROFILES, path)


def draw_kernels(path: Path) -> None:
    models = [random_model(name, **TINY) for name in ('resnet10t', 'resnet10t_dyconv')]
    plot_kernels(models, path, names=['stock', 'dynamic'])


def draw_curves(path: Path) -> None:
    folder = path.parent / f'runs-of-{path.name}'
    runs = [run(folder / f'{method}-s{seed}', [(0, 2.0, 50.0 + seed)]) for method in ('a', 'b') for seed in (0, 1)]
    plot_curves(runs, path)


def draw_gains(path: Path) -> None:
    plot_gains(SUMMARIES, path)


PICTURES = {'profiles': draw_profiles, 'kernels': draw_kernels, 'curves': draw_curves, 'gains': draw_gains}


@pytest.mark.parametrize(
    'picture, suffix, magic',
    [
        *((picture, 'svg', b'<?xml') for picture in PICTURES),
        *((picture, 'png', b'\x89PNG') for picture in ('profiles',)),
        *(
            pytest.param(picture, 'png', b'\x89PNG', marks=pytest.mark.slow)
            for picture in ('kernels', 'curves', 'gains')
        ),
        ('gains', 'pdf', b'%PDF'),
    ],
)
def test_pictures(tmp_path: Path, picture: str, suffix: str, magic: bytes, monkeypatch: pytest.MonkeyPatch):
    """Small, white behind, without a date, and the same bytes again, whatever the settings of the process are."""
    matplotlib = pytest.importorskip('matplotlib')
    first, second = (tmp_path / f'{number}.{suffix}' for number in (1, 2))
    PICTURES[picture](first)
    with matplotlib.rc_context({'figure.facecolor': 'black', 'text.color': 'white', 'svg.fonttype': 'path'}):
        monkeypatch.setenv('SOURCE_DATE_EPOCH', '86400')
        PICTURES[picture](second)
        assert matplotlib.rcParams['figure.facecolor'] == 'black'
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert content.startswith(magic) and len(content) < 250_000
    assert not [path for path in tmp_path.iterdir() if 'partial' in path.name]
    if suffix == 'png':
        image = pytest.importorskip('PIL.Image').open(first)
        assert image.convert('RGBA').getpixel((0, 0)) == (255, 255, 255, 255)
        assert 149 < image.info['dpi'][0] < 151


def texts(path: Path) -> list[str]:
    """The texts of an svg file, which are there as text."""
    return re.findall(r'<text[^>]*>([^<]+)</text>', path.read_text(encoding='utf-8'))


def test_texts_of_the_kernels(tmp_path: Path):
    pytest.importorskip('matplotlib')
    path = tmp_path / 'k.svg'
    model = random_model('resnet10t', **TINY)
    plot_kernels([model], path, names=['mine, $1$'])
    written = texts(path)
    assert {'mine, $1$', 'act1', '3 layers', 'layer4'} <= set(written) and not any(
        'mean kernel' in text for text in written
    )
    values = [f'{value:.2f}' for s in kernel_skeletons(model) for value in s.magnitude.flatten().tolist()]
    assert [text for text in written if re.fullmatch(r'\d\.\d\d', text)] == values
    draw_kernels(path)
    assert 'dynamic convolution: its mean kernel' in texts(path)


def test_texts_and_colours(tmp_path: Path):
    """A method has one colour in all pictures; a longer name is not taken for a shorter one."""
    pytest.importorskip('matplotlib')
    path = tmp_path / 'p.svg'
    draw_gains(path)
    written = texts(path)
    assert {'resnet18, 32 px', 'resnet34, 32 px', 'doconv (5 pairs)', 'dyconv (1 pair, no interval)'} <= set(written)
    assert {'refconv, refocus to finetune (5 pairs)', 'no pairs: acconv'} <= set(written)
    colours = [set(re.findall('#[0-9a-f]{6}', path.read_text()))]
    runs = [
        run(tmp_path / f'm-{name}-e2-s0', [(0, 2.0, 50.0), (1, 1, 2)]) for name in ('doconv', 'dyconv', 'acconv_none')
    ]
    plot_curves(runs, path)
    assert {'m-doconv-e2', 'top-1 (%)', 'train loss', 'epoch'} <= set(texts(path))
    colours.append(set(re.findall('#[0-9a-f]{6}', path.read_text())))
    blue, purple, red, orange = '#1f77b4', '#9467bd', '#d62728', '#ff7f0e'
    assert {blue, purple} <= colours[0] & colours[1]
    assert red in colours[1] and orange not in colours[1]


def test_lines_of_one_colour_differ():
    styles = [tuple(style.values()) for style in _line_styles([f'{name}-stock' for name in 'abcdefghi'])]
    assert {color for color, _, _ in styles} == {'tab:gray'} and len(set(styles)) == len(styles)


def test_pictures_that_cannot_be(tmp_path: Path):
    pytest.importorskip('matplotlib')
    with pytest.raises(ReparamError, match='nothing was timed'):
        plot_profiles(compare_profiles(nn.Conv2d(3, 4, 3), input_size=(3, 8, 8), runs=0), tmp_path / 'p.png')
    with pytest.raises(ReparamError, match='expected runs of a variant and of stock with the same seed'):
        plot_gains([summary('stock', None), summary('doconv', None)], tmp_path / 'p.png')
    with pytest.raises(ReparamError, match='step_ratio: .* found none for doconv'):
        plot_gains([summary('doconv', 0.5, step_ratio=None), summary('acconv', 0.5)], tmp_path / 'p.png')
    with pytest.raises(ReparamError, match='p.txt: expected a name that ends in .png, .svg'):
        check_plot(tmp_path / 'p.txt')
    with pytest.raises(ReparamError, match='p.svg: expected a file in a folder that exists'):
        check_plot(tmp_path / 'none' / 'p.svg')
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    figure = pytest.importorskip('matplotlib.figure')
    path = tmp_path / 'p.svg'
    path.write_text('before')
    with monkeypatch.context() as patch:
        patch.setattr(figure.Figure, 'savefig', lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_gains(path)
    assert path.read_text() == 'before'
    (tmp_path / 'taken.svg').mkdir()
    with pytest.raises(ReparamError, match='taken.svg: cannot be written'):
        draw_gains(tmp_path / 'taken.svg')
    assert sorted(file.name for file in tmp_path.iterdir()) == ['p.svg', 'taken.svg']


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    with pytest.raises(ReparamError, match=r"pip install 'timm-reparam\[plot\]'"):
        check_plot('ratios.png')
