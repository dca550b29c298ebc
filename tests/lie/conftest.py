"""Fixtures for the tests of erlangen.lie."""

import pytest
import torch
from lie_cases import POINT_GROUPS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Matrices this small gain nothing from threads, and on a busy machine lose a factor of thirty to them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(5)


@pytest.fixture(params=POINT_GROUPS, ids=str)
def group(request):
    return request.param
