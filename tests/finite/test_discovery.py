"""Energies, their null distributions and false discoveries: against enumeration, simulation and real sites."""

import itertools

import numpy as np
import pytest
import scipy.stats
import torch

from erlangen.finite import (
    UNKNOWN,
    PermutationGroup,
    cyclic,
    dihedral,
    discover,
    encode,
    energy_null,
    false_discovery_rates,
    invariant_energy,
    inverted_repeat,
    read_fasta,
    read_pfm,
    reversal,
    reverse_complement,
    scan,
    strand_correlation,
    symmetric,
)

FREQUENCIES = np.array([0.35, 0.2, 0.15, 0.3])
COMPLEMENT = np.array([3, 2, 1, 0])
SHIFTED_COMPLEMENT = PermutationGroup([([1, 2, 3, 4, 5, 0], "TGCA")], letters="ACGT")
GROUPS = [
    reverse_complement(6),
    reverse_complement(5),
    reversal(6),
    cyclic(6),
    dihedral(6),
    symmetric(6),
    inverted_repeat(2, 2),
    SHIFTED_COMPLEMENT,
]


def strands(length):
    """The four elements: nothing, mirrored, complemented, both."""
    mirror = list(range(length))[::-1]
    return PermutationGroup([(mirror, None), (list(range(length)), "TGCA")], letters="ACGT")


def turns_and_strands(length):
    shift = [*range(1, length), 0]
    plain = list(range(length))
    return PermutationGroup([(shift, None), (plain[::-1], None), (plain, "TGCA")], letters="ACGT")


def all_windows(length):
    """Every window of DNA, and the probability of each."""
    windows = np.array(list(itertools.product(range(4), repeat=length)))
    return windows, FREQUENCIES[windows].prod(1)


def agreement(group, h, windows):
    """Share of letters that stand where an element puts their images, by the group's own action."""
    return (group.act_on_tokens(h, torch.as_tensor(windows)).numpy() == windows).mean(-1)


