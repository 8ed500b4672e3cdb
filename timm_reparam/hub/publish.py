"""Both forms of a model to the Hub: verified as they are sent, fetched back and verified again."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ReparamError
from .cards import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    WEIGHTS_NAME,
    card_text,
    license_data,
    notes_of,
    read_config,
    read_facts,
)
from .checkpoint import FILES, fused_path, load_checkpoint, save_pair, train_time_path
from .fetch import FetchedPair
from .gate import CHECK_NAME, one_at_a_time, self_check, verify_pair
from .transport import Conflict, HubClient, Landed, LocalFile, RemoteState, check_repo_id, one_line

__all__ = ['RepoResult', 'SyncReport', 'missing_license', 'publish']

_FORCED_TRIES = 5


@dataclass
class RepoResult:
    """What became of one repo.

    Attributes:
        repo_id: The repo.
        status: 'sent', 'planned' (it would be sent), 'skipped' (it is equal already), 'refused' (the local pair is not
            fit to be published), 'conflict' (somebody else changed the repo meanwhile) or 'failed'.
        why: Why, in one line.
        commit: Id of the commit that is there now, if known.
        pull_request: Address of the pull request, if the commit is proposed as one.
        files: The files that were sent, or would be.
        num_bytes: Their size; of files that the Hub has already, the weights too, only the name travels.
    """

    repo_id: str
    status: str
    why: str = ''
    commit: str | None = None
    pull_request: str | None = None
    files: list[str] = field(default_factory=list)
    num_bytes: int = 0


@dataclass
class SyncReport:
    """What became of every repo, in the order of their names."""

    results: list[RepoResult] = field(default_factory=list)

    def of(self, *statuses: str) -> list[RepoResult]:
        """The results with one of the statuses."""
        return [result for result in self.results if result.status in statuses]

    @property
    def sent(self) -> list[RepoResult]:
        """Repos that have a new commit."""
        return self.of('sent')

    @property
    def skipped(self) -> list[RepoResult]:
        """Repos that were equal to the local folder."""
        return self.of('skipped')

    @property
    def refused(self) -> list[RepoResult]:
        """Repos whose local pair is not fit to be published."""
        return self.of('refused')

    @property
    def conflicts(self) -> list[RepoResult]:
        """Repos that somebody else changed meanwhile."""
        return self.of('conflict')

    @property
    def failed(self) -> list[RepoResult]:
        """Repos that could not be brought up to date."""
        return self.of('failed')

    @property
    def ok(self) -> bool:
        """Whether all went well."""
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
    force: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    timeout: float = 60.0,
    patience: float = 300.0,
) -> SyncReport:
    """Publish both forms of a model, each as one commit: ``NAMESPACE/<model>.<tag>`` and ``…_fused``.

    Before anything is sent the pair is verified (:func:`verify_pair`) as it will be sent. What was sent is fetched back
    by the ids of the commits, its hashes are compared, and the pair is verified again. Only files that
    differ are sent; a pair that is there already makes no commit. The published facts and cards name the repos, so that
    a card tells how to load from the Hub; the local ones stay as they are.

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
        revision: Branch to commit to; main by default.
        create_pr: Propose each commit as a pull request.
        dry_run: Check and compare, but send nothing.
        force: On top of what somebody else commits at the same time, commit all the same.
        token: Access token; the stored one or HF_TOKEN by default.
        endpoint: Address of the Hub.
        timeout: Seconds without an answer after which a request has failed.
        patience: Seconds that a rate limit, server errors and dropped connections may be waited for, a request.

    Returns:
        What became of both repos.

    Raises:
        ReparamError: The pair is not fit to be published, or the Hub did not take it; the message says what of it is
            on the Hub.
    """
    client = HubClient(token=token, endpoint=endpoint, timeout=timeout, patience=patience)
    options: dict[str, Any] = dict(
        private=private, revision=revision, create_pr=create_pr, dry_run=dry_run, force=force
    )
    report = SyncReport()
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
        try:
            publish_pair(client, folder, namespace, report.results.append, license=license, **options)
        except ReparamError as error:
            # what could not be fetched back has landed, too
            done = [result.repo_id for result in report.of('sent', 'failed')]
            if not done:
                raise
            raise ReparamError(f'{error} (already there: {", ".join(done)}; publish again to complete it)') from error
    return report


def publish_pair(
    client: HubClient,
    folder: Path,
    namespace: str,
    add_result: Callable[[RepoResult], object],
    *,
    license: str | None,
    private: bool,
    revision: str | None,
    create_pr: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Bring both repos of a pair up to date; see :func:`publish`.

    Args:
        client: The Hub.
        folder: Folder of the train-time form.
        namespace: Where to.
        add_result: Called with the result of each repo as soon as it is known.
        license: Licence of the weights, if unknown.
        private: Make the repos private.
        revision: Branch.
        create_pr: Propose a pull request.
        dry_run: Send nothing.
        force: Commit on top of a concurrent change.

    Raises:
        ReparamError: The pair is not fit to be published (`Refused`), somebody else changed a repo (`Conflict`), or the
            Hub did not take it.
    """
    folders = (folder, fused_path(folder))
    with _refusing(folder.name):
        license = missing_license([_known_facts(one) for one in folders], license)
        forms = [_Form(check_repo_id(f'{namespace}/{one.name}'), one, license) for one in folders]
    for form in forms:
        form.compare(client.state(form.repo_id, revision))
    due = [form for form in forms if form.is_due]
    if due:
        with _refusing(folder.name), one_at_a_time, tempfile.TemporaryDirectory(prefix='to-publish-') as scratch:
            verify_pair(*(form.write(Path(scratch)) for form in forms)).raise_for_problems()
    results = []
    commits = [form.state.head for form in forms]
    for index, form in enumerate(forms):
        result = RepoResult(form.repo_id, 'skipped', commit=form.state.head)
        if form.is_due:
            with _refusing(folder.name), one_at_a_time:
                form.complete()
            if not dry_run:
                landed = _send(client, form, private=private, revision=revision, create_pr=create_pr, force=force)
                result.commit, result.pull_request = landed.commit, landed.pull_request
                commits[index] = landed.commit
            result.status, result.why = 'planned' if dry_run else 'sent', form.note
            result.files = sorted(form.changes)
            result.num_bytes = sum(file.size for file in form.changes.values())
            results.append(result)
        add_result(result)
    if due and not dry_run:
        try:
            _fetch_back(client, forms, commits)
        except ReparamError as error:
            for result in results:
                result.status, result.why = 'failed', one_line(error)
            raise


