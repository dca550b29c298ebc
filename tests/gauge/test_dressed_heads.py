"""Dressed heads: which matrices are dressings of GL(width) and which are not, and what is left over."""

import copy
from itertools import combinations

import pytest
import tiny_transformers
import torch

from erlangen import lm
from erlangen.breaking import break_symmetry
from erlangen.gauge import Rotary, dress, dress_heads, dressed_heads, forms
from erlangen.gauge._pairs import head_pairs, parameters_by_name

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("balanced", "identity")


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotations(heads, width, seed=0):
    return torch.linalg.qr(normal(heads, width, width, seed=seed)).Q


def moves(heads, width, condition, seed=0):
    """Matrices of a condition, and their inverse transposes."""
    left, right = rotations(heads, width, seed), rotations(heads, width, seed + 100)
    values = torch.logspace(0.5, -0.5, width, base=condition, dtype=torch.float64)
    return (left * values) @ right, (left / values) @ right


def rotary_moves(heads, width, rotary, condition, seed=0):
    """The group under rotary positions: complex numbers of planes, any matrix elsewhere."""
    planes, turned = rotary.planes(), rotary.dim
    sizes = torch.logspace(0.5, -0.5, len(planes), base=condition, dtype=torch.float64).expand(heads, -1)
    number = torch.polar(sizes, normal(heads, len(planes), seed=seed))
    left, right = torch.zeros(2, heads, width, width, dtype=torch.float64)
    left[:, :turned, :turned] = forms.plane_matrices(number, planes)
    right[:, :turned, :turned] = forms.plane_matrices(1 / number.conj(), planes)
    if turned < width:
        left[:, turned:, turned:], right[:, turned:, turned:] = moves(heads, width - turned, condition, seed)
    return left, right


def change(one, other):
    """Relative."""
    return float((one - other).norm() / one.norm())


# --- what is a dressing, and what is not ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "columns", "other"), [(1, 1, 4), (1, 3, 2), (4, 9, 7), (8, 8, 8), (16, 48, 33)])
def test_dressed_heads_do_not_see_the_gauge(kind, width, columns, other):
    first, second = normal(3, width, columns), normal(3, width, other, seed=1)
    one = dress_heads(first, second, kind)
    for condition, limit in ((1.0, 1e-12), (1e3, 1e-10)):
        left, right = moves(3, width, condition)
        two = dress_heads(left @ first, right @ second, kind)
        assert (one.first - two.first).abs().max() < limit * one.first.abs().max()
        assert (one.second - two.second).abs().max() < limit * one.second.abs().max()
    assert change(first.mT @ second, one.first.mT @ one.second) < 1e-13
    assert (one.left @ first - one.first).abs().max() < 1e-11
    assert (one.right @ second - one.second).abs().max() < 1e-11
    assert (one.left.mT @ one.right - torch.eye(width)).abs().max() < 1e-11
    assert one.rank.tolist() == [width] * 3 and one.leftover == ()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pairs", ["half", "interleaved"])
