"""Lie attention in Triton against the dense float64 reference: values and every gradient.

In Triton's interpreter; or compiled, where there is a GPU.
"""

import importlib.util
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from erlangen.lie import GL, SE2, SE3, SO2, SO3, Aff2, Product, Translation, _triton
from erlangen.lie._geometry import pair_geometry
from erlangen.lie.attention import lie_attention
from erlangen.testing import assert_low_precision

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPS = [SO2, SE2, SO3, SE3, Translation(3)]
H, D, E = 2, 5, 3  # of them no one is a power of 2 that `tl.dot` takes


@pytest.fixture(autouse=True)
def there_is_triton(request):
    if importlib.util.find_spec("triton") is None and "refused" not in request.node.name:
        pytest.skip("the package triton is not installed")


def problem(group, generator, *, num_queries=17, num_keys=None, batch=1, heads=1, displaced=False, content=False):
    """Arguments of lie_attention; without num_keys the queries are the keys."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def poses(num):
        return group.random(batch, *([heads] if heads > 1 else []), num, generator=generator, dtype=torch.float64)

    out = {"query": poses(num_queries)} | ({} if num_keys is None else {"key": poses(num_keys)})
    num_keys = num_keys or num_queries
    out["value"] = normal(batch, H, num_keys, D)
    out["block_weights"], out["temperature"] = 0.3 + normal(H, len(group.blocks)).abs(), 0.5 + normal(H).abs()
    if displaced:
        out["displacement"] = group.exp(0.3 * normal(H, group.dim).clamp(-2, 2))
    if content:
        out["content_query"], out["content_key"] = normal(batch, H, num_queries, E), normal(batch, H, num_keys, E)
    return {name: tensor.float().to(DEVICE) for name, tensor in out.items()}


def in_triton(query, key, value, *, group, block_weights, temperature, displacement=None, **options):
    """Attention from poses, packed as `lie_attention` does."""
    pairs = pair_geometry(group, "principal")
    query, same = (query if query.ndim == 5 else query[:, None]), query is key
    packed, packed_key = pairs.pack_query(query, displacement), None
    if not same or displacement is not None:
        packed_key = pairs.pack_key(query if same else key if key.ndim == 5 else key[:, None])
        heads = max(packed.shape[1], packed_key.shape[1])
        packed, packed_key = packed.expand(-1, heads, -1, -1), packed_key.expand(-1, heads, -1, -1)
    return _triton.triton_attention(
        packed, packed_key, block_weights / temperature[:, None], value, group=group, chart="principal", **options
    )


def attend(function, group, tensors, **options):
    """Output and the gradient of every tensor, that of poses tangent to the group."""
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    out = function(**({"key": tensors["query"]} | tensors), group=group, **options)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    out.backward(probe + 0.3 * out.detach())
    found = {"output": out.detach()}
    for name, tensor in tensors.items():
        is_pose = name in ("query", "key", "displacement")
        found[name] = group.project_tangent(tensor.detach(), tensor.grad) if is_pose else tensor.grad
    return {name: tensor.cpu() for name, tensor in found.items()}


reference = partial(lie_attention, impl="reference")


def assert_same(group, tensors, **options):
    """To 1e-5 of the largest number: 84 roundings, for sums over thousands of pairs; the worst seen is 5e-6.

    The temperature's gradient sums those of the blocks, and little of them may be left: "tiled" is off by 7e-5 too.
    """
    expected = attend(reference, group, {name: tensor.double() for name, tensor in tensors.items()}, **options)
    found = attend(in_triton, group, tensors, **options)
    for name, value in expected.items():
        error = (found[name] - value).abs().max() / value.abs().max().clamp(min=1)
        assert error <= (1e-4 if name == "temperature" else 1e-5), f"{name}: {error:.2e}"
    return found


CASES = {
    "self": {},
    "cross": {"num_keys": 33},
    "displaced": {"num_queries": 33, "displaced": True},
    "content": {"content": True, "batch": 2},
    "a set of poses a head": {"heads": H},
    "queries and keys a head": {"num_keys": 9, "heads": H, "displaced": True, "content": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_values_and_gradients_are_those_of_the_reference(group, case, generator):
    assert_same(group, problem(group, generator, **CASES[case]))


@pytest.mark.parametrize("num", [1, 33, 65])
def test_sizes(num, generator):
    assert_same(SE3, problem(SE3, generator, num_queries=num))
    assert_same(SE2, problem(SE2, generator, num_queries=num, num_keys=17), causal=True)


@pytest.mark.parametrize("num_heads, heads", [(1, 1), (3, 1), (4, 2)])
def test_any_number_of_heads(num_heads, heads, generator, monkeypatch):
    """An even number is taken two by two."""
    monkeypatch.setitem(globals(), "H", num_heads)
    tensors = problem(SE2, generator, num_queries=5)
    assert_same(SE2, tensors)
    scale = tensors["block_weights"]
    packed = torch.zeros(1, 1, 3, 5, device=DEVICE)
    launch = _triton._Launch(packed, None, scale, tensors["value"], None, None, None, "SE2", "principal", False)
    assert launch.heads == heads


@pytest.mark.parametrize("keys", [None, 9, 40])
@pytest.mark.parametrize("kind", ["keys", "pairs", "heads", "rows"])
def test_masks(keys, kind, generator):
    tensors = problem(SE3, generator, num_keys=keys, batch=2, content=kind == "rows")
    num_keys = keys or 17
    shape = {"keys": (2, 1, 1), "pairs": (1, 1, 17), "heads": (2, H, 1), "rows": (2, H, 17)}[kind]
    mask = torch.rand(*shape, num_keys, generator=generator) < 0.6
    mask[..., 2] = False
    if kind == "rows":
        mask[0, 1] = False
        mask[1, :, 3:7] = False
    found = assert_same(SE3, tensors, mask=mask.to(DEVICE), causal=kind in ("pairs", "heads"))
    if kind == "rows":
        assert found["output"][0, 1].abs().max() == 0
        assert found["content_query"][0, 1].abs().max() == 0
        assert found["query"][1, 3:7].isfinite().all()


def test_rows_without_any_weight(generator):
    """Zero, with zero gradients, and +∞ as the logarithm of their sum: all rows, or those that precede the keys."""
    tensors = problem(SE2, generator, num_queries=40, num_keys=3)
    assert_same(SE2, tensors, causal=True)
    found = attend(in_triton, SE2, tensors, mask=torch.zeros(1, 1, 1, 3, dtype=torch.bool, device=DEVICE))
    assert all((value == 0).all() for value in found.values())
    packed = [pair_geometry(SE2, "principal").pack_key(tensors[name][:, None]) for name in ("query", "key")]
    given = (tensors["block_weights"], tensors["value"], None, None, None)
    log_sum = _triton._attend(*packed, *given, "SE2", "principal", True)[1]
    assert torch.equal(log_sum.cpu().isposinf(), torch.arange(40).expand(1, H, 40) < 37)


@pytest.mark.parametrize("group", [SO2, SE2, SO3, SE3], ids=str)
def test_half_turns_and_coincident_poses(group, generator):
    """Values agree, also at half a turn, where the slope depends on the side; away from it gradients do too."""
    base = group.random(1, 3, generator=generator, dtype=torch.float64)
    angles = [0.0, 0.0, 1e-8, 1e-5, 1e-3, math.pi - 1e-2, math.pi - 1e-5, math.pi]
    xi = torch.zeros(len(angles), group.dim, dtype=torch.float64)
    xi[:, group.blocks["rotation"][-1]] = torch.tensor(angles, dtype=torch.float64)
    query = group.compose(base[:, :, None], group.exp(xi)).flatten(1, 2).float().to(DEVICE)
    tensors = problem(group, generator, num_queries=query.shape[1]) | {"query": query}
    found = attend(in_triton, group, tensors)
    expected = attend(reference, group, {name: tensor.double() for name, tensor in tensors.items()})
    assert all(value.isfinite().all() for value in found.values())
    torch.testing.assert_close(found["output"].double(), expected["output"], rtol=1e-5, atol=1e-5)
    apart = [n for n in range(query.shape[1]) if n % len(angles) < 6]
    assert_same(group, tensors | {"query": query[:, apart], "value": tensors["value"][:, :, apart]})


@pytest.mark.parametrize("group", [SE2, SE3, Translation(2)], ids=str)
def test_far_from_the_origin_it_is_as_good_as_the_dense_float32(group, generator):
    tensors = problem(group, generator, num_queries=40, displaced=True)
    xi = torch.zeros(group.dim, dtype=torch.float64)
    xi[-1] = 1e4
    far = group.compose(group.exp(xi), tensors["query"].cpu().double())
    tensors["query"] = far.float().to(DEVICE)
    exact = attend(reference, group, {name: tensor.double() for name, tensor in tensors.items()})
    assert_low_precision(attend(in_triton, group, tensors), attend(reference, group, tensors), exact, ratio=4.0)


def test_rows_far_from_all_keys_keep_their_weights(generator):
    """Scores of −10⁴ only: exp(s) is zero, the softmax is not. Scores that large are rounded to 1e-3."""
    tensors = problem(SE2, generator, num_keys=9)
    tensors["query"][:, 3:6, 0, 2] += 300.0
    expected, found = attend(reference, SE2, tensors), attend(in_triton, SE2, tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3 * value.abs().max().item())


@pytest.mark.parametrize("needed", [("value",), ("query",), ("block_weights", "key"), ("content_key",)])
def test_gradients_of_some_inputs_only(needed, generator):
    tensors = problem(SE2, generator, num_queries=5, num_keys=6, content=True)
    expected = attend(in_triton, SE2, tensors)
    some = {name: tensor.requires_grad_(name in needed) for name, tensor in tensors.items()}
    out = in_triton(**some, group=SE2)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out) + 0.3 * out.detach())
    for name, tensor in some.items():
        assert (tensor.grad is not None) == (name in needed)
        if name in needed:
            found = SE2.project_tangent(tensor.detach(), tensor.grad) if name in ("query", "key") else tensor.grad
            assert torch.equal(found.cpu(), expected[name])


def test_results_repeat_bit_by_bit(generator):
    tensors = problem(SE3, generator, num_queries=33)
    first, second = attend(in_triton, SE3, tensors), attend(in_triton, SE3, tensors)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", ["query", "key", "block_weights", "value", "content_query", "content_key"])
def test_the_comparison_sees_a_wrong_gradient(name, generator, monkeypatch):
    right = _triton._Launch.backward
    place = ["query", "key", "block_weights", "value", "content_query", "content_key"].index(name)

    def wrong(self, *arguments):
        grads = list(right(self, *arguments))
        grads[place] = grads[place] * (1 + 1e-3)
        return tuple(grads)

    monkeypatch.setattr(_triton._Launch, "backward", wrong)
    with pytest.raises(AssertionError, match=name):
        assert_same(SE2, problem(SE2, generator, num_queries=5, num_keys=6, content=True))


def test_the_comparison_sees_a_wrong_output(generator, monkeypatch):
    right = _triton._Launch.forward
    monkeypatch.setattr(_triton._Launch, "forward", lambda self: tuple(x * (1 + 1e-3) for x in right(self)))
    with pytest.raises(AssertionError, match="output"):
        assert_same(SE2, problem(SE2, generator, num_queries=5))


def arguments(group, generator, **options):
    """Those of the operator."""
    tensors = problem(group, generator, num_queries=5, **options)
    packed = pair_geometry(group, "principal").pack_key(tensors["query"][:, None])
    return packed.contiguous(), None, tensors["block_weights"], tensors["value"]


def test_opcheck(generator):
    given = [None if x is None else x.requires_grad_() for x in arguments(SE2, generator)]
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool, device=DEVICE)
    for content in ((None, None), (torch.randn(1, H, 5, E, generator=generator).to(DEVICE).requires_grad_(),) * 2):
        torch.library.opcheck(_triton._attend, (*given, *content, mask, "SE2", "principal", True))


def test_it_compiles_whole(generator):
    tensors = problem(SE2, generator, num_queries=9, num_keys=5)
    whole = torch.compile(in_triton, fullgraph=True, backend="aot_eager")
    found, expected = attend(whole, SE2, tensors), attend(in_triton, SE2, tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("group, chart", [(GL(2), "polar"), (Aff2, "principal"), (Product(SE2, SO3), "principal")])
def test_groups_without_a_formula_are_refused(group, chart):
    packed, scale = torch.zeros(1, 1, 4, 3, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    with pytest.raises(ValueError, match=r'SO2, SE2, SO3, SE3 and Translation.*use impl="tiled"'):
        _triton.triton_attention(packed, None, scale, torch.ones(1, 1, 3, 2), group=group, chart=chart)


def test_float64_is_refused(generator):
    packed, _, scale, value = arguments(SE2, generator)
    with pytest.raises(ValueError, match=r'float32, received torch.float64: use impl="tiled"'):
        _triton.triton_attention(packed, None, scale, value.double(), group=SE2, chart="principal")


def test_without_triton_it_is_refused(generator, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    packed, _, scale, value = arguments(SE2, generator)
    with pytest.raises(RuntimeError, match=r'needs the package triton.*use impl="tiled"'):
        _triton.triton_attention(packed, None, scale, value, group=SE2, chart="principal")


def test_other_devices_and_double_gradients(generator, monkeypatch):
    packed, _, scale, value = arguments(SE2, generator)
    out = _triton.triton_attention(packed.requires_grad_(), None, scale, value, group=SE2, chart="principal")
    (gradient,) = torch.autograd.grad(out.square().sum(), packed, create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative: use impl="reference"'):
        gradient.square().sum().backward()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r'runs on CUDA.*received tensors on cpu: use impl="tiled"'):
        _triton.triton_attention(packed.cpu(), None, scale.cpu(), value.cpu(), group=SE2, chart="principal")


@pytest.mark.parametrize("queries, keys", [(0, 3), (3, 0)])
def test_nothing_to_attend(queries, keys):
    query, key = torch.zeros(1, 1, 3, queries, device=DEVICE), torch.zeros(1, 1, 3, keys, device=DEVICE)
    value = torch.ones(1, 2, keys, 4, device=DEVICE, requires_grad=True)
    scale = torch.ones(2, 2, device=DEVICE)
    out = _triton.triton_attention(query, key, scale, value, group=SE2, chart="principal")
    assert out.shape == (1, 2, queries, 4) and (out == 0).all()
    out.sum().backward()
    assert (value.grad == 0).all()


def test_kernels_compile_for_cuda(tmp_path):
    """No GPU is needed for that. In a process of its own, whose Triton does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.split() == ["_forward_kernel", "_query_kernel", "_key_kernel"] * 2


