"""What a comparison of two models found: distances of layers and parts, matched heads, spectra, a verdict."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NEAR = 0.5  # distance of embeddings up to which two models have one frame; of models, up to which they are related


@dataclass(frozen=True)
class Part:
    """One part of the model, compared.

    Attributes:
        distance: 0 for equal, 1 for unrelated.
        excess: the difference over what rounding of the stored numbers would make of equal ones, at the worst place.
        parameters: how many of the first model it has.
    """

    distance: float
    excess: float
    parameters: int

    @property
    def similarity(self) -> float:
        """From 0 to 1."""
        return max(0.0, 1.0 - self.distance**2)


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer, compared. H query heads, G key/value heads, K and V widths of a query and a value.

    Attributes:
        query_key, value_output: over all heads, each with the one it was matched with.
        mlp: of the feed-forward layer, or of all experts and their scores.
        rest: what no head or neuron has: constants, gains that no map takes in, latents. None if there is nothing.
        heads: [H]: the head of the second model that each head of the first was matched with.
        query_key_distances, value_output_distances: [H], of the matched heads.
        head_similarity: [H, H], of every head of the first with every one of the second.
        num_neurons_moved: hidden neurons that were matched with one at another place.
        spectra: "query_key" [2, G, K] and "value_output" [2, G, V]: singular values of both models, in the order of the
            first one's heads.
        naive: distance of the stored numbers; None where the two have no tensor of one name and shape.
        experts: of a mixture, the expert of the second model that each of the first was matched with; else None.
    """

    query_key: Part
    value_output: Part
    mlp: Part
    rest: Part | None
    heads: tuple[int, ...]
    query_key_distances: Tensor
    value_output_distances: Tensor
    head_similarity: Tensor
    num_neurons_moved: int
    spectra: dict[str, Tensor]
    naive: float | None
    experts: tuple[int, ...] | None = None

    @property
    def parts(self) -> dict[str, Part]:
        """Those that there are, by name."""
        parts = {"query_key": self.query_key, "value_output": self.value_output, "mlp": self.mlp, "rest": self.rest}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def distance(self) -> float:
        """Over all parts."""
        return together(self.parts.values())

    @property
    def similarity(self) -> float:
        """From 0 to 1."""
        return max(0.0, 1.0 - self.distance**2)

    @property
    def num_heads_moved(self) -> int:
        """Heads that were matched with one at another place."""
        return sum(head != other for head, other in enumerate(self.heads))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two models, compared.

    Attributes:
        distance: over all parts, each as its number of parameters: 0 for one function up to gauge, 1 for unrelated.
        same_function: whether every difference is one that the rounding of the stored numbers explains.
        layers: in order of depth.
        embeddings: parts by name: "embedding", other tables, "unembedding", "output".
        naive: distance of the stored numbers of each tensor that both have, by name.
        naive_distance: over all of them; None if there is none.
        frame: of the residual streams: "same"; "turned", or "permuted" if the second model had to be first.
        frame_matrix: [dim, dim] float64: rows of the second model times it are rows of the first; None if the same.
        notes: what else one should know, in sentences.
        output_difference: largest absolute difference of the outputs on given inputs; None without inputs.
        output_scale: root mean square of the first model's outputs on them.
    """

    distance: float
    same_function: bool
    layers: tuple[LayerComparison, ...]
    embeddings: dict[str, Part]
    naive: dict[str, float]
    naive_distance: float | None
    frame: str
    frame_matrix: Tensor | None
    notes: tuple[str, ...]
    output_difference: float | None = None
    output_scale: float | None = None

    @property
    def similarity(self) -> float:
        """From 0 to 1; 1 for one function up to gauge."""
        return max(0.0, 1.0 - self.distance**2)

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.same_function:
            return "The two models are the same function, up to rounding."
        if self.distance < NEAR:
            return f"The two models are related, and not the same function: {100 * self.distance:.3g} % apart."
        return f"The two models are not related by any gauge move known here: {100 * self.distance:.3g} % apart."

    def to_json(self) -> dict[str, Any]:
        """All of it but the frame's matrix, in the types that JSON has."""

        def part(value: Part | None) -> dict[str, Any] | None:
            return None if value is None else {"similarity": value.similarity, **vars(value)}

        layers = []
        for layer in self.layers:
            numbers: dict[str, Any] = {"distance": layer.distance, "similarity": layer.similarity, "naive": layer.naive}
            numbers |= {name: part(value) for name, value in layer.parts.items()}
            numbers |= {"heads": list(layer.heads), "num_neurons_moved": layer.num_neurons_moved}
            numbers |= {} if layer.experts is None else {"experts": list(layer.experts)}
            numbers |= {"query_key_distances": layer.query_key_distances.tolist()}
            numbers |= {"value_output_distances": layer.value_output_distances.tolist()}
            numbers |= {"head_similarity": layer.head_similarity.tolist()}
            numbers |= {"spectra": {name: values.tolist() for name, values in layer.spectra.items()}}
            layers.append(numbers)
        result: dict[str, Any] = {"distance": self.distance, "similarity": self.similarity}
        result |= {"same_function": self.same_function, "verdict": self.verdict, "frame": self.frame}
        result |= {"naive_distance": self.naive_distance, "output_difference": self.output_difference}
        result |= {"output_scale": self.output_scale, "notes": list(self.notes), "layers": layers}
        result |= {"embeddings": {name: part(value) for name, value in self.embeddings.items()}, "naive": self.naive}
        # A move that stores infinities has no place in JSON.
        return json.loads(json.dumps(result), parse_constant=lambda _: None)

    def __str__(self) -> str:
        header = ("", "query-key", "value-output", "mlp", "rest", "stored", "moved")
        rows: list[tuple[str, ...]] = [header]
        for number, layer in enumerate(self.layers):
            cells = [layer.parts[name].distance if name in layer.parts else None for name in _LAYER_PARTS]
            moved = [f"{layer.num_heads_moved} heads"] if layer.num_heads_moved else []
            moved += [f"{layer.num_neurons_moved} neurons"] if layer.num_neurons_moved else []
            rows.append((f"layer {number}", *map(_short, (*cells, layer.naive)), ", ".join(moved)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(text.ljust(width) if place in (0, 6) else text.rjust(width) for place, (text, width) in
                      enumerate(zip(row, widths))).rstrip()
            for row in rows
        ]  # fmt: skip
        lines += [f"{name}: {_short(part.distance)}" for name, part in self.embeddings.items()]
        naive = "" if self.naive_distance is None else f"; of the stored numbers: {_short(self.naive_distance)}"
        lines.append(f"distance: {_short(self.distance)} (similarity {self.similarity:.6g}){naive}")
        if self.output_difference is not None:
            lines.append(f"outputs differ by at most {self.output_difference:.3g}, of {self.output_scale:.3g}")
        return "\n".join([*lines, self.verdict, *self.notes])


_LAYER_PARTS = ("query_key", "value_output", "mlp", "rest")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def together(parts: Iterable[Part]) -> float:
    parts = list(parts)
    total = sum(part.parameters for part in parts)
    return (sum(part.distance**2 * part.parameters for part in parts) / total) ** 0.5 if total else 0.0
