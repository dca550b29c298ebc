"""Canonical form: one representative for all weights that are the same function.

In this order: gains and biases of norms are folded into the maps that read them, and what layer norms take off is taken
off the weights; the frame of the residual stream is fixed, if asked; queries against keys and values against output are
brought to the forms of `forms`; scales that go through a feed-forward layer are balanced; heads, hidden features and
experts are put in the order of quantities that no gauge changes. Whatever is a symmetry only up to the eps of a norm is
left, and said: nothing here changes the function.

All of it is computed in float64, a layer at a time, and written once in the stored dtype.
"""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._canonical_heads import canonical_attention
from ._canonical_mlp import canonical_feed_forward
from ._canonical_record import Record as Record
from ._canonical_residual import embeddings_of, residual_frame, residual_scale, write_embeddings, write_unembedding
from ._fingerprint import fingerprint
from ._fold import Frame, LayerPlan, Reading, Writing, plan, stored_bias, stored_gain
from ._outputs import compared as compared
from ._outputs import generated_inputs, outputs
from ._weights import ModuleWeights, PendingWeights, ReadWeights, Weights
from .certificate import Certificate
from .layout import Layer, ModelLayout, Norm, model_layout, unwrap
from .layout import rows as slices_of

_FOLDERS = "erlangen.interop.checkpoints"


def check_weights(layout: ModelLayout, weights: ReadWeights) -> None:
    """Every tensor that a layout names is there, in its shape and in floating point.

    Raises:
        ValueError: one is not; it is named.
    """
    for name, shape in layout.tensor_shapes().items():
        if name not in weights:
            raise ValueError(f"the layout of this {layout.kind} names a tensor {name}, which the weights do not have")
        found = tuple(weights.shape(name))
        if found != shape:
            raise ValueError(f"{name} must have the shape {shape} by the layout of this {layout.kind}, and has {found}")
        if weights.dtype(name) not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name} is of dtype {weights.dtype(name)}: quantised weights have no exact canonical form, "
                "dequantise the model first"
            )


