"""The loopback Hub, asked by the real client."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile, RepoFolder

from hub.server import HubServer, Repo, client_environment

SERVE, TESTS = [sys.executable, '-m', 'hub.server'], Path(__file__).parents[1]
WEIGHTS = bytes(range(256)) * 300
CARD = '---\nlibrary_name: timm\npipeline_tag: image-classification\nlicense: mit\ntags:\n- timm\n---\n# A model\n'
FILES = {
    'README.md': CARD,
    'config.json': '{"architecture": "resnet18"}',
    'model.safetensors': WEIGHTS,
    'test/deep/rand_tensors.safetensors': b'tensors',
    'test/empty.txt': '',
}


@pytest.fixture
def repo(hub: HubServer, request: pytest.FixtureRequest) -> Repo:
    """A repository of two commits, a branch and a tag, under the test's own name."""
    name = re.sub('[^0-9a-z]+', '-', request.node.name.lower())[:80].strip('-')
    repo_id = f'server/{name}'
    hub.commit(repo_id, FILES, title='First')
    repo = hub.repos[repo_id]
    repo.tags['v1'] = repo.branches['main']
    hub.commit(repo_id, {'config.json': '{"architecture": "resnet34"}'}, title='Second', author='owner')
    repo.branches['pr/1'] = repo.tags['v1']
    yield repo
    del hub.repos[repo_id]


def test_client_talks_to_the_loopback_hub_only(hub):
    """conftest.py has pointed the client, whatever its version, at this process's server."""
    assert huggingface_hub.constants.ENDPOINT == hub.endpoint == os.environ['HF_ENDPOINT']
    assert getattr(huggingface_hub.constants, 'HF_HUB_DISABLE_XET', True)  # the oldest client has no such setting
    assert not any(name in os.environ for name in ('HF_TOKEN', 'HF_HUB_OFFLINE', 'HF_HUB_CACHE'))


def test_download(hub, repo, cache_dir):
    path = HfApi().hf_hub_download(repo.id, 'model.safetensors', cache_dir=cache_dir)
    assert Path(path).read_bytes() == WEIGHTS
    assert repo.branches['main'].oid in path  # X-Repo-Commit: the snapshot folder is called after it
    assert hashlib.sha256(WEIGHTS).hexdigest() == Path(path).resolve().name  # X-Linked-ETag
    assert [(entry.method, entry.status) for entry in hub.log] == [('HEAD', 200), ('GET', 200)]

    HfApi().hf_hub_download(repo.id, 'model.safetensors', cache_dir=cache_dir)
    assert [entry.method for entry in hub.log] == ['HEAD', 'GET', 'HEAD']  # the second time it is in the cache


@pytest.mark.parametrize('revision', ['main', 'v1', 'pr/1', 'refs/heads/pr/1', 'refs/tags/v1', 'commit'])
def test_download_of_a_revision(repo, cache_dir, revision):
    commit = repo.branches['main'] if revision in ('main', 'commit') else repo.tags['v1']
    revision = commit.oid if revision == 'commit' else revision
    path = HfApi().hf_hub_download(repo.id, 'config.json', revision=revision, cache_dir=cache_dir)
    assert Path(path).read_bytes() == b''.join(commit.files['config.json'].read())
    assert HfApi().model_info(repo.id, revision=revision).sha == commit.oid


def test_snapshot(repo, cache_dir):
    folder = Path(HfApi().snapshot_download(repo.id, revision='v1', cache_dir=cache_dir))
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    assert found == {name: data.encode() if isinstance(data, str) else data for name, data in FILES.items()}


def test_interrupted_download_goes_on_where_it_stopped(hub, repo, tmp_path):
    """The client asks for the rest of a file with a Range header and puts the two parts together."""
    http_get = huggingface_hub.file_download.http_get
    url = huggingface_hub.hf_hub_url(repo.id, 'model.safetensors')
    with (tmp_path / 'part').open('w+b') as file:
        file.write(WEIGHTS[:1000])
        http_get(url, file, resume_size=1000, expected_size=len(WEIGHTS))
    assert (tmp_path / 'part').read_bytes() == WEIGHTS
    assert (hub.log[-1].range, hub.log[-1].status) == ('bytes=1000-', 206)