class _Compiler:
    """In place of a kernel: compiles it for what it is called with, and prints its name."""

    def __init__(self, name):
        self.name, self.kernel = name, getattr(_triton, name)

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *given, num_warps, enable_fp_fusion, **constants):
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names, kinds = self.kernel.arg_names, {torch.float32: "*fp32", torch.uint8: "*u8"}
        signature = dict.fromkeys(names, "constexpr")
        for name, x in zip(names, given):
            if isinstance(x, torch.Tensor):
                signature[name] = kinds[x.dtype]
            elif x is None or x == 1:  # so does Triton's own call
                constants[name] = x
            else:
                signature[name] = "i32" if isinstance(x, int) else "fp32"
        source = ASTSource(self.kernel, signature, {(names.index(name),): x for name, x in constants.items()})
        options = {"num_warps": num_warps, "enable_fp_fusion": enable_fp_fusion}
        triton.compile(source, target=GPUTarget("cuda", 80, 32), options=options)
        print(self.name)


def _compile_for_cuda():
    _triton._load()
    _triton._expect_device = lambda device: None
    for name in ("_forward_kernel", "_query_kernel", "_key_kernel"):
        setattr(_triton, name, _Compiler(name))
    content, mask = torch.ones(2, 2, 9, 5), torch.ones(2, 1, 1, 9, dtype=torch.bool)
    for group, shape, numbers, extra in (
        ("SE3", (2, 2, 9, 16), (10, 7), (content, content, mask)),
        ("SE2", (1, 1, 1, 16), (3, 3), (None, None, None)),
    ):
        batch, num_heads, num, _ = shape
        query, key = (torch.ones(batch, 1, p, num) for p in numbers)
        scale, value = torch.ones(num_heads, 2), torch.ones(shape)
        launch = _triton._Launch(query, key, scale, value, *extra, group, "principal", True)
        launch.backward(value, *launch.forward(), True, True)


if __name__ == "__main__":
    _compile_for_cuda()
