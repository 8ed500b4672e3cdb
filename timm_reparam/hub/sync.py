"""A local zoo to the Hub: what differs is sent, several models at a time, and what cannot be sent does not stop it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from huggingface_hub.utils import tqdm

from ..convert import VARIANTS
from ..errors import ReparamError
from .cards import read_config, read_facts
from .checkpoint import fused_path, train_time_path
from .collection import add_to_collection
from .publish import Refused, RepoResult, SyncReport, publish_pair
from .transport import Conflict, HubClient, check_repo_id, one_line

__all__ = ['sync', 'zoo_pairs']


def sync(
    zoo: str | Path,
    namespace: str,
    *,
    license: str | None = None,
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    force: bool = False,
    collection: str | None = None,
    workers: int = 4,
    progress: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
    timeout: float = 60.0,
    patience: float = 300.0,
) -> SyncReport:
    """Make the Hub equal to a local zoo.

    The hashes of what is there are compared with those of the local files, and only what differs is sent, one commit
    a repo: a second sync sends nothing. What is to be sent is verified before and fetched back after, as
    :func:`publish` does. A repo that somebody else changes at the same time is left to them and reported as a
    conflict. Interrupted at any moment, each repo shows its old state or its new one, and the next sync goes on where
    this one stopped. Files and repos that are not of this zoo stay as they are. A stock model in the zoo is skipped.

    Args:
        zoo: Folder of pairs, as :func:`save_pair` writes them.
        namespace: User or organisation on the Hub.
        license: Licence of the models of which none is known.
        private: Make the repos private; one that is public already is refused.
        revision: Branch to commit to; main by default.
        dry_run: Compare, verify and report, but send nothing.
        force: On top of what somebody else commits at the same time, commit all the same.
        collection: Title of the collection of this zoo; made if it is not there, models are added to it.
        workers: Models at a time.
        progress: Show a progress bar.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.
        timeout: Seconds without an answer after which a request has failed.
        patience: Seconds that a rate limit, server errors and dropped connections may be waited for, a request.

    Returns:
        What became of every repo.

    Raises:
        ReparamError: There is nothing to sync, or an argument is wrong. What goes wrong with a model is in the report.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ReparamError(f'workers: expected a number of models at a time from 1 on, got {workers!r}')
    check_repo_id(f'{namespace}/model')
    pairs = list(zoo_pairs(zoo))
    client = HubClient(token=token, endpoint=endpoint, timeout=timeout, patience=patience)
    options: dict[str, Any] = dict(
        license=license, private=private, revision=revision, create_pr=False, dry_run=dry_run, force=force
    )

    def sync_pair(folder: Path) -> list[RepoResult]:
        results: list[RepoResult] = []
        try:
            if _is_stock(folder):
                return [RepoResult(f'{namespace}/{folder.name}', 'skipped', 'a stock model, no pair')]
            publish_pair(client, folder, namespace, results.append, **options)
        except Conflict as error:
            status, why = 'conflict', one_line(error)
        except Refused as error:
            status, why = 'refused', one_line(error)
        except Exception as error:  # one bad model does not stop the rest
            status, why = 'failed', one_line(error) or type(error).__name__
        else:
            return results
        # a pair is refused as a whole; elsewhere the first of its repos without a result is the one that went wrong
        wrong = status != 'refused' and any(result.status == 'failed' for result in results)
        for repo_id in (f'{namespace}/{one.name}' for one in (folder, fused_path(folder))):
            if all(result.repo_id != repo_id for result in results):
                results.append(RepoResult(repo_id, status, f'not tried: {why}' if wrong else why))
                wrong = status != 'refused'
        return results

    report = SyncReport()
    with ThreadPoolExecutor(workers, thread_name_prefix='sync') as pool:
        futures = [pool.submit(sync_pair, folder) for folder in pairs]
        try:
            with tqdm(total=len(pairs), desc='sync', unit='model', disable=None if progress else True) as bar:
                for future in as_completed(futures):
                    report.results += future.result()
                    bar.update()
        except BaseException:  # Ctrl-C: what runs is finished, what waits is not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report.results.sort(key=lambda result: result.repo_id)
    if collection is not None and not dry_run:
        # a stock model that was skipped has no commit, and no repo
        repo_ids = [result.repo_id for result in report.of('sent', 'skipped') if result.commit is not None]
        name = f'{namespace}: collection {collection!r}'
        try:
            slug, added = add_to_collection(client, namespace, collection, repo_ids, private=private)
            report.results.append(RepoResult(slug, 'sent' if added else 'skipped', f'collection, {added} models added'))
        except ReparamError as error:
            report.results.append(RepoResult(name, 'failed', one_line(error)))
    return report


def _is_stock(folder: Path) -> bool:
    """Whether a folder is that of a model that never had variant layers, as train.py saves it beside the pairs."""
    if fused_path(folder).exists():
        return False
    try:
        facts, architecture = read_facts(folder), read_config(folder)['architecture']
    except ReparamError:
        return False  # it is refused as a pair, with the reason
    # of weights without facts nothing is known: they may be what is left of a pair
    return facts is not None and facts.get('variant') is None and architecture.rpartition('_')[2] not in VARIANTS


def zoo_pairs(zoo: str | Path) -> Iterator[Path]:
    """The pairs of a zoo.

    Args:
        zoo: Folder of pairs.

    Yields:
        The folder of each train-time form, also where only the fused one is there.

    Raises:
        ReparamError: It is no folder, or has no checkpoint in it.
    """
    zoo = Path(zoo).absolute()
    if not zoo.is_dir():
        raise ReparamError(f'{zoo}: expected a folder of checkpoints, found none')
    # a name that starts with a dot is what a save has not finished yet
    folders = sorted(entry for entry in zoo.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    names = dict.fromkeys(train_time_path(folder) for folder in folders)
    if not names:
        raise ReparamError(f'{zoo}: expected checkpoint folders, found none; save_pair and train.py make them')
    yield from names
