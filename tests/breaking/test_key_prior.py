"""The key prior: against eager attention, against models without their biases, and against draws by hand."""

import numpy as np
import pytest
import torch

from erlangen import lm
from erlangen.breaking import break_symmetry
from erlangen.breaking._heads import directions, observed
from erlangen.breaking._key_prior_nulls import permuted_labels, random_directions, sphere_p_value
from erlangen.breaking.key_prior import key_prior, scaled_direction, steer, token_classes, top_tokens
from erlangen.gauge import head_layouts

tiny = pytest.importorskip("tiny_transformers")
pytest.importorskip("transformers")

LONG = {"max_position_embeddings": 16}
FAMILIES = {
    "gpt2": {"n_positions": 16, "scale_attn_by_inverse_layer_idx": True},
    "gpt_neox": LONG,
    "llama biased": LONG,
    "mistral": LONG | {"sliding_window": 4},
    "qwen2": LONG,
    "qwen3": LONG | {"attention_bias": True},
    "gemma2": LONG | {"attention_bias": True, "sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gemma3": LONG | {"attention_bias": True, "sliding_window": 4, "query_pre_attn_scalar": 7},
}


def gpt(seed=0, *, broken=True, **fields):
    """A random model in float64, wide enough in its weights that attention is not flat."""
    config = {"vocab_size": 30, "num_layers": 2, "num_heads": 4, "dim": 32, "context_length": 24} | fields
    generator = torch.Generator().manual_seed(seed)
    model = lm.GPT(lm.GPTConfig(**config), generator=generator).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rotary" not in name:
                parameter.add_(0.25 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return break_symmetry(model, query_mean=0.7) if broken else model


def text(windows=12, length=20, vocab_size=30, seed=3):
    return torch.randint(vocab_size, (windows, length), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens, layer):
    """What attention takes the softmax of, [B, H, T, T], and the prior of the direction."""
    found = {}
    own = directions(model)

    def each(heads):
        number = heads.layer.number
        found[number] = heads.logits(heads.query_BHTD), heads.logits(heads.carried(own[number])), heads

    with tiny.InFloat64(), observed(model, each) as run:
        run(tokens)
    return found[layer]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_is_that_of_eager_transformers(name):
    model, tokens = tiny.make(name, **FAMILIES[name]), tiny.some_tokens(3, 12)
    found = {}

    def each(heads):
        found[heads.layer.number] = heads.layer.attention(heads.logits(heads.query_BHTD))

    with tiny.InFloat64():
        with observed(model, each) as run:
            run(tokens)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
        expected = model(tokens, output_attentions=True).attentions
    for layer, attention in enumerate(expected):
        torch.testing.assert_close(found[layer], attention, rtol=0, atol=1e-12)


def without_query_biases(model):
    """The same model with its query biases set to zero by hand."""
    with torch.no_grad():
        for layout in head_layouts(model):
            projection = layout.query
            bias = model.get_submodule(projection.path).bias
            if bias is not None:
                projection.put_head_biases(bias, torch.zeros(len(projection.starts), projection.width))
    if hasattr(model, "symmetry_breaking"):
        for layer in range(len(head_layouts(model))):
            size = model.symmetry_breaking.bias("query", layer, mean=True).numel()
            model.symmetry_breaking.set_mean("query", layer, torch.zeros(size, dtype=torch.float64))
    return model


def plain_logits(model, tokens):
    """What attention of the first layer takes the softmax of."""
    found = []
    with tiny.InFloat64(), observed(model, found.append, [0]) as run:
        run(tokens)
    return found[0].logits(found[0].query_BHTD)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama biased", "mistral", "gemma2"])
def test_logits_of_the_first_layer_fall_by_the_prior_when_biases_are_set_to_zero(name):
    fields = FAMILIES[name]
    tokens = tiny.some_tokens(3, 12)
    with_bias, prior, _ = logits_of(break_symmetry(tiny.make(name, **fields)), tokens, 0)
    without = plain_logits(without_query_biases(tiny.make(name, **fields)), tokens)
    torch.testing.assert_close(with_bias - prior, without, rtol=0, atol=1e-11)
    assert prior.abs().max() > 0.1


@pytest.mark.parametrize("name", ["gpt_neox", "qwen3"])
def test_a_bias_after_rotary_positions_gives_keys_logits_that_no_query_changes(name):
    model = break_symmetry(tiny.make(name, **LONG | {"attention_bias": False}), rotary="after")
    tokens = tiny.some_tokens(3, 12)
    logits, prior, _ = logits_of(model, tokens, 0)
    torch.testing.assert_close(prior, prior[:, :, :1].expand_as(prior))
    plain = plain_logits(tiny.make(name, **LONG | {"attention_bias": False}), tokens)
    torch.testing.assert_close(logits - prior, plain, rtol=0, atol=1e-11)


def test_qk_norm_splits_a_logit_into_content_and_prior_at_the_measured_norm():
    model, tokens = break_symmetry(tiny.make("qwen3", **FAMILIES["qwen3"])), tiny.some_tokens(3, 12)
    logits, prior, _ = logits_of(model, tokens, 1)
    # The content alone, divided by the root mean square that was measured with the direction in it.
    layer = model.model.layers[1].self_attn
    seen = {}
    handle = layer.q_proj.register_forward_hook(lambda module, args, output: seen.update(q=output))
    attention = layer.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    keys = layer.k_norm.register_forward_hook(lambda module, args, output: seen.update(k=output))
    with tiny.InFloat64(), torch.no_grad():
        model(tokens)
    for hook in (handle, attention, keys):
        hook.remove()
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

    q = seen["q"].unflatten(-1, (4, -1))
    bias = layer.q_proj.bias + model.symmetry_breaking.bias("query", 1, mean=True)
    rms = (q.square().mean(-1, keepdim=True) + layer.q_norm.variance_epsilon).sqrt()
    content = (q - bias.unflatten(0, (4, -1))) / rms * layer.q_norm.weight
    turned, k = apply_rotary_pos_emb(content.transpose(1, 2), seen["k"].transpose(1, 2), *seen["position_embeddings"])
    expected = layer.scaling * turned @ k.repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close(logits - prior, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fields", [{}, {"positions": "rotary", "rotary_fraction": 0.5, "qk_norm": True}])
def test_key_prior_adds_up(fields):
    model, tokens = gpt(**fields), text()
    prior = key_prior(model, tokens)
    moved, shares = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, 20, dtype=torch.float64)
    for layer in range(2):
        logits, s, heads = logits_of(model, tokens, layer)
        seen = torch.ones(20, 20).tril().bool()
        s = s.expand(-1, -1, 20, -1)
        # A key's logit is the mean over the queries that see it; its distances are means over pairs.
        mean = torch.stack([s[..., j:, j].mean(-1) for j in range(20)], -1)
        torch.testing.assert_close(prior.logits[layer].double(), mean.transpose(0, 1), rtol=1e-6, atol=1e-6)
        a, b = (x.masked_fill(~seen, -torch.inf).softmax(-1) for x in (logits, logits - s))
        moved[layer] = (a - b).abs().sum(-1)[:, :, 1:].mean((0, 2)) / 2
        shares[layer] = a[:, :, 1:].mean((0, 2))
        if fields:
            far = torch.stack([s.diagonal(-d, 2, 3).mean((0, 2)) for d in range(20)], -1)
            torch.testing.assert_close(prior.distances[layer], far)
        # The keys as a direction meets them give the same logits.
        before, _ = heads.carried_back()
        torch.testing.assert_close(torch.einsum("bhjd,hd->bhj", before, directions(model)[layer].before), mean)
    torch.testing.assert_close(prior.moved, moved)
    assert (prior.distances is None) == (not fields)
    first = prior.classes.names.index("first")
    torch.testing.assert_close(prior.attention[..., first], shares[..., 0])
    effects = prior.logits[..., 0].double().mean(-1) - prior.logits[..., 1:].double().mean((-2, -1))
    torch.testing.assert_close(prior.effects[..., first], effects, rtol=1e-6, atol=1e-7)
    assert model.training is False and not model.blocks[0].attention._forward_hooks
    data = prior.to_dict()
    assert data["effects"][1][2] == prior.effects[1, 2].tolist() and data["label_p"][0][0][first] is None


def test_deviation_of_random_directions_is_that_of_draws():
    model, tokens = gpt(positions="rotary", num_kv_heads=2), text()
    prior = key_prior(model, tokens)
    layer = 1
    keys = logits_of(model, tokens, layer)[2].carried_back()[0]
    members = prior.classes.members.double()
    contrast = torch.einsum("cbj,bhjd->hcd", members, keys) / prior.classes.counts[:, None]
    contrast -= keys[:, :, 1:].mean((0, 2))[:, None]
    length = directions(model)[layer].before.norm(dim=-1)
    draws = random_directions(20_000, length[:, None], 8, seed=5)[:, :, 0]
    effects = torch.einsum("nhd,hcd->nhc", draws, contrast)
    torch.testing.assert_close(effects.std(0), prior.direction_deviation[layer], rtol=0.03, atol=0)
    beyond = (effects.abs() >= prior.effects[layer].abs()).double().mean(0)
    torch.testing.assert_close(beyond, prior.direction_p[layer], rtol=0, atol=0.02)
    spread = torch.einsum("nhd,bhjd->nhbj", draws[:500], keys[:, :, 1:]).flatten(2).std(-1)
    share = (spread >= prior.spread[layer]).double().mean(0)
    torch.testing.assert_close(share, prior.spread_p[layer], rtol=0, atol=0.1)


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 64])
def test_p_values_of_directions(dim):
    cosine = torch.tensor([0.0, 0.1, 0.4, 0.99, 1.0], dtype=torch.float64)
    draws = random_directions(200_000, torch.ones(1, 1), dim, seed=1)[:, 0, 0, 0].abs()
    expected = torch.stack([(draws >= value - 1e-9).double().mean() for value in cosine])
    torch.testing.assert_close(sphere_p_value(cosine, dim), expected, rtol=0, atol=0.005)


