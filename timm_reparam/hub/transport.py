"""The way to the Hub: requests that end in time, are repeated where that is safe, and fail in one clear line.

Only huggingface_hub's own functions and error classes are used, from 0.30 on. What a version lacks is looked for, never
concluded from its number: its HTTP library (requests, httpx, httpx2) is known only as what ``HfHubHTTPError`` is made
of.
"""

import errno
import functools
import hashlib
import json
import math
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import HFValidationError, get_session, hf_raise_for_status, validate_repo_id

from ..errors import ReparamError

__all__ = [
    'CLIENT_ERRORS',
    'Conflict',
    'HubClient',
    'LocalFile',
    'RemoteFile',
    'RemoteState',
    'check_repo_id',
    'one_line',
    'without_secrets',
]

_T = TypeVar('_T')
# Errors of the HTTP library, whichever it is: the bases of the client's own error between it and Python's classes.
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base
    for base in HfHubHTTPError.__mro__
    if issubclass(base, Exception) and base.__module__ != 'builtins' and base is not HfHubHTTPError
)
# OSError: the client's offline, not-found and consistency errors. RuntimeError: what it wraps a failed upload into.
# JSONDecodeError: an answer that broke off. Public, because timm lets them through, too.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    EntryNotFoundError,
    RuntimeError,
    OSError,
    json.JSONDecodeError,
    *_HTTP_ERRORS,
)
_COMMIT_ERRORS: tuple[type[Exception], ...] = (*CLIENT_ERRORS, ValueError)  # ValueError: the Hub's opinion of a card
_BUSY = (408, 429, 500, 502, 503, 504)
_LOCAL = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EROFS)
_NETWORK_TRIES = 4
_LONGEST_PAUSE = 30.0
_CHUNK = 1 << 20


class Conflict(ReparamError):
    """Somebody else changed a repo after it was read; nothing of theirs was touched."""


def check_repo_id(repo_id: str) -> str:
    """Check a repo id before it is put into an address or a path.

    Args:
        repo_id: ``namespace/name``.

    Returns:
        The same id.

    Raises:
        ReparamError: It is no legal id of that form.
    """
    legal = isinstance(repo_id, str) and repo_id.isascii() and repo_id.count('/') == 1
    legal = legal and all(len(part) <= 96 for part in repo_id.split('/'))
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        legal = False
    if not legal:
        raise ReparamError(f'{repo_id!r}: expected a repo, NAMESPACE/NAME of letters, digits, ".", "_" and "-"')
    return repo_id


def one_line(error: BaseException | str) -> str:
    """The message of an error as one line, without secrets; see :func:`without_secrets`."""
    return without_secrets('; '.join(line.strip() for line in str(error).splitlines() if line.strip()))


def without_secrets(text: str) -> str:
    """A text with stars for tokens and for names and passwords in addresses, and ``~`` for the user's own folder."""
    text = re.sub(r'hf_\w{3,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)', '***', text)
    known, home = get_token(), str(Path.home())
    text = text.replace(known, '***') if known else text
    return re.sub(rf'{re.escape(home)}(?![\w.-])', '~', text) if len(home) > 1 else text


