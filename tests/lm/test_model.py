"""The transformer against a restatement in plain tensor operations, and the properties users rely on."""

import math

import pytest
import torch

from erlangen.lm import GPT, PRESETS, GPTConfig, preset

VARIANTS = {
    "learned": {},
    "prelu": {"mlp": "prelu", "tie_embeddings": False},
    "rotary": {"positions": "rotary", "qk_norm": True},
    "partly rotary, grouped": {"positions": "rotary", "rotary_fraction": 0.5, "num_kv_heads": 2, "mlp": "swiglu"},
    "one key head, unbiased": {"num_kv_heads": 1, "attention_bias": False, "bias": False},
}


def make(**fields):
    config = GPTConfig(vocab_size=40, context_length=12, num_layers=2, num_heads=4, dim=32, **fields)
    model = GPT(config, generator=torch.Generator().manual_seed(0)).double()
    for parameter in model.parameters():  # biases and norms away from their starting values
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


TOKENS = torch.randint(40, (3, 12), generator=torch.Generator().manual_seed(1))


def slow(model, tokens):
    """The same function, head by head and token by token."""
    config, weights = model.config, dict(model.named_parameters())

    def linear(name, x):
        bias = weights.get(f"{name}.bias")
        return x @ weights[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(name, x):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        bias = weights.get(f"{name}.bias")
        return scaled * weights[f"{name}.weight"] + (0 if bias is None else bias)

    def turn(x, position):
        """Rotate the planes (i, i + half) of one head's vector."""
        out, half = x.clone(), config.rotary_dim // 2
        for i in range(half):
            # the model keeps its table in float32
            angle = torch.tensor(position * config.rotary_base ** (-i / half), dtype=torch.float64)
            c, s = angle.cos().float().double(), angle.sin().float().double()
            out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
        return out

    result = []
    for sequence in tokens:
        x = weights["token_embedding.weight"][sequence]
        if config.positions == "learned":
            x = x + weights["position_embedding.weight"][: len(sequence)]
        for layer in range(config.num_layers):
            name = f"blocks.{layer}"
            h = norm(f"{name}.attention_norm", x)
            q, k, v = (linear(f"{name}.attention.{p}", h) for p in ("query", "key", "value"))
            heads = []
            for head in range(config.num_heads):
                kv = head // (config.num_heads // config.kv_heads)
                d = config.head_dim
                qh, kh, vh = q[:, head * d : head * d + d], k[:, kv * d : kv * d + d], v[:, kv * d : kv * d + d]
                if config.qk_norm:
                    eps = torch.finfo(torch.float64).eps
                    qh, kh = (z / (z.pow(2).mean(-1, keepdim=True) + eps).sqrt() for z in (qh, kh))
                if config.positions == "rotary":
                    qh, kh = (torch.stack([turn(z[t], t) for t in range(len(z))]) for z in (qh, kh))
                rows = []
                for t in range(len(sequence)):
                    score = torch.stack([qh[t] @ kh[j] for j in range(t + 1)]) / math.sqrt(d)
                    rows.append(score.softmax(0) @ vh[: t + 1])
                heads.append(torch.stack(rows))
            x = x + linear(f"{name}.attention.output", torch.cat(heads, dim=-1))
            h = norm(f"{name}.mlp_norm", x)
            up = linear(f"{name}.mlp.up", h)
            if config.mlp == "gelu":
                up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
            elif config.mlp == "swiglu":
                gate = linear(f"{name}.mlp.gate", h)
                up = gate * torch.sigmoid(gate) * up
            else:
                up = torch.maximum(up, torch.zeros_like(up)) + weights[f"{name}.mlp.slope"] * up.clamp(max=0)
            x = x + linear(f"{name}.mlp.down", up)
        head = weights["token_embedding.weight" if config.tie_embeddings else "head.weight"]
        result.append(norm("norm", x) @ head.T)
    return torch.stack(result)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_agrees_with_the_slow_twin(fields):
    model = make(**fields)
    logits, loss = model(TOKENS, TOKENS)
    expected = slow(model, TOKENS)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    chosen = expected.log_softmax(-1).gather(-1, TOKENS[..., None])
    torch.testing.assert_close(loss, -chosen.mean(), rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(loss, list(model.parameters()))
    for a, b in zip(found, torch.autograd.grad(-chosen.mean(), list(model.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_is_causal(fields):
    model = make(**fields)
    changed = TOKENS.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 40
    a, b = model(TOKENS)[0], model(changed)[0]
    torch.testing.assert_close(a[:, :7], b[:, :7], rtol=0, atol=1e-12)
    assert (a[:, 7:] - b[:, 7:]).abs().min(dim=-1).values.max() > 0


@pytest.mark.parametrize("fields", [VARIANTS["learned"], VARIANTS["partly rotary, grouped"]], ids=["learned", "rotary"])
def test_gradient_checkpointing_changes_nothing(fields):
    model = make(**fields)
    expected = torch.autograd.grad(model(TOKENS, TOKENS)[1], list(model.parameters()))
    model.gradient_checkpointing = True
    for a, b in zip(torch.autograd.grad(model(TOKENS, TOKENS)[1], list(model.parameters())), expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_published_124m_has_the_published_number_of_parameters():
    """124,119,552, as counted from the official run (context 512, vocabulary 50304, PReLU, tied head)."""
    with torch.device("meta"):
        model = GPT(preset("124m", vocab_size=50304, context_length=512, mlp="prelu"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_119_552


def test_initial_weights():
    model = GPT(preset("small", vocab_size=256, mlp="prelu", num_layers=8), generator=torch.Generator().manual_seed(0))
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[3].attention.query.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert model.blocks[3].attention.output.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    assert model.blocks[3].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    slopes = torch.cat([block.mlp.slope for block in model.blocks])
    assert slopes.mean().item() == pytest.approx(0.2, abs=0.05) and slopes.std().item() == pytest.approx(1.0, rel=0.05)
    assert (model.norm.weight == 1).all() and (model.blocks[0].attention.query.bias == 0).all()
    logits = model(torch.zeros(1, 4, dtype=torch.int64))[0]
    assert logits.log_softmax(-1).max().item() == pytest.approx(-math.log(256), abs=1.0)


def test_generate():
    model = make()
    start = TOKENS[:2, :3]
    greedy = model.generate(start, 20, temperature=0.0)
    assert greedy.shape == (2, 23) and torch.equal(greedy[:, :3], start)
    assert torch.equal(greedy[:, 3], model(start)[0][:, -1].argmax(-1))
    sampled = [model.generate(start, 5, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(*sampled)
    assert model.training


def test_errors():
    with pytest.raises(ValueError, match="vocabulary"):
        GPT(GPTConfig())
    with pytest.raises(ValueError, match="context_length = 12"):
        make()(torch.zeros(1, 13, dtype=torch.int64))
    for message, fields in {
        "num_heads must divide dim": {"dim": 30},
        "num_kv_heads must divide": {"num_kv_heads": 3},
        "mlp must be one of": {"mlp": "relu"},
        "positions must be one of": {"positions": "alibi"},
        "rotary_fraction": {"rotary_fraction": 0.0},
        "at least 2 of": {"positions": "rotary", "rotary_fraction": 0.05},
        "num_layers must be at least 1": {"num_layers": 0},
        "vocab_size must be at least 1": {"vocab_size": 0},
    }.items():
        with pytest.raises(ValueError, match=message):
            GPTConfig(**{"num_heads": 4, "dim": 32, **fields})
    with pytest.raises(ValueError, match="choose one of tiny"):
        preset("huge")
    assert list(PRESETS) == ["tiny", "small", "medium", "124m"]
