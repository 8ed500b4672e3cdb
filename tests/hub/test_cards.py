"""Cards: they parse, say what the files say and nothing else, and no text from outside gets out of its place."""

import dataclasses
import importlib.resources
import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import yaml
from fresh import finished, run_code
from huggingface_hub import ModelCard
from PIL import Image

import timm_reparam
from timm_reparam import ReparamError
from timm_reparam.hub import check_facts, load_checkpoint, render_card, save_checkpoint, save_pair
from timm_reparam.hub.card import template_folder
from timm_reparam.hub.facts import license_data, read_config, read_facts, sha256_of, stated_license
from timm_reparam.results import Summary, format_summary
from timm_reparam.variants import VARIANTS

TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
REPORT = timm_reparam.FusionReport(
    algebra=1.25e-15, stored=1.5e-7, own=1.75e-7, bound=3.5e-7, top1_agreement=1.0, num_inputs=64
)
LAYERS = (
    timm_reparam.LayerReport('layer1.0.conv1', 0.25, 1.5e-16, 2.5e-8, 5.5e-8, num_inputs=16),
    timm_reparam.LayerReport('layer2.0.conv2', 0.75, 2.75e-15, 6.5e-8, 4.5e-8, num_inputs=16),
    timm_reparam.LayerReport('layer3.0.conv1', 0.125, 1.5e-16, 2.5e-8, 5.5e-8, num_inputs=0),
)
LAYERWISE = dataclasses.replace(REPORT, layers=LAYERS)
FACTS = {
    'base_model': {'id': 'timm/resnet10t.c3_in1k', 'revision': 'abc123', 'license': 'apache-2.0'},
    'dataset': {
        'name': 'two shapes',
        'id': 'owner/shapes',
        'split': 'validation',
        'train_images': 1500,
        'validation_images': 297,
        'label_names': ['circle', 'square'],
    },
    'metrics': {'train_time': {'top1': 97.25, 'loss': 0.125}, 'fused': {'top1': 97.5, 'top5': 100.0}},
    'logit_difference': 2.5e-6,
    'profile': {
        'train_time': {'parameters': 1234567, 'trainable_parameters': 1234000, 'macs': 7654321, 'latency_ms': 4.25},
        'fused': {'parameters': 234567, 'trainable_parameters': 234567, 'macs': 654321, 'latency_ms': 2.125},
    },
    'recipe': {'epochs': 5, 'opt': 'sgd'},
    'environment': {'torch': '2.6.0'},
}
# Each tries to end the place it stands in: front matter, table, list, link, code, HTML, template.
HOSTILE = [
    '---\nlicense: mit\n---\n# owned',
    'a\n---\nb',
    '"\nlicense: mit',
    "': {x: !!python/object/apply:os.system [true]}",
    '&anchor *alias',
    '{{ 7 * 7 }} {% raw %}',
    '<script>alert(1)</script>',
    '![x](https://evil.example/x.png)',
    '[x](javascript:alert(1))',
    '| a | b |',
    '```\n# owned\n```',
    '`` ` ``',
    '\r\n# owned',
    '\u2028# owned\x85# owned\x0b# owned',
    '\x00\x1b[31m\u202e',
    '# owned',
    '- owned',
    '1. owned',
    '$$\\owned$$',
    'https://evil.example www.evil.example',
    '\\',
    '*owned* _owned_ ~~owned~~',
    '}\n@misc{owned,}',
    "', pretrained=False)\nimport os  # owned",
    '"}\n```\n# owned\n```json\n{"',
    '```',
    '---',
    '...\n---\n# owned',
    '{# owned #}',
    '<!-- owned',
    '&lt;b&gt; &#60;b&#62;',
    '[x]: https://evil.example "owned"',
    '\t# owned',
    '    owned',
    '~~~\n# owned\n~~~',
    '| --- |\n| owned |',
    '@owned #1 owner/repo#1',
    '!!python/name:os.system',
]


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model = timm.create_model('resnet10t_doconv', **TINY)
    return save_pair(model, tmp_path_factory.mktemp('zoo'), tag='shapes', report=REPORT, facts=FACTS)


