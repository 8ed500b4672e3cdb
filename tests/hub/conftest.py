"""What the tests of publishing share."""

import re
from collections.abc import Iterator

import pytest

from hub.server import HubServer


@pytest.fixture
def owner(hub: HubServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A namespace of the test's own, in which the client's token may write; its repositories go when the test ends."""
    name = re.sub('[^0-9a-z]+', '-', request.node.name.lower()).strip('-')[:40].strip('-')
    hub.orgs[name] = {'owner'}
    monkeypatch.setenv('HF_TOKEN', 'hf_owner')
    yield name
    hub.faults.clear()
    for repo_id in [repo_id for repo_id in hub.repos if repo_id.startswith(f'{name}/')]:
        del hub.repos[repo_id]
    del hub.orgs[name]
