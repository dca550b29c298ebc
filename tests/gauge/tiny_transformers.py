"""Tiny random models of transformers, one and more of every family, that compute in float64 throughout."""

import torch
from torch.overrides import TorchFunctionMode

SMALL = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
GPT2 = {"vocab_size": 11, "n_embd": 8, "n_inner": 6, "n_layer": 2, "n_head": 2, "n_positions": 6, "bos_token_id": 0}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
LATENT = {
    "first_k_dense_replace": 2,
    "kv_lora_rank": 6,
    "q_lora_rank": 5,
    "qk_nope_head_dim": 2,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 3,
}

# name -> class of the model, class of the config, fields
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 untied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"tie_word_embeddings": False}),
    "gpt2 base": ("GPT2Model", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | {"rotary_pct": 0.5}),
    "gpt_neox in turn": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        SMALL | {"rotary_pct": 0.5, "use_parallel_residual": False, "attention_bias": False},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | GROUPED),
    "llama biased": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"attention_bias": True, "mlp_bias": True}),
    "llama tied": ("LlamaForCausalLM", "LlamaConfig", SMALL | {"tie_word_embeddings": True}),
    "llama base": ("LlamaModel", "LlamaConfig", SMALL),
    "mistral": ("MistralForCausalLM", "MistralConfig", SMALL | GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | {"num_key_value_heads": 1}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", SMALL | GROUPED),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", SMALL | {"num_key_value_heads": 1, "partial_rotary_factor": 0.5}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", SMALL | GROUPED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", SMALL | GROUPED),
    "gemma2 untied": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        SMALL | GROUPED | {"tie_word_embeddings": False, "final_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", SMALL | GROUPED),
    "bert": ("BertModel", "BertConfig", SMALL),
    "bert masked": ("BertForMaskedLM", "BertConfig", SMALL),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", SMALL | LATENT),
    "deepseek_v2 lite": ("DeepseekV2ForCausalLM", "DeepseekV2Config", SMALL | LATENT | {"q_lora_rank": None}),
    "deepseek_v2 experts": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        SMALL | LATENT | {"first_k_dense_replace": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v2 grouped experts": (
        "DeepseekV2ForCausalLM",
        "DeepseekV2Config",
        SMALL
        | LATENT
        | {"first_k_dense_replace": 1, "n_routed_experts": 6, "n_group": 3, "topk_group": 2}
        | {"topk_method": "group_limited_greedy"},
    ),
}


def make(name, seed=0, **fields):
    """A model in float64 and in evaluation mode, all its parameters drawn at random, gains away from 0."""
    import transformers

    model_class, config_class, defaults = MODELS[name]
    config = getattr(transformers, config_class)(**defaults | fields)
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        model = getattr(transformers, model_class)(config).eval().double()
    generator = torch.Generator().manual_seed(seed)
    gemma = name.startswith("gemma")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in parameter_name.lower().replace("ln_", "norm") and parameter_name.endswith("weight"):
                parameter.copy_((0.0 if gemma else 1.0) + 0.3 * draw.clamp(-2, 2))
            else:
                parameter.copy_(draw * (0.5 if parameter.ndim == 1 else 0.7))
    return model


def without_eps(model):
    """The model with eps = 0 in all its norms."""
    for module in model.modules():
        for name in ("eps", "variance_epsilon"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


class InFloat64(TorchFunctionMode):
    """What transformers takes to float32 (norms, softmax, turns) stays in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Every torch call, with float64 in the place of float32."""
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


def outputs(model, tokens, types=None):
    """Logits, or the hidden states of a model that has none; in float64."""
    more = {} if types is None else {"token_type_ids": types}
    with InFloat64():
        result = model(input_ids=tokens, **more)
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def some_tokens(number=4, length=5, seed=1, vocab_size=11):
    """int64 [number, length]"""
    return torch.randint(vocab_size, (number, length), generator=torch.Generator().manual_seed(seed))