@pytest.fixture
def copies(tmp_path: Path, pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """Both folders, for tests that change them."""
    return tuple(shutil.copytree(folder, tmp_path / folder.name) for folder in pair)


def rewrite(folder: Path, file: str, change) -> None:
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def test_front_matter(pair: tuple[Path, Path]):
    for folder, top1 in zip(pair, (97.25, 97.5)):
        data = ModelCard.load(folder / 'README.md').data
        assert data.library_name == 'timm'
        assert data.pipeline_tag == 'image-classification'
        assert data.tags == ['image-classification', 'timm', 'timm-reparam', 'doconv']
        assert data.license == 'apache-2.0'
        assert data.datasets == ['owner/shapes']
        assert (data.base_model, data.base_model_relation) == ('timm/resnet10t.c3_in1k', 'finetune')
        assert data.model_name == folder.name
        result = next(result for result in data.eval_results if result.metric_name.startswith('Top-1'))
        assert (result.metric_type, result.metric_value) == ('accuracy', top1)
        assert (result.dataset_name, result.dataset_type, result.dataset_split) == (
            'two shapes',
            'owner/shapes',
            'validation',
        )


def test_text(pair: tuple[Path, Path]):
    train_time, fused = ((folder / 'README.md').read_text() for folder in pair)
    for text, folder, sibling in zip((train_time, fused), pair, reversed(pair)):
        assert f'# {folder.name}\n' in text
        assert f"timm.create_model('local-dir:path/to/{folder.name}', pretrained=True)" in text
        assert f'sha256 of model.safetensors: {sha256_of(folder / "model.safetensors")}' in text
        assert f'{sibling.name}, sha256 of its model.safetensors: {sha256_of(sibling / "model.safetensors")}' in text
        for figure in (
            '1.25e-15',
            '1.5e-07',
            '1.75e-07',
            '3.5e-07',
            '2.5e-06',
            '1,234,567',
            '654,321',
            '4.25 ms',
            'abc123',
        ):
            assert figure in text
        assert 'torch 2.6.0' in text and '"epochs": 5' in text and 'circle, square' in text
        assert VARIANTS['doconv'].method.title in text and VARIANTS['doconv'].method.arxiv in text
    assert 'import timm_reparam' in train_time and 'fuse_model' in train_time
    assert 'timm_reparam' not in fused  # it needs timm alone
    assert '97.25' in train_time and '97.5 ' not in train_time
    assert '97.5' in fused and '97.25' not in fused  # only what was measured with these weights


def test_rendering_again_gives_the_same_bytes(pair: tuple[Path, Path], copies: tuple[Path, Path]):
    for folder, copy in zip(pair, copies):
        copy = copy.rename(copy.with_name(f'moved-{folder.name}'))
        assert render_card(copy).encode() == (folder / 'README.md').read_bytes()


def test_card_survives_the_client(pair: tuple[Path, Path]):
    for folder in pair:
        text = (folder / 'README.md').read_text()
        assert yaml.safe_load(str(ModelCard(text)).split('---\n')[1]) == yaml.safe_load(text.split('---\n')[1])


def test_nothing_is_claimed_without_facts(tmp_path: Path):
    folder = save_checkpoint(timm.create_model('resnet10t', **TINY), tmp_path / 'm')
    text = render_card(folder)
    assert 'fused' not in text.lower() and 'verif' not in text.lower() and 'cost' not in text.lower()
    data = ModelCard(text).data
    assert data.base_model is None and not data.eval_results and data.datasets is None
    assert data.tags == ['image-classification', 'timm', 'timm-reparam']


def test_plain_model_has_one_column(tmp_path: Path):
    facts = {'metrics': {'train_time': {'top1': 91.5}}, 'profile': {'train_time': {'parameters': 4321}}}
    text = render_card(save_checkpoint(timm.create_model('resnet10t', **TINY), tmp_path / 'm', facts=facts))
    assert '| Top-1 accuracy (%) | 91.5 |' in text
    assert '| Parameters | 4,321 |' in text
    assert 'Train-time' not in text and 'Fused' not in text


def test_from_scratch(copies: tuple[Path, Path]):
    rewrite(copies[0], 'training.json', lambda facts: facts.update(base_model=None))
    text = render_card(copies[0])
    assert 'Started from: random weights' in text
    assert ModelCard(text).data.base_model is None


@pytest.mark.parametrize(
    'facts, expected, front, line',
    [
        ({}, None, {}, 'none is stated'),
        ({'base_model': None}, None, {}, 'none is stated'),
        ({'base_model': {'id': None, 'license': None}}, None, {}, 'none is stated'),
        ({'base_model': {'id': 'timm/a', 'license': None}}, None, {}, 'none is stated'),
        ({'base_model': {'id': 'timm/a', 'license': 'unknown'}}, None, {}, 'none is stated'),
        ({'license': 'other'}, None, {}, 'none is stated'),
        ({'license': '***'}, None, {}, 'none is stated'),
        (
            {'base_model': {'id': 'timm/a', 'license': 'cc-by-nc-4.0'}},
            'cc-by-nc-4.0',
            {'license': 'cc-by-nc-4.0'},
            'cc-by-nc-4.0, that of the weights it started from',
        ),
        (
            {'base_model': {'id': 'timm/a', 'license': 'SEER License'}},
            'other',
            {'license': 'other', 'license_name': 'seer-license', 'license_link': 'https://huggingface.co/timm/a'},
            'seer-license (`https://huggingface.co/timm/a`), that of the weights it started from',
        ),
        (
            {'base_model': {'id': None, 'license': 'seer-license'}, 'license_link': 'https://example.org/seer'},
            'other',
            {'license': 'other', 'license_name': 'seer-license'},
            'seer-license, that of the weights it started from',
        ),
        ({'base_model': None, 'license': 'MIT'}, 'mit', {'license': 'mit'}, 'mit'),
        (
            {'license': 'other', 'license_name': 'our own', 'license_link': 'LICENSE'},
            'other',
            {'license': 'other', 'license_name': 'our-own', 'license_link': 'LICENSE'},
            'our-own (`LICENSE`)',
        ),
        (
            {'license': 'our own', 'license_link': 'javascript:alert(1)'},
            'other',
            {'license': 'other', 'license_name': 'our-own'},
            'our-own',
        ),
    ],
)
def test_license(copies: tuple[Path, Path], facts: dict, expected: str | None, front: dict, line: str):
    for folder in copies:
        # what timm says of the weights an architecture usually starts from is not said of these
        rewrite(folder, 'config.json', lambda config: config['pretrained_cfg'].update(license='apache-2.0'))
        (folder / 'training.json').write_text(json.dumps(facts))
        assert license_data(read_facts(folder) or {}).get('license') == expected
        text = render_card(folder)
        found = yaml.safe_load(text.split('---\n')[1])
        assert {key: value for key, value in found.items() if key.startswith('license')} == front
        assert f'- License: {line}\n' in text
    (copies[0] / 'training.json').unlink()
    assert not license_data(read_facts(copies[0]) or {})


@pytest.mark.parametrize(
    'facts, expected',
    [
        ({}, None),
        ({'base_model': None}, None),
        ({'base_model': {'license': 'SEER License'}}, 'SEER License'),
        ({'base_model': {'license': 'mit'}, 'license': 'Our own'}, 'Our own'),
        ({'base_model': {'license': 'mit'}, 'license': None}, 'mit'),
    ],
)
def test_stated_license(facts: dict, expected: str | None):
    assert stated_license(facts) == expected


@pytest.mark.parametrize(
    'base_model, line',
    [
        (None, 'random weights'),
        ({'id': None, 'revision': None}, 'trained weights of which nothing is recorded'),
        ({'id': 'timm/a.b'}, '[timm/a.b](https://huggingface.co/timm/a.b)'),
        ({'id': 'timm/a.b', 'revision': 'c0ffee'}, '[timm/a.b](https://huggingface.co/timm/a.b), revision c0ffee'),
        ({'id': 'a[b](c)'}, r'a\[b\]\(c\)'),
    ],
)
def test_start(copies: tuple[Path, Path], base_model: dict | None, line: str):
    rewrite(copies[0], 'training.json', lambda facts: facts.update(base_model=base_model))
    assert f'- Started from: {line}\n' in render_card(copies[0])
    rewrite(copies[0], 'training.json', lambda facts: facts.pop('base_model'))
    assert 'Started from' not in render_card(copies[0])


def test_published_pair(copies: tuple[Path, Path]):
    """A folder that knows its place on the Hub tells how to load it from there, and links the other form."""
    for folder, sibling in zip(copies, reversed(copies)):
        rewrite(folder, 'training.json', lambda facts, name=folder.name: facts.update(repo=f'owner/{name}'))
        text = render_card(folder)
        assert text.count(f"'hf-hub:owner/{folder.name}'") == 3 and 'local-dir' not in text
        assert f'Sibling: [owner/{sibling.name}](https://huggingface.co/owner/{sibling.name}), sha256' in text
        rewrite(folder, 'training.json', lambda facts: facts['sibling'].update(repo='other/place'))
        assert 'Sibling: [other/place](https://huggingface.co/other/place), sha256' in render_card(folder)
        for repo in ('no-owner', "owner/a', pretrained=False)#", '../a/b'):
            rewrite(folder, 'training.json', lambda facts, repo=repo: facts.update(repo=repo))
            assert 'hf-hub:' not in render_card(folder)


def test_comparison_with_stock(copies: tuple[Path, Path]):
    """The table of the runs is that of the summaries in the facts; every figure comes from them."""
    common = dict(model='resnet10t', size=32, protocol='scratch', epochs=40, n=3)
    stock = Summary(
        **common, method='stock', mean=90.25, std=0.125, step_ratio=1.0, train_parameters=1000, fused_parameters=1000
    )
    counts = dict(step_ratio=1.75, train_parameters=None, fused_parameters=1000)
    compared = dict(against='scratch', pairs=2, difference=1.25, low=0.5, high=2.0)
    variant = Summary(**common, method='doconv', mean=91.5, std=None, **counts, **compared)
    for folder in copies:
        assert '## Compared with stock' not in render_card(folder)
        entries = [summary.to_dict() for summary in (stock, variant)]
        rewrite(folder, 'training.json', lambda facts, entries=entries: facts.update(results=entries))
        card = render_card(folder)
        assert format_summary([stock, variant]) in card.partition('## Compared with stock')[2]
        assert '+1.25 [+0.50, +2.00] (2 pairs)' in card


def section_on_the_fusion(folder: Path) -> str:
    return render_card(folder).partition('\n## Verification of the fusion\n\n')[2].partition('\n\n## ')[0]


def test_layers_are_named_before_the_logits(copies: tuple[Path, Path]):
    for folder in copies:
        known = ('algebra', 'stored', 'own', 'bound', 'top1_agreement', 'num_inputs', 'passed')  # by 0.1.0
        before = {key: REPORT.to_dict()[key] for key in known}
        rewrite(folder, 'training.json', lambda facts, before=before: facts.update(fusion=before))
        logits = section_on_the_fusion(folder)
        assert logits.startswith('Both forms were run') and 'layer' not in logits.lower()
        rewrite(folder, 'training.json', lambda facts: facts.update(fusion=LAYERWISE.to_dict()))
        assert LAYERWISE.passed and check_facts(json.loads((folder / 'training.json').read_text()))
        layers, _, rest = section_on_the_fusion(folder).partition('\n\nBoth forms were run')
        assert [line for line in layers.splitlines() if line.startswith('- ')] == [
            '- Layers compared, each with its own train-time layer in float64: 3',
            '- Worst layer: `layer2.0.conv2`, kernel within 0.75 units in the last place, algebra 2.75e-15, stored'
            " 6.5e-08, allowed 9e-08 (the train-time layer's own rounding: 4.5e-08)",
            '- Layers that no input reached, compared on noise alone: 1',
            '- Layers that are not verified: none',
            '- Differences between the two forms beside these layers: none',
        ]
        assert f'Both forms were run{rest}'.replace(', allowed 1e-10', '') == logits


def test_layers_of_a_report_that_did_not_pass(copies: tuple[Path, Path]):
    """No pair is saved with such facts, but somebody may write them."""
    off = dataclasses.replace(LAYERS[2], kernel=7.5)
    report = dataclasses.replace(LAYERWISE, layers=(*LAYERS[:2], off), problems=('bn1.eps: expected 1, got 2', 'act1'))
    rewrite(copies[0], 'training.json', lambda facts: facts.update(fusion=report.to_dict()))
    section = section_on_the_fusion(copies[0])
    assert '`layer3.0.conv1`, kernel within 7.5 units in the last place' in section and 'on noise alone (' in section
    assert '- Layers that are not verified: 1\n' in section
    assert '- Differences between the two forms beside these layers: 2\n' in section


@pytest.mark.parametrize(
    'layer, line',
    [
        ({'name': 'conv1'}, 'Worst layer: `conv1`'),
        ({'name': ' \n', 'kernel': 1}, 'Worst layer: kernel within 1 units in the last place'),
        ({'name': 'a`b', 'stored': 0.5, 'own': 0.25}, "Worst layer: ``a`b``, stored 0.5 (the train-time layer's own"),
    ],
)
def test_layers_of_which_little_is_known(copies: tuple[Path, Path], layer: dict, line: str):
    rewrite(copies[0], 'training.json', lambda facts: facts.update(fusion={'worst_layer': layer}))
    assert f'\n- {line}' in section_on_the_fusion(copies[0])


def test_many_labels(copies: tuple[Path, Path]):
    labels = [f'class_{index}' for index in range(30)]
    rewrite(copies[0], 'training.json', lambda facts: facts['dataset'].update(label_names=labels))
    assert 'class_18, class_19, ...\n' in render_card(copies[0])


def numbers_in(text: str) -> list[str]:
    return re.findall(r'(?<![\w.])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w])', text)


def leaves(value: object) -> list:
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (key, *leaves(item))]
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


