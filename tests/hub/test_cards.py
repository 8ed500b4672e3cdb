"""Cards: they parse, say what the files say and nothing else, and no text from outside gets out of its place."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import ModelCard

import timm_reparam
from timm_reparam import ReparamError
from timm_reparam.convert import VARIANTS
from timm_reparam.hub import check_facts, render_card, save_checkpoint, save_pair
from timm_reparam.hub.cards import sha256_of, template_folder

TINY = dict(num_classes=2, channels=(8, 8, 8, 8), stem_width=4)
REPORT = timm_reparam.FusionReport(
    algebra=1.25e-15, stored=1.5e-7, own=1.75e-7, bound=3.5e-7, top1_agreement=1.0, num_inputs=64
)
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
        assert VARIANTS['doconv'][0].method.title in text and VARIANTS['doconv'][0].method.arxiv in text
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
    assert 'fused' not in text.lower() and 'proof' not in text.lower() and 'cost' not in text.lower()
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


@pytest.mark.filterwarnings('ignore:.*without pretrained weights')
@pytest.mark.parametrize('variant', VARIANTS)
def test_every_method(tmp_path: Path, variant: str):
    folders = save_pair(
        timm.create_model(f'resnet10t_{variant}', **TINY), tmp_path, tag='t', report=REPORT, facts=FACTS
    )
    train_time, fused = (render_card(folder) for folder in folders)
    title = VARIANTS[variant][0].method.title
    assert title in train_time and title in fused
    assert ('not a stock timm model' in fused) == (variant == 'dyconv')
    assert ('import timm_reparam' in fused) == (variant == 'dyconv')


def test_markdown_layout(pair: tuple[Path, Path]):
    """Headings and fences stand on lines of their own, tables have no gaps, and there are no runs of empty lines."""
    for folder in pair:
        text = (folder / 'README.md').read_text()
        assert '\n\n\n' not in text and text.endswith('\n') and not text.endswith('\n\n')
        assert not re.search(r'[ \t]\n', text)
        assert text.count('```') == 2 * 3
        body = '\n' + text.split('\n---\n', 1)[1]
        for match in re.finditer(r'(?m)^#+ ', body):
            assert body[: match.start()].endswith('\n\n')
        for table in re.findall(r'(?m)(?:^\|.*\n)+', text):
            header, rule, *rows = table.splitlines()
            assert rows and re.fullmatch(r'[|\-: ]+', rule)
            assert len({line.count('|') for line in (header, rule, *rows)}) == 1


def outside_of_code(text: str) -> str:
    """Body of a card without its fenced blocks."""
    body = text.split('\n---\n', 1)[1]
    return re.sub(r'(?ms)^(`{3,})\w*\n.*?^\1$', '', body)


@pytest.mark.parametrize('text', HOSTILE)
def test_hostile_text_stays_where_it_is_put(copies: tuple[Path, Path], text: str):
    def poison(facts: dict) -> None:
        facts.update(tag=text, variant=text, stock_architecture=text, name=text)
        facts.update(license_name=text, license_link=text)
        facts['base_model'].update(id=text, revision=text)
        facts['dataset'].update(name=text, id=text, split=text, label_names=[text, text])
        facts['sibling'].update(name=text, sha256=text)
        facts['recipe'] = {text: text}
        facts['environment'] = {text: text}
        facts['metrics'] = {form: {text: 1.0, 'top1': 2.0} for form in ('train_time', 'fused')}
        for profile in facts['profile'].values():
            profile.update(device=text, dtype=text)

    for folder in copies:
        rewrite(folder, 'training.json', lambda facts: facts.update(license='apache-2.0'))
        clean = render_card(folder)
        rewrite(folder, 'training.json', poison)
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
        ({'environment': {'torch': 2}}, 'environment.torch'),
        ({'logit_difference': float('inf')}, 'logit_difference'),
        ({'recipe': {'path': Path('x')}}, 'recipe'),
        ({'base_model': 'timm/resnet18'}, 'base_model'),
        ({'sibling': {'sha256': 5}}, 'sibling.sha256'),
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


def test_templates_of_an_installed_package(tmp_path: Path):
    """A wheel carries the templates inside the package; without them there is an error, not an empty card."""
    package = shutil.copytree(Path(timm_reparam.__file__).parent, tmp_path / 'timm_reparam')
    inside = shutil.copytree(template_folder(), package / 'model_cards')
    code = """
import shutil
import timm_reparam
from timm_reparam.hub.cards import template_folder
print(template_folder())
shutil.rmtree(template_folder())
try:
    template_folder()
except timm_reparam.ReparamError as error:
    print(error)
"""
    env = {**os.environ, 'PYTHONPATH': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, '-c', code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    found, missing = done.stdout.splitlines()
    assert found == str(inside)
    assert str(package) in missing and 'model_cards' in missing


def test_templates_are_found():
    assert {path.name for path in template_folder().iterdir()} >= {'train_time.md', 'fused.md', 'details.md'}
