"""The accuracy benchmark: pairs of seeds, every method, resuming, results."""

import csv
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from stand_in import randomise
from torch import nn

from timm_reparam import ACBlock2d, is_variant, plan_conversion
from timm_reparam.hub import add_facts
from timm_reparam.layers import RefConv2d
from timm_reparam.results import COLUMNS, format_summary, read_results, summarize
from timm_reparam.variants import run_methods

sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
import accuracy  # noqa: E402
from accuracy import Data, Settings  # noqa: E402

TINY = dict(
    model_kwargs=dict(layers=(1, 0, 0, 1), channels=(8, 8, 8, 8), stem_width=8), batch_size=16, lr=0.05, warmup=0.5
)
CPU = torch.device('cpu')


def tiny(method: str, protocol: str = 'scratch', epochs: int = 1, seed: int = 0, **settings) -> Settings:
    return Settings(method, protocol, epochs, seed, **{**TINY, **settings})


@pytest.fixture(scope='module')
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, random = tmp_path_factory.mktemp('cifar'), np.random.default_rng(0)
    for split, images in (('train', 5), ('test', 3)):
        for label in range(10):
            (root / split / f'class{label}').mkdir(parents=True)
            for index in range(images):
                pixels = random.integers(0, 255, (32, 32, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f'class{label}' / f'{index:04}.jpg')
    return root


@pytest.fixture(scope='module')
def data(folder: Path) -> Data:
    return accuracy.load_data(folder, None)


def test_decoded_images_are_kept_and_hashed(folder: Path, data: Data, tmp_path: Path) -> None:
    first = accuracy.load_data(folder, tmp_path / 'data.npz')
    again = accuracy.load_data(tmp_path / 'not there', tmp_path / 'data.npz')
    assert data.sha256 == first.sha256 == again.sha256
    assert torch.equal(data.images, again.images) and torch.equal(data.eval_labels, again.eval_labels)
    assert data.images.shape == (50, 3, 32, 32) and data.images.dtype == torch.uint8
    pixels = np.asarray(Image.open(folder / 'train' / 'class0' / '0000.jpg'))
    assert torch.equal(data.images[0], torch.from_numpy(pixels.transpose(2, 0, 1).copy()))


def test_images_are_normalised_by_the_training_set(data: Data) -> None:
    values = data.normalised(data.images, tiny('stock')).double()
    assert values.mean((0, 2, 3)).abs().max() < 1e-5
    assert (values.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-5
    assert data.normalised(data.images, tiny('stock', size=48)).shape == (50, 3, 48, 48)


def test_held_out_images_are_not_trained_on(folder: Path, data: Data) -> None:
    held = accuracy.load_data(folder, None, holdout=2)
    assert held.images.shape[0] == 30 and held.eval_images.shape[0] == 20
    assert held.eval_labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert torch.equal(held.eval_images[:2], data.images[3:5])
    trained = {image.numpy().tobytes() for image in held.images}
    assert not trained & {image.numpy().tobytes() for image in held.eval_images}
    assert not trained & {image.numpy().tobytes() for image in data.eval_images}


def test_paired_seeds_see_the_same_batches(data: Data) -> None:
    def of(seed: int, epoch: int, method: str = 'stock') -> torch.Tensor:
        return torch.cat([images for images, _ in data.batches(tiny(method, seed=seed), epoch)])

    assert torch.equal(of(0, 1), of(0, 1, 'doconv'))
    assert not torch.equal(of(0, 1), of(0, 2))
    assert not torch.equal(of(0, 1), of(1, 1))


def test_a_batch_is_mirrored_crops_of_the_images(data: Data) -> None:
    padded = nn.functional.pad(data.images.float(), (4, 4, 4, 4), mode='reflect').to(torch.uint8)
    places = set()
    for images, labels in data.batches(tiny('stock'), 0):
        pixels = (images * data.std + data.mean).mul(255).round().to(torch.uint8)
        for image, label in zip(pixels, labels):
            found = [
                (index, top, left, flip)
                for index in (data.labels == label).nonzero().flatten().tolist()
                for flip in (False, True)
                for top in range(9)
                for left in range(9)
                if torch.equal(image.flip(2) if flip else image, padded[index, :, top : top + 32, left : left + 32])
            ]
            assert len(found) == 1
            places.add(found[0])
    assert len({index for index, *_ in places}) == 48  # three batches of 16, no image twice
    assert {flip for *_, flip in places} == {False, True}
    assert len({(top, left) for _, top, left, _ in places}) > 20


def test_paired_seeds_share_the_stock_weights() -> None:
    stock = accuracy.build(tiny('stock'), 1).state_dict()
    for method in ('doconv', 'acconv', 'acconv_none'):
        model = accuracy.build(tiny(method), 1).state_dict()
        assert all(torch.equal(model[name], value) for name, value in stock.items()), method
    blocks = accuracy.build(tiny('acblock'), 1).state_dict()
    assert torch.equal(blocks['layer1.0.conv1.square_conv.weight'], stock['layer1.0.conv1.weight'])
    other = accuracy.build(tiny('stock', seed=1), 1).state_dict()
    assert not torch.equal(other['layer1.0.conv1.weight'], stock['layer1.0.conv1.weight'])


def test_blocks_stand_where_the_variant_converts_and_fuse_exactly() -> None:
    stock = accuracy.build(tiny('stock'), 1)
    model = randomise(accuracy.build(tiny('acblock'), 1), seed=1).double().eval()
    converted = {name for name, reason in plan_conversion(stock, 'acconv').items() if not reason}
    assert {name for name, module in model.named_modules() if isinstance(module, ACBlock2d)} == converted
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert norms == sum(isinstance(module, nn.BatchNorm2d) for module in stock.modules()) + 2 * len(converted)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    fused = accuracy.fused_form(model)
    assert not any(isinstance(module, ACBlock2d) for module in fused.modules())
    assert (fused(x) - expected).abs().max() <= 1e-10 * expected.abs().max()


def test_options_are_the_authors() -> None:
    acconv = accuracy.build(tiny('acconv'), 1).get_submodule('layer1.0.conv1')
    assert torch.equal(acconv.vertical_gamma, torch.full((8,), 1 / 3))
    assert accuracy.build(tiny('acconv_none'), 1).get_submodule('layer1.0.conv1').scale == 1 / 3
    block = accuracy.build(tiny('acblock'), 1).get_submodule('layer1.0.conv1')
    assert torch.equal(block.square_bn.weight, torch.full((8,), 1 / 3))
    dynamic = accuracy.build(tiny('dyconv', anneal=0.25), 100).get_submodule('layer1.0.conv1')
    assert dynamic.temperature == 30 and dynamic.temperature_steps == 25


@pytest.mark.parametrize('method', [method for method in run_methods() if method != 'refconv'])
def test_every_method_runs_and_is_saved(method: str, data: Data, tmp_path: Path) -> None:
    result = accuracy.train(tiny(method), data, tmp_path, CPU)
    row = result['row']
    assert set(row) == set(COLUMNS)
    assert row['method'] == method and 0 <= row['top1'] <= 100
    assert row['differing'] == len(result['differing'])
    if method == 'stock':
        assert row['fused_top1'] == row['top1'] and row['max_logit_difference'] == 0
    else:
        assert row['max_logit_difference'] < 1e-4
        # the form for inference of dynamic convolution is the same numbers, once the temperature is 1
        assert (row['max_logit_difference'] > 0) == (method != 'dyconv')
        assert row['train_parameters'] > accuracy.train(tiny('stock'), data, tmp_path, CPU)['row']['train_parameters']
    folder = tmp_path / tiny(method).name
    variant = tiny(method).variant
    tag = 'cifar10_none' if method == 'acconv_none' else 'cifar10'
    saved = {None: ['resnet10t.cifar10'] if method == 'stock' else []}.get(
        variant, [f'resnet10t_{variant}.{tag}', f'resnet10t_{variant}.{tag}_fused']
    )
    zoo = folder / 'zoo'
    assert sorted(path.name for path in zoo.iterdir()) == saved if saved else not zoo.exists()
    with open(folder / 'summary.csv', newline='') as file:
        epochs = list(csv.DictReader(file))
    assert len(epochs) == 1 and float(epochs[0]['eval_top1']) == row['top1']


def test_refocusing_goes_on_from_the_stock_run(data: Data, tmp_path: Path) -> None:
    refocus, finetune = tiny('refconv', 'refocus', 2), tiny('stock', 'finetune', 2)
    assert refocus.first == finetune.first == tiny('stock')
    accuracy.train(refocus, data, tmp_path, CPU)
    weights = tmp_path / tiny('stock').name / 'zoo' / 'resnet10t.cifar10' / 'model.safetensors'
    stock = timm.create_model('resnet10t', num_classes=10, **TINY['model_kwargs'])
    stock.load_state_dict(load_file(weights))
    x = torch.randn(2, 3, 32, 32)
    for settings in (refocus, finetune):
        model = accuracy.build(settings, 1, weights)
        assert any(is_variant(module) for module in model.modules()) == (settings is refocus)
        assert torch.equal(model.eval()(x), stock.eval()(x))
    accuracy.train(finetune, data, tmp_path, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        settings.name for settings in (refocus, finetune, tiny('stock'))
    )


@pytest.mark.parametrize(
    'method', [*(pytest.param(name, marks=pytest.mark.slow) for name in ('stock', 'acconv')), 'dyconv']
)
def test_an_interrupted_run_goes_on_exactly(method: str, data: Data, tmp_path: Path) -> None:
    class Interrupted(Data):
        def batches(self, settings: Settings, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            for index, batch in enumerate(super().batches(settings, epoch)):
                if (epoch, index) == (2, 1):
                    raise KeyboardInterrupt
                yield batch

    settings = tiny(method, epochs=3)
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    with pytest.raises(KeyboardInterrupt):
        accuracy.train(settings, Interrupted(**fields), tmp_path / 'killed', CPU)
    results = [accuracy.train(settings, data, tmp_path / name, CPU) for name in ('killed', 'whole')]
    for name in ('top1', 'loss', 'max_logit_difference'):
        assert results[0]['row'][name] == results[1]['row'][name]
    weights = [next((tmp_path / name / settings.name / 'zoo').glob('*10')) for name in ('killed', 'whole')]
    one, other = (load_file(path / 'model.safetensors') for path in weights)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_runs_of_other_settings_are_not_mixed(data: Data, tmp_path: Path) -> None:
    accuracy.train(tiny('stock'), data, tmp_path, CPU)
    with pytest.raises(SystemExit, match='other settings'):
        accuracy.train(tiny('stock', lr=0.01), data, tmp_path, CPU)


def test_a_prediction_may_change_at_a_tie_only() -> None:
    logits, fused = (
        torch.tensor([[1.0, 20.0, 0.0], [3.0, 2.9999, 0.0]]),
        torch.tensor([[1.0, 20.0, 0.0], [2.9998, 3.0, 0.0]]),
    )
    images, difference = accuracy.differing_images(logits, fused)
    assert [image['image'] for image in images] == [1]
    assert images[0]['margin'] == pytest.approx(1e-4, rel=1e-2)
    assert difference == images[0]['difference'] == pytest.approx(2e-4, rel=1e-2)
    fused[1] = torch.tensor([2.99994, 2.99996, 0.0])  # both moved towards each other by less than they were apart
    with pytest.raises(SystemExit, match='no tie'):
        accuracy.differing_images(logits, fused)
    with pytest.raises(SystemExit, match='changed a logit by'):
        accuracy.differing_images(logits, fused + 0.1)


def test_settings_that_do_not_matter_do_not_tell_runs_apart() -> None:
    others = dict(second_lr=0.5, map_lr=2.0, anneal=0.5, conv_options={'map_kernel_size': 1})
    assert tiny('stock', **others).without_idle_settings() == tiny('stock')
    kept = tiny('dyconv', **others).without_idle_settings()
    assert (kept.second_lr, kept.anneal, kept.conv_options) == (0.1, 0.5, others['conv_options'])
    refocused = tiny('refconv', 'refocus', 2, **others)
    assert refocused.first == tiny('stock')
    assert refocused.without_idle_settings() == tiny('refconv', 'refocus', 2, **{**others, 'anneal': 1 / 3})


@pytest.mark.parametrize('channels, groups', [(64, 1), (256, 256)])
def test_maps_have_a_learning_rate_of_their_own(channels: int, groups: int) -> None:
    """A small step of the map moves a kernel on the average as far as a step of its own would."""
    torch.manual_seed(0)
    layer = RefConv2d(channels, channels, 3, groups=groups, bias=False).double()
    layer.map_weight.data.zero_()
    settings = tiny('refconv', map_lr=0.5)
    (group,) = settings.parameter_groups(layer)
    gradient = torch.randn_like(layer.weight)
    layer._compose().backward(gradient)
    step = 1e-6 * group['lr_scale'] * layer.map_weight.grad
    layer.map_weight.data.sub_(step)
    moved = layer.weight - layer.equivalent_kernel()
    along = (moved * gradient).sum() / gradient.square().sum() / 1e-6
    # a tap beside the middle of the kernel meets fewer of its elements: 49 of 81 pairs
    assert along.item() == pytest.approx(0.5 * 49 / 81, rel=0.05)
    assert group['lr_scale'] * group['weight_decay'] == pytest.approx(settings.weight_decay)


@pytest.mark.parametrize('map_lr', [0.0, 1.0])
def test_every_parameter_is_in_one_group(map_lr: float) -> None:
    """Biases and norms are not decayed."""
    model = accuracy.build(tiny('refconv'), 1)
    groups = tiny('refconv', map_lr=map_lr).parameter_groups(model)
    named = {parameter: name for name, parameter in model.named_parameters()}
    assert sorted(named[p] for group in groups for p in group['params']) == sorted(named.values())
    for group in groups:
        for parameter in group['params']:
            assert (group['weight_decay'] > 0) == (parameter.ndim > 1)
            is_own = bool(map_lr) and named[parameter].endswith('map_weight')
            assert is_own == (group['lr_scale'] != 1) and (not is_own or len(group['params']) == 1)


def test_learning_rate() -> None:
    settings = tiny('stock', warmup=1.0, lr=0.4)
    rates = [accuracy.learning_rate(settings, step, 30, 10) for step in range(30)]
    assert rates[:10] == pytest.approx([0.04 * n for n in range(1, 11)])
    assert rates[20] == pytest.approx(0.2) and 0 < rates[-1] < 0.01
    second = tiny('stock', 'finetune', 2, warmup=0.0, second_lr=0.1)
    assert accuracy.learning_rate(second, 0, 10, 10) == 0.1


@pytest.mark.slow
def test_commands(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    runs, results = tmp_path / 'runs', tmp_path / 'results' / 'cifar10.csv'
    flags = ['--model-kwargs', 'channels=(8,8,8,8)', 'stem_width=8', '--batch-size', '16', '--epochs', '1']
    where = ['--data', str(folder), '--runs', str(runs)]
    assert (
        accuracy.main(['run', *where, *flags, '--methods', 'stock', 'acconv_none', '--seeds', '0', '--jobs', '2']) == 0
    )
    assert accuracy.main(['costs', '--runs', str(runs), '--rounds', '1']) == 0
    assert accuracy.main(['table', '--runs', str(runs), '-o', str(results)]) == 0
    with open(results, newline='') as file:
        row, other = csv.DictReader(file)
    zoo = runs / 'resnet10t-acconv_none-scratch-e1-s0' / 'zoo'
    assert sorted(os.listdir(zoo)) == ['resnet10t_acconv.cifar10_none', 'resnet10t_acconv.cifar10_none_fused']
    table = format_summary(summarize(read_results(results)))
    assert '`acconv_none`' in table and all(table in (form / 'README.md').read_text() for form in zoo.iterdir())
    content = results.read_bytes()
    for form in zoo.iterdir():
        add_facts(form, dict(results=[]))
    elsewhere = ['--runs', str(tmp_path / 'others'), '-o', str(results)]
    assert accuracy.main(['table', *elsewhere, '--keep', '--zoo', str(zoo)]) == 0
    assert results.read_bytes() == content  # rows of runs that are not here stay
    assert all(table in (form / 'README.md').read_text() for form in zoo.iterdir())
    assert list(row) == list(COLUMNS)
    assert row['step_ratio'] == '1.0' and json.loads(row['options'])['model_kwargs']['stem_width'] == 8
    where[-1] = str(tmp_path / 'again')
    assert accuracy.main(['repeat', str(results), '--row', '1', *where]) == 0
    assert f'top-1 {float(row["top1"]):.2f}, in the results {float(row["top1"]):.2f}' in capsys.readouterr().out


def row_of(seed: int, top1: float, **others) -> dict[str, object]:
    options = {k: v for k, v in dataclasses.asdict(tiny('stock')).items() if k not in (*accuracy.COLUMNS, 'holdout')}
    row = dict.fromkeys(accuracy.COLUMNS, '') | dict(
        model='resnet10t', method='stock', protocol='scratch', epochs=1, seed=seed, top1=top1, size=32, batch_size=16,
        lr=0.05, weight_decay=5e-4, options=json.dumps(options, sort_keys=True),
    )  # fmt: skip
    return {**row, **others}


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, accuracy.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_repeat_trains(folder: Path, data: Data, tmp_path: Path) -> None:
    """A finished run of that name would be its own repetition."""
    results = write_rows(tmp_path / 'rows.csv', [row_of(0, 10.0, data_sha256=data.sha256)])
    accuracy.train(tiny('stock'), data, tmp_path / 'runs', CPU)
    with pytest.raises(SystemExit, match='has been run there'):
        accuracy.main(['repeat', str(results), '--row', '1', '--data', str(folder), '--runs', str(tmp_path / 'runs')])


@pytest.mark.parametrize('row', [0, 2])
def test_repeat_refuses_a_row_that_is_not_there(row: int, folder: Path, data: Data, tmp_path: Path) -> None:
    results = write_rows(tmp_path / 'rows.csv', [row_of(0, 10.0, data_sha256=data.sha256)])
    with pytest.raises(SystemExit, match=f'expected 1 to 1, got {row}'):
        accuracy.main(
            ['repeat', str(results), '--row', str(row), '--data', str(folder), '--runs', str(tmp_path / 'new')]
        )


@pytest.mark.parametrize('other', [{'lr': 0.4}, {'weight_decay': 0.0}, {'batch_size': 8}, {'options': '{"amp": true}'}])
def test_spread_is_that_of_one_recipe(
    other: dict, folder: Path, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeds of another recipe would make the spread as wide as one likes."""
    rows = [row_of(seed, top1, data_sha256=data.sha256) for seed, top1 in enumerate((80.0, 80.1, 80.2))]
    rows += [row_of(seed, 20.0, data_sha256=data.sha256, **other) for seed in range(3)]
    results = write_rows(tmp_path / 'rows.csv', rows)
    for found, status in ((80.3, 0), (60.0, 1)):
        monkeypatch.setattr(accuracy, 'train', lambda *args, top1=found: {'row': {'top1': top1}})
        where = ['--data', str(folder), '--runs', str(tmp_path / 'new')]
        assert accuracy.main(['repeat', str(results), '--row', '1', *where]) == status