def palindromes(rng, number, length, noise=0.0):
    half = rng.choice(4, (number, length // 2), p=FREQUENCIES)
    windows = np.concatenate([half, COMPLEMENT[half[:, ::-1]]], axis=1)
    return np.where(rng.random(windows.shape) < noise, rng.choice(4, windows.shape, p=FREQUENCIES), windows)


def assert_close(actual, expected, tolerance=1e-12):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def assert_uniform(p, at_least, rng):
    """p-values of a discrete statistic: too large on the whole, uniform once ties are broken at random.

    ``at_least`` is the probability of the next larger value. At 1e-3 a test with a fixed seed fails by mistake with
    that chance when it is written, and never after.
    """
    broken = at_least + rng.random(len(p)) * (p - at_least)
    assert scipy.stats.ks_1samp(broken, scipy.stats.uniform.cdf).pvalue > 1e-3
    assert scipy.stats.ks_1samp(p, scipy.stats.uniform.cdf, alternative="greater").pvalue > 1e-3


# --- energies and their null ------------------------------------------------------------------------------------------


def test_sites_by_hand():
    reverse = PermutationGroup([[5, 4, 3, 2, 1, 0]], letters="ACGT")
    for site, energy_both, energy_reverse in (("GAATTC", 1, 0.5), ("CACGTG", 1, 0.5), ("GAAAAG", 0.5, 1)):
        assert invariant_energy(encode(site), reverse_complement(6)) == energy_both
        assert invariant_energy(encode(site), reverse) == energy_reverse
    # The middle letter never agrees with its image, the other four do: (1 + 4/5)/2.
    assert_close(invariant_energy(encode("GAATC"), reverse_complement(5)), 0.9)
    # One turn of four leaves ACAC as it is, two shift no letter to its like: (1 + 0 + 1 + 0)/4.
    assert invariant_energy(encode("ACAC"), cyclic(4)) == 0.5


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_energy_is_the_mean_agreement_and_the_norm_of_the_projection(group):
    rng = np.random.default_rng(0)
    windows = rng.integers(4, size=(30, group.degree))
    energy = invariant_energy(windows, group)
    assert_close(energy, np.mean([agreement(group, h, windows) for h in range(group.order)], axis=0))
    with_letters = PermutationGroup(
        [(g.positions, g.letters) for g in group.generators], letters=group.alphabet or 4
    )  # a group without letters acts on them trivially
    onehot = torch.nn.functional.one_hot(torch.as_tensor(windows), 4).double()
    mean = torch.stack([with_letters.act_on_onehot(h, onehot) for h in range(with_letters.order)]).mean(0)
    assert_close(energy, mean.square().sum((1, 2)).numpy() / group.degree)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.name)
def test_exact_null_is_brute_force(group):
    windows, probabilities = all_windows(group.degree)
    energy = invariant_energy(windows, group)
    null = energy_null(group, FREQUENCIES)
    assert null.samples is None
    assert_close(null.probabilities.sum(), 1)
    assert_close(null.values, np.unique(energy.round(12)))
    expected = [probabilities[energy > value - 1e-9].sum() for value in null.values]
    assert_close(null.p_value(null.values), expected)
    assert_close(null.p_value([0.0, 1.1]), [1, 0])
    with pytest.raises(AssertionError):  # the comparison sees other frequencies
        assert_close(energy_null(group, [0.4, 0.3, 0.2, 0.1]).p_value(null.values), expected)


@pytest.mark.parametrize("length", [36, 37, 4096])
def test_null_of_reverse_complement_is_binomial(length):
    null = energy_null(reverse_complement(length), FREQUENCIES)
    pairs, chance = length // 2, FREQUENCIES @ FREQUENCIES[COMPLEMENT]
    assert_close(null.values, (1 + 2 * np.arange(pairs + 1) / length) / 2)
    expected = scipy.stats.binom.sf(np.arange(-1, pairs), pairs, chance)
    np.testing.assert_allclose(null.p_value(null.values), expected, rtol=1e-9, atol=1e-300)
    uniform = energy_null(reverse_complement(36), [0.25] * 4)
    assert_close(uniform.values @ uniform.probabilities, 0.625)
    np.testing.assert_allclose(uniform.p_value(1.0), 4.0**-18, rtol=1e-12)


def test_inverted_repeats_do_not_mind_their_spacer():
    group = inverted_repeat(3, 4)
    assert_close(invariant_energy(encode("GAACCCCTTC"), group), 1)
    # Two of six letters of the arms differ from their images: 8 of 10 agree.
    assert_close(invariant_energy(encode("GAACCCCTTG"), group), (1 + 0.8) / 2)
    null = energy_null(group, FREQUENCIES)
    chance = FREQUENCIES @ FREQUENCIES[COMPLEMENT]
    assert_close(null.p_value(1.0), chance**3)


def test_sampled_null_where_none_can_be_enumerated():
    group, letters = cyclic(64), np.full(20, 0.05)
    null = energy_null(group, letters, samples=2000, seed=1)
    assert null.samples == 2000
    assert_close(null.p_value(1.0), 1 / 2001)  # never 0
    assert_close(null.p_value(0.0), 1)
    # E Σ n²/|o|/N = (1 + (N - 1) Σ p²)/N for a transitive group without letters
    expected = (1 + 63 * 0.05) / 64
    assert abs(null.values @ null.probabilities - expected) < 5 * 0.005 / np.sqrt(2000) + 1e-4
    again = energy_null(group, letters, samples=2000, seed=1)
    assert (again.values == null.values).all()
    assert energy_null(group, letters, samples=2000, seed=2).values.tolist() != null.values.tolist()


# --- false discoveries ------------------------------------------------------------------------------------------------


def test_false_discovery_rates_against_scipy():
    p = np.random.default_rng(0).random(50) ** 3
    assert_close(false_discovery_rates(p), scipy.stats.false_discovery_control(p, method="bh"))
    assert_close(false_discovery_rates(p, dependent=True), scipy.stats.false_discovery_control(p, method="by"))
    assert false_discovery_rates([]).shape == (0,)
    for wrong in ([0.5, 1.5], [np.nan], [[0.5]], [-0.1]):
        with pytest.raises(ValueError, match="p_values must be"):
            false_discovery_rates(wrong)


# --- scan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [reverse_complement(12), cyclic(8), inverted_repeat(4, 3)], ids=lambda g: g.name)
@pytest.mark.parametrize("given", [True, False])
def test_p_values_are_uniform_under_the_null(group, given):
    rng = np.random.default_rng(2)
    tokens = rng.choice(4, 4000 * group.degree, p=FREQUENCIES)
    found = scan(tokens, group, stride=group.degree, frequencies=FREQUENCIES if given else None)
    assert len(found.p) == 4000
    assert_uniform(found.p, found.null.p_value(found.energy + 2e-9), rng)


def test_the_uniformity_test_sees_wrong_frequencies():
    rng = np.random.default_rng(2)
    skewed = np.array([0.45, 0.05, 0.05, 0.45])
    tokens = rng.choice(4, 4000 * 12, p=skewed)
    found = scan(tokens, reverse_complement(12), stride=12, frequencies=[0.25] * 4)
    with pytest.raises(AssertionError):
        assert_uniform(found.p, found.null.p_value(found.energy + 2e-9), rng)


def test_planted_palindromes_are_found_and_few_others():
    """30 of 300 windows are palindromes with 5 % of letters drawn anew; the rate is kept on average over 60 draws."""
    group, shares, power, uncorrected = reverse_complement(24), [], [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        windows = rng.choice(4, (300, 24), p=FREQUENCIES)
        windows[:30] = palindromes(rng, 30, 24, noise=0.05)
        found = scan(windows.ravel(), group, stride=24, frequencies=FREQUENCIES)
        discoveries = found.discoveries(0.1)
        shares.append((discoveries >= 30).sum() / max(1, len(discoveries)))
        power.append((discoveries < 30).mean() * len(discoveries) / 30 if len(discoveries) else 0)
        uncorrected.append((found.p[30:] <= 0.1).sum() / (found.p <= 0.1).sum())
    error = np.std(shares) / np.sqrt(len(shares))
    assert np.mean(shares) < 0.1 + 2 * error
    assert np.mean(power) > 0.9
    assert np.mean(uncorrected) > 0.3  # what would be wrong without control


def test_overlapping_windows_of_random_letters_give_no_discoveries():
    group, any_found, starts = reverse_complement(20), 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sequences = [rng.choice(4, 120, p=FREQUENCIES) for _ in range(5)]
        found = scan(sequences, group)
        any_found += len(found.discoveries(0.1)) > 0
        sequences[3][40:60] = palindromes(rng, 1, 20)[0]
        planted = scan(sequences, group)
        starts += [(int(planted.sequence[i]), int(planted.start[i])) for i in planted.discoveries()[:1]]
    assert any_found <= 6 + 2 * np.sqrt(6 * 0.9)
    assert set(starts) == {(3, 40)}
    assert len(starts) > 50


def test_what_a_scan_says_of_its_windows():
    tokens = encode("ACGNTGAATTCAA", unknown="N")
    found = scan([tokens, encode("GAATTC")], reverse_complement(6), frequencies=[0.25] * 4)
    assert found.skipped == 4  # those that begin at 0 to 3
    assert found.sequence.tolist() == [0, 0, 0, 0, 1]
    assert found.start.tolist() == [4, 5, 6, 7, 0]
    assert found.energy[[1, 4]].tolist() == [1, 1]
    assert_close(found.p[1], 1 / 64)
    assert found.discoveries(0.999).tolist()[:2] == [1, 4]
    strided = scan(tokens[4:], reverse_complement(6), stride=3, frequencies=[0.25] * 4)
    assert strided.start.tolist() == [0, 3]
    np.testing.assert_array_equal(strided.p, found.p[[0, 3]])
    # None asks for the rule that fits: windows overlap, or do not.
    assert_close(found.q, false_discovery_rates(found.p, dependent=True))
    apart = scan(tokens[4:], reverse_complement(4), stride=4, frequencies=[0.25] * 4)
    assert_close(apart.q, false_discovery_rates(apart.p))
    estimated = scan(encode("AACG"), reverse_complement(4))
    assert estimated.frequencies.tolist() == [0.5, 0.25, 0.25, 0]


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([0, 1, 2], {}, r"is 4 long and cannot be longer than a sequence, received sequence 0 of 3 letters"),
        ([np.arange(4), np.arange(3)], {}, r"received sequence 1 of 3 letters"),
        ([0, 1, 2, 4], {}, r"must be letters 0 to 3, received 4 at \(3,\)"),
        ([0, 1, 2, -2], {}, r"must be letters 0 to 3, received -2"),
        ([0.0, 1.0, 2.0, 3.0], {}, r"of an integer type, received float64"),
        (np.zeros((1, 1, 4), dtype=int), {}, r"a sequence \[length\] or several"),
        ([0, 1, 2, 3], {"stride": 0}, r"stride must be at least 1, received 0"),
        ([0, 1, 2, 3], {"frequencies": [0.5, 0.5]}, r"must be \[4\], received \[2\]"),
        ([0, 1, 2, 3], {"frequencies": [0.5, 0.5, 0.5, 0.5]}, r"have sum 1"),
        ([0, 1, 2, 3], {"frequencies": [0.5, 0.5, 0.5, -0.5]}, r"must not be negative"),
        ([0, 1, 2, 3], {"frequencies": [0, 0.5, 0.25, 0.25]}, r"letter 0 occurs 1 times although its frequency is 0"),
        ([0, 1, 2, 3], {"samples": 0}, r"samples must be at least 1"),
        ([UNKNOWN] * 4, {}, r"all letters are unknown"),
        ([0, 1, UNKNOWN, 3], {}, r"each of 1 windows of 4 letters holds unknown ones"),
    ],
)
def test_bad_scans(tokens, options, message):
    with pytest.raises(ValueError, match=message):
        scan(tokens, reverse_complement(4), **options)


