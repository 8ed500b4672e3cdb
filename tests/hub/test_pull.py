"""Fetching pairs from the loopback Hub and verifying them from outside."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from stand_in import randomise

from hub.server import HubServer
from timm_reparam import FusionReport, ReparamError
from timm_reparam.cli import main
from timm_reparam.hub import load_checkpoint, publish, pull, render_card, save_pair, self_check, verify
from timm_reparam.hub.client import without_secrets

NAMES = ('resnet10t_doconv.t', 'resnet10t_doconv.t_fused')
REPORT = FusionReport(algebra=1e-15, stored=1e-7, own=1e-7, bound=1e-6, top1_agreement=1.0, num_inputs=64)
CHECK = 'test/rand_tensors.safetensors'

pytestmark = pytest.mark.usefixtures('short_waits', 'verified_once')


def save(zoo: Path, seed: int = 1, tag: str = 't', **options) -> tuple[Path, Path]:
    torch.manual_seed(seed)
    options = {'num_classes': 4, 'channels': (8, 8, 8, 8), 'stem_width': 4, **options}
    model = randomise(timm.create_model('resnet10t_doconv', **options), seed=seed).eval()
    data_config = dict(input_size=(3, 32, 32), crop_pct=1.0)
    # written down without a verification, for speed: what is published and pulled is verified then
    return save_pair(model, zoo, tag=tag, report=REPORT, facts={'license': 'mit'}, data_config=data_config)


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save(tmp_path_factory.mktemp('zoo'))


@pytest.fixture(scope='module')
def contents(pair: tuple[Path, Path]) -> dict[str, dict[str, bytes]]:
    """What publishing the pair puts into each repository."""
    found = {}
    for folder in pair:
        found[folder.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
        sha256 = hashlib.sha256(found[folder.name]['model.safetensors']).hexdigest()
        found[folder.name][CHECK] = self_check(load_checkpoint(folder), sha256)
    return found


@pytest.fixture
def published(hub: HubServer, owner: str, contents: dict[str, dict[str, bytes]]) -> str:
    """The namespace with the pair in it."""
    for name, files in contents.items():
        hub.commit(f'{owner}/{name}', files)
    return owner


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def change(hub: HubServer, repo_id: str, path: str, edit: Callable[[bytes], bytes | None]) -> None:
    old = b''.join(hub.repos[repo_id].branches['main'].files[path].read())
    hub.commit(repo_id, {path: edit(old)})


def change_json(**values) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **values}).encode()


def change_weights(content: bytes) -> bytes:
    tensors = safetensors.torch.load(content)
    return safetensors.torch.save({**tensors, 'fc.bias': tensors['fc.bias'] + 1}, metadata={'format': 'pt'})


# pull


def test_as_published(hub: HubServer, published: str, pair: tuple[Path, Path]):
    """What these tests fetch is what publish makes, but for the name of the repo."""
    report = publish(pair[0], published)
    assert [result.files for result in report.results] == [['README.md', 'training.json']] * 2


def test_pulled_pair_is_equal(hub: HubServer, owner: str, pair: tuple[Path, Path], tmp_path: Path):
    publish(pair[0], owner)
    pull(f'{owner}/{NAMES[0]}', tmp_path / 'zoo')
    assert verify(tmp_path / 'zoo' / NAMES[0]).passed
    assert publish(tmp_path / 'zoo' / NAMES[0], owner).sent == []


@pytest.mark.parametrize('name', NAMES)
def test_pull_one_model(hub: HubServer, published: str, pair: tuple[Path, Path], tmp_path: Path, name: str):
    report = pull(f'{published}/{name}', tmp_path / 'zoo')
    assert [result.status for result in report.results] == ['sent', 'sent'] and report.ok
    assert sorted(os.listdir(tmp_path / 'zoo')) == list(NAMES)
    assert snapshot(tmp_path / 'zoo') == snapshot(pair[0].parent)
    assert {entry.method for entry in hub.log} <= {'GET', 'HEAD'}
    hub.clear()
    assert len(pull(f'{published}/{name}', tmp_path / 'zoo').skipped) == 2
    assert not any('resolve' in entry.path for entry in hub.log)


def test_pull_a_namespace(hub: HubServer, published: str, tmp_path: Path):
    publish(save(tmp_path / 'other', seed=2, tag='u')[0], published)
    hub.commit(f'{published}/unrelated', {'README.md': '# Not ours'})
    hub.commit(f'{published}/half.t_fused', {'README.md': '---\ntags: [timm-reparam]\n---\n'})
    report = pull(published, tmp_path / 'zoo')
    assert len(report.sent) == 4 and len(report.refused) == 2 and not report.ok
    assert 'half.t' in report.refused[0].why
    assert sorted(os.listdir(tmp_path / 'zoo')) == [*NAMES, 'resnet10t_doconv.u', 'resnet10t_doconv.u_fused']


def test_pull_replaces_the_same_architecture_only(hub: HubServer, published: str, pair, tmp_path: Path):
    zoo = tmp_path / 'zoo'
    save(zoo, seed=5)
    report = pull(f'{published}/{NAMES[0]}', zoo)
    assert len(report.sent) == 2 and all('replaced another version' in result.why for result in report.sent)
    assert snapshot(zoo) == snapshot(pair[0].parent)
    shutil.rmtree(zoo / NAMES[1])
    (zoo / NAMES[1]).mkdir()
    (zoo / NAMES[1] / 'notes.txt').write_text('mine')
    with pytest.raises(ReparamError, match='notes.txt'):
        pull(f'{published}/{NAMES[0]}', zoo)
    assert (zoo / NAMES[1] / 'notes.txt').read_text() == 'mine'


def test_pull_a_revision(hub: HubServer, published: str, pair: tuple[Path, Path], tmp_path: Path):
    for name in NAMES:
        repo = hub.repos[f'{published}/{name}']
        repo.tags['v1'] = repo.branches['main']
    publish(save(tmp_path / 'new', seed=4)[0], published)
    pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo', revision='v1')
    assert snapshot(tmp_path / 'zoo') == snapshot(pair[0].parent)
    with pytest.raises(ReparamError, match="no revision 'v2'"):
        pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo', revision='v2')


def test_pull_a_private_model(hub: HubServer, owner: str, pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    publish(pair[0], owner, private=True)
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(ReparamError, match='does not show it to this token'):
        pull(f'{owner}/{NAMES[0]}', tmp_path / 'zoo')
    assert pull(f'{owner}/{NAMES[0]}', tmp_path / 'zoo', token='hf_owner').ok


def test_pull_a_gated_model(hub: HubServer, published: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.repos[f'{published}/{NAMES[0]}'].gated = 'manual'
    monkeypatch.setenv('HF_TOKEN', 'hf_stranger')
    with pytest.raises(ReparamError, match='permission'):
        pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo')


def pickle_only(hub: HubServer, repo_id: str) -> None:
    hub.commit(repo_id, {'model.safetensors': None, 'pytorch_model.bin': b'cos\nsystem\n'})


def edited(path: str, edit: Callable[[bytes], bytes | None]) -> Callable[[HubServer, str], None]:
    return lambda hub, repo_id: change(hub, repo_id, path, edit)


def args(**values) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        config = json.loads(content)
        return json.dumps({**config, 'model_args': {**config['model_args'], **values}}).encode()

    return edit


@pytest.mark.parametrize(
    'spoil, words',
    [
        (pickle_only, 'only as a pickle, pytorch_model.bin'),
        (edited('model.safetensors', lambda content: None), 'no model.safetensors'),
        (edited('config.json', lambda content: None), 'no config.json'),
        (edited('config.json', lambda content: b'{'), 'json'),
        (edited('config.json', lambda content: b'[' * 10**6), 'json'),
        (edited('config.json', change_json(architecture='resnet_of_nobody')), 'resnet_of_nobody'),
        (edited('config.json', change_json(architecture='../../up')), 'up'),
        (edited('config.json', change_json(pretrained_cfg={'file': '/etc/passwd'})), 'elsewhere'),
        (edited('config.json', change_json(pretrained_cfg={'custom_load': True})), 'elsewhere'),
        (edited('config.json', args(num_classes=10**12)), 'expected a number of at most'),
        (edited('config.json', args(layers=[10**9, 1, 1, 1])), 'expected a number of at most'),
        (edited('config.json', args(num_classes=1e400)), 'expected a number of at most'),
        (edited('config.json', args(num_classes=7)), 'fc.bias'),
        (edited('config.json', args(pretrained=True)), 'model_args.pretrained'),
        (edited('config.json', args(checkpoint_path='/etc/passwd')), 'model_args.checkpoint_path'),
        (edited('config.json', args(nonsense=1)), 'model_args.nonsense: is not an argument of resnet10t_doconv'),
        (edited('config.json', lambda content: content + b' ' * 2**25), 'at most'),
        (edited('model.safetensors', lambda content: content[:-100]), 'not a safetensors file'),
        (edited('model.safetensors', lambda content: b'\xff' * 100), 'not a safetensors file'),
        (edited('model.safetensors', change_weights), 'not from one save'),
        (edited('training.json', lambda content: b'[]'), 'json object'),
    ],
)
def test_pull_refuses(hub: HubServer, published: str, tmp_path: Path, spoil, words: str):
    spoil(hub, f'{published}/{NAMES[0]}')
    with pytest.raises(ReparamError, match=words) as raised:
        pull(f'{published}/{NAMES[1]}', tmp_path / 'zoo')
    assert '\n' not in str(raised.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('source', ['../..', 'a/../b', '/etc', 'a/b/c', '~', '', 'a\\b', 'a b/c', 'é/x'])
def test_names_are_checked_first(hub: HubServer, tmp_path: Path, source: str):
    with pytest.raises(ReparamError, match='expected a repo'):
        pull(source, tmp_path / 'zoo')
    assert not hub.log and os.listdir(tmp_path) == []


def test_files_with_other_names_stay_there(hub: HubServer, published: str, tmp_path: Path):
    hub.commit(f'{published}/{NAMES[0]}', {'../up.txt': 'x', 'sitecustomize.py': 'x', 'pytorch_model.bin': b'x'})
    pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo')
    assert sorted(os.listdir(tmp_path)) == ['zoo']
    assert sorted(os.listdir(tmp_path / 'zoo' / NAMES[0])) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'training.json',
    ]


@pytest.mark.parametrize(
    'kind', ['503', 'truncate', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('429', 'drop_before'))]
)
def test_pull_waits_out_what_passes(hub: HubServer, published: str, pair, tmp_path: Path, kind: str):
    fault = hub.faults.add(kind, method='GET', path='resolve/.*/model.safetensors')
    pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo')
    assert fault.hits == 1 and snapshot(tmp_path / 'zoo') == snapshot(pair[0].parent)


def test_pull_compares_hashes(hub: HubServer, published: str, tmp_path: Path):
    hub.faults.add('wrong_hash', method='GET', path='resolve/.*/model.safetensors', times=None)
    with pytest.raises(ReparamError, match='expected the hash that the Hub gives'):
        pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo')
    assert os.listdir(tmp_path) == []


def test_no_network(tmp_path: Path):
    with pytest.raises(ReparamError, match='a/b: no answer from http://127.0.0.1:9 .*local folder') as raised:
        pull('a/b', tmp_path / 'zoo', endpoint='http://127.0.0.1:9')
    assert '\n' not in str(raised.value)


def test_secrets_of_the_machine_are_in_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Neither in the line of an error nor in its traceback."""
    monkeypatch.setenv('HOME', str(tmp_path / 'somebody'))
    address = 'http://somebody:secret@127.0.0.1:9'
    with pytest.raises(ReparamError) as raised:
        pull('a/b', tmp_path, endpoint=address)
    assert 'secret' not in str(raised.value) and 'http://***@127.0.0.1:9' in str(raised.value)
    assert main(['-v', 'verify', str(tmp_path / 'somebody/zoo')]) == 1
    printed = capsys.readouterr().err
    assert 'Traceback' in printed and '~/zoo' in printed and 'somebody' not in printed
    assert without_secrets(f'hf_{"aB3" * 11} http://a:b@c/d hf_hub_id') == '*** http://***@c/d hf_hub_id'


