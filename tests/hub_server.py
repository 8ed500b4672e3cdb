"""A small Hugging Face Hub on 127.0.0.1, so that the real client can be tested over real HTTP.

It speaks the reading half of the Hub's protocol for model repositories: `resolve` (HEAD and GET, with ranges), model
info, tree, paths-info, refs and commits, with the error codes by which the client tells a missing repository from a
missing revision, a missing file or a gate. In a test:

    with HubServer() as hub:
        hub.commit('someone/model', {'config.json': '{}', 'model.safetensors': Path('weights.safetensors')})
        HfApi(endpoint=hub.endpoint).model_info('someone/model')
        assert hub.paths('HEAD') == []

and from a shell, where every FOLDER/namespace/name is one repository:

    python tests/hub_server.py --port 8000 FOLDER

Only the standard library is used, and nothing here imports huggingface_hub, which reads its settings when it is
imported: `client_environment` gives those settings, to be set before that.

A request passes through four parts: `_Handler` (HTTP to `Request`), `HubServer.answer` (the user, errors, the log), a
route (a function that turns a `Request` into a `Response`), and `Hub`, the repositories, which know nothing of HTTP.
"""

import argparse
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlencode

# What a file can be made of: its bytes, its text, or a file on disk that is read when it is served.
Source = bytes | str | Path

_LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.tar', '.npz', '.onnx')
_LFS_SIZE = 10 * 2**20  # the Hub keeps larger files in LFS whatever they are called
_CHUNK = 2**20


# The repositories ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    """The content of one file and the two names that the Hub knows it by."""

    source: bytes | Path
    size: int
    sha256: str
    oid: str  # git's name: of the content itself, or of the pointer that stands for it in git when it lies in LFS
    pointer_size: int | None  # None for a file that lies in git itself

    @classmethod
    def of(cls, path: str, source: Source) -> 'Blob':
        """The blob of a content; the file's path decides, with its size, whether it lies in LFS."""
        if isinstance(source, str):
            source = source.encode()
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % size)
        for chunk in _read(source, 0, size):
            sha256.update(chunk)
            sha1.update(chunk)
        if size < _LFS_SIZE and not path.endswith(_LFS_SUFFIXES):
            return cls(source, size, sha256.hexdigest(), sha1.hexdigest(), None)
        pointer = f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256.hexdigest()}\nsize {size}\n'.encode()
        oid = hashlib.sha1(b'blob %d\0' % len(pointer) + pointer).hexdigest()
        return cls(source, size, sha256.hexdigest(), oid, len(pointer))

    @property
    def etag(self) -> str:
        return self.oid if self.pointer_size is None else self.sha256

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes from start to stop, in chunks."""
        return _read(self.source, start, self.size if stop is None else stop)


def _read(source: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        for begin in range(start, stop, _CHUNK):
            yield source[begin : min(begin + _CHUNK, stop)]
        return
    with source.open('rb') as file:
        file.seek(start)
        while start < stop and (chunk := file.read(min(_CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    oid: str
    parent: 'Commit | None'
    files: Mapping[str, Blob]
    title: str
    message: str
    author: str
    date: str

    def history(self) -> Iterator['Commit']:
        """This commit and those before it, the newest first."""
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change(self, path: str) -> 'Commit':
        """The commit that gave the file (or the folder's content) the state it has here."""
        last = self
        for commit in self.history():
            if _below(commit.files, path) != _below(self.files, path):
                break
            last = commit
        return last


def _below(files: Mapping[str, Blob], path: str) -> dict[str, str]:
    return {name: blob.oid for name, blob in files.items() if name == path or name.startswith(f'{path}/')}


@dataclass
class Repo:
    """A model repository: its commits, the names that point at them, and who may read it.

    Args:
        id: `namespace/name`.
        private: Unknown to everybody but its readers.
        gated: Everybody sees what it holds, only its readers get the files.
        disabled: Nobody gets anything.
        readers: The users (of `Hub.tokens`) who may read a private or gated repository.
    """

    id: str
    private: bool = False
    gated: bool = False
    disabled: bool = False
    readers: frozenset[str] = frozenset()
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        for prefix, refs in (('refs/heads/', self.branches), ('refs/tags/', self.tags)):
            if revision.startswith(prefix):
                return refs.get(revision.removeprefix(prefix))
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)

    def commit(
        self,
        changes: Mapping[str, Source | None],
        *,
        branch: str = 'main',
        title: str = 'Upload files',
        message: str = '',
        author: str = 'someone',
    ) -> Commit:
        """Adds one commit on top of a branch; a file given as None is taken away."""
        parent = self.branches.get(branch)
        files = dict(parent.files) if parent else {}
        for path, source in changes.items():
            if source is None:
                files.pop(path, None)
            else:
                files[path] = Blob.of(path, source)
        files = dict(sorted(files.items()))
        # One second a commit from a fixed day on: ids and dates are the same in every run.
        date = datetime(2024, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=len(self.commits))
        content = [self.id, parent and parent.oid, {path: blob.oid for path, blob in files.items()}, title, str(date)]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        commit = Commit(oid, parent, files, title, message, author, f'{date:%Y-%m-%dT%H:%M:%S}.000Z')
        self.commits[oid] = commit
        self.branches[branch] = commit
        return commit


