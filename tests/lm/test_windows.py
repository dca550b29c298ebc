"""Windows against a brute-force reading of their definition, and the properties a training run relies on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from erlangen.lm.corpus import Tokens
from erlangen.lm.windows import TrainingWindows, validation_windows


def make_tokens(lengths: list[int]) -> Tokens:
    """Shards in which token 1000 * s + i is token i of shard s: each window tells where it lies."""
    return Tokens([(1000 * s + np.arange(length)).astype(np.uint16) for s, length in enumerate(lengths)])


def oracle_epoch(lengths: list[int], context_length: int, seed: int, epoch: int) -> list[list[int]]:
    """The windows of one epoch in their order, by plain lists."""
    rng = np.random.default_rng((seed, epoch))
    usable = [(s, n) for s, n in enumerate(lengths) if n >= context_length + 1]
    counts = [max(1, n // context_length - 1) for _, n in usable]
    slack = [n - (count * context_length + 1) for (_, n), count in zip(usable, counts)]
    offsets = rng.integers(0, slack, endpoint=True).tolist()
    windows = []
    for (s, _), count, offset in zip(usable, counts, offsets):
        for k in range(count):
            start = offset + k * context_length
            windows.append([1000 * s + i for i in range(start, start + context_length + 1)])
    order = np.arange(len(windows), dtype=np.int32)
    rng.shuffle(order)
    return [windows[i] for i in order]


@st.composite
def cases(draw):
    context_length = draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, 90), min_size=0, max_size=4))
    lengths.insert(draw(st.integers(0, len(lengths))), draw(st.integers(context_length + 1, 90)))
    return lengths, context_length, draw(st.integers(0, 2**40))


@given(cases())
@settings(deadline=None)
def test_stream_is_the_definition(case):
    lengths, context_length, seed = case
    windows = TrainingWindows(make_tokens(lengths), context_length, seed=seed)
    expected = [window for epoch in range(3) for window in oracle_epoch(lengths, context_length, seed, epoch)]
    assert len(expected) == 3 * windows.windows_per_epoch
    batch = windows.batch(0, len(expected))
    assert batch.dtype == torch.int64
    assert batch.tolist() == expected


@given(cases(), st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_covers_the_interior_of_each_shard_once(case, epoch):
    lengths, context_length, seed = case
    windows = TrainingWindows(make_tokens(lengths), context_length, seed=seed)
    rows = windows.batch(epoch * windows.windows_per_epoch, windows.windows_per_epoch)
    assert (rows.diff(dim=1) == 1).all(), "a window is a run of consecutive tokens of one shard"
    targets = rows[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets), "no token is a target twice"
    for s, length in enumerate(lengths):
        covered = sorted(token - 1000 * s for token in targets if token // 1000 == s)
        if length <= context_length:
            assert not covered
            continue
        assert covered == list(range(covered[0], covered[-1] + 1)), "no gap inside"
        assert covered[0] > 0, "the first token of a shard has nothing to be told from"
        # Less than two windows are left over at the two ends together.
        assert len(covered) >= max(context_length, length - 2 * context_length)


@given(cases(), st.integers(0, 200), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_batch_is_a_pure_function_of_position(case, first, random):
    lengths, context_length, seed = case
    tokens = make_tokens(lengths)
    whole = TrainingWindows(tokens, context_length, seed=seed).batch(first, 10)
    order = list(range(10))
    random.shuffle(order)
    windows = TrainingWindows(tokens, context_length, seed=seed)
    singles = {i: windows.batch(first + i, 1) for i in order}
    assert torch.equal(whole, torch.cat([singles[i] for i in range(10)]))


def test_every_token_is_reached():
    lengths = [47, 9, 8]
    windows = TrainingWindows(make_tokens(lengths), 8, seed=0)
    seen = windows.batch(0, 400 * windows.windows_per_epoch).unique().tolist()
    assert seen == [*range(47), *range(1000, 1009)]


def test_offsets_and_orders_change_with_seed_and_epoch():
    tokens = make_tokens([900])
    windows = TrainingWindows(tokens, 8, seed=1)
    count = windows.windows_per_epoch
    assert count == 900 // 8 - 1
    first, second = windows.batch(0, count), windows.batch(count, count)
    other = TrainingWindows(tokens, 8, seed=2).batch(0, count)
    for left, right in ((first, second), (first, other)):
        assert not torch.equal(left, right)
        assert not torch.equal(left[:, 0].argsort(), right[:, 0].argsort())
    assert len({windows.batch(epoch * count, count).min().item() for epoch in range(20)}) > 5
    assert not torch.equal(first[:, 0], first[:, 0].sort().values)


def test_resuming_and_ranks_give_the_same_stream():
    tokens = make_tokens([301, 77])
    run = [TrainingWindows(tokens, 6, seed=5).batch(16 * step, 16) for step in range(12)]
    resumed = TrainingWindows(tokens, 6, seed=5)
    assert all(torch.equal(resumed.batch(16 * step, 16), run[step]) for step in range(7, 12))
    ranks = [TrainingWindows(tokens, 6, seed=5) for _ in range(4)]
    for step in range(12):
        parts = [windows.batch(16 * step + 4 * rank, 4) for rank, windows in enumerate(ranks)]
        assert torch.equal(torch.cat(parts), run[step])


def test_memory_mapped_shards_are_read_where_a_window_lies(tmp_path):
    np.arange(5000, dtype=np.uint16).tofile(tmp_path / "tokens")
    mapped = np.memmap(tmp_path / "tokens", dtype=np.uint16, mode="r")
    batch = TrainingWindows(Tokens([mapped]), 16, seed=3).batch(0, 50)
    assert torch.equal(batch, TrainingWindows(Tokens([np.arange(5000)]), 16, seed=3).batch(0, 50))
    batch += 1  # ours: the file is untouched
    assert mapped[:3].tolist() == [0, 1, 2]


@given(cases(), st.one_of(st.none(), st.integers(1, 40)))
@settings(deadline=None)
def test_validation_windows(case, max_windows):
    lengths, context_length, _ = case
    every = [
        [1000 * s + i for i in range(start, start + context_length + 1)]
        for s, length in enumerate(lengths)
        for start in range(0, length - context_length, context_length)
    ]
    got = validation_windows(make_tokens(lengths), context_length, max_windows)
    assert got.dtype == torch.int64
    if max_windows is None or len(every) <= max_windows:
        assert got.tolist() == every
        return
    numbers = [every.index(window) for window in got.tolist()]
    assert len(numbers) == max_windows
    edges = [-1 - numbers[0], *numbers, 2 * len(every) - 1 - numbers[-1]]  # mirrored at the ends
    steps = np.diff(edges)
    assert steps.min() >= 1
    assert np.abs(steps - len(every) / max_windows).max() <= 1.5


def test_errors():
    tokens = make_tokens([8, 5])
    with pytest.raises(ValueError, match=r"takes 9 consecutive tokens, but the longest shard has 8"):
        TrainingWindows(tokens, 8, seed=0)
    with pytest.raises(ValueError, match="longest shard has 8"):
        validation_windows(tokens, 8, None)
    with pytest.raises(ValueError, match="longest shard has 0"):
        validation_windows(Tokens([]), 8, None)
    with pytest.raises(ValueError, match="context_length is at least 1, got 0"):
        TrainingWindows(tokens, 0, seed=0)
    with pytest.raises(ValueError, match="seed is a non-negative integer, got -1"):
        TrainingWindows(tokens, 4, seed=-1)
    with pytest.raises(ValueError, match="max_windows is at least 1"):
        validation_windows(tokens, 4, 0)
    windows = TrainingWindows(tokens, 7, seed=0)
    assert windows.windows_per_epoch == 1
    for first, count in ((-1, 1), (0, 0)):
        with pytest.raises(ValueError, match=f"got first={first} and count={count}"):
            windows.batch(first, count)
