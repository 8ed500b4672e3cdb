"""The repositories of the loopback Hub, its users and what they may do; nothing here knows of HTTP.

server.py puts these behind a port.
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

# What a file can be made of: its bytes, its text, or a file on disk that is read when it is served.
Source = bytes | str | Path

LFS_SUFFIXES = ('.safetensors', '.bin', '.pt', '.pth', '.tar', '.npz', '.onnx')
LFS_SIZE = 10 * 2**20  # the Hub keeps larger files in LFS whatever they are called
_CHUNK = 2**20


def in_lfs(path: str, size: int) -> bool:
    """Whether a file of that name and size belongs in LFS."""
    return size >= LFS_SIZE or path.endswith(LFS_SUFFIXES)


@dataclass(frozen=True)
class Blob:
    """The content of one file and the two names that the Hub knows it by."""

    source: bytes | Path
    size: int
    sha256: str
    oid: str  # git's name: of the content itself, or of the pointer that stands for it in git when it lies in LFS
    pointer_size: int | None  # None for a file that lies in git itself

    @classmethod
    def of(cls, path: str, source: Source, *, lfs: bool | None = None) -> 'Blob':
        """The blob of a content; lfs says whether it lies in LFS, or else the file's path and size do."""
        if isinstance(source, str):
            source = source.encode()
        size = source.stat().st_size if isinstance(source, Path) else len(source)
        sha256, sha1 = hashlib.sha256(), hashlib.sha1(b'blob %d\0' % size)
        for chunk in _read(source, 0, size):
            sha256.update(chunk)
            sha1.update(chunk)
        if not (in_lfs(path, size) if lfs is None else lfs):
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
            if below(commit.files, path) != below(self.files, path):
                break
            last = commit
        return last


def below(files: Mapping[str, Blob], path: str) -> dict[str, str]:
    return {name: blob.oid for name, blob in files.items() if name == path or name.startswith(f'{path}/')}


@dataclass
class Repo:
    """A model repository: its commits, the names that point at them, and who may read and write it.

    Args:
        id: `namespace/name`.
        private: Unknown to everybody but its readers and writers.
        gated: Everybody sees what it holds, only its readers and writers get the files.
        disabled: Nobody gets anything.
        readers: The users (of `Hub.tokens`) who may read a private or gated repository.
        writers: The users who may change it, besides those who may write in its namespace.
    """

    id: str
    private: bool = False
    gated: bool | str = False
    disabled: bool = False
    readers: frozenset[str] = frozenset()
    writers: frozenset[str] = frozenset()
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)  # by their full names, `refs/pr/1`
    pull_authors: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)  # by sha256: what was uploaded, in a commit or not yet
    announced: set[tuple[str, int]] = field(default_factory=set)  # sha256 and size of what the LFS batch asked for

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, a tag, a full ref or a commit id names."""
        for prefix, refs in (('refs/heads/', self.branches), ('refs/tags/', self.tags)):
            if revision.startswith(prefix):
                return refs.get(revision.removeprefix(prefix))
        for refs in (self.branches, self.tags, self.pulls, self.commits):
            if revision in refs:
                return refs[revision]
        return None

    def commit(
        self,
        changes: Mapping[str, Source | Blob | None],
        *,
        branch: str = 'main',
        title: str = 'Upload files',
        message: str = '',
        author: str = 'someone',
    ) -> Commit:
        """Adds one commit on top of a branch or of a pull request; a file given as None is taken away."""
        refs = self.pulls if branch in self.pulls else self.branches
        parent = refs.get(branch)
        files = dict(parent.files) if parent else {}
        for path, source in changes.items():
            if source is None:
                files.pop(path, None)
            else:
                files[path] = source if isinstance(source, Blob) else Blob.of(path, source)
        files = dict(sorted(files.items()))
        # One second a commit from a fixed day on: ids and dates are the same in every run.
        date = datetime(2024, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=len(self.commits))
        content = [self.id, parent and parent.oid, {path: blob.oid for path, blob in files.items()}, title, str(date)]
        oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        commit = Commit(oid, parent, files, title, message, author, f'{date:%Y-%m-%dT%H:%M:%S}.000Z')
        self.commits[oid] = commit
        refs[branch] = commit
        self.lfs |= {blob.sha256: blob for blob in files.values() if blob.pointer_size is not None}
        return commit

    def open_pull(self, author: str) -> str:
        """Opens a pull request on main as it is, and gives the name of its ref."""
        name = f'refs/pr/{len(self.pulls) + 1}'
        self.pull_authors[name] = author
        self.pulls[name] = self.branches['main']
        return name


class Hub:
    """The repositories and the users, apart from any HTTP.

    Args:
        tokens: Access token → user name.
        orgs: Organisation → the users who may write in it. A user's own namespace needs no mention.
        read_only: Those of the tokens that may not change anything.
    """

    def __init__(
        self,
        tokens: Mapping[str, str] | None = None,
        orgs: Mapping[str, Iterable[str]] | None = None,
        read_only: Iterable[str] = (),
    ) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens = dict(tokens or {})
        self.orgs = {name: set(members) for name, members in (orgs or {}).items()}
        self.read_only = set(read_only)
        self.lock = threading.RLock()  # held for every change and every answer, not while a body is being sent

    def may_write_in(self, namespace: str, user: str | None) -> bool:
        return user is not None and (user == namespace or user in self.orgs.get(namespace, ()))

    def may_write(self, repo: Repo, user: str | None) -> bool:
        return user in repo.writers or self.may_write_in(repo.id.split('/')[0], user)

    def may_read(self, repo: Repo, user: str | None) -> bool:
        """Whether the user may read the repository even where it is private or gated."""
        return user in repo.readers or self.may_write(repo, user)

    def create_repo(self, repo_id: str, files: Mapping[str, Source] | None = None, **options) -> Repo:
        """Makes a repository with a first commit of the files; options are those of `Repo`."""
        with self.lock:
            if repo_id in self.repos:
                raise ValueError(f'{repo_id} is already there')
            repo = self.repos[repo_id] = Repo(repo_id, **options)
            repo.commit(files or {}, title='initial commit', author='system')
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
