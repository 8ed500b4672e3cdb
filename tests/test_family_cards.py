"""Cards of the families: current, complete, and their counts are right."""

import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from timm.models import model_entrypoint

import timm_reparam
from timm_reparam import ReparamError
from timm_reparam.models._registry import is_registered_on_import
from timm_reparam.profile import profile_model
from timm_reparam.results import COLUMNS
from timm_reparam.variants import VARIANTS

sys.path.insert(0, str(Path(__file__).parent / 'benchmarks'))
import family_cards  # noqa: E402
from family_cards import (  # noqa: E402
    COSTS_NAME,
    INPUT_SIZE,
    RESULTS_NAME,
    check_cards,
    families,
    measure_costs,
    render_family_card,
    write_cards,
)

COMMITTED = family_cards.FOLDER
COSTS = json.loads((COMMITTED / COSTS_NAME).read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(COMMITTED, tmp_path / 'model_cards')


def results_file(folder: Path, **changes: str) -> None:
    """Runs of a ResNet: two seeds of stock, fine-tuned too, and of some methods."""
    (folder / 'results').mkdir(exist_ok=True)
    base = dict.fromkeys(COLUMNS, '1') | dict(model='resnet10t', protocol='scratch', epochs='4', size='32', lr='0.25')
    base |= dict(options='{"model_kwargs": {"stem_width": 16}}', train_parameters='1500', fused_parameters='1000')
    runs = [('stock', 'scratch', 80), ('doconv', 'scratch', 81), ('acconv_none', 'scratch', 82)]
    runs += [('acblock', 'scratch', 83), ('stock', 'finetune', 84), ('refconv', 'refocus', 84.5)]
    lines = [','.join(COLUMNS)]
    for method, protocol, top1 in runs:
        for seed in range(2):
            row = base | dict(method=method, protocol=protocol, seed=str(seed), top1=str(top1 + seed)) | changes
            lines.append(','.join('"' + value.replace('"', '""') + '"' for value in row.values()))
    (folder / RESULTS_NAME).write_text('\n'.join(lines) + '\n')


def test_cards_state_the_runs_of_their_family(folder: Path):
    results_file(folder)
    card = render_family_card('resnet_doconv', folder=folder)
    assert (
        '## Measured on CIFAR-10' in card
        and '`resnet10t` (stem_width=16)' in card
        and 'learning rate 0.25, weight' in card
    )
    rows = [line for line in card.splitlines() if line.startswith('| `') and ' ± ' in line]
    assert [row.split('|')[1].strip() for row in rows] == ['`stock`', '`doconv`']
    assert '80.50 ± 0.71' in rows[0] and '+1.00 [+1.00, +1.00]' in rows[1] and '1.50 k / 1.00 k' in rows[1]
    acconv = render_family_card('resnet_acconv', folder=folder)
    assert '`acconv_none`' in acconv and '`acblock`' in acconv and '`doconv`' not in acconv.partition('## Measured')[2]
    refconv = render_family_card('resnet_refconv', folder=folder).partition('## Measured')[2]
    assert '`stock`, finetune' in refconv and '`refconv`, refocus' in refconv
    for family in ('resnet_dyconv', 'mobilenetv2_doconv'):  # no runs of these
        assert '## Measured' not in render_family_card(family, folder=folder)
    assert 'resnet_doconv.md' in check_cards(folder)
    assert 'resnet_doconv.md' in write_cards(folder, recount=False)
    assert check_cards(folder) == []


def test_each_network_and_image_size_has_a_table(folder: Path):
    results_file(folder)
    first = (folder / RESULTS_NAME).read_text()
    results_file(folder, size='48', lr='0.5', options='{"model_kwargs": {"stem_width": 8}}', device='a faster one')
    second = (folder / RESULTS_NAME).read_text()
    (folder / RESULTS_NAME).write_text(first + second.partition('\n')[2])
    card = render_family_card('resnet_doconv', folder=folder).partition('## Measured')[2]
    for words in ('(stem_width=16), images of 32 px', 'learning rate 0.25', '(stem_width=8), images of 48 px',
                  'learning rate 0.5', 'on a faster one:'):  # fmt: skip
        assert card.count(words) == 1
    rows = [line.split('|')[1].strip() for line in card.splitlines() if line.startswith('| `')]
    assert rows == ['`stock`', '`doconv`'] * 2
    assert "a layer's map was" not in card
    results_file(folder, options='{"map_lr": 3.0}')
    assert "a layer's map was 3.0 times" in render_family_card('resnet_refconv', folder=folder)


def test_cards_without_results(folder: Path):
    shutil.rmtree(folder / 'results', ignore_errors=True)
    assert all('## Measured' not in render_family_card(family, folder=folder) for family in families())
    results_file(folder, data_sha256='')
    with pytest.raises(ReparamError, match='data_sha256'):
        render_family_card('resnet_doconv', folder=folder)


def test_pictures_of_the_cards_are_there():
    for family in families():
        for place in re.findall(r'!\[[^]]*\]\(([^)]*)\)', (COMMITTED / f'{family}.md').read_text()):
            assert (COMMITTED / place).is_file(), f'{family}: {place}'


def test_every_registered_family_has_a_card():
    names = filter(is_registered_on_import, timm.list_models())  # other tests may have registered more
    assert families().keys() == {model_entrypoint(name).__module__.rpartition('.')[2] for name in names}
    for family, names in families().items():
        # other tests may have registered more in this process
        assert set(names) <= set(timm.list_models(module=family))
        assert (COMMITTED / f'{family}.md').is_file()
    assert COSTS.keys() == {name for names in families().values() for name in names}


def test_committed_cards_are_current():
    assert check_cards() == [], 'run tests/benchmarks/family_cards.py'


@pytest.mark.parametrize(
    'name', [f'{("resnet10t", "mobilenetv2_035")[index % 2]}_{variant}' for index, variant in enumerate(VARIANTS)]
)
def test_some_committed_costs_are_current(name: str):
    (counts,) = measure_costs([name]).values()
    assert {form: list(count) for form, count in counts.items()} == COSTS[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # of every model of every family
def test_all_committed_costs_are_current():
    assert check_cards(recount=True) == [], 'run tests/benchmarks/family_cards.py'


def test_counts_are_those_of_real_models():
    """What is counted on the meta device is what a model with weights has and does."""
    for name in ('resnet18_doconv', 'mobilenetv2_035_dyconv'):
        model = timm.create_model(name)
        for form, counted in (('train_time', model), ('fused', timm_reparam.fuse_model(model))):
            profile = profile_model(counted, input_size=INPUT_SIZE, runs=0)
            assert [profile.parameters, profile.trainable_parameters, profile.macs] == COSTS[name][form]
        assert profile.parameters == sum(p.numel() for p in counted.parameters())


def convolutions(stock: str) -> list[torch.nn.Conv2d]:
    with torch.device('meta'):
        return [module for module in timm.create_model(stock).modules() if isinstance(module, torch.nn.Conv2d)]


@pytest.mark.parametrize('stock', ['resnet50', 'resnext50_32x4d', 'mobilenetv2_100'])
def test_counts_follow_from_the_methods(stock: str):
    spatial = [conv for conv in convolutions(stock) if max(conv.kernel_size) > 1]
    added = {
        # a square transform of the kernel's positions for each input channel
        'doconv': sum(conv.in_channels * conv.weight[0, 0].numel() ** 2 for conv in spatial),
        # two thin kernels, and a scale for each output channel of both
        'acconv': sum(
            conv.out_channels * (2 + conv.in_channels // conv.groups * sum(conv.kernel_size))
            for conv in spatial
            if max(conv.kernel_size) < 7
        ),
        # 3 x 3 filters from `groups` kernels to each kernel
        'refconv': sum(9 * conv.in_channels * conv.out_channels for conv in spatial),
    }
    for variant, more in added.items():
        counts = COSTS[f'{stock}_{variant}']
        assert counts['train_time'][0] - counts['stock'][0] == more
        assert counts['fused'] == counts['stock']
    frozen = sum(conv.weight.numel() for conv in spatial)
    parameters, trainable, _ = COSTS[f'{stock}_refconv']['train_time']
    assert parameters - trainable == frozen


@pytest.mark.parametrize('family', families())
def test_card(family: str):
    text = (COMMITTED / f'{family}.md').read_text()
    data = ModelCard.load(COMMITTED / f'{family}.md').data
    backbone, variant = family.split('_')
    assert (data.library_name, data.pipeline_tag) == ('timm', 'image-classification')
    assert data.tags == ['image-classification', 'timm', 'timm-reparam', variant]
    assert data.license is None and data.base_model is None  # that is for each checkpoint to say
    assert yaml.safe_load(str(ModelCard(text)).split('---\n')[1]) == yaml.safe_load(text.split('---\n')[1])
    method = VARIANTS[variant].method
    assert method.title in text and f'https://arxiv.org/abs/{method.arxiv}' in text
    for heading in ('Method', 'Published figures', 'Create', 'Train', 'Fuse', 'Cost', 'Citation'):
        assert f'\n\n## {heading}\n\n' in text
    assert 'did not measure' in text  # the authors' figures are theirs
    for name in families()[family]:
        row = re.search(rf'(?m)^\| `{name}` \|.*$', text)[0]
        forms = ('train_time', 'fused') if variant != 'dyconv' else ('stock', 'train_time', 'fused')
        counts = [COSTS[name][form][0] for form in forms]
        counts += [COSTS[name]['train_time'][1], *(COSTS[name][form][2] for form in forms)]
        assert [int(cell.replace(',', '')) for cell in row.split('|')[2:-1]] == counts
    assert ('no plugin needed' in text) == (variant != 'dyconv')
    assert ('no fused form' in text) == (variant == 'dyconv')


@pytest.mark.parametrize('family', families())
def test_layout(family: str):
    text = (COMMITTED / f'{family}.md').read_text()
    assert '\n\n\n' not in text and text.endswith('\n') and not text.endswith('\n\n')
    assert not re.search(r'[ \t]\n', text) and '{{ ' not in text and '{%' not in text
    assert text.count('```') == 2 * 4
    for table in re.findall(r'(?m)(?:^\|.*\n)+', text):
        header, rule, *rows = table.splitlines()
        assert rows and re.fullmatch(r'[|\-: ]+', rule)
        assert len({line.count('|') for line in (header, rule, *rows)}) == 1


@pytest.mark.parametrize(
    'family',
    [
        pytest.param(family, marks=[] if family in ('resnet_acconv', 'mobilenetv2_doconv') else pytest.mark.slow)
        for family in families()
    ],
)
def test_snippets_run(family: str, capsys: pytest.CaptureFixture):
    blocks = re.findall(r'(?ms)^```python\n(.*?)^```', (COMMITTED / f'{family}.md').read_text())
    code = '\n'.join(blocks)
    assert 'pretrained=True' in code
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        # no download, and few small images (of two, the largest rounding error is too much a matter of chance)
        code = code.replace('pretrained=True', 'pretrained=False').replace(
            '(model, fused)', '(model, fused, inputs=few)'
        )
        torch.manual_seed(0)
        exec(compile(code, family, 'exec'), space := {'few': torch.randn(16, 3, 32, 32)})
    stock, variant = space['model'].pretrained_cfg['architecture'].rsplit('_', 1)
    expected = f'{stock}_{variant}' if variant == 'dyconv' else stock
    assert space['fused'].pretrained_cfg['architecture'] == expected
    assert 'fusion verified' in capsys.readouterr().out


def test_published_figures_are_those_of_the_method():
    """Both families of a method show the same text, and it comes from one file."""
    for variant in VARIANTS:
        text = (COMMITTED / 'methods' / f'{variant}.md').read_text().strip()
        for family in families():
            assert (text in (COMMITTED / f'{family}.md').read_text()) == family.endswith(f'_{variant}')


def test_stale_cards_are_found_and_written_again(folder: Path):
    assert check_cards(folder) == [] and write_cards(folder, recount=False) == []
    (folder / 'resnet_doconv.md').write_text('something else')
    (folder / 'resnet_acconv.md').unlink()
    (folder / 'vgg_acconv.md').write_text('of no family')
    with open(folder / 'methods' / 'refconv.md', 'a') as file:
        file.write('\nOne more sentence.\n')
    stale = ['mobilenetv2_refconv.md', 'resnet_acconv.md', 'resnet_doconv.md', 'resnet_refconv.md']
    assert check_cards(folder) == [*stale, 'vgg_acconv.md']
    assert sorted(write_cards(folder, recount=False)) == stale
    assert check_cards(folder) == ['vgg_acconv.md']
    assert not [path.name for path in folder.iterdir() if path.name.startswith('.')]
    for name in ('resnet_acconv.md', 'resnet_doconv.md'):
        assert (folder / name).read_bytes() == (COMMITTED / name).read_bytes()


def test_costs_are_counted_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    two = ('resnet_doconv', 'resnet_refconv')
    few = {family: names[:1] for family, names in families().items() if family in two}
    monkeypatch.setattr(family_cards, 'families', lambda: few)
    for path in folder.glob('*_*conv.md'):
        path.unlink()
    costs = {names[0]: COSTS[names[0]] for names in few.values()}
    costs['resnet10t_doconv'] = {**costs['resnet10t_doconv'], 'fused': [1, 2, 3]}
    (folder / COSTS_NAME).write_text(json.dumps(costs))
    write_cards(folder, recount=False)
    assert check_cards(folder) == []
    assert check_cards(folder, recount=True) == write_cards(folder) == [COSTS_NAME, 'resnet_doconv.md']
    assert json.loads((folder / COSTS_NAME).read_text()) == {names[0]: COSTS[names[0]] for names in few.values()}


@pytest.mark.parametrize(
    'damage, words',
    [
        (lambda folder: (folder / COSTS_NAME).unlink(), COSTS_NAME),
        (lambda folder: (folder / COSTS_NAME).write_text('{'), 'three counts'),
        (lambda folder: (folder / COSTS_NAME).write_text('[]'), 'three counts'),
        (lambda folder: (folder / COSTS_NAME).write_text('{"a": {"stock": [1]}}'), 'three counts'),
        (lambda folder: (folder / COSTS_NAME).write_text('{}'), 'run tests/benchmarks'),
        (lambda folder: (folder / 'family.md').unlink(), 'family.md'),
        (lambda folder: (folder / 'methods' / 'acconv.md').unlink(), 'acconv.md'),
    ],
)
def test_folders_that_make_no_cards(folder: Path, damage, words: str):
    damage(folder)
    with pytest.raises(ReparamError, match=words):
        check_cards(folder)


def test_command(folder: Path, capsys: pytest.CaptureFixture):
    def run(*arguments: str) -> tuple[int, str]:
        return family_cards.main([str(folder), '--stored-costs', *arguments]), capsys.readouterr().out

    assert run('--check') == (0, 'all cards are current\n')
    (folder / 'resnet_doconv.md').write_text('something else')
    assert run('--check') == (1, 'stale: resnet_doconv.md\n')
    assert run() == (0, 'written: resnet_doconv.md\n')
    assert run() == run('--check') == (0, 'all cards are current\n')
    (folder / COSTS_NAME).unlink()
    with pytest.raises(SystemExit, match='^' + re.escape(f'{folder / COSTS_NAME}: ')) as exit_:
        run('--check')
    assert '\n' not in exit_.value.code and not capsys.readouterr().out


def test_unknown_family():
    with pytest.raises(ReparamError, match='vgg_doconv.*resnet_doconv'):
        render_family_card('vgg_doconv')
