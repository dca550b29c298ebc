"""Tiles against the dense float64 reference: values and every gradient, over groups, masks, sizes and dtypes."""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiled_cases import FAST, H, attend, poses, problem

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Aff3, Product, Sim2, Sim3, Translation, _geometry, _tiled
from erlangen.lie._fused import fused_geometry
from erlangen.lie.attention import lie_attention
from erlangen.lie.layers import LieTransformer, LieTransformerConfig
from erlangen.lie.values import lie_attention_tangent
from erlangen.testing import assert_low_precision

OTHERS = [Sim2, Sim3, GL(2), Aff2, Aff3, Product(SE2, Aff2)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Sides that a handful of poses crosses, with a rest."""
    monkeypatch.setattr(_geometry.PairGeometry, "tile", 4)
    monkeypatch.setattr(_geometry.ByLogarithm, "tile", 3)
    monkeypatch.setattr(_tiled, "_ELEMENTS", 40)


def assert_same(group, tensors, *, tolerance=1e-9, **options):
    expected, found = attend("reference", group, tensors, **options), attend("tiled", group, tensors, **options)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= tolerance, f"{name}: {error:.2e}"
    return found


CASES = {
    "self": {},
    "one": {"num_queries": 1},
    "cross": {"num_queries": 7, "num_keys": 11},
    "displaced": {"displaced": True},
    "content": {"content": True},
    "a set of poses a head": {"heads": (3, 3)},
    "queries a head": {"num_keys": 9, "heads": (3, 1), "displaced": True},
    "keys a head": {"num_keys": 9, "heads": (1, 3), "content": True},
}


def some(groups, cases):
    """Groups with cases: every case of the first group, and of each other the next two."""
    first, *others = groups
    pairs = [(first, case) for case in cases]
    pairs += [(group, cases[(2 * n + m) % len(cases)]) for n, group in enumerate(others) for m in range(2)]
    return [pytest.param(*pair, id="-".join(map(str, pair))) for pair in pairs]


@pytest.mark.parametrize(
    ("group", "case"), [*((group, case) for group in FAST for case in CASES), *some(OTHERS[::-1], list(CASES))]
)
def test_values_and_gradients_are_those_of_the_reference(group, case, generator):
    assert_same(group, problem(group, generator, **CASES[case]))


MASKS = [
    (keys, kind, causal) for keys in (None, 6, 13) for kind in ("keys", "pairs", "heads", "rows") for causal in (0, 1)
]


@pytest.mark.parametrize(("group", "how"), some([SE2, SE3, Aff2, Sim3, SO3], MASKS[::-1]))
def test_masks(group, how, generator):
    keys, kind, causal = how
    tensors = problem(group, generator, num_keys=keys, content=kind == "rows")
    num_keys = keys or 10
    shape = {"keys": (2, 1, 1), "pairs": (1, 1, 10), "heads": (2, H, 1), "rows": (2, H, 10)}[kind]
    mask = torch.rand(*shape, num_keys, generator=generator) < 0.6
    mask[..., 2] = False
    if kind == "rows":
        mask[0, 1] = False
    assert_same(group, tensors, mask=mask, causal=causal)
    assert_same(group, tensors, causal=True)


def test_what_stands_at_padding_is_never_looked_at(generator):
    tensors = problem(SE3, generator)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[1, ..., 6:] = False
    pairs = mask & mask.mT
    expected = attend("tiled", SE3, tensors, mask=pairs)
    for name in ("query", "value"):
        tensors[name][1, ..., 6:, :, *([slice(None)] if name == "query" else [])] = math.nan
    found = attend("tiled", SE3, tensors, mask=pairs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("group", [SO2, SE2, SO3, SE3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_half_turns_and_coincident_poses(group, dtype, generator):
    """Values agree, also at half a turn, where the slope depends on the side; away from it gradients do too."""
    base = group.random(1, 3, generator=generator, dtype=torch.float64)
    angles = [0.0, 0.0, 1e-8, 1e-5, 1e-3, math.pi - 1e-2, math.pi - 1e-5, math.pi]
    xi = torch.zeros(len(angles), group.dim, dtype=torch.float64)
    xi[:, group.blocks["rotation"][-1]] = torch.tensor(angles, dtype=torch.float64)
    query = group.compose(base[:, :, None], group.exp(xi)).flatten(1, 2)
    tensors = problem(group, generator, num_queries=query.shape[1], batch=1) | {"query": query}
    low = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, found = attend("reference", group, tensors), attend("tiled", group, low)
    assert all(value.isfinite().all() for value in found.values())
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(found["output"].double(), expected["output"], rtol=tolerance, atol=tolerance)
    apart = [n for n in range(query.shape[1]) if n % len(angles) < 6]
    tensors = tensors | {"query": query[:, apart], "value": tensors["value"][:, :, apart]}
    assert_same(group, tensors, tolerance=1e-7)


@pytest.mark.parametrize("group", FAST, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_float32_is_as_good_as_the_dense_float32(group, offset, generator):
    tensors = problem(group, generator, num_queries=24)
    if any("translation" in block for block in group.blocks):
        xi = torch.zeros(group.dim, dtype=torch.float64)
        xi[-1] = offset
        tensors["query"] = group.compose(group.exp(xi), tensors["query"])
    # what both see is the rounded poses
    low = {name: tensor.float() for name, tensor in tensors.items()}
    exact = {name: tensor.double() for name, tensor in low.items()}
    assert_low_precision(
        attend("tiled", group, low), attend("reference", group, low), attend("reference", group, exact), ratio=4.0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_far_from_all_keys_keep_their_weights(dtype, generator):
    """Scores of −10⁴ only: exp(s) is zero in either dtype, the softmax is not."""
    tensors = problem(SE2, generator, num_keys=9)
    tensors["query"][:, 3:6, 0, 2] += 300.0
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    expected, found = attend("reference", SE2, tensors), attend("tiled", SE2, tensors)
    tolerance = 2e-3 if dtype == torch.float32 else 1e-9
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * value.abs().max().item())


def test_a_masked_token_far_from_the_others_keeps_its_weights(generator):
    """The symmetric pass sees that it cannot trust this row, and the general one takes over."""
    tensors = problem(SE2, generator, batch=1)
    tensors["query"][:, 4, 0, 2] += 300.0
    mask = torch.ones(1, 1, 1, 10, dtype=torch.bool)
    mask[..., 4] = False
    found = assert_same(SE2, tensors, mask=mask)
    assert found["output"][0, :, 4].abs().sum() > 0


def test_the_comparison_sees_a_wrong_gradient(generator, monkeypatch):
    right = _geometry._Plane.vjp

    def wrong(self, *arguments):
        to_query, to_key = right(self, *arguments)
        return to_query * (1 + 1e-6), to_key

    monkeypatch.setattr(_geometry._Plane, "vjp", wrong)
    with pytest.raises(AssertionError, match="query"):
        assert_same(SE2, problem(SE2, generator))


@pytest.mark.parametrize("group", [GL(2), Aff2], ids=str)
def test_the_polar_chart(group, generator):
    tensors = problem(group, generator)
    tensors["query"] = poses(group, 2, 10, generator=generator, wide=True)
    assert_same(group, tensors, chart="polar", tolerance=1e-8)


def test_outside_of_the_chart(generator):
    tensors = problem(GL(2), generator)
    tensors["query"][1, 2] = torch.diag(torch.tensor([-1.0, -2.0], dtype=torch.float64)) @ tensors["query"][1, 5]
    with pytest.raises(
        ValueError, match=r"2 of 200 pairs|of 200 pairs do not: use chart=\"polar\" or outside=\"mask\""
    ):
        attend("tiled", GL(2), tensors)
    assert_same(GL(2), tensors, outside="mask")
    blind = attend("tiled", GL(2), tensors, check=False)["output"]
    expected = attend("reference", GL(2), tensors, check=False)["output"]
    assert torch.equal(blind.isnan(), expected.isnan()) and blind.isnan().any()


KINDS = ["self", "cross", "displaced", "content", "queries a head"]


@pytest.mark.parametrize(
    ("group", "case"), [*((SE3, kind) for kind in KINDS), *some([SE2, SO2, SO3, Sim2, Aff2, Aff3], KINDS)]
)
def test_tangent_vectors_with_their_gradients(group, case, generator):
    tensors = problem(group, generator, **CASES[case])
    if group in FAST:  # the tangent vector jumps at half a turn
        for name in {"query", "key"} & tensors.keys():
            tensors[name] = poses(group, *tensors[name].shape[:-2], generator=generator, wide=False)
    results = []
    for impl in ("reference", "tiled"):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        out, tangent = lie_attention_tangent(**({"key": leaves["query"]} | leaves), group=group, impl=impl)
        probe = torch.linspace(-1, 1, tangent.numel(), dtype=tangent.dtype).view_as(tangent)
        ((tangent * probe).sum() + out.square().sum()).backward()
        results.append([out, tangent, *(leaf.grad for leaf in leaves.values())])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_tangent_vectors_alone(generator):
    tensors = problem(SE2, generator, num_keys=9) | {"value": torch.empty(2, H, 9, 0, dtype=torch.float64)}
    mask = torch.rand(2, 1, 10, 9, generator=generator) < 0.4
    mask[1, :, 3] = False
    pair = [lie_attention_tangent(**tensors, group=SE2, mask=mask, impl=impl)[1] for impl in ("reference", "tiled")]
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)
    assert not pair[1][1, :, 3].any()


@pytest.mark.parametrize("skip", [0.0, 1e-9])
def test_memory_of_a_call_serves_others(skip, generator):
    """Of other sizes and dtypes, in inference mode and in other threads: they are right, and leave it what it gave."""
    problems = []
    for size in (9, 23, 5):
        tensors = problem(SE3, generator, num_queries=size)
        problems += [tensors, {name: x.float() for name, x in tensors.items()}]
    given = [attend("tiled", SE3, tensors, skip=skip) for tensors in problems]
    kept = [{name: x.clone() for name, x in found.items()} for found in given]
    with torch.inference_mode():
        for tensors in problems:
            lie_attention(**tensors, key=tensors["query"], group=SE3, impl="tiled", skip=skip)
    with ThreadPoolExecutor(4) as threads:
        again = list(threads.map(lambda tensors: attend("tiled", SE3, tensors, skip=skip), 5 * problems))
    for found, expected in zip(given + again, 6 * kept):
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_errors(generator):
    tensors = problem(SE2, generator)
    tensors["key"] = tensors["query"]
    with pytest.raises(ValueError, match="impl must be one of auto, reference, tiled, triton"):
        lie_attention(**tensors, group=SE2, impl="fast")
    with pytest.raises((ValueError, RuntimeError), match='use impl="tiled"'):  # float64, and no GPU: no silent fallback
        lie_attention(**tensors, group=SE2, impl="triton")
    query = tensors["query"].clone().requires_grad_()
    out = lie_attention(**(tensors | {"query": query, "key": query}), group=SE2, impl="tiled")
    (gradient,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: use impl="reference"'):
        gradient.square().sum().backward()


# As an operator of torch


def operator_arguments(group, generator, *, cross=False, tangents=False, content=False, skip=0.0):
    tensors = problem(group, generator, num_keys=7 if cross else None, content=content)
    pairs = _geometry.pair_geometry(group, "principal", tangents)
    query = pairs.pack_query(tensors["query"][:, None], None).contiguous()
    key = pairs.pack_key(tensors["key"][:, None]).contiguous() if cross else None
    scale = tensors["block_weights"] / tensors["temperature"][:, None]
    contents = (tensors["content_query"], tensors["content_key"]) if content else (None, None)
    leaves = [x if x is None else x.requires_grad_() for x in (query, key, scale, tensors["value"], *contents)]
    return (*leaves, None, str(group), "principal", "error", False, True, tangents, skip, False)


@pytest.mark.parametrize(
    "case",
    [{}, {"cross": True}, {"content": True}, {"cross": True, "tangents": True}, {"skip": 0.1}],
    ids=lambda c: " ".join(c) or "self",
)
def test_opcheck(case, generator):
    torch.library.opcheck(torch.ops.erlangen.lie_attention.default, operator_arguments(SE2, generator, **case))


@pytest.mark.parametrize("group", [SE2, SE3, Aff2], ids=str)
def test_the_public_call_compiles_whole(group, generator):
    torch._dynamo.reset()
    tensors = problem(group, generator, displaced=True, content=True)
    names = list(tensors)

    def attend_with(impl):
        def function(*leaves):
            arguments = dict(zip(names, leaves))
            return lie_attention(**arguments, key=arguments["query"], group=group, causal=True, impl=impl)

        return function

    results = []
    for function in (attend_with("reference"), torch.compile(attend_with("auto"), fullgraph=True, backend="aot_eager")):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors.values()]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group", [SE2, SE3, Product(SO3, Translation(1))], ids=str)
def test_compiled_calls_fuse_their_tiles(group, generator):
    torch._dynamo.reset()
    tensors = problem(group, generator)
    expected, found = attend("reference", group, tensors), attend("tiled", group, tensors, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    fused = fused_geometry(str(group), "principal")
    assert fused.weigh_full.calls and fused.vjp_full.calls


@pytest.mark.parametrize("case", ["displaced", "content", "queries a head"])
def test_compiled_calls_of_every_kind(case, generator):
    torch._dynamo.reset()
    tensors = problem(SE3, generator, **CASES[case])
    mask = torch.rand(2, 1, 10, tensors["value"].shape[2], generator=generator) < 0.6
    low = {name: tensor.float() for name, tensor in tensors.items()}
    expected = attend("reference", SE3, tensors, mask=mask, causal=True)
    found = attend("tiled", SE3, low, mask=mask, causal=True, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=2e-4, atol=2e-4)


def test_matrix_products_of_low_precision_are_not_used(generator):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert_same(SE3, problem(SE3, generator))
        assert not isinstance(_geometry.pair_geometry(SE3, "principal").block(torch.rand(1, 1, 7, 4), -1).rows, list)
    finally:
        torch.set_float32_matmul_precision(before)


def test_beyond_the_limit_of_compilations_tiles_are_not_fused(generator):
    torch._dynamo.reset()
    tensors = problem(SE2, generator)
    expected = attend("reference", SE2, tensors)
    with torch._dynamo.config.patch(recompile_limit=1):
        found = attend("tiled", SE2, tensors, compiled=True)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_without_a_compiler_there_is_a_warning(tmp_path):
    code = """if True:
        import torch
        from erlangen.lie import SE2, lie_attention

        p, v, w, t = SE2.random(1, 9), torch.randn(1, 2, 9, 3), torch.ones(2, 2), torch.ones(2)
        attend = lambda p: lie_attention(p, p, v, group=SE2, block_weights=w, temperature=t)
        assert torch.equal(torch.compile(attend, backend="eager")(p), attend(p))
    """
    environment = os.environ | {"CXX": "/nonexistent/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tiles of lie_attention are not compiled, and slower" in done.stderr


def test_the_transformer_compiles_whole(generator):
    group = SE3
    torch._dynamo.reset()
    config = LieTransformerConfig(group=str(group), feature_dim=3, num_layers=1, num_heads=2, dim=8)
    model = LieTransformer(config, generator=generator).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.pose_step.weight.normal_(0.0, 0.02, generator=generator)
    features = torch.randn(2, 9, 3, generator=generator, dtype=torch.float64)
    where = poses(group, 2, 9, generator=generator, wide=False)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    results = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        hidden, moved = function(where, features, mask)
        (hidden.square().sum() + moved.square().sum()).backward()
        results.append([hidden, moved, *(p.grad for p in model.parameters())])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Memory

MEMORY = """
import sys
import torch
from erlangen import lie

torch.set_num_threads(1)
group, size, impl = lie.parse(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
generator = torch.Generator().manual_seed(0)


def run(size):
    poses = group.random(1, size, generator=generator).requires_grad_()
    value = torch.randn(1, 4, size, 32, generator=generator).requires_grad_()
    weights, temperature = torch.ones(4, len(group.blocks)), torch.ones(4)
    lie.lie_attention(
        poses, poses, value, group=group, block_weights=weights.requires_grad_(),
        temperature=temperature.requires_grad_(), impl=impl, check=False
    ).sum().backward()


def peak():  # resource.getrusage would count what the parent had
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


run(64)
before = peak()
run(size)
print((peak() - before) / 1024)
"""


def peak_megabytes(group, size, impl):
    line = [sys.executable, "-c", MEMORY, str(group), str(size), impl]
    return float(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_no_matrix_of_all_pairs_is_alive():
    """At 4096 poses one number a pair and head is 256 MB; measured in processes of their own."""
    assert peak_megabytes(SE3, 4096, "tiled") < 100
    assert peak_megabytes(SE3, 1024, "reference") > 100, "the measurement sees dense matrices"
