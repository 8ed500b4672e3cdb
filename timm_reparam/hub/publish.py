"""Both forms of a model to the Hub: verified from the files before they are sent, fetched back and compared after."""

import copy
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import timm
import torch
import yaml  # comes with huggingface_hub, which lets its errors through
from huggingface_hub import ModelCard
from torch import nn

from ..errors import ReparamError
from ..models._registry import ensure_registered, saved_arguments
from .cards import (
    CARD_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    WEIGHTS_NAME,
    card_text,
    license_data,
    read_config,
    read_facts,
    sha256_of,
)
from .checkpoint import FILES, fused_path, load_checkpoint, save_pair, train_time_path, verify_checkpoint
from .transport import Conflict, HubClient, Landed, LocalFile, RemoteState, check_repo_id, one_line

__all__ = [
    'CHECK_NAME',
    'RepoResult',
    'SyncReport',
    'check_claims',
    'check_config',
    'check_same_use',
    'check_self_check',
    'missing_license',
    'publish',
    'self_check',
]

CHECK_NAME = 'test/rand_tensors.safetensors'
# as timm's own tests compare such tensors
_TOLERANCE: dict[str, Any] = dict(rtol=1e-3, atol=1e-4)
# Models are run one at a time: verifying a fusion switches settings of the whole process.
one_at_a_time = threading.RLock()
_FORCED_TRIES = 5
_FUSION_HEADING = re.compile(r'## \w+ of the fusion')
# What makes timm take weights, or code for reading them, from elsewhere than the folder.
_ELSEWHERE = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'custom_load')
_OPTIONS = ('model_name', 'checkpoint_path', 'cache_dir', 'scriptable', 'exportable', 'no_jit')
# Entries of pretrained_cfg that say how the model is to be used, whichever form it has.
_USE = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode', 'input_size', 'num_classes', 'license', 'label_names')
# Numbers in model_args that are no sizes of tensors, image sides above all, stay below this.
_LARGEST_ARGUMENT = 8192


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

    Before anything is sent the pair is verified again from its files. What was sent is fetched back by the id of its
    commit: hashes are compared, and the model that timm makes of it is run beside the local one. Only files that
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
    if any(form.is_due for form in forms):
        with _refusing(folder.name), one_at_a_time:
            _verify(*folders)
    for form in forms:
        result = RepoResult(form.repo_id, 'skipped', commit=form.state.head)
        if not form.is_due:
            add_result(result)
            continue
        with _refusing(folder.name), one_at_a_time:
            form.complete()
        if not dry_run:
            landed = _send(client, form, private=private, revision=revision, create_pr=create_pr, force=force)
            result.commit, result.pull_request = landed.commit, landed.pull_request
        result.status = 'planned' if dry_run else 'sent'
        result.files = sorted(form.changes)
        result.num_bytes = sum(file.size for file in form.changes.values())
        add_result(result)
        if not dry_run:
            try:
                _fetch_back(client, form, landed.commit)
            except ReparamError as error:
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


def _files_for(folder: Path, repo_id: str, license: str | None) -> dict[str, LocalFile]:
    """The files of a checkpoint folder as they go to a repo: facts and card tell of this place, and of the licence.

    The small ones are in memory, so that they stay as they are. A card that somebody has added to goes as it is, but
    for the licence.
    """
    files = {}
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise ReparamError(f'{path}: not found; expected a pair of folders as save_pair writes them')
        files[name] = LocalFile(path if name == WEIGHTS_NAME else path.read_bytes())
    config, facts, sha256 = read_config(folder), read_facts(folder) or {}, files[WEIGHTS_NAME].sha256
    card, rendered = (folder / CARD_NAME).read_bytes(), card_text(config, facts, sha256)
    is_rendered = card == rendered.encode()
    if license is not None:
        config['pretrained_cfg']['license'] = facts['license'] = license
        files[CONFIG_NAME] = LocalFile(json.dumps(config, indent=2).encode())
        if not is_rendered:
            card = _with_license(card, rendered, card_text(config, facts, sha256), folder / CARD_NAME)
            files[CARD_NAME] = LocalFile(card)
    facts['repo'] = repo_id
    files[FACTS_NAME] = LocalFile((json.dumps(facts, indent=2) + '\n').encode())
    if is_rendered:
        files[CARD_NAME] = LocalFile(card_text(config, facts, sha256).encode())
    return files


