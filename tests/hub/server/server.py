"""The loopback Hub behind a port: what a request passes through, and the settings of the client."""

import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlencode

from . import reading  # noqa: F401
from .faults import Fault, Faults
from .routes import ROUTES, Refusal, Request, Response, alter
from .store import Blob, Hub
from .writing import weights_of


@dataclass(frozen=True)
class Logged:
    """A line of the log. Of the token only its user is kept.

    Args:
        method: The HTTP method.
        path: The path as it came, quoted.
        query: What stood behind the question mark.
        status: The HTTP status of the answer; 0 where the connection was closed instead.
        user: Who asked, if the token is known.
        range: The Range header.
        user_agent: The User-Agent header.
        received: Length of the body that came.
        fault: The kind of the fault that struck it.
    """

    method: str
    path: str
    query: str
    status: int
    user: str | None
    range: str | None
    user_agent: str | None
    received: int = 0
    fault: str | None = None


class HubServer(Hub):
    """The Hub behind a port of 127.0.0.1, from entering the context (or `start`) to leaving it (or `stop`).

    Args:
        port: The port to listen on; 0 takes a free one.
        storage: A folder for the large files that are uploaded; without one they stay in memory.
        **users: tokens, orgs and read_only of `Hub`.

    Attributes:
        log: Every request, in the order of the answers.
        faults: What is to go wrong; see faults.py.
        commit_counts: How many commits have come over HTTP, by repository.
        weight_bytes: How many bytes of large files have come, by repository, refused ones too.
    """

    page_size = 1000  # items in one answer of tree and commits; the next page is linked

    def __init__(
        self, port: int = 0, tokens: Mapping[str, str] | None = None, storage: Path | None = None, **users
    ) -> None:
        super().__init__(tokens, **users)
        self.log: list[Logged] = []
        self.faults = Faults()
        self.commit_counts: Counter[str] = Counter()
        self.weight_bytes: Counter[str] = Counter()
        self._storage = storage
        self._stopped = threading.Event()
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
        self._stopped.set()
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
            self._thread = None
        self._http.server_close()

    def __enter__(self) -> 'HubServer':
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def clear(self) -> None:
        """Empties the log, the counters and the faults; the repositories stay."""
        with self.lock:
            self.log.clear()
            self.commit_counts.clear()
            self.weight_bytes.clear()
            self.faults.clear()

    def paths(self, method: str) -> list[str]:
        """The paths asked for with a method, in order, as logged."""
        return [entry.path for entry in list(self.log) if entry.method == method]

    def keep(self, blob: Blob) -> Blob:
        """The blob as it is to be kept: on disk, if there is a folder for it."""
        if self._storage is None:
            return blob
        path = self._storage / blob.sha256
        part = path.with_name(f'{blob.sha256}.{threading.get_ident()}')
        part.write_bytes(b''.join(blob.read()))
        part.replace(path)
        return replace(blob, source=path)

    def answer(self, request: Request) -> Response:
        """The answer to a request, which is logged with it."""
        user = self.tokens.get(request.token or '')
        if repo_id := weights_of(request):
            with self.lock:
                self.weight_bytes[repo_id] += len(request.body)
        if fault := self.faults.take(request.method, request.path, user):
            response = self._strike(fault, request)
        else:
            response = self._answer(request)
        header, status = request.headers.get, 0 if response.dropped else response.status
        query = urlencode(request.query, doseq=True)
        entry = Logged(
            request.method,
            request.path,
            query,
            status,
            user,
            header('range'),
            header('user-agent'),
            len(request.body),
            fault and fault.kind,
        )
        with self.lock:
            self.log.append(entry)
        return response

    def _answer(self, request: Request) -> Response:
        """The answer as it should be."""
        try:
            return self._dispatch(request, self._user(request))
        except Refusal as refusal:
            return refusal.response
        except Exception as error:  # a mistake of the server's own: seen on both sides
            traceback.print_exc()
            return Refusal(500, '', f'The loopback Hub failed: {error!r}').response

    def _strike(self, fault: Fault, request: Request) -> Response:
        """What a fault makes of a request."""
        if fault.status is not None:
            if fault.landed:
                self._answer(request)
            headers = dict(fault.headers)
            if fault.retry_after is not None:
                headers['Retry-After'] = f'{fault.retry_after:g}'
            return Refusal(fault.status, fault.code, fault.reason, headers).response
        if fault.kind == 'drop_before':
            return Response(dropped=True)
        if fault.kind == 'call' and not fault.landed:
            fault.action(request)
        elif fault.kind == 'slow' and not fault.landed:
            self._stopped.wait(fault.seconds)
        elif fault.kind == 'wrong_hash' and request.method == 'PUT':
            request = replace(request, body=alter(request.body))
        response = self._answer(request)
        if fault.kind == 'call' and fault.landed:
            fault.action(request)
        elif fault.kind == 'slow' and fault.landed:
            self._stopped.wait(fault.seconds)
        elif fault.kind == 'drop_after':
            return replace(response, dropped=True)
        elif fault.kind == 'truncate':
            return replace(response, keep=response.body()[0] // 2 if fault.keep is None else fault.keep)
        elif fault.kind == 'wrong_hash' and request.method != 'PUT':
            return replace(response, altered=True)
        return response

    def _user(self, request: Request) -> str | None:
        if request.token is None:
            return None
        user = self.tokens.get(request.token)
        if user is None:
            raise Refusal(401, '', 'Invalid credentials in Authorization header')
        return user

    def _dispatch(self, request: Request, user: str | None) -> Response:
        method = 'GET' if request.method == 'HEAD' else request.method
        for route_method, pattern, function, locked in ROUTES:
            if route_method == method and (match := pattern.fullmatch(request.path)):
                with self.lock if locked else nullcontext():
                    return function(self, request, user, match)
        raise Refusal(404, '', f'No such address: {request.method} {request.path}')


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that keeps its connection open does not keep the process alive
    request_queue_size = 128  # with the usual 5, the sixth client to call at once is kept waiting for a second
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of clients that were killed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'  # keeps connections open, as the Hub does
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer waits for an ACK
    server_version = 'loopback-hub'

    def _serve(self) -> None:
        path, _, query = self.path.partition('?')
        headers = {name.lower(): value for name, value in self.headers.items()}
        body = self._body()
        if body is None:  # the client went away while it was sending
            self.close_connection = True
            return
        response = self.server.hub.answer(
            Request(self.command, path, parse_qs(query, keep_blank_values=True), headers, body)
        )
        if response.dropped:
            self.close_connection = True
            return
        length, chunks = response.body()
        try:
            self.send_response(response.status)
            for name, value in {'Content-Type': 'application/json', **response.headers}.items():
                self.send_header(name, value)
            self.send_header('Content-Length', str(length))
            self.end_headers()
            if self.command != 'HEAD':
                for chunk in chunks:
                    self.wfile.write(chunk)
        except (BrokenPipeError, ConnectionResetError):  # the client went away: its right
            self.close_connection = True
        if response.keep is not None:
            self.close_connection = True

    def _body(self) -> bytes | None:
        """The body, if all of it has come; also where it comes in chunks without saying how many."""
        if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
            length = int(self.headers.get('Content-Length') or 0)
            body = self.rfile.read(length)
            return body if len(body) == length else None
        chunks = []
        while line := self.rfile.readline():
            size = int(line.split(b';')[0], 16)
            chunk = self.rfile.read(size + 2)  # and the end of the line
            if len(chunk) < size + 2:
                break
            if not size:
                return b''.join(chunks)
            chunks.append(chunk[:size])
        return None

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

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
