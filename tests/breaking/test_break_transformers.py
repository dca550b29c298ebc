"""Models of transformers with unlearned biases: where they are added, and what they leave alone."""

import copy
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from erlangen import breaking, gauge
from erlangen.lm.distributed import leave

transformers = pytest.importorskip("transformers")
from tiny_transformers import MODELS, InFloat64, make, outputs, some_tokens  # noqa: E402

DECODERS = ("gpt2", "gpt_neox", "phi3", "llama", "gemma3")


def at_random(model, seed=0):
    """Another mean for every layer and coordinate, so that no two could be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    unlearned = model.symmetry_breaking
    for layer in range(2):
        for which in ("query", "value"):
            mean = unlearned.bias(which, layer, mean=True)
            unlearned.set_mean(which, layer, torch.randn(mean.shape, generator=generator, dtype=torch.float64))
    return model


def broken(name, seed=0, **settings):
    return at_random(breaking.break_symmetry(make(name), seed=seed, **settings), seed)


def train(model):
    """In training without dropout, whose masks no two forwards share."""
    for module in model.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    return model


def rows_by_hand(name, query, value):
    """What is added to the outputs of the query and value maps, from the shapes in the models' own code."""
    if name == "gpt2":  # thirds
        return {"attn.c_attn": torch.cat([query, torch.zeros(8, dtype=query.dtype), value])}
    if name == "gpt_neox":  # head by head
        parts = query.view(2, 4), torch.zeros(2, 4, dtype=query.dtype), value.view(2, 4)
        return {"attention.query_key_value": torch.stack(parts, dim=1).flatten()}
    if name == "phi3":  # one key and one value for two queries of width 4
        return {"self_attn.qkv_proj": torch.cat([query, torch.zeros(4, dtype=query.dtype), value])}
    return {"self_attn.q_proj": query, "self_attn.v_proj": value}


@pytest.mark.parametrize("name", [*DECODERS, "qwen3", "gemma2", "bert"])
def test_each_row_of_each_map_gets_its_bias(name):
    model, plain = broken(name), make(name)
    assert not hasattr(plain, "symmetry_breaking")
    for part in (model.eval(), train(model)):
        found = outputs(part, some_tokens())
        handles = []
        layers = sorted(
            {layout.query.path.rpartition(".")[0].rpartition(".")[0] for layout in gauge.head_layouts(plain)}
        )
        for layer, path in enumerate(layers):
            mean = not part.training
            query, value = (part.symmetry_breaking.bias(which, layer, mean=mean) for which in ("query", "value"))
            added = {"self.query": query, "self.value": value} if name == "bert" else rows_by_hand(name, query, value)
            for end, rows in added.items():
                module = plain.get_submodule(f"{path}.{end}")
                handles.append(module.register_forward_hook(lambda module, args, output, rows=rows: output + rows))
        expected = outputs(plain, some_tokens())
        for handle in handles:
            handle.remove()
        assert (found - expected).abs().max() < 1e-12
        assert (found - outputs(plain, some_tokens())).abs().max() > 1e-3


@pytest.mark.parametrize("name", DECODERS)
def test_restore_is_the_inverse(name):
    plain, model = make(name), make(name)
    config = model.config
    breaking.break_symmetry(model, seed=1)
    assert type(model) is not type(plain) and isinstance(model, type(plain))
    assert config.model_type == plain.config.model_type, "the config that was handed in is left alone"
    twin = breaking.restore(copy.deepcopy(model))
    assert hasattr(model, "symmetry_breaking")
    for part in (twin, breaking.restore(model)):
        assert [type(module) for module in part.modules()] == [type(module) for module in plain.modules()]
        assert part.config.to_dict() == plain.config.to_dict() and type(part.config) is type(plain.config)
        assert list(part.state_dict()) == list(plain.state_dict())
        assert torch.equal(outputs(part, some_tokens()), outputs(plain, some_tokens()))
        assert not any(
            module._forward_hooks or module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs
            for module in part.modules()
        )


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("rotary", ["before", "after"])
def test_masks_caches_and_implementations(name, rotary):
    model = broken(name, rotary=rotary)
    tokens = some_tokens(2, 6)
    expected = outputs(model, tokens)
    # causal, exactly
    future = tokens.clone()
    future[:, 4:] = (future[:, 4:] + 1) % 11
    changed = outputs(model, future)
    assert torch.equal(changed[:, :4], expected[:, :4]) and not torch.equal(changed[:, 4:], expected[:, 4:])
    # token by token through the cache
    cache, steps = transformers.DynamicCache(config=model.config), []
    with InFloat64(), torch.no_grad():
        for place in range(6):
            steps.append(model(input_ids=tokens[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
    assert (torch.cat(steps, dim=1) - expected).abs().max() < 1e-12
    # padded on the left: masked tokens are not seen
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with InFloat64(), torch.no_grad():
        padded = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
        alone = model(input_ids=tokens[:1, 2:]).logits
    assert (padded[0, 2:] - alone[0]).abs().max() < 1e-12
    model.set_attn_implementation("sdpa")
    assert (outputs(model, tokens) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_generation(name):
    model = broken(name)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones(2, 2)}
    with InFloat64():
        found = model.generate(some_tokens(2, 2), **options)
        assert torch.equal(found, model.generate(some_tokens(2, 2), use_cache=False, **options))
    tokens = some_tokens(2, 2)
    for _ in range(4):
        logits = outputs(model, tokens)[:, -1:]
        logits[..., model.generation_config.eos_token_id or 11 :][..., :1] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1)], dim=1)
    assert torch.equal(found, tokens)


