"""Publishing a pair to the loopback Hub with the real client."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from fresh import finished, run_code
from huggingface_hub import HfApi, ModelCard
from stand_in import randomise

import timm_reparam
from hub.server import HubServer
from timm_reparam import FusionReport, ReparamError
from timm_reparam.cli import main
from timm_reparam.hub import publish, push, save_pair, self_check

TINY = dict(num_classes=4, channels=(8, 8, 8, 8), stem_width=4)
DATA_CONFIG = dict(input_size=(3, 32, 32), crop_pct=1.0)
FACTS = {'base_model': {'id': 'timm/resnet10t.c3_in1k', 'license': 'apache-2.0'}}
CHECK = 'test/rand_tensors.safetensors'
FILES = {'README.md', 'config.json', 'model.safetensors', 'training.json', CHECK}
REPORT = FusionReport(algebra=1e-15, stored=1e-7, own=1e-7, bound=1e-6, top1_agreement=1.0, num_inputs=64)
NAMES = ('resnet10t_doconv.t', 'resnet10t_doconv.t_fused')
pytestmark = pytest.mark.usefixtures('short_waits', 'verified_once')


def small_model(seed: int = 1) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomise(timm.create_model('resnet10t_doconv', **TINY), seed=seed).eval()


def save(zoo: Path, seed: int = 1, tag: str = 't', facts: dict = FACTS) -> tuple[Path, Path]:
    """A pair, written down without a verification, for speed: publish verifies it itself."""
    return save_pair(small_model(seed), zoo, tag=tag, report=REPORT, facts=facts, data_config=DATA_CONFIG)


@pytest.fixture(scope='module')
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair; tests leave it as it is."""
    return save(tmp_path_factory.mktemp('zoo'))


@pytest.fixture
def copies(tmp_path: Path, pair: tuple[Path, Path]) -> tuple[Path, Path]:
    """The pair, for tests that change it."""
    return tuple(shutil.copytree(folder, tmp_path / 'zoo' / folder.name) for folder in pair)


def content(hub: HubServer, repo_id: str, path: str, branch: str = 'main') -> bytes:
    return b''.join(hub.repos[repo_id].branches[branch].files[path].read())


def history(hub: HubServer, repo_id: str) -> list[str]:
    return [commit.title for commit in hub.repos[repo_id].branches['main'].history()]


def test_published_pair(hub: HubServer, owner: str, pair: tuple[Path, Path], tmp_path: Path):
    report = publish(pair[0], owner)
    repo_ids = [f'{owner}/{name}' for name in NAMES]
    assert report.ok and [result.repo_id for result in report.sent] == repo_ids
    assert json.loads(json.dumps(report.to_dict()))['counts'] == {'sent': 2}
    for repo_id, folder in zip(repo_ids, pair):
        repo = hub.repos[repo_id]
        assert len(list(repo.branches['main'].history())) == 2  # the empty one, and all files at once
        assert set(repo.branches['main'].files) == FILES | {'.gitattributes'}
        for name in ('config.json', 'model.safetensors'):
            assert content(hub, repo_id, name) == (folder / name).read_bytes()
        facts = json.loads(content(hub, repo_id, 'training.json'))
        assert facts == {**json.loads((folder / 'training.json').read_text()), 'repo': repo_id}
        # the card is that of this place, and still what the files beside it make
        copy = tmp_path / 'published' / folder.name
        copy.mkdir(parents=True)
        for name in FILES - {CHECK}:
            (copy / name).write_bytes(content(hub, repo_id, name))
        text = (copy / 'README.md').read_text()
        assert text == timm_reparam.hub.render_card(copy) and f"'hf-hub:{repo_id}'" in text and 'local-dir' not in text
        (sibling,) = (other for other in repo_ids if other != repo_id)
        assert f'https://huggingface.co/{sibling}' in text
        assert not repo.private
        card = ModelCard(content(hub, repo_id, 'README.md').decode())
        assert card.data.license == 'apache-2.0'
    # the client had both cards validated (ModelCard.validate of 0.30 would ask the public Hub)
    assert [entry.status for entry in hub.log if entry.path == '/api/validate-yaml'] == [200, 200]
    # stock timm alone, in a process that cannot import the plugin, and timm with the plugin
    code = """
import sys
sys.modules['timm_reparam'] = None
import timm, torch
model = timm.create_model(f'hf-hub:{sys.argv[1]}', pretrained=True, cache_dir='own_cache').eval()
assert type(model).__module__.startswith('timm.')
with torch.no_grad():
    torch.save(model(torch.load('images.pt')), 'stock.pt')
"""
    images = torch.randn(4, 3, 32, 32)
    torch.save(images, tmp_path / 'images.pt')
    done = finished(run_code, code, repo_ids[1], folder=tmp_path)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f'hf-hub:{repo_ids[0]}', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    with torch.no_grad():
        train_time = model(images)
        assert torch.equal(small_model()(images), train_time)
    torch.testing.assert_close(torch.load(tmp_path / 'stock.pt'), train_time, rtol=1e-4, atol=1e-5)


