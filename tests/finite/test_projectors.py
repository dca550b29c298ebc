"""Projectors on channels against the character formula summed element by element, and what defines them."""

import tracemalloc

import numpy as np
import pytest
import torch
from finite_cases import C3_C8, IRREP_GROUPS, character_formula, group_id
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from erlangen.finite import (
    alternating,
    cyclic,
    dihedral,
    quaternion,
    reversal,
    reverse_complement,
    symmetric,
)
from erlangen.finite import projectors as projectors_module
from erlangen.finite.projectors import Channels, projector_errors, projectors

CASES = [(group, letters) for group in IRREP_GROUPS for letters in ([False, True] if group.num_letters else [False])]
IDS = [group_id(group) + ("-letters" if letters else "") for group, letters in CASES]


@pytest.mark.parametrize(("group", "letters"), CASES, ids=IDS)
def test_projectors_are_the_character_formula(group, letters):
    result = projectors(group, letters=letters)
    assert result.dtype == torch.float64
    assert max(projector_errors(result, group, letters=letters)) <= 1e-12
    assert (result - character_formula(group, letters)).abs().max() <= 1e-12
    channels = group.channels(letters)
    ranks = result.diagonal(dim1=1, dim2=2).sum(1)
    fixed = group.permutation_character(letters=letters)
    sizes = np.array([len(c) for c in group.conjugacy_classes])
    for irrep, rank in zip(channels, ranks):
        copies = (sizes * fixed * irrep.character).sum() / (irrep.endo * group.order)
        assert abs(rank - copies * irrep.dimension) < 1e-9
    assert torch.equal(group.projectors(letters=letters), result)
    assert torch.equal(projectors(group, torch.float32, letters), result.float())


@pytest.mark.parametrize("length", [2, 5, 8])
def test_reverse_complement_halves_the_points(length):
    """No point is its own reverse complement, so both channels have dimension 2 k of the 4 k points."""
    result = projectors(reverse_complement(length), letters=True)
    assert [i.name for i in reverse_complement(length).channels(True)] == ["1", "sign"]
    assert torch.allclose(result.diagonal(dim1=1, dim2=2).sum(1), torch.tensor([2.0, 2.0]).double() * length)


@pytest.mark.parametrize("group", [cyclic(5), quaternion()], ids=group_id)
def test_the_published_formula_gives_no_projectors(group):
    """arXiv:2507.14908 has d / G sum_h chi(h) P_h; with real characters that needs the norm <chi, chi>."""
    published = projector_errors(character_formula(group, with_norm=False), group)
    assert published.idempotent > 0.5 and published.complete > 0.3
    assert max(projector_errors(projectors(group), group)) <= 1e-12


def test_errors_see_each_defect():
    group = dihedral(5)
    right = projectors(group)
    assert max(projector_errors(right, group)) <= 1e-12

    def errors_of(change):
        wrong = right.clone()
        change(wrong)
        return projector_errors(wrong, group)

    def bump(p):
        p[1, 0, 1] += 1e-9

    def swap_two_positions(p):
        p[:] = p[:, [1, 0, 2, 3, 4]][:, :, [1, 0, 2, 3, 4]]

    def lose_one(p):
        p[1] = 0

    def count_twice(p):
        p[1] += p[2]

    bumped = errors_of(bump)
    assert min(bumped.symmetric, bumped.idempotent, bumped.orthogonal, bumped.complete, bumped.commuting) > 1e-10
    swapped = errors_of(swap_two_positions)
    assert swapped.commuting > 0.1 and max(swapped[:4]) <= 1e-12
    lost = errors_of(lose_one)
    assert lost.complete > 0.1 and max(lost.idempotent, lost.orthogonal, lost.commuting) <= 1e-12
    twice = errors_of(count_twice)
    assert twice.orthogonal > 0.1 and twice.complete > 0.1 and twice.idempotent <= 1e-12


def test_errors_of_many_large_projectors_are_sampled():
    group = dihedral(128)  # 65 projectors
    right = projectors(group)
    assert max(projector_errors(right, group)) <= 1e-12
    right[3] += right[7]
    assert projector_errors(right, group).orthogonal > 0.1


# --- without matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "letters"), CASES, ids=IDS)
def test_channels_apply_the_projectors(group, letters):
    generator = torch.Generator().manual_seed(0)
    channels, dense = Channels(group, letters), character_formula(group, letters)
    assert channels.irreps == group.channels(letters)
    width = group.num_letters if letters else 3
    x = torch.randn(2, 4, group.degree, width, generator=generator, dtype=torch.float64)
    flat = x.flatten(-2)[..., None] if letters else x
    energies = channels.energies(x)
    assert energies.shape == (2, 4, len(dense))
    for k, irrep in enumerate(channels.irreps):
        expected = (dense[k] @ flat).reshape(x.shape)
        assert (channels.apply(k, x) - expected).abs().max() < 1e-12
        assert torch.equal(channels.apply(irrep, x), channels.apply(k, x))
        assert (energies[..., k] - expected.square().sum((-2, -1))).abs().max() < 1e-11
        assert (channels.apply(k, x.float()).double() - expected).abs().max() < 1e-5
    assert (energies.sum(-1) - x.square().sum((-2, -1))).abs().max() < 1e-11  # Parseval


