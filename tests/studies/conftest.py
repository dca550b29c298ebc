"""What the tests of studies share."""

import pytest
import torch


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
