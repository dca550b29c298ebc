"""Tiny models, byte windows and runs of transformers.Trainer; and two processes to run on."""

import inspect
import json
import multiprocessing
import os
import socket
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from transformers import Trainer, TrainingArguments

import erlangen as er
from erlangen.interop import trainer as parts
from erlangen.lm.distributed import leave

TEXT = Path(inspect.getfile(er.gauge.HeadLayout)).read_bytes()  # English and Python, wherever the tests run


def windows(count, ragged=False):
    """Windows of 32 bytes; ragged ones have labels on fewer and fewer of them."""
    tokens = torch.tensor(list(TEXT[: count * 32])).view(count, 32)
    data = []
    for number, window in enumerate(tokens):
        labels = window.clone()
        if ragged:
            labels[: number % 5 * 6] = -100
        data.append({"input_ids": window, "labels": labels})
    return data


def build(family):
    """A random model of two layers and width 32."""
    torch.manual_seed(3)
    if family == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0,
                attn_pdrop=0.0, bos_token_id=0, eos_token_id=None,
            )
        )  # fmt: skip
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, attention_bias=True, bos_token_id=0, eos_token_id=None,
        )
    )  # fmt: skip


def checkpoint_layers(model):
    """Recompute the layers of a model in its backward."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def arguments(folder, **fields):
    """Arguments of a quiet run on the CPU."""
    quiet = {
        "output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
        "per_device_train_batch_size": 8, "logging_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**quiet | fields)


def train(model, name, folder, *, lr, steps, every=None, callbacks=None, resume=False, data=None, **fields):
    """Train, and give back the trainer."""
    args = arguments(folder, learning_rate=lr, max_steps=steps, **fields)
    trainer = Trainer(
        model, args, train_dataset=data or windows(240), callbacks=callbacks,
        optimizer_cls_and_kwargs=parts.optimizer(name, args),
    )  # fmt: skip
    trainer.add_callback(parts.ChargeCallback(trainer, every=every))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def ragged_run(folder, batch_size):
    """Five steps of ECD on a broken model, on this process's share of every batch."""
    model = er.breaking.break_symmetry(build("llama"))
    trainer = train(
        model, "ecd", folder, lr=0.5, steps=5, data=windows(60, ragged=True), per_device_train_batch_size=batch_size
    )
    history = trainer.state.log_history
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "charges": [entry["charge/qk/1"] for entry in history if "charge/qk/1" in entry],
        "last": model.lm_head.weight[:4].flatten().tolist(),
        "draws": model.symmetry_breaking.num_draws.item(),
    }
    (folder / "log.json").write_text(json.dumps(record))


def on_two_processes(run, folder, **settings):
    """Call run(folder / rank) on two processes that know each other, forked from this one."""
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_join, args=(rank, port, run, folder, settings)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
    stuck = [process for process in processes if process.is_alive()]
    for process in stuck:
        process.kill()
    assert not stuck and [process.exitcode for process in processes] == [0, 0]


def _join(rank, port, run, folder, settings):
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}
    # OpenMP's threads do not live on in a process that was forked; accelerate sets their number where this is not said.
    world["OMP_NUM_THREADS"] = 1
    os.environ.update({name: str(value) for name, value in world.items()})
    torch.set_num_threads(1)
    # What accelerate remembers of the process that this one was forked from.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        run(folder / str(rank), **settings)
    finally:
        if torch.distributed.is_initialized():
            leave()