def test_self_check(hub: HubServer, owner: str, pair: tuple[Path, Path], cache_dir: Path):
    """The file says what the model that timm loads makes of its image, and is the same bytes on every machine."""
    publish(pair[0], owner)
    for name, folder in zip(NAMES, pair):
        path = HfApi().hf_hub_download(f'{owner}/{name}', CHECK, cache_dir=cache_dir)
        tensors = safetensors.torch.load_file(path)
        assert set(tensors) == {'input', 'output', 'features', 'pre_logits'}
        model = timm.create_model(f'hf-hub:{owner}/{name}', pretrained=True, cache_dir=cache_dir).eval()
        with torch.no_grad():
            features = model.forward_features(tensors['input'])
            found = {'features': features, 'output': model(tensors['input'])}
            found['pre_logits'] = model.forward_head(features, pre_logits=True)
        for key, value in found.items():
            torch.testing.assert_close(value, tensors[key], rtol=1e-3, atol=1e-4)
        sha256 = hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()
        again = timm_reparam.hub.self_check(model, sha256)
        assert again == Path(path).read_bytes()


def test_second_time_sends_nothing(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    publish(pair[0], owner)
    hub.clear()
    report = publish(pair[1], owner)  # either form names the pair
    assert [result.status for result in report.results] == ['skipped', 'skipped']
    assert not hub.commit_counts and not hub.weight_bytes
    assert {entry.method for entry in hub.log} == {'GET'}


def test_only_what_changed_is_sent(hub: HubServer, owner: str, copies: tuple[Path, Path]):
    publish(copies[0], owner)
    facts = json.loads((copies[0] / 'training.json').read_text())
    (copies[0] / 'training.json').write_text(json.dumps({**facts, 'recipe': {'epochs': 3}}, indent=2) + '\n')
    (copies[0] / 'README.md').write_text(timm_reparam.hub.render_card(copies[0]))
    hub.clear()
    report = publish(copies[0], owner)
    assert [result.files for result in report.results] == [['README.md', 'training.json'], []]
    assert sum(hub.commit_counts.values()) == 1 and not hub.weight_bytes
    assert json.loads(content(hub, f'{owner}/{NAMES[0]}', 'training.json'))['recipe'] == {'epochs': 3}


def test_the_section_of_notes_goes_along(hub: HubServer, owner: str, copies: tuple[Path, Path]):
    """Kept byte by byte, below what is rendered anew; other text of somebody's own stays here, and a note says so."""
    card = copies[0] / 'README.md'
    notes = '<!-- notes -->\n## Notes\n\n- Input: flowers only, é\n\n  \n<!-- end of notes -->'
    card.write_text(f'{card.read_text()}\n{notes}\n')
    for sent in (2, 0):
        report = publish(copies[0], owner)
        assert len(report.sent) == sent and not any(result.why for result in report.results)
        assert content(hub, f'{owner}/{NAMES[0]}', 'README.md').decode().endswith(f'\n\n{notes}\n')
    report = timm_reparam.hub.verify(f'{owner}/{NAMES[0]}')
    assert report.passed and [warning.partition(': ')[2][:9] for warning in report.warnings] == ['has notes']
    card.write_text(card.read_text().replace('license: apache-2.0', 'license: mit') + 'More.\n')
    before = card.read_bytes()
    (copies[0] / 'training.json').write_text((copies[0] / 'training.json').read_text() + '\n')
    report = publish(copies[0], owner)
    assert report.ok and card.read_bytes() == before
    found = content(hub, f'{owner}/{NAMES[0]}', 'README.md').decode()
    assert 'license: mit' not in found and 'More.' not in found and found.endswith(f'{notes}\n')


def test_what_was_fetched_back_is_verified(owner: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    """Here a self-check that is wrong from the start, and travels unchanged."""

    def wrong(model: torch.nn.Module, sha256: str) -> bytes:
        tensors = safetensors.torch.load(self_check(model, sha256))
        return safetensors.torch.save({**tensors, 'output': tensors['output'] + 1})

    monkeypatch.setattr(push, 'self_check', wrong)
    with pytest.raises(ReparamError, match='the fetched copy is not verified: .*output: differs'):
        publish(pair[0], owner)


def test_missing_self_check_is_added(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    publish(pair[0], owner)
    before = content(hub, f'{owner}/{NAMES[0]}', CHECK)
    hub.commit(f'{owner}/{NAMES[0]}', {CHECK: None})
    report = publish(pair[0], owner)
    assert [result.files for result in report.results] == [[CHECK], []]
    assert content(hub, f'{owner}/{NAMES[0]}', CHECK) == before


def test_model(hub: HubServer, owner: str):
    report = publish(small_model(), owner, tag='t', facts=FACTS, data_config=DATA_CONFIG)
    assert len(report.sent) == 2
    assert publish(small_model(), owner, tag='t', facts=FACTS, data_config=DATA_CONFIG).sent == []
    with pytest.raises(ReparamError, match='tag'):
        publish(small_model(), owner)
    with pytest.raises(ReparamError, match='for a model'):
        publish('folder', owner, tag='t')


def test_dry_run(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    report = publish(pair[0], owner, dry_run=True)
    assert [result.status for result in report.results] == ['planned', 'planned'] and report.ok
    assert set(report.results[0].files) == FILES and report.results[0].num_bytes > 10_000
    assert {entry.method for entry in hub.log} == {'GET'}
    assert not any(repo_id.startswith(f'{owner}/') for repo_id in hub.repos)


def test_private(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    publish(pair[0], owner, private=True)
    assert all(hub.repos[f'{owner}/{name}'].private for name in NAMES)
    assert publish(pair[0], owner).ok  # stays private


def test_private_over_public_is_refused(hub: HubServer, owner: str, copies: tuple[Path, Path]):
    HfApi().create_repo(f'{owner}/{NAMES[0]}')
    with pytest.raises(ReparamError, match='expected a private repo, got a public one'):
        publish(copies[0], owner, private=True)
    assert not hub.commit_counts


def test_revision(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    """A branch is made before, as for the client's own commits."""
    with pytest.raises(ReparamError, match="no branch 'next'; make both first"):
        publish(pair[0], owner, revision='next')
    for name in NAMES:
        HfApi().create_repo(f'{owner}/{name}')
    with pytest.raises(ReparamError, match="has no revision 'next'; make it first"):
        publish(pair[0], owner, revision='next')
    for name in NAMES:
        HfApi().create_branch(f'{owner}/{name}', branch='next')
    publish(pair[0], owner, revision='next')
    for name in NAMES:
        repo = hub.repos[f'{owner}/{name}']
        assert set(repo.branches['main'].files) == {'.gitattributes'}
        assert FILES < set(repo.branches['next'].files)
    assert publish(pair[0], owner, revision='next').sent == []


def test_pull_request(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    report = publish(pair[0], owner, create_pr=True)
    for result in report.sent:
        repo = hub.repos[result.repo_id]
        assert set(repo.branches['main'].files) == {'.gitattributes'}
        assert result.pull_request.startswith(hub.endpoint) and len(repo.pulls) == 1
        assert all(pull.oid == result.commit for pull in repo.pulls.values())


def test_explicit_token(hub: HubServer, owner: str, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv('HF_TOKEN')
    assert publish(pair[0], owner, private=True, token='hf_owner', endpoint=hub.endpoint).ok
    with pytest.raises(ReparamError, match='log in') as raised:
        publish(pair[0], f'{owner}-other', token='hf_nobody')
    assert 'hf_nobody' not in str(raised.value)


@pytest.mark.parametrize(
    'variant', ['dyconv', *(pytest.param(variant, marks=pytest.mark.slow) for variant in ('acconv', 'refconv'))]
)
def test_every_method(hub: HubServer, owner: str, variant: str):
    model = randomise(timm.create_model(f'resnet10t_{variant}', **TINY), seed=3).eval()
    assert len(publish(model, owner, tag='t', facts=FACTS, data_config=DATA_CONFIG).sent) == 2
    assert timm_reparam.hub.verify(f'{owner}/resnet10t_{variant}.t').passed


@pytest.mark.slow
def test_long_schedule(hub: HubServer, owner: str, tmp_path: Path):
    """As long as a training on ImageNet: longer than any tensor is large."""
    model = timm.create_model('resnet10t_dyconv', conv_options={'temperature_steps': 450_000}, **TINY)
    model = randomise(model, seed=3).eval()
    publish(model, owner, tag='t', facts=FACTS, data_config=DATA_CONFIG)
    assert timm_reparam.hub.verify(f'{owner}/resnet10t_dyconv.t').passed
    assert timm_reparam.hub.pull(f'{owner}/resnet10t_dyconv.t', tmp_path / 'zoo').ok


# Licences


@pytest.mark.parametrize('facts', [{}, {'base_model': None}, {'base_model': {'id': 'someone/model'}}])
def test_unknown_licence(hub: HubServer, owner: str, tmp_path: Path, facts: dict):
    folder, _ = save(tmp_path, facts=facts)
    before = (folder / 'training.json').read_bytes()
    with pytest.raises(ReparamError, match='licence of the weights is unknown.*--license'):
        publish(folder, owner)
    assert not hub.log
    if facts:
        return
    publish(folder, owner, license='mit')
    for name in NAMES:
        repo_id = f'{owner}/{name}'
        assert json.loads(content(hub, repo_id, 'training.json'))['license'] == 'mit'
        assert json.loads(content(hub, repo_id, 'config.json'))['pretrained_cfg']['license'] == 'mit'
        assert ModelCard(content(hub, repo_id, 'README.md').decode()).data.license == 'mit'
    assert (folder / 'training.json').read_bytes() == before
    assert publish(folder, owner, license='mit').sent == []


def test_known_licence_stays(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    with pytest.raises(ReparamError, match='the weights are under apache-2.0'):
        publish(pair[0], owner, license='mit')
    assert publish(pair[0], owner, license='apache-2.0', dry_run=True).ok


@pytest.mark.parametrize('license', ['MIT', 'mit\ntags: x', '', '-'])
def test_licence_is_an_identifier(owner: str, tmp_path: Path, license: str):
    folder, _ = save(tmp_path, facts={})
    with pytest.raises(ReparamError, match='licence|identifier'):
        publish(folder, owner, license=license)


@pytest.mark.parametrize('license', ['other', *(pytest.param(x, marks=pytest.mark.slow) for x in ('none', 'unknown'))])
def test_licence_that_states_none(hub: HubServer, owner: str, tmp_path: Path, license: str):
    folder, _ = save(tmp_path, facts={})
    with pytest.raises(ReparamError, match=f"'{license}' states no licence; give .*apache-2.0.* or the name"):
        publish(folder, owner, license=license)
    assert not hub.log
    for facts in ({'license_name': 'of-ours'}, {}):  # which licence is meant the facts may say already
        folder, _ = save(tmp_path, facts=facts)
        publish(folder, owner, license='other' if facts else 'of-ours')
        card = ModelCard(content(hub, f'{owner}/{NAMES[0]}', 'README.md').decode())
        assert (card.data.license, card.data.license_name) == ('other', 'of-ours')


# Pairs that are not fit to be published


def other_weights(folders: tuple[Path, Path]) -> None:
    tensors = safetensors.torch.load_file(folders[1] / 'model.safetensors')
    tensors['fc.bias'] = tensors['fc.bias'] + 1
    safetensors.torch.save_file(tensors, folders[1] / 'model.safetensors', metadata={'format': 'pt'})


def wrong_fusion(folders: tuple[Path, Path]) -> None:
    """Everything agrees but the weights."""
    other_weights(folders)
    facts = json.loads((folders[0] / 'training.json').read_text())
    facts['sibling']['sha256'] = hashlib.sha256((folders[1] / 'model.safetensors').read_bytes()).hexdigest()
    (folders[0] / 'training.json').write_text(json.dumps(facts))
    for folder in folders:
        (folder / 'README.md').write_text(timm_reparam.hub.render_card(folder))


def renamed(folders: tuple[Path, Path]) -> None:
    facts = json.loads((folders[0] / 'training.json').read_text())
    (folders[0] / 'training.json').write_text(json.dumps({**facts, 'name': 'another'}))


def unpullable(folders: tuple[Path, Path]) -> None:
    path = folders[0] / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, 'model_args': {**config['model_args'], 'drop_rate': 1e9}}))


@pytest.mark.parametrize(
    'spoil, words',
    [
        (unpullable, 'expected a number of at most'),
        (other_weights, 'sha256'),
        (wrong_fusion, 'differs'),
        (renamed, 'name'),
        (lambda folders: shutil.rmtree(folders[1]), 'not found'),
        (lambda folders: (folders[0] / 'README.md').unlink(), 'README.md'),
        (lambda folders: (folders[0] / 'training.json').write_text('{'), 'json'),
    ],
)
def test_unfit_pairs(hub: HubServer, owner: str, copies: tuple[Path, Path], spoil, words: str):
    spoil(copies)
    with pytest.raises(ReparamError, match=words):
        publish(copies[0], owner)
    assert {entry.method for entry in hub.log} <= {'GET'}
    assert not any(repo_id.startswith(f'{owner}/') for repo_id in hub.repos)


@pytest.mark.parametrize('namespace', ['', 'a/b', '..', 'a b', '-x', 'é', 'x' * 100])
def test_illegal_namespaces(hub: HubServer, pair: tuple[Path, Path], namespace: str):
    with pytest.raises(ReparamError, match='expected a repo'):
        publish(pair[0], namespace)
    assert not hub.log


# Faults


@pytest.mark.parametrize(
    'status, path',
    [
        ('429', 'repos/create'),
        ('429', '/commit/'),
        ('429', 'resolve'),
        ('503', '/api/models/'),
        *(
            pytest.param(status, path, marks=pytest.mark.slow)
            for status, path in (
                ('429', '/api/models/'),
                ('429', '/preupload/'),
                ('429', 'lfs/objects'),
                ('500', '/commit/'),
            )
        ),
    ],
)
def test_what_passes_is_waited_out(hub: HubServer, owner: str, pair: tuple[Path, Path], status: str, path: str):
    fault = hub.faults.add(status, path=path, retry_after=0.01 if status == '429' else None)
    assert len(publish(pair[0], owner).sent) == 2
    assert fault.hits == 1
    assert [len(history(hub, f'{owner}/{name}')) for name in NAMES] == [2, 2]


@pytest.mark.parametrize(
    'kind', ['drop_before', 'drop_after', *(pytest.param(kind, marks=pytest.mark.slow) for kind in ('truncate', '503'))]
)
def test_commit_without_an_answer_lands_once(hub: HubServer, owner: str, pair: tuple[Path, Path], kind: str):
    options = {'landed': True} if kind == '503' else {}
    fault = hub.faults.add(kind, method='POST', path='/commit/', **options)
    report = publish(pair[0], owner)
    assert fault.hits == 1 and len(report.sent) == 2
    assert hub.commit_counts == {f'{owner}/{name}': 1 for name in NAMES}


def test_pull_request_without_an_answer(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    """Whether it is there, only its page tells: it is not proposed twice."""
    hub.faults.add('drop_after', method='POST', path='/commit/')
    with pytest.raises(ReparamError, match='no answer from .*look at its pull requests, and publish again'):
        publish(pair[0], owner, create_pr=True)
    assert len(hub.repos[f'{owner}/{NAMES[0]}'].pulls) == 1


@pytest.fixture
def usual_client() -> Iterator[None]:
    """After the test the client is again without the limits that a command sets."""
    yield
    if hasattr(huggingface_hub, 'set_client_factory'):
        huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    else:
        huggingface_hub.configure_http_backend()


def test_stalled_server(
    pair: tuple[Path, Path], usual_client: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """A server that says nothing is given up: by the command, where the client would wait without a limit."""
    with HubServer(tokens={'hf_me': 'me'}) as stalled:  # which logs what it was asked long after the test
        fault = stalled.faults.add('slow', method='POST', path='/commit/', seconds=20, times=None)
        monkeypatch.setattr(huggingface_hub.constants, 'ENDPOINT', stalled.endpoint)
        monkeypatch.setenv('HF_TOKEN', 'hf_me')
        status = main(['publish', str(pair[0]), 'me', '--timeout', '0.3'])
    printed = capsys.readouterr()
    assert status == 1 and not printed.out and fault.hits == 3
    assert 'no answer from' in printed.err.splitlines()[-1] and 'Traceback' not in printed.err


@pytest.mark.slow  # as of a pull
def test_no_network(pair: tuple[Path, Path], owner: str):
    with pytest.raises(ReparamError, match='no answer from http://127.0.0.1:9 .*local folder'):
        publish(pair[0], owner, endpoint='http://127.0.0.1:9')


def test_concurrent_commit_is_a_conflict(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    repo_id = f'{owner}/{NAMES[0]}'

    def somebody_else(request: object) -> None:
        hub.commit(repo_id, {'notes.txt': 'mine'}, title='Theirs')

    hub.faults.add('call', path=f'{repo_id}/commit/', action=somebody_else)
    with pytest.raises(ReparamError, match='somebody else'):
        publish(pair[0], owner)
    assert history(hub, repo_id)[0] == 'Theirs' and len(history(hub, repo_id)) == 2
    assert len(publish(pair[0], owner).sent) == 2  # on top of theirs, which was read this time
    assert set(hub.repos[repo_id].branches['main'].files) == FILES | {'.gitattributes', 'notes.txt'}


def test_somebody_else_makes_the_repo(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    """What appears between reading and making a repo is theirs, too."""
    repo_id = f'{owner}/{NAMES[0]}'

    def somebody_else(request: object) -> None:
        hub.create_repo(repo_id, {'.gitattributes': ''})
        hub.commit(repo_id, {'README.md': '# Theirs'}, title='Theirs')

    hub.faults.add('call', path='repos/create', action=somebody_else)
    with pytest.raises(ReparamError, match='somebody else'):
        publish(pair[0], owner)
    assert content(hub, repo_id, 'README.md') == b'# Theirs'
    assert publish(pair[0], owner).ok  # read before: equal to the zoo, as was asked for


def test_damaged_upload_and_download(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    hub.faults.add('wrong_hash', method='PUT', path='lfs', times=None)
    with pytest.raises(ReparamError):
        publish(pair[0], owner)
    assert not hub.commit_counts
    hub.faults.clear()
    hub.faults.add('wrong_hash', method='GET', path='resolve/.*/model.safetensors', times=None)
    with pytest.raises(ReparamError, match='expected the hash'):
        publish(pair[0], owner)


def test_error_names_what_landed(hub: HubServer, owner: str, pair: tuple[Path, Path]):
    """Also what could not be fetched back."""
    fault = hub.faults.add('403', method='GET', path='resolve', times=None)
    with pytest.raises(ReparamError, match=f'already there: {owner}/{NAMES[0]}, {owner}/{NAMES[1]}; publish again'):
        publish(pair[0], owner)
    assert fault.hits and hub.commit_counts == {f'{owner}/{name}': 1 for name in NAMES}
    hub.faults.clear()
    assert [result.status for result in publish(pair[0], owner).results] == ['skipped', 'skipped']


def test_token_is_nowhere(hub: HubServer, owner: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture, caplog):
    hub.faults.add('403', path='/commit/', message='hf_owner may not do this')
    caplog.set_level('INFO')
    with pytest.raises(ReparamError) as raised:
        publish(pair[0], owner)
    report = publish(pair[0], owner)
    printed = capsys.readouterr()
    for text in (str(raised.value), str(report), json.dumps(report.to_dict()), printed.out, printed.err, caplog.text):
        assert 'hf_owner' not in text
