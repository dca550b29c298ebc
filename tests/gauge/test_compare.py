"""Comparison up to gauge: what is the same function is found to be, what is not is not."""

import copy
import json

import pytest
import torch

from erlangen.gauge import canonicalize, compare, model_layout, random_move
from erlangen.gauge._assignment import assignment, grouped_assignment, matching
from erlangen.lm import GPT, GPTConfig

tiny = pytest.importorskip("tiny_transformers")

OURS = {
    "learned": {},
    "untied": {"tie_embeddings": False},
    "rotary": {"positions": "rotary", "tie_embeddings": False},
    "partial": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 2},
    "grouped": {"num_kv_heads": 2, "mlp": "swiglu"},
    "one key": {"num_kv_heads": 1, "positions": "rotary", "attention_bias": False, "bias": False},
    "prelu": {"mlp": "prelu"},
    "qk norm": {"qk_norm": True, "positions": "rotary", "mlp": "swiglu"},
    "qk norm plain": {"qk_norm": True, "num_kv_heads": 2},
}


def generator(seed):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def noisy(model, size, seed=0):
    """The same object, with noise of a relative size on every parameter."""
    g = generator(seed)
    for parameter in model.parameters():
        scale = parameter.double().square().mean().sqrt()
        parameter.add_(size * scale * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return model


def ours(name, seed=0):
    config = GPTConfig(vocab_size=29, context_length=8, num_layers=2, num_heads=4, dim=24, **OURS[name])
    with torch.random.fork_rng():
        model = GPT(config, generator=generator(seed)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator(seed + 100), dtype=torch.float64))
    return model


def logits(model):
    return model(torch.randint(29, (3, 8), generator=generator(5)))[0]


# --- moves: what leaves a function alone, written for these tests -----------------------------------------------------


