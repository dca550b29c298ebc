"""ECD written straight from the equations, in float64: the oracle for ``erlangen.optim.ECD``."""

import math

from torch import Tensor


def reference_step(
    params: list[Tensor],
    grads: list[Tensor],
    velocity: list[Tensor] | None,
    loss: float,
    *,
    lr: list[float],
    eta: float,
    F0: float,
    weight_decay: list[float],
    kick: str,
    dot: str = "global",
) -> tuple[list[Tensor], list[Tensor]]:
    """One step without bounces: new params and velocity. lr and weight_decay hold one number for each tensor."""
    d = sum(p.numel() for p in params)
    V = loss + sum(0.5 * wd * float(p.square().sum()) for p, wd in zip(params, weight_decay)) - F0
    # In X = Θ/lr the gradient is lr ∇V and Δt = 1/√η.
    g = [rate * (grad + wd * p) for p, grad, rate, wd in zip(params, grads, lr, weight_decay)]
    dt = 1 / math.sqrt(eta)
    kappa = 0.5 * dt * eta * d / (d - 1) / V
    if velocity is None:
        length = _norm(g)
        velocity = [-x / length for x in g]
    length = _norm(velocity)
    u = [x / length for x in velocity]
    if kick == "euler":
        along = [float((a * b).sum()) for a, b in zip(u, g)]
        if dot == "global":
            along = [sum(along)] * len(along)
        u = [a - kappa * (b - a * s) for a, b, s in zip(u, g, along)]
    else:
        size = _norm(g)
        e = [-x / size for x in g]
        s = sum(float((a * b).sum()) for a, b in zip(u, e))
        delta = kappa * size
        sinh, cosh = math.sinh(delta), math.cosh(delta)
        u = [(a + (sinh + s * (cosh - 1)) * b) / (cosh + s * sinh) for a, b in zip(u, e)]
    return [p + rate * dt * a for p, a, rate in zip(params, u, lr)], u


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(float(x.square().sum()) for x in tensors))