class LocalFile:
    """A file that is to be on the Hub, with the hashes by which the Hub knows it.

    Args:
        source: The content, or the path of a file that stays as it is until it is sent.

    Raises:
        ReparamError: The file cannot be read.
    """

    def __init__(self, source: bytes | Path):
        self.source = source
        self.place = 'content' if isinstance(source, bytes) else str(source)  # in errors
        try:
            self.size = source.stat().st_size if isinstance(source, Path) else len(source)
            sha256, git = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % self.size)
            if isinstance(source, bytes):
                sha256.update(source)
                git.update(source)
            else:
                with source.open('rb') as file:
                    while block := file.read(_CHUNK):
                        sha256.update(block)
                        git.update(block)
        except OSError as error:
            raise ReparamError(f'{self.place}: cannot be read ({error.strerror})') from error
        self.sha256, self.git_oid = sha256.hexdigest(), git.hexdigest()

    def read(self) -> bytes:
        """The content."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def operation(self, path: str) -> CommitOperationAdd:
        """The operation that puts the file at a path of a repo."""
        source = self.source if isinstance(self.source, bytes) else str(self.source)
        try:
            operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=source)
        except (OSError, ValueError) as error:
            raise ReparamError(f'{path}: cannot be read ({one_line(error)})') from error
        if operation.upload_info.sha256.hex() != self.sha256:
            raise ReparamError(f'{self.place}: changed while it was being published; publish again')
        return operation


@dataclass(frozen=True)
class RemoteFile:
    """What the Hub says of a file.

    Attributes:
        size: Its size.
        git_oid: Git's hash of it (of the pointer to it, for an LFS file).
        sha256: Hash of the content of an LFS file; None for others.
    """

    size: int | None
    git_oid: str | None
    sha256: str | None

    def is_same(self, local: LocalFile) -> bool:
        """Whether a local file has this content."""
        return self.sha256 == local.sha256 if self.sha256 else self.git_oid == local.git_oid


@dataclass(frozen=True)
class RemoteState:
    """What is on the Hub under a repo's name, at one moment.

    Attributes:
        exists: Whether there is such a repo.
        head: Id of the commit that was read; None if there is none.
        files: Path to file.
        private: Whether the repo is private.
    """

    exists: bool
    head: str | None = None
    files: Mapping[str, RemoteFile] = field(default_factory=dict)
    private: bool = False


@dataclass(frozen=True)
class Landed:
    """A commit that is on the Hub: its id and, if it was proposed as one, the pull request's address."""

    commit: str
    pull_request: str | None = None