class Mover:
    """Legal moves of a model in float64, in place, by its layout."""

    def __init__(self, model, condition, seed=3):
        self.layout = model_layout(model)
        self.tensors = {name: p.data for name, p in model.named_parameters(remove_duplicate=False)}
        self.condition, self.g = condition, generator(seed)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.g, dtype=torch.float64)

    def matrices(self, count, width):
        """[count, width, width] of the condition number asked for."""
        left, right = (torch.linalg.qr(self.draw(count, width, width)).Q for _ in range(2))
        values = torch.logspace(0.5, -0.5, width, dtype=torch.float64).pow(torch.tensor(self.condition).log10())
        return left @ torch.diag(values) @ right

    def change(self, projection, act):
        """``act`` on the slices [heads, width, other] of a map; on biases as on one more column."""
        weight = self.tensors[projection.weight]
        heads = projection.heads(weight).clone()
        bias = None
        if projection.bias_name is not None and projection.side == "out":
            bias = self.tensors[projection.bias_name]
            heads = torch.cat([heads, projection.head_biases(bias)[..., None]], dim=-1)
        heads = act(heads)
        if bias is not None:
            projection.put_head_biases(bias, heads[..., -1].contiguous())
            heads = heads[..., :-1]
        projection.put_heads(weight, heads.contiguous())

    def query_key(self, attention):
        kv, width, group = attention.num_kv_heads, attention.head_dim, attention.group_size
        if attention.qk_norm:
            queries, keys = (10 ** self.draw(n, 1, 1).clamp(-1, 1) for n in (attention.num_heads, kv))
            if attention.qk_norm_over == "all":
                queries, keys = queries[:1], keys[:1]
            self.change(attention.query, lambda w: w * queries)
            self.change(attention.key, lambda w: w * keys)
            return
        matrices = torch.zeros(kv, width, width, dtype=torch.float64)
        turned = attention.rotary_dim
        if turned:
            planes = attention.rotary.planes()
            size = 10 ** self.draw(kv, len(planes)).clamp(-1, 1)
            angle = 3 * self.draw(kv, len(planes))
            i, j = planes.unbind(1)
            matrices[:, i, i] = matrices[:, j, j] = size * angle.cos()
            matrices[:, j, i] = size * angle.sin()
            matrices[:, i, j] = -size * angle.sin()
        if turned < width:
            matrices[:, turned:, turned:] = self.matrices(kv, width - turned)
        self.change(attention.query, lambda w: matrices.repeat_interleave(group, 0) @ w)
        self.change(attention.key, lambda w: torch.linalg.inv(matrices).mT @ w)
        if attention.key.bias and attention.soft_cap is None:
            shift = self.draw(kv, width)
            shift[:, :turned] = 0  # the key bias is gauge on what positions do not turn
            attention.key.put_head_biases(
                self.tensors[attention.key.bias_name],
                attention.key.head_biases(self.tensors[attention.key.bias_name]) + shift,
            )

    def value_output(self, attention):
        kv, width, group = attention.num_kv_heads, attention.value_width, attention.group_size
        matrices = self.matrices(kv, width)
        self.change(attention.value, lambda w: matrices @ w)
        self.change(attention.output, lambda w: torch.linalg.inv(matrices).repeat_interleave(group, 0).mT @ w)
        if attention.value.bias and attention.output.bias:
            shift = self.draw(kv, width)
            bias = self.tensors[attention.value.bias_name]
            attention.value.put_head_biases(bias, attention.value.head_biases(bias) + shift)
            written = attention.output.heads(self.tensors[attention.output.weight])
            shifts = shift.repeat_interleave(group, 0)
            self.tensors[attention.output.bias_name].sub_(torch.einsum("hvd,hv->d", written, shifts))

    def order(self, attention):
        kv, group = attention.num_kv_heads, attention.group_size
        groups = torch.randperm(kv, generator=self.g)
        heads = torch.cat([k * group + torch.randperm(group, generator=self.g) for k in groups.tolist()])
        for part, order in (("query", heads), ("key", groups), ("value", groups), ("output", heads)):
            self.change(getattr(attention, part), lambda w, order=order: w[order])
        if attention.latent is not None:
            self.change(attention.latent.rotary_query, lambda w: w[heads])
        return heads

    def neurons(self, mlp):
        order = torch.randperm(mlp.up.width, generator=self.g)
        scale = 10 ** self.draw(len(order)).clamp(-1, 1)
        if mlp.gate is not None:
            scale = scale * torch.where(self.draw(len(order)) < 0, -1.0, 1.0)
            self.change(mlp.gate, lambda w: w[:, order])
        elif not mlp.homogeneous:
            scale = torch.ones_like(scale)
        if mlp.slope is not None:
            self.tensors[mlp.slope].copy_(self.tensors[mlp.slope][order].clone())
        self.change(mlp.up, lambda w: (w * scale[:, None])[:, order])
        self.change(mlp.down, lambda w: (w / scale[:, None])[:, order])

    def gains(self, norm, readers):
        """Part of a norm's gain goes into the maps that read it."""
        factor = 10 ** (0.5 * self.draw(self.layout.dim)).clamp(-1, 1)
        weight = self.tensors[norm.weight]
        weight.copy_((weight + norm.offset) * factor - norm.offset)
        for reader in readers:
            # Slices of one map share a weight: each is divided by itself. Biases are no columns of the norm.
            tensor = self.tensors[reader.weight]
            reader.put_heads(tensor, reader.heads(tensor) / factor)
        if norm.bias_name is not None:
            self.tensors[norm.bias_name].mul_(factor)

    def all(self):
        heads = []
        for layer in self.layout.layers:
            attention, mlp = layer.attention, layer.mlp
            self.query_key(attention)
            self.value_output(attention)
            heads.append(self.order(attention))
            if mlp is not None:
                self.neurons(mlp)
            if layer.attention_norm and layer.attention_norm != layer.mlp_norm and attention.latent is None:
                self.gains(layer.attention_norm, (attention.query, attention.key, attention.value))
            if layer.mlp_norm and mlp is not None and layer.attention_norm != layer.mlp_norm:
                self.gains(layer.mlp_norm, [part for part in (mlp.up, mlp.gate) if part is not None])
        tables = list(self.layout.other_embeddings)
        if tables:  # a constant goes from one table to another
            constant = self.draw(self.layout.dim)
            if self.layout.soft_cap is None:
                self.tensors[self.layout.token_embedding].add_(constant)
                self.tensors[tables[0]].sub_(constant)
        return heads


def moved(model, condition=100.0, seed=3):
    model = copy.deepcopy(model)
    return model, Mover(model, condition, seed).all()


