"""What the tests of studies share."""

import numpy as np
import pytest
import torch


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    """Words of a small vocabulary in random order."""
    words = np.random.default_rng(0).choice(["to be, ", "or not ", "to be.\n", "That is ", "the question: "], 900)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(words))
    return path


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
