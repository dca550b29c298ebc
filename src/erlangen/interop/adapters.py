r"""LoRA adapters in PEFT's format, carried into another gauge of their base model.

An adapter adds B A to the weight of a map (times a scale that is a setting). Where the base model was brought to
another gauge, its weight W became L W R up to what nothing shows, and B A has to become (L B)(A R): the rank is kept,
and nothing is approximated but the rounding of the stored numbers. Where a norm's bias was folded through W, the change
adds a constant to the outputs, which goes into the bias of lora_B (PEFT's ``lora_bias``).

An adapter that is loaded onto a base in another gauge raises no error and computes nonsense. So both bases are held
against the certificate's fingerprints, and a carried adapter says in the metadata of its file to which weights it
belongs. (A key in ``adapter_config.json`` would make PEFT warn at every loading.)

The format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors.torch import save_file
from torch import Tensor

from erlangen.gauge._fingerprint import fingerprint
from erlangen.gauge.certificate import Certificate

from . import _safetensors as files
from .checkpoints import _COPIES as SECOND_NAMES
from .checkpoints import RECORD, TRANSFORMS, Checkpoint, named, new_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MARK = "erlangen_gauge"  # of the file's metadata: the fingerprint of the base that an adapter belongs to

_PREFIX = "base_model.model."
# Ends of the names of an adapter's tensors. Those of embeddings are parameters, without ".weight".
_OUTPUTS = (".lora_B.weight", ".lora_embedding_B")
_INPUTS = (".lora_A.weight", ".lora_embedding_A")
_BIAS = ".lora_B.bias"
_COPY = ".base_layer.weight"  # PEFT stores the whole table beside the adapter of an embedding

# Settings under which an adapter does not add B A to one weight, and why it cannot follow.
_OTHER_KINDS = {
    "use_dora": "DoRA scales the rows of the weight by their norms, and norms change with the gauge",
    "use_qalora": "QA-LoRA pools the inputs in groups, and the gauge mixes them",
    "layer_replication": "layers of the base are used several times",
    "target_parameters": "parameters are adapted that are no maps",
    "trainable_token_indices": "rows of the embedding are replaced",
    "use_bdlora": "its factors have blocks, which the gauge mixes",
    "kasa_config": "it is no product of two factors",
    "monteclora_config": "it is no product of two factors",
    "velora_config": "its gradients are of projected inputs",
    "arrow_config": "it chooses between adapters by their factors",
    "megatron_config": "its layers are those of Megatron",
    "ensure_weight_tying": "one adapter stands for the embedding and for the logits",
}
# Ways to begin that leave the weights of the base as they are; others (PiSSA, OLoRA, CorDA, LoftQ) take a part of them
# out whenever the adapter is loaded.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@runtime_checkable
class Carries(Protocol):
    """What carries changes of weights into another gauge: `erlangen.gauge.Certificate`, or the like of an alignment.

    Attributes:
        source, target: fingerprints of the weights before and after.
        maps: path of a map, or name of an embedding -> "weight": its name, "transposed": it is stored [in, out].
    """

    source: str
    target: str
    maps: dict[str, dict[str, Any]]

    def apply_to(self, path: str, delta: Tensor) -> Tensor: ...
    def apply_to_factors(
        self, path: str, outputs: Tensor, inputs: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class CarriedAdapter:
    """An adapter in its new gauge.

    Attributes:
        folder: where it was written.
        ranks: module -> rank of its adapter.
        biases: modules whose bias has to change along; all have one then (``lora_bias``).
        dropped: whole tensors of the base that the adapter held and that are not repeated.
        source, target: fingerprints of the base to which it belonged, and to which it belongs now.
    """

    folder: Path
    ranks: Mapping[str, int]
    biases: tuple[str, ...]
    dropped: tuple[str, ...]
    source: str
    target: str

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        lines = [f"{self.folder}: {len(self.ranks)} maps of rank {', '.join(map(str, ranks))} in the new gauge"]
        if self.biases:
            lines.append(f"  biases change along in {len(self.biases)} of them: lora_bias is set")
        if self.dropped:
            lines.append(f"  left out, for the base has them: {', '.join(self.dropped)}")
        return "\n".join(lines)


@dataclass
class _Module:
    """The adapter of one module: [out, rank], [rank, in], [out]."""

    outputs: tuple[str, Tensor] | None = None
    inputs: tuple[str, Tensor] | None = None
    bias: Tensor | None = None


def carry_adapter(
    adapter: str | Path, output: str | Path, *, base: str | Path, moved: str | Path | Carries
) -> CarriedAdapter:
    """Write a LoRA adapter of a base model as one of the same model in another gauge.

    The moved base with the new adapter computes what the base with the old one does; computed in float64, stored in the
    dtype of the adapter's tensors. Other files of the folder are carried along, but for weights of other kinds
    (states of training). ``base_model_name_or_path`` of the new config is the moved folder.

    Args:
        adapter: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``. It stays as it is.
        output: the new folder; it must not exist.
        base: the folder of the model that the adapter was trained on, in its old gauge.
        moved: the folder that `erlangen.gauge.canonicalize` (or an alignment) wrote, with ``gauge.json`` and
            ``gauge.safetensors``; or the certificate alone.

    Raises:
        FileNotFoundError: a folder or file is not there.
        FileExistsError: the output is there.
        OSError: it cannot be written.
        ValueError: the adapter is of another kind than LoRA, adds more than B A, or names modules that the certificate
            does not know; a file is damaged; base, moved model and certificate do not belong together; the adapter
            belongs to another gauge than that of the base, or was carried already; a part of the base that it changes
            was set to zero (`Certificate.apply_to`).
    """
    folder, output = Path(adapter), Path(output)
    config, file = _read_config(folder), _open_weights(folder)
    checkpoint = Checkpoint(base)
    certificate = _certificate(checkpoint, moved)
    _expect_gauge(folder, config, file, checkpoint, certificate)
    modules, dropped = _modules(folder, file, checkpoint)
    tensors, biases = {}, {}
    for name, module in modules.items():
        new, bias = _carried(folder, name, module, checkpoint, certificate)
        tensors.update(new)
        if bias is not None:
            biases[name] = bias
    if biases:
        # PEFT has biases in all modules or in none.
        embedded = [name for name, module in modules.items() if _is_embedding(module)]
        if embedded:
            raise ValueError(
                f"{folder}: the biases of norms were folded through {named(list(biases))}, so that their adapters need "
                f"biases, which PEFT cannot combine with an adapter of an embedding ({named(embedded)}): merge the "
                "adapter into its base first"
            )
        for name, module in modules.items():
            assert module.outputs is not None
            key, stored = module.outputs
            bias = biases.get(name, torch.zeros(stored.shape[0], dtype=torch.float64))
            tensors[key.removesuffix(_OUTPUTS[0]) + _BIAS] = _stored(bias, stored.dtype, name)
        config = {**config, "lora_bias": True, "init_lora_weights": True}
    if not isinstance(moved, Carries):
        config = {**config, "base_model_name_or_path": str(moved)}
    with new_folder(folder, output, num_bytes=sum(tensor.nbytes for tensor in tensors.values())) as aside:
        (aside / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        save_file(tensors, aside / WEIGHTS, {**file.metadata, _MARK: certificate.target})
    ranks = {name: module.inputs[1].shape[0] for name, module in modules.items() if module.inputs is not None}
    return CarriedAdapter(output, ranks, tuple(sorted(biases)), dropped, certificate.source, certificate.target)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: name a folder with {CONFIG} and {WEIGHTS}")
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} has no {CONFIG}: name the folder of an adapter in PEFT's format")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, received {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder} is an adapter of kind {config.get('peft_type')}: only LORA can be carried")
    for key, why in _OTHER_KINDS.items():
        if config.get(key):
            raise ValueError(f"{folder} has {key} set: {why}. Merge it into its base, and canonicalise that")
    if config.get("modules_to_save"):
        raise ValueError(
            f"{folder} holds whole modules ({named(list(config['modules_to_save']))}), which are of the old gauge: "
            "merge the adapter into its base, and canonicalise that"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(
            f'{folder} holds biases of the base that were trained along (bias="{config["bias"]}"): merge the adapter '
            "into its base, and canonicalise that"
        )
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise ValueError(
            f"{folder} begins with init_lora_weights={init!r}, which takes a part out of the base's weights whenever "
            "the adapter is loaded; that part is another in another gauge: save it as an ordinary LoRA first "
            "(path_initial_model_for_weight_conversion of PEFT's save_pretrained)"
        )
    return config


def _open_weights(folder: Path) -> files.TensorFile:
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "; adapter_model.bin is not read because unpickling runs code" if pickled else ""
        raise ValueError(f"{folder} has no {WEIGHTS}{why}: save the adapter with safe_serialization=True")
    return files.open_file(path)


def _certificate(checkpoint: Checkpoint, moved: str | Path | Carries) -> Carries:
    """The certificate, which must speak of this base, and of the weights that lie beside it."""
    if isinstance(moved, Carries):
        found, where = moved, "the certificate"
    else:
        folder = Path(moved)
        if not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist: name the folder of the base in its new gauge")
        if not (folder / RECORD).is_file() or not (folder / TRANSFORMS).is_file():
            raise ValueError(
                f"{folder} has no {RECORD} with {TRANSFORMS}: name the folder that erlangen canonicalize wrote"
            )
        where = str(folder / RECORD)
        try:
            text = (folder / RECORD).read_text(encoding="utf-8")
            found = Certificate.from_json(text, files.Tensors(files.open_file(folder / TRANSFORMS)))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where} or {TRANSFORMS} is damaged ({error})") from error
    if not found.source or not found.target:
        raise ValueError(f"{where} has no fingerprints of its weights: canonicalise {checkpoint.folder} again")
    if fingerprint(checkpoint.layout, checkpoint) != found.source:
        raise ValueError(
            f"{where} was made from other weights than those in {checkpoint.folder}: it says nothing of an adapter of "
            "these. Name the folder that was brought to the new gauge"
        )
    if not isinstance(moved, Carries):
        now = Checkpoint(moved)
        if fingerprint(now.layout, now) != found.target:
            raise ValueError(
                f"the weights in {moved} are no longer those that {where} speaks of: they were trained or replaced "
                "since"
            )
    return found


def _expect_gauge(
    folder: Path, config: Mapping[str, Any], file: files.TensorFile, base: Checkpoint, certificate: Carries
) -> None:
    """Whether an adapter belongs to the base as it is: what it says of itself must not contradict it."""
    mark = file.metadata.get(_MARK)
    if mark is not None and mark != certificate.source:
        already = mark == certificate.target
        what = "the gauge of the moved model already" if already else f"another gauge than that of {base.folder}"
        raise ValueError(f"{folder} was carried to {what}: an adapter is carried from the base that it belongs to")
    name = config.get("base_model_name_or_path")
    if mark is None and isinstance(name, str) and Path(name).is_dir():
        try:
            trained_on = Checkpoint(name)
        except (ValueError, OSError):
            return
        if fingerprint(trained_on.layout, trained_on) != certificate.source:
            raise ValueError(
                f"{folder} says that it belongs to {name}, whose weights are not those of {base.folder}: name the base "
                "that it was trained on"
            )


def _modules(folder: Path, file: files.TensorFile, base: Checkpoint) -> tuple[dict[str, _Module], tuple[str, ...]]:
    """The adapters of modules by path, and names of whole tensors that are the base's own."""
    modules: dict[str, _Module] = {}
    dropped, unknown = [], []
    for name, entry in file.entries.items():
        path = name.removeprefix(_PREFIX)
        end = next((end for end in (*_OUTPUTS, *_INPUTS, _BIAS) if path.endswith(end)), None)
        if end is None:
            own = (path.removesuffix(_COPY) + ".weight") if path.endswith(_COPY) else path
            if base.layout.tied and own in SECOND_NAMES:
                own = base.layout.token_embedding
            found = _only([known for known in base.names() if _same_path(known, own)])
            if found is None:
                unknown.append(name)
            elif entry.shape != tuple(base.shape(found)) or not _equal(files.read(file.path, entry), base[found]):
                raise ValueError(
                    f"{folder} holds {name} as a whole, and it is not that of {base.folder}: it was trained or "
                    "resized. Merge the adapter into its base, and canonicalise that"
                )
            else:
                dropped.append(name)
            continue
        tensor = files.read(file.path, entry)
        if entry.dtype not in files.FLOATS or not tensor.double().isfinite().all():
            raise ValueError(f"{folder}: {name} must hold finite floating point numbers, received {entry.dtype}")
        module = modules.setdefault(path.removesuffix(end), _Module())
        if end in _OUTPUTS:
            module.outputs = (name, tensor)
        elif end in _INPUTS:
            module.inputs = (name, tensor)
        else:
            module.bias = tensor
    if unknown:
        raise ValueError(f"{folder} holds {named(unknown)} beside the factors of LoRA: what they do is not known")
    if not modules:
        raise ValueError(f"{folder / WEIGHTS} holds no factors of LoRA (lora_A, lora_B)")
    for path, module in modules.items():
        if module.outputs is None or module.inputs is None:
            raise ValueError(f"{folder} holds only one of lora_A and lora_B for {path}: it is damaged")
        first, second = module.outputs[1], module.inputs[1]
        if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[0]:
            raise ValueError(
                f"{folder}: the factors for {path} must be [out, rank] and [rank, in], received {list(first.shape)} "
                f"and {list(second.shape)}"
            )
    return modules, tuple(dropped)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    """As numbers; an adapter may be stored in another dtype than its base."""
    dtype = min(tensor.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(tensor.to(dtype), other.to(dtype))


def _same_path(known: str, path: str) -> bool:
    """Whether two paths are of one module: one may lack the name of the model inside a model with a head."""
    return known == path or known.endswith(f".{path}") or path.endswith(f".{known}")


def _only(found: list[str]) -> str | None:
    return found[0] if len(found) == 1 else None


def _is_embedding(module: _Module) -> bool:
    return module.inputs is not None and module.inputs[0].endswith("lora_embedding_A")


# --- carrying ---------------------------------------------------------------------------------------------------------


def _known(certificate: Carries, path: str, embedding: bool) -> str:
    """The name under which the certificate knows a module."""
    maps = certificate.maps
    own = f"{path}.weight" if embedding else path
    found = _only([known for known in maps if _same_path(known, own)])
    if found is None:
        raise ValueError(
            f"the certificate does not know {path}, which the adapter changes: it is no map or embedding that has one "
            f"part in the model (maps that it knows: {named(sorted(maps))})"
        )
    return found


def _stored(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.to(dtype).contiguous()
    if not cast.isfinite().all():
        raise ValueError(
            f"the adapter of {name} would hold numbers up to {tensor.abs().max():.3g}, beyond the range of {dtype}: "
            "store it in float32 first"
        )
    return cast


def _carried(
    folder: Path, path: str, module: _Module, base: Checkpoint, certificate: Carries
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The new factors by name, and the new bias of lora_B."""
    assert module.outputs is not None and module.inputs is not None
    (out_name, outputs), (in_name, inputs) = module.outputs, module.inputs
    known = _known(certificate, path, _is_embedding(module))
    entry = certificate.maps[known]
    if "moved_to" in entry:
        raise ValueError(
            f"{folder} has an adapter of {path}, an expert that has changed places, and PEFT finds modules by name: "
            'canonicalise the base with order="kept"'
        )
    expected = base.shape(entry["weight"])[:: -1 if entry["transposed"] else 1]
    if (outputs.shape[0], inputs.shape[1]) != tuple(expected):
        raise ValueError(
            f"{folder}: the adapter of {path} changes a map of {outputs.shape[0]} x {inputs.shape[1]}, and in "
            f"{base.folder} it is one of {expected[0]} x {expected[1]}"
        )
    new_outputs, new_inputs, shifts = certificate.apply_to_factors(known, outputs, inputs)
    bias = next(iter(shifts.values()), None)
    if module.bias is not None:
        own = certificate.apply_to(f"{known}.bias", module.bias)
        bias = own if bias is None else bias + own
    new = {out_name: (new_outputs, outputs.dtype), in_name: (new_inputs, inputs.dtype)}
    return {name: _stored(tensor, dtype, path) for name, (tensor, dtype) in new.items()}, bias