# --- one function -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_moved_model_is_itself(name):
    model = ours(name)
    other, orders = moved(model)
    expected, found = logits(model), logits(other)
    shift = (found - expected).mean(-1, keepdim=True)  # of tied logits, by the constant that went into positions
    assert (found - expected - shift).abs().max() < 1e-8 * expected.abs().max(), "the move itself must be legal"
    result = compare(model, other, inputs=torch.zeros(1, 4, dtype=torch.int64))
    assert result.same_function and result.distance < 1e-9 and result.similarity > 1 - 1e-15, result
    assert result.naive_distance > 0.3 and result.frame == "same"
    for layer, order in zip(result.layers, orders):
        assert layer.heads == tuple(order.argsort().tolist())
        assert layer.num_neurons_moved > 55 and layer.naive > 0.3
        for values in layer.spectra.values():
            torch.testing.assert_close(values[0], values[1], rtol=1e-8, atol=1e-10)
    back = compare(other, model)
    assert back.same_function and back.distance < 1e-9


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_a_close_copy_is_as_far_after_a_move_as_before(condition):
    """The distance is one of functions: what it is before a move, it is after."""
    for name in ("learned", "partial", "grouped", "qk norm"):
        model = ours(name)
        near = noisy(copy.deepcopy(model), 0.01)
        before, after = compare(model, near), compare(model, moved(near, condition)[0])
        assert before.distance == pytest.approx(after.distance, rel=1e-5)
        assert 0.005 < before.distance < 0.02 and not before.same_function and not after.same_function
        assert 0.005 < before.naive_distance < 0.01 < 0.3 < after.naive_distance


def test_another_model_is_another():
    for name in OURS:
        result = compare(ours(name), ours(name, seed=1))
        assert not result.same_function and result.distance > 0.5
        assert "not related" in str(result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_difference_and_more_than_rounding_is(dtype):
    eps = torch.finfo(dtype).eps
    for name in ("learned", "rotary", "grouped", "qk norm"):
        model = ours(name)
        rounded = copy.deepcopy(model).to(dtype)
        result = compare(model, rounded)
        assert result.same_function and 0 < result.distance < eps
        moved_and_rounded = compare(rounded, moved(model, 30.0)[0].to(dtype))
        assert moved_and_rounded.same_function, "numbers of a stretched head are as exact as they are large"
        result = compare(model, noisy(copy.deepcopy(model), 10 * eps).to(dtype))
        assert not result.same_function and result.distance < 20 * eps


@pytest.mark.parametrize("name", ("learned", "partial", "one key", "qk norm"))
def test_no_parameter_is_overlooked(name):
    """A change of any one tensor changes the outputs, and is seen where it was made; of gauge alone, neither."""
    model = ours(name)
    expected = logits(model).log_softmax(-1)
    for changed, _ in model.named_parameters():
        other = copy.deepcopy(model)
        parameter = other.get_parameter(changed)
        with torch.no_grad():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(1), dtype=torch.float64))
        visible = (logits(other).log_softmax(-1) - expected).abs().max() > 1e-9
        result = compare(model, other)
        assert result.same_function == (not visible), changed
        if changed.startswith("blocks.1.") and visible:
            assert result.layers[0].distance < 1e-12 < 1e-4 < result.layers[1].distance
    without_rotary = OURS[name].get("positions") != "rotary" and not OURS[name].get("qk_norm")
    if without_rotary and OURS[name].get("attention_bias", True):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.blocks[0].attention.key.bias.normal_(generator=generator(1))
        assert compare(model, other).same_function, "the key bias alone is gauge"