def _with_license(card: bytes, before: str, after: str, place: Path) -> bytes:
    """A card that somebody has added to, with what a licence changes of the rendered one, before and after."""
    (old_entries, old_line), (entries, line) = _license_lines(before), _license_lines(after)
    added = [entry for entry in entries if entry not in old_entries]
    end = b'\r\n' if b'\r\n' in card else b'\n'
    lines = card.split(end)
    is_front = lines[0] == b'---' and b'---' in lines[1:]
    # other entries may be anywhere in the front matter: the end of it is the one place that is in none of them
    close = lines.index(b'---', 1) if is_front else 0
    is_stated = any(one.startswith(b'license') for one in lines[:close])
    if lines.count(old_line) != 1 or (added and (not is_front or is_stated)):
        raise ReparamError(
            f'{place}: expected the line {old_line.decode()!r} once and front matter without a licence, for license= to'
            f' change, got a card edited there; state the licence with add_facts, write {line.decode()!r} into the card'
            f' and {b", ".join(added).decode()!r} into its front matter'
        )
    lines[lines.index(old_line)] = line
    lines[close:close] = added
    return end.join(lines)


def _license_lines(card: str) -> tuple[list[bytes], bytes]:
    """What a rendered card says of the licence: entries of its front matter, and a line of its text."""
    lines = card.encode().split(b'\n')
    entries = [line for line in lines[: lines.index(b'---', 1)] if line.startswith(b'license')]
    (line,) = [line for line in lines if line.startswith(b'- License: ')]
    return entries, line


class _Form:
    """One form of a pair on its way to its repo."""

    def __init__(self, repo_id: str, folder: Path, license: str | None):
        self.repo_id, self.folder = repo_id, folder
        self.files = _files_for(folder, repo_id, license)
        self.state = RemoteState(False)
        self.changes: dict[str, LocalFile] = {}
        self._checks = self.is_due = False

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


def _verify(folder: Path, fused: Path) -> None:
    """Raise ReparamError unless two folders are the two forms of one model and say nothing else."""
    for one in (folder, fused):
        facts = read_facts(one) or {}
        if facts.get('name') != one.name:
            raise ReparamError(
                f'{one / FACTS_NAME}: name: expected that of the folder, {one.name!r}, got {facts.get("name")!r}; save'
                ' the pair under the new name with save_pair'
            )
        check_config(one)  # what pull refuses nobody could fetch
        problems = check_claims(one)
        if problems:
            raise ReparamError(f'{one}: {problems[0]}')
    check_same_use(folder, fused)
    report = verify_checkpoint(folder, fused)
    if not report.passed:
        raise ReparamError(f'the fused model differs from the train-time model: {report}')


