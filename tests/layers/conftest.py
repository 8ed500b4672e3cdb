"""Every test of a layer starts from the same random state, and on one thread."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope='module')
def one_thread() -> Iterator[None]:
    """Handing out such small tensors to several threads takes many times as long as the arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
