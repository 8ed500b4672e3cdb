"""Send a pair to its two repos: compare, verify, one commit a repo, and verify what is fetched back."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd

from ..errors import ReparamError
from .client import Conflict, HubClient, RepoState, check_repo_id
from .copies import stage
from .facts import CONFIG_NAME, FACTS_NAME, FILES, WEIGHTS_NAME, missing_license, read_facts
from .fetch import fetch_pair
from .gate import CHECK_NAME, one_at_a_time, self_check, verify_pair
from .load import load_checked
from .names import fused_path
from .report import RepoResult, reason_of

__all__ = ['PairUpload']


class Refused(ReparamError):
    """A local pair cannot be published."""


_STATUSES: dict[type[Exception], str] = {Conflict: 'conflict', Refused: 'refused'}


class PairUpload:
    """The upload of both forms of a model.

    Args:
        client: The Hub.
        folder: Folder of the train-time form.
        namespace: User or organisation on the Hub.

    Attributes:
        results: The outcome for each form; the status is empty until it is known.
    """

    def __init__(self, client: HubClient, folder: Path, namespace: str):
        self.client, self.folders = client, (folder, fused_path(folder))
        self.results = [RepoResult(check_repo_id(f'{namespace}/{one.name}')) for one in self.folders]

    def publish(self, license: str | None, private: bool, dry_run: bool, **options: Any) -> None:
        """Bring both repos up to date, see :func:`timm_reparam.hub.publish`. Also sets the results if it raises."""
        try:
            with tempfile.TemporaryDirectory(prefix='to-publish-') as scratch:
                with self._refusing():
                    forms = self._stage(Path(scratch), license)
                for form in forms:
                    form.compare(self._find(form.result.repo_id, private, options.get('revision')))
                if any(form.is_due for form in forms):
                    with self._refusing(), one_at_a_time:
                        verify_pair(*(form.folder for form in forms)).raise_for_problems()
                        for form in forms:
                            form.complete()
                for form in forms:
                    self._send(form, private, dry_run, **options)
                if self._of('sent'):
                    self._fetch_back(forms)
        except Exception as error:
            status, why = _STATUSES.get(type(error), 'failed'), reason_of(error)
            for index, result in enumerate(self._of('')):  # 'refused' is the outcome of both forms
                result.status = status
                result.why = f'not tried: {why}' if index and status != 'refused' else why
            raise

    def _of(self, status: str) -> list[RepoResult]:
        return [result for result in self.results if result.status == status]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Turn a ReparamError about the local pair into Refused."""
        try:
            yield
        except ReparamError as error:
            raise Refused(f'{self.folders[0].name}: not published: {error}') from error.__cause__

    def _stage(self, place: Path, license: str | None) -> list['_Form']:
        """Copy both forms as they will be published: the facts state the licence and the repo."""
        facts = [_facts_to_publish(folder) for folder in self.folders]
        license = missing_license(facts, license)
        stated = {} if license is None else {'license': license}
        return [
            _Form(result, stage(folder, place, {**stated, 'repo': result.repo_id}))
            for folder, result in zip(self.folders, self.results)
        ]

    def _find(self, repo_id: str, private: bool, revision: str | None) -> RepoState | None:
        """Read a repo that may not exist; ReparamError if it does not fit the options."""
        state = self.client.find(repo_id, revision)
        if state is None and revision is not None:
            raise ReparamError(f'{repo_id}: the repo does not exist and has no branch {revision!r}; make both first')
        if state is not None and private and not state.private:
            raise ReparamError(
                f'{repo_id}: expected a private repo, got a public one; make it private on its settings page, or leave'
                ' out private'
            )
        return state

    def _send(self, form: '_Form', private: bool, dry_run: bool, **options: Any) -> None:
        """Commit the missing files."""
        result, state = form.result, form.state
        if form.changes and not dry_run:
            verb = 'Update' if state is not None and WEIGHTS_NAME in state.files else 'Add'
            result.commit, result.pull_request = self.client.commit(
                result.repo_id, form.changes, state, message=f'{verb} {form.folder.name}', private=private, **options
            )
        elif state is not None:
            result.commit = state.head
        result.files = sorted(file.path_in_repo for file in form.changes)
        result.num_bytes = sum(file.upload_info.size for file in form.changes)
        result.status = ('planned' if dry_run else 'sent') if form.changes else 'skipped'

    def _fetch_back(self, forms: Sequence['_Form']) -> None:
        """Fetch the pair from its commits, compare it with what was sent, and verify it."""
        repo_ids = [result.repo_id for result in self.results]
        try:
            states = [self.client.read(result.repo_id, result.commit) for result in self.results]
            for form, state in zip(forms, states):
                for file in (*form.files, *form.changes):
                    if not state.has(file):
                        raise ReparamError(
                            f'{form.result.repo_id}: {file.path_in_repo} at commit {state.head} differs from what was '
                            'sent; publish again, then verify it'
                        )
            with tempfile.TemporaryDirectory(prefix='fetched-') as scratch:
                report = verify_pair(*fetch_pair(self.client, repo_ids, states, Path(scratch)))
            if not report.passed:
                raise ReparamError(f'{repo_ids[0]}: the fetched copy is not verified: {report.problems[0]}')
        except Exception as error:  # a commit that was not verified counts as failed
            for result in self._of('sent'):
                result.status, result.why = 'failed', reason_of(error)
            raise


class _Form:
    """One form of a pair: the files to publish, and those that the repo lacks."""

    def __init__(self, result: RepoResult, folder: Path):
        self.result, self.folder = result, folder
        self.files = [CommitOperationAdd(name, folder / name) for name in FILES]
        self.state: RepoState | None = None
        self.changes: list[CommitOperationAdd] = []
        self.lacks_check = False

    def compare(self, state: RepoState | None) -> None:
        """Find the files that are missing or differ."""
        self.state = state
        self.changes = [file for file in self.files if state is None or not state.has(file)]
        # the self-check follows from configuration and weights
        changes_model = any(file.path_in_repo in (CONFIG_NAME, WEIGHTS_NAME) for file in self.changes)
        self.lacks_check = changes_model or state is None or CHECK_NAME not in state.files

    @property
    def is_due(self) -> bool:
        """Whether anything has to be sent."""
        return bool(self.changes) or self.lacks_check

    def complete(self) -> None:
        """Add the self-check, if it has to be sent."""
        if self.lacks_check:
            (weights,) = (file for file in self.files if file.path_in_repo == WEIGHTS_NAME)
            content = self_check(load_checked(self.folder), weights.upload_info.sha256.hex())
            self.changes.append(CommitOperationAdd(CHECK_NAME, content))


def _facts_to_publish(folder: Path) -> dict[str, Any]:
    """Read the facts of a folder; ReparamError unless it is complete and has the name that the facts state."""
    lacking = [name for name in (FACTS_NAME, *FILES) if not (folder / name).is_file()]
    if lacking:
        raise ReparamError(f'{folder / lacking[0]}: not found; expected a pair of folders as save_pair writes them')
    facts = read_facts(folder) or {}
    if facts.get('name') != folder.name:
        raise ReparamError(
            f"{folder / FACTS_NAME}: name: expected the folder's name, {folder.name!r}, got {facts.get('name')!r}; "
            'save the pair under the new name with save_pair'
        )
    return facts