class Hub:
    """The repositories and the users, apart from any HTTP.

    Args:
        tokens: Access token → user name.
    """

    def __init__(self, tokens: Mapping[str, str] | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = dict(tokens or {})
        self.lock = threading.RLock()  # held for every change and every answer, not while a body is being sent

    def create_repo(self, repo_id: str, **options) -> Repo:
        """Makes a repository with one empty first commit, as the Hub does; options are those of `Repo`."""
        with self.lock:
            if repo_id in self.repos:
                raise ValueError(f'{repo_id} is already there')
            repo = self.repos[repo_id] = Repo(repo_id, **options)
            repo.commit({}, title='initial commit', author='system')
            return repo

    def commit(self, repo_id: str, changes: Mapping[str, Source | None], **options) -> str:
        """Commits to a repository, made if it is not there, and gives the commit's id; options as in `Repo.commit`."""
        with self.lock:
            repo = self.repos.get(repo_id) or self.create_repo(repo_id)
            return repo.commit(changes, **options).oid

    def commit_folder(self, repo_id: str, folder: Path | str, **options) -> str:
        """Commits every file of a folder, which is read when it is served and so must stay as it is."""
        folder = Path(folder)
        paths = sorted(path for path in folder.rglob('*') if path.is_file())
        return self.commit(repo_id, {path.relative_to(folder).as_posix(): path for path in paths}, **options)

    def add_zoo(self, root: Path | str) -> list[str]:
        """Commits every `root/namespace/name` as one repository and gives their ids."""
        root = Path(root)
        ids = [path.relative_to(root).as_posix() for path in sorted(root.glob('*/*')) if path.is_dir()]
        for repo_id in ids:
            self.commit_folder(repo_id, root / repo_id)
        return ids


# Requests and answers -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One HTTP request. `path` is as it came, still quoted: a revision may hold a quoted slash."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b''

    def flag(self, name: str) -> bool:
        """A switch of the query."""
        return _flag(self.query, name)


def _flag(form: Mapping[str, list[str]], name: str) -> bool:
    return form.get(name, ['0'])[0].lower() in ('1', 'true')  # however the client spells it


@dataclass(frozen=True)
class Response:
    """One answer: JSON, or a part of a blob."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    json: object = None
    blob: Blob | None = None
    part: tuple[int, int] = (0, 0)  # of the blob, from and to

    def body(self) -> tuple[int, Iterable[bytes]]:
        """Its length and its chunks."""
        if self.blob is not None:
            return self.part[1] - self.part[0], self.blob.read(*self.part)
        data = json.dumps(self.json).encode()
        return len(data), (data,)


class Refusal(Exception):
    """Raised by a route for an answer with an error code that the client knows.

    Args:
        status: The HTTP status.
        code: For the header X-Error-Code, by which the client chooses its exception; empty for none.
        message: For the user.
        headers: Further headers.
    """

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        headers = {**(headers or {}), 'X-Error-Message': message, **({'X-Error-Code': code} if code else {})}
        self.response = Response(status, headers, {'error': message})


@dataclass(frozen=True)
class Logged:
    """A line of the log. Of the token only its user is kept."""

    method: str
    path: str
    query: str
    status: int
    user: str | None
    range: str | None
    user_agent: str | None


Route = Callable[['HubServer', Request, str | None, re.Match], Response]
_ROUTES: list[tuple[str, re.Pattern, Route]] = []
_REPO = r'(?P<id>[^/]+/[^/]+)'


def _route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Registers a function for the paths that the pattern matches in full. HEAD goes where GET goes."""

    def register(function: Route) -> Route:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer(Hub):
    """The Hub behind a port of 127.0.0.1, from entering the context (or `start`) to leaving it (or `stop`).

    Args:
        port: The port to listen on; 0 takes a free one.
        tokens: Access token → user name.
    """

    page_size = 1000  # items in one answer of tree and commits; the next page is linked

    def __init__(self, port: int = 0, tokens: Mapping[str, str] | None = None) -> None:
        super().__init__(tokens)
        self.log: list[Logged] = []
        self._http = _Server(('127.0.0.1', port), _Handler, bind_and_activate=False)
        self._http.hub = self
        self._thread: threading.Thread | None = None

    @property
    def endpoint(self) -> str:
        return f'http://127.0.0.1:{self._http.server_address[1]}'

    def start(self) -> 'HubServer':
        self._http.server_bind()
        self._http.server_activate()
        # The poll interval is how long `stop` may take.
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), name='hub', daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
        self._http.server_close()

    def __enter__(self) -> 'HubServer':
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def paths(self, method: str) -> list[str]:
        """The paths asked for with a method, in order, as logged."""
        return [entry.path for entry in list(self.log) if entry.method == method]

    def answer(self, request: Request) -> Response:
        """The answer to a request, which is logged with it."""
        with self.lock:
            user = None
            try:
                user = self._user(request)
                response = self._dispatch(request, user)
            except Refusal as refusal:
                response = refusal.response
            query, header = urlencode(request.query, doseq=True), request.headers.get
            entry = (request.method, request.path, query, response.status, user, header('range'), header('user-agent'))
            self.log.append(Logged(*entry))
            return response

    def _user(self, request: Request) -> str | None:
        authorization = request.headers.get('authorization')
        if authorization is None:
            return None
        user = self.tokens.get(authorization.removeprefix('Bearer ').strip())
        if user is None:
            raise Refusal(401, '', 'Invalid credentials in Authorization header')
        return user

    def _dispatch(self, request: Request, user: str | None) -> Response:
        method = 'GET' if request.method == 'HEAD' else request.method
        for route_method, pattern, function in _ROUTES:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                return function(self, request, user, match)
        raise Refusal(404, '', f'No such address: {request.method} {request.path}')

    def readable(self, match: re.Match, user: str | None, *, content: bool = False) -> Repo:
        """The repository a path names, if the user may see it (with content: get its files)."""
        repo = self.repos.get(unquote(match['id']))
        if repo is None or (repo.private and user not in repo.readers):
            # Without a token: there may be something behind a login. With one: there is nothing for you.
            raise Refusal(401 if user is None else 404, 'RepoNotFound', 'Repository not found')
        if repo.disabled:
            raise Refusal(403, '', 'Access to this resource is disabled.')
        if content and repo.gated and user not in repo.readers:
            remedy = 'Please log in.' if user is None else 'Ask its owner for access.'
            message = f'Access to model {repo.id} is restricted. {remedy}'
            raise Refusal(401 if user is None else 403, 'GatedRepo', message)
        return repo

    def page(self, request: Request, items: list) -> Response:
        """One page of a list, with a link to the next."""
        start = int(request.query.get('cursor', ['0'])[0])
        stop = start + min(self.page_size, int(request.query.get('limit', [self.page_size])[0]))
        headers = {}
        if stop < len(items):
            query = urlencode({**request.query, 'cursor': [stop]}, doseq=True)
            headers['Link'] = f'<{self.endpoint}{request.path}?{query}>; rel="next"'
        return Response(200, headers, items[start:stop])