def unknown_figures(folder: Path) -> list[str]:
    """Figures in the card of a folder that are not in its files, nor in the templates and the credits of the method."""
    known = [
        leaf for file in ('config.json', 'training.json') for leaf in leaves(json.loads((folder / file).read_text()))
    ]
    figures = [leaf for leaf in known if isinstance(leaf, (int, float)) and not isinstance(leaf, bool)]
    constants = [
        path.read_text() for path in map(template_folder().joinpath, ('train_time.md', 'fused.md', 'details.md'))
    ]
    constants += [str(vars(variant.method)) for variant in VARIANTS.values()] + ['Top-1', 'Top-5']
    allowed = {number for text in constants for number in numbers_in(text)}
    card = render_card(folder).replace(sha256_of(folder / 'model.safetensors'), '')
    for text in sorted((leaf for leaf in known if isinstance(leaf, str)), key=len, reverse=True):
        card = card.replace(text, '') if any(character.isdigit() for character in text) else card

    def is_known(number: str) -> bool:
        plain = number.replace(',', '')
        mantissa, _, exponent = plain.partition('e')
        ulp = 10.0 ** (int(exponent or 0) - len(mantissa.partition('.')[2]))
        near = [abs(float(plain) - scale * figure) <= 0.5001 * ulp for figure in figures for scale in (1, 100)]
        return number in allowed or any(near)

    return [number for number in numbers_in(card) if not is_known(number)]


