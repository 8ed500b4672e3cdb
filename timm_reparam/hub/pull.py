"""From the Hub to a local zoo, and the verification of a pair from outside: only safetensors, and no code is run."""

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ReparamError
from .cards import CONFIG_NAME, WEIGHTS_NAME
from .checkpoint import FILES, FUSED_SUFFIX, copy_checkpoints
from .gate import CHECK_NAME, VerifyReport, verify_pair
from .publish import RepoResult, SyncReport
from .transport import HubClient, LocalFile, RemoteState, check_repo_id, one_line

__all__ = ['pull', 'verify']

_TAG = 'timm-reparam'
_PICKLES = ('.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.pickle')
_LARGEST_TEXT = 16 * 2**20


def pull(
    source: str,
    zoo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    timeout: float = 60.0,
    patience: float = 300.0,
) -> SyncReport:
    """Fetch both forms of a model, or of all models of a namespace, into a local zoo.

    Files are fetched by the id of their commit and their hashes compared; the pair is looked over and loaded before
    it takes its place, both folders at once. A pair that is there already is not fetched again.

    Args:
        source: ``NAMESPACE/NAME``, of either form, or ``NAMESPACE`` for everything that is tagged ``timm-reparam``.
        zoo: Folder of pairs; made if its parent is there.
        revision: Branch, tag or, for one model, commit; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.
        timeout: Seconds without an answer after which a request has failed.
        patience: Seconds that a rate limit, server errors and dropped connections may be waited for, a request.

    Returns:
        What became of every repo: 'sent' means fetched.

    Raises:
        ReparamError: The one model that was asked for cannot be fetched, or a namespace cannot be listed. What goes
            wrong with a model of a namespace is in the report.
    """
    client = HubClient(token=token, endpoint=endpoint, timeout=timeout, patience=patience)
    zoo = Path(zoo).absolute()
    if '/' in source:
        return SyncReport(_pull_pair(client, check_repo_id(source).removesuffix(FUSED_SUFFIX), zoo, revision))
    check_repo_id(f'{source}/model')
    report = SyncReport()
    for repo_id in _published(client, source):
        try:
            report.results += _pull_pair(client, repo_id, zoo, revision)
        except Exception as error:  # one bad model does not stop the rest
            for one in (repo_id, repo_id + FUSED_SUFFIX):
                report.results.append(RepoResult(one, 'refused', one_line(error) or type(error).__name__))
    if not report.results:
        raise ReparamError(f'{source}: {client.address} shows no models there that are tagged {_TAG}')
    return report


def verify(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    timeout: float = 60.0,
    patience: float = 300.0,
) -> VerifyReport:
    """Verify a pair again from outside.

    Compared are the hashes that the Hub gives with those of the files, the claims of both cards and of
    ``training.json`` with the weights, the self-check tensors with what the models make of them, and both forms of the
    model with each other: preprocessing, classes and licence, and what they make of fresh inputs.

    Args:
        repo_or_folder: Repo of either form, ``NAMESPACE/NAME``, or a folder on disk, which goes first.
        revision: Branch, tag or commit of a repo; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.
        timeout: Seconds without an answer after which a request has failed.
        patience: Seconds that a rate limit, server errors and dropped connections may be waited for, a request.

    Returns:
        What was found; whether all is right is the report's `passed`.

    Raises:
        ReparamError: There is no such pair, or it cannot be read at all.
    """
    if not str(repo_or_folder):
        raise ReparamError("verify: expected a repo, NAMESPACE/NAME, or a folder, got ''")
    if Path(repo_or_folder).is_dir():
        return replace(verify_pair(repo_or_folder), target=str(repo_or_folder))
    client = HubClient(token=token, endpoint=endpoint, timeout=timeout, patience=patience)
    repo_id = check_repo_id(str(repo_or_folder)).removesuffix(FUSED_SUFFIX)
    with tempfile.TemporaryDirectory(prefix='verify-') as scratch:
        fetched = _Fetched(client, repo_id, revision)
        fetched.download(Path(scratch))
        return replace(fetched.verify(), target=str(repo_or_folder))


class _Fetched:
    """Both forms of a pair on the Hub, and what was fetched of them."""

    def __init__(self, client: HubClient, repo_id: str, revision: str | None):
        self.client, self.repo_ids = client, (repo_id, repo_id + FUSED_SUFFIX)
        self.states = [client.existing_state(check_repo_id(one), revision) for one in self.repo_ids]
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


def _published(client: HubClient, namespace: str) -> list[str]:
    """The train-time repos of a namespace, also where only the fused one is there."""
    wanted = f'{namespace}: its models'

    def listed() -> list[str]:
        models = client.api.list_models(author=namespace, filter=_TAG)
        return [model.id for model in models if _TAG in (model.tags or ())]

    try:
        found = client.call(wanted, listed)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise client.failure(wanted, error) from None
    ids = {check_repo_id(repo_id).removesuffix(FUSED_SUFFIX) for repo_id in found}
    return sorted(repo_id for repo_id in ids if repo_id.partition('/')[0] == namespace)


def _pull_pair(client: HubClient, repo_id: str, zoo: Path, revision: str | None) -> list[RepoResult]:
    pair = _Fetched(client, repo_id, revision)
    targets = [zoo / one.partition('/')[2] for one in pair.repo_ids]
    if all(_is_equal(folder, state) for folder, state in zip(targets, pair.states)):
        return [RepoResult(one, 'skipped', commit=state.head) for one, state in zip(pair.repo_ids, pair.states)]
    results = []
    with tempfile.TemporaryDirectory(prefix='pull-') as scratch:
        pair.download(Path(scratch))
        report = pair.verify()
        if not report.passed:
            raise ReparamError(f'{repo_id}: is not verified: {"; ".join(report.problems)}')
        for one, state, target, num_bytes in zip(pair.repo_ids, pair.states, targets, pair.sizes):
            why = 'fetched, in the place of another version' if target.exists() else 'fetched'
            why = '; '.join([why, *(w for w in report.warnings if w.startswith(f'{target.name}/'))])
            results.append(RepoResult(one, 'sent', why, state.head, None, sorted(_wanted(state)), num_bytes))
        copy_checkpoints(pair.folders, zoo)
    return results


def _is_equal(folder: Path, state: RemoteState) -> bool:
    if not all((folder / name).is_file() for name in (CONFIG_NAME, WEIGHTS_NAME)):
        return False
    for name in FILES:
        path = folder / name
        if path.is_file() != (name in state.files) or path.is_file() and not state.files[name].is_same(LocalFile(path)):
            return False
    return True


def _wanted(state: RemoteState) -> list[str]:
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
    for name in _wanted(state):
        _check_size(repo_id, name, state)
    folder.mkdir()
    with tempfile.TemporaryDirectory(prefix='pull-cache-') as cache:
        files = client.download(repo_id, _wanted(state), state, Path(cache), folder)
    return sum(file.size for file in files.values())
