"""Skipping: by brute force, what is left out of any row is within the share; and the search that finds it is linear."""

import pytest
import torch
from tiled_cases import H, attend, poses, problem

from erlangen.lie import SE2, SE3, SO3, Aff2, Product, Translation, _geometry, _neighbours, _skipping, _tiled
from erlangen.lie._workspace import Workspace
from erlangen.lie.attention import lie_attention, lie_weights, morton_order


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Leaves of two poses, blocks of four, and several to a batch."""
    monkeypatch.setattr(_geometry.PairGeometry, "tile", 32)
    monkeypatch.setattr(_tiled, "_ELEMENTS", 1000)


def spread(group, generator, num, side):
    """Poses evenly spread over a cube: [1, num, m, m]."""
    where = group.random(1, num, generator=generator, dtype=torch.float64)
    where[..., :-1, -1] = side * torch.rand(1, num, group.point_dim, generator=generator, dtype=torch.float64)
    return where


def record_pairs(monkeypatch):
    """A list that gets, for each pass, how often each pair of poses is computed, int [B·N, B·M]."""
    passes, tiles, again = [], _skipping.SkippingTiles._tiles, _skipping.SkippingTiles._blocks_with

    def recorded(self, log_least):
        count = torch.zeros(self.batch * self.num_queries, self.batch * self.num_keys, dtype=torch.int64)
        passes.append(count)
        for queries, keys, same in tiles(self, log_least):
            for mine, theirs in zip(queries, keys):
                theirs = theirs[theirs < len(self.keys.slots)]
                rows = self.queries.slots[mine][~self.queries.is_fill[mine]]
                columns = self.keys.slots[theirs][~self.keys.is_fill[theirs]]
                count[rows[:, None], columns] += 1
                if self.symmetric and not same:
                    count[columns[:, None], rows] += 1
            yield queries, keys, same

    def done_again(self, rows):
        for b, block in again(self, rows):
            first = b * self.num_queries
            passes[-1][first + block.start : first + block.stop] = 1
            yield b, block

    monkeypatch.setattr(_skipping.SkippingTiles, "_tiles", recorded)
    monkeypatch.setattr(_skipping.SkippingTiles, "_blocks_with", done_again)
    return passes


def assert_left_out_is_within(share, passes, group, tensors, **options):
    """In both passes each pair is computed at most once, and what is left out of any row is within the share."""
    arguments = {name: tensor for name, tensor in tensors.items() if name != "value"}
    weights = lie_weights(**({"key": tensors["query"]} | arguments), group=group, **options)
    assert len(passes) == 2
    for count in passes:
        assert count.max() <= 1
        batch, _, num_queries, num_keys = weights.shape
        blocks = count.view(batch, num_queries, batch, num_keys)
        left = torch.stack([blocks[b, :, b] == 0 for b in range(batch)])[:, None]
        assert (weights * left).sum(-1).max() <= share


ARRANGEMENTS = ["spread", "lattice", "coincident", "outlier", "clusters", "line"]


def arranged(how, group, generator, num):
    where = spread(group, generator, num, 5.0 * num ** (1 / group.point_dim))
    points = where[0, :, :-1, -1]
    if how == "lattice":  # boxes touch, and many poses stand at the same distance
        points.copy_((points / 4).round() * 4)
    elif how == "coincident":
        points.fill_(3.0)
    elif how == "outlier":
        points[num // 2] += 1e4
    elif how == "clusters":
        points.copy_(points[torch.randint(4, (num,), generator=generator)] * 20 + points / 40)
    elif how == "line":
        points[:, 1:] = 0.0
    return where


@pytest.mark.parametrize("how", ARRANGEMENTS)
@pytest.mark.parametrize(("group", "num", "share"), [(SE2, 157, 1e-3), (SE3, 256, 1e-6)], ids=str)
def test_what_is_left_out_is_within_the_share_however_poses_stand(group, num, share, how, generator, monkeypatch):
    tensors = problem(group, generator, num_queries=num, batch=1)
    tensors["query"] = arranged(how, group, generator, num)
    exact = attend("tiled", group, tensors)
    passes = record_pairs(monkeypatch)
    found = attend("tiled", group, tensors, skip=share)
    assert_left_out_is_within(share, passes, group, tensors)
    spread_of_values = tensors["value"].amax() - tensors["value"].amin()
    assert (found["output"] - exact["output"]).abs().max() <= share * spread_of_values + 1e-12
    if how == "coincident":
        assert (passes[0] == 1).all()
    else:
        assert passes[0].sum() < 0.7 * passes[0].numel()


@pytest.mark.parametrize("how", ["self", "cross", "causal", "displaced", "masked keys", "masked pairs", "batch"])
@pytest.mark.parametrize(
    ("group", "share"), [(SE2, 1e-2), (SE3, 1e-6), (Translation(3), 1e-6), (Product(SO3, SE2), 1e-2)], ids=str
)
def test_what_is_skipped_is_within_the_share(group, how, share, generator, monkeypatch):
    batch, num = 2 if how == "batch" else 1, 97
    tensors = problem(group, generator, num_queries=num, batch=batch, displaced=how == "displaced")
    if isinstance(group, Product):
        parts = SO3.random(batch, num, generator=generator, dtype=torch.float64)
        tensors["query"] = group.assemble(parts, torch.cat([spread(SE2, generator, num, 50.0) for _ in range(batch)]))
    else:
        tensors["query"] = torch.cat([spread(group, generator, num, 50.0) for _ in range(batch)])
    if how == "cross":
        tensors["key"] = tensors["query"].clone()[:, 5:]
        tensors["value"] = tensors["value"][:, :, 5:]
    options = {"causal": how == "causal"}
    if how.startswith("masked"):
        shape = (1, 1, 1, num) if how == "masked keys" else (1, H, num, num)
        options["mask"] = torch.rand(*shape, generator=generator) < 0.7
    exact = attend("tiled", group, tensors, **options)
    passes = record_pairs(monkeypatch)
    found = attend("tiled", group, tensors, skip=share, **options)
    assert_left_out_is_within(share, passes, group, tensors, **options)
    values = tensors["value"]
    assert (found["output"] - exact["output"]).abs().max() <= share * (values.amax() - values.amin())
    for name, gradient in exact.items():
        assert (found[name] - gradient).abs().max() <= 100 * share * gradient.abs().max().clamp(min=1), name
    # What a row weighs is known in advance only where queries are the keys, and not masked.
    known = how in ("self", "causal", "batch")
    assert passes[0].sum() < (0.9 if known else 1.0) * passes[0].numel() / batch


@pytest.mark.parametrize("how", ["cross", "masked", "displaced"])
def test_rows_of_unknown_weight_are_bounded_by_what_is_near(how, generator, monkeypatch):
    tensors = problem(SE2, generator, num_queries=400, batch=1, displaced=how == "displaced")
    tensors["query"] = spread(SE2, generator, 400, 30.0)
    if how == "cross":
        tensors["key"] = spread(SE2, generator, 400, 30.0)
    options = {"mask": torch.rand(1, 1, 1, 400, generator=generator) < 0.8} if how == "masked" else {}
    passes = record_pairs(monkeypatch)
    attend("tiled", SE2, tensors, skip=1e-3, **options)
    assert_left_out_is_within(1e-3, passes, SE2, tensors, **options)
    assert passes[0].sum() < 0.7 * passes[0].numel()


def test_the_brute_force_sees_a_bound_that_is_none(generator, monkeypatch):
    right = _neighbours.upper_bounds
    monkeypatch.setattr(_neighbours, "upper_bounds", lambda *boxes: 3 * right(*boxes))
    tensors = problem(SE2, generator, num_queries=157, batch=1)
    tensors["query"] = arranged("spread", SE2, generator, 157)
    passes = record_pairs(monkeypatch)
    attend("tiled", SE2, tensors, skip=1e-3)
    with pytest.raises(AssertionError):
        assert_left_out_is_within(1e-3, passes, SE2, tensors)


def test_rows_far_from_all_keys_are_exact(generator):
    """Nothing nearby bounds what such a row weighs; it is done without skipping, forward and backward."""
    tensors = problem(SE2, generator, num_queries=97, num_keys=60, batch=1)
    tensors["query"], tensors["key"] = spread(SE2, generator, 97, 40.0), spread(SE2, generator, 60, 40.0)
    tensors["query"][:, 3:50:9, 0, 2] += 300.0
    exact, found = attend("reference", SE2, tensors), attend("tiled", SE2, tensors, skip=1e-9)
    for name, value in exact.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7 * value.abs().max().item())


@pytest.mark.parametrize("group", [SE2, SE3], ids=str)
@pytest.mark.parametrize("displaced", [False, True])
def test_far_from_the_origin_a_bound_is_still_one(group, displaced, generator):
    """In float32, 10⁵ away: no score is above what the boxes, here of one pose, promise."""
    where = spread(group, generator, 16, 4.0)
    where[..., 0, -1] += 1e5
    where = where.float()[:, None]
    displacement = poses(group, H, generator=generator, wide=False).float() if displaced else None
    pairs = _geometry.pair_geometry(group, "principal")
    query, key = pairs.pack_query(where, displacement), pairs.pack_key(where)
    key = key.expand(-1, query.shape[1], -1, -1)
    scale, value = torch.full((H, len(group.blocks)), 50.0), torch.zeros(1, H, 16, 4)
    tiles = _tiled.Tiles(
        query, key, scale, value, None, None, None, str(group), "principal", "error", False, False, False,
        fused=False, space=Workspace(),
    )  # fmt: skip
    every = slice(0, 16)
    scores = tiles.scores(tiles.norms(slice(0, 1), every, every)[0])
    slope = torch.full((H, group.point_dim), 50.0, dtype=torch.float64)
    trees = [_neighbours.Tree(pairs.positions(x)[0][1], slope[0], 1) for x in (query, key)]
    i, j = torch.arange(16).repeat_interleave(16), torch.arange(16).repeat(16)
    of_queries, of_keys = ([side[n] for side in tree.boxes(1)] for tree, n in zip(trees, (i, j)))
    bounds = _neighbours.upper_bounds(tuple(of_queries), tuple(of_keys), slope)  # [256, H]
    found = scores[:, trees[0].slots[i, 0], trees[1].slots[j, 0]].mT
    assert (found <= bounds + 1e-6).all()
    assert bounds.min() < -10


def test_a_share_of_zero_is_exact(generator):
    tensors = problem(SE2, generator, num_queries=24)
    expected = attend("tiled", SE2, tensors)
    zero, tiny = attend("tiled", SE2, tensors, skip=0.0), attend("tiled", SE2, tensors, skip=1e-12)
    for name, value in expected.items():
        assert torch.equal(zero[name], value)
        torch.testing.assert_close(tiny[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num", [1, 2, 17])
def test_few_poses(num, generator):
    tensors = problem(SE3, generator, num_queries=num)
    expected, found = attend("reference", SE3, tensors), attend("tiled", SE3, tensors, skip=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_inside_of_a_compiled_call(generator):
    torch._dynamo.reset()
    tensors = problem(SE2, generator, num_queries=40, batch=1) | {"query": spread(SE2, generator, 40, 30.0)}
    expected = attend("tiled", SE2, tensors, skip=1e-3)
    found = attend("tiled", SE2, tensors, skip=1e-3, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("n", "spacing", "most"), [(2, 1.0, 1000), (3, 4.0, 1300)])
def test_the_number_of_pairs_grows_as_that_of_poses(n, spacing, most, generator):
    """Poses one a cell, heads that see 2 units far. A ball that holds all but 10⁻³ has 140 poses, or 18."""
    pairs = []
    for num in (8192, 65536):
        where = spacing * num ** (1 / n) * torch.rand(1, 1, n, num, generator=generator, dtype=torch.float64)
        slope = torch.full((1, n), 0.25, dtype=torch.float64)
        tree = _neighbours.Tree(where, slope[0].rsqrt(), 16)
        block, _ = _neighbours.near_leaves(tree, tree, 4, slope, None, 1e-3, True)
        pairs.append((2 * len(block) * 64 * 16 + num * 64) / num)
    assert pairs[1] < most
    assert pairs[1] < 1.25 * pairs[0]


@pytest.mark.parametrize("num", [1, 2, 5, 64, 1000])
def test_the_tree_holds_each_pose_once(num, generator):
    where = torch.randn(3, 2, 2, num, generator=generator, dtype=torch.float64)
    tree = _neighbours.Tree(where, torch.ones(2), 7)
    assert tree.slots.shape[1] <= 7 or tree.num_leaves == 1
    real = tree.slots.flatten()[~tree.is_fill.flatten()]
    assert torch.equal(real.sort().values, torch.arange(3 * num))
    assert torch.equal(tree.slots.flatten()[tree.place], torch.arange(3 * num))
    assert torch.equal(
        tree.slots // num, torch.arange(3).repeat_interleave(tree.num_leaves)[:, None].expand_as(tree.slots)
    )
    low, high = tree.boxes(1)
    inside = where.permute(0, 3, 1, 2).flatten(0, 1)[tree.slots]
    assert (low[:, None] <= inside).all() and (inside <= high[:, None]).all()


def test_mortons_order_puts_neighbours_together(generator):
    where = SE2.random(4096, generator=generator, dtype=torch.float64)
    where[:, :2, 2] = torch.rand(4096, 2, generator=generator, dtype=torch.float64)
    order = morton_order(where, SE2)
    assert order.sort().values.equal(torch.arange(4096))
    blocks = where[order, :2, 2].unflatten(0, (16, 256))
    area = (blocks.amax(1) - blocks.amin(1)).prod(-1)
    assert area.sum() < 2.5, "boxes of sixteen blocks; in random order each covers all"
    assert torch.equal(morton_order(torch.stack([where, where.flip(0)]), SE2)[0], order)


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        (SE2, {"skip": -0.1}, "at least 0 and below 1"),
        (SO3, {"skip": 0.1}, "SO3 has no bound"),
        (Aff2, {"skip": 0.1, "impl": "tiled"}, "Aff2 has no bound"),
        (SE2, {"skip": 0.1, "impl": "reference"}, "only tiles can be skipped"),
        (SE2, {"skip": 0.1, "content": True}, "content scores have no bound"),
    ],
    ids=str,
)
def test_what_cannot_be_skipped_says_so(group, options, message, generator):
    tensors = problem(group, generator, content=options.pop("content", False))
    with pytest.raises(ValueError, match=message):
        lie_attention(**tensors, key=tensors["query"], group=group, **options)


def test_rotations_have_no_order():
    with pytest.raises(ValueError, match="SO3 has no translations"):
        morton_order(torch.eye(3).expand(4, 3, 3), SO3)