def test_bad_energies():
    with pytest.raises(ValueError, match=r"must be \[..., 4\], received \[2, 5\]"):
        invariant_energy(np.zeros((2, 5), dtype=int), reversal(4))
    with pytest.raises(ValueError, match="leave unknown letters out"):
        invariant_energy([0, 1, UNKNOWN, 3], reverse_complement(4))


# --- discover ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [*GROUPS[:5], inverted_repeat(2, 2), turns_and_strands(6)], ids=lambda g: g.name[:24])
def test_p_values_of_elements_are_brute_force(group):
    """One window, so that the agreement is enumerated: of reflections, long cycles and letters a position."""
    windows, probabilities = all_windows(group.degree)
    for window in np.random.default_rng(3).integers(4, size=(4, group.degree)):
        for row in discover(window[None], group, frequencies=FREQUENCIES).table:
            every = agreement(group, row.number, windows)
            assert_close(row.agreement, agreement(group, row.number, window))
            assert_close(row.expected, probabilities @ every)
            assert_close(row.p, max(probabilities[every > row.agreement - 1e-9].sum(), 2.3e-308))
            assert row.order == group.element_orders[row.number]


def test_pooled_p_values_are_brute_force_and_binomial():
    group = cyclic(3)
    windows, probabilities = all_windows(6)  # two windows of three letters
    every = agreement(group, 1, windows.reshape(-1, 2, 3)).mean(1)
    for pair in ([[0, 0, 1], [3, 3, 3]], [[0, 1, 2], [0, 1, 2]], [[2, 2, 2], [0, 0, 0]]):
        (row,) = discover(pair, group, frequencies=FREQUENCIES).table
        assert_close(row.p, probabilities[every > row.agreement - 1e-9].sum())
    rng = np.random.default_rng(4)
    chance = FREQUENCIES @ FREQUENCIES[COMPLEMENT]
    for number, noise in ((50, 0.9), (2000, 1.0), (2000, 0.9), (2000, 0.8), (40_000, 0.99)):
        windows = palindromes(rng, number, 8, noise)
        (row,) = discover(windows, reverse_complement(8), frequencies=FREQUENCIES).table
        expected = scipy.stats.binom.sf(round(row.agreement * number * 4) - 1, number * 4, chance)
        np.testing.assert_allclose(row.p, expected, rtol=1e-8)


