"""Reports of publishing, syncing and pulling, repo by repo."""

from dataclasses import dataclass, field
from typing import Any

from .client import one_line

__all__ = ['RepoResult', 'SyncReport', 'reason_of']


@dataclass
class RepoResult:
    """The outcome for one repo.

    Attributes:
        repo_id: The repo.
        status: 'sent' (or fetched), 'planned' (it would be sent), 'skipped' (it is up to date), 'refused' (the pair is
            not valid, or cannot be fetched), 'conflict' (the repo was changed at the same time) or 'failed'.
        why: The reason, in one line.
        commit: Id of the current commit, if known.
        pull_request: Address of the pull request, if the commit is proposed as one.
        files: The files that were sent, or would be sent.
        num_bytes: Their size. Less is transferred if the Hub already has the content of a file.
    """

    repo_id: str
    status: str = ''
    why: str = ''
    commit: str | None = None
    pull_request: str | None = None
    files: list[str] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class SyncReport:
    """The outcome for every repo."""

    results: list[RepoResult] = field(default_factory=list)

    def of(self, *statuses: str) -> list[RepoResult]:
        """The results with one of the statuses."""
        return [result for result in self.results if result.status in statuses]

    @property
    def sent(self) -> list[RepoResult]:
        """Repos with a new commit; for a pull, those that were fetched."""
        return self.of('sent')

    @property
    def skipped(self) -> list[RepoResult]:
        """Repos that were equal to the local folder."""
        return self.of('skipped')

    @property
    def refused(self) -> list[RepoResult]:
        """Repos whose pair is not valid or cannot be fetched."""
        return self.of('refused')

    @property
    def conflicts(self) -> list[RepoResult]:
        """Repos that were changed by somebody else at the same time."""
        return self.of('conflict')

    @property
    def failed(self) -> list[RepoResult]:
        """Repos that failed for another reason."""
        return self.of('failed')

    @property
    def ok(self) -> bool:
        """Whether no repo failed."""
        return not self.of('refused', 'conflict', 'failed')

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for json."""
        counts = {status: len(self.of(status)) for status in dict.fromkeys(r.status for r in self.results)}
        return {'ok': self.ok, 'counts': counts, 'results': [vars(result) for result in self.results]}

    def __str__(self) -> str:
        lines = []
        for result in self.results:
            what = f'{len(result.files)} files, {result.num_bytes:,} bytes' if result.files else ''
            where = result.pull_request or (f'commit {result.commit[:12]}' if result.commit else '')
            about = '; '.join(part for part in (what, where, result.why) if part)
            lines.append(f'{result.status:>8}  {result.repo_id}' + (f': {about}' if about else ''))
        return '\n'.join(lines)


def reason_of(error: BaseException) -> str:
    """The message of an error in one line; the name of its class if the message is empty."""
    return one_line(error) or type(error).__name__