def test_every_figure_is_found_in_the_files(copies: tuple[Path, Path]):
    """Also when any one fact is missing: what was not measured is not claimed."""
    profile = {'input_size': [3, 96, 112], 'batch_size': 17, 'runs': 23, 'latency_spread_ms': 0.375, 'device': 'cpu'}
    for folder, latency in zip(copies, (43.25, 32.75)):

        def measure(facts: dict, latency: float = latency) -> None:
            facts['recipe'] = {'lr': 0.0625, 'epochs': 37, 'opt': 'adamw', 'betas': [0.875, 0.96875]}
            facts['environment'] = {'torch': '2.6.0', 'timm': '1.0.31'}
            facts['fusion'] = {**LAYERWISE.to_dict(), 'num_inputs': 641, 'num_layers': 71}
            for form in facts['profile'].values():
                form.update(profile, latency_ms=latency)
                latency += 1

        rewrite(folder, 'training.json', measure)
        text = (folder / 'training.json').read_text()
        figures = numbers_in(render_card(folder))
        for figure in (
            '3',
            '96',
            '112',
            '17',
            '23',
            '0.375',
            f'{latency:g}',
            f'{latency + 1:g}',
            '0.0625',
            '641',
            '71',
            '37',
        ):
            assert figure in figures
        assert not unknown_figures(folder)

        def paths(value: object, path: tuple = ()) -> list[tuple]:
            items = value.items() if isinstance(value, dict) else ()
            return [found for key, item in items for found in ((*path, key), *paths(item, (*path, key)))]

        for *outer, key in paths(json.loads(text)):
            facts = json.loads(text)
            place = facts
            for name in outer:
                place = place[name]
            del place[key]
            (folder / 'training.json').write_text(json.dumps(facts))
            assert not unknown_figures(folder), (outer, key)

    rewrite(copies[1], 'config.json', lambda config: config.update(num_classes=9876))
    assert not unknown_figures(copies[1])


