"""Groups that the tests share, with what they have worked out of them, and the oracles over all elements."""

import functools

import numpy as np
import torch

from erlangen.finite import (
    PermutationGroup,
    alternating,
    cyclic,
    dihedral,
    direct_product,
    inverted_repeat,
    klein,
    quaternion,
    reversal,
    reverse_complement,
    symmetric,
    wreath_product,
)

F20 = PermutationGroup([[1, 2, 3, 4, 0], [0, 2, 4, 1, 3]], name="AGL(1, 5)")
F21 = PermutationGroup([[1, 2, 3, 4, 5, 6, 0], [0, 2, 4, 6, 1, 3, 5]], name="F21")
M11 = PermutationGroup([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0], [0, 1, 6, 9, 5, 3, 10, 2, 8, 4, 7]], name="M11")
DIC3 = PermutationGroup(
    [[1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 11, 6], [6, 11, 10, 9, 8, 7, 3, 2, 1, 0, 5, 4]], name="dicyclic of order 12"
)
_VECTORS = [(a, b) for a in range(3) for b in range(3) if a or b]
SL23 = PermutationGroup(
    [
        [_VECTORS.index(((a + b) % 3, b)) for a, b in _VECTORS],
        [_VECTORS.index(((-b) % 3, a)) for a, b in _VECTORS],
    ],
    name="SL(2, 3)",
)
# a half that is abelian, and a linear character that is not real outside it
C3_C8 = PermutationGroup([[0, 5, 1, 3, 4, 7, 6, 2], [3, 1, 5, 4, 0, 2, 6, 7]], name="of order 24")
INTRANSITIVE = PermutationGroup([[1, 2, 0, 3, 4, 5, 6, 7], [0, 1, 2, 4, 3, 6, 5, 7]], name="on orbits 3, 2, 2, 1")
UNLIKE_ORBITS = PermutationGroup([[1, 2, 0, 4, 3, 5, 7, 8, 6]], name="on orbits 3, 2, 1, 3")
ONLY_LETTERS = PermutationGroup([([0, 1], "CGAT"), ([0, 1], "CATG")], letters="ACGT", name="letters only")
LETTERS_VARY = PermutationGroup([([1, 0, 2], ["TGCA", "TGCA", "CATG"])], letters="ACGT", name="letters by position")

# for layers: small, of each kind, with and without letters
LAYER_GROUPS = [
    cyclic(5),
    dihedral(4),
    symmetric(3),
    symmetric(4),
    alternating(4),
    klein(),
    quaternion(),
    reversal(5),
    reverse_complement(6),
    direct_product(cyclic(2), cyclic(3)),
]
# for parts of windows: orbits of several sizes too
WINDOW_GROUPS = [
    *LAYER_GROUPS,
    cyclic(6),
    dihedral(5),
    inverted_repeat(2, 1),
    wreath_product(cyclic(2), cyclic(2)),
    UNLIKE_ORBITS,
]
# for irreps and projectors: every named kind, every algorithm, every kind of irrep
IRREP_GROUPS = [
    cyclic(1),
    cyclic(5),
    cyclic(6),
    dihedral(4),
    dihedral(5),
    dihedral(6),
    symmetric(3),
    symmetric(4),
    symmetric(5),
    alternating(4),
    alternating(5),
    reversal(5),
    klein(),
    quaternion(),
    reverse_complement(4),
    reverse_complement(5),
    inverted_repeat(3, 2),
    direct_product(cyclic(6), cyclic(4)),
    direct_product(symmetric(3), cyclic(3)),
    direct_product(quaternion(), cyclic(3)),
    direct_product(quaternion(), alternating(4)),
    wreath_product(cyclic(2), cyclic(2)),
    wreath_product(symmetric(3), symmetric(2)),
    wreath_product(cyclic(3), cyclic(4)),
    F20,
    F21,
    DIC3,
    SL23,
    C3_C8,
    INTRANSITIVE,
    ONLY_LETTERS,
    LETTERS_VARY,
]


def group_id(group):
    return group.name.replace(" ", "")


def some_elements(group, most=8):
    """All elements of a small group; of a larger one the generators, which say it all, and the last."""
    if group.order <= most:
        return group.elements
    return [group.element(h) for h in dict.fromkeys([*group.generator_numbers, group.order - 1])]


def permutation_matrices(images):
    """P_h[image of i, i] = 1: [G, n] -> [G, n, n]."""
    return np.eye(images.shape[1])[images].swapaxes(1, 2)


@functools.cache
def character_formula(group, letters=False, *, with_norm=True):
    """The projectors d / (G <chi, chi>) sum_h chi(h) P_h over all elements, as a tensor [channels, n, n]."""
    matrices = permutation_matrices(group.points if letters else group.positions)
    result = []
    for irrep in group.channels(letters):
        chi = irrep.character[group.class_of]
        scale = irrep.dimension / (chi @ chi if with_norm else group.order)
        result.append(scale * np.einsum("h,hij->ij", chi, matrices))
    return torch.from_numpy(np.stack(result))


def left_translation(group, h):
    """L_h on functions of the group: e_g goes to e_hg."""
    matrix = np.zeros((group.order, group.order))
    matrix[group.multiply(h, np.arange(group.order)), np.arange(group.order)] = 1
    return matrix
