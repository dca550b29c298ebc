"""Energy Conserving Descent with q = 1.

Setting. ``V(Θ) = F(Θ) + Σ_g ½ wd_g |Θ_g|² − F0 > 0`` for a loss F and d parameters. The Hamiltonian is
``H(Θ, Π) = |Π| V(Θ)^a`` with ``a = η d / (2 (d − 1))`` (De Luca, Nachman, Silverstein, Zheng, arXiv 2501.18419). With
``u = Π/|Π|``, ``g = ∇V`` and time counted in units of the length of the path, Hamilton's equations are

    dΘ/dt = u,    du/dt = −(1 − u uᵀ) ∇ log V^a = −(a/V) (g − u (u·g)),    |u| = 1:

isokinetic dynamics in the potential ``a log V``. One step holds V and g fixed for a time Δt (kick), then u (drift).
With ``κ = Δt a / V = ½ Δt η d/(d−1) / V`` and ``Δt = lr/√η`` it is

    first step  u = −g/|g|
    kick        euler:  u ← u/|u|,  u ← u − κ (g − u (u·g))                                        (2501.18419)
                exact:  u ← [u + (sinh δ + s (cosh δ − 1)) e] / (cosh δ + s sinh δ),
                        e = −g/|g|,  s = e·u,  δ = κ |g|                                 (Robnik et al. 2023)
    drift       Θ ← Θ + Δt u
    bounce      u ← |u| normalise(u/|u| + ν/√d z),  z ~ N(0, 1)

The exact kick solves the kick's equation ``ds/dδ = 1 − s²``, so ``s = tanh(θ)`` with θ ← θ + δ, and the part of u that
is orthogonal to e is divided by ``cosh δ + s sinh δ``: Robnik, De Luca, Silverstein, Seljak, "Microcanonical
Hamiltonian Monte Carlo" (arXiv 2212.08549) and Ver Steeg, Galstyan, "Hamiltonian dynamics with non-Newtonian momentum"
(arXiv 2111.02434). It keeps |u| = 1, so that every step has the length Δt. The Euler kick does not: |u| grows to
``√(1 + κ²(|g|² − (u·g)²))`` and the published update drifts with that u.

Multiplying out with q = e^−δ, which never overflows, and c = 1 + s:

    u ← A u + B e,   A = 2q / D,   B = (1 − q)(c + q (1 − s)) / D,   D = c + q² (1 − s).

Near s = −1 (u points straight uphill) c is a difference of nearly equal numbers. There u is first replaced by its part
w orthogonal to e, whose length is measured, and ``c = |w|²/(1 − s)``.

Different lr_g in the param groups mean ECD in the coordinates ``X_g = Θ_g / lr_g``: u is a unit vector in those, the
kick uses ``∂V/∂X_g = lr_g g_g`` and ``Δt = 1/√η``, and the drift is ``Θ_g ← Θ_g + (lr_g/√η) u_g``. With one lr this is
the update above.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from . import _shards
from ._state import WideStateOptimizer, state_dtype

__all__ = ["ECD", "EnergyError"]

_GLOBAL = ("eta", "F0", "nu", "kick", "dot", "seed")

# Elements in a piece of a tensor. On a CPU two pieces of float32 stay in a 2 MiB second-level cache, so that the three
# dot products read u and g from memory once; elsewhere a piece is what one BLAS call can index.
_CPU_CHUNK = 2**18
_CHUNK = 2**30

# Steps between two measurements of |u| under the exact kick.
_RENORMALISE = 16

# A factor beyond this does not fit into float32.
_LARGEST = torch.finfo(torch.float32).max

# The fused kernel takes 1 − B, which rounds B to 1e-16: below these |B| that would show in the dtype.
_SMALLEST_FUSED = {torch.float32: 1e-9, torch.float64: 1e-3}


class EnergyError(ValueError):
    """V = F + ½ wd |Θ|² − F0 is not positive, or the loss or a gradient is not finite, or the kick overflows.

    Raised before anything is changed.
    """


@dataclass(slots=True)
class _Slot:
    """One parameter in one step: local, flattened views of its value p, velocity u and gradient g."""

    param: Tensor
    momentum: Tensor
    p: Tensor
    u: Tensor
    g: Tensor | None
    lr: float
    weight_decay: float
    index: int
    flat: bool
    A: float = 0.0
    B: float = 0.0

    def pieces(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor]]:
        size = _CPU_CHUNK if self.p.device.type == "cpu" else _CHUNK
        if not self.flat or self.p.numel() <= size:
            return iter([(self.u, self.g, self.p)])
        gs = [None] * len(self.u.split(size)) if self.g is None else self.g.split(size)
        return zip(self.u.split(size), gs, self.p.split(size))

    def gradient(
        self, u: Tensor, g: Tensor | None, p: Tensor, unit: float, scratch: Tensor | None = None
    ) -> Tensor | None:
        """∇V / unit of a piece, in the dtype of u and perhaps in ``scratch``; None if it is zero."""
        if unit != 1.0:
            total = torch.zeros_like(u, dtype=torch.float64) if g is None else g.double()
            return torch.add(total, p, alpha=self.weight_decay).div_(unit).to(u.dtype)
        if not self.weight_decay:
            return None if g is None else g.to(u.dtype)
        if g is None:
            return p.to(u.dtype) * self.weight_decay
        if scratch is None or not self.flat or not scratch.dtype == g.dtype == p.dtype == u.dtype:
            return torch.add(g.to(u.dtype), p, alpha=self.weight_decay)
        return torch.add(g, p, alpha=self.weight_decay, out=scratch[: u.numel()])


class ECD(WideStateOptimizer):
    """Energy Conserving Descent, q = 1 (arXiv 2501.18419), with the published Euler kick or the exact one.

    The loss enters the update: call ``step(loss=loss)`` after ``loss.backward()``, or ``step(closure)``. It must be the
    loss that the gradients belong to. Under DDP that is the mean over the processes, which the caller takes; with
    DTensor parameters (``fully_shard``) it is averaged here. Products and norms are over all parameters, sharded or
    not; FSDP1 and other wrappers that hold plain local shards are not supported.

    Args:
        params: tensors, param groups or named parameters, as for every ``torch.optim`` optimiser. Real, dense.
        lr: length of a step times √η, per group. Schedulers may change it at any step; a step at which every lr is 0
            changes nothing, draws nothing and needs no loss.
        eta: η > 0, how strongly low loss is preferred; it also sets how long the direction is remembered.
        F0: a number below the lowest loss to be reached, for minibatches too. 0 is safe for cross-entropy without
            weight decay on top.
        nu: ν ≥ 0, strength of the random bounces. At 0 no random number is drawn.
        weight_decay: wd ≥ 0, per group; ½ wd |Θ|² is added to the loss (it is not decoupled).
        kick: ``"exact"`` keeps |u| = 1 and the length of every step; ``"euler"`` is the published update. Away from
            small κ|g| they want different lr.
        dot: ``"global"`` is the equation; ``"per_tensor"`` takes u·g over each tensor by itself, which is what the
            official code does: the kick is then not tangent to the sphere. Only with ``kick="euler"``.
        seed: of the bounces. A draw is a function of the seed, the number of the step, the position of the parameter
            and its shard: a resumed run repeats it and DDP replicas agree. It depends on how parameters are sharded.
        foreach: True for ``torch._foreach_*`` operations, False for the fused SGD kernel, which does kick and drift in
            one pass, where the dtypes allow it. None: the fused kernel on CPU, foreach elsewhere.

    State: one tensor for each parameter, ``"momentum"``, of its shape and in its dtype or float32 if that is wider: the
    velocity u itself. The squares of all of it sum to 1 after every step with the exact kick; after a Euler kick |u| is
    what the published update leaves, and the next step normalises it. It is zero until the first step with lr > 0 at
    which the gradient does not vanish. Scalars are Python floats; the number of steps is in the param groups.
    Low-precision parameters are updated in float32 and rounded.

    A parameter without gradient at some step has ∇F = 0 if it has taken part before (it keeps moving) and is left out
    otherwise. d is the number of elements that take part. The first step is along −∇V; the official code leaves the
    weight decay out of that direction.

    Raises:
        ValueError: a setting is out of its range, a global setting differs between groups, a gradient is sparse or
            complex, ``step`` got no loss, or d < 2.
        EnergyError: a ValueError; V ≤ 0, or the loss or the gradient is not finite. Nothing was changed.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        eta: float = 100.0,
        F0: float = 0.0,
        nu: float = 0.0,
        weight_decay: float = 0.0,
        kick: str = "exact",
        *,
        dot: str = "global",
        seed: int = 0,
        foreach: bool | None = None,
    ) -> None:
        settings = {"eta": eta, "F0": F0, "nu": nu, "kick": kick, "dot": dot, "seed": seed}
        defaults = {"lr": lr, "weight_decay": weight_decay, **settings, "foreach": foreach, "step": 0}
        _check(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only ``lr`` and ``weight_decay`` may differ from the other groups."""
        merged = {**self.defaults, **param_group}
        _check(merged)
        common = self.param_groups[0] if self.param_groups else self.defaults
        for key in _GLOBAL:
            if merged[key] != common[key]:
                raise ValueError(
                    f"{key} is one setting for all parameters; a param group has {merged[key]!r}, the optimiser "
                    f"{common[key]!r}: give it to ECD(...) itself"
                )
        if self.param_groups:
            param_group = {**param_group, "step": common["step"]}
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *, loss: float | Tensor | None = None
    ) -> Any:
        """One step of kick, drift and bounce.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss.
            loss: the loss of which ``backward`` has been called; a number or a tensor of one element.

        Returns:
            The loss, as it was given.
        """
        if closure is not None:
            if loss is not None:
                raise ValueError("step takes a closure or a loss, not both")
            with torch.enable_grad():
                loss = closure()
        slots = self._slots()
        if not any(slot.lr for slot in slots):
            self._keep(slots)
            return loss
        if loss is None:
            raise ValueError(
                "ECD needs the value of the loss: call step(loss=loss) after loss.backward(), or step(closure) with a "
                "closure that returns it"
            )
        first = self.param_groups[0]
        eta, nu = first["eta"], first["nu"]
        d = sum(slot.param.numel() for slot in slots)
        if d < 2:
            raise ValueError(
                f"ECD needs at least two numbers to optimise, got {d}: on a line there is no direction to turn"
            )

        # The exact kick keeps |u| = 1 but for rounding, which is taken out now and then; the Euler kick needs |g| only
        # to set out or to bounce.
        exact, step = first["kick"] == "exact", first["step"]
        starts = step == 0 or any(not self.state.get(slot.param) for slot in slots)
        uu = starts or not exact or step % _RENORMALISE == 0
        gg = starts or exact or nu > 0
        unit = 1.0
        rows, value = _measure(slots, loss, unit, uu=uu, gg=gg)
        size = sum(row[2] if gg else abs(row[1]) for row in rows)
        if not size < math.inf or (gg and size < 1e-24):  # squares over- or underflowed, perhaps
            unit = _largest(slots) or 1.0
            if not math.isfinite(unit):
                raise EnergyError(f"the gradient is not finite ({unit}) at a loss of {value:.6g}; nothing was changed")
            rows, value = _measure(slots, loss, unit, uu=uu)
        decay = sum(0.5 * slot.weight_decay * row[3] for slot, row in zip(slots, rows) if slot.weight_decay)
        V = value + decay - first["F0"]
        if not math.isfinite(V):
            raise EnergyError(f"the loss is {value} and ½ wd |Θ|² is {decay}: V is not finite; nothing was changed")
        if V <= 0:
            raise EnergyError(
                f"ECD needs F0 below the loss, but F0 = {first['F0']:.6g} and the loss is {value + decay:.6g}: choose "
                "F0 below the lowest loss you expect, minibatches included (0 for cross-entropy); nothing was changed"
            )

        kappa = 0.5 * math.sqrt(eta) * d / (d - 1) / V * unit  # acts on the gradient in the coordinates Θ_g / lr_g
        speed = math.sqrt(sum(row[0] for row in rows)) if uu else 1.0
        steepness = math.sqrt(sum((slot.lr**2) * row[2] for slot, row in zip(slots, rows)))
        if speed == 0 and steepness == 0:  # a stationary point before the first step: nowhere to go
            self._keep(slots)
            return loss
        if speed == 0 and first["dot"] == "global":  # u = −γ/|γ|, and the kick vanishes
            A, B = [0.0] * len(slots), [-1 / steepness] * len(slots)
        elif exact:
            a, b = _exact_kick(slots, rows, speed, steepness, kappa, unit)
            A, B = [a] * len(slots), [b] * len(slots)
        else:
            A, B = _euler_kick(slots, rows, speed, steepness, kappa, first["dot"] == "per_tensor")
            if not max(max(map(abs, A)), max(abs(b) * max(1.0, slot.lr) for b, slot in zip(B, slots))) < _LARGEST:
                raise EnergyError(
                    f"the Euler kick with κ = {kappa:.3g} overflows: use kick='exact', or a lower F0; nothing was "
                    "changed"
                )
        for slot, a, b in zip(slots, A, B):
            slot.A, slot.B = a, b * slot.lr
        norm = 1.0
        if nu > 0 and not exact:
            squares = (slot.A**2 * r[0] + 2 * slot.A * slot.B * r[1] + slot.B**2 * r[2] for slot, r in zip(slots, rows))
            norm = math.sqrt(sum(squares))
        self._keep(slots)
        _kick_and_drift(slots, 1 / math.sqrt(eta), unit, first["foreach"])
        if nu > 0:
            _bounce(slots, norm, nu / math.sqrt(d), first["seed"], step)
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def _slots(self) -> list[_Slot]:
        for key in _GLOBAL:
            if any(group[key] != self.param_groups[0][key] for group in self.param_groups):
                raise ValueError(f"{key} is one number for all parameters, but differs between the param groups")
        slots = []
        index = -1
        for group in self.param_groups:
            for param in group["params"]:
                index += 1
                grad, state = param.grad, self.state.get(param)
                if grad is None and not state:
                    continue
                if param.is_complex() or (grad is not None and grad.layout is not torch.strided):
                    raise ValueError("ECD takes real, dense parameters and gradients; one here is complex or sparse")
                if state:
                    momentum = state["momentum"]
                else:
                    momentum = torch.zeros_like(param, dtype=state_dtype(param), memory_format=torch.preserve_format)
                p, u = _shards.local(param.detach()), _shards.local(momentum)
                g = None if grad is None else _shards.local_like(grad.detach(), param)
                order = list(range(p.dim()))
                if not p.is_contiguous():
                    order.sort(key=p.stride, reverse=True)  # the dimensions as they lie in memory
                flat = p.permute(order).is_contiguous() and u.permute(order).is_contiguous()
                if flat:
                    p, u = p.permute(order).view(-1), u.permute(order).view(-1)
                    g = None if g is None else g.permute(order).reshape(-1)
                lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
                slots.append(_Slot(param, momentum, p, u, g, lr, weight_decay, index, flat))
        return slots

    def _keep(self, slots: list[_Slot]) -> None:
        for slot in slots:
            self.state[slot.param]["momentum"] = slot.momentum


def _check(group: dict[str, Any]) -> None:
    positive = ("eta",)
    for key in ("lr", "eta", "F0", "nu", "weight_decay"):
        value = float(group[key])
        if not math.isfinite(value):
            raise ValueError(f"{key} is a finite number, not {value}")
        if (value < 0 and key != "F0") or (value == 0 and key in positive):
            raise ValueError(f"{key} is {'positive' if key in positive else 'at least 0'}, not {value:g}")
    for key, allowed in (("kick", ("exact", "euler")), ("dot", ("global", "per_tensor"))):
        if group[key] not in allowed:
            raise ValueError(f"{key} is one of {', '.join(allowed)}, not {group[key]!r}")
    if group["dot"] == "per_tensor" and group["kick"] == "exact":
        raise ValueError("dot='per_tensor' is how the official code does kick='euler'; the exact kick has dot='global'")


def _measure(
    slots: list[_Slot], loss: float | Tensor, unit: float, *, uu: bool = True, gg: bool = True
) -> tuple[list[list[float]], float]:
    """For each slot the sums u·u, u·g, g·g and (with weight decay) Θ·Θ over all shards, g = ∇V/unit; and the loss.

    One pass over u and g, and one transfer to the host. Without ``uu`` or ``gg`` that column is 0.
    """
    decays = any(slot.weight_decay for slot in slots)
    scratch = None
    if decays and slots[0].p.device.type == "cpu":
        scratch = slots[0].u.new_empty(_CPU_CHUNK)
    rows = []
    for slot in slots:
        zero = slot.u.new_zeros(())
        parts = []
        for u, g, p in slot.pieces():
            u_flat, gamma = u.reshape(-1), slot.gradient(u, g, p, unit, scratch)
            along = square = zero
            if gamma is not None:
                gamma = gamma.reshape(-1)
                along = torch.dot(u_flat, gamma)  # first, as it brings both into the cache at once
                square = torch.dot(gamma, gamma) if gg else zero
            parts += (torch.dot(u_flat, u_flat) if uu else zero, along, square)
            if decays:
                p_flat = p.reshape(-1).to(u.dtype)
                parts.append(torch.dot(p_flat, p_flat))
        rows.append(parts)
    width = 4 if decays else 3
    device = rows[0][0].device
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    sums = [torch.stack(parts).view(-1, width).to(device, torch.float64).sum(0) for parts in rows]
    table = torch.stack(sums)
    value = (
        torch.as_tensor(loss, dtype=None if isinstance(loss, Tensor) else torch.float64)
        .detach()
        .to(device, torch.float64)
        .reshape(())
        .clone()
    )
    _shards.sum_over_shards_(table, [slot.param for slot in slots], value)
    *entries, value_now = torch.cat([table.flatten(), value.view(1)]).tolist()
    return [entries[i : i + width] for i in range(0, len(entries), width)], value_now


def _largest(slots: list[_Slot]) -> float:
    """The largest |∂V/∂Θ_i|; a NaN or infinity if there is one."""
    values = []
    for slot in slots:
        for u, g, p in slot.pieces():
            gamma = slot.gradient(u, g, p, 1.0)
            if gamma is not None and gamma.numel():
                values.append(gamma.abs().amax().to("cpu", torch.float64))
    # A maximum over processes drops NaN on some backends, an infinity stays.
    value = torch.stack(values).amax().nan_to_num(nan=math.inf, posinf=math.inf).item() if values else 0.0
    return _shards.max_over_shards(value, [slot.param for slot in slots], slots[0].p.device)


def _euler_kick(
    slots: list[_Slot], rows: list[list[float]], speed: float, steepness: float, kappa: float, per_tensor: bool
) -> tuple[list[float], list[float]]:
    """The factors (a, b) for each slot of the Euler kick ``u ← a u + b γ``, γ = ∂V/∂X; u = −γ/|γ| if speed is 0."""
    if speed == 0:
        slopes = [-slot.lr * slot.lr * row[2] / steepness for slot, row in zip(slots, rows)]
    else:
        slopes = [slot.lr * row[1] / speed for slot, row in zip(slots, rows)]
    keep = [1 + kappa * slope for slope in (slopes if per_tensor else [sum(slopes)] * len(slopes))]
    if speed == 0:
        return [0.0] * len(slots), [-kappa - factor / steepness for factor in keep]
    return [factor / speed for factor in keep], [-kappa] * len(slots)


def _exact_kick(
    slots: list[_Slot], rows: list[list[float]], speed: float, steepness: float, kappa: float, unit: float
) -> tuple[float, float]:
    """The factors (a, b) of the exact kick ``u ← a u + b γ``, γ = ∂V/∂X. May replace u by its part orthogonal to γ."""
    if steepness == 0:
        return 1 / speed, 0.0
    s = -sum(slot.lr * row[1] for slot, row in zip(slots, rows)) / (speed * steepness)
    s = min(1.0, max(-1.0, s))
    delta = kappa * steepness
    q, one_minus_q = math.exp(-delta), -math.expm1(-delta)
    c = 1 + s
    if c > 1e-3:
        D = c + q * q * (1 - s)
        return 2 * q / D / speed, -one_minus_q * (c + q * (1 - s)) / D / steepness

    for slot in slots:  # u/|u| − s e, and e = −γ/steepness
        slot.A, slot.B = 1 / speed, s / steepness * slot.lr
    _kick_and_drift(slots, 0.0, unit, False)
    rows, _ = _measure(slots, 0.0, unit)
    width = math.sqrt(sum(row[0] for row in rows))
    left = -sum(slot.lr * row[1] for slot, row in zip(slots, rows)) / steepness  # e·w, zero but for rounding
    c = width * width / (1 - s)
    if c < 1e-30:  # exactly uphill, the unstable fixed point of the flow
        return 0.0, 1 / steepness
    D = c + q * q * (1 - s)
    along = (c - q * q * (1 - s)) / D
    across = 2 * q * math.sqrt(c * (1 - s)) / D / width
    norm = math.sqrt(along * along + 2 * along * across * left + (across * width) ** 2)
    return across / norm, -along / norm / steepness


def _kick_and_drift(slots: list[_Slot], dt: float, unit: float, foreach: bool | None) -> None:
    """``u ← A u + B ∇V/unit`` and ``Θ ← Θ + dt lr u`` for every slot."""
    groups: dict[tuple[Any, ...], list[_Slot]] = {}
    for slot in slots:
        on_cpu = slot.p.device.type == "cpu"
        fusable = slot.flat and slot.g is not None and slot.g.dtype == slot.p.dtype == slot.u.dtype
        if unit == 1.0 and slot.g is not None and (foreach or (foreach is None and not on_cpu)):
            key = ("foreach", 0.0, slot.B, slot.lr, slot.weight_decay)
        elif unit == 1.0 and fusable and slot.A and abs(slot.B) > _SMALLEST_FUSED.get(slot.u.dtype, math.inf):
            key = ("fused", slot.A, slot.B, slot.lr, slot.weight_decay)
        else:
            key = ("piecewise",)
        groups.setdefault(key, []).append(slot)
    for (path, *_), members in groups.items():
        first = members[0]
        if path == "piecewise":
            for slot in members:
                _piecewise(slot, dt, unit)
            continue
        ps = [slot.p for slot in members]
        us = [slot.u for slot in members]
        gs = cast(list[Tensor], [slot.g for slot in members])
        if path == "fused":
            # buf ← momentum buf + (1 − dampening)(g + wd Θ) and Θ ← Θ − lr buf: the same two lines in one pass.
            sgd(
                ps,
                gs,
                cast(list[Tensor | None], us),
                fused=True,
                weight_decay=first.weight_decay,
                momentum=first.A,
                lr=-dt * first.lr,
                dampening=1 - first.B,
                nesterov=False,
                maximize=False,
            )
        else:
            torch._foreach_mul_(us, [slot.A for slot in members])
            torch._foreach_add_(us, gs, alpha=first.B)
            if first.weight_decay:
                torch._foreach_add_(us, ps, alpha=first.B * first.weight_decay)
            torch._foreach_add_(ps, us, alpha=dt * first.lr)


def _piecewise(slot: _Slot, dt: float, unit: float) -> None:
    for u, g, p in slot.pieces():
        gamma = slot.gradient(u, g, p, unit)
        u.mul_(slot.A)
        if gamma is not None:
            u.add_(gamma, alpha=slot.B)
        p.add_(u, alpha=dt * slot.lr)  # in the wider dtype, then rounded


def _bounce(slots: list[_Slot], norm: float, nu: float, seed: int, step: int) -> None:
    """``u ← |u| normalise(u/|u| + nu z)`` for a u of length ``norm``."""
    for slot in slots:
        source = _shards.generator(slot.u.device, seed, step, slot.index, _shards.shard_index(slot.param))
        for u, _, _ in slot.pieces():
            noise = torch.empty_like(u).normal_(generator=source)
            u.add_(noise, alpha=nu * norm)
    bounced = math.sqrt(sum(row[0] for row in _measure(slots, 0.0, 1.0)[0]))
    for slot in slots:
        slot.u.mul_(norm / bounced)
