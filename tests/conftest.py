"""What the tests of several families share."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, which reads it then


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture(scope="module")
def one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine lose a factor of thirty to them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
