"""The writing half of the loopback Hub and its faults, met by the real client.

What the client makes of a fault is also what publishing has to live with, version by version.
"""

import base64
import hashlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hub.server import HubServer
from hub.server.faults import Fault
from hub.server.writing import check_card

VERSION = tuple(int(part) for part in huggingface_hub.__version__.split('.')[:2])
WEIGHTS = bytes(range(256)) * 300
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
CARD = b'---\nlibrary_name: timm\nlicense: mit\ntags:\n- timm\n---\n# A model\n'

owner = HfApi(token='hf_owner')
stranger = HfApi(token='hf_stranger')
nobody = HfApi(token=False)


def add(**files: bytes) -> list[CommitOperationAdd]:
    """Additions by file name, the dot of which is written as two underscores."""
    return [CommitOperationAdd(name.replace('__', '.'), data) for name, data in files.items()]


@pytest.fixture
def repo_id(hub: HubServer, request: pytest.FixtureRequest):
    """A repository that the client has made, under the test's own name."""
    words = re.sub('[^0-9a-z]+', '-', request.node.name.lower()).strip('-')
    repo_id = f'owner/{words[-90:].strip("-")}'
    owner.create_repo(repo_id)
    hub.clear()
    yield repo_id
    hub.repos.pop(repo_id, None)
    hub.clear()


def files(hub: HubServer, repo_id: str, revision: str = 'main') -> dict[str, bytes]:
    """What the repository holds, without what the Hub itself has put there."""
    found = hub.repos[repo_id].find(revision).files
    return {path: b''.join(blob.read()) for path, blob in found.items() if path != '.gitattributes'}


def ask(method: str, url: str, body: bytes = b'', token: str | None = 'hf_owner') -> tuple[int, dict]:
    """A request that the client would not make."""
    headers = {'Authorization': f'Bearer {token}'} if token else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, body or None, headers, method=method))
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, json.loads(answer.read())


def post_commit(hub: HubServer, repo_id: str, *lines: tuple[str, dict], header: bool = True) -> tuple[int, dict]:
    lines = (('header', {'summary': 'By hand', 'description': ''}), *lines) if header else lines
    body = b'\n'.join(json.dumps({'key': key, 'value': value}).encode() for key, value in lines)
    return ask('POST', f'{hub.endpoint}/api/models/{repo_id}/commit/main', body)


# Repositories ---------------------------------------------------------------------------------------------------------


def test_whoami(hub):
    answer = owner.whoami()
    assert (answer['name'], answer['auth']['accessToken']['role']) == ('owner', 'write')
    with pytest.raises(HfHubHTTPError if VERSION >= (1, 0) else OSError, match='Invalid user token'):
        HfApi(token='hf_wrong').whoami()
    with HubServer(tokens={'hf_reader': 'owner'}, orgs={'club': ['owner']}, read_only=['hf_reader']) as other:
        api = HfApi(endpoint=other.endpoint, token='hf_reader')
        answer = api.whoami()
        assert ([org['name'] for org in answer['orgs']], answer['auth']['accessToken']['role']) == (['club'], 'read')
        with pytest.raises(HfHubHTTPError, match='write token'):
            api.create_repo('club/model')


def test_create_repo(hub, repo_id):
    with pytest.raises(HfHubHTTPError, match='already created') as error:
        owner.create_repo(repo_id)
    assert error.value.response.status_code == 409
    url = owner.create_repo(repo_id, exist_ok=True)
    assert (url.repo_id, str(url)) == (repo_id, f'{hub.endpoint}/{repo_id}')
    # A new repository is not quite empty: it has a first commit, in which the Hub says what goes to LFS.
    info = owner.model_info(repo_id)
    assert [sibling.rfilename for sibling in info.siblings] == ['.gitattributes']
    assert not info.private
    assert [commit.title for commit in owner.list_repo_commits(repo_id)] == ['initial commit']


def test_create_repo_where_one_may_not(hub, repo_id):
    for api, status in ((nobody, 401), (stranger, 403)):
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo('owner/of-another')
        assert error.value.response.status_code == status
    assert (
        str(stranger.create_repo(repo_id, exist_ok=True)) == f'{hub.endpoint}/{repo_id}'
    )  # there is nothing to create
    for name in ('.hidden', 'a b', 'x..y'):
        assert ask('POST', f'{hub.endpoint}/api/repos/create', json.dumps({'name': name}).encode())[0] == 400
    assert ask('POST', f'{hub.endpoint}/api/repos/create', b'{"name": "x", "type": "space"}')[0] == 400
    assert ask('POST', f'{hub.endpoint}/api/repos/create', b'name')[0] == 400