class HubClient:
    """The Hub as this package needs it.

    Args:
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub; HF_ENDPOINT or the public one by default.
        timeout: Seconds without an answer after which a request has failed. The client's own default is to wait for
            ever; where a process has set other limits, those hold.
        patience: Seconds that one request, with all its repetitions, may be waited for: rate limits, server errors,
            dropped connections. The client's own repetitions may add half a minute.
    """

    def __init__(
        self, *, token: str | None = None, endpoint: str | None = None, timeout: float = 60.0, patience: float = 300.0
    ):
        for name, value in (('timeout', timeout), ('patience', patience)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ReparamError(f'{name}: expected a number of seconds above 0, got {value!r}')
        self.api = HfApi(token=token, endpoint=endpoint)
        self.timeout, self.patience = timeout, patience
        self.address = without_secrets(self.api.endpoint)  # for messages
        self._token = token

    def call(self, wanted: str, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call a function of the client that may be repeated, and wait out what passes.

        Args:
            wanted: What it is for, to begin a message with.
            function: The function.
            *args: Its arguments.
            **kwargs: Its arguments.

        Returns:
            What it returns.

        Raises:
            ReparamError: It failed for good.
            RepositoryNotFoundError, RevisionNotFoundError: The client's own errors, for the caller to judge.
        """
        patience = _Patience(self.patience)
        while True:
            try:
                with self._limits(patience):
                    return function(*args, **kwargs)
            except ReparamError:
                raise
            except GatedRepoError as error:
                raise self.failure(wanted, error) from None
            except (RepositoryNotFoundError, RevisionNotFoundError):
                raise
            except CLIENT_ERRORS as error:
                if not patience.wait_after(error):
                    raise self.failure(wanted, error) from None

    def state(self, repo_id: str, revision: str | None = None) -> RemoteState:
        """Read what is there.

        Args:
            repo_id: The repo.
            revision: Branch, tag or commit; main by default.

        Raises:
            ReparamError: The Hub does not say.
        """
        kwargs = dict(revision=revision, files_metadata=True, timeout=self.timeout)
        try:
            info = self.call(f'{repo_id}', self.api.model_info, repo_id, **kwargs)
        except RevisionNotFoundError:
            return RemoteState(True)
        except RepositoryNotFoundError:
            return RemoteState(False)
        files = {}
        for sibling in info.siblings or ():
            sha256 = getattr(sibling.lfs, 'sha256', None)
            files[sibling.rfilename] = RemoteFile(sibling.size, sibling.blob_id, sha256)
        return RemoteState(True, info.sha, files, bool(info.private))

    def existing_state(self, repo_id: str, revision: str | None = None) -> RemoteState:
        """Read what is there, which has to be something.

        Args:
            repo_id: The repo.
            revision: Branch, tag or commit; main by default.

        Raises:
            ReparamError: There is no such repo or revision, or the Hub does not say.
        """
        state = self.state(repo_id, revision)
        if not state.exists:
            raise ReparamError(f'{repo_id}: {self.address} has no such model, or does not show it to this token')
        if state.head is None:
            raise ReparamError(f'{repo_id}: has no revision {revision!r}')
        return state

    def make_ready(self, repo_id: str, state: RemoteState, *, private: bool, revision: str | None) -> RemoteState:
        """Make the repo and the branch that a commit needs, if they are not there.

        Args:
            repo_id: The repo.
            state: What was there.
            private: Make the repo private.
            revision: The branch; main by default.

        Returns:
            What is there now.

        Raises:
            Conflict: Somebody else made it meanwhile, and something is in it.
            ReparamError: The repo cannot be made, or is public and should be private.
        """
        wanted = f'{repo_id} cannot be made'
        try:
            if not state.exists:
                self.call(wanted, self.api.create_repo, repo_id, private=private, exist_ok=True)
                state = self.state(repo_id, revision)
                if not state.exists:
                    raise ReparamError(f'{wanted}: {self.address} takes it and does not show it; try again later')
                if state.files.keys() - {'.gitattributes'}:  # that much is in a new one
                    raise _conflict(repo_id)
            if state.head is None and revision is not None:
                wanted = f'{repo_id}: branch {revision!r} cannot be made'
                start = self.state(repo_id).head
                self.call(wanted, self.api.create_branch, repo_id, branch=revision, revision=start, exist_ok=True)
                state = self.existing_state(repo_id, revision)
                if state.head != start:
                    raise _conflict(repo_id)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise self.failure(wanted, error) from None
        if private and not state.private:
            raise ReparamError(
                f'{repo_id}: is public, expected a private repo; make it private on its settings page, or leave out'
                ' private'
            )
        return state

    def commit(
        self,
        repo_id: str,
        changes: Mapping[str, LocalFile | None],
        *,
        base: RemoteState,
        message: str,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Landed:
        """Change a repo by one commit on top of the state that was read, once and not twice.

        The client does not repeat the request that commits. Here, whenever it is not known whether a commit landed,
        the repo is read again first: the same files at a new head mean that it did.

        Args:
            repo_id: The repo.
            changes: Path to file; None takes the file away.
            base: The state that the commit replaces.
            message: Title of the commit.
            revision: The branch; main by default.
            create_pr: Propose it as a pull request.

        Returns:
            What landed.

        Raises:
            Conflict: The repo is no longer in that state.
            ReparamError: It failed for good; the repo is as it was.
        """
        wanted = f'{repo_id}: commit'
        known = self._pull_requests(repo_id) if create_pr else {}
        patience = _Patience(self.patience)
        while True:
            operations = [
                CommitOperationDelete(path_in_repo=path) if file is None else file.operation(path)
                for path, file in changes.items()
            ]
            try:
                with self._limits(patience):
                    done = self.api.create_commit(
                        repo_id,
                        operations,
                        commit_message=message,
                        revision=revision,
                        create_pr=create_pr,
                        parent_commit=base.head,
                    )
                return Landed(done.oid, done.pr_url)
            except _COMMIT_ERRORS as error:
                status = _status(error)
                if status is not None and status < 500 and status not in (*_BUSY, 409, 412):
                    raise self.failure(wanted, error) from None
                if type(error) is ValueError:
                    raise self.failure(wanted, error) from None
                landed = self._find(repo_id, changes, base, revision, known if create_pr else None)
                if landed is not None:
                    return landed
                if status in (409, 412):
                    raise _conflict(repo_id) from None
                if not patience.wait_after(error):
                    raise self.failure(wanted, error) from None

    def _find(
        self,
        repo_id: str,
        changes: Mapping[str, LocalFile | None],
        base: RemoteState,
        revision: str | None,
        known: Mapping[str, str] | None,
    ) -> Landed | None:
        """Look for a commit of which no answer came; raise Conflict if another one is in its place."""
        if known is not None:
            for ref, commit in self._pull_requests(repo_id).items():
                if ref not in known and _is_result(self.state(repo_id, commit), changes, base):
                    number = ref.rpartition('/')[2]
                    return Landed(commit, f'{self.address}/{repo_id}/discussions/{number}')
            return None
        now = self.state(repo_id, revision)
        if now.head == base.head:
            return None
        if now.head is not None and _is_result(now, changes, base):
            return Landed(now.head)
        raise _conflict(repo_id)

    def _pull_requests(self, repo_id: str) -> dict[str, str]:
        try:
            refs = self.call(f'{repo_id}', self.api.list_repo_refs, repo_id, include_pull_requests=True)
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise self.failure(repo_id, error) from None
        return {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}

    def download(
        self, repo_id: str, paths: Sequence[str], state: RemoteState, cache: Path, folder: Path | None = None
    ) -> dict[str, LocalFile]:
        """Fetch files by the id of their commit and compare their hashes.

        Args:
            repo_id: The repo.
            paths: The files.
            state: The state that they are of.
            cache: Folder for the client's cache.
            folder: Where to put the files, too.

        Returns:
            The files by path, as they lie in the cache or in the folder.

        Raises:
            ReparamError: A file cannot be fetched or is not what the Hub says it is.
        """
        files = {}
        for path in paths:
            wanted = f'{repo_id}: {path} cannot be fetched'
            try:
                kwargs = dict(revision=state.head, cache_dir=cache)
                fetched = Path(self.call(wanted, self.api.hf_hub_download, repo_id, path, **kwargs))
            except (RepositoryNotFoundError, RevisionNotFoundError) as error:
                raise self.failure(wanted, error) from None
            if folder is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(fetched, folder / path)
                fetched = folder / path
            files[path] = LocalFile(fetched)
            expected = state.files[path]
            if not expected.is_same(files[path]):
                raise ReparamError(
                    f'{repo_id}: {path}: expected the hash that the Hub gives for it,'
                    f' {expected.sha256 or expected.git_oid}, got other content (sha256 {files[path].sha256})'
                )
        return files

    def failure(self, wanted: str, error: BaseException) -> ReparamError:
        """The error to raise for one of the client's: one line, what was wanted first."""
        endpoint, status = self.address, _status(error)
        local = 'a checkpoint on disk needs no network: timm.create_model("local-dir:FOLDER", pretrained=True)'
        text = one_line(getattr(error, 'server_message', None) or error)
        if self._token:
            text = text.replace(self._token, '***')
        if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            reason = f'the client is offline (HF_HUB_OFFLINE); unset it, or use a local folder, {local}'
        elif getattr(error, 'errno', None) in _LOCAL:
            reason = f'{text} on this machine'
        elif isinstance(error, GatedRepoError):
            reason = f'{endpoint} asks for permission; accept its terms on its page, and log in with a token'
        elif status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            reason = f'{endpoint} refuses it or has no such repo (HTTP {status}); log in with a token that may do this'
        elif status == 429:
            reason = f'{endpoint} limits the rate (HTTP 429) beyond {self.patience:g} s; try again later'
        elif status is not None:
            reason = f'{endpoint} answers HTTP {status}: {text}'
        elif type(error) is ValueError:
            reason = text
        else:
            cause = error.__cause__ or error
            kind = f'{type(cause).__name__}: {one_line(cause)}'
            if 'xet-write-token' in kind:  # newer clients send large files that way, whatever the Hub says
                return ReparamError(f'{wanted}: {endpoint} has no Xet; set HF_HUB_DISABLE_XET=1 in the environment')
            reason = f'no answer from {endpoint} ({kind[:200]}); check the network, or use a local folder, {local}'
        return ReparamError(f'{wanted}: {reason}')

    @contextmanager
    def _limits(self, patience: '_Patience') -> Iterator[None]:
        """While one request of the client runs: a time limit for its session if it has none, and no long waits."""
        session: Any = get_session()
        if hasattr(session, 'event_hooks'):
            if getattr(session.timeout, 'read', None) is None:
                session.timeout = self.timeout
            hooks = session.event_hooks
            if _end_long_waits not in hooks['response']:
                session.event_hooks = {**hooks, 'response': [*hooks['response'], _end_long_waits]}
        elif not isinstance(session.request, functools.partial):
            session.request = functools.partial(session.request, timeout=self.timeout)
        _deadlines[threading.get_ident()] = patience.deadline
        try:
            yield
        finally:
            del _deadlines[threading.get_ident()]


# Until when each thread that makes a request may wait.
_deadlines: dict[int, float] = {}


def _end_long_waits(response: Any) -> None:
    """Raise the client's error for an answer that tells it to come back after the deadline.

    Newer clients repeat some requests by themselves, as late as the Hub asks for, however late that is. Some they make
    in threads of their own; these go by the latest deadline.
    """
    latest = max(list(_deadlines.values()), default=math.inf)
    pause = max(_asked_pause(response), 1.0)
    if response.status_code in _BUSY and time.monotonic() + pause > _deadlines.get(threading.get_ident(), latest):
        response.read()
        hf_raise_for_status(response)


def _conflict(repo_id: str) -> Conflict:
    return Conflict(f'{repo_id}: was changed by somebody else meanwhile; nothing of theirs was touched')


class _Patience:
    """Waits between tries, as long as the Hub asks for and no longer than allowed."""

    def __init__(self, seconds: float):
        self.deadline = time.monotonic() + seconds
        self._tries = 0

    def wait_after(self, error: BaseException) -> bool:
        """Wait before the next try after an error; False, at once, if there should be none."""
        self._tries += 1
        pause = min(0.25 * 2**self._tries, _LONGEST_PAUSE)
        status = _status(error)
        if getattr(error, 'errno', None) in _LOCAL:
            return False
        if status is None:
            offline = isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
            if offline or self._tries >= _NETWORK_TRIES:
                return False
        elif status not in _BUSY:
            return False
        else:
            pause = max(pause, _asked_pause(_response(error)))
        if time.monotonic() + pause > self.deadline:
            return False
        time.sleep(pause)
        return True


def _response(error: BaseException | None) -> Any:
    """The answer of the server that an error is about, if it is about one."""
    for _ in range(5):
        if error is None:
            return None
        if isinstance(error, HfHubHTTPError):
            return error.response
        error = error.__cause__
    return None


def _status(error: BaseException) -> int | None:
    response = _response(error)
    if response is None and isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return 404
    return None if response is None else response.status_code


def _asked_pause(response: Any) -> float:
    """Seconds after which the Hub asks to come back, in either of its ways to say so; 0 if it does not."""
    headers = {} if response is None else response.headers
    retry_after = re.fullmatch(r'(\d{1,9}(?:\.\d+)?)', headers.get('Retry-After') or '')
    exhausted = re.search(r'\br=0\b.*\bt=(\d{1,9})\b', headers.get('RateLimit') or '')
    return max((float(found[1]) for found in (retry_after, exhausted) if found), default=0.0)


def _is_result(state: RemoteState, changes: Mapping[str, LocalFile | None], base: RemoteState) -> bool:
    """Whether a state is what a commit of these changes makes of another one."""
    if state.files.keys() != {*base.files, *changes} - {path for path, file in changes.items() if file is None}:
        return False
    for path, found in state.files.items():
        wanted = changes.get(path)
        if not (found == base.files[path] if wanted is None else found.is_same(wanted)):
            return False
    return True
