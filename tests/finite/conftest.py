"""Fixtures for the tests of erlangen.finite."""

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="module")
def small_matrices(one_thread):
    """All tests here run on one thread."""


@pytest.fixture(scope="session")
def dna():
    if "ERLANGEN_DATA" not in os.environ:
        pytest.skip("ERLANGEN_DATA is not set: no real sequences")
    return Path(os.environ["ERLANGEN_DATA"]) / "dna"
