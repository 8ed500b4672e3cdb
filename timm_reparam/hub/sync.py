"""Pairs to the Hub and back: publish one, sync a zoo, pull, and verify from outside.

Only safetensors are sent and fetched, and each repo changes by one commit. The one check is :func:`verify_pair`: on
what is to be sent, on what was fetched back, and on what is pulled before it takes its place.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import tqdm
from torch import nn

from ..errors import ReparamError
from ..variants import VARIANTS
from .client import Conflict, HubClient, RepoState, check_repo_id, one_line
from .facts import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    FILES,
    WEIGHTS_NAME,
    is_published_id,
    missing_license,
    read_config,
    read_facts,
)
from .folder import copy_checkpoints, save_pair, stage
from .gate import CHECK_NAME, VerifyReport, one_at_a_time, self_check, verify_pair
from .load import load_checked
from .names import FUSED_SUFFIX, fused_path, train_time_path

__all__ = ['RepoResult', 'SyncReport', 'publish', 'pull', 'sync', 'verify']

_TAG = 'timm-reparam'
_PICKLES = ('.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.pickle')
_MOST_BYTES = {**dict.fromkeys((CARD_NAME, CONFIG_NAME, FACTS_NAME), 2**24), CHECK_NAME: 2**28}


class Refused(ReparamError):
    """A local pair cannot be published."""


_STATUSES: dict[type[Exception], str] = {Conflict: 'conflict', Refused: 'refused'}


@dataclass
class RepoResult:
    """The outcome for one repo.

    Attributes:
        repo_id: The repo.
        status: 'sent' (or fetched), 'planned' (it would be sent), 'skipped' (it is equal already), 'refused' (the pair
            is not fit, or cannot be fetched), 'conflict' (somebody else changed the repo meanwhile) or 'failed'.
        why: Why, in one line.
        commit: Id of the commit that is there now, if known.
        pull_request: Address of the pull request, if the commit is proposed as one.
        files: The files that were sent, or would be.
        num_bytes: Their size; of files that the Hub has already, the weights too, only the name travels.
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
        """Repos that have a new commit; of a pull, those that were fetched."""
        return self.of('sent')

    @property
    def skipped(self) -> list[RepoResult]:
        """Repos that were equal to the local folder."""
        return self.of('skipped')

    @property
    def refused(self) -> list[RepoResult]:
        """Repos whose pair cannot be published."""
        return self.of('refused')

    @property
    def conflicts(self) -> list[RepoResult]:
        """Repos that somebody else changed meanwhile."""
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

    Before anything is sent the pair is verified (:func:`verify_pair`) as it will be sent. What was sent is fetched back
    by the ids of the commits, its hashes are compared, and the pair is verified again. Only files that differ are sent;
    a pair that is there already makes no commit. The published facts and cards name the repos, so that a card tells how
    to load from the Hub; the local ones stay as they are.

    Args:
        folder_or_model: Folder of either form, the other one beside it, as :func:`save_pair` writes them; or a
            train-time model, which is saved to a temporary place first.
        namespace: User or organisation on the Hub.
        tag: Name of the training result, for a model.
        facts: What is known of the training of a model.
        data_config: Preprocessing of the inputs of a model.
        license: Licence of the weights; required when they were trained from scratch or their origin's is unknown, and
            only then: otherwise it is taken over from the base model.
        private: Make the repos private; one that is public already is refused.
        revision: Branch to commit to, which is there; main by default.
        create_pr: Propose each commit as a pull request.
        dry_run: Check and compare, but send nothing.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        What became of both repos.

    Raises:
        ReparamError: The pair is not fit to be published, or the Hub did not take it; the message says what of it is
            on the Hub.
    """
    client, report = HubClient(token=token, endpoint=endpoint), SyncReport()
    with tempfile.TemporaryDirectory(prefix='publish-') as scratch:
        if isinstance(folder_or_model, nn.Module):
            if tag is None:
                raise ReparamError('publish: expected a tag, the name of the training result, with a model; give tag=')
            zoo = Path(scratch) / 'zoo'
            folder, _ = save_pair(folder_or_model, zoo, tag=tag, facts=facts, data_config=data_config)
        elif tag is not None or facts is not None or data_config is not None:
            raise ReparamError('publish: tag, facts and data_config are for a model; a folder says them itself')
        else:
            folder = train_time_path(folder_or_model)
        pair = _Pair(client, folder, namespace)
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
        revision: Branch to commit to, which is there; main by default.
        dry_run: Compare, verify and report, but send nothing.
        workers: Models at a time.
        progress: Show a progress bar.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        What became of every repo, in the order of their names.

    Raises:
        ReparamError: There is nothing to sync, or an argument is wrong. What goes wrong with a model is in the report.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ReparamError(f'workers: must be an integer of at least 1, got {workers!r}')
    check_repo_id(f'{namespace}/model')
    folders = _train_time_folders(Path(zoo).absolute())
    client, report = HubClient(token=token, endpoint=endpoint), SyncReport()

    def sync_one(folder: Path) -> list[RepoResult]:
        if _is_stock(folder):
            return [RepoResult(f'{namespace}/{folder.name}', 'skipped', 'a stock model, no pair')]
        try:
            pair = _Pair(client, folder, namespace)
        except ReparamError as error:
            return [
                RepoResult(f'{namespace}/{one.name}', 'refused', str(error)) for one in (folder, fused_path(folder))
            ]
        try:
            pair.publish(license, private, dry_run, revision=revision)
        except Exception:  # one bad model does not stop the rest; its results say what was wrong
            pass
        return pair.results

    with ThreadPoolExecutor(workers, thread_name_prefix='sync') as pool:
        futures = [pool.submit(sync_one, folder) for folder in folders]
        try:
            with tqdm(total=len(folders), desc='sync', unit='model', disable=None if progress else True) as bar:
                for future in as_completed(futures):
                    report.results += future.result()
                    bar.update()
        except BaseException:  # Ctrl-C: what runs is finished, what waits is not begun
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

    Files are fetched by the id of their commit and their hashes compared; the pair is verified (:func:`verify_pair`)
    before it takes its place, both folders at once. A pair that is there already is not fetched again.

    Args:
        source: ``NAMESPACE/NAME``, of either form, or ``NAMESPACE`` for everything that is tagged ``timm-reparam``.
        zoo: Folder of pairs; made if its parent is there.
        revision: Branch, tag or, for one model, commit; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        What became of every repo: 'sent' means fetched.

    Raises:
        ReparamError: The one model that was asked for cannot be fetched, or a namespace cannot be listed. What goes
            wrong with a model of a namespace is in the report.
    """
    client, zoo = HubClient(token=token, endpoint=endpoint), Path(zoo).absolute()
    if '/' in source:
        return SyncReport(_pull_pair(client, source, zoo, revision))
    check_repo_id(f'{source}/model')
    report = SyncReport()
    for repo_id in _published(client, source):
        try:
            report.results += _pull_pair(client, repo_id, zoo, revision)
        except Exception as error:  # one bad model does not stop the rest
            why = one_line(error) or type(error).__name__
            report.results += [RepoResult(one, 'refused', why) for one in _both(repo_id)]
    if not report.results:
        raise ReparamError(f'{source}: {client.address} shows no models there that are tagged {_TAG}')
    return report