def test_more_agreement_is_never_less_significant():
    """Down to the smallest number that is not 0, where scipy's tail has long vanished."""
    rng = np.random.default_rng(4)
    p = []
    for share in (0, 80, 160, 240, 500):
        windows = rng.choice(4, (500, 8), p=FREQUENCIES)
        windows[:share] = palindromes(rng, share, 8)
        (row,) = discover(windows, reverse_complement(8), frequencies=FREQUENCIES).table
        p.append(row.p)
    assert len(set(p)) == 5
    assert p == sorted(p, reverse=True)
    assert 0 < p[-1] < 1e-300
    assert row.agreement == 1


def test_pooled_p_values_are_uniform_under_the_null():
    rng = np.random.default_rng(6)
    group, p, estimated = reverse_complement(8), [], []
    chance = FREQUENCIES @ FREQUENCIES[COMPLEMENT]
    for _ in range(200):
        windows = rng.choice(4, (20, 8), p=FREQUENCIES)
        (row,) = discover(windows, group, frequencies=FREQUENCIES).table
        p.append((row.p, scipy.stats.binom.sf(round(row.agreement * 80), 80, chance)))
        estimated.append(discover(windows, group).table[0].p)
    assert_uniform(*np.array(p).T, rng)
    # With frequencies from the windows themselves they are a little too large, and never too small.
    assert scipy.stats.ks_1samp(estimated, scipy.stats.uniform.cdf, alternative="greater").pvalue > 0.05