def test_the_check_of_figures_finds_a_stray_one(copies: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    text = render_card(copies[0])
    monkeypatch.setitem(globals(), 'render_card', lambda folder: text.replace('97.25', '98.25'))
    assert unknown_figures(copies[0]) == ['98.25', '98.25']


def test_costs_measured_under_different_conditions(copies: tuple[Path, Path]):
    def measure(facts: dict) -> None:
        for device, form in zip(('cpu', 'cuda'), facts['profile'].values()):
            form.update(device=device, batch_size=1, input_size=[3, 64, 64])

    rewrite(copies[0], 'training.json', measure)
    text = render_card(copies[0])
    assert '| MACs per image (3 x 64 x 64) | 7,654,321 | 654,321 |' in text
    assert '| Latency, median | 4.25 ms (batch of 1, cpu) | 2.125 ms (batch of 1, cuda) |' in text
    rewrite(copies[0], 'training.json', lambda facts: facts['profile']['fused'].pop('latency_ms'))
    assert '| Latency, median (batch of 1, cpu) | 4.25 ms |  |' in render_card(copies[0])


@pytest.mark.parametrize('variant', VARIANTS)
def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, variant: str):
    """What a card tells to run runs, in both forms, from the place where the folders lie."""
    (tmp_path / 'path' / 'to').mkdir(parents=True)
    model = timm.create_model(f'resnet10t_{variant}', **TINY)
    data_config = {'input_size': (3, 32, 32), 'crop_pct': 1.0, 'interpolation': 'bilinear'}
    folders = save_pair(model, tmp_path / 'path' / 'to', tag='t', report=REPORT, facts=FACTS, data_config=data_config)
    Image.new('L', (70, 80)).save(tmp_path / 'image.jpg')
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        blocks = re.findall(r'(?ms)^```python\n(.*?)^```', (folder / 'README.md').read_text())
        assert len(blocks) == 2
        for block in blocks:
            exec(compile(block, folder.name, 'exec'), {})
    shapes = 'torch.Size([2, 8, 8, 8])'
    assert capsys.readouterr().out.count(shapes) == 2