def test_moves_that_are_not_allowed_are_differences():
    model = ours("rotary")
    layout = model_layout(model)
    attention = layout.layers[0].attention

    def distance(change):
        other = copy.deepcopy(model)
        change(Mover(other, 10.0))
        assert (logits(other) - logits(model)).abs().max() > 1e-3
        result = compare(model, other)
        assert not result.same_function
        return result

    def generic(mover):
        matrices = mover.matrices(4, attention.head_dim)
        mover.change(attention.query, lambda w: matrices @ w)
        mover.change(attention.key, lambda w: torch.linalg.inv(matrices).mT @ w)

    assert distance(generic).layers[0].query_key.distance > 0.1
    assert distance(lambda m: m.change(attention.value, lambda w: 2 * w)).layers[0].value_output.distance > 0.1
    assert distance(lambda m: m.change(layout.layers[1].mlp.up, lambda w: -w)).layers[1].mlp.distance > 0.5

    def key_bias(mover):
        mover.tensors[attention.key.bias_name].add_(1.0)

    assert distance(key_bias).layers[0].query_key.distance > 0.01, "positions turn the key bias"

    def across_groups(mover):
        order = torch.tensor([0, 2, 1, 3])
        part = model_layout(grouped).layers[0].attention
        mover.change(part.query, lambda w: w[order])
        mover.change(part.output, lambda w: w[order])

    grouped = model = ours("grouped")
    layout = model_layout(grouped)
    assert distance(across_groups).layers[0].query_key.distance > 0.1, "a query head keeps its key"


@torch.no_grad()
def turned(model, turn):
    """A pre-norm model of ours without tied embeddings in another frame: rows of the stream times ``turn``."""
    model = copy.deepcopy(model)

    def fold(norm, *readers):
        with_biases = all(reader.bias is not None for reader in readers)
        for reader in readers:
            if with_biases:
                reader.bias.add_(reader.weight @ norm.bias)
            reader.weight.mul_(norm.weight)
            reader.weight.copy_(reader.weight @ turn)
        norm.bias.zero_() if with_biases else norm.bias.copy_((norm.bias / norm.weight) @ turn)
        norm.weight.fill_(1.0)

    for block in model.blocks:
        fold(block.attention_norm, block.attention.query, block.attention.key, block.attention.value)
        fold(block.mlp_norm, block.mlp.up)
        for writer in (block.attention.output, block.mlp.down):
            writer.weight.copy_(turn.mT @ writer.weight)
            writer.bias.copy_(writer.bias @ turn)
    fold(model.norm, model.head)
    tables = [model.token_embedding] + ([model.position_embedding] if model.rotary is None else [])
    for table in tables:
        table.weight.copy_(table.weight @ turn)
    return model


def test_a_turned_residual_stream_is_recognised():
    ones = torch.ones(24, 1, dtype=torch.float64) / 24**0.5
    basis = torch.linalg.qr(torch.cat([ones, torch.randn(24, 23, generator=generator(0)).double()], 1)).Q
    inner = torch.linalg.qr(torch.randn(23, 23, generator=generator(1)).double()).Q
    turn = basis @ torch.block_diag(torch.ones(1, 1).double(), inner) @ basis.mT  # keeps the direction of ones
    centre = torch.eye(24, dtype=torch.float64) - 1 / 24
    for name in ("untied", "rotary"):
        model = ours(name)
        other = turned(moved(model)[0], turn)
        expected, found = logits(model).log_softmax(-1), logits(other).log_softmax(-1)
        assert (expected - found).abs().max() < 1e-8
        result = compare(model, other)
        assert result.same_function and result.frame == "turned" and result.distance < 1e-9, result
        torch.testing.assert_close(result.frame_matrix @ centre, turn.mT @ centre, atol=1e-8, rtol=0)
        near = noisy(copy.deepcopy(model), 0.003)
        before, after = compare(model, near), compare(model, turned(moved(near)[0], turn))
        assert before.frame == "same" and after.frame == "turned" and not after.same_function
        assert after.distance == pytest.approx(before.distance, rel=0.2), "a frame of best fit is a little off"
        # A turn that moves the direction of ones is another function, and no frame makes it the same.
        whole = torch.linalg.qr(torch.randn(24, 24, generator=generator(2)).double()).Q
        assert not compare(model, turned(model, whole)).same_function


# --- the contrast -----------------------------------------------------------------------------------------------------


def unbiased_cka(x, y):
    """Unbiased linear CKA of the rows of two matrices, as AWM takes it of W_Q, and of W_K (arXiv 2510.06738)."""

    def hsic(k, m):
        n = len(k)
        k, m = (a - torch.diag(a.diagonal()) for a in (k, m))
        ones = torch.ones(n, dtype=k.dtype)
        cross = (k @ m).trace() + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
        return (cross - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))

    k, m = (a.detach() @ a.detach().mT for a in (x, y))
    return float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt())


