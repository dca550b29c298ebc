"""What a checkpoint computes, with one map of it in memory at a time.

The model is built by transformers without its weights. Each module gets its own just before it runs, from the
checkpoint, and loses them after; large maps and embeddings are read by rows. So the outputs of a model can be compared
in float64 on a machine that could not hold it.
"""

import json
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from erlangen import _extras
from erlangen.gauge._outputs import DTYPES as DTYPES
from erlangen.gauge._outputs import Float64
from erlangen.gauge._weights import give_back

_CHUNK = 1 << 22  # bytes of a map's rows that are held at a time


class Rows(Protocol):
    """Tensors by name, of which rows can be read."""

    def __contains__(self, name: str) -> bool: ...
    def rows(self, name: str, first: int = 0, last: int | None = None) -> Tensor: ...
    def shape(self, name: str) -> torch.Size: ...


@contextmanager
def without_weights() -> Iterator[None]:
    """Parameters that are made in this context have no numbers; buffers have theirs."""
    register = nn.Module.register_parameter

    def register_empty(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=False)
        register(module, name, param)

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Unreadable(ValueError):
    """The outputs of a checkpoint cannot be computed; the message says why."""


def _build(folder: Path) -> nn.Module:
    transformers = _extras.require("transformers", "hf")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or ["AutoModel"])[0]
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise Unreadable(f"transformers {transformers.__version__} has no {architecture}")
    config._attn_implementation = config._experts_implementation = "eager"
    with without_weights():
        model = cls.from_config(config) if architecture == "AutoModel" else cls(config)
    return model.eval()


def _sources(model: nn.Module, weights: Rows) -> dict[str, list[str]]:
    """Parameter -> the tensors it is made from: one, or those of the experts that transformers puts together."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    by_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(id(parameter), []).append(name)
    found, missing = {}, []
    for names in by_parameter.values():
        candidates = [*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)]
        candidates += [name.replace("lm_head.", "embed_out.") for name in names]  # as Pythia's checkpoints say
        stored = [[name] for name in candidates if name in weights] or _experts(candidates, weights)
        if not stored:
            missing += names
        found.update({name: stored[0] for name in names if stored})
    missing = [name for name in missing if ".pooler." not in f".{name}"]
    if missing:
        raise Unreadable(f"the checkpoint has no tensor of the name under which transformers keeps {missing[0]}")
    return found


class _Experts:
    """Stacked maps of a mixture of experts: one expert's is read when it is asked for."""

    def __init__(self, read: Callable[[str], Tensor], names: list[str], number: int) -> None:
        self._read, self._names, self._each = read, names, len(names) // number

    def __getitem__(self, expert: Tensor) -> Tensor:
        first = int(expert) * self._each
        return torch.cat([self._read(name) for name in self._names[first : first + self._each]])


def _experts(candidates: list[str], weights: Rows) -> list[list[str]]:
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
    for name in candidates:
        path, _, kind = name.rpartition(".")
        if kind in parts and f"{path}.0.{parts[kind][0]}.weight" in weights:
            number = 0
            while f"{path}.{number}.{parts[kind][0]}.weight" in weights:
                number += 1
            return [[f"{path}.{expert}.{part}.weight" for expert in range(number) for part in parts[kind]]]
    return []


def _attach(
    module: nn.Module, path: str, sources: dict[str, list[str]], read: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Let one module read its own parameters when it runs."""
    shapes = {name: value.shape for name, value in module._parameters.items() if value is not None}
    own = {name: sources[f"{path}.{name}".lstrip(".")] for name in shapes}

    for name in [name for name, stored in own.items() if len(stored) > 1]:
        del module._parameters[name]
        module.__dict__[name] = _Experts(read, own.pop(name), shapes[name][0])

    def load(name: str) -> Tensor:
        [stored] = own[name]
        return read(stored)

    if type(module) is nn.Linear:

        def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
            give_back()
            [stored] = own["weight"]
            step = max(1, _CHUNK // (dtype.itemsize * max(1, self.in_features)))
            bias = load("bias") if "bias" in own else None
            found = inputs.new_empty(*inputs.shape[:-1], self.out_features)
            for first in range(0, self.out_features, step):
                part = slice(first, first + step)
                weight = read(stored, part.start, part.stop)
                found[..., part] = F.linear(inputs, weight, None if bias is None else bias[part])
            return found

        module.forward = types.MethodType(forward, module)
        return
    if isinstance(module, nn.Embedding):
        module.padding_idx = None  # it matters to gradients only

        def choose(module: nn.Embedding, inputs: tuple[Tensor]) -> tuple[Tensor]:
            [stored] = own["weight"]
            numbers, places = inputs[0].unique(return_inverse=True)
            chosen = torch.cat([read(stored, number, number + 1) for number in numbers.tolist()])
            module.weight = nn.Parameter(chosen, requires_grad=False)
            return (places,)

        module.register_forward_pre_hook(choose)
    else:

        def fill(module: nn.Module, inputs: Any) -> None:
            for name in own:
                module._parameters[name] = nn.Parameter(load(name), requires_grad=False)

        module.register_forward_pre_hook(fill)

    def empty(module: nn.Module, inputs: Any, outputs: Any) -> None:
        for name in own:
            module._parameters[name] = nn.Parameter(torch.empty(shapes[name], device="meta"), requires_grad=False)

    module.register_forward_hook(empty)


def generated_inputs(config: Mapping[str, Any], vocab_size: int) -> Tensor:
    """int64 [2, N]: random tokens, always the same, of at most 32 positions."""
    limits = [config.get(name) for name in ("max_position_embeddings", "n_positions")]
    length = min([32, *(limit for limit in limits if isinstance(limit, int))])
    return torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def outputs(
    weights: Rows,
    folder: Path,
    inputs: Tensor | Mapping[str, Any],
    dtype: torch.dtype,
    build: Callable[[Path], nn.Module] | None = None,
) -> Tensor:
    """Logits [B, N, vocab_size] in float64; of a model without, its last hidden states [B, N, dim].

    Args:
        weights: the tensors of a checkpoint.
        folder: where its ``config.json`` is.
        inputs: int64 token ids [B, N], or keyword arguments of the model.
        dtype: in which the model computes.
        build: makes the model without weights from the folder; None: the class that its config names.

    Raises:
        ImportError: transformers is not installed.
        Unreadable: transformers knows no such model, or other names of its tensors.
    """
    model = (_build if build is None else build)(folder)
    sources = _sources(model, weights)
    if any(name not in sources for name, _ in model.named_parameters()):
        base: Any = getattr(model, str(model.base_model_prefix), model)
        base.pooler = None  # its output is not compared
    double = Float64()

    def read(name: str, first: int = 0, last: int | None = None) -> Tensor:
        with double.reading():
            return weights.rows(name, first, last).to(dtype)

    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if dtype == torch.float64 and buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
        if any(value is not None for value in module._parameters.values()):
            _attach(module, path, sources, read, dtype)
    with double if dtype == torch.float64 else nullcontext():
        result = model(**(inputs if isinstance(inputs, Mapping) else {"input_ids": inputs}))
    found = result.get("logits")
    return (result.last_hidden_state if found is None else found).double()