def gradients(model):
    """With softmax and turns in float32 as usual, which a recomputed layer repeats."""
    model.zero_grad()
    loss = model(input_ids=some_tokens(), labels=some_tokens()).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(("name", "rotary"), [("gpt2", "before"), ("gpt_neox", "after"), ("qwen3", "after")])
def test_recomputed_layers_see_the_draw_of_their_forward(name, rotary):
    plain = train(broken(name, rotary=rotary))
    for reentrant in (True, False):
        model, calls = copy.deepcopy(plain), []
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        attention = model.get_submodule(gauge.head_layouts(model)[0].query.path)
        attention.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        losses = []
        for _ in range(2):
            expected, found = gradients(plain), gradients(model)
            losses.append(expected[0])
            for a, b in zip(expected, found):
                torch.testing.assert_close(b, a, rtol=0, atol=1e-15)
        assert len(calls) == 4 and losses[0] != losses[1], "two forwards, each twice"


@pytest.mark.parametrize(
    ("name", "rotary", "backend"), [("gpt2", "before", "eager"), ("gpt_neox", "after", "aot_eager")]
)
def test_compiles_without_a_graph_break(name, rotary, backend):
    torch._dynamo.reset()
    model = train(broken(name, rotary=rotary)).float()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    for _ in range(2):
        expected, found = (part(input_ids=some_tokens()).logits.logsumexp(-1).mean() for part in (model, compiled))
        torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    for a, b in zip(model.parameters(), compiled.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5)
    assert compiled.symmetry_breaking.num_draws == 2


def on_two(rank, folder):
    import torch.distributed as dist

    # OpenMP's threads do not live on in a process that was forked.
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = train(broken("gpt2"))
    wrapped = nn.parallel.DistributedDataParallel(model)
    draws = []
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(input_ids=some_tokens()[2 * rank :][:2], labels=some_tokens()[2 * rank :][:2]).loss.backward()
        draws.append(model.symmetry_breaking.current.clone())
    torch.save([*draws, *(p.grad for p in model.parameters())], f"{folder}/{rank}")
    leave()


def test_processes_share_the_draws(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mp.start_processes(on_two, (str(tmp_path),), nprocs=2, start_method="fork")
    a, b = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert not torch.equal(a[0], a[1])
    for x, y in zip(a, b):
        assert torch.equal(x, y)
    # as one process that saw both halves
    model = train(broken("gpt2"))
    for _ in range(2):
        model.zero_grad()
        model(input_ids=some_tokens(), labels=some_tokens()).loss.backward()
    for x, p in zip(a[2:], model.parameters()):
        assert torch.allclose(x, p.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_charges_of_fused_maps_know_the_mean(name):
    """With learned biases a mean breaks nothing: the affine charge stays 0, also where maps are fused."""
    model = train(broken(name, query_std=0.0, value_std=0.0))
    for layout in gauge.head_layouts(model):
        assert layout.query.bias
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(3):
        model.zero_grad()
        with InFloat64():
            loss = model(input_ids=some_tokens(), labels=some_tokens()).loss
        loss.backward()
        optimizer.step()
    found = gauge.charges(model, optimizer)
    for sectors in found.values():
        assert max(*sectors["qk_affine"], *sectors["vo_affine"]) < 1e-8 < 1e-4 < min(*sectors["qk"], *sectors["vo"])


def test_words_for_what_cannot_be_broken():
    def small(cls, config, **fields):
        return getattr(transformers, cls)(getattr(transformers, config)(**fields))

    with pytest.raises(ValueError, match="latent attention"):
        breaking.break_symmetry(make("deepseek_v2"))
    translator = small("T5Model", "T5Config", vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="no layout is known for model_type 't5'"):
        breaking.break_symmetry(translator)
    adapted = make("llama")
    layer = adapted.model.layers[1].self_attn
    lora = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.lora.layer"})
    layer.q_proj.__class__ = lora
    with pytest.raises(ValueError, match="before adapters"):
        breaking.break_symmetry(adapted)
    quantised = type("Linear4bit", (nn.Linear,), {})
    layer.q_proj.__class__ = quantised
    with pytest.raises(
        TypeError, match=r"query projection of layer 1 is a Linear4bit .* before its layers are replaced"
    ):
        breaking.break_symmetry(adapted)
    assert not hasattr(adapted, "symmetry_breaking") and adapted.config.model_type == "llama"
    conv = make("gpt2")
    conv.transformer.h[0].attn.c_attn = nn.Linear(8, 24)
    with pytest.raises(TypeError, match=r"is a Linear .* not a plain map with a weight"):
        breaking.break_symmetry(conv)
    marked = make("llama")
    marked.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantization_config"):
        breaking.break_symmetry(marked)
    heads = make("llama")
    heads.config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads must divide"):
        breaking.break_symmetry(heads)
    divided = make("gpt2")
    divided.config.n_head = 3
    with pytest.raises(ValueError, match="n_head must divide n_embd, received 3 heads for a width of 8"):
        breaking.break_symmetry(divided)
    wide = small("GPT2Model", "GPT2Config", vocab_size=11, n_embd=600, n_head=12, n_layer=1, n_positions=8)
    assert gauge.head_layouts(breaking.break_symmetry(wide))[0].head_dim == 50
    with pytest.raises(ValueError, match="broken already"):
        breaking.break_symmetry(wide)
    for treat in (breaking.restore, breaking.fold, breaking.break_symmetry):
        with pytest.raises(ValueError, match="compiled or wrapped"):
            treat(torch.compile(wide))


def test_every_family_is_here():
    assert {name.split()[0] for name in MODELS} >= {*DECODERS, "mistral", "qwen2", "qwen3", "gemma", "gemma2"}
