"""What the tests of publishing share."""

import copy
import hashlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hub.server import HubServer
from timm_reparam.hub import VerifyReport, fetch, publish, push, untrusted, verify_pair

_reports: dict[str, VerifyReport] = {}
_sleep = time.sleep


@pytest.fixture(autouse=True, scope='session')
def cost_once() -> Iterator[None]:
    """What an image costs a model is counted once for each model: these tests load the same few over and over."""
    known, check = set(), untrusted.check_cost

    def check_cost(model: torch.nn.Module, input_size: tuple[int, int, int], place: str) -> None:
        key = str(model), input_size
        if key not in known:
            check(model, input_size, place)
            known.add(key)

    patch = pytest.MonkeyPatch()
    patch.setattr(untrusted, 'check_cost', check_cost)
    yield
    patch.undo()


@pytest.fixture
def owner(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A namespace in which the client's token may write; its repositories go when the test ends."""
    hub.orgs['owner-org'] = {'owner'}
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    yield 'owner-org'
    hub.faults.clear()
    for repo_id in [repo_id for repo_id in hub.repos if repo_id.startswith('owner-org/')]:
        del hub.repos[repo_id]
    del hub.orgs['owner-org']


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client tries again after a hundredth of its usual time."""
    monkeypatch.setattr(time, 'sleep', lambda seconds: _sleep(seconds / 100))


@pytest.fixture
def verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Publish, sync, pull and verify take the report of an earlier test on a pair with the same bytes.

    Most of their tests send the same pair, and verifying it takes nearly all of their time.
    """

    def verify(*folders: str | Path) -> VerifyReport:
        digest = hashlib.sha256()
        for folder in map(Path, folders):
            for path in sorted(path for path in folder.rglob('*') if path.is_file()):
                content = path.read_bytes()
                digest.update(f'{folder.name}/{path.relative_to(folder)} {len(content)}\n'.encode() + content)
        key = digest.hexdigest()
        if len(folders) < 2 or key not in _reports:
            _reports[key] = verify_pair(*folders)
        return copy.deepcopy(_reports[key])

    for module in (fetch, push, sys.modules[publish.__module__]):
        monkeypatch.setattr(module, 'verify_pair', verify)