def test_private_repo(hub, repo_id):
    owner.create_repo(f'{repo_id}-2', private=True)
    assert owner.model_info(f'{repo_id}-2').private
    with pytest.raises(RepositoryNotFoundError):
        stranger.create_commit(f'{repo_id}-2', add(a__txt=b'a'), commit_message='Mine')
    owner.update_repo_settings(f'{repo_id}-2', private=False)
    assert not nobody.model_info(f'{repo_id}-2').private
    owner.update_repo_settings(repo_id, private=True, gated='manual')
    assert (owner.model_info(repo_id).private, owner.model_info(repo_id).gated) == (True, 'manual')
    found = [{model.id for model in api.list_models(author='owner')} for api in (owner, stranger)]
    assert (repo_id in found[0], repo_id in found[1]) == (True, False)
    assert {f'{repo_id}-2'} <= found[0] & found[1]
    owner.delete_repo(f'{repo_id}-2')
    with pytest.raises(RepositoryNotFoundError):
        owner.delete_repo(f'{repo_id}-2')
    owner.delete_repo(f'{repo_id}-2', missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        owner.model_info(f'{repo_id}-2')


def test_gated_repo(hub, repo_id, cache_dir):
    owner.update_repo_settings(repo_id, gated='auto')
    owner.upload_file(path_or_fileobj=b'a', path_in_repo='a.txt', repo_id=repo_id)
    assert owner.hf_hub_download(repo_id, 'a.txt', cache_dir=cache_dir)
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download(repo_id, 'a.txt', cache_dir=cache_dir / 'other')
    owner.auth_check(repo_id)
    with pytest.raises(GatedRepoError):
        stranger.auth_check(repo_id)


def test_branches_and_tags(hub, repo_id):
    first = owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One').oid
    second = owner.create_commit(repo_id, add(a__txt=b'b'), commit_message='Two').oid
    owner.create_branch(repo_id, branch='early/one', revision=first)
    owner.create_branch(repo_id, branch='early/one', exist_ok=True)
    owner.create_tag(repo_id, tag='v1')
    owner.create_tag(repo_id, tag='v1', exist_ok=True)
    owner.create_tag(repo_id, tag='v0', revision='early/one', tag_message='The first')
    for create in (owner.create_branch, owner.create_tag):
        with pytest.raises(HfHubHTTPError) as error:
            create(repo_id, **{'branch': 'early/one'} if create == owner.create_branch else {'tag': 'v1'})
        assert error.value.response.status_code == 409
    third = owner.create_commit(repo_id, add(a__txt=b'c'), commit_message='Three', revision='early/one').oid
    refs = owner.list_repo_refs(repo_id)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {'main': second, 'early/one': third}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {'v1': second, 'v0': first}
    owner.delete_tag(repo_id, tag='v1')
    owner.delete_branch(repo_id, branch='early/one')
    refs = owner.list_repo_refs(repo_id)
    assert ([ref.name for ref in refs.branches], [ref.name for ref in refs.tags]) == (['main'], ['v0'])
    for missing in (
        lambda: owner.delete_tag(repo_id, tag='v1'),
        lambda: owner.delete_branch(repo_id, branch='early/one'),
        lambda: owner.create_branch(repo_id, branch='x', revision='nowhere'),
        lambda: owner.create_commit(repo_id, add(a__txt=b'd'), commit_message='Four', revision='nowhere'),
    ):
        with pytest.raises(RevisionNotFoundError):
            missing()
    with pytest.raises(BadRequestError, match='go to a branch'):
        owner.create_commit(repo_id, add(a__txt=b'd'), commit_message='Four', revision='v0')


# Commits --------------------------------------------------------------------------------------------------------------


def test_commit(hub, repo_id, cache_dir):
    operations = add(README__md=CARD, model__safetensors=WEIGHTS, empty__safetensors=b'')
    operations.append(CommitOperationAdd('test/deep/data.txt', b'data'))
    info = owner.create_commit(repo_id, operations, commit_message='First', commit_description='All of it')
    assert info.commit_url == f'{hub.endpoint}/{repo_id}/commit/{info.oid}'
    found = {item.rfilename: item for item in owner.model_info(repo_id, files_metadata=True).siblings}
    assert sorted(found) == [
        '.gitattributes',
        'README.md',
        'empty.safetensors',
        'model.safetensors',
        'test/deep/data.txt',
    ]
    assert (found['model.safetensors'].lfs.sha256, found['model.safetensors'].size) == (SHA256, len(WEIGHTS))
    assert found['README.md'].blob_id == hashlib.sha1(b'blob %d\0' % len(CARD) + CARD).hexdigest()
    assert (found['README.md'].lfs, found['empty.safetensors'].lfs) == (None, None)
    commit = owner.list_repo_commits(repo_id)[0]
    assert (commit.commit_id, commit.title, commit.message) == (info.oid, 'First', 'All of it')
    assert commit.authors == ['owner']
    path = owner.hf_hub_download(repo_id, 'model.safetensors', cache_dir=cache_dir, revision=info.oid)
    assert Path(path).read_bytes() == WEIGHTS
    assert owner.file_exists(repo_id, 'test/deep/data.txt')
    assert hub.commit_counts == {repo_id: 1}
    assert hub.weight_bytes == {repo_id: len(WEIGHTS)}
    [put] = [entry for entry in hub.log if entry.method == 'PUT']
    assert (put.user, put.received) == (None, len(WEIGHTS))  # the client keeps its token from where weights are stored


def test_large_files_go_to_lfs_whatever_their_name(hub, repo_id):
    owner.create_commit(repo_id, add(large__dat=b'x' * (10 * 2**20), small__dat=b'x'), commit_message='Both')
    found = {item.rfilename: item.lfs for item in owner.model_info(repo_id, files_metadata=True).siblings}
    assert found['large.dat'] and not found['small.dat']


def test_unchanged_files_are_not_sent(hub, repo_id):
    first = owner.create_commit(repo_id, add(model__safetensors=WEIGHTS, a__txt=b'a'), commit_message='One').oid
    again = owner.create_commit(repo_id, add(model__safetensors=WEIGHTS, a__txt=b'a'), commit_message='Two').oid
    assert again == first
    assert (hub.commit_counts[repo_id], hub.weight_bytes[repo_id]) == (1, len(WEIGHTS))
    # Weights that the repository once had are still in LFS: they are committed, not sent.
    owner.create_commit(repo_id, add(model__safetensors=b'others'), commit_message='Three')
    owner.create_commit(repo_id, add(model__safetensors=WEIGHTS), commit_message='Four')
    assert files(hub, repo_id) == {'model.safetensors': WEIGHTS, 'a.txt': b'a'}
    assert (hub.commit_counts[repo_id], hub.weight_bytes[repo_id]) == (3, len(WEIGHTS) + len(b'others'))


def test_the_server_makes_empty_commits(hub, repo_id):
    """That a commit with nothing new is not made is the client's doing: one sent twice is made twice."""
    line = ('file', {'path': 'a.txt', 'content': base64.b64encode(b'a').decode(), 'encoding': 'base64'})
    oids = [post_commit(hub, repo_id, line)[1]['commitOid'] for _ in range(2)]
    oids.append(post_commit(hub, repo_id)[1]['commitOid'])
    assert len(set(oids)) == 3
    assert [commit.commit_id for commit in owner.list_repo_commits(repo_id)][:3] == oids[::-1]


def test_delete(hub, repo_id):
    owner.create_commit(
        repo_id, add(**{'a__txt': b'a', 'b__txt': b'b', 'f/x': b'x', 'f/g/y': b'y'}), commit_message='One'
    )
    owner.create_commit(repo_id, [CommitOperationDelete('a.txt')], commit_message='Two')
    assert sorted(files(hub, repo_id)) == ['b.txt', 'f/g/y', 'f/x']
    owner.create_commit(repo_id, [CommitOperationDelete('f/'), *add(c__txt=b'c')], commit_message='Three')
    assert sorted(files(hub, repo_id)) == ['b.txt', 'c.txt']
    for operation in (CommitOperationDelete('a.txt'), CommitOperationDelete('f/')):
        with pytest.raises(EntryNotFoundError, match="doesn't exist"):
            owner.create_commit(repo_id, [operation], commit_message='Four')
    assert hub.commit_counts[repo_id] == 3


def test_upload_folder(hub, repo_id, tmp_path):
    owner.create_commit(repo_id, add(old__txt=b'old', keep__md=b'keep'), commit_message='One')
    (tmp_path / 'test').mkdir()
    (tmp_path / 'README.md').write_bytes(CARD)
    (tmp_path / 'model.safetensors').write_bytes(WEIGHTS)
    (tmp_path / 'test/rand_tensors.safetensors').write_bytes(b'tensors')
    owner.upload_folder(repo_id=repo_id, folder_path=tmp_path, delete_patterns='*.txt', commit_message='Folder')
    assert files(hub, repo_id) == {
        'README.md': CARD,
        'keep.md': b'keep',
        'model.safetensors': WEIGHTS,
        'test/rand_tensors.safetensors': b'tensors',
    }
    assert hub.commit_counts[repo_id] == 2
    assert owner.model_info(repo_id).library_name == 'timm'


def test_parent_commit_is_compared(hub, repo_id):
    first = owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One').oid
    second = owner.create_commit(repo_id, add(a__txt=b'b'), commit_message='Two', parent_commit=first).oid
    with pytest.raises(HfHubHTTPError, match='A commit has happened since') as error:
        owner.create_commit(repo_id, add(a__txt=b'c'), commit_message='Three', parent_commit=first)
    assert error.value.response.status_code == 412
    assert owner.model_info(repo_id).sha == second
    assert (files(hub, repo_id), hub.commit_counts[repo_id]) == ({'a.txt': b'b'}, 2)


@pytest.mark.parametrize('guarded', [True, False])
def test_commits_at_once(hub, repo_id, guarded):
    """With parent_commit one of them wins; without, all land, one on top of the other, and none is lost."""
    parent = owner.model_info(repo_id).sha
    barrier, outcomes = threading.Barrier(8), []

    def commit(number: int) -> None:
        operations = add(**{f'{number}__txt': b'text', f'{number}__safetensors': b'%d' % number})
        barrier.wait()
        try:
            options = {'parent_commit': parent} if guarded else {}
            owner.create_commit(repo_id, operations, commit_message=f'Commit {number}', **options)
            outcomes.append(number)
        except HfHubHTTPError as error:
            outcomes.append(-error.response.status_code)

    threads = [threading.Thread(target=commit, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    won = sorted(number for number in outcomes if number >= 0)
    assert len(won) == (1 if guarded else 8)
    assert sorted(outcomes)[: 8 - len(won)] == [-412] * (8 - len(won))
    assert sorted(files(hub, repo_id)) == sorted(
        f'{number}.{kind}' for number in won for kind in ('txt', 'safetensors')
    )
    assert len(owner.list_repo_commits(repo_id)) == len(won) + 1


def test_pull_request(hub, repo_id, cache_dir):
    main = owner.model_info(repo_id).sha
    operations = add(model__safetensors=WEIGHTS)
    info = stranger.create_commit(repo_id, operations, commit_message='Take this', create_pr=True)
    assert (info.pr_num, info.pr_revision) == (1, 'refs/pr/1')
    assert info.pr_url == f'{hub.endpoint}/{repo_id}/discussions/1'
    assert owner.model_info(repo_id).sha == main
    path = owner.hf_hub_download(repo_id, 'model.safetensors', revision='refs/pr/1', cache_dir=cache_dir)
    assert Path(path).read_bytes() == WEIGHTS
    more = stranger.create_commit(repo_id, add(a__txt=b'a'), commit_message='And this', revision='refs/pr/1').oid
    pulls = owner.list_repo_refs(repo_id, include_pull_requests=True).pull_requests
    assert [(ref.name, ref.target_commit) for ref in pulls] == [('refs/pr/1', more)]
    assert owner.create_commit(repo_id, add(a__txt=b'b'), commit_message='Or', create_pr=True).pr_num == 2
    assert files(hub, repo_id) == {}
    for revision in ('main', 'refs/pr/2'):
        with pytest.raises(HfHubHTTPError) as error:
            stranger.create_commit(repo_id, add(a__txt=b'a'), commit_message='Straight away', revision=revision)
        assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as error:
        nobody.create_commit(repo_id, add(a__txt=b'a'), commit_message='Whoever', create_pr=True)
    assert error.value.response.status_code == 401


TEXT = {'path': 'good.txt', 'content': 'YQ==', 'encoding': 'base64'}


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('file', {**TEXT, 'path': '../up.txt'}, 'Invalid path'),
        ('file', {**TEXT, 'path': '/root.txt'}, 'Invalid path'),
        ('file', {**TEXT, 'path': '.git/config'}, 'Invalid path'),
        ('file', {'content': 'YQ=='}, 'Invalid path'),
        ('file', {**TEXT, 'path': 'good.txt/inside'}, 'a file and a folder'),
        ('file', {**TEXT, 'path': 'x', 'content': '*'}, 'not base64'),
        ('file', {**TEXT, 'path': 'x.safetensors'}, 'belongs in LFS'),
        (
            'file',
            {**TEXT, 'path': 'README.md', 'content': base64.b64encode(b'---\n- a\n---\n').decode()},
            'not a mapping',
        ),
        ('lfsFile', {'path': 'x', 'algo': 'sha256', 'oid': SHA256, 'size': len(WEIGHTS)}, 'LFS holds no such file'),
        ('renamedFile', {'path': 'x'}, 'Unknown operation'),
        ('deletedFile', {'path': 'x'}, "doesn't exist"),
    ],
)
def test_bad_line_spoils_the_commit(hub, repo_id, key, value, message):
    status, answer = post_commit(hub, repo_id, ('file', TEXT), (key, value))
    assert (status, message in answer['error']) == (404 if key == 'deletedFile' else 400, True), answer
    assert (files(hub, repo_id), hub.commit_counts[repo_id]) == ({}, 0)


def test_commit_needs_a_header(hub, repo_id):
    url = f'{hub.endpoint}/api/models/{repo_id}/commit/main'
    for body in (
        b'',
        b'text',
        b'[]',
        b'{"key": "header", "value": 1}',
        b'{"key": "header", "value": {}}',
        b'{"key": "file", "value": {"summary": "x"}}',
        b'{"key": "header", "value": {"summary": ""}}',
    ):
        assert ask('POST', url, body)[0] == 400
    assert hub.commit_counts[repo_id] == 0


def test_lfs_checks_what_comes(hub, repo_id):
    batch, put = f'{hub.endpoint}/{repo_id}.git/info/lfs/objects/batch', f'{hub.endpoint}/{repo_id}.git/lfs/{SHA256}'
    verify = f'{hub.endpoint}/{repo_id}.git/info/lfs/verify'

    def announced(size: int = len(WEIGHTS), oid: str = SHA256) -> dict:
        return ask('POST', batch, json.dumps({'objects': [{'oid': oid, 'size': size}]}).encode())[1]['objects'][0]

    def verified(size: int = len(WEIGHTS)) -> int:
        return ask('POST', verify, json.dumps({'oid': SHA256, 'size': size}).encode())[0]

    assert ask('PUT', put, WEIGHTS, token=None)[0] == 403  # not announced
    assert announced(oid='short')['error']['code'] == 422
    actions = announced()['actions']
    assert (actions['upload']['href'].split('?')[0], actions['verify']['href']) == (put, verify)
    assert ask('PUT', put, WEIGHTS[:-1], token=None)[0] == 400
    assert ask('PUT', put, WEIGHTS[:-1] + b'x', token=None)[0] == 400
    assert verified() == 404
    assert ask('PUT', put, WEIGHTS, token=None)[0] == 200
    assert (verified(), verified(5)) == (200, 422)
    assert 'actions' not in announced()
    assert post_commit(hub, repo_id, ('lfsFile', {'path': 'x', 'algo': 'sha256', 'oid': SHA256, 'size': 5}))[0] == 400
    assert post_commit(hub, repo_id, ('lfsFile', {'path': 'x', 'algo': 'sha256', 'oid': SHA256}))[0] == 200
    assert hub.weight_bytes[repo_id] == 4 * len(WEIGHTS) - 1  # refused or not


@pytest.mark.skipif(VERSION < (1, 0), reason='the oldest client commits to HF_ENDPOINT only, whatever its endpoint')
def test_weights_on_disk(tmp_path):
    with HubServer(tokens={'hf_owner': 'owner'}, storage=tmp_path) as hub:
        api = HfApi(endpoint=hub.endpoint, token='hf_owner')
        api.create_repo('owner/disk')
        api.create_commit('owner/disk', add(model__safetensors=WEIGHTS, a__txt=b'a'), commit_message='One')
        assert [path.name for path in tmp_path.iterdir()] == [SHA256]
        assert files(hub, 'owner/disk') == {'model.safetensors': WEIGHTS, 'a.txt': b'a'}


# Cards ----------------------------------------------------------------------------------------------------------------


def test_card(hub, repo_id, cache_dir):
    data = ModelCardData(library_name='timm', license='mit', base_model='timm/resnet18.a1_in1k')
    card = ModelCard(f'---\n{data.to_yaml()}\n---\n# A model\n')
    if VERSION >= (1, 0):  # before, ModelCard asked huggingface.co whatever the endpoint; uploads ask the endpoint
        card.validate()
        card.push_to_hub(repo_id, token='hf_owner')
    else:
        owner.upload_file(path_or_fileobj=str(card).encode(), path_in_repo='README.md', repo_id=repo_id)
    assert owner.model_info(repo_id).card_data.base_model == 'timm/resnet18.a1_in1k'
    path = owner.hf_hub_download(repo_id, 'README.md', cache_dir=cache_dir)
    assert ModelCard.load(path).data.license == 'mit'


@pytest.mark.parametrize(
    ('front', 'message'),
    [
        ('license: [', 'YAML Metadata Error'),
        ('- a list', 'not a mapping'),
        ('tags: timm', '"tags" must be an array'),
        ('library_name: 1', '"library_name" must be a string'),
        ('license: The MIT Licence', '"license" must be one of'),
        ('base_model: /home/model', '"base_model" is not a model id'),
        ('base_model_relation: copy', '"base_model_relation" must be one of'),
        ('model-index:\n- name: x\n  results:\n  - task: {type: t}\n    metrics: []', '"model-index" lacks'),
    ],
)
def test_bad_card(hub, repo_id, front, message):
    content = f'---\n{front}\n---\n# A model\n'
    with pytest.raises(ValueError, match=f'Invalid metadata in README.md.*\n.*{message}'):
        owner.upload_file(path_or_fileobj=content.encode(), path_in_repo='README.md', repo_id=repo_id)
    assert [entry.path for entry in hub.log if entry.method == 'POST'][0] == '/api/validate-yaml'
    assert hub.commit_counts[repo_id] == 0


@pytest.mark.skipif(VERSION < (1, 0), reason='the oldest client asks huggingface.co whatever the endpoint')
def test_bad_card_that_is_not_uploaded(hub):
    with pytest.raises(ValueError, match='must be one of the known identifiers'):
        ModelCard('---\nlicense: The MIT Licence\n---\n# A model\n').validate()


def test_card_without_front_matter(hub, repo_id):
    with pytest.warns(UserWarning, match='empty or missing yaml metadata'):
        owner.upload_file(path_or_fileobj=b'# A model\n', path_in_repo='README.md', repo_id=repo_id)
    assert hub.commit_counts[repo_id] == 1


def test_model_index_is_known():
    metric = '{type: accuracy, value: 70.1}'
    result = f'task: {{type: t}}\n    dataset: {{type: d, name: D}}\n    metrics: [{metric}]'
    content = f'---\nmodel-index:\n- name: x\n  results:\n  - {result}\n---\n'
    assert check_card(content) == ([], [])
    assert check_card(content.replace(', value: 70.1', ''))[0]


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'options', 'error'),
    [
        ('401', {}, HfHubHTTPError),
        ('401', {'code': 'RepoNotFound'}, RepositoryNotFoundError),
        ('403', {}, HfHubHTTPError),
        ('403', {'code': 'GatedRepo'}, GatedRepoError),
        ('404', {}, HfHubHTTPError),
        ('404', {'code': 'RepoNotFound'}, RepositoryNotFoundError),
        ('404', {'code': 'RevisionNotFound'}, RevisionNotFoundError),
        ('404', {'code': 'EntryNotFound'}, EntryNotFoundError),
        ('412', {}, HfHubHTTPError),
        ('429', {'retry_after': 1}, HfHubHTTPError),
        ('500', {'message': 'Line one\nline two – and three'}, HfHubHTTPError),
        ('503', {}, HfHubHTTPError),
    ],
)
def test_status(hub, repo_id, kind, options, error):
    """Neither the commit nor what asks about a repository is tried again by the client: the error comes at once."""
    for path, call in (
        (f'/api/models/{repo_id}/commit/', lambda: owner.create_commit(repo_id, add(a=b'a'), commit_message='One')),
        (f'/api/models/{repo_id}$', lambda: owner.model_info(repo_id)),
    ):
        fault = hub.faults.add(kind, path=path, **options)
        with pytest.raises(HfHubHTTPError) as raised:
            call()
        assert type(raised.value).__name__.removeprefix('Remote') == error.__name__
        assert raised.value.response.status_code == int(kind)
        assert raised.value.response.headers.get('Retry-After') == ('1' if 'retry_after' in options else None)
        assert (hub.log[-1].status, hub.log[-1].fault, fault.hits) == (int(kind), kind, 1)
        assert (files(hub, repo_id), hub.commit_counts[repo_id]) == ({}, 0)
    call()  # the fault was for one request