@pytest.mark.parametrize('variant', [pytest.param('doconv', marks=pytest.mark.slow), 'dyconv'])
def test_snippets_register_what_no_import_does(tmp_path: Path, variant: str):
    """Each in a process of its own, where nobody has registered the architecture yet."""
    (tmp_path / 'path' / 'to').mkdir(parents=True)
    model = timm.create_model(timm_reparam.register_variant('seresnet18', variant), **TINY)
    data_config = {'input_size': (3, 32, 32), 'crop_pct': 1.0, 'interpolation': 'bilinear'}
    folders = save_pair(model, tmp_path / 'path' / 'to', tag='t', report=REPORT, data_config=data_config)
    Image.new('RGB', (70, 80)).save(tmp_path / 'image.jpg')
    call = f"timm_reparam.register_variant('seresnet18', '{variant}')\n"
    codes = []
    for folder in folders:
        blocks = re.findall(r'(?ms)^```python\n(.*?)^```', (folder / 'README.md').read_text())
        needs_plugin = folder is folders[0] or variant == 'dyconv'
        assert [block.count(call) for block in blocks] == [int(needs_plugin)] * 2
        codes.append('\n'.join(blocks))
    for code in codes:
        done = finished(run_code, code, folder=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('variant', VARIANTS)
def test_every_method(tmp_path: Path, variant: str):
    folders = save_pair(
        timm.create_model(f'resnet10t_{variant}', **TINY), tmp_path, tag='t', report=REPORT, facts=FACTS
    )
    train_time, fused = (render_card(folder) for folder in folders)
    title = VARIANTS[variant].method.title
    assert title in train_time and title in fused
    assert ('not a stock timm model' in fused) == (variant == 'dyconv')
    assert ('import timm_reparam' in fused) == (variant == 'dyconv')


def test_markdown_layout(pair: tuple[Path, Path]):
    """Headings and fences stand on lines of their own, tables have no gaps, and there are no runs of empty lines."""
    for folder in pair:
        text = (folder / 'README.md').read_text()
        assert '\n\n\n' not in text and text.endswith('\n') and not text.endswith('\n\n')
        assert not re.search(r'[ \t]\n', text)
        assert text.count('```') == 2 * 4
        body = '\n' + text.split('\n---\n', 1)[1]
        for match in re.finditer(r'(?m)^#+ ', body):
            assert body[: match.start()].endswith('\n\n')
        for table in re.findall(r'(?m)(?:^\|.*\n)+', text):
            header, rule, *rows = table.splitlines()
            assert rows and re.fullmatch(r'[|\-: ]+', rule)
            assert len({line.count('|') for line in (header, rule, *rows)}) == 1


def outside_of_code(text: str) -> str:
    """Body of a card without its fenced blocks and code spans."""
    body = text.split('\n---\n', 1)[1]
    body = re.sub(r'(?ms)^(`{3,})\w*\n.*?^\1$', '', body)
    return re.sub(r'(?<![`\\])(`+)(?!`)[^\n]*?(?<!`)\1(?!`)', '', body)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text_stays_where_it_is_put(copies: tuple[Path, Path], text: str):
    def poison(facts: dict) -> None:
        facts.update(tag=text, variant=text, stock_architecture=text, name=text)
        facts.update(license_name=text, license_link=text, repo=text)
        facts['base_model'].update(id=text, revision=text, license=text)
        facts['dataset'].update(name=text, id=text, split=text, label_names=[text, text])
        facts['sibling'].update(name=text, repo=text, sha256=text)
        facts['recipe'] = {text: text}
        facts['environment'] = {text: text}
        facts['metrics'] = {form: {text: 1.0, 'top1': 2.0} for form in ('train_time', 'fused')}
        facts['fusion'].update(layers_without_input=[text], layers_off=[{'name': text}], problems=[text])
        facts['fusion']['worst_layer'].update(name=text, problems=[text])
        for profile in facts['profile'].values():
            profile.update(device=text, dtype=text)

    for folder in copies:
        fusion = LAYERWISE.to_dict()
        rewrite(folder, 'training.json', lambda facts, fusion=fusion: facts.update(license='apache-2.0', fusion=fusion))
        clean = render_card(folder)
        rewrite(folder, 'training.json', poison)
        rewrite(folder, 'config.json', lambda config: config.update(architecture=text + config['architecture']))
        rewrite(folder, 'config.json', lambda config: config['pretrained_cfg'].update(license=text, tag=text))
        card = render_card(folder)
        data = ModelCard(card).data
        assert data.license == 'apache-2.0'
        assert data.datasets is None and data.base_model is None  # no repo of that name can be
        front = yaml.safe_load(card.split('\n---\n', 1)[0])
        assert set(front) <= {*yaml.safe_load(clean.split('\n---\n', 1)[0]), 'license_name', 'license_link'}
        body, clean_body = outside_of_code(card), outside_of_code(clean)
        # no heading, quote, rule, fence, table row or paragraph that was not there before, and no list item but for
        # facts that the clean card has too
        assert len(re.findall(r'(?m)^#', body)) == len(re.findall(r'(?m)^#', clean_body)) - 2  # method and citation
        assert not re.search(r'(?m)^(>|---|\s*```|=|\d+\.)', body)
        assert len(re.findall(r'(?m)^\s*[-*+] ', body)) == len(re.findall(r'(?m)^\s*[-*+] ', clean_body))
        for line in body.splitlines():
            assert line.count('|') - line.count('\\|') in (0, 3, 4)
        assert not re.search(r'(?<!\\)\]\((?!https://arxiv.org/abs/)', body)
        assert not re.search(r'<(?!/?br)', body)
        assert not re.search(r'(?<!\\)[*$~]owned', body)
        assert '49' not in re.sub(r'[0-9a-f]{64}', '', body)
        assert not re.search(r'https?://(?!arxiv.org)', body) and 'www.' not in body
        assert all(character.isprintable() or character == '\n' for character in card)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text_in_code_and_licence(copies: tuple[Path, Path], text: str):
    """Code stays the code that it was, json stays json, and the licence is a plain name or none."""
    for folder in copies:
        blocks = re.findall(r'(?ms)^(`{3,})(\w+)\n(.*?)^\1$', render_card(folder))

        def poison(facts: dict) -> None:
            facts.update(repo=text, license=text, license_name=text, license_link=text)
            facts['sibling'].update(repo=text)
            facts['recipe'] = {text: {text: [text]}}

        rewrite(folder, 'training.json', poison)
        card = render_card(folder)
        found = re.findall(r'(?ms)^(`{3,})(\w+)\n(.*?)^\1$', card)
        assert [language for _, language, _ in found] == ['python', 'python', 'json', 'bibtex']
        for (_, language, before), (_, _, after) in zip(blocks, found):
            assert json.loads(after) == {text: {text: [text]}} if language == 'json' else after == before
        front = yaml.safe_load(card.split('\n---\n', 1)[0])
        license_name = front.get('license_name')
        assert license_data(read_facts(folder)).get('license') == front.get('license') == (license_name and 'other')
        assert license_name is None or re.fullmatch(r'[a-z0-9][a-z0-9.-]*', license_name)
        assert 'license_link' not in front
        line = next(line for line in card.splitlines() if line.startswith('- License:'))
        assert line.replace('\\', '') == f'- License: {license_name or "none is stated"}'
        assert ModelCard(card).data.base_model == FACTS['base_model']['id']


@pytest.mark.parametrize(
    'facts, words',
    [
        ([], 'dict'),
        ({'form': 'other'}, 'form'),
        ({'name': 3}, 'name'),
        ({'dataset': 'shapes'}, 'dataset'),
        ({'dataset': {'train_images': '1500'}}, 'dataset.train_images'),
        ({'dataset': {'label_names': [1]}}, r'label_names\[0\]'),
        ({'metrics': {'fused': {'top1': '97'}}}, 'metrics.fused.top1'),
        ({'metrics': {'fused': {'top1': True}}}, 'metrics.fused.top1'),
        ({'metrics': {'fused': [97]}}, 'metrics.fused'),
        ({'profile': {'fused': {'macs': 1.5}}}, 'profile.fused.macs'),
        ({'fusion': {'algebra': 'small'}}, 'fusion.algebra'),
        ({'fusion': {'algebra': 10**400}}, 'fusion.algebra: expected a float'),
        ({'fusion': {'algebra_bound': [1]}}, 'fusion.algebra_bound'),
        ({'fusion': {'num_layers': 1.5}}, 'fusion.num_layers'),
        ({'fusion': {'num_layers': True}}, 'fusion.num_layers'),
        ({'fusion': {'worst_layer': 'conv1'}}, 'fusion.worst_layer'),
        ({'fusion': {'worst_layer': {'name': 1}}}, 'fusion.worst_layer.name'),
        ({'fusion': {'worst_layer': {'kernel': '1'}}}, 'fusion.worst_layer.kernel'),
        ({'fusion': {'worst_layer': {'algebra': True}}}, 'fusion.worst_layer.algebra'),
        ({'fusion': {'worst_layer': {'stored': {}}}}, 'fusion.worst_layer.stored'),
        ({'fusion': {'worst_layer': {'own': float('nan')}}}, 'fusion'),
        ({'fusion': {'worst_layer': {'bound': -(10**400)}}}, 'fusion.worst_layer.bound: expected a float'),
        ({'fusion': {'worst_layer': {'num_inputs': 1.5}}}, 'fusion.worst_layer.num_inputs'),
        ({'fusion': {'worst_layer': {'problems': 'none'}}}, 'fusion.worst_layer.problems'),
        ({'fusion': {'worst_layer': {'problems': [1]}}}, r'fusion.worst_layer.problems\[0\]'),
        ({'fusion': {'layers_without_input': 'conv1'}}, 'fusion.layers_without_input'),
        ({'fusion': {'layers_without_input': ['conv1', None]}}, r'fusion.layers_without_input\[1\]'),
        ({'fusion': {'layers_off': {}}}, 'fusion.layers_off'),
        ({'fusion': {'layers_off': [None]}}, r'fusion.layers_off\[0\]'),
        ({'fusion': {'layers_off': [{}, {'kernel': 'x'}]}}, r'fusion.layers_off\[1\].kernel'),
        ({'fusion': {'problems': 'none'}}, 'fusion.problems'),
        ({'fusion': {'problems': [['a']]}}, r'fusion.problems\[0\]'),
        ({'environment': {'torch': 2}}, 'environment.torch'),
        ({'logit_difference': float('inf')}, 'logit_difference'),
        ({'recipe': {'path': Path('x')}}, 'recipe'),
        ({'base_model': 'timm/resnet18'}, 'base_model'),
        ({'sibling': {'sha256': 5}}, 'sibling.sha256'),
        ({'results': {}}, 'results'),
        ({'results': [{'method': 'doconv'}]}, r'results\[0\]'),
    ],
)
def test_facts_of_the_wrong_form(facts: dict, words: str):
    with pytest.raises(ReparamError, match=words):
        check_facts(facts)


def test_facts_are_kept_as_plain_values():
    facts = check_facts({**FACTS, 'own': {'key': (1, 2)}, 'base_model': None})
    assert facts['own'] == {'key': [1, 2]}
    assert facts['base_model'] is None
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    'file, content',
    [
        ('config.json', None),
        ('config.json', '{'),
        ('config.json', '[]'),
        ('config.json', '{"architecture": 5}'),
        ('config.json', '{"architecture": "resnet18", "pretrained_cfg": []}'),
        ('config.json', '{"architecture": "resnet18", "reparam_format": 0}'),
        ('training.json', '{'),
        ('training.json', '{"form": "other"}'),
        ('training.json', '[]'),
        ('model.safetensors', None),
    ],
)
def test_folders_that_cannot_be_described(copies: tuple[Path, Path], file: str, content: str | None):
    (copies[0] / file).unlink() if content is None else (copies[0] / file).write_text(content)
    with pytest.raises(ReparamError, match=file):
        render_card(copies[0])