def canonical_form(
    layout: ModelLayout,
    weights: Weights,
    *,
    order: Literal["sorted", "kept"] = "sorted",
    residual: bool = False,
    logit_shift: bool = False,
    transforms: MutableMapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Record:
    """Bring weights to canonical form, tensor by tensor, a layer at a time.

    Args:
        layout: of the model.
        weights: read, and written. What fails part of the way leaves them half done: give a copy, or `PendingWeights`.
        order: "sorted": heads, hidden features and experts by size, largest first; "kept": as they are.
        residual: also fix the frame of the residual stream.
        logit_shift: also take off what softmax does not see: a constant added to all logits of a position.
        transforms: where the factors are kept, layer by layer; None: in memory.
        progress: called with the number of layers done and of all.

    Returns:
        What was done.

    Raises:
        ValueError: a tensor is missing, of another shape than the layout's, quantised or not finite; ``residual`` where
            no frame is free.
    """
    if order not in ("sorted", "kept"):
        raise ValueError(f'order must be "sorted" or "kept", received {order!r}')
    check_weights(layout, weights)
    steps, sort = plan(layout, logit_shift=logit_shift), order == "sorted"
    record = Record() if transforms is None else Record(transforms=transforms)
    record.folded += steps.notes
    if not residual and steps.rotations != "none":
        record.folded.append("The frame of the residual stream is left as it is (residual=True settles it).")
    has_logits = layout.unembedding is not None or (layout.tied and bool(layout.other_embeddings))
    if has_logits and layout.soft_cap is None and not logit_shift:
        record.folded.append(
            "A constant added to all logits of a position, which softmax does not see, is left (logit_shift=True takes "
            "it off)."
        )
    if residual and steps.rotations == "none":
        raise ValueError(f"the frame of the residual stream of this {layout.kind} is not free: {steps.reason}")
    embeddings = embeddings_of(layout, weights, steps)
    scale = residual_scale(layout, weights, embeddings) if steps.residual_scale else 1.0
    frame = residual_frame(layout, weights, steps, embeddings, record) if residual else Frame()
    table_scale = residual_scale(layout, weights, embeddings) if steps.embedding_scale else scale
    if residual:
        kinds = {
            "all": "rotations",
            "mean": "rotations that leave the mean",
            "signed": "signed permutations of coordinates (a tied embedding, or norms that stay, leave no others)",
            "permuted": "permutations of coordinates (a tied embedding, or norms that stay, leave no others)",
        }
        record.folded.append(f"The frame of the residual stream is fixed: {kinds[steps.rotations]}.")
        for name, tensor in (("matrix", frame.matrix), ("order", frame.order), ("sign", frame.sign)):
            if tensor is not None:
                record.keep(f"residual.{name}", tensor)
    embeddings = replace(
        embeddings,
        writing=replace(embeddings.writing, frame=frame, scale=table_scale),
        token_writing=replace(embeddings.token_writing, frame=frame, scale=table_scale),
    )
    write_embeddings(layout, weights, embeddings, record)
    for number, (layer, what) in enumerate(zip(layout.layers, steps.layers)):
        _layer(layer, number, what, weights, frame, scale, sort, record)
        if progress is not None:
            progress(number + 1, len(layout.layers))
    write_unembedding(layout, weights, steps, frame, record)
    final = layout.final_norm
    if final is not None and (steps.final is None or steps.final.kind == "kept"):
        # Tied: the logits are taken with the embedding that was divided by the scale.
        gain, bias = stored_gain(weights, final), stored_bias(weights, final)
        tied_scale = scale if layout.tied else 1.0
        if final.weight is not None and gain is not None and (residual or tied_scale != 1):
            weights[final.weight] = frame.permute(gain) * tied_scale - final.offset
        if final.bias_name is not None and bias is not None and (residual or tied_scale != 1):
            weights[final.bias_name] = frame.apply(bias) * tied_scale
    return record


def _layer(
    layer: Layer,
    number: int,
    steps: LayerPlan,
    weights: Weights,
    frame: Frame,
    scale: float,
    sort: bool,
    record: Record,
) -> None:
    readings = {fold: Reading.of(weights, fold, frame) for fold in (steps.attention, steps.mlp)}
    for fold, centred, out_norm, treat in (
        (steps.attention, steps.attention_centred, layer.attention_out_norm, canonical_attention),
        (steps.mlp, steps.mlp_centred, layer.mlp_out_norm, canonical_feed_forward),
    ):
        reading = readings[fold]
        # A norm of the output sets its size: then its gain carries the scale of the stream.
        divided = reading.scale if fold.kind == "after" else scale if out_norm is None else 1.0
        treat(layer, number, weights, reading, Writing(centred, frame, divided), sort, record)
        out_norm_in_frame(out_norm, weights, frame, scale)
    if layer.joined_biases is not None:
        output, down = layer.joined_biases
        weights[output] = weights[output].double() + weights[down].double()
        weights[down] = torch.zeros_like(weights[down])
        if number == 0:
            record.folded.append("Output biases of feed-forward layers moved into those of the attention beside them.")
    for reading in readings.values():
        if reading.fold.kind != "kept" or not frame.same:
            reading.store(weights)


def out_norm_in_frame(norm: Norm | None, weights: Weights, frame: Frame, scale: float) -> None:
    """A norm of what a branch writes, in the new frame and scale of the stream."""
    if norm is None:
        return
    gain, bias = stored_gain(weights, norm), stored_bias(weights, norm)
    if norm.weight is not None and gain is not None:
        weights[norm.weight] = frame.permute(gain) / scale - norm.offset
    if norm.bias_name is not None and bias is not None:
        weights[norm.bias_name] = frame.apply(bias) / scale


# --- models in memory -------------------------------------------------------------------------------------------------


def untied(layout: ModelLayout, unembedding: str) -> ModelLayout:
    """The layout of a model whose logits are taken with a tensor of their own, ``unembedding + ".weight"``."""
    return replace(layout, tied=False, unembedding=slices_of(unembedding, 1, layout.vocab_size))


def _tied_name(weights: ModuleWeights, layout: ModelLayout) -> str:
    """The other name of the token embedding."""
    table = layout.token_embedding
    others = [name for name in weights if name != table and weights.same(name, table)]
    if len(others) != 1 or not others[0].endswith(".weight"):
        raise ValueError(
            f"untie needs a model whose logits are taken with {table} under a second name, found {others or 'none'}"
        )
    return others[0]


def _untie(module: nn.Module, name: str, source: str) -> None:
    """Give a tied parameter a tensor of its own, and say so in the config."""
    path, _, last = name.rpartition(".")
    tied = module.get_parameter(source)
    setattr(module.get_submodule(path), last, nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad))
    config: Any = getattr(module, "config", None)
    if is_dataclass(config) and hasattr(config, "tie_embeddings"):
        untied_config: Any = replace(config, tie_embeddings=False)
        module.config = untied_config
    elif config is not None and hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = False