@pytest.mark.parametrize(
    ('kind', 'options', 'landed'),
    [
        ('drop_before', {}, False),
        ('drop_after', {}, True),
        ('500', {'landed': True}, True),
        ('503', {'landed': True}, True),
        ('truncate', {}, True),
        ('truncate', {'keep': 0}, True),
    ],
)
def test_commit_of_unknown_fate(hub, repo_id, kind, options, landed):
    """The client sees an error; whether the commit has landed only the Hub can tell.

    A lost connection arrives as an error of the HTTP library (not one that huggingface_hub has a name for).
    """
    before = owner.model_info(repo_id).sha
    hub.faults.add(kind, path='/commit/', **options)
    with pytest.raises(Exception) as error:
        owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One')
    assert isinstance(error.value, HfHubHTTPError) == kind.isdigit()
    assert error.type.__module__.split('.')[0] in ('huggingface_hub', 'requests', 'httpx', 'httpx2')
    assert (owner.model_info(repo_id).sha != before, hub.commit_counts[repo_id]) == (landed, int(landed))
    assert [entry.status for entry in hub.log if entry.fault] == [
        int(kind) if kind.isdigit() else 200 if kind == 'truncate' else 0
    ]
    # The same again lands nothing twice: the client leaves out what is there.
    owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One')
    assert (files(hub, repo_id), hub.commit_counts[repo_id]) == ({'a.txt': b'a'}, 1)