def verify(
    repo_or_folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> VerifyReport:
    """Verify a pair again from outside; see :func:`verify_pair`.

    Of a repo, the files' hashes are compared with those that the Hub gives, and the self-check tensors with what the
    models make of their image.

    Args:
        repo_or_folder: Repo of either form, ``NAMESPACE/NAME``, or a folder on disk, which takes precedence.
        revision: Branch, tag or commit of a repo; main by default.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.

    Returns:
        What was found; whether all is right is the report's `passed`.

    Raises:
        ReparamError: There is no such pair, or it cannot be fetched.
    """
    if not str(repo_or_folder):
        raise ReparamError("verify: expected a repo, NAMESPACE/NAME, or a folder, got ''")
    if Path(repo_or_folder).is_dir():
        return replace(verify_pair(repo_or_folder), target=str(repo_or_folder))
    client, repo_ids = HubClient(token=token, endpoint=endpoint), _both(str(repo_or_folder))
    with tempfile.TemporaryDirectory(prefix='verify-') as scratch:
        states = [client.read(repo_id, revision) for repo_id in repo_ids]
        folders = _fetch(client, repo_ids, states, Path(scratch))
        return replace(verify_pair(*folders), target=str(repo_or_folder))


class _Pair:
    """Both forms of a model on their way to the Hub.

    Args:
        client: The Hub.
        folder: Folder of the train-time form.
        namespace: Where to.

    Attributes:
        results: What became of each form, as far as it is known.
    """

    def __init__(self, client: HubClient, folder: Path, namespace: str):
        self.client, self.folders = client, (folder, fused_path(folder))
        self.results = [RepoResult(check_repo_id(f'{namespace}/{one.name}')) for one in self.folders]

    def publish(self, license: str | None, private: bool, dry_run: bool, **options: Any) -> None:
        """Bring both repos up to date; see :func:`publish`. The results say what is there, also after an error."""
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
            status, why = _STATUSES.get(type(error), 'failed'), one_line(error) or type(error).__name__
            for index, result in enumerate(self._of('')):  # a pair is refused as a whole
                result.status = status
                result.why = f'not tried: {why}' if index and status != 'refused' else why
            raise

    def _of(self, status: str) -> list[RepoResult]:
        return [result for result in self.results if result.status == status]

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except ReparamError as error:
            raise Refused(f'{self.folders[0].name}: not published: {error}') from error.__cause__

    def _stage(self, place: Path, license: str | None) -> list['_Form']:
        """Describe both forms as they will be published: with the licence, and with the repo they go to."""
        facts = [_facts_to_publish(folder) for folder in self.folders]
        license = missing_license(facts, license)
        stated = {} if license is None else {'license': license}
        return [
            _Form(result, stage(folder, place, {**stated, 'repo': result.repo_id}))
            for folder, result in zip(self.folders, self.results)
        ]

    def _find(self, repo_id: str, private: bool, revision: str | None) -> RepoState | None:
        state = self.client.find(repo_id, revision)
        if state is None and revision is not None:
            raise ReparamError(f'{repo_id}: there is no such repo, and so no branch {revision!r}; make both first')
        if state is not None and private and not state.private:
            raise ReparamError(
                f'{repo_id}: is public, expected a private repo; make it private on its settings page, or leave out'
                ' private'
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
        """Fetch the pair by the ids of its commits, compare it with what was sent, and verify it."""
        repo_ids = [result.repo_id for result in self.results]
        try:
            states = [self.client.read(result.repo_id, result.commit) for result in self.results]
            for form, state in zip(forms, states):
                for file in (*form.files, *form.changes):
                    if not state.has(file):
                        raise ReparamError(
                            f'{form.result.repo_id}: {file.path_in_repo} at commit {state.head} is not what was sent; '
                            'publish again, verify it'
                        )
            with tempfile.TemporaryDirectory(prefix='fetched-') as scratch:
                report = verify_pair(*_fetch(self.client, repo_ids, states, Path(scratch)))
            if not report.passed:
                raise ReparamError(f'{repo_ids[0]}: what was fetched back is not verified: {report.problems[0]}')
        except Exception as error:  # what is not known to be right is reported as failed
            for result in self._of('sent'):
                result.status, result.why = 'failed', one_line(error) or type(error).__name__
            raise


class _Form:
    """One form of a pair: its files as they are to be on the Hub, and those that are not there yet."""

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
    """The facts of a folder that is complete and has the name that they state."""
    lacking = [name for name in (FACTS_NAME, *FILES) if not (folder / name).is_file()]
    if lacking:
        raise ReparamError(f'{folder / lacking[0]}: not found; expected a pair of folders as save_pair writes them')
    facts = read_facts(folder) or {}
    if facts.get('name') != folder.name:
        raise ReparamError(
            f'{folder / FACTS_NAME}: name: expected that of the folder, {folder.name!r}, got {facts.get("name")!r}; '
            'save the pair under the new name with save_pair'
        )
    return facts


def _train_time_folders(zoo: Path) -> list[Path]:
    """The folder of each train-time form of a zoo, also where only the fused one is there."""
    if not zoo.is_dir():
        raise ReparamError(f'{zoo}: expected a folder of checkpoints, found none')
    # a name that starts with a dot is what a save has not finished yet
    folders = sorted(entry for entry in zoo.iterdir() if entry.is_dir() and not entry.name.startswith('.'))
    if not folders:
        raise ReparamError(f'{zoo}: expected checkpoint folders, found none; save_pair and train.py make them')
    return list(dict.fromkeys(train_time_path(folder) for folder in folders))


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


def _both(repo_id: str) -> list[str]:
    """The repos of both forms, given one of them."""
    repo_id = check_repo_id(check_repo_id(repo_id).removesuffix(FUSED_SUFFIX))
    return [repo_id, repo_id + FUSED_SUFFIX]


def _published(client: HubClient, namespace: str) -> list[str]:
    """The train-time repos of a namespace, also where only the fused one is there."""
    wanted = f'{namespace}: its models'
    models = client.repeat(wanted, lambda: list(client.api.list_models(author=namespace, filter=_TAG)))
    ids = {model.id.removesuffix(FUSED_SUFFIX) for model in models if _TAG in (model.tags or ())}
    return sorted(repo_id for repo_id in ids if is_published_id(repo_id) and repo_id.partition('/')[0] == namespace)


def _fetch(client: HubClient, repo_ids: Sequence[str], states: Sequence[RepoState], place: Path) -> list[Path]:
    """Fetch the files of a pair, and what its self-checks need; nothing else is read."""
    for repo_id, state in zip(repo_ids, states):
        pickles = sorted(path for path in state.files if path.endswith(_PICKLES))
        if WEIGHTS_NAME not in state.files and pickles:
            raise ReparamError(
                f'{repo_id}: offers its weights only as a pickle, {pickles[0]}, which can run any code when it is read;'
                f' expected {WEIGHTS_NAME}'
            )
        for name in (WEIGHTS_NAME, CONFIG_NAME, CHECK_NAME):
            if name not in state.files:
                raise ReparamError(f'{repo_id}: has no {name}; expected a checkpoint, as publish sends it')
        for name, most in _MOST_BYTES.items():
            size = state.files[name].size if name in state.files else 0
            if not isinstance(size, int) or size > most:
                raise ReparamError(f'{repo_id}: {name}: expected {most} bytes at most, got {size!r:.80}')
    folders = [place / repo_id.partition('/')[2] for repo_id in repo_ids]
    for repo_id, state, folder in zip(repo_ids, states, folders):
        client.download(repo_id, [name for name in (*FILES, CHECK_NAME) if name in state.files], state, folder)
    return folders


def _pull_pair(client: HubClient, repo_id: str, zoo: Path, revision: str | None) -> list[RepoResult]:
    repo_ids = _both(repo_id)
    states = [client.read(one, revision) for one in repo_ids]
    targets = [zoo / one.partition('/')[2] for one in repo_ids]
    if all(_is_equal(folder, state) for folder, state in zip(targets, states)):
        return [RepoResult(one, 'skipped', commit=state.head) for one, state in zip(repo_ids, states)]
    results = []
    with tempfile.TemporaryDirectory(prefix='pull-') as scratch:
        folders = _fetch(client, repo_ids, states, Path(scratch))
        report = verify_pair(*folders)
        if not report.passed:
            raise ReparamError(f'{repo_ids[0]}: is not verified: {"; ".join(report.problems)}')
        for one, state, target in zip(repo_ids, states, targets):
            why = 'fetched, in the place of another version' if target.exists() else 'fetched'
            why = '; '.join([why, *(w for w in report.warnings if w.startswith(f'{target.name}/'))])
            files = [name for name in FILES if name in state.files]
            num_bytes = sum(state.files[name].size or 0 for name in files)
            results.append(RepoResult(one, 'sent', why, state.head, None, files, num_bytes))
        copy_checkpoints(folders, zoo)
    return results


def _is_equal(folder: Path, state: RepoState) -> bool:
    here = [name for name in FILES if (folder / name).is_file()]
    there = [name for name in FILES if name in state.files]
    try:
        equal = all(state.has(CommitOperationAdd(name, folder / name)) for name in here)
    except OSError as error:
        raise ReparamError(f'{folder}: cannot be read ({error.strerror})') from error
    return WEIGHTS_NAME in here and here == there and equal