@pytest.mark.parametrize("dim", [2, 4, 6])
def test_under_rotary_positions(kind, pairs, dim):
    rotary, width = Rotary(dim=dim, pairs=pairs), 6
    first, second = normal(2, width, 9), normal(2, width, 8, seed=1)
    one = dress_heads(first, second, kind, rotary=rotary)
    left, right = rotary_moves(2, width, rotary, 1e3)
    two = dress_heads(left @ first, right @ second, kind, rotary=rotary)
    assert change(one.first, two.first) < 1e-11 and change(one.second, two.second) < 1e-11
    assert (one.left.mT @ one.right - torch.eye(width)).abs().max() < 1e-11
    # The scores at every distance: positions commute with what the heads were multiplied by.
    turn = torch.eye(width, dtype=torch.float64)
    angles = torch.arange(1, dim // 2 + 1, dtype=torch.float64)
    turn[:dim, :dim] = forms.plane_matrices(torch.polar(torch.ones_like(angles), angles), rotary.planes())
    assert change(first.mT @ turn @ second, one.first.mT @ turn @ one.second) < 1e-13
    # A matrix outside the group is seen.
    any_left, any_right = moves(2, width, 10.0)
    other = dress_heads(any_left @ first, any_right @ second, kind, rotary=rotary)
    assert change(one.first, other.first) > 0.1


def polar(first):
    values, vectors = torch.linalg.eigh(first @ first.mT)
    return (vectors * values.rsqrt()[:, None]) @ vectors.mT @ first


def triangular(first):
    """u A with u the inverse of the lower-triangular factor of A, diagonal positive."""
    q, r = torch.linalg.qr(first.mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT


def test_polar_and_triangular_factors_are_no_dressings():
    """Relative changes of u A under three groups; a dressing has none under all of them."""
    first, second = normal(4, 8, 24), normal(4, 8, 24, seed=1)
    general, general_dual = moves(4, 8, 1e3)
    turn = rotations(4, 8, 3)
    triangle = (0.3 * normal(4, 8, 8, seed=4)).tril(-1) + torch.diag_embed(normal(4, 8, seed=5).exp())
    triangle_dual = torch.linalg.inv(triangle).mT
    groups = ((general, general_dual), (turn, turn), (triangle, triangle_dual))
    found = {}
    for name, field in (
        ("polar", lambda a, b: polar(a)),
        ("triangular", lambda a, b: triangular(a)),
        ("balanced", lambda a, b: dress_heads(a, b, "balanced").first),
        ("identity", lambda a, b: dress_heads(a, b, "identity").first),
    ):
        found[name] = [change(field(first, second), field(left @ first, right @ second)) for left, right in groups]
    assert min(found["polar"]) > 0.3 and found["polar"][0] > 1
    assert found["triangular"][2] < 1e-12 and min(found["triangular"][:2]) > 0.5
    assert max(found["balanced"]) < 1e-10 and max(found["identity"]) < 1e-10
    # What polar does take away: all but a rotation.
    gram = [polar(a).mT @ polar(a) for a in (first, general @ first)]
    assert change(*gram) < 1e-10


# --- balanced -------------------------------------------------------------------------------------------------------


def test_balanced_is_the_least_norm_and_the_spectrum_is_that_of_the_product():
    first, second = normal(2, 4, 9), normal(2, 4, 7, seed=1)
    found = dress_heads(first, second)
    values = torch.linalg.svdvals(first.mT @ second)[:, :4]
    assert torch.allclose(found.spectrum, values, rtol=1e-12)
    assert torch.allclose(found.first @ found.first.mT, torch.diag_embed(values), atol=1e-12)
    assert torch.allclose(found.second @ found.second.mT, torch.diag_embed(values), atol=1e-12)
    assert found.pivots is None


def test_equal_singular_values_and_low_rank():
    u, v = rotations(3, 9)[:, :4], rotations(3, 9, 1)[:, :4]
    values = torch.tensor([[3, 2, 2, 1], [3, 2, 1, 0], [1, 1, 1, 1]], dtype=torch.float64).sqrt()[..., None]
    first, second = values * u, values * v
    left, right = moves(3, 4, 1e3)
    one, two = dress_heads(first, second), dress_heads(left @ first, right @ second)
    assert one.blocks == two.blocks == ((0, 1, 2), (2, 0, 3))
    assert change(one.first, two.first) < 1e-10 and change(one.second, two.second) < 1e-10
    assert one.rank.tolist() == [4, 3, 4]
    assert (one.first[1, 3] == 0).all() and (one.left[1, 3] == 0).all() and (one.right[1, 3] == 0).all()
    assert [sentence.split(":")[0] for sentence in one.leftover] == ["head 0", "head 2", "head 1"]
    assert "rank 3 of 4; the rest is set to zero" in one.leftover[2]
    assert change(first.mT @ second, one.first.mT @ one.second) < 1e-13


# --- identity -------------------------------------------------------------------------------------------------------


def test_the_block_is_the_identity_and_nothing_is_large():
    first, second = normal(5, 6, 40), normal(5, 6, 3, seed=1)
    first[1] *= torch.logspace(0, -6, 40, dtype=torch.float64)
    found = dress_heads(first, second, "identity")
    assert found.spectrum is None and found.blocks == ()
    for head in range(5):
        assert torch.equal(found.first[head][:, found.pivots[head]], torch.eye(6, dtype=torch.float64))
    assert found.first.abs().max() <= 2
    # The first columns would do as well by the algebra, with numbers as large as they come.
    plain = torch.linalg.solve(first[..., :6], first)
    assert plain.abs().max() > 2


def test_pivots_are_a_block_of_large_determinant():
    """Against all choices: a block whose exchanges gain no factor of 2 is within 2^width of the best."""
    first, second = normal(4, 3, 9), normal(4, 3, 2)
    found = dress_heads(first, second, "identity")
    for head in range(4):
        sizes = {block: abs(float(torch.det(first[head][:, list(block)]))) for block in combinations(range(9), 3)}
        chosen = tuple(sorted(found.pivots[head].tolist()))
        assert sizes[chosen] >= max(sizes.values()) / 2**3
        swaps = [block for block in sizes if len(set(block) & set(chosen)) == 2]
        assert max(sizes[block] for block in swaps) <= 2 * sizes[chosen] * (1 + 1e-12)


@pytest.mark.parametrize("width", [8, 12])
def test_an_exchange_is_made_where_pivoting_leaves_a_large_entry(width):
    """Orthonormal rows with a block after Kahan, whose columns pivoting takes in order, and many short ones."""
    sine = 0.75**0.5
    upper = torch.eye(width, dtype=torch.float64) - 0.5 * torch.ones(width, width, dtype=torch.float64).triu(1)
    kahan = torch.diag(sine ** torch.arange(width, dtype=torch.float64)) @ upper
    kahan = 0.99 * kahan / torch.linalg.matrix_norm(kahan, 2)
    rest = torch.linalg.cholesky(torch.eye(width, dtype=torch.float64) - kahan @ kahan.mT) / 50**0.5
    basis = torch.cat([kahan] + [rest] * 50, dim=1)[None]
    assert (basis @ basis.mT - torch.eye(width)).abs().max() < 1e-13
    pivots = dressed_heads._pivoted(basis)
    assert torch.linalg.solve(basis[..., pivots[0]], basis).abs().max() > 3
    left, right = moves(1, width, 1e3)
    found = dress_heads(basis, basis, "identity")
    again = dress_heads(left @ basis, right @ basis, "identity")
    assert found.first.abs().max() <= 2
    assert torch.equal(found.pivots, again.pivots) and change(found.first, again.first) < 1e-10


@pytest.mark.parametrize("seed", range(3))
def test_ties_are_broken_by_order(seed):
    """Columns that are the same number for number, as of tied or repeated inputs."""
    once = normal(2, 4, 6, seed=seed)
    first, second = torch.cat([once, once, -once], dim=-1), normal(2, 4, 5)
    found = dress_heads(first, second, "identity")
    assert found.pivots.max() < 6
    left, right = moves(2, 4, 1e3, seed)
    again = dress_heads(left @ first, right @ second, "identity")
    assert torch.equal(found.pivots, again.pivots)


@pytest.mark.parametrize("rotary", [None, Rotary(dim=4), Rotary(dim=2, pairs="interleaved")])
def test_a_chart_is_kept_with_given_pivots(rotary):
    first, second = normal(2, 4, 9), normal(2, 4, 8, seed=1)
    found = dress_heads(first, second, "identity", rotary=rotary)
    near = found.first + 1e-3 * normal(2, 4, 9, seed=2)
    kept = dress_heads(near, found.second, "identity", rotary=rotary, pivots=found.pivots)
    assert torch.equal(kept.pivots, found.pivots) and 0 < change(found.first, kept.first) < 1e-2
    again = dress_heads(kept.first, kept.second, "identity", rotary=rotary, pivots=kept.pivots)
    assert (again.left - torch.eye(4)).abs().max() < 1e-14 and change(kept.first, again.first) < 1e-14


def test_rotary_planes_have_one_entry_of_one():
    rotary = Rotary(dim=4)
    found = dress_heads(normal(2, 6, 9), normal(2, 6, 8), "identity", rotary=rotary)
    for head in range(2):
        for one, two in rotary.planes().tolist():
            pivot = int(found.pivots[head, one])
            assert pivot == int(found.pivots[head, two])
            assert found.first[head, [one, two], pivot].tolist() == [1.0, 0.0]
            sizes = found.first[head, one] ** 2 + found.first[head, two] ** 2
            assert sizes.max() <= 1 + 1e-12
        assert torch.equal(found.first[head, 4:, found.pivots[head, 4:]], torch.eye(2, dtype=torch.float64))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_low_rank_has_no_identity_block():
    first, second = normal(3, 4, 9), normal(3, 4, 8)
    first[1, 3] = first[1, 0] + first[1, 2]
    with pytest.raises(ValueError, match=r"^head 1: .* rank 3 of 4 .*kind=\"balanced\""):
        dress_heads(first, second, "identity")
    with pytest.raises(ValueError, match=r"head 0: .* rank 2 of 4"):
        dress_heads(normal(1, 4, 2), normal(1, 4, 8), "identity")
    dead = normal(3, 4, 9)
    dead[2, [1, 3]] = 0
    with pytest.raises(ValueError, match=r"^head 2: the queries of rotary plane \[1, 3\] are zero"):
        dress_heads(dead, second, "identity", rotary=Rotary(dim=4))
    # The second factor may have any rank: output maps start at zero.
    found = dress_heads(normal(3, 4, 9), torch.zeros(3, 4, 8), "identity")
    assert (found.second == 0).all() and found.rank.tolist() == [4, 4, 4]


def test_rank_is_judged_by_how_the_weights_are_stored():
    first, second = normal(1, 3, 9), normal(1, 3, 8)
    first[0, 2] = first[0, 0] + 1e-8 * first[0, 2]
    assert dress_heads(first, second, "identity").rank.tolist() == [3]
    with pytest.raises(ValueError, match="rank 2 of 3"):
        dress_heads(first, second, "identity", dtype=torch.float32)


def test_bad_pairs():
    first, second = normal(2, 4, 9), normal(2, 4, 8)
    with pytest.raises(ValueError, match=r"received 'polar'.*change with the gauge"):
        dress_heads(first, second, "polar")
    with pytest.raises(ValueError, match=r"received \[2, 4, 9\] and \[2, 3, 8\]"):
        dress_heads(first, second[:, :3])
    with pytest.raises(ValueError, match="none empty"):
        dress_heads(first[:0], second[:0])
    with pytest.raises(TypeError, match="complex128"):
        dress_heads(first + 1j, second)
    with pytest.raises(ValueError, match=r"second factor .* not finite"):
        dress_heads(first, second / 0)
    with pytest.raises(ValueError, match="turn 6 coordinates, and the pair has 4"):
        dress_heads(first, second, rotary=Rotary(dim=6))
    pivots = torch.arange(4).repeat(2, 1)
    with pytest.raises(ValueError, match='kind="identity"'):
        dress_heads(first, second, pivots=pivots)
    with pytest.raises(ValueError, match=r"int64 \[2, 4\], received torch.int32"):
        dress_heads(first, second, "identity", pivots=pivots.int())
    with pytest.raises(ValueError, match="columns 0 to 8, received 6 to 9"):
        dress_heads(first, second, "identity", pivots=pivots + 6)
    with pytest.raises(ValueError, match=r"head 0: the columns .* are dependent"):
        dress_heads(first, second, "identity", pivots=torch.zeros_like(pivots))
    with pytest.raises(ValueError, match="one pivot, received different"):
        dress_heads(first, second, "identity", rotary=Rotary(dim=4), pivots=pivots)
    zero = first.clone()
    zero[0, :, 0] = 0
    with pytest.raises(ValueError, match=r"head 0: entry 0 of rotary plane \[0, 2\] is zero"):
        dress_heads(zero, second, "identity", rotary=Rotary(dim=4), pivots=torch.zeros_like(pivots))


# --- models -----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 13, "context_length": 8, "num_layers": 2, "num_heads": 4, "dim": 16}
CONFIGS = {
    "learned": {},
    "no biases": {"attention_bias": False},
    "rotary": {"positions": "rotary", "num_kv_heads": 2},
    "partly rotary": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 1},
}


def make(dtype=torch.float64, seed=0, **fields):
    model = lm.GPT(lm.GPTConfig(**SIZES | fields), generator=torch.Generator().manual_seed(seed)).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, seed=number).to(dtype)
    return model


