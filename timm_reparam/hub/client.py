"""Access to the Hub through huggingface_hub: read a repo, commit to it, fetch files; every error is one line.

Retries, waits and hashes are left to huggingface_hub. Only its public functions and error classes are used, from
version 0.30 on. Features are detected, never derived from the version number. Its HTTP library (requests, httpx or
httpx2) is known only through the base classes of ``HfHubHTTPError``.
"""

import errno
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    HFValidationError,
    build_hf_headers,
    get_session,
    hf_raise_for_status,
    http_backoff,
    validate_repo_id,
)
from huggingface_hub.utils.sha import git_hash

from ..errors import ReparamError

__all__ = [
    'CLIENT_ERRORS',
    'Conflict',
    'HubClient',
    'RepoState',
    'check_repo_id',
    'limit_requests',
    'one_line',
    'without_secrets',
]

_T = TypeVar('_T')
# Errors of the HTTP library: the bases of HfHubHTTPError that are not Python's own.
_HTTP_ERRORS: tuple[type[Exception], ...] = tuple(
    base
    for base in HfHubHTTPError.__mro__
    if issubclass(base, Exception) and base.__module__ != 'builtins' and base is not HfHubHTTPError
)
# OSError: offline, not-found and consistency errors of huggingface_hub. RuntimeError: failed uploads. JSONDecodeError:
# truncated answers. Public, because timm does not catch them either.
CLIENT_ERRORS: tuple[type[Exception], ...] = (
    HfHubHTTPError,
    EntryNotFoundError,
    RuntimeError,
    OSError,
    json.JSONDecodeError,
    *_HTTP_ERRORS,
)
_BUSY = (408, 429, 500, 502, 503, 504)
_LOCAL = (errno.EACCES, errno.EDQUOT, errno.ENOENT, errno.ENOSPC, errno.EROFS)
_PAUSES = (1.0, 4.0)  # seconds before requests that huggingface_hub does not retry are retried


