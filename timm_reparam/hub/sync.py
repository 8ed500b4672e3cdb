"""Publish a pair, sync a zoo, pull from the Hub, and verify a published pair.

Only safetensors are sent and fetched, and each repo changes by one commit. A pair must pass :func:`verify_pair` before
it is sent, after it was fetched back, and before a pulled pair is put in place.
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm
from torch import nn

from ..errors import ReparamError
from ..variants import VARIANTS
from .client import HubClient, check_repo_id
from .facts import is_published_id, read_config, read_facts
from .fetch import fetch_pair, pair_of, pull_pair
from .folder import save_pair
from .gate import VerifyReport, verify_pair
from .names import FUSED_SUFFIX, fused_path, train_time_path
from .push import PairUpload
from .report import RepoResult, SyncReport, reason_of

__all__ = ['publish', 'pull', 'sync', 'verify']

_TAG = 'timm-reparam'


def publish(
    folder_or_model: str | Path | nn.Module,
    namespace: str,
    *,
    tag: str | None = None,
    facts: Mapping[str, Any] | None = None,
    data_config: Mapping[str, Any] | None = None,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
) -> SyncReport:
    """Publish both forms of a model, each as one commit: ``NAMESPACE/<model>.<tag>`` and ``…_fused``.

    The pair is verified (:func:`verify_pair`) before anything is sent. Then it is fetched back from its commits, the
    hashes are compared, and it is verified again. Only files that differ are sent; a pair that is up to date gets no
    commit. The published facts and cards name the repos, so that a card says how to load from the Hub. The local files
    are not changed.

    Args:
        folder_or_model: Folder of either form, with the other one beside it, as :func:`save_pair` writes them; or a
            train-time model, which is saved to a temporary folder first.
        namespace: User or organisation on the Hub.
        tag: Name of the training result, for a model.
        facts: Facts about the training of a model.
        data_config: Preprocessing of the inputs of a model.
        license: Licence of the weights; required if they were trained from scratch or the licence of the base model is
            unknown. Otherwise the licence is that of the base model.
        private: Make the repos private. A repo that is already public is an error.
        revision: Existing branch to commit to; main by default.
        create_pr: Propose each commit as a pull request.
        dry_run: Check and compare, but send nothing.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        The outcome for both repos.

    Raises:
        ReparamError: The pair is not valid, or the Hub did not accept it. The message names the repos that have a
            commit already.
    """
    client, report = HubClient(token=token, endpoint=endpoint), SyncReport()
    with tempfile.TemporaryDirectory(prefix='publish-') as scratch:
        if isinstance(folder_or_model, nn.Module):
            if tag is None:
                raise ReparamError('publish: expected a tag, the name of the training result, with a model; give tag=')
            zoo = Path(scratch) / 'zoo'
            folder, _ = save_pair(folder_or_model, zoo, tag=tag, facts=facts, data_config=data_config)
        elif tag is not None or facts is not None or data_config is not None:
            raise ReparamError('publish: tag, facts and data_config are for a model, got a folder; leave them out')
        else:
            folder = train_time_path(folder_or_model)
        pair = PairUpload(client, folder, namespace)
        report.results = pair.results
        try:
            pair.publish(license, private, dry_run, revision=revision, create_pr=create_pr)
        except ReparamError as error:
            done = [one.repo_id for one in report.of('sent', 'failed') if one.commit is not None]
            if not done:
                raise
            raise ReparamError(f'{error} (already there: {", ".join(done)}; publish again to complete it)') from error
    return report


def sync(
    zoo: str | Path,
    namespace: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    workers: int = 4,
    progress: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
) -> SyncReport:
    """Make the Hub equal to a local zoo.

    The hashes of the local files are compared with those on the Hub, and only files that differ are sent, one commit a
    repo. A second sync sends nothing. Each pair is verified before it is sent and fetched back after, as in
    :func:`publish`. A repo that somebody else changes at the same time is not overwritten but reported as a conflict.
    If the sync is interrupted, each repo has its old or its new state, and the next sync continues. Other files and
    repos on the Hub are not changed. A stock model in the zoo is skipped.

    Args:
        zoo: Folder of pairs, as :func:`save_pair` writes them.
        namespace: User or organisation on the Hub.
        license: Licence of the models whose licence is unknown.
        private: Make the repos private. A repo that is already public is an error.
        revision: Existing branch to commit to; main by default.
        dry_run: Compare, verify and report, but send nothing.
        workers: Number of models at a time.
        progress: Show a progress bar.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        The outcome for every repo, sorted by name.

    Raises:
        ReparamError: There is nothing to sync, or an argument is wrong. Errors of single models are in the report.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ReparamError(f'workers: must be an integer of at least 1, got {workers!r}')
    check_repo_id(f'{namespace}/model')
    folders = _train_time_folders(Path(zoo).absolute())
    client, report = HubClient(token=token, endpoint=endpoint), SyncReport()

    def sync_one(folder: Path) -> list[RepoResult]:
        if _is_stock(folder):
            return [RepoResult(f'{namespace}/{folder.name}', 'skipped', 'a stock model without a fused form')]
        try:
            pair = PairUpload(client, folder, namespace)
        except ReparamError as error:
            return [
                RepoResult(f'{namespace}/{one.name}', 'refused', str(error)) for one in (folder, fused_path(folder))
            ]
        try:
            pair.publish(license, private, dry_run, revision=revision)
        except Exception:  # one bad model does not stop the others; its results name the error
            pass
        return pair.results

    with ThreadPoolExecutor(workers, thread_name_prefix='sync') as pool:
        futures = [pool.submit(sync_one, folder) for folder in folders]
        try:
            with tqdm(total=len(folders), desc='sync', unit='model', disable=None if progress else True) as bar:
                for future in as_completed(futures):
                    report.results += future.result()
                    bar.update()
        except BaseException:  # on Ctrl-C, models under way are finished and others are not started
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report.results.sort(key=lambda result: result.repo_id)
    return report


