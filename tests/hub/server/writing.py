"""The writing half of the loopback Hub: users, repositories, branches and tags, cards, large files and commits."""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

from .reading import front_matter
from .routes import REPO, Refusal, Request, Response, find_commit, readable, require_writer, route, writable
from .store import LFS_SIZE, LFS_SUFFIXES, Blob, Repo, in_lfs

if TYPE_CHECKING:
    from .server import HubServer


@route('GET', '/api/whoami-v2')
def _whoami(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    if user is None:
        raise Refusal(401, '', 'Invalid username or password.')
    orgs = [{'type': 'org', 'name': org, 'roleInOrg': 'write'} for org, users in hub.orgs.items() if user in users]
    token = {'displayName': 'token', 'role': 'read' if request.token in hub.read_only else 'write'}
    answer = {'type': 'user', 'id': hashlib.sha1(user.encode()).hexdigest()[:24], 'name': user, 'fullname': user}
    return Response(json=answer | {'orgs': orgs, 'auth': {'type': 'access_token', 'accessToken': token}})


def _repo_id(hub: 'HubServer', request: Request, user: str | None) -> str:
    """The model that the body names, in a namespace where the user may write."""
    data, writer = request.data(), require_writer(hub, request, user)
    if data.get('type') not in (None, 'model'):
        raise Refusal(400, '', f'There are models only here, no {data["type"]}')
    name, namespace = data.get('name'), data.get('organization') or writer
    if not isinstance(name, str) or not re.fullmatch(r'(?!.*(--|\.\.))[0-9A-Za-z_][\w.-]{0,94}[0-9A-Za-z_]|\w', name):
        raise Refusal(400, '', f'Invalid repository name: {name!r}')
    if not hub.may_write_in(namespace, writer):
        raise Refusal(403, '', f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    return f'{namespace}/{name}'


def _settings(repo: Repo, data: Mapping) -> None:
    """Visibility and gate, as the newer clients say it (visibility) and the older (private)."""
    if data.get('visibility') not in (None, 'public', 'private'):
        raise Refusal(400, '', f'Invalid visibility: {data["visibility"]!r}')
    if 'visibility' in data or 'private' in data:
        repo.private = data.get('visibility', 'private' if data.get('private') else 'public') == 'private'
    repo.gated = data.get('gated', repo.gated)


@route('POST', '/api/repos/create')
def _create_repo(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo_id = _repo_id(hub, request, user)
    url = f'{hub.endpoint}/{repo_id}'
    if repo_id in hub.repos:
        raise Refusal(409, '', 'You already created this model repo', json={'url': url, 'name': repo_id})
    # A repository is never quite empty: the Hub writes down first which files go to LFS.
    attributes = ''.join(f'*{suffix} filter=lfs diff=lfs merge=lfs -text\n' for suffix in LFS_SUFFIXES)
    repo = hub.create_repo(repo_id, {'.gitattributes': attributes})
    _settings(repo, request.data())
    return Response(json={'url': url, 'name': repo_id})


@route('DELETE', '/api/repos/delete')
def _delete_repo(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo_id = _repo_id(hub, request, user)
    if repo_id not in hub.repos:
        raise Refusal(404, 'RepoNotFound', 'Repository not found')
    del hub.repos[repo_id]
    return Response(json={})


@route('PUT', rf'/api/models/{REPO}/settings')
def _update_settings(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = writable(hub, request, user, match)
    _settings(repo, request.data())
    return Response(json={'private': repo.private, 'gated': repo.gated})


@route('POST', rf'/api/models/{REPO}/branch/(?P<name>[^/]+)')
def _create_branch(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = writable(hub, request, user, match)
    name = unquote(match['name'])
    if name in repo.branches:
        raise Refusal(409, '', f'Reference refs/heads/{name} already exists')
    if name.startswith('refs/'):
        raise Refusal(400, '', f'Invalid branch name: {name}')
    repo.branches[name] = find_commit(repo, request.data().get('startingPoint'))
    return Response(json={})


@route('DELETE', rf'/api/models/{REPO}/branch/(?P<name>[^/]+)')
def _delete_branch(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = writable(hub, request, user, match)
    name = unquote(match['name'])
    if name == 'main':
        raise Refusal(403, '', 'Cannot delete the branch main')
    if repo.branches.pop(name, None) is None:
        raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {name}')
    return Response(json={})


@route('POST', rf'/api/models/{REPO}/tag/(?P<revision>[^/]+)')
def _create_tag(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = writable(hub, request, user, match)
    commit, name = find_commit(repo, match['revision']), request.data().get('tag')
    if not isinstance(name, str) or not name:
        raise Refusal(400, '', 'A tag needs a name')
    if name in repo.tags:
        raise Refusal(409, '', f'Tag reference exists already: {name}')
    repo.tags[name] = commit
    return Response(json={})


@route('DELETE', rf'/api/models/{REPO}/tag/(?P<revision>[^/]+)')
def _delete_tag(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = writable(hub, request, user, match)
    name = unquote(match['revision'])
    if repo.tags.pop(name, None) is None:
        raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {name}')
    return Response(json={})


@route('POST', '/api/validate-yaml')
def _validate_yaml(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """A card's front matter, looked over; every client asks in JSON, the oldest once in a form."""
    if request.headers.get('content-type', '').startswith('application/x-www-form-urlencoded'):
        content = parse_qs(request.body.decode()).get('content', [''])[0]
    else:
        content = request.data().get('content', '')
    errors, warnings = check_card(content)
    answer = {
        'errors': [{'message': message} for message in errors],
        'warnings': [{'message': message} for message in warnings],
    }
    return Response(400 if errors else 200, json=answer)


def check_card(content: str) -> tuple[list[str], list[str]]:
    """The errors and the warnings that a model card earns on the Hub."""
    import yaml

    try:
        data = front_matter(content)
    except yaml.YAMLError as error:
        return [f'YAML Metadata Error: {error}'], []
    if data is None:
        return [], ['empty or missing yaml metadata in repo card']
    if not isinstance(data, dict):
        return ['YAML Metadata Error: the front matter is not a mapping'], []

    def is_text(value: object) -> bool:
        return isinstance(value, str) and bool(value)

    def are_texts(value: object) -> bool:
        return isinstance(value, list) and all(map(is_text, value))

    errors = []
    for key in ('library_name', 'pipeline_tag', 'license_name', 'license_link', 'model_name'):
        if key in data and not is_text(data[key]):
            errors.append(f'"{key}" must be a string')
    for key in ('tags', 'datasets', 'metrics'):
        if key in data and not are_texts(data[key]):
            errors.append(f'"{key}" must be an array of strings')
    for key in ('license', 'language', 'base_model'):
        if key in data and not is_text(data[key]) and not are_texts(data[key]):
            errors.append(f'"{key}" must be a string or an array of strings')
    license = data.get('license')
    for name in license if isinstance(license, list) else [license]:
        if isinstance(name, str) and not re.fullmatch(r'[a-z0-9][a-z0-9.+-]*', name):
            errors.append(f'"license" must be one of the known identifiers, not {name!r}')
    bases = data.get('base_model')
    for base in bases if isinstance(bases, list) else [bases]:
        if isinstance(base, str) and not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', base):
            errors.append(f'"base_model" is not a model id: {base!r}')
    if data.get('base_model_relation', 'finetune') not in ('finetune', 'adapter', 'merge', 'quantized'):
        errors.append('"base_model_relation" must be one of [finetune, adapter, merge, quantized]')
    if 'model-index' in data:
        errors += _check_model_index(data['model-index'])
    return errors, []


def _check_model_index(index: object) -> list[str]:
    """Models with names, results with a task, a dataset, and metrics that have values."""
    try:
        for model in index:
            assert model['name'] and isinstance(model['results'], list)
            for result in model['results']:
                assert result['task']['type'] and result['dataset']['type'] and result['dataset']['name']
                assert result['metrics'] and all(metric['type'] and 'value' in metric for metric in result['metrics'])
                assert 'source' not in result or result['source']['url']
    except (AssertionError, KeyError, TypeError):
        return ['"model-index" lacks a name, a task, a dataset or a metric']
    return []


@route('POST', rf'/api/models/{REPO}/preupload/(?P<revision>[^/]+)')
def _preupload(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """Where each file goes, and what is there under its name, for the client to leave out what has not changed."""
    repo = _committable(hub, request, user, match)
    commit = find_commit(repo, match['revision'])
    items = []
    for file in request.data().get('files', []):
        mode = 'lfs' if in_lfs(file['path'], file['size']) else 'regular'
        item = {'path': file['path'], 'uploadMode': mode, 'shouldIgnore': False}
        if file['path'] in commit.files:
            item['oid'] = commit.files[file['path']].etag
        items.append(item)
    return Response(json={'files': items, 'commitOid': commit.oid})


def _committable(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Repo:
    """The repository a path names, if the user may commit there: everybody may to pull requests of their own."""
    repo = readable(hub, match, user, content=True)
    writer = require_writer(hub, request, user)
    if request.flag('create_pr') or repo.pull_authors.get(unquote(match['revision'])) == writer:
        return repo
    return writable(hub, request, user, match)


@route('POST', rf'/{REPO}\.git/info/lfs/objects/batch')
def _lfs_batch(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """Where to put the large files that are not there yet."""
    repo = readable(hub, match, user)
    require_writer(hub, request, user)
    objects = []
    for file in request.data().get('objects', []):
        oid, size = file['oid'], file['size']
        item = {'oid': oid, 'size': size}
        if not re.fullmatch('[0-9a-f]{64}', oid):
            item['error'] = {'code': 422, 'message': f'{oid} is not a sha256'}
        elif oid not in repo.lfs:
            repo.announced.add((oid, size))
            upload = {'href': f'{hub.endpoint}/{repo.id}.git/lfs/{oid}?size={size}', 'header': {}}
            item['actions'] = {'upload': upload, 'verify': {'href': f'{hub.endpoint}/{repo.id}.git/info/lfs/verify'}}
        objects.append(item)
    return Response(json={'transfer': 'basic', 'objects': objects})


_LFS_PUT = rf'/{REPO}\.git/lfs/(?P<oid>[0-9a-f]{{64}})'


def weights_of(request: Request) -> str | None:
    """The repository for which the body of the request is a large file, if it is one."""
    match = re.fullmatch(_LFS_PUT, request.path) if request.method == 'PUT' else None
    return match and unquote(match['id'])


@route('PUT', _LFS_PUT, locked=False)
def _lfs_put(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """The bytes of a large file. The real Hub signs the address; here the announcement stands for that."""
    size = len(request.body)
    with hub.lock:
        repo = hub.repos.get(unquote(match['id']))
        announced = [size for oid, size in repo.announced if oid == match['oid']] if repo else []
    if not announced:
        raise Refusal(403, '', 'This upload was not announced')
    if size not in announced:
        raise Refusal(400, '', f'{size} bytes have come, another number was announced')
    blob = Blob.of('', request.body, lfs=True)
    if blob.sha256 != match['oid']:
        raise Refusal(400, '', f'The bytes that have come have the sha256 {blob.sha256}, not {match["oid"]}')
    blob = hub.keep(blob)
    with hub.lock:
        repo.lfs[blob.sha256] = blob
    return Response(headers={'ETag': f'"{blob.sha256}"'}, json={})


@route('POST', rf'/{REPO}\.git/info/lfs/verify')
def _lfs_verify(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = readable(hub, match, user)
    require_writer(hub, request, user)
    data = request.data()
    blob = repo.lfs.get(data.get('oid', ''))
    if blob is None:
        raise Refusal(404, '', f'{data.get("oid")} has not come')
    if blob.size != data.get('size'):
        raise Refusal(422, '', f'{blob.sha256} has {blob.size} bytes, not {data.get("size")}')
    return Response(json={'message': 'Object exists'})


@route('POST', rf'/api/models/{REPO}/commit/(?P<revision>[^/]+)')
def _make_commit(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """One commit, all of it or nothing. A commit that changes nothing is made as well, as on the real Hub."""
    repo = _committable(hub, request, user, match)
    revision = unquote(match['revision'])
    head = find_commit(repo, match['revision'])
    pull = request.flag('create_pr')
    if revision not in (repo.branches if pull else {**repo.branches, **repo.pulls}) or (pull and revision != 'main'):
        raise Refusal(400, '', f'Commits go to a branch, and a pull request to main, not to {revision}')
    try:
        header, *lines = [(line['key'], line['value']) for line in map(json.loads, request.body.splitlines())]
        title, message, parent = (header[1].get(key) for key in ('summary', 'description', 'parentCommit'))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(400, '', 'The body is not a header and operations, a JSON object a line') from None
    if header[0] != 'header' or not title:
        raise Refusal(400, '', 'A commit needs a header with a summary')
    if parent not in (None, head.oid):
        raise Refusal(412, '', 'A commit has happened since. Please refresh and try again.')
    changes: dict[str, Blob | None] = {}
    for key, value in lines:
        changes |= _change(repo, {**head.files, **changes}, key, value)
    if changes.get('README.md') is not None:
        errors, _ = check_card(b''.join(changes['README.md'].read()).decode(errors='replace'))
        if errors:
            raise Refusal(400, '', f'Invalid metadata in README.md: {"; ".join(errors)}')
    if pull:
        revision = repo.open_pull(user)
    commit = repo.commit(changes, branch=revision, title=title, message=message or '', author=user)
    hub.commit_counts[repo.id] += 1
    answer = {'success': True, 'commitOid': commit.oid, 'commitUrl': f'{hub.endpoint}/{repo.id}/commit/{commit.oid}'}
    if pull:
        answer['pullRequestUrl'] = f'{hub.endpoint}/{repo.id}/discussions/{revision.rsplit("/")[-1]}'
    return Response(json=answer)


def _change(repo: Repo, files: Mapping[str, Blob | None], key: str, value: Mapping) -> dict[str, Blob | None]:
    """What one line of a commit changes, on top of the files as the lines before it have left them."""
    path = value.get('path')
    parts = path.rstrip('/').split('/') if isinstance(path, str) else ['']
    if any(part in ('', '.', '..', '.git') for part in parts):
        raise Refusal(400, '', f'Invalid path: {path!r}')
    there = [name for name, blob in files.items() if blob is not None]
    if key == 'deletedFile' and path in there:
        return {path: None}
    if key == 'deletedFolder' and (inside := [name for name in there if name.startswith(path.rstrip('/') + '/')]):
        return dict.fromkeys(inside)
    if key in ('deletedFile', 'deletedFolder'):
        raise Refusal(404, 'EntryNotFound', "A file with this name doesn't exist")
    if any(name.startswith(f'{path}/') or path.startswith(f'{name}/') for name in there):
        raise Refusal(400, '', f'{path} would be a file and a folder')
    if key == 'lfsFile':
        blob = repo.lfs.get(value.get('oid'))
        if blob is None or value.get('algo') != 'sha256' or value.get('size', blob.size) != blob.size:
            raise Refusal(400, '', f'{path}: LFS holds no such file: {value.get("oid")}, {value.get("size")} bytes')
        return {path: blob}
    if key != 'file' or value.get('encoding') != 'base64':
        raise Refusal(400, '', f'Unknown operation: {key}')
    try:
        data = base64.b64decode(value['content'], validate=True)
    except (binascii.Error, KeyError, TypeError):
        raise Refusal(400, '', f'{path}: the content is not base64') from None
    if len(data) >= LFS_SIZE or (data and path.endswith(LFS_SUFFIXES)):
        raise Refusal(400, '', f'{path} belongs in LFS')
    return {path: Blob.of(path, data, lfs=False)}