class Conflict(ReparamError):
    """Somebody else changed a repo after it was read. Nothing was overwritten."""


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub.

    Attributes:
        size: Size in bytes.
        git_oid: Git's hash of the file, or of the pointer if it is an LFS file.
        sha256: Hash of the content of an LFS file; None for other files.
    """

    size: int | None
    git_oid: str | None
    sha256: str | None


@dataclass(frozen=True)
class RepoState:
    """The state of a repo at one commit.

    Attributes:
        head: Id of the commit.
        files: Files by path.
        private: Whether the repo is private.
    """

    head: str
    files: Mapping[str, RemoteFile]
    private: bool

    def has(self, operation: CommitOperationAdd) -> bool:
        """Whether the repo already has the file of an operation, with the same content."""
        found = self.files.get(operation.path_in_repo)
        if found is None:
            return False
        if found.sha256 is not None:
            return found.sha256 == operation.upload_info.sha256.hex()
        with operation.as_file() as file:
            return found.git_oid == git_hash(file.read())


class HubClient:
    """Access to the Hub.

    Args:
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub; HF_ENDPOINT or the public one by default.
    """

    def __init__(self, *, token: str | None = None, endpoint: str | None = None):
        self.api = HfApi(token=token, endpoint=endpoint)
        self.address = without_secrets(self.api.endpoint)  # for messages
        self._token = token

    def find(self, repo_id: str, revision: str | None = None) -> RepoState | None:
        """Read the state of a repo, with the retries of huggingface_hub.

        Args:
            repo_id: The repo.
            revision: Branch, tag or commit; main by default.

        Returns:
            Its state; None if the repo does not exist.

        Raises:
            ReparamError: The revision does not exist, or the request failed.
        """
        address = f'{self.api.endpoint}/api/models/{repo_id}'
        address += f'/revision/{quote(revision, safe="")}' if revision else ''
        options: dict[str, Any] = dict(params={'blobs': True}, headers=build_hf_headers(token=self._token))
        options |= dict(timeout=constants.HF_HUB_ETAG_TIMEOUT, max_retries=3, retry_on_status_codes=_BUSY)
        try:
            response = http_backoff('GET', address, **options)
            hf_raise_for_status(response)
            info = response.json()
            files = {}
            for file in info.get('siblings') or ():
                sha256 = (file.get('lfs') or {}).get('sha256')
                files[str(file['rfilename'])] = RemoteFile(file.get('size'), file.get('blobId'), sha256)
            return RepoState(str(info['sha']), files, bool(info.get('private')))
        except GatedRepoError as error:
            raise self.failure(repo_id, error) from None
        except RevisionNotFoundError:
            raise ReparamError(f'{repo_id}: has no revision {revision!r}; make it first, or name another one') from None
        except RepositoryNotFoundError:
            return None
        except Exception as error:  # a malformed answer may raise anything
            raise self.failure(repo_id, error) from None

    def read(self, repo_id: str, revision: str | None = None) -> RepoState:
        """Read the state of an existing repo; see :meth:`find`."""
        state = self.find(repo_id, revision)
        if state is None:
            raise ReparamError(
                f'{repo_id}: {self.address} has no such model, or does not show it to this token; check the name, or '
                'log in with another token'
            )
        return state

    def commit(
        self,
        repo_id: str,
        operations: Sequence[CommitOperationAdd],
        base: RepoState | None,
        *,
        message: str,
        private: bool = False,
        **options: Any,
    ) -> tuple[str, str | None]:
        """Commit files to a repo exactly once, on top of the state that was read.

        huggingface_hub does not retry the commit request. If no answer arrives, the head of the repo decides: if it is
        unchanged, the commit is retried; if it has the files, the commit has succeeded.

        Args:
            repo_id: The repo; created if it does not exist.
            operations: The files.
            base: State of the repo; None if it does not exist.
            message: Title of the commit.
            private: Make a new repo private.
            **options: Options of ``HfApi.create_commit``: revision, create_pr.

        Returns:
            Id of the commit, and the address of the pull request if it is one.

        Raises:
            Conflict: The repo was changed after it was read.
            ReparamError: The commit failed. No file of the repo was changed, unless its state could not be read; a new
                repo or a pull request may exist.
        """
        for pause in (*_PAUSES, None):
            try:
                if base is None:
                    self.api.create_repo(repo_id, private=private, exist_ok=True)
                    base = self.read(repo_id)
                    if base.files.keys() - {'.gitattributes'} or base.private < private:  # a new repo has that file
                        raise _conflict(repo_id)
                made = self.api.create_commit(
                    repo_id, operations, commit_message=message, parent_commit=base.head, **options
                )
                return made.oid, made.pr_url
            except ReparamError:
                raise
            except Exception as error:  # a malformed answer may raise anything
                status = _status(error)
                if base is not None and options.get('create_pr') and _is_transient(error) and status != 429:
                    remedy = 'look at its pull requests, and publish again if there is none'
                    raise ReparamError(f'{self.failure(f"{repo_id}: commit", error)}; {remedy}') from None
                if base is not None and (status is None or status >= 500 or status in (*_BUSY, 409, 412)):
                    now = self.read(repo_id, options.get('revision'))
                    paths = {operation.path_in_repo for operation in operations}
                    if now.head != base.head and now.files.keys() == base.files.keys() | paths:
                        if all(now.has(operation) for operation in operations):
                            return now.head, None
                    if now.head != base.head or status in (409, 412):
                        raise _conflict(repo_id) from None
                if pause is None or not _is_transient(error):
                    raise self.failure(f'{repo_id}: commit', error) from None
                time.sleep(pause)
        raise AssertionError('the last try returns or raises')

    def download(self, repo_id: str, paths: Iterable[str], state: RepoState, folder: Path) -> None:
        """Fetch files of a repo from one commit into a folder, and compare their hashes.

        Args:
            repo_id: The repo.
            paths: The files.
            state: State of the repo, with the commit and the hashes.
            folder: Where to put the files.

        Raises:
            ReparamError: A file cannot be fetched, or has another hash than the Hub gives.
        """
        for path in paths:
            options: dict[str, Any] = dict(revision=state.head, local_dir=folder)
            self.repeat(f'{repo_id}: {path} cannot be fetched', self.api.hf_hub_download, repo_id, path, **options)
            if not state.has(CommitOperationAdd(path, folder / path)):
                raise ReparamError(f'{repo_id}: {path}: expected the hash that the Hub gives for it, got other content')

    def repeat(self, wanted: str, function: Callable[..., _T], *args: Any, **kwargs: Any) -> _T:
        """Call a function of huggingface_hub that does not retry by itself; retry it after transient errors.

        Args:
            wanted: What the call is for, the start of the error message.
            function: The function.
            *args: Its arguments.
            **kwargs: Its arguments.

        Raises:
            ReparamError: The last try failed, or the error is permanent.
        """
        for pause in (*_PAUSES, None):
            try:
                return function(*args, **kwargs)
            except Exception as error:  # a malformed answer may raise anything
                if pause is None or not _is_transient(error):
                    raise self.failure(wanted, error) from None
                time.sleep(pause)
        raise AssertionError('the last try returns or raises')

    def failure(self, wanted: str, error: BaseException) -> ReparamError:
        """Return the error to raise for an error of huggingface_hub: one line that starts with what was wanted."""
        endpoint, status, cause = self.address, _status(error), error.__cause__ or error
        local = 'a checkpoint on disk needs no network: timm.create_model("local-dir:FOLDER", pretrained=True)'
        text = self._without_token(getattr(error, 'server_message', None) or error)
        kind = f'{type(cause).__name__}: {self._without_token(cause)}'
        if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
            reason = f'the client is offline (HF_HUB_OFFLINE); unset it, or use a local folder, {local}'
        elif getattr(error, 'errno', None) in _LOCAL:
            reason = f'{text} on this machine'
        elif isinstance(error, GatedRepoError):
            reason = f'{endpoint} requires permission; accept the terms on the page of the repo, log in with a token'
        elif status in (401, 403) or isinstance(error, RepositoryNotFoundError):
            reason = (
                f'{endpoint} denies access or has no such repo (HTTP {status}); log in with a token that may do this'
            )
        elif status == 429:
            reason = f'{endpoint} limits the rate (HTTP 429); try again later'
        elif status is not None:
            reason = f'{endpoint} answers HTTP {status}: {text}'
        elif type(error) is ValueError:  # the Hub rejects the card
            reason = text
        elif 'xet-write-token' in kind:  # newer versions use Xet for large files even if the server has no Xet
            reason = f'{endpoint} does not support Xet; set HF_HUB_DISABLE_XET=1 in the environment'
        elif isinstance(error, CLIENT_ERRORS):
            reason = f'no answer from {endpoint} ({kind[:200]}); check the network, or use a local folder, {local}'
        else:
            reason = f'{endpoint} gave an invalid answer, or is an invalid address ({kind[:200]})'
        return ReparamError(f'{wanted}: {reason}')

    def _without_token(self, error: BaseException | str) -> str:
        text = one_line(error)
        return text.replace(self._token, '***') if self._token else text


def limit_requests(seconds: float) -> None:
    """Set a timeout for every request of huggingface_hub in this process.

    For programs only, because huggingface_hub has one session a process. By default it has no timeout.

    Args:
        seconds: The timeout.

    Raises:
        ReparamError: The timeout is not above 0.
    """
    if not seconds > 0:
        raise ReparamError(f'timeout: expected a number of seconds above 0, got {seconds!r}')
    usual: Any = get_session()
    if hasattr(huggingface_hub, 'set_client_factory'):
        options = dict(event_hooks=usual.event_hooks, follow_redirects=True, timeout=seconds)
        huggingface_hub.set_client_factory(lambda: type(usual)(**options))
        return

    def limited() -> Any:
        session = type(usual)()
        session.adapters = usual.adapters
        session.request = functools.partial(session.request, timeout=seconds)
        return session

    huggingface_hub.configure_http_backend(limited)


def check_repo_id(repo_id: str) -> str:
    """Check a repo id before it is used in an address or a path.

    Args:
        repo_id: ``namespace/name``.

    Returns:
        The same id.

    Raises:
        ReparamError: The id is not valid.
    """
    is_valid = isinstance(repo_id, str) and repo_id.isascii() and repo_id.count('/') == 1
    is_valid = is_valid and all(len(part) <= 96 for part in repo_id.split('/'))
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        is_valid = False
    if not is_valid:
        raise ReparamError(f'{repo_id!r}: expected a repo, NAMESPACE/NAME of letters, digits, ".", "_" and "-"')
    return repo_id


def one_line(error: BaseException | str) -> str:
    """The message of an error as one line, without secrets; see :func:`without_secrets`."""
    return without_secrets('; '.join(line.strip() for line in str(error).splitlines() if line.strip()))


def without_secrets(text: str) -> str:
    """Replace tokens, and names and passwords in addresses, by stars, and the user's home folder by ``~``."""
    text = re.sub(r'\bhf_[A-Za-z0-9]{20,}|(?<=Bearer )\S+|(?<=://)[^/\s@]+(?=@)', '***', text)
    known, home = get_token(), os.path.expanduser('~')
    text = text.replace(known, '***') if known else text
    return re.sub(rf'{re.escape(home)}(?![\w.-])', '~', text) if len(home) > 1 else text


def _conflict(repo_id: str) -> Conflict:
    return Conflict(
        f'{repo_id}: was changed by somebody else after it was read; nothing was overwritten; publish again'
    )


def _status(error: BaseException | None) -> int | None:
    """The HTTP status of an error or of one of its causes; None if there is none."""
    while error is not None:
        status = getattr(getattr(error, 'response', None), 'status_code', None)
        if status is not None:
            return int(status)
        error = error.__cause__
    return None


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed: the server is busy, or did not answer."""
    status = _status(error)
    if status is not None:
        return status in _BUSY
    if isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return False
    return isinstance(error, CLIENT_ERRORS) and getattr(error, 'errno', None) not in _LOCAL