@pytest.mark.parametrize(
    ('header', 'status', 'data', 'content_range'),
    [
        ('bytes=0-9', 206, WEIGHTS[:10], f'bytes 0-9/{len(WEIGHTS)}'),
        ('bytes=76790-', 206, WEIGHTS[-10:], f'bytes 76790-76799/{len(WEIGHTS)}'),
        ('bytes=-10', 206, WEIGHTS[-10:], f'bytes 76790-76799/{len(WEIGHTS)}'),
        ('bytes=76795-99999', 206, WEIGHTS[-5:], f'bytes 76795-76799/{len(WEIGHTS)}'),
        ('pages=1-2', 200, WEIGHTS, None),
        ('bytes=76800-', 416, None, f'bytes */{len(WEIGHTS)}'),
    ],
)
def test_range(repo, header, status, data, content_range):
    url = huggingface_hub.hf_hub_url(repo.id, 'model.safetensors')
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers={'Range': header}))
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        assert answer.status == status
        assert answer.headers['Content-Range'] == content_range
        assert data is None or answer.read() == data


def test_model_info(repo):
    info = HfApi().model_info(repo.id)
    assert (info.id, info.sha, info.private) == (repo.id, repo.branches['main'].oid, False)
    assert [sibling.rfilename for sibling in info.siblings] == sorted(FILES)
    assert info.siblings[2].size is None  # sizes and hashes come only when asked for
    assert (info.card_data.license, info.library_name, info.tags) == ('mit', 'timm', ['timm'])
    assert info.last_modified > info.created_at


def test_model_info_with_hashes(repo):
    siblings = {item.rfilename: item for item in HfApi().model_info(repo.id, files_metadata=True).siblings}
    weights, card = siblings['model.safetensors'], siblings['README.md']
    assert (weights.size, weights.lfs.size, weights.lfs.sha256) == (
        len(WEIGHTS),
        len(WEIGHTS),
        hashlib.sha256(WEIGHTS).hexdigest(),
    )
    assert card.lfs is None
    assert card.blob_id == hashlib.sha1(b'blob %d\0' % len(CARD) + CARD.encode()).hexdigest()
    assert card.size == len(CARD)


def test_tree(repo):
    def listed(**options):
        return [(type(item), item.path) for item in HfApi().list_repo_tree(repo.id, **options)]

    top = [(RepoFile, path) for path in ('README.md', 'config.json', 'model.safetensors')]
    test = [(RepoFolder, 'test/deep'), (RepoFile, 'test/empty.txt')]
    assert listed() == [*top, (RepoFolder, 'test')]
    assert listed(path_in_repo='test') == test
    assert listed(recursive=True) == [
        *top,
        (RepoFolder, 'test'),
        (RepoFolder, 'test/deep'),
        (RepoFile, 'test/deep/rand_tensors.safetensors'),
        (RepoFile, 'test/empty.txt'),
    ]
    assert listed(path_in_repo='test/deep', recursive=True) == [(RepoFile, 'test/deep/rand_tensors.safetensors')]
    with pytest.raises(EntryNotFoundError):
        listed(path_in_repo='elsewhere')


def test_tree_comes_in_pages(hub):
    names = [f'file_{index:02}' for index in range(23)]
    with HubServer() as other:
        other.commit('server/pages', dict.fromkeys(names, b''))
        other.page_size = 10
        api = HfApi(endpoint=other.endpoint)
        assert [item.path for item in api.list_repo_tree('server/pages')] == names
        assert len(other.log) == 3
    assert not hub.log


def test_last_commit_of_each_file(repo):
    last = {item.path: item.last_commit.title for item in HfApi().list_repo_tree(repo.id, expand=True)}
    assert last == {'README.md': 'First', 'config.json': 'Second', 'model.safetensors': 'First', 'test': 'First'}


def test_paths_info(repo):
    paths = ['model.safetensors', 'no such file', 'test', 'README.md']
    weights, folder, card = HfApi().get_paths_info(repo.id, paths, revision='v1')
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert isinstance(folder, RepoFolder)
    assert (card.path, card.size, card.lfs) == ('README.md', len(CARD), None)