def test_commit_in_between(hub, repo_id):
    """Somebody else commits after the client has looked and before its own commit comes."""
    first = owner.model_info(repo_id).sha
    with hub.faults.add('call', path='/commit/', action=lambda request: hub.commit(repo_id, {'b.txt': 'b'})) as fault:
        with pytest.raises(HfHubHTTPError) as error:
            owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One', parent_commit=first)
    assert (error.value.response.status_code, fault.hits) == (412, 1)
    assert files(hub, repo_id) == {'b.txt': b'b'}


@pytest.mark.parametrize('landed', [False, True])
def test_action_before_or_after(hub, repo_id, landed):
    """Where a test stops the world: in the action the change is still to come, or has landed."""
    seen = []
    hub.faults.add('call', path='/commit/', landed=landed, action=lambda request: seen.append(files(hub, repo_id)))
    owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One')
    assert seen == [{'a.txt': b'a'} if landed else {}]
    assert files(hub, repo_id) == {'a.txt': b'a'}


UPLOAD = ('/preupload/', '/objects/batch', r'\.git/lfs/', '/verify')


@pytest.mark.usefixtures('short_waits')
def test_upload_is_tried_again(hub, repo_id):
    """By newer clients in every step before the commit; by the oldest only where bytes are put."""
    faults = dict(zip(UPLOAD, ('503', 'drop_before', '500', 'drop_after')))
    if VERSION < (1, 0):
        faults = {r'\.git/lfs/': '500'}
    for path, kind in faults.items():
        hub.faults.add(kind, path=path)
    owner.create_commit(repo_id, add(model__safetensors=WEIGHTS), commit_message='One')
    assert [entry.fault for entry in hub.log if entry.fault] == list(faults.values())
    assert files(hub, repo_id) == {'model.safetensors': WEIGHTS}
    assert (hub.commit_counts[repo_id], hub.weight_bytes[repo_id]) == (1, 2 * len(WEIGHTS))  # put twice