def tokens(model):
    return torch.randint(13, (3, 8), generator=torch.Generator().manual_seed(1))


def logits(model):
    found = model(tokens(model))
    return found[0] if isinstance(found, tuple) else found


def move_heads(model, condition, seed=0):
    """Into another gauge of its heads, and no other."""
    parameters = parameters_by_name(model)
    for pair in head_pairs(model):
        first, second = pair.factors(lambda name: parameters[name].detach())
        heads, width, _ = first.shape
        if pair.rotary is None:
            left, right = moves(heads, width, condition, seed)
        else:
            left, right = rotary_moves(heads, width, pair.rotary, condition, seed)
        pair.put(lambda name: parameters[name].detach(), left @ first, right @ second)
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_keeps_its_function_and_loses_its_gauge(kind, name):
    model = make(**CONFIGS[name])
    before = logits(model).detach()
    moved = move_heads(copy.deepcopy(model), 1e2)
    assert (logits(moved) - before).abs().max() < 1e-12
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), moved.parameters())) > 0.1
    stored = [parameter.detach().clone() for parameter in model.parameters()]
    applied = dress(model, kind)
    assert [(pair.pair.layer, pair.pair.sector) for pair in applied] == [(0, "qk"), (0, "vo"), (1, "qk"), (1, "vo")]
    dress(moved, kind)
    assert (logits(model) - before).abs().max() < 1e-12
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), moved.parameters())) < 1e-11
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), stored)) > 0.1
    # Dressed again it stays.
    again = dress(model, kind)
    assert all((pair.left - torch.eye(pair.pair.width)).abs().max() < 1e-10 for pair in again)
    assert all(pair.leftover == () for pair in applied)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "deepseek_v2"])