def test_refs_and_commits(repo):
    refs = HfApi().list_repo_refs(repo.id)
    first, second = repo.tags['v1'].oid, repo.branches['main'].oid
    assert {branch.name: branch.target_commit for branch in refs.branches} == {'main': second, 'pr/1': first}
    assert [(tag.ref, tag.target_commit) for tag in refs.tags] == [('refs/tags/v1', first)]
    assert refs.pull_requests is None
    assert HfApi().list_repo_refs(repo.id, include_pull_requests=True).pull_requests == []
    commits = HfApi().list_repo_commits(repo.id)
    assert [commit.title for commit in commits] == ['Second', 'First', 'initial commit']
    assert [commit.title for commit in HfApi().list_repo_commits(repo.id, revision='v1')] == ['First', 'initial commit']
    assert commits[0].authors == ['owner']


def test_exists(repo):
    api = HfApi()
    assert api.repo_exists(repo.id)
    assert not api.repo_exists('server/no-such-repo')
    assert api.revision_exists(repo.id, 'v1')
    assert not api.revision_exists(repo.id, 'v2')
    assert api.file_exists(repo.id, 'test/empty.txt')
    assert not api.file_exists(repo.id, 'test/full.txt')


ASK = {
    'download': lambda api, repo_id, **revision: api.hf_hub_download(repo_id, 'config.json', **revision),
    'info': lambda api, repo_id, **revision: api.model_info(repo_id, **revision),
    'tree': lambda api, repo_id, **revision: list(api.list_repo_tree(repo_id, **revision)),
    'paths': lambda api, repo_id, **revision: api.get_paths_info(repo_id, 'config.json', **revision),
    'commits': lambda api, repo_id, **revision: api.list_repo_commits(repo_id, **revision),
}


@pytest.mark.parametrize('ask', ASK)
@pytest.mark.parametrize('token', [None, 'hf_stranger'])
def test_missing_repo(hub, ask, token):
    with pytest.raises(RepositoryNotFoundError) as error:
        ASK[ask](HfApi(token=token), 'server/no-such-repo')
    assert error.value.response.status_code == (401 if token is None else 404)


@pytest.mark.parametrize('ask', ASK)
def test_missing_revision(repo, ask):
    with pytest.raises(RevisionNotFoundError):
        ASK[ask](HfApi(), repo.id, revision='no/such/revision')


def test_missing_file(repo, cache_dir):
    with pytest.raises(EntryNotFoundError):
        HfApi().hf_hub_download(repo.id, 'no_such_file.json', cache_dir=cache_dir)
    marks = [path.relative_to(cache_dir).as_posix() for path in cache_dir.rglob('no_such_file.json')]
    assert len(marks) == 1  # the client keeps in mind which commit has no such file: X-Repo-Commit came with the 404
    assert marks[0].endswith(f'.no_exist/{repo.branches["main"].oid}/no_such_file.json')


def test_private_repo(hub, cache_dir):
    hub.create_repo('server/private', private=True, readers=frozenset({'owner'}))
    hub.commit('server/private', FILES)
    for token in (None, 'hf_stranger'):
        with pytest.raises(RepositoryNotFoundError) as error:
            HfApi(token=token).model_info('server/private')
        assert not isinstance(error.value, GatedRepoError)
    api = HfApi(token='hf_owner')
    assert api.model_info('server/private').private
    assert Path(api.hf_hub_download('server/private', 'model.safetensors', cache_dir=cache_dir)).stat().st_size
    assert [entry.user for entry in hub.log][:3] == [None, 'stranger', 'owner']
    assert 'hf_owner' not in repr(hub.log)


def test_gated_repo(hub, cache_dir):
    hub.create_repo('server/gated', gated=True, readers=frozenset({'owner'}))
    hub.commit('server/gated', FILES)
    for token, status in ((None, 401), ('hf_stranger', 403)):
        api = HfApi(token=token)
        assert api.model_info('server/gated').gated == 'auto'
        with pytest.raises(GatedRepoError, match='restricted') as error:
            api.hf_hub_download('server/gated', 'config.json', cache_dir=cache_dir)
        assert error.value.response.status_code == status
    assert HfApi(token='hf_owner').hf_hub_download('server/gated', 'config.json', cache_dir=cache_dir)