@pytest.mark.skipif(VERSION >= (1, 0), reason='newer clients try again')
@pytest.mark.parametrize('step', [0, 1, 3])
def test_oldest_client_does_not_try_again(hub, repo_id, step):
    for kind in ('503', '429', 'drop_before'):
        fault = hub.faults.add(kind, path=UPLOAD[step])
        with pytest.raises((OSError, RuntimeError)):
            owner.create_commit(repo_id, add(model__safetensors=kind.encode()), commit_message='One')
        assert fault.hits == 1
    assert (hub.commit_counts[repo_id], files(hub, repo_id)) == (0, {})


@pytest.mark.skipif(VERSION < (1, 0), reason='the oldest client takes no notice')
def test_retry_after(hub, repo_id):
    hub.faults.add('429', path='/preupload/', retry_after=0)
    start = time.monotonic()
    owner.create_commit(repo_id, add(a__txt=b'a'), commit_message='One')
    assert 0.9 < time.monotonic() - start < 30
    assert [entry.status for entry in hub.log if '/preupload/' in entry.path] == [429, 200]


def test_altered_upload_is_refused(hub, repo_id):
    """Other bytes arrive than were announced: the client says so, wrapped, and nothing is committed."""
    hub.faults.add('wrong_hash', method='PUT')
    with pytest.raises(RuntimeError, match="Error while uploading 'model.safetensors'") as error:
        owner.create_commit(repo_id, add(model__safetensors=WEIGHTS), commit_message='One')
    assert isinstance(error.value.__cause__, BadRequestError)
    assert (hub.commit_counts[repo_id], hub.repos[repo_id].lfs) == (0, {})