def test_models_of_transformers(kind, name):
    """Fused and transposed maps, grouped keys, fused and partly rotary, with latents."""
    model, inputs = tiny_transformers.make(name), tiny_transformers.some_tokens()
    before = tiny_transformers.outputs(model, inputs).detach()
    stored = [parameter.detach().clone() for parameter in model.parameters()]
    dress(model, kind)
    assert (tiny_transformers.outputs(model, inputs) - before).abs().max() < 1e-11
    assert max((a - b).abs().max() for a, b in zip(model.parameters(), stored)) > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_follow_with_what_is_returned(kind, name):
    model = make(**CONFIGS[name])
    parameters = parameters_by_name(model)

    def gradients():
        model.zero_grad()
        logits(model).square().sum().backward()
        return {key: parameter.grad.clone() for key, parameter in parameters.items()}

    before = gradients()
    applied = dress(model, kind)
    after = gradients()
    for entry in applied:
        old, new = (entry.pair.factors(lambda key, found=found: found[key]) for found in (before, after))
        assert change(new[0], entry.right @ old[0]) < 1e-10 and change(new[1], entry.left @ old[1]) < 1e-10
        assert change(new[0], old[0]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_that_of_the_stored_numbers(dtype):
    model = make(dtype)
    exact = logits(copy.deepcopy(model).double()).detach()
    rounding = (logits(model).double() - exact).abs().max()
    dress(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert (logits(model).double() - exact).abs().max() < 8 * rounding


def test_one_sector_leaves_the_other():
    model = make()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    (first, _) = dress(model, "identity", sectors=("vo",))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for layer in dress(make(), "identity", ("vo",)) for name in layer.pair.names}
    assert first.pair.sector == "vo"


def test_a_head_of_low_rank_is_named_and_nothing_is_written():
    model = make()
    pair = head_pairs(model, ("vo",))[1]
    parameters = parameters_by_name(model)
    first, second = (factor.clone() for factor in pair.factors(lambda name: parameters[name].detach()))
    first[2, 1] = first[2, 0]
    pair.put(lambda name: parameters[name].detach(), first, second)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    output = logits(model).detach()
    with pytest.raises(ValueError, match=r"^layer 1, sector vo, head 2: .* rank 3 of 4"):
        dress(model, "identity")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before))
    found = dress(model, "balanced")
    assert found[3].rank.tolist() == [4, 4, 3, 4]
    assert found[3].leftover == ("layer 1, sector vo, head 2: rows 0 to 3 have rank 3 of 4; the rest is set to zero.",)
    assert (logits(model) - output).abs().max() < 1e-12


def test_models_without_this_gauge_are_refused():
    normed = make(qk_norm=True)
    with pytest.raises(ValueError, match=r'normalised.*sectors=\("vo",\)'):
        dress(normed)
    before = logits(normed).detach()
    dress(normed, sectors=("vo",))
    assert (logits(normed) - before).abs().max() < 1e-12
    with pytest.raises(ValueError, match="unlearned biases"):
        dress(break_symmetry(make()))
    with pytest.raises(ValueError, match=r"layer 0, sector qk: .*'polar'"):
        dress(make(), "polar")
    with pytest.raises(TypeError, match="no layout is known"):
        dress(torch.nn.Linear(2, 2))
