"""The reading half of the loopback Hub: files, and what is known of repositories and commits."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote

from .routes import REPO, Refusal, Request, Response, find_commit, flag, page, readable, route, writable
from .store import Blob, Commit, Repo, below

if TYPE_CHECKING:
    from .server import HubServer


@route('GET', rf'/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
def _resolve(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """A file, or the part of it that the Range header names; LFS files too, which the real Hub sends from elsewhere."""
    repo = readable(hub, match, user, content=True)
    commit = find_commit(repo, match['revision'])
    headers = {'X-Repo-Commit': commit.oid}
    path = unquote(match['path'])
    blob = commit.files.get(path)
    if blob is None:
        raise Refusal(404, 'EntryNotFound', 'Entry not found', headers)
    headers |= {'ETag': f'"{blob.etag}"', 'Accept-Ranges': 'bytes', 'Content-Type': 'application/octet-stream'}
    headers['Content-Disposition'] = f"inline; filename*=UTF-8''{quote(path.rsplit('/')[-1])}"
    if blob.pointer_size is not None:
        headers |= {'X-Linked-ETag': f'"{blob.sha256}"', 'X-Linked-Size': str(blob.size)}
    return _part(request, blob, headers)


def _part(request: Request, blob: Blob, headers: dict[str, str]) -> Response:
    match = re.fullmatch(r'bytes=(\d*)-(\d*)', request.headers.get('range', ''))
    if not match or not any(match.groups()):
        return Response(200, headers, blob=blob, part=(0, blob.size))
    first, last = match.groups()
    start = int(first) if first else max(blob.size - int(last), 0)
    stop = min(int(last) + 1, blob.size) if first and last else blob.size
    if start >= stop:
        raise Refusal(416, '', 'Range not satisfiable', {'Content-Range': f'bytes */{blob.size}'})
    headers['Content-Range'] = f'bytes {start}-{stop - 1}/{blob.size}'
    return Response(206, headers, blob=blob, part=(start, stop))


@route('GET', rf'/api/models/{REPO}(?:/revision/(?P<revision>[^/]+))?')
def _model_info(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = readable(hub, match, user)
    return Response(json=_info(repo, find_commit(repo, match['revision']), blobs=request.flag('blobs')))


def _info(repo: Repo, commit: Commit, *, blobs: bool = False) -> dict:
    card = _card_data(commit)
    siblings = []
    for path, blob in commit.files.items():
        sibling: dict = {'rfilename': path}
        if blobs:
            sibling |= {'size': blob.size, 'blobId': blob.oid}
            if blob.pointer_size is not None:
                sibling['lfs'] = {'sha256': blob.sha256, 'size': blob.size, 'pointerSize': blob.pointer_size}
        siblings.append(sibling)
    info = {
        'id': repo.id,
        'modelId': repo.id,
        'author': repo.id.split('/')[0],
        'sha': commit.oid,
        'createdAt': min(commit.date for commit in repo.commits.values()),
        'lastModified': commit.date,
        'private': repo.private,
        'gated': 'auto' if repo.gated is True else repo.gated,
        'disabled': repo.disabled,
        'tags': list(card.get('tags') or []),
        'siblings': siblings,
        'cardData': card,
    }
    return info | {key: card[key] for key in ('library_name', 'pipeline_tag') if key in card}


def _card_data(commit: Commit) -> dict:
    """The front matter of the repository's README.md."""
    if 'README.md' not in commit.files:
        return {}
    return front_matter(b''.join(commit.files['README.md'].read()).decode()) or {}


def front_matter(text: str) -> object:
    """What the YAML between the two lines of dashes says; None where there is none."""
    match = re.match(r'---\r?\n(.*?)^---\s*$', text, re.DOTALL | re.MULTILINE)
    if not match:
        return None
    import yaml  # comes with huggingface_hub; only a repository that has a card needs it

    return yaml.safe_load(match[1])


@route('GET', '/api/models')
def _list_models(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    """The models that the user may see, those of an author where the query says so."""
    author, search = (request.query.get(name, [''])[0] for name in ('author', 'search'))
    items = []
    for repo in hub.repos.values():
        unseen = repo.disabled or (repo.private and not hub.may_read(repo, user))
        if unseen or author not in ('', repo.id.split('/')[0]) or search.lower() not in repo.id.lower():
            continue
        items.append(_info(repo, repo.branches['main']))
    return page(hub, request, items)


@route('GET', rf'/api/models/{REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?')
def _tree(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = readable(hub, match, user)
    commit = find_commit(repo, match['revision'])
    path = unquote(match['path'] or '').strip('/')
    if path and path not in _folders(commit.files):
        raise Refusal(404, 'EntryNotFound', f'{path} does not exist on "{match["revision"]}"')
    inside = [name for name in (*_folders(commit.files), *commit.files) if name.startswith(f'{path}/' if path else '')]
    if not request.flag('recursive'):
        depth = path.count('/') + 1 if path else 0
        inside = [name for name in inside if name.count('/') == depth]
    return page(hub, request, [_tree_item(commit, name, request.flag('expand')) for name in sorted(inside)])


@route('POST', rf'/api/models/{REPO}/paths-info/(?P<revision>[^/]+)')
def _paths_info(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = readable(hub, match, user)
    commit = find_commit(repo, match['revision'])
    form = parse_qs(request.body.decode())
    known = {*commit.files, *_folders(commit.files)}
    items = [_tree_item(commit, path, flag(form, 'expand')) for path in form.get('paths', []) if path in known]
    return Response(json=items)


def _folders(files: Iterable[str]) -> list[str]:
    return sorted({path[:at] for path in files for at in range(len(path)) if path[at] == '/'})


def _tree_item(commit: Commit, path: str, expand: bool) -> dict:
    blob = commit.files.get(path)
    if blob is None:
        oid = hashlib.sha1(json.dumps(below(commit.files, path)).encode()).hexdigest()
        item: dict = {'type': 'directory', 'path': path, 'oid': oid, 'size': 0}
    else:
        item = {'type': 'file', 'path': path, 'oid': blob.oid, 'size': blob.size}
        if blob.pointer_size is not None:
            item['lfs'] = {'oid': blob.sha256, 'size': blob.size, 'pointerSize': blob.pointer_size}
    if expand:
        last = commit.last_change(path)
        item['lastCommit'] = {'id': last.oid, 'title': last.title, 'date': last.date}
    return item


@route('GET', rf'/api/models/{REPO}/refs')
def _refs(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    repo = readable(hub, match, user)

    def listed(refs: Mapping[str, Commit], prefix: str) -> list[dict]:
        return [{'name': name, 'ref': prefix + name, 'targetCommit': commit.oid} for name, commit in refs.items()]

    answer = {
        'branches': listed(repo.branches, 'refs/heads/'),
        'tags': listed(repo.tags, 'refs/tags/'),
        'converts': [],
    }
    if request.flag('include_prs'):
        answer['pullRequests'] = listed(repo.pulls, '')
    return Response(json=answer)


@route('GET', rf'/api/models/{REPO}/commits/(?P<revision>[^/]+)')
def _commits(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    commit = find_commit(readable(hub, match, user), match['revision'])
    items = [
        {
            'id': item.oid,
            'title': item.title,
            'message': item.message,
            'authors': [{'user': item.author}],
            'date': item.date,
        }
        for item in commit.history()
    ]
    return page(hub, request, items)


@route('GET', rf'/api/models/{REPO}/auth-check(?P<write>/write)?')
def _auth_check(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Response:
    writable(hub, request, user, match) if match['write'] else readable(hub, match, user, content=True)
    return Response(json={})