def test_altered_download(hub, repo_id, cache_dir):
    """The client compares sizes only: altered weights lie in its cache under the name of the right ones."""
    hub.commit(repo_id, {'model.safetensors': WEIGHTS})
    hub.faults.add('wrong_hash', path='/resolve/')
    path = Path(owner.hf_hub_download(repo_id, 'model.safetensors', cache_dir=cache_dir))
    assert path.resolve().name == SHA256
    data = path.read_bytes()
    assert [at for at in range(len(data)) if data[at] != WEIGHTS[at]] == [len(WEIGHTS) // 2]
    assert [(entry.method, entry.fault) for entry in hub.log] == [('HEAD', None), ('GET', 'wrong_hash')]


@pytest.mark.usefixtures('short_waits')
@pytest.mark.parametrize('kind', ['truncate', 'drop_before'])
def test_broken_download(hub, repo_id, cache_dir, kind):
    """A newer client asks again, the oldest raises; neither leaves half a file under the name of the whole."""
    hub.commit(repo_id, {'model.safetensors': WEIGHTS})
    hub.faults.add(kind, method='GET', path='/resolve/')
    if VERSION >= (1, 0):
        assert Path(owner.hf_hub_download(repo_id, 'model.safetensors', cache_dir=cache_dir)).read_bytes() == WEIGHTS
        return
    with pytest.raises(Exception) as error:
        owner.hf_hub_download(repo_id, 'model.safetensors', cache_dir=cache_dir)
    assert error.type.__module__.startswith('requests')
    assert not list(cache_dir.rglob('snapshots/*/model.safetensors'))


@pytest.mark.parametrize('kind', ['500', '503'])
def test_download_that_fails(hub, repo_id, cache_dir, kind):
    hub.commit(repo_id, {'model.safetensors': WEIGHTS})
    hub.faults.add(kind, method='GET', path='/resolve/')
    with pytest.raises(HfHubHTTPError) as error:
        owner.hf_hub_download(repo_id, 'model.safetensors', cache_dir=cache_dir)
    assert error.value.response.status_code == int(kind)


@pytest.mark.parametrize('landed', [False, True])
def test_slow_answer_keeps_nobody_else_waiting(hub, repo_id, landed):
    hub.faults.add('slow', path='/commit/', seconds=0.6, landed=landed)
    waiting = threading.Thread(
        target=owner.create_commit, args=(repo_id, add(a__txt=b'a')), kwargs={'commit_message': 'One'}
    )
    waiting.start()
    deadline = time.monotonic() + 0.5
    while not any('/preupload/' in entry.path for entry in list(hub.log)) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert (files(hub, repo_id) == {'a.txt': b'a'}) == landed
    assert stranger.model_info(repo_id).id == repo_id
    assert waiting.is_alive()
    waiting.join()
    assert files(hub, repo_id) == {'a.txt': b'a'}


def test_which_requests_a_fault_strikes(hub, repo_id):
    assert hub.faults.add('404', path='/nowhere').hits == 0
    fault = hub.faults.add('503', method='GET', path=f'/api/models/{repo_id}', user='stranger', times=2, skip=1)
    statuses = []
    for api in (owner, stranger, stranger, owner, stranger, stranger):
        try:
            api.model_info(repo_id)
            statuses.append(200)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
    assert (statuses, fault.hits) == ([200, 200, 503, 200, 503, 200], 2)
    with hub.faults.add('503', path='/api/models/', times=None) as fault:
        for _ in range(3):
            with pytest.raises(HfHubHTTPError):
                owner.model_info(repo_id)
    assert (owner.model_info(repo_id).id, fault.hits) == (repo_id, 3)


@pytest.mark.parametrize('options', [{'kind': 'flood'}, {'kind': '200'}, {'kind': 'call'}])
def test_no_such_fault(options):
    with pytest.raises(ValueError):
        Fault(**options)


@pytest.mark.parametrize('chunked', [False, True])
def test_half_a_request_is_none(hub, repo_id, capfd, chunked):
    """A client that is killed while it sends: what has come, whole lines even, has no effect."""
    lines = [('header', {'summary': 'x'}), ('file', TEXT), ('file', {**TEXT, 'path': 'more.txt'})]
    *body, rest = (json.dumps({'key': key, 'value': value}).encode() + b'\n' for key, value in lines)
    body = b''.join(body)
    length = 'Transfer-Encoding: chunked' if chunked else f'Content-Length: {len(body + rest)}'
    head = f'POST /api/models/{repo_id}/commit/main HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer hf_owner\r\n{length}'
    if chunked:
        body, rest = (b'%x\r\n%b\r\n' % (len(part), part) for part in (body, rest))
        rest += b'0\r\n\r\n'
    for end in (b'', rest):
        with socket.create_connection(('127.0.0.1', int(hub.endpoint.rsplit(':')[-1]))) as connection:
            connection.sendall(head.encode() + b'\r\n\r\n' + body + end)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(1000)
        assert b'200 OK' in answer if end else not answer
        assert files(hub, repo_id) == ({'good.txt': b'a', 'more.txt': b'a'} if end else {})
    assert not capfd.readouterr().err


def test_mistake_of_the_server_is_seen(hub, repo_id, capfd):
    status, answer = ask('POST', f'{hub.endpoint}/api/models/{repo_id}/preupload/main', b'{"files": [{}]}')
    assert (status, 'KeyError' in answer['error']) == (500, True)
    assert 'Traceback' in capfd.readouterr().err


def test_no_token_in_the_log(hub, repo_id):
    owner.create_commit(repo_id, add(model__safetensors=WEIGHTS), commit_message='One')
    assert 'hf_owner' not in repr(hub.log)