@pytest.mark.parametrize("group", [symmetric(4), alternating(5), C3_C8], ids=group_id)
def test_orbits_too_large_for_a_matrix(group, monkeypatch):
    small = Channels(group)
    monkeypatch.setattr(projectors_module, "_MAX_BLOCK_ENTRIES", 0)
    large = Channels(group)
    x = torch.randn(2, group.degree, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for k in range(len(small.irreps)):
        assert (small.apply(k, x) - large.apply(k, x)).abs().max() < 1e-12
    assert (small.energies(x) - large.energies(x)).abs().max() < 1e-11


@pytest.mark.parametrize("group", [dihedral(5), quaternion(), symmetric(4)], ids=group_id)
def test_channels_are_differentiable(group):
    channels = Channels(group)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(group.degree, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: channels.apply(1, x), x)
    assert torch.autograd.gradcheck(channels.energies, x)


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


def measured(work):
    """The result, the peak of numpy's memory in bytes, and the entries of the largest tensor."""
    with LargestTensor():  # what torch imports for its first mode is not ours
        torch.ones(1)
    tracemalloc.start()
    try:
        with LargestTensor() as largest:
            result = work()
        return result, tracemalloc.get_traced_memory()[1], largest.entries
    finally:
        tracemalloc.stop()


def test_the_measurement_sees_a_matrix():
    _, peak, entries = measured(lambda: torch.from_numpy(np.ones((1024, 1024))) + 1)
    assert peak >= 8 * 2**20 and entries >= 2**20


def test_a_ring_of_4096_positions_needs_no_matrix():
    n = 4096
    group = dihedral(n)
    irreps = group.irreps
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def work():
        channels = Channels(group)
        return channels, [channels.apply(k, x) for k in (0, 1, 2, 1000, 2048)], channels.energies(x)

    (channels, parts, energies), peak, entries = measured(work)
    characters = len(irreps) * len(group.conjugacy_classes) * 8
    assert peak < characters + n * n * 8 / 2 and entries < n * n / 8
    # the oracle: channels of a ring are the frequencies
    spectrum = np.fft.fft(x.numpy(), axis=0)
    power = np.abs(spectrum) ** 2 / n
    power = np.concatenate([power[:1], power[n // 2 : n // 2 + 1], 2 * power[1 : n // 2]]).sum(1)
    assert [i.dimension for i in channels.irreps] == [1, 1] + [2] * (n // 2 - 1)
    assert np.abs(energies.numpy() - power).max() < 1e-9
    for part, frequency in zip(parts, (0, n // 2, 1, 999, n // 2 - 1)):
        only = np.zeros_like(spectrum)
        only[[frequency, -frequency]] = spectrum[[frequency, -frequency]]
        assert np.abs(part.numpy() - np.fft.ifft(only, axis=0).real).max() < 1e-11


def test_reverse_complement_of_1024_positions_needs_no_matrix():
    group = reverse_complement(1024)
    x = torch.randn(1024, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def work():
        channels = Channels(group, letters=True)
        return channels.apply(0, x), channels.apply(1, x), channels.energies(x)

    (even, odd, energies), peak, entries = measured(work)
    assert peak < 2**23 and entries <= 2**16
    moved = x.flip(0).flip(1)  # ACGT backwards is TGCA
    assert (even - (x + moved) / 2).abs().max() < 1e-12 and (odd - (x - moved) / 2).abs().max() < 1e-12
    assert torch.allclose(energies, torch.stack([even.square().sum(), odd.square().sum()]))


def test_bad_input_is_explained():
    group = reversal(4)
    with pytest.raises(ValueError, match=r"letters=True needs a group that moves letters"):
        projectors(group, letters=True)
    with pytest.raises(ValueError, match=r"dtype is a floating one, received torch.int64"):
        projectors(group, torch.int64)
    with pytest.raises(ValueError, match=r"Channels\(group\).apply"):
        projectors(reverse_complement(4096), letters=True)
    channels = Channels(group)
    with pytest.raises(ValueError, match=r"features are floating \[..., 4, D\], received \[5, 2\]"):
        channels.apply(0, torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"received \[4, 2\] of torch.int64"):
        channels.energies(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"features are floating \[..., 4, 4\]"):
        Channels(reverse_complement(4), letters=True).energies(torch.zeros(4, 3))
    for k in (2, -1, True, "1"):
        with pytest.raises(ValueError, match=r"channels are numbered 0 to 1"):
            channels.apply(k, torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"irrep sign of .* is not among the channels"):
        Channels(symmetric(3)).apply(symmetric(3).irreps[1], torch.zeros(3, 2))