def _commit(repo: Repo, quoted_revision: str | None) -> Commit:
    revision = unquote(quoted_revision or 'main')
    commit = repo.find(revision)
    if commit is None:
        raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
    return commit


# The routes -----------------------------------------------------------------------------------------------------------


@_route('GET', rf'/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)')
def _resolve(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    """A file, or the part of it that the Range header names; LFS files too, which the real Hub sends from elsewhere."""
    repo = hub.readable(match, user, content=True)
    commit = _commit(repo, match['revision'])
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


@_route('GET', rf'/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?')
def _model_info(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    repo = hub.readable(match, user)
    commit = _commit(repo, match['revision'])
    card = _card_data(commit)
    siblings = []
    for path, blob in commit.files.items():
        sibling: dict = {'rfilename': path}
        if request.flag('blobs'):
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
        'gated': 'auto' if repo.gated else False,
        'disabled': repo.disabled,
        'tags': list(card.get('tags') or []),
        'siblings': siblings,
        'cardData': card,
    }
    info |= {key: card[key] for key in ('library_name', 'pipeline_tag') if key in card}
    return Response(json=info)


def _card_data(commit: Commit) -> dict:
    """The front matter of the repository's README.md."""
    if 'README.md' not in commit.files:
        return {}
    text = b''.join(commit.files['README.md'].read()).decode()
    match = re.match(r'---\r?\n(.*?)^---\s*$', text, re.DOTALL | re.MULTILINE)
    if not match:
        return {}
    import yaml  # comes with huggingface_hub; only a repository that has a card needs it

    return yaml.safe_load(match[1]) or {}


@_route('GET', rf'/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?')
def _tree(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    repo = hub.readable(match, user)
    commit = _commit(repo, match['revision'])
    path = unquote(match['path'] or '').strip('/')
    if path and path not in _folders(commit.files):
        raise Refusal(404, 'EntryNotFound', f'{path} does not exist on "{match["revision"]}"')
    inside = [name for name in (*_folders(commit.files), *commit.files) if name.startswith(f'{path}/' if path else '')]
    if not request.flag('recursive'):
        depth = path.count('/') + 1 if path else 0
        inside = [name for name in inside if name.count('/') == depth]
    return hub.page(request, [_tree_item(commit, name, request.flag('expand')) for name in sorted(inside)])


@_route('POST', rf'/api/models/{_REPO}/paths-info/(?P<revision>[^/]+)')
def _paths_info(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    repo = hub.readable(match, user)
    commit = _commit(repo, match['revision'])
    form = parse_qs(request.body.decode())
    known = {*commit.files, *_folders(commit.files)}
    items = [_tree_item(commit, path, _flag(form, 'expand')) for path in form.get('paths', []) if path in known]
    return Response(json=items)


def _folders(files: Iterable[str]) -> list[str]:
    return sorted({path[:at] for path in files for at in range(len(path)) if path[at] == '/'})


def _tree_item(commit: Commit, path: str, expand: bool) -> dict:
    blob = commit.files.get(path)
    if blob is None:
        oid = hashlib.sha1(json.dumps(_below(commit.files, path)).encode()).hexdigest()
        item: dict = {'type': 'directory', 'path': path, 'oid': oid, 'size': 0}
    else:
        item = {'type': 'file', 'path': path, 'oid': blob.oid, 'size': blob.size}
        if blob.pointer_size is not None:
            item['lfs'] = {'oid': blob.sha256, 'size': blob.size, 'pointerSize': blob.pointer_size}
    if expand:
        last = commit.last_change(path)
        item['lastCommit'] = {'id': last.oid, 'title': last.title, 'date': last.date}
    return item


@_route('GET', rf'/api/models/{_REPO}/refs')
def _refs(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    repo = hub.readable(match, user)

    def listed(refs: Mapping[str, Commit], prefix: str) -> list[dict]:
        return [{'name': name, 'ref': prefix + name, 'targetCommit': commit.oid} for name, commit in refs.items()]

    answer = {
        'branches': listed(repo.branches, 'refs/heads/'),
        'tags': listed(repo.tags, 'refs/tags/'),
        'converts': [],
    }
    if request.flag('include_prs'):
        answer['pullRequests'] = []
    return Response(json=answer)


@_route('GET', rf'/api/models/{_REPO}/commits/(?P<revision>[^/]+)')
def _commits(hub: HubServer, request: Request, user: str | None, match: re.Match) -> Response:
    commit = _commit(hub.readable(match, user), match['revision'])
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
    return hub.page(request, items)


# HTTP -----------------------------------------------------------------------------------------------------------------


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that keeps its connection open does not keep the process alive
    request_queue_size = 128  # with the usual 5, the sixth client to call at once is kept waiting for a second
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # keeps connections open, as the Hub does
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits for an ACK
    server_version = 'loopback-hub'

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
        path, _, query = self.path.partition('?')
        headers = {name.lower(): value for name, value in self.headers.items()}
        response = self.server.hub.answer(Request(self.command, path, parse_qs(query), headers, body))
        length, chunks = response.body()
        self.send_response(response.status)
        for name, value in {'Content-Type': 'application/json', **response.headers, 'Content-Length': length}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != 'HEAD':
            try:
                for chunk in chunks:
                    self.wfile.write(chunk)
            except (BrokenPipeError, ConnectionResetError):  # the client went away: its right
                self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def log_message(self, *args: object) -> None:
        """Says nothing: what was asked is in `HubServer.log`."""


def client_environment(endpoint: str, home: Path | str, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment in which huggingface_hub, imported after it is set, knows no Hub but this one.

    Args:
        endpoint: The address of the server.
        home: An empty folder for the client's cache and settings.
        inherited: The environment to start from, without its settings of the client (a token, a cache, offline mode).
    """
    client = ('HF_', 'HUGGINGFACE_', 'HUGGING_FACE_', 'TRANSFORMERS_OFFLINE')
    environment = {name: value for name, value in inherited.items() if not name.startswith(client)}
    for name in ('NO_PROXY', 'no_proxy'):
        hosts = [host for host in environment.get(name, '').split(',') if host]
        environment[name] = ','.join(dict.fromkeys([*hosts, '127.0.0.1', 'localhost']))
    return environment | {
        'HF_ENDPOINT': endpoint,
        'HF_HOME': str(home),
        'HF_HUB_DISABLE_XET': '1',  # Xet is another protocol, with no way back to this one
        'HF_HUB_DISABLE_TELEMETRY': '1',
        'HF_HUB_DISABLE_PROGRESS_BARS': '1',
        'HF_HUB_DISABLE_UPDATE_CHECK': '1',
    }


def main() -> None:
    parser = argparse.ArgumentParser(description='Serves folders as repositories of a Hugging Face Hub on 127.0.0.1.')
    parser.add_argument('folder', type=Path, help='every FOLDER/namespace/name is one repository')
    parser.add_argument('--port', type=int, default=0, help='port to listen on (default: a free one)')
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f'{args.folder} is not a folder')
    with HubServer(args.port) as hub:
        repos = hub.add_zoo(args.folder)
        print(f'HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1', flush=True)
        print('\n'.join(repos), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == '__main__':
    main()
