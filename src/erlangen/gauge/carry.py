"""What training left behind goes along into a new gauge: gradients, and the state of an optimiser.

A gradient is dual to changes of weights (`Certificate.apply_to_gradient`); here all tensors of a model are taken
together, for a norm that was folded has a gradient that follows from those of the maps that read it. With
y = W (γ ⊙ x̂ + β) + b and G_W, G_b the gradients with respect to W and b,

    G_γ = Σ_out W ⊙ (G_W − G_b βᵀ) / γ,    G_β = Wᵀ G_b.

An optimiser adds up gradients (momentum), and the same linear map carries the sum: exactly where all are gradients at
the present weights; those of steps before, as far as the factors have not changed since. The next step then is the same
function only where the factors are orthogonal, for the metric of gradient descent is of one gauge. Weight decay that is
added to the gradients (SGD, ECD) is the gradient of another function, which shows the gauge; it goes along as that of
the old one. Sums of squares of gradients (Adam, SOAP) are no sums of gradients: from squares in the old coordinates
those in the new ones do not follow.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._fingerprint import fingerprint
from ._fold import Fold, attention_maps, latent_readers, plan, stored_bias, stored_gain, stream_readers
from ._weights import ModuleWeights
from .certificate import Certificate
from .layout import MLP, ModelLayout, Norm, Projection, model_layout, unwrap

# State of optimisers: sums of gradients, and what goes with squares of them.
_SUMS = ("momentum_buffer", "momentum", "exp_avg")
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "gram", "basis")
_MARK = "gauge"  # key of a param group: the fingerprint of the weights to which its state was carried


@dataclass(frozen=True)
class _Rule:
    """How the gradient of one tensor is made.

    Attributes:
        needs: names of the old gradients that it takes.
        make: (old, new) -> the new one, where new holds those of maps.
    """

    needs: tuple[str, ...]
    make: Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Tensor]


class _Rules:
    """Rules for the tensors of a model that is in its new gauge.

    Attributes:
        maps: of weights and biases of maps, and of embeddings.
        others: of norms and slopes. What is in neither stays as it is.
        unknown: name -> why no gradient is known.
    """

    def __init__(self, layout: ModelLayout, weights: ModuleWeights, certificate: Certificate) -> None:
        self.layout, self.weights, self.certificate = layout, weights, certificate
        self.maps: dict[str, _Rule] = {}
        self.others: dict[str, _Rule] = {}
        self.unknown: dict[str, str] = {}
        stacks: dict[str, dict[str, dict[str, Any]]] = {}
        for path, entry in certificate.maps.items():
            weight, bias = entry["weight"], entry["bias"]
            if "stack" in entry:
                stacks.setdefault(weight, {})[path] = entry
                continue
            inputs = weights.shape(weight)[0 if entry["transposed"] else 1]
            folded = certificate._constant(entry, inputs) is not None
            place = certificate.maps[entry.get("moved_to", path)]["weight"]
            self.maps[place] = _Rule((weight, bias) if folded else (weight,), self._weight(path, weight, bias))
            if bias is not None:
                self.maps[bias] = _Rule((bias,), self._bias(bias))
        for weight, entries in stacks.items():
            self.maps[weight] = _Rule((weight,), self._stack(weight, entries))
        for norm, fold, readers, output in self._folded():
            self._norm(norm, fold, readers, output)
        self._kept_norms()
        for layer in layout.layers:
            norms = layer.attention.qk_norm
            for norm in norms if isinstance(norms, tuple) else ():
                self._query_key_norm(norm)
            if layer.mlp is not None and layer.mlp.slope is not None:
                self._slope(layer.mlp, layer.mlp.slope)

    def __getitem__(self, name: str) -> _Rule:
        if name in self.maps:
            return self.maps[name]
        return self.others.get(name, _Rule((name,), lambda old, new: old[name].detach().cpu().double()))

    # --- maps ---

    def _weight(self, path: str, weight: str, bias: str | None):
        return lambda old, new: self.certificate.apply_to_gradient(
            path, old[weight], None if bias is None else old.get(bias)
        )

    def _stack(self, weight: str, entries: Mapping[str, Mapping[str, Any]]):
        """Of experts in one tensor, each at its new place."""

        def make(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
            found = torch.empty(old[weight].shape, dtype=torch.float64)
            for path, entry in entries.items():
                place = self.certificate.maps[entry.get("moved_to", path)]["stack"]
                found[place] = self.certificate.apply_to_gradient(path, old[weight][entry["stack"]])
            return found

        return make

    def _bias(self, bias: str):
        return lambda old, new: self.certificate.apply_to_gradient(bias, old[bias])

    # --- norms ---

    def _folded(self) -> Iterator[tuple[Norm, Fold, list[Projection], str | None]]:
        """Norms that maps read, those maps, and the bias that a folded norm of sums also goes into."""
        found: dict[str, tuple[Norm, Fold, list[Projection], str | None]] = {}
        steps = plan(self.layout)
        for layer, what in zip(self.layout.layers, steps.layers):
            maps, mlp = attention_maps(layer.attention), layer.mlp
            inputs = [maps[name] for name in stream_readers(layer.attention)]
            branches = [
                (what.attention, inputs, layer.attention.output.bias_name),
                (what.mlp, layer.feed_forward_readers, None if mlp is None else mlp.down.bias_name),
            ]
            for fold, readers, output in branches:
                if fold.norm is not None:
                    entry = found.setdefault(fold.norm.path, (fold.norm, fold, [], output))
                    entry[2].extend(readers)
            for norm, names in latent_readers(layer.attention).values():
                found[norm.path] = (norm, Fold(norm, "before"), [maps[name] for name in names], None)
        if steps.final is not None and steps.final.norm is not None and self.layout.unembedding is not None:
            found[steps.final.norm.path] = (steps.final.norm, steps.final, [self.layout.unembedding], None)
        yield from found.values()

    def _norm(self, norm: Norm, fold: Fold, readers: list[Projection], output: str | None) -> None:
        frame = self.certificate._frame()
        if fold.kind == "kept":
            if not frame.same:
                self._turned(norm, 1.0)
            return
        parts = {part.key: part for part in readers}.values()
        needs = {name for part in parts for name in (part.weight, part.bias_name) if name is not None}
        needs = {need for name in needs for need in self.maps[name].needs}
        if norm.weight is not None:
            if fold.kind == "before":
                needed = tuple(sorted({norm.weight, *needs}))
                self.others[norm.weight] = _Rule(needed, lambda old, new: self._by_readers(norm, parts, new)[0])
            else:
                self.unknown[norm.weight] = "it is of a norm of sums, whose gain stays while what it hides is taken off"
        if norm.bias_name is not None:
            more = () if fold.kind == "before" or output is None else (output,)
            needed = tuple(sorted({norm.bias_name, *needs, *more}))
            self.others[norm.bias_name] = _Rule(
                needed,
                lambda old, new: self._by_readers(norm, parts, new)[1] + sum(new[name] for name in more),
            )

    def _by_readers(self, norm: Norm, parts: Iterable[Projection], new: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients with respect to the gain and bias of a norm, from those of the maps that read it."""
        gain, bias = stored_gain(self.weights, norm), stored_bias(self.weights, norm)
        found = None
        for part in parts:
            rows = part.matrix(self.weights[part.weight]).cpu().double()
            gradient = part.matrix(new[part.weight])
            if part.transposed:
                rows, gradient = rows.T, gradient.T
            gains = torch.ones_like(rows[0]) if gain is None else gain.cpu()
            summed = torch.zeros_like(rows[:, 0])
            if bias is not None:
                ratio = bias.cpu() / gains
                # Without a bias of its own, the map has what it gives to a constant on the mean of its rows.
                own = part.bias_name
                summed = new[own] if own is not None else (gradient / gains).sum(dim=1) / ratio.sum()
                gradient = gradient - torch.outer(summed, bias.cpu())
            both = ((rows * gradient).sum(dim=0) / gains, rows.T @ summed)
            found = both if found is None else (found[0] + both[0], found[1] + both[1])
        assert found is not None
        return found

    def _turned(self, norm: Norm, scale: float) -> None:
        """A norm that stays: its numbers went into the new frame, and were divided by a scale."""
        frame, gain, bias = self.certificate._frame(), norm.weight, norm.bias_name

        def turned(name: str, treat: Callable[[Tensor], Tensor]) -> _Rule:
            return _Rule((name,), lambda old, new: treat(old[name].detach().cpu().double()) * scale)

        if gain is not None:
            self.others[gain] = turned(gain, frame.permute)
        if bias is not None:
            self.others[bias] = turned(bias, frame.apply)

    def _kept_norms(self) -> None:
        layout, table = self.layout, self.certificate.maps[self.layout.token_embedding]
        scale = table["writes"]["scale"] if layout.embedding_norm is None else 1.0
        for layer in layout.layers:
            for norm in (layer.attention_out_norm, layer.mlp_out_norm):
                if norm is not None:
                    self._turned(norm, scale)
        final = plan(layout).final
        if layout.final_norm is not None and (final is None or final.kind == "kept"):
            self._turned(layout.final_norm, 1 / scale if layout.tied else 1.0)

    def _query_key_norm(self, norm: Norm) -> None:
        name, transforms = norm.weight, self.certificate.transforms
        if name is None or f"{norm.path}.ratio" not in transforms:
            return
        ratio = transforms[f"{norm.path}.ratio"]
        if (ratio == 0).any():
            self.unknown[name] = "the gain is zero in places"
            return
        order = transforms[f"{norm.path}.order"] if f"{norm.path}.order" in transforms else torch.tensor([0])

        def make(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
            rows = old[name].detach().cpu().double().view(-1, ratio.shape[1])
            return (rows[order] / ratio).flatten()

        self.others[name] = _Rule((name,), make)

    def _slope(self, mlp: MLP, name: str) -> None:
        """Slopes of a PReLU. Beyond 1, a slope a became 1 / a, and the feature's outputs were multiplied by -a."""
        part = next(part for part in self.certificate.maps[mlp.up.path]["slices"] if "scale" in part)
        scale, order = (self.certificate.transforms[part[key]] for key in ("scale", "order"))
        down = mlp.down

        def make(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> Tensor:
            gradient = old[name].detach().cpu().double()[order]
            slope = 1 / self.weights[name].cpu().double()
            rows, of_rows = down.heads(self.weights[down.weight].cpu().double())[0], down.heads(new[down.weight])[0]
            return torch.where(scale < 0, slope * (rows * of_rows).sum(dim=1) - slope**2 * gradient, gradient)

        self.others[name] = _Rule((name, *self.maps[down.weight].needs), make)

    # --- all together ---

    def carry(self, old: Mapping[str, Tensor], names: Iterable[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The new gradients of these names; and of those that cannot be known, why."""
        names, failed = list(names), dict[str, str]()
        made: dict[str, Tensor] = {}
        wanted = {need for name in names for need in self[name].needs if need in self.maps}
        for name in [*sorted(wanted | set(names) & self.maps.keys()), *(n for n in names if n not in self.maps)]:
            needs = self[name].needs
            if name in self.unknown:
                failed[name] = self.unknown[name]
            elif missing := [need for need in needs if need not in old]:
                failed[name] = f"the same of {', '.join(missing)} is needed too"
            elif name in self.others and (without := [need for need in needs if need in failed]):
                failed[name] = f"it needs {without[0]} ({failed[without[0]]})"
            else:
                try:
                    made[name] = self[name].make(old, made)
                except ValueError as error:
                    failed[name] = str(error)
        return {name: made[name] for name in names if name in made}, {n: failed[n] for n in names if n in failed}


def _rules_of(model: nn.Module, certificate: Certificate) -> _Rules:
    layout, weights = model_layout(model), ModuleWeights(model)
    if not certificate.target:
        raise ValueError(
            "this certificate has no fingerprint of the weights that it speaks of (an older version made it): "
            "canonicalise the model again"
        )
    if len(certificate.spectra) != len(layout.layers):
        raise ValueError(
            "this certificate is of no canonical form (of an alignment, perhaps), and does not say what became of "
            "every norm: carry weights one by one, with its apply_to_gradient"
        )
    if fingerprint(layout, weights) != certificate.target:
        raise ValueError(
            "these weights are not those that the certificate speaks of: they are of another model or another gauge, "
            "or were trained since. Carry what belongs to the old weights before the first step in the new gauge"
        )
    return _Rules(layout, weights, certificate)


def carry_gradients(model: nn.Module, certificate: Certificate, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a function with respect to the new weights of a model, from those with respect to the old ones.

    Exact: what backward gives with the new weights, up to rounding.

    Args:
        model: in its new gauge, as `canonicalize` left it.
        certificate: what `canonicalize` returned.
        gradients: name of a parameter -> gradient of its shape, or a sum of gradients; of all that are trained.

    Returns:
        name -> float64 on the CPU, for the same names.

    Raises:
        TypeError: no layout is known for the model.
        ValueError: the model is not the one that the certificate speaks of; a name or shape that the model does not
            have; a gradient that another one needs is missing; one that cannot be known (see
            `Certificate.apply_to_gradient`; and gains of norms of sums, as in BERT).
    """
    rules = _rules_of(model, certificate)
    for name, gradient in gradients.items():
        if name not in rules.weights or rules.weights.shape(name) != gradient.shape:
            what = f"shape {list(rules.weights.shape(name))}" if name in rules.weights else "no such parameter"
            raise ValueError(f"the gradient {name} has shape {list(gradient.shape)}, the model has {what}")
    unembedding = rules.layout.unembedding
    if rules.layout.token_embedding in gradients and unembedding is not None and unembedding.weight not in gradients:
        raise ValueError(
            f"the gradient of {rules.layout.token_embedding} needs that of {unembedding.weight} beside it: where they "
            "were one tensor in the old gauge, their gradients are known only as a sum"
        )
    made, failed = rules.carry(gradients, gradients)
    for name, reason in failed.items():
        raise ValueError(f"the gradient of {name} cannot be carried: {reason}")
    return made


# --- the state of an optimiser ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CarriedState:
    """What became of the state of an optimiser.

    Attributes:
        carried: parameters whose momentum was carried.
        reset: parameters whose state was dropped: they start as in a new optimiser.
    """

    carried: tuple[str, ...]
    reset: tuple[str, ...]


def carry_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    certificate: Certificate,
    *,
    second_moments: Literal["refuse", "reset"] = "refuse",
) -> CarriedState:
    """Carry the state of an optimiser along, when the model that it trains was brought to canonical form.

    Momentum is a sum of gradients, and is carried as `carry_gradients` does it: SGD and Muon of torch, and "sgdm",
    "ecd" and "muon" of `erlangen.optim`. The velocity of ECD keeps its length, 1 over all parameters. It belongs right
    after `canonicalize`: the state must be that of the old weights, and the model that of the certificate.

    Momentum and the squares of Adam, in the part of "muon" for instance, are averages of different steps: a weight
    whose norm had a bias needs the average for the bias of its map by the same rule, and cannot follow without it.

    Args:
        optimizer: of the model's parameters. Its state is changed in place.
        model: in its new gauge. Wrappers of compile and DDP are seen through.
        certificate: what `canonicalize` returned.
        second_moments: "refuse": state that cannot follow is an error, and nothing is changed. "reset": it is dropped,
            with the step count and first moment that belong to it.

    Returns:
        Which parameters kept their momentum and which start anew.

    Raises:
        ValueError: state that cannot follow, unless it is to be reset; a state whose meaning is not known; a parameter
            that is not of the model; the model is not the one that the certificate speaks of; the state was carried to
            this gauge already.
    """
    if second_moments not in ("refuse", "reset"):
        raise ValueError(f'second_moments must be "refuse" or "reset", received {second_moments!r}')
    rules = _rules_of(model, certificate)
    if any(group.get(_MARK) == certificate.target for group in optimizer.param_groups):
        raise ValueError("the state of this optimiser was carried to this gauge already")
    names = {id(parameter): name for name, parameter in unwrap(model).named_parameters()}
    parameters: dict[str, nn.Parameter] = {}
    sums: dict[tuple[Any, ...], dict[str, Tensor]] = {}  # rule of averaging -> name -> sum of gradients
    untouched: set[str] = set()  # no gradient has come yet: sums are zero
    stuck: dict[str, str] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"the optimiser trains a tensor of shape {list(parameter.shape)} that is not of this model"
                )
            parameters[name] = parameter
            state = {key: value for key, value in optimizer.state.get(parameter, {}).items() if value is not None}
            unknown = sorted(state.keys() - {*_SUMS, *_SQUARES, "step"})
            if unknown:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {', '.join(unknown)} of {name}: what becomes of it in another "
                    "gauge is not known. Start the optimiser anew"
                )
            found = [key for key in _SUMS if key in state]
            if any(key in state for key in _SQUARES):
                stuck[name] = "squares of gradients in other coordinates do not follow from those in the old ones"
            elif found:
                rule = (found[0], *(str(group.get(key)) for key in ("momentum", "dampening", "betas")))
                sums.setdefault(rule, {})[name] = state[found[0]]
            else:
                untouched.add(name)
    unembedding = rules.layout.unembedding
    if unembedding is not None and unembedding.weight not in parameters and rules.layout.token_embedding in parameters:
        stuck[rules.layout.token_embedding] = (
            f"{unembedding.weight} was the same tensor or is not trained: their gradients are known only as a sum"
        )
    new: dict[str, tuple[str, Tensor]] = {}
    for (key, *_), found in sums.items():
        zeros = {name: torch.zeros_like(parameters[name]) for name in untouched}
        old = {**zeros, **found}
        made, failed = rules.carry(old, [name for name in found if name not in stuck])
        stuck.update(failed)
        if key == "momentum" and made:
            sizes = [
                torch.stack([part[name].double().square().sum().cpu() for name in made]).sum().sqrt()
                for part in (found, made)
            ]
            made = {name: tensor * (sizes[0] / sizes[1].clamp_min(1e-300)) for name, tensor in made.items()}
        new.update({name: (key, tensor) for name, tensor in made.items()})
    if stuck and second_moments == "refuse":
        first = sorted(stuck)[:3]
        rest = f" and {len(stuck) - 3} more" if len(stuck) > 3 else ""
        reasons = "; ".join(f"{name}: {stuck[name]}" for name in first)
        raise ValueError(
            f"the state of {type(optimizer).__name__} cannot follow into the new gauge ({reasons}{rest}): reset that "
            'part of it with second_moments="reset", or start the optimiser anew'
        )
    for name, (key, tensor) in new.items():
        optimizer.state[parameters[name]][key].copy_(tensor)
    for name in stuck:
        optimizer.state.pop(parameters[name], None)
    for group in optimizer.param_groups:
        group[_MARK] = certificate.target
    return CarriedState(tuple(sorted(new)), tuple(sorted(stuck)))