def pull(
    source: str,
    zoo: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> SyncReport:
    """Fetch both forms of a model, or of all models of a namespace, into a local zoo.

    Files are fetched from one commit and their hashes compared. The pair is verified (:func:`verify_pair`) before both
    folders are put in place. A pair that is up to date is not fetched again.

    Args:
        source: ``NAMESPACE/NAME``, of either form, or ``NAMESPACE`` for every model with the tag ``timm-reparam``.
        zoo: Folder of pairs; made if its parent exists.
        revision: Branch, tag or, for one model, commit; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        The outcome for every repo; 'sent' means fetched.

    Raises:
        ReparamError: A single model cannot be fetched, or a namespace cannot be listed. Errors of the models of a
            namespace are in the report.
    """
    client, zoo = HubClient(token=token, endpoint=endpoint), Path(zoo).absolute()
    if '/' in source:
        return SyncReport(pull_pair(client, source, zoo, revision))
    check_repo_id(f'{source}/model')
    report = SyncReport()
    for repo_id in _published(client, source):
        try:
            report.results += pull_pair(client, repo_id, zoo, revision)
        except Exception as error:  # one bad model does not stop the others
            report.results += [RepoResult(one, 'refused', reason_of(error)) for one in pair_of(repo_id)]
    if not report.results:
        raise ReparamError(
            f'{source}: expected models with the tag {_TAG} at {client.address}, found none; check the name, or log in '
            'with a token that may see them'
        )
    return report


def verify(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> VerifyReport:
    """Verify a published pair or a pair on disk; see :func:`verify_pair`.

    For a repo, the hashes of the files are compared with those that the Hub states, and the self-check tensors with
    the outputs of the models.

    Args:
        repo_or_folder: Repo of either form, ``NAMESPACE/NAME``, or a folder on disk, which takes precedence.
        revision: Branch, tag or commit of a repo; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        The report; its `passed` says whether everything is right.

    Raises:
        ReparamError: The pair does not exist or cannot be fetched.
    """
    if not str(repo_or_folder):
        raise ReparamError("verify: expected a repo, NAMESPACE/NAME, or a folder, got ''")
    if Path(repo_or_folder).is_dir():
        return replace(verify_pair(repo_or_folder), target=str(repo_or_folder))
    client, repo_ids = HubClient(token=token, endpoint=endpoint), pair_of(str(repo_or_folder))
    with tempfile.TemporaryDirectory(prefix='verify-') as scratch:
        states = [client.read(repo_id, revision) for repo_id in repo_ids]
        folders = fetch_pair(client, repo_ids, states, Path(scratch))
        return replace(verify_pair(*folders), target=str(repo_or_folder))


def _train_time_folders(zoo: Path) -> list[Path]:
    """The train-time folder of every pair of a zoo, even if only the fused one exists."""
    if not zoo.is_dir():
        raise ReparamError(f'{zoo}: expected a folder of checkpoints, found none')
    # names that start with a dot are unfinished saves
    folders = sorted(entry for entry in zoo.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if not folders:
        raise ReparamError(f'{zoo}: expected checkpoint folders, found none; save_pair and train.py make them')
    return list(dict.fromkeys(train_time_path(folder) for folder in folders))


def _is_stock(folder: Path) -> bool:
    """Whether a folder holds a model that never had variant layers; train.py saves such models beside the pairs."""
    if fused_path(folder).exists():
        return False
    try:
        facts, architecture = read_facts(folder), read_config(folder)['architecture']
    except ReparamError:
        return False  # publishing it as a pair fails with the reason
    # a folder without facts may be half of a pair
    return facts is not None and facts.get('variant') is None and architecture.rpartition('_')[2] not in VARIANTS


def _published(client: HubClient, namespace: str) -> list[str]:
    """The train-time repo of every pair of a namespace, even if only the fused one exists."""
    wanted = f'{namespace}: its models'
    models = client.repeat(wanted, lambda: list(client.api.list_models(author=namespace, filter=_TAG)))
    ids = {model.id.removesuffix(FUSED_SUFFIX) for model in models if _TAG in (model.tags or ())}
    return sorted(repo_id for repo_id in ids if is_published_id(repo_id) and repo_id.partition('/')[0] == namespace)