class Refused(ReparamError):
    """A local pair is not fit to be published."""


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    try:
        yield
    except ReparamError as error:
        raise Refused(f'{name}: not published: {error}') from error.__cause__


class _Form:
    """One form of a pair on its way to its repo.

    Facts and card are as they go there: they tell of this place and of the licence, and the card is rendered anew, with
    the notes of the local one. The small files are in memory, so that they stay as they are.
    """

    def __init__(self, repo_id: str, folder: Path, license: str | None):
        self.repo_id, self.folder = repo_id, folder
        lacking = [name for name in FILES if not (folder / name).is_file()]
        if lacking:
            raise ReparamError(f'{folder / lacking[0]}: not found; expected a pair of folders as save_pair writes them')
        config, facts = read_config(folder), _known_facts(folder)
        if facts.get('name') != folder.name:
            raise ReparamError(
                f'{folder / FACTS_NAME}: name: expected that of the folder, {folder.name!r}, got '
                f'{facts.get("name")!r}; save the pair under the new name with save_pair'
            )
        weights, notes = LocalFile(folder / WEIGHTS_NAME), notes_of(folder / CARD_NAME)
        is_rendered = (folder / CARD_NAME).read_bytes() == card_text(config, facts, weights.sha256, notes).encode()
        self.note = '' if is_rendered else f'{CARD_NAME} is rendered anew, with the section of notes of the local one'
        config_text = (folder / CONFIG_NAME).read_bytes()
        if license is not None:
            config['pretrained_cfg']['license'] = facts['license'] = license
            config_text = json.dumps(config, indent=2).encode()
        facts['repo'] = repo_id
        self.files = {
            CARD_NAME: LocalFile(card_text(config, facts, weights.sha256, notes).encode()),
            CONFIG_NAME: LocalFile(config_text),
            FACTS_NAME: LocalFile((json.dumps(facts, indent=2) + '\n').encode()),
            WEIGHTS_NAME: weights,
        }
        self.state = RemoteState(False)
        self.changes: dict[str, LocalFile] = {}
        self._checks = self.is_due = False

    def write(self, place: Path) -> Path:
        """Put the files into a folder, as they go to the repo; the weights as a link, where links are."""
        folder = place / self.folder.name
        folder.mkdir()
        for name, file in self.files.items():
            if isinstance(file.source, bytes):
                (folder / name).write_bytes(file.source)
                continue
            try:
                (folder / name).symlink_to(file.source)
            except OSError:  # Windows asks for a privilege
                shutil.copyfile(file.source, folder / name)
        return folder

    def compare(self, state: RemoteState) -> None:
        """Find what has to be sent to a repo in a state."""
        self.state = state
        self.changes = {
            path: file
            for path, file in self.files.items()
            if path not in state.files or not state.files[path].is_same(file)
        }
        # its tensors follow from weights and configuration: it is made only when these change or it is not there
        self._checks = CHECK_NAME not in state.files or bool(self.changes.keys() & {CONFIG_NAME, WEIGHTS_NAME})
        self.is_due = bool(self.changes) or self._checks

    def complete(self) -> None:
        """Add the self-check file to what has to be sent."""
        if self._checks:
            content = self_check(load_checkpoint(self.folder), self.files[WEIGHTS_NAME].sha256)
            self.changes[CHECK_NAME] = LocalFile(content)


