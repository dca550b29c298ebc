"""Energies and transfer between channels, against sums over the group with dense matrices."""

import numpy as np
import pytest
import torch
from finite_cases import WINDOW_GROUPS, character_formula, permutation_matrices

from erlangen.finite import (
    cyclic,
    dihedral,
    reversal,
    reverse_complement,
)
from erlangen.finite.channels import (
    channel_energies,
    channel_transfer,
    energy_table,
    isotypic_basis,
    orbit_blocks,
    transfer_table,
)
from erlangen.finite.irreps import Representation

GROUPS = [cyclic(1), *WINDOW_GROUPS]


@pytest.fixture(params=GROUPS, ids=repr)
def group(request):
    return request.param


def test_energies_are_those_of_the_projections(group, generator):
    y = torch.randn(2, 3, group.degree, 4, generator=generator, dtype=torch.float64)
    energies = channel_energies(y, group)
    expected = np.stack([np.square(p @ y.numpy()).sum((-2, -1)) for p in character_formula(group).numpy()], -1)
    np.testing.assert_allclose(energies, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(energies.sum(-1), y.square().sum((-2, -1)), rtol=1e-12, atol=0)  # Parseval
    if energies.shape[-1] > 1:
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(energies.flip(-1), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("group", [group for group in GROUPS if group.num_letters], ids=repr)
def test_energies_of_positions_and_letters_together(group, generator):
    y = torch.randn(2, group.degree, group.num_letters, generator=generator, dtype=torch.float64)
    energies = channel_energies(y, group, letters=True)
    flat = y.numpy().reshape(2, -1)
    expected = np.stack([np.square(flat @ p.T).sum(-1) for p in character_formula(group, letters=True).numpy()], -1)
    np.testing.assert_allclose(energies, expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(energies.sum(-1), y.square().sum((-2, -1)), rtol=1e-12, atol=0)


def test_energies_of_features_that_carry_a_representation(group, generator):
    """Against dense matrices P_h ⊗ B_h; and the mean over the group has only its trivial part."""
    representation = Representation(group, [1 + k % 2 for k in range(len(group.irreps))])
    y = torch.randn(2, group.degree, representation.dim, generator=generator, dtype=torch.float64)
    energies = channel_energies(y, group, representation=representation)
    positions = permutation_matrices(group.positions)
    action = [np.kron(p, representation.matrix(h).numpy()) for h, p in enumerate(positions)]
    expected = []
    for irrep in group.irreps:
        chi = irrep.character[group.class_of]
        projector = irrep.dimension / (chi @ chi) * sum(c * m for c, m in zip(chi, action))
        expected.append(np.square(y.numpy().reshape(2, -1) @ projector.T).sum(-1))
    np.testing.assert_allclose(energies, np.stack(expected, -1), rtol=0, atol=1e-10)
    torch.testing.assert_close(energies.sum(-1), y.square().sum((-2, -1)), rtol=1e-12, atol=0)
    mean = torch.stack([representation.act(h, group.permute(h, y)) for h in range(group.order)]).mean(0)
    assert energy_table(mean, group, representation=representation)["1"] == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("site", "with_letters", "positions_only"),
    [("GAATTC", 1.0, 0.5), ("CACGTG", 1.0, 0.5), ("GAAAAG", 0.5, 1.0), ("AAAAAA", 0.5, 1.0)],
)
def test_palindromes(site, with_letters, positions_only):
    """Restriction sites are palindromes of the reverse complement, not of the reversal."""
    group = reverse_complement(6)
    x = torch.eye(4, dtype=torch.float64)[["ACGT".index(letter) for letter in site]]
    trivial = group.irreps[0].name
    assert energy_table(x, group, letters=True)[trivial] == pytest.approx(with_letters, abs=1e-12)
    assert energy_table(x, group)[trivial] == pytest.approx(positions_only, abs=1e-12)


def test_transfer_is_that_of_the_projections(group, generator):
    a = torch.rand(2, 3, group.degree, group.degree, generator=generator, dtype=torch.float64).softmax(-1)
    shares = channel_transfer(a, group)
    ps = character_formula(group).numpy()
    expected = np.stack([np.stack([np.square(p @ a.numpy() @ q).sum((-2, -1)) for q in ps], -1) for p in ps], -2)
    expected /= np.square(a.numpy()).sum((-2, -1))[..., None, None]
    np.testing.assert_allclose(shares, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(shares.sum((-2, -1)), torch.ones(2, 3, dtype=torch.float64), rtol=1e-12, atol=0)
    if len(ps) > 1:
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(shares.mT, expected, rtol=0, atol=1e-6)


def test_transfer_is_diagonal_where_the_map_commutes(group, generator):
    a = torch.randn(group.degree, group.degree, generator=generator, dtype=torch.float64)
    matrices = torch.from_numpy(permutation_matrices(group.positions))
    average = (matrices @ a @ matrices.mT).mean(0)
    shares = channel_transfer(average, group)
    assert (shares - shares.diag().diag()).abs().max() < 1e-13
    loose = channel_transfer(a, group)
    if len(loose) > 1:
        assert (loose - loose.diag().diag()).sum() > 1e-2
    table = transfer_table(torch.stack([average, average]), group)
    for name, share in zip(table, shares.diag().tolist()):
        assert table[name][name] == pytest.approx(share, abs=1e-13)


def test_transfer_keeps_its_sides_apart():
    """A map that writes everything to one position from all of them: from the trivial channel, to all."""
    group = cyclic(4)
    a = torch.zeros(4, 4, dtype=torch.float64)
    a[0] = 1.0
    table = transfer_table(a, group)
    trivial = group.irreps[0].name
    assert sum(row[trivial] for row in table.values()) == pytest.approx(1)
    assert table[trivial][trivial] == pytest.approx(1 / 4)
    assert sum(table[trivial].values()) == pytest.approx(1 / 4)


def test_gradients(generator):
    y = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    a = torch.rand(5, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    group = dihedral(5)
    assert torch.autograd.gradcheck(lambda y: channel_energies(y, group), y, fast_mode=True)
    assert torch.autograd.gradcheck(lambda a: channel_transfer(a, group), a, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_summed_in_float32(dtype, generator):
    y = torch.randn(6, 3, generator=generator).to(dtype)
    energies = channel_energies(y, cyclic(6))
    assert energies.dtype == torch.float32
    torch.testing.assert_close(energies.double(), channel_energies(y.double(), cyclic(6)), rtol=1e-5, atol=1e-6)
    a = torch.rand(6, 6, generator=generator).to(dtype)
    torch.testing.assert_close(
        channel_transfer(a, cyclic(6)).double(), channel_transfer(a.double(), cyclic(6)), rtol=1e-5, atol=1e-6
    )


def test_long_windows(generator):
    """Reverse complement of 4,096 positions, where a projector would be 16 million numbers."""
    group = reverse_complement(4096)
    y = torch.randn(4096, 2, generator=generator, dtype=torch.float64)
    even, odd = (y + y.flip(0)) / 2, (y - y.flip(0)) / 2
    energies = channel_energies(y, group)
    expected = torch.stack([even.square().sum(), odd.square().sum()])
    torch.testing.assert_close(energies, expected, rtol=1e-12, atol=0)
    a = torch.zeros(1024, 1024)
    a[:, 0] = 1.0  # from both channels to the even one
    shares = channel_transfer(a, reverse_complement(1024))
    torch.testing.assert_close(shares, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), rtol=0, atol=1e-5)


def test_orbit_blocks_join_orbits_alike():
    """Pairs of corners of a hexagon: equal and opposite ones are moved alike, and those one and two apart."""
    group, n = dihedral(6), 6
    positions = group.positions
    blocks = orbit_blocks(group, n * n, lambda h, p: positions[h, p // n] * n + positions[h, p % n])
    assert sorted(np.concatenate([block.points.ravel() for block in blocks]).tolist()) == list(range(n * n))
    assert sorted(block.points.shape for block in blocks) == [(2, 6), (2, 12)]
    for block in blocks:
        size = block.points.shape[1]
        np.testing.assert_allclose(block.basis @ block.basis.T, np.eye(size), rtol=0, atol=1e-13)
    # A group that acts freely has one kind of orbit.
    positions = cyclic(7).positions
    (block,) = orbit_blocks(cyclic(7), 49, lambda h, p: positions[h, p // 7] * 7 + positions[h, p % 7])
    assert block.points.shape == (7, 7)


def test_the_basis_refuses_what_is_no_representation():
    group = cyclic(3)
    with pytest.raises(AssertionError, match="traces are not those of a representation"):
        isotypic_basis(group, np.array([3.0, 1.0, 1.0]), lambda weights: np.eye(3))
    with pytest.raises(AssertionError):
        isotypic_basis(group, np.array([3.0, 0.0, 0.0]), lambda weights: np.eye(3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: channel_energies(torch.zeros(5, 2), g), r"y must have shape .* = \[\.\.\., 6, D\]"),
        (lambda g: channel_energies(torch.zeros(6), g), r"y must have shape"),
        (lambda g: channel_energies(torch.zeros(6, 3), g, letters=True), r"y must have shape .* = \[\.\.\., 6, 4\]"),
        (
            lambda g: channel_energies(torch.zeros(6, 3), g, representation=Representation(g, [1, 1])),
            r"y must have shape .* = \[\.\.\., 6, 2\]",
        ),
        (
            lambda g: channel_energies(torch.zeros(6, 2), g, representation=Representation(reversal(6), [1, 1])),
            "the representation must be one of",
        ),
        (
            lambda g: channel_energies(torch.zeros(6, 4), g, representation=Representation(g, [2, 2]), letters=True),
            "letters=True needs a group that moves letters, and no more; received .* and a representation",
        ),
        (lambda g: channel_energies(torch.zeros(6, 4), cyclic(6), letters=True), "letters=True needs a group"),
        (lambda g: channel_energies(torch.zeros(6, 4, dtype=torch.int64), g), "y must be real floating point"),
        (lambda g: channel_transfer(torch.zeros(5, 6), g), r"attention must have shape \[\.\.\., N, N\] with N = 6"),
        (lambda g: channel_transfer(torch.zeros(2, 6, 6), g), "finite and not zero, received 2 that are not of 2"),
        (lambda g: channel_transfer(torch.full((6, 6), -torch.inf), g), "finite and not zero"),
        (lambda g: channel_transfer(torch.full((6, 6), torch.nan), g), "finite and not zero"),
        (lambda g: energy_table(torch.zeros(6, 2), g), "finite and not all zero"),
        (lambda g: energy_table(torch.full((6, 2), torch.nan), g), "finite and not all zero"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(reverse_complement(6))
