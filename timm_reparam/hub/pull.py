"""From the Hub to a local zoo, and the verification of a pair from outside: only safetensors, and no code is run."""

import tempfile
from dataclasses import replace
from pathlib import Path

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ReparamError
from .cards import CONFIG_NAME, WEIGHTS_NAME
from .checkpoint import FILES, FUSED_SUFFIX, copy_checkpoints
from .fetch import FetchedPair, wanted_files
from .gate import VerifyReport, verify_pair
from .publish import RepoResult, SyncReport
from .transport import HubClient, LocalFile, RemoteState, check_repo_id, one_line

__all__ = ['pull', 'verify']

_TAG = 'timm-reparam'


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

    Files are fetched by the id of their commit and their hashes compared; the pair is verified (:func:`verify_pair`)
    before it takes its place, both folders at once. A pair that is there already is not fetched again.

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

    Of a repo, the hashes that the Hub gives are compared with those of the files, and the self-check tensors with what
    the models make of their image. The rest is :func:`verify_pair`.

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
        fetched = FetchedPair(client, repo_id, (revision, revision))
        fetched.download(Path(scratch))
        return replace(fetched.verify(), target=str(repo_or_folder))


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
    pair = FetchedPair(client, repo_id, (revision, revision))
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
            results.append(RepoResult(one, 'sent', why, state.head, None, sorted(wanted_files(state)), num_bytes))
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
