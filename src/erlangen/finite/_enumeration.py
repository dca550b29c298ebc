"""Lists of elements, cycles and orbits."""

from collections.abc import Iterator, Sequence

import numpy as np

MAX_BYTES = 2**28  # of the list of all elements
CHUNK = 2**22  # entries of a temporary array


def close_under_products(
    generators: list[np.ndarray], degree: int, num_letters: int, max_order: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """All products of generators, given and returned as rows [W].

    Returns:
        rows [G, W], the numbers of s h for each generator s and element h [S, G], and for each h a pair (generator s,
        parent p) with h = s p.
    """
    width = len(generators[0])
    dtype = (
        np.uint8 if max(degree, num_letters) <= 2**8 else np.uint16 if max(degree, num_letters) <= 2**16 else np.uint32
    )
    varies = width > degree + num_letters
    identity = np.concatenate([np.arange(degree), np.tile(np.arange(num_letters), degree if varies else 1)])
    rows_GW = np.empty((min(16, max_order + 1), width), dtype)
    rows_GW[0] = identity
    numbers = {rows_GW[0].tobytes(): 0}
    left: list[list[int]] = [[] for _ in generators]
    parents = [(-1, -1)]
    small = [g.astype(dtype) for g in generators]
    start = 0
    while start < len(numbers):
        stop = min(len(numbers), start + max(1, CHUNK // width))
        positions_CN = rows_GW[start:stop, :degree]
        products = []
        for s in small:
            parts = [s[:degree][positions_CN]]
            if varies:
                letters_CNL = rows_GW[start:stop, degree:].reshape(-1, degree, num_letters)
                maps_NL = s[degree:].reshape(degree, num_letters)
                parts.append(maps_NL[positions_CN[:, :, None], letters_CNL].reshape(stop - start, -1))
            elif num_letters:
                parts.append(s[degree:][rows_GW[start:stop, degree:]])
            products.append(np.concatenate(parts, axis=1))
        for h in range(start, stop):
            for s, product in enumerate(products):
                row_W = product[h - start]
                key = row_W.tobytes()
                number = numbers.get(key)
                if number is None:
                    number = len(numbers)
                    if number >= max_order or (number + 1) * rows_GW[0].nbytes > MAX_BYTES:
                        limit = f"max_order {max_order}" if number >= max_order else "256 MiB of elements"
                        raise ValueError(
                            f"PermutationGroup: the group is larger than {limit}: {number} elements were found and the "
                            "generators make more; give max_order, use a smaller group, or a shorter window"
                        )
                    if number == len(rows_GW):
                        larger = np.empty((min(2 * number, max_order), width), dtype)
                        larger[:number] = rows_GW
                        rows_GW = larger
                    rows_GW[number] = row_W
                    numbers[key] = number
                    parents.append((s, h))
                left[s].append(number)
        start = stop
    order = len(numbers)
    del numbers  # as large as the rows
    return rows_GW if order == len(rows_GW) else rows_GW[:order].copy(), np.array(left), parents


def weigh(weights_RW: np.ndarray, images: np.ndarray) -> np.ndarray:
    keys = np.zeros(images.shape[:-1], np.uint64)
    for r, weights_W in enumerate(weights_RW):
        keys += weights_W[images[..., r]]
    return keys


def cycles_of(positions: Sequence[int]) -> Iterator[list[int]]:
    """The cycles, also those of one position, in the order of their first positions."""
    seen = [False] * len(positions)
    for start in range(len(positions)):
        cycle, i = [], start
        while not seen[i]:
            seen[i] = True
            cycle.append(i)
            i = positions[i]
        if cycle:
            yield cycle


def components(maps: Sequence[np.ndarray]) -> np.ndarray:
    """The smallest point connected to each point by edges from i to map[i]."""
    label = np.arange(len(maps[0]))
    while True:
        lower = label.copy()
        for image in maps:
            least = np.minimum(label, label[image])
            np.minimum.at(lower, label, least)
            np.minimum.at(lower, label[image], least)
        while (lower[lower] != lower).any():
            lower = lower[lower]
        if (lower == label).all():
            return label
        label = lower


def classes_of(labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """The sorted arrays of indices with equal labels, in the order of the labels."""
    order = np.argsort(labels, kind="stable")
    return tuple(np.split(order, np.flatnonzero(np.diff(labels[order])) + 1))
