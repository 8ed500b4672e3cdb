"""A pair on the Hub, fetched and verified: what `pull`, `verify` and `publish` share. Only safetensors are fetched."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import ReparamError
from .cards import CONFIG_NAME, WEIGHTS_NAME
from .checkpoint import FILES, FUSED_SUFFIX
from .gate import CHECK_NAME, VerifyReport, verify_pair
from .transport import HubClient, RemoteState, check_repo_id

__all__ = ['FetchedPair', 'wanted_files']

_PICKLES = ('.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.pickle')
_LARGEST_TEXT = 16 * 2**20


class FetchedPair:
    """Both forms of a pair on the Hub, and what was fetched of them.

    Args:
        client: The Hub.
        repo_id: Repo of the train-time form.
        revisions: Branch, tag or commit of each form; main where None.

    Attributes:
        repo_ids: The repos of both forms.
        states: What is on the Hub under their names.
        folders: Where their files are, once they are fetched.
        sizes: Size of these files, in bytes.

    Raises:
        ReparamError: There is no such repo or revision, or the Hub does not say.
    """

    def __init__(self, client: HubClient, repo_id: str, revisions: Sequence[str | None]):
        self.client, self.repo_ids = client, (repo_id, repo_id + FUSED_SUFFIX)
        self.states = [
            client.existing_state(check_repo_id(one), revision) for one, revision in zip(self.repo_ids, revisions)
        ]
        self.folders: list[Path] = []
        self.sizes: list[int] = []
        self._self_checks: dict[Path, bytes] = {}
        self._lacking: list[str] = []

    def download(self, place: Path) -> None:
        """Fetch the files, by the ids of their commits; raise ReparamError unless their hashes are right."""
        for one, state in zip(self.repo_ids, self.states):
            folder = place / one.partition('/')[2]
            self.sizes.append(_fetch(self.client, one, state, folder))
            self.folders.append(folder)
            if CHECK_NAME not in state.files:
                self._lacking.append(f'{one}: has no {CHECK_NAME}; publish it again')
                continue
            _check_size(one, CHECK_NAME, state)
            file = self.client.download(one, [CHECK_NAME], state, place / f'.cache-{folder.name}')[CHECK_NAME]
            self._self_checks[folder] = file.read()

    def verify(self) -> VerifyReport:
        """Verify what was fetched."""
        report = verify_pair(*self.folders, self_checks=self._self_checks)
        checks = {f'{one}: hashes': True for one in self.repo_ids}  # otherwise fetching has raised
        checks |= {f'{one}: self-check file': CHECK_NAME in s.files for one, s in zip(self.repo_ids, self.states)}
        return replace(report, checks={**checks, **report.checks}, problems=[*self._lacking, *report.problems])


def wanted_files(state: RemoteState) -> list[str]:
    """The files of a checkpoint that a repo has."""
    return [name for name in FILES if name in state.files]


def _check_size(repo_id: str, name: str, state: RemoteState) -> None:
    size = state.files[name].size
    if name != WEIGHTS_NAME and (size is None or size > _LARGEST_TEXT) and name != CHECK_NAME:
        raise ReparamError(f'{repo_id}: {name}: expected {_LARGEST_TEXT} bytes at most, got {size}')


def _fetch(client: HubClient, repo_id: str, state: RemoteState, folder: Path) -> int:
    """Fetch the files of a checkpoint into a folder and give their size."""
    if WEIGHTS_NAME not in state.files:
        pickles = sorted(path for path in state.files if path.endswith(_PICKLES))
        if pickles:
            raise ReparamError(
                f'{repo_id}: offers its weights only as a pickle, {pickles[0]}, which can run any code when it is read;'
                f' expected {WEIGHTS_NAME}'
            )
        raise ReparamError(f'{repo_id}: has no {WEIGHTS_NAME}; expected a checkpoint')
    if CONFIG_NAME not in state.files:
        raise ReparamError(f'{repo_id}: has no {CONFIG_NAME}; expected a checkpoint of timm')
    for name in wanted_files(state):
        _check_size(repo_id, name, state)
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix='pull-cache-') as cache:
        files = client.download(repo_id, wanted_files(state), state, Path(cache), folder)
    return sum(file.size for file in files.values())
