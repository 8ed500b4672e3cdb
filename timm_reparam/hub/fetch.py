"""Fetch the two repos of a pair: weights as safetensors only, limits on the size of other files, hashes compared."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitOperationAdd

from ..errors import ReparamError
from .client import HubClient, RepoState, check_repo_id
from .copies import copy_checkpoints
from .facts import CARD_NAME, CONFIG_NAME, FACTS_NAME, FILES, WEIGHTS_NAME
from .gate import CHECK_NAME, verify_pair
from .names import FUSED_SUFFIX
from .report import RepoResult

__all__ = ['fetch_pair', 'pair_of', 'pull_pair']

_PICKLES = ('.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.pickle')
_MOST_BYTES = {**dict.fromkeys((CARD_NAME, CONFIG_NAME, FACTS_NAME), 2**24), CHECK_NAME: 2**28}


def pair_of(repo_id: str) -> list[str]:
    """The repos of the train-time form and of the fused form, given either."""
    repo_id = check_repo_id(check_repo_id(repo_id).removesuffix(FUSED_SUFFIX))
    return [repo_id, repo_id + FUSED_SUFFIX]


def fetch_pair(client: HubClient, repo_ids: Sequence[str], states: Sequence[RepoState], place: Path) -> list[Path]:
    """Fetch the checkpoint files and the self-checks of a pair. Other files of the repos are not fetched.

    Args:
        client: The Hub.
        repo_ids: The two repos.
        states: Their states; the files are fetched from these commits.
        place: Folder to put both checkpoint folders into.

    Returns:
        The two folders.

    Raises:
        ReparamError: A file is missing, too large, cannot be fetched, or has another hash than the Hub states.
    """
    for repo_id, state in zip(repo_ids, states):
        pickles = sorted(path for path in state.files if path.endswith(_PICKLES))
        if WEIGHTS_NAME not in state.files and pickles:
            raise ReparamError(
                f'{repo_id}: expected {WEIGHTS_NAME}, got weights only as a pickle, {pickles[0]}, which may run any '
                'code when it is read; publish it as safetensors'
            )
        for name in (WEIGHTS_NAME, CONFIG_NAME, CHECK_NAME):
            if name not in state.files:
                raise ReparamError(f'{repo_id}: has no {name}; expected a checkpoint, as publish writes it')
        for name, most in _MOST_BYTES.items():
            size = state.files[name].size if name in state.files else 0
            if not isinstance(size, int) or size > most:
                raise ReparamError(f'{repo_id}: {name}: expected {most} bytes at most, got {size!r:.80}')
    folders = [place / repo_id.partition('/')[2] for repo_id in repo_ids]
    for repo_id, state, folder in zip(repo_ids, states, folders):
        client.download(repo_id, [name for name in (*FILES, CHECK_NAME) if name in state.files], state, folder)
    return folders


def pull_pair(client: HubClient, repo_id: str, zoo: Path, revision: str | None) -> list[RepoResult]:
    """Fetch a pair, verify it, and put both folders into a zoo; skip a pair that is up to date.

    Args:
        client: The Hub.
        repo_id: Repo of either form.
        zoo: Folder of pairs.
        revision: Branch, tag or commit; main by default.

    Returns:
        The outcome for both repos.

    Raises:
        ReparamError: The pair cannot be fetched, is not verified, or cannot be written.
    """
    repo_ids = pair_of(repo_id)
    states = [client.read(one, revision) for one in repo_ids]
    targets = [zoo / one.partition('/')[2] for one in repo_ids]
    if all(_is_equal(folder, state) for folder, state in zip(targets, states)):
        return [RepoResult(one, 'skipped', commit=state.head) for one, state in zip(repo_ids, states)]
    results = []
    with tempfile.TemporaryDirectory(prefix='pull-') as scratch:
        folders = fetch_pair(client, repo_ids, states, Path(scratch))
        report = verify_pair(*folders)
        if not report.passed:
            raise ReparamError(f'{repo_ids[0]}: is not verified: {"; ".join(report.problems)}')
        for one, state, target in zip(repo_ids, states, targets):
            why = 'fetched, replaced another version' if target.exists() else 'fetched'
            why = '; '.join([why, *(w for w in report.warnings if w.startswith(f'{target.name}/'))])
            files = [name for name in FILES if name in state.files]
            num_bytes = sum(state.files[name].size or 0 for name in files)
            results.append(RepoResult(one, 'sent', why, state.head, None, files, num_bytes))
        copy_checkpoints(folders, zoo)
    return results


def _is_equal(folder: Path, state: RepoState) -> bool:
    """Whether a local folder has the same checkpoint files as a repo."""
    here = [name for name in FILES if (folder / name).is_file()]
    there = [name for name in FILES if name in state.files]
    try:
        equal = all(state.has(CommitOperationAdd(name, folder / name)) for name in here)
    except OSError as error:
        raise ReparamError(f'{folder}: cannot be read ({error.strerror})') from error
    return WEIGHTS_NAME in here and here == there and equal