def canonicalize(
    model_or_folder: nn.Module | str | Path,
    output: str | Path | None = None,
    *,
    order: Literal["sorted", "kept"] = "sorted",
    residual: bool = False,
    untie: bool = False,
    logit_shift: bool = False,
    inputs: Tensor | Mapping[str, Any] | None = None,
    check: bool = True,
) -> Certificate:
    """Bring a model to canonical form: of all weights that are the same function, one representative.

    A model in memory is changed in place (its parameters keep their dtype and device; nothing is written before all is
    computed). A folder of Hugging Face is read, and another one written.

    Args:
        model_or_folder: a model whose layout is known (wrappers of compile and DDP are seen through), or a folder with
            ``config.json`` and safetensors.
        output: the folder to write, which must not exist; for a folder only.
        order: "sorted": heads, hidden features and experts by size, largest first; "kept": as they are.
        residual: also fix the frame of the residual stream: rotations where it has no other use, permutations of
            coordinates where the embedding is tied.
        untie: give the logits a tensor of their own first, so that the frame is free. The model then has more
            parameters.
        logit_shift: also take off a constant added to all logits of a position. Softmax does not see it; without this
            the logits themselves stay what they were.
        inputs: what outputs are compared on: token ids [B, T], or keyword arguments of the model. None: two sequences
            of random tokens, always the same.
        check: compare outputs before and after, in float64, float32 and bfloat16.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: weights that contradict the layout, are missing, quantised, sharded or not finite; ``residual``
            where no frame is free; ``untie`` where nothing is tied; an output folder for a model in memory, or none for
            a folder.
    """
    if isinstance(model_or_folder, str | Path):
        if output is None:
            raise ValueError("canonicalize writes a folder beside the one it reads: give the output folder")
        options = {"order": order, "residual": residual, "untie": untie, "logit_shift": logit_shift}
        return import_module(_FOLDERS).canonicalize_folder(
            model_or_folder, output, **options, inputs=inputs, check=check
        )
    if not isinstance(model_or_folder, nn.Module):
        raise TypeError(f"canonicalize needs a model or a folder, received a {type(model_or_folder).__name__}")
    if output is not None:
        raise ValueError("a model in memory is changed in place: give no output folder, and save it where you like")
    model = unwrap(model_or_folder)
    layout, stored = model_layout(model), ModuleWeights(model)
    source = fingerprint(layout, stored)
    added: dict[str, str] = {}
    if untie:
        if not layout.tied:
            raise ValueError("untie needs a model whose logits are taken with the token embedding; this one's are not")
        name = _tied_name(stored, layout)
        added[name] = layout.token_embedding
        layout = untied(layout, name.removesuffix(".weight"))
    weights = PendingWeights(stored, added)
    check_weights(layout, weights)
    device = stored[layout.token_embedding].device
    if inputs is None and check:
        inputs = generated_inputs(model, layout, device)
    shifted = plan(layout, logit_shift=logit_shift).logit_shift
    before = outputs(model, inputs, shifted) if check and inputs is not None else None
    record = canonical_form(layout, weights, order=order, residual=residual, logit_shift=logit_shift)
    for name, source in added.items():
        _untie(model, name, source)
        weights = weights.onto(ModuleWeights(model))
    weights.commit()
    target = fingerprint(layout, ModuleWeights(model))
    certificate = Certificate(layout.kind, **vars(record), source=source, target=target)
    if before is not None and inputs is not None:
        sizes = f"{tuple(inputs.shape)} token ids" if isinstance(inputs, Tensor) else "the inputs given"
        after = outputs(model, inputs, shifted)
        for name, value in compared(before, after, sizes).items():
            setattr(certificate, name, value)
    return certificate
