"""The world a run lives in: one process, or several started by torchrun. One process is the world of size one."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .model import GPT


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes for all."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, on every one of them."""
        if self.size > 1:
            torch.distributed.all_reduce(value)
        return value

    def agree(self, text: str) -> str:
        """The first process's text, on every process."""
        if self.size == 1:
            return text
        texts = [text]
        torch.distributed.broadcast_object_list(texts)
        return texts[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()

    def wrap(self, model: GPT, parallel: str, *, compile: bool) -> nn.Module:
        """The model made ready to train here: compiled in place if asked, and copied (ddp) or sharded (fsdp)."""
        if self.size > 1 and parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            for block in model.blocks:
                if compile:
                    block.compile(fullgraph=True)
                fully_shard(block)
            fully_shard(model)
            return model
        if compile:
            model.compile(fullgraph=True)
        if self.size > 1:
            # Buffers are the same everywhere by construction (draws are a function of a counter).
            return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        return model

    def sync_gradients(self, wrapped: nn.Module, enabled: bool) -> None:
        """Whether the next backward reduces gradients over processes (off for all but the last micro-batch)."""
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):
            wrapped.require_backward_grad_sync = enabled
        elif (set_sync := getattr(wrapped, "set_requires_gradient_sync", None)) is not None:
            set_sync(enabled)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """ "auto" is CUDA where there is any, else the CPU.

    Raises:
        ValueError: the device is not one this machine has.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", local_rank)
    raise ValueError(f"device must be 'auto', 'cpu' or (on a machine that has one) 'cuda', received {name!r}")


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (gloo on CPU, NCCL on CUDA), and leave them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    picked = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if picked.type == "cuda":
        torch.cuda.set_device(picked)
    if size == 1 or torch.distributed.is_initialized():
        yield World(rank, size, picked)
        return
    torch.distributed.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    try:
        yield World(rank, size, picked)
    finally:
        leave()


def leave() -> None:
    """Leave the processes' group, when its threads have let go of the tensors they sent.

    Gloo's threads drop a collective's tensors shortly after the collective is done, and take Python's lock for it. A
    process that ends in that moment aborts ("terminate called without an active exception"), and one that frees a
    DistributedDataParallel in it waits forever (github.com/pytorch/pytorch/issues/190489). Nothing says when they are
    done; they need microseconds, or their turn on a busy machine.
    """
    time.sleep(0.2)
    torch.distributed.destroy_process_group()