def check_config(folder: Path) -> None:
    """Check that config.json describes the weights beside it, before anything is built from it.

    Args:
        folder: Checkpoint folder.

    Raises:
        ReparamError: It asks for other weights than those in the folder, or for another model, or for anything else
            than a model.
    """
    config = read_config(folder)
    place, architecture = f'{folder.name}/{CONFIG_NAME}', config['architecture']
    if not ensure_registered(architecture):
        raise ReparamError(f'{place}: expected an architecture that timm knows, got {architecture!r}')
    elsewhere = [key for key in _ELSEWHERE if config['pretrained_cfg'].get(key)]
    if elsewhere:
        raise ReparamError(f'{place}: pretrained_cfg.{elsewhere[0]}: would take the weights from elsewhere')
    strange = sorted(key for key in config['model_args'] if key in _OPTIONS or key.startswith('pretrained'))
    if strange:
        raise ReparamError(f'{place}: model_args.{strange[0]}: is no argument of a model, but one of loading it')
    shapes = _shapes(folder / WEIGHTS_NAME)
    sizes = [side for shape in shapes.values() for side in shape]
    largest = max([_LARGEST_ARGUMENT, len(shapes), *sizes])
    arguments = saved_arguments(architecture, config['model_args'])
    sizes_asked_for = dict(arguments)
    if isinstance(options := sizes_asked_for.get('conv_options'), dict):
        # the length of a schedule: no tensor is as large as that
        sizes_asked_for['conv_options'] = {key: options[key] for key in options if key != 'temperature_steps'}
    for number in _numbers(sizes_asked_for):
        if not abs(number) <= largest:
            raise ReparamError(f'{place}: model_args: {number} is larger than anything in the weights')
    try:
        with torch.device('meta'):
            model = timm.create_model(architecture, **arguments)
    except Exception as error:  # whatever wrong arguments make of it
        raise ReparamError(f'{place}: {architecture} cannot be built ({one_line(error)[:200]})') from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise ReparamError(
            f'{folder.name}/{WEIGHTS_NAME}: {wrong[0]}: expected shape {expected.get(wrong[0])}, got'
            f' {shapes.get(wrong[0])} ({len(wrong)} tensors differ from {architecture})'
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, which is not read further."""
    try:
        with safetensors.safe_open(path, 'pt') as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise ReparamError(f'{path.parent.name}/{path.name}: is no safetensors file ({one_line(error)})') from error


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield value


def check_same_use(folder: Path, fused: Path) -> None:
    """Check that two forms say the same of a model: preprocessing, classes and licence, variant and architecture.

    Args:
        folder: Train-time checkpoint.
        fused: Fused checkpoint.

    Raises:
        ReparamError: They differ; the message names every difference.
    """
    configs = [read_config(one) for one in (folder, fused)]
    differences = []
    for place, keys in (('', ('num_classes', 'label_names')), ('pretrained_cfg', _USE)):
        for key in keys:
            expected, found = ((config[place] if place else config).get(key) for config in configs)
            if expected != found:
                name = f'{place}.{key}' if place else key
                differences.append(f'{fused.name}/{CONFIG_NAME}: {name}: expected {expected!r}, got {found!r}')
    stock, _, variant = configs[0]['architecture'].rpartition('_')
    for one in (folder, fused):
        facts = read_facts(one) or {}
        for key, expected in (('variant', variant), ('stock_architecture', stock)):
            if (found := facts.get(key, expected)) != expected:
                differences.append(f'{one.name}/{FACTS_NAME}: {key}: expected {expected!r}, got {found!r}')
    if differences:
        raise ReparamError(
            f'{"; ".join(differences)} (expected is what {folder.name}/{CONFIG_NAME} says); save the pair again'
        )


def check_claims(folder: Path) -> list[str]:
    """Compare what a card claims with the other files of its folder.

    Args:
        folder: Checkpoint folder.

    Returns:
        What is wrong, a line each; empty if nothing is.

    Raises:
        ReparamError: A file is missing or cannot be read.
    """
    path = folder / CARD_NAME
    try:
        text = path.read_text(encoding='utf-8')
        card = ModelCard(text)
        claimed = card.data.to_dict()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        return [f'{CARD_NAME}: cannot be read ({one_line(error)[:200]})']
    problems = []
    sha256 = sha256_of(folder / WEIGHTS_NAME)
    if sha256 not in text:
        problems.append(f'{CARD_NAME}: does not name the sha256 of {WEIGHTS_NAME}, {sha256}; render it again')
    config, facts = read_config(folder), read_facts(folder) or {}
    rendered = card_text(config, facts, sha256)
    expected = ModelCard(rendered).data.to_dict()
    for key in ('base_model', 'base_model_relation', 'license', 'datasets', 'model-index'):
        if claimed.get(key) != expected.get(key):
            problems.append(f'{CARD_NAME}: {key}: expected {expected.get(key)!r}, got {claimed.get(key)!r}')
    headings = {heading for heading, _ in _sections(rendered)}
    # What stands below other headings is no claim about the files. The section on the fusion had another name in 0.1.0.
    claims = (body for heading, body in _sections(text) if heading in headings or _FUSION_HEADING.fullmatch(heading))
    stated = _stated('\n'.join(claims))
    facts.pop('repo', None)
    local = _stated(card_text(config, facts, sha256))  # a card that somebody has added to was published as it was
    for key, value in _stated(rendered).items():
        if stated.get(key, value) not in (value, local.get(key)):
            problems.append(f'{CARD_NAME}: {key}: expected {value!r}, got {stated[key]!r}')
    return problems


def _sections(text: str) -> list[tuple[str, str]]:
    """The headings of a card, each with the text below it; what comes before the first one is below ''."""
    parts = ['', *re.split(r'^(#{1,6} .*)$', text, flags=re.MULTILINE)]
    return [(heading.strip(), body) for heading, body in zip(parts[::2], parts[1::2])]


def _stated(text: str) -> dict[str, str]:
    """What a card says in the lines of its lists and tables, by what stands before the first colon or in the cell."""
    lines = re.findall(r'^(?:- ([^:\n]+):|\| ([^|\n]*[^|\s]) \|)[ \t]*(.*)$', text, re.MULTILINE)
    return {item or cell: value.strip() for item, cell, value in lines}


def self_check(model: nn.Module, sha256: str) -> bytes:
    """The self-check file of a checkpoint, as timm's own repos carry it: an image and what the model makes of it.

    Computed in float64 and rounded, so that it is the same bytes however a machine orders its sums.

    Args:
        model: The model.
        sha256: Hash of its weights, which the image is drawn from.

    Returns:
        A safetensors file of `input`, `features`, `pre_logits` and `output`.

    Raises:
        ReparamError: The model does not run on its own input size.
    """
    generator = torch.Generator().manual_seed(int(sha256[:12], 16))
    size = timm.data.resolve_data_config(model=model)['input_size']
    image = torch.randn(1, *size, generator=generator)
    tensors = {'input': image, **_outputs(copy.deepcopy(model).double(), image.double())}
    contiguous = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    return safetensors.torch.save(contiguous, metadata={'weights_sha256': sha256})


def check_self_check(model: nn.Module, content: bytes) -> list[str]:
    """Run a model on the image of a self-check file.

    Args:
        model: The model.
        content: The file.

    Returns:
        What is wrong, a line each; empty if nothing is.
    """
    try:
        tensors = safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        return [f'{CHECK_NAME}: cannot be read ({one_line(error)})']
    lacking = sorted({'input', 'output', 'features', 'pre_logits'} - tensors.keys())
    size = tuple(timm.data.resolve_data_config(model=model)['input_size'])
    image = tensors.get('input')
    if lacking or image is None or tuple(image.shape[1:]) != size or len(image) > 64:
        return [f'{CHECK_NAME}: expected an input of {size} with its outputs; missing: {lacking}']
    problems = []
    dtype = next(model.parameters()).dtype
    for name, found in _outputs(model, image.to(dtype)).items():
        expected = tensors[name]
        if found.shape != expected.shape:
            problems.append(f'{CHECK_NAME}: {name}: expected shape {list(found.shape)}, got {list(expected.shape)}')
        elif not torch.allclose(found.float(), expected.float(), **_TOLERANCE):
            difference = float((found.float() - expected.float()).abs().max())
            problems.append(f'{CHECK_NAME}: {name}: differs from what the weights give by {difference:.3g}')
    return problems


@torch.no_grad()
def _outputs(model: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    model.eval()
    try:
        with torch.autocast('cpu', enabled=False):
            features = model.forward_features(image)
            return {
                'features': features,
                'pre_logits': model.forward_head(features, pre_logits=True),
                'output': model(image),
            }
    except (AttributeError, RuntimeError, TypeError) as error:
        raise ReparamError(f'self-check: the model does not run on {list(image.shape)} ({one_line(error)})') from error


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


def _fetch_back(client: HubClient, form: _Form, commit: str) -> None:
    """Fetch what was sent by the id of its commit, compare hashes, and run it beside the local model."""
    repo_id = form.repo_id
    state = client.existing_state(repo_id, commit)
    expected = {**form.files, **{path: file for path, file in form.changes.items() if path == CHECK_NAME}}
    for path, file in expected.items():
        if path not in state.files or not state.files[path].is_same(file):
            raise ReparamError(f'{repo_id}: {path} at commit {commit} is not what was sent; sync again, verify it')
    with tempfile.TemporaryDirectory(prefix='fetched-') as scratch:
        cache, folder = Path(scratch) / 'cache', Path(scratch) / 'folder'
        client.download(repo_id, [*FILES, CHECK_NAME], state, cache, folder)
        with one_at_a_time:
            if client.is_ambient:
                name = f'hf-hub:{repo_id}@{commit}'
                published = _load(name, Path(scratch) / 'timm', client)
            else:
                published = load_checkpoint(folder)
            image = safetensors.torch.load_file(folder / CHECK_NAME)['input']
            logits, own = (_logits(model, image) for model in (published, load_checkpoint(form.folder)))
    difference = float((logits - own).abs().max())
    if not difference <= 1e-5 * float(own.abs().max()):
        raise ReparamError(f'{repo_id}: commit {commit} gives other logits than {form.folder}, by {difference:.3g}')


def _load(name: str, cache: Path, client: HubClient) -> nn.Module:
    try:
        return client.call(name, timm.create_model, name, pretrained=True, cache_dir=cache).eval()
    except ReparamError:
        raise
    except Exception as error:  # whatever a damaged file makes of it
        raise ReparamError(f'{name}: cannot be loaded ({one_line(error)})') from error


@torch.no_grad()
def _logits(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    with torch.autocast('cpu', enabled=False):
        return model.eval()(image.to(next(model.parameters()).dtype)).double()
