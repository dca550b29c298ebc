"""Windows of DNA with planted motifs, and their labels.

Letters are numbers of "ACGT", so that the complement of a is 3 − a. Shape suffixes: B windows, K motifs, A letters of
an arm, N letters of a window.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TASKS = ("palindrome", "strand")
LENGTH, ARM = 24, 6
NOISE = 0.05
"""Chance that a planted letter is replaced by another."""
NUM_SEEN, NUM_UNSEEN = 32, 64
MIN_MISMATCHES = 3
"""Pairs of a decoy, of ARM, that do not match before noise."""
MIN_DISTANCE = 2
"""Letters by which an unseen arm (of the strand task: a motif) differs from each seen one."""

_EVERY_ARM = torch.cartesian_prod(*[torch.arange(4)] * ARM)


class Data(NamedTuple):
    """What one seed trains on and is tested on."""

    seen_KA: Tensor
    """Seen motifs: arms of palindromes, or whole motifs of the task "strand" [K, 2A]."""
    unseen_KA: Tensor
    train: tuple[Tensor, Tensor]
    """Windows int64 [B, N] and labels float32 [B]."""
    tests: dict[str, tuple[Tensor, Tensor]]
    """By "seen" and "unseen", windows and labels: a first half, then the other strands of the first half."""


def other_strand(tokens: Tensor) -> Tensor:
    """The reverse complement, int64 [..., N]."""
    return 3 - tokens.flip(-1)


def motif_sets(task: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Seen and unseen motifs, as in `Data`. None is in both, nor nearly.

    Of the task "palindrome" an arm has no letter more than three times, so that a rearrangement can miss everywhere.
    Of the task "strand" the first half of a motif is of strong letters (C, G), the second of weak ones (A, T).
    """
    if task == "palindrome":
        counts = torch.nn.functional.one_hot(_EVERY_ARM, 4).sum(1)
        every = _EVERY_ARM[(counts <= ARM // 2).all(1)]
    else:
        choices = torch.cartesian_prod(*[torch.arange(2)] * (2 * ARM))
        every = torch.where(torch.arange(2 * ARM) < ARM, 1 + choices, 3 * choices)
    every = every[torch.randperm(len(every), generator=generator)]
    seen, others = every[:NUM_SEEN], every[NUM_SEEN:]
    far = ((others[:, None] != seen).sum(-1) >= MIN_DISTANCE).all(1)
    return seen, others[far][:NUM_UNSEEN]


def random_windows(
    task: str, motifs: Tensor, count: int, generator: torch.Generator, *, noise: float = NOISE
) -> tuple[Tensor, Tensor]:
    """Windows int64 [count, N] and labels float32 [count], alternating.

    Flanks are uniform letters. On the task "palindrome" label 1 has an arm and its reverse complement about the centre,
    label 0 an arm and a rearrangement of that reverse complement with at least `MIN_MISMATCHES` letters elsewhere; the
    whole is turned to the other strand with chance one half. On the task "strand" label 1 has a motif in the middle,
    label 0 the reverse complement of one. So the law of the other strands is the same, in the latter with labels
    changed.
    """
    labels = torch.arange(count) % 2
    motif = motifs[torch.randint(len(motifs), (count,), generator=generator)]
    if task == "palindrome":
        right = other_strand(motif)
        decoys = right.clone()
        todo = labels == 0
        while todo.any():
            order = torch.rand(right.shape, generator=generator).argsort(-1)
            decoys[todo] = right.gather(1, order)[todo]
            todo = todo & ((decoys != right).sum(-1) < MIN_MISMATCHES)
        planted = torch.cat([motif, decoys], 1)
        turned = torch.rand(count, generator=generator) < 0.5
    else:
        planted, turned = motif, labels == 0
    hit = torch.rand(planted.shape, generator=generator) < noise
    planted = (planted + hit * torch.randint(1, 4, planted.shape, generator=generator)) % 4
    planted = torch.where(turned[:, None], other_strand(planted), planted)
    tokens = torch.randint(4, (count, LENGTH), generator=generator)
    tokens[:, LENGTH // 2 - ARM : LENGTH // 2 + ARM] = planted
    return tokens, labels.float()


def both_strands(task: str, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Windows, then their other strands, each with its label."""
    turned = labels if task == "palindrome" else 1 - labels
    return torch.cat([tokens, other_strand(tokens)]), torch.cat([labels, turned])


def random_data(task: str, seed: int, *, train_size: int, test_size: int) -> Data:
    """Motifs, training and test windows of one seed; there are ``test_size`` test windows on each strand."""
    generator = torch.Generator().manual_seed(seed)
    seen, unseen = motif_sets(task, generator)
    train = random_windows(task, seen, train_size, generator)
    tests = {
        name: both_strands(task, *random_windows(task, motifs, test_size, generator))
        for name, motifs in (("seen", seen), ("unseen", unseen))
    }
    return Data(seen, unseen, train, tests)


def spell(tokens: Sequence[int] | Tensor) -> str:
    """The letters of a window."""
    return "".join("ACGT"[int(token)] for token in tokens)