def test_format_of_the_configuration(copies: tuple[Path, Path]):
    def read_as(version: object) -> dict:
        rewrite(copies[0], 'config.json', lambda config: config.update(reparam_format=version))
        return read_config(copies[0])

    assert read_config(copies[0])['reparam_format'] == 2
    rewrite(copies[0], 'config.json', lambda config: config.pop('reparam_format'))
    assert 'reparam_format' not in read_config(copies[0])  # that of 0.1.0
    for version in (1, 2):
        assert read_as(version)['reparam_format'] == version
    for nonsense in (0, -1, 1.0, '2', None, True, [2]):
        with pytest.raises(ReparamError) as error:
            read_as(nonsense)
        for words in ('config.json.reparam_format: expected a positive integer', f'got {nonsense!r}; save or fetch'):
            assert words in str(error.value)
    for version in (3, 10**9):
        with pytest.raises(ReparamError, match=rf'expected at most 2, got {version}, .*; upgrade timm-reparam'):
            read_as(version)
        with pytest.raises(ReparamError, match='upgrade timm-reparam'):
            load_checkpoint(copies[0])


def test_templates_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A wheel carries the templates inside the package; without them there is an error, not an empty card."""
    inside = shutil.copytree(template_folder(), tmp_path / 'timm_reparam' / 'model_cards')
    monkeypatch.setattr(importlib.resources, 'files', lambda package: tmp_path / package)
    assert template_folder() == inside
    shutil.rmtree(inside)
    with pytest.raises(ReparamError, match=rf'{inside.parent}: expected model_cards/ inside the package'):
        template_folder()


def test_templates_are_found():
    assert {path.name for path in template_folder().iterdir()} >= {'train_time.md', 'fused.md', 'details.md'}