def test_offline(owner: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)  # as the variable of that name does
    assert main(['pull', f'{owner}/{NAMES[0]}', str(tmp_path / 'zoo')]) == 1
    printed = capsys.readouterr().err
    assert printed.count('\n') == 1, printed
    assert NAMES[0] in printed and 'HF_HUB_OFFLINE' in printed and 'local-dir' in printed


# verify


@pytest.mark.parametrize('name', NAMES)
def test_verify_a_repo(hub: HubServer, published: str, name: str):
    report = verify(f'{published}/{name}')
    assert report.passed and report.fusion.passed and not report.problems
    assert len(report.checks) == 9 and all(report.checks.values()) and not report.warnings
    assert json.loads(json.dumps(report.to_dict()))['passed'] is True
    assert 'verified' in str(report) and 'algebra' in str(report)
    assert {entry.method for entry in hub.log} <= {'GET', 'HEAD'}


@pytest.mark.parametrize('name', NAMES)
def test_verify_a_folder(hub: HubServer, pair: tuple[Path, Path], name: str):
    report = verify(pair[0].with_name(name))
    assert report.passed and not hub.log


def change_claim(content: bytes) -> bytes:
    return content.replace(b'license: mit', b'license: apache-2.0')


def change_figure(content: bytes) -> bytes:
    changed = re.sub(
        rb'Algebra, both forms in float64: relative difference [^\n]*', b'Algebra, both forms in float64: 0', content
    )
    assert changed != content
    return changed


