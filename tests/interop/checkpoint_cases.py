"""Tiny checkpoints: of a Llama without transformers, and of every family with it."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from erlangen.interop import layout_of_config
from erlangen.interop.checkpoints import INDEX, SINGLE

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "vocab_size": 32,
    "max_position_embeddings": 32, "tie_word_embeddings": False, "rope_parameters": {"rope_theta": 10000.0,
    "rope_type": "default"}, "hidden_act": "silu", "head_dim": 4, "dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2,
    "n_positions": 16, "vocab_size": 32, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
BERT = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 16, "vocab_size": 32,
    "type_vocab_size": 2, "layer_norm_eps": 1e-12, "hidden_act": "gelu",
}  # fmt: skip


def random_tensors(config, dtype=torch.float32, seed=0):
    """Tensors of a config by name: gains around 1, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in layout_of_config(config).tensor_shapes().items():
        mean = float(len(shape) == 1 and name.endswith("weight"))
        tensors[name] = (mean + 0.2 * torch.randn(shape, generator=generator)).to(dtype)
    return tensors


def write(folder: Path, config, tensors=None, num_shards=1, metadata=None):
    """A checkpoint folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = random_tensors(config) if tensors is None else tensors
    metadata = {"format": "pt"} if metadata is None else metadata
    if num_shards == 1:
        save_file(tensors, folder / SINGLE, metadata)
        return folder
    names, places = sorted(tensors), {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        places |= dict.fromkeys(part, file)
        save_file(part, folder / file, metadata)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size, "total_parameters": sum(map(torch.numel, tensors.values()))}}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": places}, indent=2))
    return folder


def digest(folder: Path) -> dict[str, str]:
    """Every file of a folder -> the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def families():
    """Name -> a function that makes a tiny random model of transformers in float32."""
    import transformers as t

    t.utils.logging.set_verbosity_error()
    t.utils.logging.disable_progress_bar()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 32, **ids,
    }  # fmt: skip
    grouped = {**sizes, "num_key_value_heads": 2}
    latent = {
        **sizes, "num_key_value_heads": 4, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 6,
        "kv_lora_rank": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1,
        "topk_group": 1,
    }  # fmt: skip
    gpt2 = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "activation_function": "gelu"}
    makers = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **ids)),
        "gpt2 base": lambda: t.GPT2Model(t.GPT2Config(**gpt2, **ids)),
        "gpt2 untied": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt2, **ids, tie_word_embeddings=False)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**{**sizes, "num_attention_heads": 2})),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**grouped)),
        "llama tied": lambda: t.LlamaForCausalLM(
            t.LlamaConfig(**grouped, attention_bias=True, tie_word_embeddings=True)
        ),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**grouped)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**grouped)),
        "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**grouped, head_dim=8)),
        "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**grouped)),
        "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**grouped, head_dim=8)),
        "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**grouped, head_dim=8)),
        "bert": lambda: t.BertModel(t.BertConfig(**sizes)),
        "bert for masked language": lambda: t.BertForMaskedLM(t.BertConfig(**sizes)),
        "deepseek_v2": lambda: t.DeepseekV2ForCausalLM(
            t.DeepseekV2Config(**latent, q_lora_rank=None, first_k_dense_replace=2)
        ),
        "deepseek_v2 with experts": lambda: t.DeepseekV2ForCausalLM(
            t.DeepseekV2Config(**latent, q_lora_rank=8, first_k_dense_replace=1)
        ),
    }

    def randomised(make):
        def made():
            model = make().eval()
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            return model

        return made

    return {name: randomised(make) for name, make in makers.items()}


FAMILIES = (
    "gpt2", "gpt2 base", "gpt2 untied", "gpt_neox", "llama", "llama tied", "mistral", "qwen2", "qwen3", "phi3",
    "gemma2", "gemma3", "bert", "bert for masked language", "deepseek_v2", "deepseek_v2 with experts",
)  # fmt: skip


def tokens(vocab_size=32, batch=2, length=9):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def answer(model, inputs):
    """Logits or last hidden states of a model of transformers, in float64."""
    result = model(input_ids=inputs)
    return (result.logits if "logits" in result else result.last_hidden_state).double()
