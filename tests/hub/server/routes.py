"""What every address of the loopback Hub is made of: requests, answers, and who may ask.

A route is a function that turns a `Request` into a `Response`. They are in reading.py and
writing.py.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlencode

from .store import Blob, Commit, Repo

if TYPE_CHECKING:
    from .server import HubServer


@dataclass(frozen=True)
class Request:
    """One HTTP request. `path` is as it came, still quoted: a revision may hold a quoted slash."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]  # names in lower case
    body: bytes = b''

    @property
    def token(self) -> str | None:
        """The access token, which no log keeps."""
        authorization = self.headers.get('authorization')
        return authorization and authorization.removeprefix('Bearer ').strip()

    def data(self) -> dict:
        """The body, as the JSON that it is."""
        try:
            data = json.loads(self.body or b'{}')
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise Refusal(400, '', 'The body is not a JSON object')
        return data

    def flag(self, name: str) -> bool:
        """A switch of the query."""
        return flag(self.query, name)


def flag(form: Mapping[str, list[str]], name: str) -> bool:
    return form.get(name, ['0'])[0].lower() in ('1', 'true')  # however the client spells it


@dataclass(frozen=True)
class Response:
    """One answer: JSON, or a part of a blob.

    Args:
        status: The HTTP status.
        headers: Its headers.
        json: What the body says in JSON, or:
        blob: The file that it is a part of.
        part: Of the blob, from and to.
        keep: The bytes of the body that are really sent, of all that the headers promise; None for all.
        altered: The body has one wrong byte.
        dropped: None of it is sent; the connection closes.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    json: object = None
    blob: Blob | None = None
    part: tuple[int, int] = (0, 0)
    keep: int | None = None
    altered: bool = False
    dropped: bool = False

    def body(self) -> tuple[int, Iterable[bytes]]:
        """The length that it says and its chunks."""
        if self.blob is not None:
            length, chunks = self.part[1] - self.part[0], self.blob.read(*self.part)
        else:
            data = json.dumps(self.json).encode()
            length, chunks = len(data), iter((data,))
        if self.altered:
            chunks = iter((alter(b''.join(chunks)),))
        if self.keep is not None:
            chunks = iter((b''.join(chunks)[: self.keep],))
        return length, chunks


def alter(data: bytes) -> bytes:
    """The same number of bytes, the middle one of them wrong: in weights, a weight."""
    middle = len(data) // 2
    return data[:middle] + bytes(255 - byte for byte in data[middle : middle + 1]) + data[middle + 1 :]


class Refusal(Exception):
    """Raised by a route for an answer with an error code that the client knows.

    Args:
        status: The HTTP status.
        code: For the header X-Error-Code, by which the client chooses its exception; empty for none.
        message: For the user.
        headers: Further headers.
        json: What the body says besides the message.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        headers: Mapping[str, str] | None = None,
        json: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        # A header is one line of plain text.
        line = ' '.join(message.split()).encode('ascii', 'replace').decode()
        headers = {**(headers or {}), 'X-Error-Message': line, **({'X-Error-Code': code} if code else {})}
        self.response = Response(status, headers, {'error': message, **(json or {})})


Route = Callable[['HubServer', Request, str | None, re.Match], Response]
ROUTES: list[tuple[str, re.Pattern, Route, bool]] = []
REPO = r'(?P<id>[^/]+/[^/]+)'


def route(method: str, pattern: str, *, locked: bool = True) -> Callable[[Route], Route]:
    """Registers a function for the paths that the pattern matches in full. HEAD goes where GET goes.

    It runs while no other does; with locked=False it takes the Hub's lock itself, where it needs to.
    """

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(pattern), function, locked))
        return function

    return register


def readable(hub: 'HubServer', match: re.Match, user: str | None, *, content: bool = False) -> Repo:
    """The repository a path names, if the user may see it (with content: get its files)."""
    repo = hub.repos.get(unquote(match['id']))
    if repo is None or (repo.private and not hub.may_read(repo, user)):
        # Without a token: there may be something behind a login. With one: there is nothing for you.
        raise Refusal(401 if user is None else 404, 'RepoNotFound', 'Repository not found')
    if repo.disabled:
        raise Refusal(403, '', 'Access to this resource is disabled.')
    if content and repo.gated and not hub.may_read(repo, user):
        remedy = 'Please log in.' if user is None else 'Ask its owner for access.'
        message = f'Access to model {repo.id} is restricted. {remedy}'
        raise Refusal(401 if user is None else 403, 'GatedRepo', message)
    return repo


def require_writer(hub: 'HubServer', request: Request, user: str | None) -> str:
    """The user, whose token may change something somewhere."""
    if user is None:
        raise Refusal(401, '', 'Invalid username or password.')
    if request.token in hub.read_only:
        raise Refusal(403, '', 'This token may only read: you must use a write token')
    return user


def writable(hub: 'HubServer', request: Request, user: str | None, match: re.Match) -> Repo:
    """The repository a path names, if the user may change it."""
    repo = readable(hub, match, user)
    if not hub.may_write(repo, require_writer(hub, request, user)):
        raise Refusal(403, '', "You don't have the required permissions to perform this action")
    return repo


def find_commit(repo: Repo, quoted_revision: str | None) -> Commit:
    revision = unquote(quoted_revision or 'main')
    commit = repo.find(revision)
    if commit is None:
        raise Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
    return commit


def page(hub: 'HubServer', request: Request, items: list) -> Response:
    """One page of a list, with a link to the next."""
    start = int(request.query.get('cursor', ['0'])[0])
    stop = start + min(hub.page_size, int(request.query.get('limit', [hub.page_size])[0]))
    headers = {}
    if stop < len(items):
        query = urlencode({**request.query, 'cursor': [stop]}, doseq=True)
        headers['Link'] = f'<{hub.endpoint}{request.path}?{query}>; rel="next"'
    return Response(200, headers, items[start:stop])