def test_moments_of_permuted_labels_are_those_of_all_permutations():
    from itertools import permutations

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    members = torch.rand(3, 5, 6, generator=generator) < 0.4
    values = torch.stack([
        torch.einsum("hwt,cwt->hc", logits, members[:, list(order)].double()) / members.sum((1, 2))
        for order in permutations(range(5))
    ])  # fmt: skip
    mean, deviation = permuted_labels(logits, members)
    torch.testing.assert_close(mean, values.mean(0))
    torch.testing.assert_close(deviation, values.std(0, unbiased=False))


def test_a_planted_class_is_found_and_a_random_direction_is_not():
    # A text of tokens in three classes, which decode to letters, digits and full stops.
    letters = "abcdefghijklmnopqrst012345...."
    tokens = text(windows=24)
    classes = token_classes(tokens, lambda sequence: "".join(letters[token] for token in sequence))
    digits = classes.names.index("digits")
    asked = [number for number, kind in enumerate(classes.kinds) if kind == "token"]
    model = gpt(broken=False, num_heads=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query.bias.zero_()
        model.blocks[1].attention.query.bias.normal_(generator=torch.Generator().manual_seed(1))
    keys = logits_of(model, tokens, 1)[2].carried_back()[0]
    contrast = keys[:, 1][classes.members[digits]].mean(0) - keys[:, 1, 1:].flatten(0, 1).mean(0)
    with torch.no_grad():  # what is added to the queries of a layer does not change its keys
        model.blocks[1].attention.query.bias[16:] = 4 * contrast / contrast.norm()
    prior = key_prior(model, tokens, classes=classes)
    both = torch.maximum(prior.direction_p, prior.label_p)[..., asked]
    cells = both.numel()
    found = (both * cells < 0.05).nonzero().tolist()
    assert [1, 1, asked.index(digits)] in found
    assert all(cell[:2] == [1, 1] for cell in found), "only the planted head"
    assert prior.effects[1, 1].argmax() == digits and prior.direction_p[0].eq(1).all()

    # Random directions are beyond their null as often as it says.
    model = gpt(broken=False, num_heads=2)
    seen = []
    for seed in range(40):
        with torch.no_grad():
            for block in model.blocks:
                block.attention.query.bias.normal_(generator=torch.Generator().manual_seed(100 + seed))
        seen.append(key_prior(model, tokens[:8], classes=token_classes(tokens[:8])).direction_p[0])
    rate = float((torch.stack(seen) < 0.1).double().mean())
    assert 0.04 < rate < 0.17


@pytest.mark.parametrize("kind", ["gpt2", "neox broken after", "ours"])
def test_scaling(kind):
    if kind == "ours":
        make, tokens = (lambda: gpt(positions="rotary", qk_norm=True)), text()
    elif kind == "gpt2":
        make, tokens = (lambda: break_symmetry(tiny.make("gpt2", n_positions=16))), tiny.some_tokens(9, 12)
    else:
        make, tokens = (lambda: break_symmetry(tiny.make("gpt_neox", **LONG), rotary="after")), tiny.some_tokens(9, 12)

    def logits(model):
        found = model(tokens)
        return found.logits if hasattr(found, "logits") else found[0]

    model, bare = make(), without_query_biases(make())
    with tiny.InFloat64(), torch.no_grad():
        state = {name: value.clone() for name, value in model.state_dict().items()}
        own = logits(model)
        with scaled_direction(model, 0.0):
            none = logits(model)
        torch.testing.assert_close(none, logits(bare), rtol=0, atol=1e-10)
        assert not torch.allclose(none, own, atol=1e-4)
        with scaled_direction(model, 2.0, heads=[(1, 0)]):
            one = logits(model)
        with scaled_direction(model, 1.0):
            assert torch.equal(logits(model), own)
        with pytest.raises(RuntimeError, match="stop"), scaled_direction(model, 0.5):
            raise RuntimeError("stop")
        assert not torch.equal(one, own) and torch.equal(logits(model), own)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        with pytest.raises(ValueError, match="no head 9 in layer 0"), scaled_direction(model, 2.0, heads=[(0, 9)]):
            pass


def test_steering():
    model, tokens = gpt(), text()
    classes = token_classes(tokens)
    own = model(tokens[:, :-1], tokens[:, 1:])[1].item()
    result = steer(model, tokens, classes, alphas=(0.0, 2.0))
    assert result.alphas == (0.0, 1.0, 2.0) and result.loss.shape == (3, 12)
    assert result.loss[1].mean().item() == pytest.approx(own, rel=1e-12)
    bands = [number for number, kind in enumerate(classes.kinds) if kind == "frequency"]
    torch.testing.assert_close(result.class_loss[..., bands].sum(-1) / 19, result.loss)  # each target is in one band
    changes = result.class_loss_changes()
    torch.testing.assert_close(changes[1][:, bands], torch.zeros(12, len(bands), dtype=torch.float64))
    first = classes.names.index("first")
    whole = result.attention[..., bands].sum(-1) + result.attention[..., first]
    torch.testing.assert_close(whole, torch.ones(3, 12, dtype=torch.float64))
    prior = key_prior(model, tokens, classes=classes)
    torch.testing.assert_close(result.attention[1].mean(0), prior.attention.mean((0, 1)))
    alone = steer(model, tokens, classes, alphas=(0.0,), heads=[(0, 2)])
    # In the first layer nothing else changes, so that the prior's own answer is what follows.
    torch.testing.assert_close(alone.attention[0].mean(0), prior.attention_without[0, 2])


def test_classes_of_words():
    pieces = [
        " the",
        "o",
        "the",
        "r",
        " King",
        ",",
        " 42",
        "\n",
        "ROMEO",
        ":",
        " I",
        "'ll",
        " b",
        "y",
        " by",
        " ",
        "x9",
        "�",
    ]
    tokens = torch.tensor([[*range(len(pieces))], [*range(len(pieces))]])
    classes = token_classes(tokens, lambda sequence: "".join(pieces[token] for token in sequence))
    label = {
        pieces[place] + str(place): classes.names[number]
        for number, kind in enumerate(classes.kinds)
        if kind == "token"
        for place in classes.members[number][0].nonzero()[:, 0].tolist()
    }
    assert " the0" not in label, "the first token is in the class of first tokens alone"
    assert label["the2"] == label["r3"] == label["y13"] == "parts of words"
    assert label[" King4"] == "Capitalised" and label[",5"] == label[":9"] == "punctuation"
    assert label[" 426"] == "digits" and label["\n7"] == "newline" and label["ROMEO8"] == "UPPER CASE"
    assert label[" I10"] == label["'ll11"] == label[" by14"] == "function words"
    assert label[" b12"] == "words" and label[" 15"] == "blank" and label["�17"] == "other"
    assert not classes.note

    bytes_ = torch.from_numpy(lm.load_tokenizer("bytes").encode("Is it 7, or a é?\n" * 4).astype(np.int64)).view(4, -1)
    of_bytes = token_classes(bytes_, lm.load_tokenizer("bytes").decode)
    assert {"vowels", "consonants", "digits", "punctuation", "blank", "newline", "other"} < set(of_bytes.names)
    assert "no function words" in of_bytes.note.replace("there are ", "")


def test_top_tokens():
    tokens = torch.tensor([[1, 1, 2, 2, 3], [1, 2, 4, 4, 4]])
    values = torch.tensor([[1.0, 2, 5, 5, 99], [3, 5, -1, -2, -3]])
    high, low = top_tokens(tokens, values, min_count=2, number=2)
    assert high == [(2, 3, 5.0), (1, 3, 2.0)] and low == [(4, 3, -2.0), (1, 3, 2.0)]


def test_errors():
    model = gpt(broken=False, attention_bias=False)
    with pytest.raises(ValueError, match="no preferred direction"):
        key_prior(model, text())
    with pytest.raises(ValueError, match="all query biases of this model are zero"):
        key_prior(lm.GPT(lm.GPTConfig(vocab_size=30, num_layers=1, dim=32)), text())
    with pytest.raises(ValueError, match="at least 8"):
        key_prior(gpt(), text(length=4))
    with pytest.raises(ValueError, match="the classes are of a text of shape"):
        key_prior(gpt(), text(), classes=token_classes(text(windows=3)))
    with pytest.raises(ValueError, match="both sides"):
        key_prior(tiny.make("bert", **LONG), tiny.some_tokens(3, 12))
    with pytest.raises(ValueError, match="latent"):
        key_prior(break_symmetry(tiny.make("deepseek_v2", **LONG)), tiny.some_tokens(3, 12))
    with pytest.raises(TypeError, match="no layout is known"):
        key_prior(torch.nn.Linear(3, 3), text())