def test_random_windows_respect_nothing():
    group, any_accepted = turns_and_strands(6), 0
    for seed in range(60):
        windows = np.random.default_rng(seed).choice(4, (40, 6), p=FREQUENCIES)
        found = discover(windows, group, rate=0.1, dependent=False)
        any_accepted += any(row.accepted for row in found.table)
        assert found.subgroup.order == 1 or any(row.accepted for row in found.table)
    assert any_accepted <= 6 + 2 * np.sqrt(6 * 0.9)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_palindromes_respect_reverse_complement_and_no_more(noise):
    windows = palindromes(np.random.default_rng(7), 2000, 8, noise)
    found = discover(windows, turns_and_strands(8))
    assert found.subgroup.order == 2
    assert found.subgroup.generators[0].positions == (7, 6, 5, 4, 3, 2, 1, 0)
    assert found.subgroup.generators[0].letters == (3, 2, 1, 0)
    assert found.subgroup.alphabet == "ACGT"
    assert found.table[0].element == '(0 7)(1 6)(2 5)(3 4) "TGCA"'
    # Their two middle letters pair, so a shift by one with complement is accepted too: it is there, and left out.
    assert found.unconfirmed
    everything = PermutationGroup(
        [turns_and_strands(8).elements[row.number] for row in (found.table[0], *found.unconfirmed)], letters="ACGT"
    )
    assert everything.order > 2  # what generating by all accepted elements would have said
    assert str(found).startswith("2000 windows, subgroup of order 2\nelement ")
    assert '(0 7)(1 6)(2 5)(3 4) "TGCA"' in str(found)
    assert len(str(found).splitlines()) <= 23


