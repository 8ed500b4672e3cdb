"""One loopback Hub for the whole run (under pytest-xdist: for each worker), the only one that the real client knows of.

huggingface_hub reads its settings when it is imported, so they are set here, before any test module is.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hub.server import HubServer, client_environment

if 'huggingface_hub' in sys.modules:
    raise pytest.UsageError('huggingface_hub was imported before tests/conftest.py could point it at the loopback Hub')

_home = tempfile.TemporaryDirectory(prefix='hub-home-')
_hub = HubServer(tokens={'hf_owner': 'owner', 'hf_stranger': 'stranger'}).start()
_environment = client_environment(_hub.endpoint, _home.name)
for _name in os.environ.keys() - _environment.keys():
    del os.environ[_name]
os.environ.update(_environment)
if 'PYTEST_XDIST_WORKER' in os.environ:
    # the workers share the cores already: two threads each would wait for one another most of the time
    torch.set_num_threads(int(os.environ.setdefault('OMP_NUM_THREADS', '1')))  # torch read the variable at its import
multiprocessing.set_forkserver_preload(['timm'])  # what most processes of the tests start with


def pytest_report_header() -> str:
    return ', '.join(f'{name} {version(name)}' for name in ('torch', 'timm', 'huggingface_hub'))


def pytest_unconfigure() -> None:
    _hub.stop()
    _home.cleanup()


@pytest.fixture(autouse=True, scope='session')
def few_images() -> Iterator[None]:
    """Where a test says nothing of images, a fusion is verified on 8 of them: 64 cost more and show the same."""
    from timm_reparam import verify  # after the client's settings

    patch = pytest.MonkeyPatch()
    patch.setattr(verify, '_VERIFY_IMAGES', 8)
    patch.setattr(verify, '_VERIFY_BATCH', 8)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random start for every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def session_hub() -> HubServer:
    """The loopback Hub, for fixtures that publish once for many tests."""
    return _hub


@pytest.fixture
def hub(session_hub: HubServer) -> HubServer:
    """The loopback Hub without log, counts and faults. Its repositories are the whole run's: use names of your own."""
    session_hub.clear()
    return session_hub


@pytest.fixture
def cache_dir() -> Iterator[Path]:
    """An empty folder for the client's downloads; it goes when the test ends, for weights are large."""
    with tempfile.TemporaryDirectory(prefix='hub-cache-') as folder:
        yield Path(folder)