def change_tensors(content: bytes) -> bytes:
    tensors = safetensors.torch.load(content)
    return safetensors.torch.save({**tensors, 'output': tensors['output'] + 1})


@pytest.mark.parametrize(
    'path, edit, words',
    [
        ('README.md', change_claim, 'license: expected'),
        ('README.md', lambda content: b'# Mine', 'expected front matter'),
        (CHECK, change_tensors, 'output: differs'),
        (CHECK, lambda content: content[:-10], 'cannot be read'),
        ('model.safetensors', change_weights, 'sha256'),
    ],
)
def test_verify_finds(hub: HubServer, published: str, path: str, edit, words: str):
    for name in NAMES:
        change(hub, f'{published}/{name}', path, edit)
        report = verify(f'{published}/{NAMES[0]}')
        assert not report.passed and any(words in problem for problem in report.problems), report.problems
        assert not all(report.checks.values()) and 'NOT verified' in str(report)


def test_a_self_check_that_is_not_there(hub: HubServer, published: str, pair: tuple[Path, Path], tmp_path: Path):
    change(hub, f'{published}/{NAMES[1]}', CHECK, lambda content: None)
    for call in (verify, lambda repo_id: pull(repo_id, tmp_path / 'zoo')):
        with pytest.raises(ReparamError, match=f'{NAMES[1]}: has no {CHECK}; expected a checkpoint, as publish'):
            call(f'{published}/{NAMES[0]}')
    publish(pair[0], published)
    assert verify(f'{published}/{NAMES[0]}').passed


