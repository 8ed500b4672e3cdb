"""From the Hub to a local zoo, and the verification of a pair from outside: only safetensors, and no code is run."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ..errors import ReparamError
from ..verify import FusionReport
from .cards import CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME, read_facts, sha256_of
from .checkpoint import (
    FILES,
    FUSED_SUFFIX,
    copy_checkpoints,
    fused_path,
    load_checkpoint,
    train_time_path,
    verify_checkpoint,
)
from .publish import (
    CHECK_NAME,
    RepoResult,
    SyncReport,
    check_claims,
    check_config,
    check_same_use,
    check_self_check,
    one_at_a_time,
)
from .transport import HubClient, LocalFile, RemoteState, check_repo_id, one_line

__all__ = ['VerifyReport', 'pull', 'verify']

_TAG = 'timm-reparam'
_PICKLES = ('.bin', '.pt', '.pth', '.tar', '.ckpt', '.pkl', '.pickle')
_LARGEST_TEXT = 16 * 2**20


@dataclass
class VerifyReport:
    """What a verification from outside found.

    Attributes:
        target: What was verified.
        fusion: The report on the fusion, on fresh inputs; None if it could not be run.
        problems: What is wrong, a line each.
        checks: What was looked at, and whether it is right.
    """

    target: str
    fusion: FusionReport | None = None
    problems: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether everything is right."""
        return not self.problems and self.fusion is not None and self.fusion.passed

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for json."""
        fusion = None if self.fusion is None else self.fusion.to_dict()
        return dict(target=self.target, passed=self.passed, fusion=fusion, checks=self.checks, problems=self.problems)

    def __str__(self) -> str:
        lines = [f'{self.target}: {"verified" if self.passed else "NOT verified"}']
        lines += [f'  {name}: {"right" if right else "WRONG"}' for name, right in self.checks.items()]
        lines += [f'  {problem}' for problem in self.problems]
        return '\n'.join(lines + ([str(self.fusion)] if self.fusion is not None else []))


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
        raise ReparamError(f'{source}: {client.api.endpoint} shows no models there that are tagged {_TAG}')
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
    if Path(repo_or_folder).is_dir():
        folder = train_time_path(repo_or_folder)
        report = VerifyReport(str(repo_or_folder))
        _verify_pair(report, folder, {})
        return report
    client = HubClient(token=token, endpoint=endpoint, timeout=timeout, patience=patience)
    repo_id = check_repo_id(str(repo_or_folder)).removesuffix(FUSED_SUFFIX)
    report = VerifyReport(str(repo_or_folder))
    with tempfile.TemporaryDirectory(prefix='verify-') as scratch:
        states = [client.existing_state(one, revision) for one in (repo_id, repo_id + FUSED_SUFFIX)]
        checks = {}
        for one, state in zip((repo_id, repo_id + FUSED_SUFFIX), states):
            folder = Path(scratch) / one.partition('/')[2]
            _fetch(client, one, state, folder)
            report.checks[f'{one}: hashes'] = True  # otherwise fetching has raised
            with _problem(report, f'{one}: self-check file'):
                if CHECK_NAME not in state.files:
                    raise ReparamError(f'{one}: has no {CHECK_NAME}; publish it again')
                _check_size(one, CHECK_NAME, state)
                checks[folder] = client.download(one, [CHECK_NAME], state, Path(scratch) / 'cache')[CHECK_NAME]
        _verify_pair(report, Path(scratch) / repo_id.partition('/')[2], checks)
    return report


def _verify_pair(report: VerifyReport, folder: Path, checks: Mapping[Path, LocalFile]) -> None:
    for one in (folder, fused_path(folder)):
        check_config(one)
        with _problem(report, f'{one.name}: card'):
            for problem in check_claims(one):
                raise ReparamError(problem)
        if one in checks:
            with _problem(report, f'{one.name}: self-check tensors'), one_at_a_time:
                content = checks[one].source
                content = content if isinstance(content, bytes) else content.read_bytes()
                for problem in check_self_check(load_checkpoint(one), content):
                    # a pair that is equal otherwise is not sent again
                    raise ReparamError(f'{problem}; delete that file on the Hub, publish the pair again')
    with _problem(report, f'{folder.name}: configurations'):
        check_same_use(folder, fused_path(folder))
    with _problem(report, f'{folder.name}: pair'), one_at_a_time:
        report.fusion = verify_checkpoint(folder)
        if not report.fusion.passed:
            raise ReparamError('the fused model differs from the train-time model')


@contextmanager
def _problem(report: VerifyReport, name: str) -> Iterator[None]:
    """Note whether a check went well, and go on."""
    try:
        yield
    except ReparamError as error:
        report.checks[name] = False
        report.problems.append(one_line(error))
    else:
        report.checks[name] = True


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
    repo_ids = (repo_id, repo_id + FUSED_SUFFIX)
    states = [client.existing_state(check_repo_id(one), revision) for one in repo_ids]
    folders = [zoo / one.partition('/')[2] for one in repo_ids]
    if all(_is_equal(folder, state) for folder, state in zip(folders, states)):
        return [RepoResult(one, 'skipped', commit=state.head) for one, state in zip(repo_ids, states)]
    results = []
    with tempfile.TemporaryDirectory(prefix='pull-') as scratch:
        fetched = [Path(scratch) / folder.name for folder in folders]
        for one, state, folder, target in zip(repo_ids, states, fetched, folders):
            num_bytes = _fetch(client, one, state, folder)
            why = 'fetched, in the place of another version' if target.exists() else 'fetched'
            results.append(RepoResult(one, 'sent', why, state.head, None, sorted(_wanted(state)), num_bytes))
        for folder in fetched:
            check_config(folder)
            with one_at_a_time:
                load_checkpoint(folder)
        for form, other in (fetched, fetched[::-1]):
            recorded = ((read_facts(form) or {}).get('sibling') or {}).get('sha256')
            if recorded is not None and recorded != sha256_of(other / WEIGHTS_NAME):
                raise ReparamError(
                    f'{repo_id}: its two forms are not of one save: {form.name}/{FACTS_NAME} records {recorded} for the'
                    ' weights of the other; their owner should sync again'
                )
        copy_checkpoints(fetched, zoo)
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
