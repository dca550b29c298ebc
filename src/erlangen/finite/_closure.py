"""Orbits of a group on pairs of positions, and all permutations that keep them: the 2-closure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ._enumeration import classes_of, components

SEARCH_STEPS = 200_000  # of the search for the 2-closure: minutes


def orbitals(positions_GN: np.ndarray, orbits: Sequence[np.ndarray]) -> np.ndarray:
    """Labels of the orbits on pairs, numbered in the order of their first pairs: int32 [N, N]."""
    degree = positions_GN.shape[1]
    labels_NN = np.empty((degree, degree), np.int32)
    number = 0
    for orbit in orbits:
        images_G = positions_GN[:, orbit[0]]
        lowest, row_N = np.unique(positions_GN[images_G == orbit[0]].min(0), return_inverse=True)
        for image, h in zip(*np.unique(images_G, return_index=True)):
            labels_NN[image, positions_GN[h]] = number + row_N
        number += len(lowest)
    return labels_NN


class _Partition(NamedTuple):
    """Cells of positions that may still be carried into each other: those of equal labels, before and after."""

    before_N: np.ndarray
    after_N: np.ndarray
    settled: frozenset[int] = frozenset()  # positions before, whose relations to all others have been used

    def split(self, colours_NN: np.ndarray, pairs: list[tuple[int, int]]) -> "_Partition | None":
        """What is left if each (i, j) of ``pairs`` says that i goes to j; None if nothing is."""
        before_N, after_N, settled = self
        degree = len(before_N)
        num_colours = int(colours_NN.max()) + 1
        done = set(settled)
        while pairs:
            i, j = pairs.pop()
            done.add(i)
            # The colour of (i, k) decides that of (k, i) and of (k, k), so rows are enough.
            keys = np.concatenate([before_N, after_N]) * num_colours + np.concatenate([colours_NN[i], colours_NN[j]])
            labels = np.unique(keys, return_inverse=True)[1]
            before_N, after_N = labels[:degree], labels[degree:]
            sizes = np.bincount(before_N, minlength=int(labels.max()) + 1)
            if (sizes != np.bincount(after_N, minlength=len(sizes))).any():
                return None
            if len(sizes) == degree:
                break
            if not pairs:  # a position alone in its cell has but one place to go, which tells others apart in turn
                place_of_cell = np.empty(len(sizes), np.int64)
                place_of_cell[after_N] = np.arange(degree)
                alone = np.flatnonzero(sizes[before_N] == 1)
                pairs = [(int(k), int(place_of_cell[before_N[k]])) for k in alone if int(k) not in done]
        return _Partition(before_N, after_N, frozenset(done))

    def smallest_cell(self) -> np.ndarray | None:
        """The positions of the smallest cell of two or more, before; None if every cell has one."""
        sizes = np.bincount(self.before_N)
        if len(sizes) == len(self.before_N):
            return None
        cell = np.where(sizes > 1, sizes, len(self.before_N) + 1).argmin()
        return np.flatnonzero(self.before_N == cell)


def _twins(colours_NN: np.ndarray, known_GN: np.ndarray) -> np.ndarray:
    """The smallest position that may be swapped with each position, nothing else being moved: [N]."""
    degree = len(colours_NN)
    twin_N = np.arange(degree)
    for orbit in classes_of(known_GN.min(0)):
        first = int(orbit[0])
        twins = [first]
        for k in orbit[1:].tolist():
            if colours_NN[first, k] == colours_NN[k, first]:
                unlike_N = colours_NN[first] != colours_NN[k]
                unlike_N[[first, k]] = False
                if not unlike_N.any():
                    twins.append(k)
        if len(twins) > 1:
            for h in np.unique(known_GN[:, first], return_index=True)[1]:
                images = known_GN[h, twins]
                twin_N[images] = images.min()
    return twin_N


def automorphisms(colours_NN: np.ndarray, known_GN: np.ndarray) -> tuple[int, list[np.ndarray]]:
    """The permutations of positions that keep the colours of pairs, which are orbitals of the group ``known_GN``.

    Depth-first search along a stabiliser chain, as of partition backtracking: Seress, Permutation Group Algorithms,
    2003, ch. 9. Only one point of each orbit of what is known already is tried; swaps of two positions are known first.

    Returns:
        the order of the group, and permutations that generate it together with ``known_GN``.
    """
    degree = len(colours_NN)
    steps = 0

    def search(partition: _Partition, first: int, image: int) -> np.ndarray | None:
        """A permutation within ``partition`` that sends ``first`` to ``image``."""
        nonlocal steps
        stack = [(partition, first, iter([image]))]
        while stack:
            partition, i, images = stack[-1]
            j = next(images, None)
            if j is None:
                stack.pop()
                continue
            steps += 1
            if steps > SEARCH_STEPS:
                raise ValueError(
                    f"two_closure: undecided after {SEARCH_STEPS} steps of search on {degree} positions; ask for the "
                    "2-closure of a smaller window"
                )
            finer = partition.split(colours_NN, [(i, j)])
            if finer is None:
                continue
            cell = finer.smallest_cell()
            if cell is not None:
                i = int(cell[0])
                stack.append((finer, i, iter(np.flatnonzero(finer.after_N == finer.before_N[i]).tolist())))
                continue
            images_N = np.empty(degree, np.int64)
            images_N[np.argsort(finer.before_N)] = np.argsort(finer.after_N)
            if all((colours_NN[images_N[k], images_N] == colours_NN[k]).all() for k in range(degree)):
                return images_N
        return None

    twin_N = _twins(colours_NN, known_GN)
    swaps = []
    for k in np.flatnonzero(twin_N != np.arange(degree)):
        swap = np.arange(degree)
        swap[[k, twin_N[k]]] = twin_N[k], k
        swaps.append(swap)

    levels, stabiliser_GN, free_N = [], known_GN, np.ones(degree, bool)
    orbit_N = np.unique(np.diagonal(colours_NN), return_inverse=True)[1]
    partition = _Partition(orbit_N, orbit_N)
    while (cell := partition.smallest_cell()) is not None:
        point = int(cell[0])
        free, lowest_free_N = np.flatnonzero(free_N), np.arange(degree)
        np.minimum.at(representative_N := np.full(degree, degree), twin_N[free], free)
        lowest_free_N[free] = representative_N[twin_N[free]]
        levels.append((partition, point, cell, [stabiliser_GN.min(0).astype(np.int64), lowest_free_N]))
        free_N[point] = False
        partition = partition.split(colours_NN, [(point, point)])
        assert partition is not None, "the identity keeps the colours"
        stabiliser_GN = stabiliser_GN[stabiliser_GN[:, point] == point]

    order, found = 1, []
    for partition, point, cell, known in reversed(levels):
        label_N = components([*known, *found])
        refused: set[int] = set()
        for candidate in cell.tolist():
            if label_N[candidate] == label_N[point] or int(label_N[candidate]) in refused:
                continue
            permutation = search(partition, point, candidate)
            if permutation is None:
                refused.add(int(label_N[candidate]))
            else:
                found.append(permutation)
                label_N = components([*known, *found])
                refused = {int(label_N[k]) for k in refused}
        order *= int((label_N == label_N[point]).sum())
    return order, swaps + found