@pytest.mark.parametrize('edit', [change_figure, lambda content: content + b'My notes.\n', None])
def test_text_of_a_card_is_a_warning(hub: HubServer, published: str, pair, tmp_path: Path, edit):
    """A card of other templates, with text of somebody's own, or none at all."""
    change(hub, f'{published}/{NAMES[0]}', 'README.md', edit or (lambda content: None))
    report = verify(f'{published}/{NAMES[0]}')
    assert report.passed and len(report.warnings) == 1 and f'warning: {NAMES[0]}/README.md: ' in str(report)
    first, second = pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo').results
    assert report.warnings[0] in first.why and second.why == 'fetched'


@pytest.mark.parametrize(
    'place, values',
    [
        (
            'pretrained_cfg',
            {
                'mean': [0.1, 0.1, 0.1],
                'std': [0.1, 0.1, 0.1],
                'interpolation': 'nearest',
                'crop_pct': 0.5,
                'crop_mode': 'border',
                'input_size': [3, 64, 64],
                'license': 'gpl-3.0',
                'label_names': ['d', 'c', 'b', 'a'],
            },
        ),
        ('', {'label_names': ['d', 'c', 'b', 'a']}),
    ],
)
def test_forms_with_different_configurations(hub: HubServer, owner: str, pair, tmp_path: Path, place, values):
    """What is done to an image, and what its logits stand for, is the same in both forms; each difference is named."""
    folder, fused = (Path(shutil.copytree(one, tmp_path / one.name)) for one in pair)
    path = fused / 'config.json'
    config = json.loads(path.read_text())
    (config[place] if place else config).update(values)
    path.write_text(json.dumps(config))
    (fused / 'README.md').write_text(render_card(fused))
    report = verify(folder)
    assert not report.passed and not report.checks[f'{NAMES[0]}: configurations']
    for key, value in values.items():
        key = f'{place}.{key}' if place else key
        found = re.findall(rf'{NAMES[1]}/config.json: {key}: expected .*?, got (.*?)(?:;| \()', report.problems[0])
        assert set(found) == {repr(value)}
    with pytest.raises(ReparamError, match=f'config.json: {key}: expected'):
        publish(folder, owner)
    assert not any(repo_id.startswith(f'{owner}/') for repo_id in hub.repos)


@pytest.mark.parametrize('place', ['', 'pretrained_cfg'])
@pytest.mark.parametrize('value', [7, None, 'x'])
def test_a_number_of_classes_that_is_not_that_of_the_weights(owner: str, pair, tmp_path: Path, place: str, value):
    """timm would drop the classifier, and leave it at its random start."""
    folders = [Path(shutil.copytree(one, tmp_path / one.name)) for one in pair]
    for folder in folders:
        config = json.loads((folder / 'config.json').read_text())
        (config[place] if place else config)['num_classes'] = value
        (folder / 'config.json').write_text(json.dumps(config))
        with pytest.raises(ReparamError, match='num_classes: expected 4, as in the weights'):
            load_checkpoint(folder)
    report = verify(folders[0])
    assert not report.passed and report.fusion is None and len(report.problems) == 2
    with pytest.raises(ReparamError, match='num_classes: expected 4'):
        publish(folders[0], owner)


