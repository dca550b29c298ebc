"""Which of one side belongs to which of the other: assignments of largest total similarity."""

import numpy as np
import torch
from torch import Tensor

EXACT = 512  # up to this size an assignment is exact; beyond, best pairs are taken in turn


def assignment(similarity: Tensor) -> Tensor:
    """The permutation p of largest ``similarity[i, p[i]]`` in sum: exact, by shortest augmenting paths.

    Kuhn's Hungarian method with potentials, O(n³): what the potentials of rows and columns give at once is taken, and
    each row that is left over finds its shortest path (Jonker and Volgenant, Computing 38, 1987).

    Args:
        similarity: [n, n], finite.

    Returns:
        int64 [n].
    """
    cost = -similarity.detach().double().cpu().numpy()
    size = len(cost)
    column_potential = cost.min(axis=0)
    row_potential = (cost - column_potential).min(axis=1)
    row_of, column_of = np.full(size, -1), np.full(size, -1)
    for row, column in np.argwhere(cost - column_potential == row_potential[:, None]):
        if row_of[column] < 0 and column_of[row] < 0:
            row_of[column], column_of[row] = row, column
    for start in np.flatnonzero(column_of < 0):
        slack, closed = np.full(size, np.inf), np.zeros(size)
        previous = np.zeros(size, dtype=np.int64)
        rows, columns, lengths = [], [], [0.0]
        row = start
        while row >= 0:
            reduced = cost[row] - column_potential
            reduced += lengths[-1] - row_potential[row]
            reduced += closed
            better = reduced < slack
            np.copyto(slack, reduced, where=better)
            previous[better] = row
            column = int(slack.argmin())
            rows.append(row)
            columns.append(column)
            lengths.append(slack[column])
            slack[column] = closed[column] = np.inf
            row = row_of[column]
        left = lengths[-1] - np.array(lengths)
        row_potential[rows] += left[:-1]
        column_potential[columns] -= left[1:]
        while row != start:
            row = previous[column]
            row_of[column] = row
            column_of[row], column = column, column_of[row]
    return torch.from_numpy(column_of)


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
