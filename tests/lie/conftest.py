"""Fixtures for the tests of erlangen.lie."""

import pytest
from lie_cases import POINT_GROUPS


@pytest.fixture(autouse=True, scope="module")
def small_matrices(one_thread):
    """All tests here run on one thread."""


@pytest.fixture(params=POINT_GROUPS, ids=str)
def group(request):
    return request.param
