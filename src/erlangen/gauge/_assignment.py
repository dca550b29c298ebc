"""Which of one side belongs to which of the other: assignments of largest total similarity."""

import numpy as np
import torch
from torch import Tensor

EXACT = 512  # up to this size an assignment is exact; beyond, best pairs are taken in turn


def assignment(similarity: Tensor) -> Tensor:
    """The permutation p of largest ``similarity[i, p[i]]`` in sum: exact, by shortest augmenting paths.

    Kuhn's Hungarian method with potentials, O(n³).

    Args:
        similarity: [n, n], finite.

    Returns:
        int64 [n].
    """
    cost = -similarity.detach().double().cpu().numpy()
    size = len(cost)
    if size == 1:
        return torch.zeros(1, dtype=torch.int64)
    # Row and column 0 are a virtual start; row_of[j] is the row that column j is given to.
    row_potential, column_potential = np.zeros(size + 1), np.zeros(size + 1)
    row_of = np.zeros(size + 1, dtype=np.int64)
    for row in range(1, size + 1):
        row_of[0] = row
        column = 0
        slack = np.full(size + 1, np.inf)
        previous = np.zeros(size + 1, dtype=np.int64)
        used = np.zeros(size + 1, dtype=bool)
        while row_of[column]:
            used[column] = True
            current = row_of[column]
            free = np.flatnonzero(~used[1:]) + 1
            reduced = cost[current - 1, free - 1] - row_potential[current] - column_potential[free]
            better = reduced < slack[free]
            slack[free[better]] = reduced[better]
            previous[free[better]] = column
            nearest = free[np.argmin(slack[free])]
            step = slack[nearest]
            row_potential[row_of[used]] += step
            column_potential[used] -= step
            slack[free] -= step
            column = nearest
        while column:
            row_of[column] = row_of[previous[column]]
            column = previous[column]
    result = torch.empty(size, dtype=torch.int64)
    result[torch.from_numpy(row_of[1:] - 1)] = torch.arange(size)
    return result


def matching(similarity: Tensor) -> Tensor:
    """A permutation p of large ``similarity[i, p[i]]`` in sum: exact up to `EXACT` rows, beyond of best pairs in turn.

    Args:
        similarity: [n, n], finite.

    Returns:
        int64 [n].
    """
    if len(similarity) <= EXACT:
        return assignment(similarity)
    result = torch.full((len(similarity),), -1, dtype=torch.int64)
    rows = columns = torch.arange(len(similarity))
    while len(rows) > EXACT:
        best, best_back = similarity.argmax(dim=1).cpu(), similarity.argmax(dim=0).cpu()
        mutual = best_back[best] == torch.arange(len(rows))
        if not mutual.any():  # only ties are left
            break
        result[rows[mutual]] = columns[best[mutual]]
        free = torch.ones(len(columns), dtype=torch.bool)
        free[best[mutual]] = False
        rows, columns, similarity = rows[~mutual], columns[free], similarity[~mutual][:, free]
    if len(rows):
        result[rows] = columns[assignment(similarity)] if len(rows) <= EXACT else columns
    return result


def grouped_assignment(similarity: Tensor, group_size: int) -> Tensor:
    """The best assignment of query heads that keeps those of a key/value head together: exact.

    Heads are matched within every pair of groups first, then the groups.

    Args:
        similarity: [heads, heads].
        group_size: query heads to a key/value head.

    Returns:
        int64 [heads].
    """
    heads = len(similarity)
    groups = heads // group_size
    if group_size == 1:
        return assignment(similarity)
    blocks = similarity.unflatten(0, (groups, group_size)).unflatten(2, (groups, group_size)).transpose(1, 2)
    inner = [[assignment(blocks[i, j]) for j in range(groups)] for i in range(groups)]
    totals = torch.stack([
        torch.stack([blocks[i, j][torch.arange(group_size), inner[i][j]].sum() for j in range(groups)])
        for i in range(groups)
    ])  # fmt: skip
    chosen = assignment(totals).tolist()
    return torch.cat([j * group_size + inner[i][j] for i, j in enumerate(chosen)])