@pytest.mark.parametrize('form', [0, 1])
@pytest.mark.parametrize('key, value', [('variant', 'acconv'), ('stock_architecture', 'resnet26t')])
def test_facts_of_another_variant(owner: str, pair, tmp_path: Path, form: int, key: str, value: str):
    """The card says them, and nothing in the weights of the fused form could tell."""
    folders = [Path(shutil.copytree(one, tmp_path / one.name)) for one in pair]
    facts = json.loads((folders[form] / 'training.json').read_text())
    (folders[form] / 'training.json').write_text(json.dumps({**facts, key: value}))
    (folders[form] / 'README.md').write_text(render_card(folders[form]))
    report = verify(folders[0])
    assert not report.passed and f'{NAMES[form]}/training.json: {key}: expected ' in report.problems[0]
    with pytest.raises(ReparamError, match=f'training.json: {key}: expected'):
        publish(folders[0], owner)


def test_a_damaged_self_check_is_mended_as_the_error_says(hub: HubServer, published: str, pair: tuple[Path, Path]):
    repo = f'{published}/{NAMES[1]}'
    change(hub, repo, CHECK, change_tensors)
    (problem,) = verify(repo).problems
    assert problem.endswith('; delete this file on the Hub, then publish the pair again')
    change(hub, repo, CHECK, lambda content: None)
    publish(pair[0], published)
    report = verify(repo)
    assert report.passed, report


def test_verify_finds_a_half_new_pair(hub: HubServer, published: str, tmp_path: Path):
    """Each form is right in itself; what each says of the other tells them apart."""
    new = save(tmp_path / 'new', seed=3)
    hub.faults.add('403', method='POST', path=f'{NAMES[1]}/commit/')
    with pytest.raises(ReparamError, match=f'already there: {published}/{NAMES[0]}'):
        publish(new[0], published)
    report = verify(f'{published}/{NAMES[0]}')
    wrong = [name for name, right in report.checks.items() if not right]
    assert not report.passed and wrong == [f'{NAMES[0]}: one save'] and report.fusion is None
    with pytest.raises(ReparamError, match='not from one save'):
        pull(f'{published}/{NAMES[0]}', tmp_path / 'zoo')
    publish(new[0], published)
    assert verify(f'{published}/{NAMES[0]}').passed


BOMB = b'---\n' + b''.join(b'a%d: &a%d [%s]\n' % (n, n, b', '.join([b'*a%d' % (n - 1)] * 9)) for n in range(1, 12))


@pytest.mark.parametrize(
    'card',
    [b'---\n{\n---\n', b'\xff', b'---\n- a list\n---\n', b'', BOMB.replace(b'*a0', b'x') + b'datasets: *a11\n---\n'],
    ids=['damaged', 'not a text', 'a list', 'empty', 'aliases'],
)
def test_verify_an_unreadable_card(tmp_path: Path, card: bytes):
    folder, _ = save(tmp_path)
    (folder / 'README.md').write_bytes(card)
    report = verify(folder)
    assert not report.passed and report.problems[0].startswith(f'{folder.name}/README.md: ')
    assert ('without aliases' in report.problems[0]) == (b'&a1' in card)


def test_verify_a_wrong_fusion(tmp_path: Path):
    """All hashes agree, the function does not."""
    folder, fused = save(tmp_path)
    content = change_weights((fused / 'model.safetensors').read_bytes())
    (fused / 'model.safetensors').write_bytes(content)
    facts = json.loads((folder / 'training.json').read_text())
    facts['sibling']['sha256'] = hashlib.sha256(content).hexdigest()
    (folder / 'training.json').write_text(json.dumps(facts))
    for one in (folder, fused):
        (one / 'README.md').write_text(render_card(one))
    report = verify(folder)
    assert not report.passed and 'differs' in report.problems[0] and report.fusion is not None
    assert load_checkpoint(fused) is not None


@pytest.mark.parametrize('source', ['nobody/nothing', 'missing', '../up/x'])
def test_verify_nothing(hub: HubServer, owner: str, source: str):
    with pytest.raises(ReparamError):
        verify(source)