def test_disabled_repo(hub, cache_dir):
    hub.create_repo('server/disabled', disabled=True)
    with pytest.raises(DisabledRepoError):
        HfApi().model_info('server/disabled')


def test_unknown_token(repo):
    with pytest.raises(HfHubHTTPError, match='Invalid credentials') as error:
        HfApi(token='hf_wrong').model_info(repo.id)
    assert error.value.response.status_code == 401
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_unknown_address(hub):
    with pytest.raises(HfHubHTTPError) as error:
        HfApi().dataset_info('server/data')
    assert error.value.response.status_code == 404


def test_many_readers_at_once(hub, repo):
    found = []

    def read():
        url = huggingface_hub.hf_hub_url(repo.id, 'model.safetensors')
        for _ in range(5):
            with urllib.request.urlopen(url) as answer:
                found.append(answer.read())

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [WEIGHTS] * 40
    assert len(hub.log) == 40


def test_commit_takes_files_away_and_knows_only_full_commit_ids(hub, repo):
    hub.commit(repo.id, {'config.json': None})
    assert not HfApi().file_exists(repo.id, 'config.json')
    assert HfApi().file_exists(repo.id, 'config.json', revision='v1')
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info(repo.id, revision=repo.tags['v1'].oid[:7])
    with pytest.raises(ValueError, match='already there'):
        hub.create_repo(repo.id)


def test_files_keep_what_git_and_lfs_call_them(tmp_path):
    """Large files lie in LFS under any name; a file on disk is named as its bytes are."""
    data = os.urandom(2 * 2**20 + 1)
    (tmp_path / 'weights').write_bytes(data)
    hub = HubServer()
    try:
        sources = {'small': b'x', 'large': b'x' * (10 * 2**20), 'disk': tmp_path / 'weights', 'same': data}
        hub.commit('server/names', sources)
        files = hub.repos['server/names'].branches['main'].files
        assert files['small'].pointer_size is None
        assert files['large'].pointer_size == 133  # what git keeps for it is a pointer of that many bytes
        assert (files['disk'].oid, files['disk'].sha256) == (files['same'].oid, files['same'].sha256)
        assert b''.join(files['disk'].read(5, 2**20 + 5)) == data[5 : 2**20 + 5]
    finally:
        hub.stop()


def test_served_from_a_shell(tmp_path):
    """`python -m hub.server FOLDER` serves every namespace/name in it, to a client in another process."""
    (tmp_path / 'zoo/someone/model.tag/test').mkdir(parents=True)
    (tmp_path / 'zoo/someone/model.tag/test/weights.safetensors').write_bytes(WEIGHTS)
    server = subprocess.Popen([*SERVE, tmp_path / 'zoo'], cwd=TESTS, stdout=subprocess.PIPE, text=True)
    try:
        settings = dict(setting.split('=') for setting in server.stdout.readline().split())
        assert server.stdout.readline().strip() == 'someone/model.tag'
        path = HfApi(endpoint=settings['HF_ENDPOINT']).hf_hub_download(
            'someone/model.tag', 'test/weights.safetensors', cache_dir=tmp_path / 'cache'
        )
        assert Path(path).read_bytes() == WEIGHTS
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(10) == 0
        server.stdout.close()


def test_served_from_a_shell_needs_a_folder(tmp_path):
    done = subprocess.run([*SERVE, tmp_path / 'nowhere'], cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 2
    assert 'nowhere is not a folder' in done.stderr


def test_client_environment_leaves_nothing_of_the_users_settings():
    mine = {'HF_TOKEN': 'secret', 'HF_HUB_OFFLINE': '1', 'HUGGINGFACE_HUB_CACHE': '/cache'}
    mine |= {'NO_PROXY': 'host', 'PATH': '/bin'}
    environment = client_environment('http://127.0.0.1:1', '/home', mine)
    assert 'secret' not in environment.values()
    assert 'HF_HUB_OFFLINE' not in environment and 'HUGGINGFACE_HUB_CACHE' not in environment
    assert environment['PATH'] == '/bin'
    assert environment['NO_PROXY'] == 'host,127.0.0.1,localhost'
    assert environment['HF_ENDPOINT'] == 'http://127.0.0.1:1'
