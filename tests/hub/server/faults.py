"""Faults on demand: what the loopback Hub does to chosen requests instead of answering them as it should.

    hub.faults.add('429', method='POST', path='/preupload/', retry_after=1)  # the next preupload is refused
    hub.faults.add('drop_after', path='/api/models/ns/name/commit/')  # it lands, and the client is not told
    hub.faults.add('503', path='/commit/', landed=True, times=2)  # it lands, and the client is told otherwise
    hub.faults.add('slow', path='/resolve/', seconds=0.5, times=None)  # every download
    with hub.faults.add('call', path='/commit/', action=lambda request: ...):  # somebody else commits just before
        ...

Where several match a request, the one added first is taken. A request of which only a part comes, because its client
was killed, has no effect; that takes no fault.
"""

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KINDS = ('drop_before', 'drop_after', 'truncate', 'wrong_hash', 'slow', 'call')
_ASIDE = '/api/agent-harnesses'  # what newer clients ask once a process, before all else and of their own accord
_MESSAGES = {
    401: 'Invalid credentials in Authorization header',
    403: 'Forbidden',
    404: 'Not found',
    412: 'A commit has happened since. Please refresh and try again.',
    429: 'Too many requests',
    500: 'Internal Server Error',
    503: 'Service Unavailable',
}


@dataclass(eq=False)
class Fault:
    """One fault, which also is a context that takes it back when it is left.

    Args:
        kind: An HTTP status ('429', '500', '412' …), or
            'drop_before': the connection closes before the request has any effect;
            'drop_after': it closes after the change has landed and before the answer;
            'truncate': the answer says its true length and breaks off half-way;
            'wrong_hash': the bytes of a file are altered, its headers are not; of an uploaded file (PUT), the bytes
            that arrive;
            'slow': nothing happens for some seconds;
            'call': action is called first, and the request goes on as it should.
        method: The method it strikes; None for all (for 'truncate' and 'wrong_hash', all that have a body).
        path: Regular expression, searched in the path as it came (a quoted slash is %2F).
        user: The user it strikes; None for all.
        times: How many requests it strikes; None for all from then on.
        skip: How many requests that match go untouched before.
        landed: For a status, 'slow' and 'call': the request takes effect first.
        code: For a status: the X-Error-Code (RepoNotFound, RevisionNotFound, EntryNotFound, GatedRepo).
        message: For a status: the X-Error-Message; None for that of the real Hub.
        retry_after: For a status: seconds, as the header Retry-After.
        headers: For a status: further headers.
        seconds: How long 'slow' takes.
        keep: How many bytes of the body 'truncate' lets through; None for the half of them.
        action: What 'call' calls, with the request, while other requests are served.
    """

    kind: str
    method: str | None = None
    path: str = ''
    user: str | None = None
    times: int | None = 1
    skip: int = 0
    landed: bool = False
    code: str = ''
    message: str | None = None
    retry_after: float | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.5
    keep: int | None = None
    action: Callable[[object], object] | None = None
    hits: int = 0  # how many requests it has struck
    _faults: 'Faults | None' = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS and not re.fullmatch('[45][0-9][0-9]', self.kind):
            raise ValueError(f'no such fault: {self.kind}; there are HTTP statuses from 400 on and {", ".join(KINDS)}')
        if (self.kind == 'call') != (self.action is not None):
            raise ValueError("an action goes with kind 'call'")

    @property
    def status(self) -> int | None:
        """The HTTP status that it answers, if it is one."""
        return int(self.kind) if self.kind.isdigit() else None

    @property
    def reason(self) -> str:
        """The X-Error-Message of a status."""
        return self.message if self.message is not None else _MESSAGES.get(self.status or 0, f'Error {self.kind}')

    def strikes(self, method: str, path: str, user: str | None) -> bool:
        """Whether it is for such a request, apart from how often it has struck."""
        if method == 'HEAD' and self.method != 'HEAD' and self.kind in ('truncate', 'wrong_hash'):
            return False
        if path == _ASIDE and not self.path:
            return False
        wanted = self.method in (None, method) and self.user in (None, user)
        return wanted and re.search(self.path, path) is not None

    def __enter__(self) -> 'Fault':
        return self

    def __exit__(self, *exception: object) -> None:
        if self._faults is not None:
            self._faults.remove(self)


class Faults:
    """The faults that wait for their requests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[Fault] = []

    def add(self, kind: str, **options) -> Fault:
        """Adds a fault; options are those of `Fault`."""
        fault = Fault(kind, **options)
        fault._faults = self
        with self._lock:
            self._waiting.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        with self._lock:
            if fault in self._waiting:
                self._waiting.remove(fault)

    def clear(self) -> None:
        with self._lock:
            self._waiting.clear()

    def take(self, method: str, path: str, user: str | None) -> Fault | None:
        """The fault for a request, if there is one; it counts as struck."""
        with self._lock:
            for fault in self._waiting:
                if not fault.strikes(method, path, user):
                    continue
                if fault.skip > 0:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                if fault.times is not None and fault.hits >= fault.times:
                    self._waiting.remove(fault)
                return fault
        return None