def test_subgroups_of_larger_groups():
    rng = np.random.default_rng(8)
    one = rng.integers(4, size=(300, 3))
    found = discover(np.concatenate([one, one], axis=1), dihedral(6))
    assert (found.subgroup.order, found.subgroup.generators[0].positions) == (2, (3, 4, 5, 0, 1, 2))
    two = rng.integers(4, size=(300, 2))
    threefold = discover(np.concatenate([two, two, two], axis=1), cyclic(6))
    assert threefold.subgroup.order == 3
    assert threefold.table[0].order == 3
    constant = discover(np.tile(rng.integers(4, size=(100, 1)), 4), symmetric(4))
    assert constant.subgroup.order == 24
    assert not constant.unconfirmed
    mirrored = discover(np.concatenate([one, one[:, ::-1]], axis=1), strands(6))
    assert mirrored.subgroup.order == 2
    assert mirrored.subgroup.generators[0].letters == (0, 1, 2, 3)  # mirrored, not complemented
    spaced = palindromes(rng, 300, 6)
    spaced = np.concatenate([spaced[:, :3], rng.integers(4, size=(300, 2)), spaced[:, 3:]], axis=1)
    assert discover(spaced, inverted_repeat(3, 2)).subgroup.order == 2


def test_letters_that_a_symmetry_repeats_are_not_counted_twice():
    """Of windows abcabcabcabc a shift by one has agreements in fours: by p alone it is accepted too often."""
    group, larger, too_often, trials = cyclic(12), 0, 0, 100
    for seed in range(trials):
        one = np.random.default_rng(seed).integers(4, size=(60, 3))
        found = discover(np.tile(one, 4), group, frequencies=[0.25] * 4, dependent=False)
        larger += found.subgroup.order > 4
        q = dict(zip((row.number for row in found.table), false_discovery_rates([row.p for row in found.table])))
        too_often += q[1] <= 0.05
        assert found.subgroup.order % 4 == 0
        assert all(row.q >= max(row.p, row.p_spread) for row in found.table)
    error = np.sqrt(trials * 0.05 * 0.95)
    assert larger <= trials * 0.05 + 2 * error
    assert too_often > trials * 0.05 + 4 * error


def test_long_windows_are_counted_in_another_way():
    """Above 8192 points the pairs of letters are not tabulated; the numbers are the same."""
    windows = palindromes(np.random.default_rng(9), 5, 3000, 0.5)
    group = reverse_complement(3000)
    (row,) = discover(windows, group).table
    assert_close(row.agreement, agreement(group, 1, windows).mean())
    assert row.accepted


@pytest.mark.parametrize(
    ("windows", "options", "message"),
    [
        (np.zeros((2, 5), dtype=int), {}, r"must be \[W, 4\] with at least one row, received \[2, 5\]"),
        (np.zeros(4, dtype=int), {}, r"received \[4\]"),
        (np.zeros((0, 4), dtype=int), {}, r"received \[0, 4\]"),
        ([[0, 1, 2, UNKNOWN]], {}, r"received -1 at \(0, 3\): leave unknown letters out"),
        ([[0, 1, 2, 9]], {}, r"must be letters 0 to 3, received 9 at \(0, 3\)"),
        ([[0, 1, 2, 3]], {"rate": 1.0}, r"rate must be between 0 and 1"),
        ([[0, 1, 2, 3]], {"frequencies": [0, 0.5, 0.25, 0.25]}, r"letter 0 occurs 1 times"),
    ],
)
def test_bad_discoveries(windows, options, message):
    with pytest.raises(ValueError, match=message):
        discover(windows, reverse_complement(4), **options)


# --- motifs and real sites --------------------------------------------------------------------------------------------