def test_a_fine_tuned_copy_is_recognised_where_a_published_fingerprint_is_fooled():
    config = GPTConfig(vocab_size=50, context_length=8, num_layers=1, num_heads=4, dim=128, positions="rotary")
    model = GPT(config, generator=generator(0)).double()
    tuned = noisy(copy.deepcopy(model), 0.1)
    stranger = GPT(config, generator=generator(1)).double()
    fooled = copy.deepcopy(tuned)
    mover = Mover(fooled, 1.0)
    attention = mover.layout.layers[0].attention
    planes = attention.rotary.planes()
    scale = torch.empty(4, 32, 1, dtype=torch.float64)
    scale[:, planes] = (3 * mover.draw(4, len(planes), 1)).exp()[:, :, None]
    mover.change(attention.query, lambda w: w * scale)
    mover.change(attention.key, lambda w: w / scale)
    tokens = torch.randint(50, (2, 8), generator=generator(2))
    torch.testing.assert_close(fooled(tokens)[0], tuned(tokens)[0], rtol=1e-9, atol=1e-9)

    def fingerprints(a, b):
        a, b = a.blocks[0].attention, b.blocks[0].attention
        return [unbiased_cka(getattr(a, p).weight.mT, getattr(b, p).weight.mT) for p in ("query", "key")]

    assert min(fingerprints(model, tuned)) > 0.95 and max(fingerprints(model, stranger)) < 0.1
    assert max(fingerprints(model, fooled)) < 0.35, "the fingerprint no longer knows the copy"
    before, after, other = (compare(model, x) for x in (tuned, fooled, stranger))
    assert before.layers[0].query_key.similarity > 0.97 and before.similarity > 0.97
    assert after.layers[0].query_key.similarity == pytest.approx(before.layers[0].query_key.similarity, abs=1e-9)
    assert other.layers[0].query_key.similarity < 0.1
    assert not after.same_function


# --- models of transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_family(name):
    pytest.importorskip("transformers")
    model = tiny.make(name)
    tokens = tiny.some_tokens()
    with torch.no_grad():
        expected = tiny.outputs(model, tokens)
        tiny.without_eps(model)
        expected = tiny.outputs(model, tokens)
        other, _ = moved(model, 10.0)
        found = tiny.outputs(other, tokens)
    difference = found - expected
    if model_layout(model).tied or model_layout(model).unembedding is not None:
        difference = difference - difference.mean(-1, keepdim=True)
    assert difference.abs().max() < 1e-8 * expected.abs().max(), "the move itself must be legal"
    result = compare(model, other)
    assert result.same_function and result.distance < 1e-9 and result.naive_distance > 0.1, result
    near = noisy(copy.deepcopy(model), 1e-3)
    before, after = compare(model, near), compare(model, moved(near, 10.0)[0])
    assert 1e-4 < before.distance < 1e-2 and not before.same_function and not after.same_function
    assert before.distance == pytest.approx(after.distance, rel=1e-6)
    assert compare(model, tiny.make(name, seed=1)).distance > 0.4
    # The moves of the library, and its canonical form.
    free = (model_layout(model).tied or model_layout(model).unembedding is not None) and "bert" not in name
    other = random_move(copy.deepcopy(model), 30.0, generator(1), residual=free)
    result = compare(model, other)
    assert result.same_function and result.distance < 1e-12
    assert result.frame == ("same" if not free else "permuted" if name.startswith(("gemma2", "gemma3")) else "turned")
    canonicalize(other, check=False)
    assert compare(model, other).same_function


# --- arguments and results --------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_named():
    model = ours("learned")
    wide = GPT(GPTConfig(vocab_size=29, context_length=8, num_layers=2, num_heads=4, dim=32))
    with pytest.raises(ValueError, match=r"has width 24, the second model has 32"):
        compare(model, wide)
    with pytest.raises(ValueError, match="key/value heads 4"):
        compare(model, ours("grouped"))
    with pytest.raises(ValueError, match="coordinates that positions turn"):
        compare(ours("rotary"), GPT(GPTConfig(vocab_size=29, num_layers=2, num_heads=4, dim=24, positions="rotary",
                                              rotary_fraction=0.5)))  # fmt: skip
    with pytest.raises(TypeError, match="received a dict"):
        compare({}, model)
    with pytest.raises(TypeError, match="no layout is known for Linear"):
        compare(torch.nn.Linear(2, 2), model)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.blocks[1].attention.query.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        compare(model, broken)
    with pytest.raises(FileNotFoundError):
        compare("no/such/folder", model)