def missing_license(facts: Sequence[Mapping[str, Any]], license: str | None) -> str | None:
    """Return the licence to publish a pair under if its files know none.

    Args:
        facts: What is known of each of the two forms.
        license: The licence given by the user, if any.

    Returns:
        That licence, or None if the facts state it.

    Raises:
        ReparamError: No licence is known and none is given, or the given one is not that of the facts, or states none.
    """
    found = [license_data(one).get('license') for one in facts]
    known = {one for one in found if one is not None}
    if license is not None and not known <= {license}:
        raise ReparamError(f'license: the weights are under {", ".join(sorted(known))}, got {license!r}; leave it out')
    if None not in found:
        return None
    if license is None:
        raise ReparamError(
            'the licence of the weights is unknown (trained from scratch, or from weights without one); give it with'
            ' license= (--license on the command line)'
        )
    if not re.fullmatch(r'[a-z0-9][a-z0-9.-]{0,63}', license):
        raise ReparamError(f"license: expected an identifier as the Hub lists them, 'apache-2.0', got {license!r}")
    if not all(license_data({**one, 'license': license}) for one in facts):
        raise ReparamError(
            f"license: {license!r} states no licence; give an identifier as the Hub lists them, 'apache-2.0', or the"
            " name of a licence of your own, 'name-of-licence-1.0'"
        )
    return license


def _known_facts(folder: Path) -> dict[str, Any]:
    facts = read_facts(folder)
    if facts is None:
        raise ReparamError(f'{folder / FACTS_NAME}: not found; expected a pair of folders as save_pair writes them')
    return facts


def _send(
    client: HubClient, form: _Form, *, private: bool, revision: str | None, create_pr: bool, force: bool
) -> Landed:
    """Make the repo ready and commit what has to be sent."""
    name = form.repo_id.partition('/')[2]
    tries = 0
    while True:
        tries += 1
        try:
            base = client.make_ready(form.repo_id, form.state, private=private, revision=revision)
            message = f'{"Update" if WEIGHTS_NAME in base.files else "Add"} {name}'
            return client.commit(
                form.repo_id, form.changes, base=base, message=message, revision=revision, create_pr=create_pr
            )
        except Conflict:
            if not force or tries >= _FORCED_TRIES:
                raise
        form.compare(client.state(form.repo_id, revision))
        if not form.is_due:
            return Landed(form.state.head or '')
        with one_at_a_time:
            form.complete()


def _fetch_back(client: HubClient, forms: Sequence[_Form], commits: Sequence[str | None]) -> None:
    """Fetch a pair by the ids of its commits, compare hashes with what was sent, and verify it."""
    pair = FetchedPair(client, forms[0].repo_id, commits)
    for form, state, commit in zip(forms, pair.states, commits):
        expected = {**form.files, **{path: file for path, file in form.changes.items() if path == CHECK_NAME}}
        for path, file in expected.items():
            if path not in state.files or not state.files[path].is_same(file):
                raise ReparamError(
                    f'{form.repo_id}: {path} at commit {commit} is not what was sent; sync again, verify it'
                )
    with tempfile.TemporaryDirectory(prefix='fetched-') as scratch:
        pair.download(Path(scratch))
        report = pair.verify()
    if not report.passed:
        raise ReparamError(f'{forms[0].repo_id}: what was fetched back is not verified: {report.problems[0]}')