def test_strand_correlation_by_hand():
    def motif(site):
        return np.eye(4)[encode(site)]

    assert_close(strand_correlation(motif("CACGTG")), 1)
    assert_close(strand_correlation(7 * motif("CACGTG")), 1)
    assert_close(strand_correlation(motif("GGCACGTG")), 1)  # at a shift of two
    # All letters differ: the covariance is -1/16, the variance 3/16.
    assert_close(strand_correlation(motif("AAAAAA")), -1 / 3)
    assert strand_correlation(motif("GAAAAG")) < 0.5
    for counts, message in (
        (np.ones((5, 4)), "at least 6 positions"),
        (np.ones((6, 3)), r"must be \[N, 4\]"),
        (-np.ones((6, 4)), "not negative"),
        (np.zeros((6, 4)), "not all zero"),
    ):
        with pytest.raises(ValueError, match=message):
            strand_correlation(counts)
    with pytest.raises(ValueError, match="a pairing of letters"):
        strand_correlation(np.ones((6, 4)), complement=(1, 2, 3, 0))


@pytest.fixture(scope="module")
def mad(dna):
    """int64 [7534, 36]: probes with a binding site of Mad (an E-box, CACGTG or near it) in the middle."""
    return np.array([encode(line.split()[0]) for line in (dna / "gcpbm_mad.tsv").read_text().splitlines()])


def test_motifs_of_jaspar(dna):
    motifs = [motif for motif in read_pfm(dna / "JASPAR2022.pfm") if len(motif.counts) >= 6]
    scores = np.array([strand_correlation(motif.counts) for motif in motifs])
    assert (len(motifs), (scores >= 0.8).sum(), (scores >= 0.95).sum()) == (1984, 562, 250)
    named = {motif.name.split("_")[0]: round(score, 3) for motif, score in zip(motifs, scores)}
    known = {"MA0058.3": 0.976, "MA0106.3": 0.995, "MA0872.1": 0.997, "MA0112.3": 0.959, "MA0139.1": 0.52}
    assert {name: named[name] for name in known} == known  # MAX, TP53, TFAP2A, ESR1, CTCF


def test_sites_of_mad_are_in_the_middle(mad):
    found = scan(list(mad), reverse_complement(6))
    perfect = np.bincount(found.start[found.energy > 1 - 1e-9], minlength=31)
    assert (perfect.argmax(), perfect[15]) == (15, 2006)
    expected = found.null.p_value(1.0) * len(mad)
    # Ten times and more what independent letters give; elsewhere about what they give. (Starts that overlap the site
    # by more than half are not elsewhere.)
    elsewhere = np.delete(perfect, range(12, 19))
    assert perfect[15] > 10 * expected
    assert (elsewhere < 1.3 * expected).all()
    # Six letters are too few for any single one of 233,554 windows to be a discovery, and none is claimed.
    assert found.p.min() > 0.01
    assert not len(found.discoveries())


def test_sites_of_mad_respect_reverse_complement_alone(mad):
    by_start = [discover(mad[:, start : start + 6], strands(6)) for start in range(31)]
    core = by_start[15]
    assert core.subgroup.order == 2
    assert core.subgroup.generators[0].letters == (3, 2, 1, 0)
    assert core.table[0].agreement > 0.7
    assert max(range(31), key=lambda start: by_start[start].table[0].agreement) == 15
    # Each site counted once, it still is: the pooled test did not lean on many copies.
    once = discover(np.unique(mad[:, 15:21], axis=0), strands(6))
    assert once.subgroup.order == 2
    assert once.table[0].p < 1e-3


def test_shuffled_enhancers_give_no_discoveries(dna):
    records = read_fasta(dna / "nanog_positives_test.fa")
    rng = np.random.default_rng(10)
    shuffled = [rng.permutation(record.tokens) for record in records]
    assert not len(scan(shuffled, reverse_complement(30)).discoveries())
    shuffled[17][50:80] = encode("GATTACAGGCCATCATGATGGCCTGTAATC")
    found = scan(shuffled, reverse_complement(30))
    best = found.discoveries()
    assert (found.sequence[best].tolist(), found.start[best].tolist()) == ([17], [50])