def test_settings_of_one_set_of_weights_may_differ():
    model = ours("rotary")
    other = copy.deepcopy(model)
    object.__setattr__(other, "config", GPTConfig(**{**vars(model.config), "rotary_base": 100.0}))
    result = compare(model, other)
    assert result.distance < 1e-12 and not result.same_function and "rotary_base" in result.notes[0]


def test_other_vocabularies_and_contexts_are_compared_on_what_both_have():
    model = ours("learned")
    longer = GPT(GPTConfig(vocab_size=31, context_length=12, num_layers=2, num_heads=4, dim=24)).double()
    with torch.no_grad():
        for name, parameter in longer.named_parameters():
            value = model.get_parameter(name)
            parameter[: len(value)].copy_(value) if parameter.ndim > 1 else parameter.copy_(value)
    result = compare(model, longer)
    assert result.distance < 1e-12 and not result.same_function
    assert result.notes[0] == "Only the first 29 tokens were compared, of 29 and 31."
    assert "8 positions" in result.notes[1]


def test_the_result_as_text_and_json():
    model = ours("grouped")
    other, _ = moved(noisy(copy.deepcopy(model), 1e-2))
    tokens = torch.randint(29, (2, 6), generator=generator(0))
    seen = []
    result = compare(model, other, inputs=tokens, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    expected = (model(tokens)[0] - other(tokens)[0]).detach().abs().max()
    assert result.output_difference == pytest.approx(float(expected))
    text = str(result)
    assert "layer 1" in text and "related, and not the same function" in text and "outputs differ" in text
    data = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert data["layers"][1]["heads"] == list(result.layers[1].heads)
    assert data["layers"][0]["query_key"]["distance"] == result.layers[0].query_key.distance
    assert not model.training


# --- matching ---------------------------------------------------------------------------------------------------------


def test_assignments_are_those_of_scipy():
    optimize = pytest.importorskip("scipy.optimize")
    for size in (1, 2, 5, 17, 64):
        similarity = torch.randn(size, size, generator=generator(size), dtype=torch.float64)
        found = assignment(similarity)
        assert sorted(found.tolist()) == list(range(size))
        rows, columns = optimize.linear_sum_assignment(-similarity.numpy())
        assert similarity[torch.arange(size), found].sum() == pytest.approx(similarity.numpy()[rows, columns].sum())
    assert assignment(torch.zeros(4, 4)).sort().values.tolist() == [0, 1, 2, 3]


def test_groups_stay_together():
    similarity = torch.randn(6, 6, generator=generator(0))
    found = grouped_assignment(similarity, 3)
    assert sorted(found.tolist()) == list(range(6))
    assert all(len(set((found[i : i + 3] // 3).tolist())) == 1 for i in (0, 3))
    import itertools

    best = max(
        sum(float(similarity[i, j]) for i, j in enumerate((*first, *second)))
        for one, two in (((0, 1, 2), (3, 4, 5)), ((3, 4, 5), (0, 1, 2)))
        for first in itertools.permutations(one)
        for second in itertools.permutations(two)
    )
    assert float(similarity[torch.arange(6), found].sum()) == pytest.approx(best, rel=1e-6)


def test_many_are_matched_in_turn(monkeypatch):
    monkeypatch.setattr("erlangen.gauge._assignment.EXACT", 8)
    order = torch.randperm(60, generator=generator(0))
    rows = torch.randn(60, 8, generator=generator(1))
    similarity = -torch.cdist(rows, rows[order] + 1e-3)
    assert torch.equal(matching(similarity), order.argsort())
    assert matching(torch.zeros(60, 60)).sort().values.tolist() == list(range(60))


def test_many_neurons_are_matched_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr("erlangen.gauge._matching.EXACT", 2)
    for name in ("learned", "grouped"):
        model = ours(name)
        result = compare(model, moved(noisy(copy.deepcopy(model), 0.05))[0])
        assert max(layer.mlp.distance for layer in result.layers) < 0.1
        assert compare(model, ours(name, seed=1)).layers[0].mlp.distance > 0.5
