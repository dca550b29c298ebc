r"""Noether charges of attention heads.

The loss does not change when the queries and keys of a head turn together, W_Q → R W_Q, W_K → R W_K with R in
O(head_dim), nor when its values turn against its output, W_V → R W_V, W_O → W_O Rᵀ. For an optimiser whose motion is
itself rotation-invariant (gradient descent with momentum, energy-conserving descent) each such rotation has a
conserved charge, the angular momentum of the head: with U the velocity of each weight,

    X_QK = U_Q W_Qᵀ + U_K W_Kᵀ          X_VO = U_V W_Vᵀ + U_Oᵀ W_O          J = X − Xᵀ

(learned biases join as one more column of their weight). The gradient of an invariant loss satisfies
antisym(g_Q W_Qᵀ + g_K W_Kᵀ) = 0 on every minibatch, so a run that starts with J = 0 keeps J = 0. What is left of the
group decides which entries of J are charges: rotary positions leave one angle for each plane of equal frequency and
the full rotations of the coordinates they do not touch; grouped keys turn with all the queries that read them.

A fixed (unlearned) bias m beside a *learned* one b leaves an affine symmetry: b → R(b + m) − m. Its charge is J with
b + m in the place of b. So a fixed mean breaks nothing when biases are learned; noise does.

Derived for this library; it agrees with the conservation laws listed for attention in arXiv 2606.17816.
"""

import torch
from torch import Tensor, nn

from .layout import HeadLayout, Projection, Rotary, head_layouts, unwrap

# Names under which optimisers keep a first moment. A nested state (HeavyBall) prefixes the last of them.
_MOMENTUM_KEYS = ("momentum_buffer", "momentum", "exp_avg")


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded (a collective when it is), in float64."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().double()


def _find_momentum(state: dict, shape: torch.Size) -> Tensor | None:
    for key, value in state.items():
        if isinstance(value, dict):
            found = _find_momentum(value, shape)
            if found is not None:
                return found
        elif isinstance(value, Tensor) and value.numel() == shape.numel() and value.ndim:
            name = str(key)
            if name in _MOMENTUM_KEYS or ("exp_avg" in name and "exp_avg_sq" not in name):
                return value
    return None


class _Motion:
    """Weights and velocities of a model's parameters, by head, with the bias as one more column."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.state = optimizer.state

    def position_and_velocity(self, path: str) -> tuple[Tensor, Tensor]:
        """The parameter at ``path`` and its velocity, whole and in float64."""
        parameter = self.model.get_parameter(path)
        velocity = _find_momentum(self.state.get(parameter, {}), parameter.shape)
        position = _full(parameter)
        if velocity is None:
            if not parameter.requires_grad:
                return position, torch.zeros_like(position)
            raise ValueError(
                "charges need the momentum of every attention weight, and this optimizer holds none: take at least one "
                "step first, with an optimizer that keeps a momentum (plain SGD has momentum=0)"
            )
        return position, _full(velocity).view_as(position)

    def heads(self, projection: Projection, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(W | b + offset) of the heads and its velocity, both [heads, width, other side (+ 1)]."""
        weight, weight_velocity = (projection.heads(part) for part in self.position_and_velocity(projection.weight))
        if projection.bias_name is None or projection.side == "in":
            return weight, weight_velocity
        bias, bias_velocity = self.position_and_velocity(projection.bias_name)
        bias, bias_velocity = projection.head_biases(bias), projection.head_biases(bias_velocity)
        if offset is not None:
            bias = bias + offset.detach().double().to(bias.device).view_as(bias)
        return (
            torch.cat([weight, bias[..., None]], dim=-1),
            torch.cat([weight_velocity, bias_velocity[..., None]], dim=-1),
        )


def _relative_charge(terms: list[tuple[Tensor, Tensor]], rotary: Rotary | None = None) -> list[float]:
    """|J| over its largest possible size, for each head.

    Args:
        terms: pairs (velocity, position), each [heads, head_dim, columns]; X is the sum of velocity positionᵀ.
        rotary: positions that leave of the rotations those of their planes, and of coordinates they do not turn.
    """
    moments = [velocity @ position.mT for velocity, position in terms]
    moment = torch.stack(moments).sum(dim=0)
    charge = moment - moment.mT
    if rotary is not None:
        free = torch.zeros(charge.shape[-2:], dtype=torch.bool, device=charge.device)
        free[rotary.dim :, rotary.dim :] = True
        first, second = rotary.planes(charge.device).unbind(1)
        free[first, second] = free[second, first] = True
        charge = charge * free
    size = 2 * torch.stack(moments).flatten(2).norm(dim=-1).sum(dim=0)
    smallest = torch.finfo(size.dtype).tiny
    return (charge.flatten(1).norm(dim=-1) / size.clamp_min(smallest)).tolist()


def _layer_charges(motion: _Motion, layout: HeadLayout, query_mean: Tensor | None, value_mean: Tensor | None) -> dict:
    def by_kv_head(heads: Tensor) -> Tensor:
        """[heads, width, columns] -> [kv_heads, width, columns of all heads of the group]."""
        return heads.unflatten(0, (layout.num_kv_heads, -1)).transpose(1, 2).flatten(2)

    def terms(*projections: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [(by_kv_head(velocity), by_kv_head(position)) for position, velocity in projections]

    key, output = motion.heads(layout.key), motion.heads(layout.output)

    def qk(offset: Tensor | None) -> list[float]:
        return _relative_charge(terms(motion.heads(layout.query, offset), key), layout.rotary)

    def vo(offset: Tensor | None) -> list[float]:
        return _relative_charge(terms(motion.heads(layout.value, offset), output))

    sectors = {"qk": qk(None), "vo": vo(None)}
    if query_mean is not None and layout.query.bias:
        sectors["qk_affine"] = qk(query_mean)
    if value_mean is not None and layout.value.bias:
        sectors["vo_affine"] = vo(value_mean)
    return sectors


@torch.no_grad()
def charges(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[int, dict[str, list[float]]]:
    """Relative Noether charge of every head: 0 when it is conserved at zero, at most 1.

    The velocity of a weight is its momentum in the optimiser. For AdamW and SOAP, whose step is not their momentum,
    the number says how far the first moment is from one a rotation-invariant optimiser would have.

    Args:
        model: a model whose head layouts are known (wrappers of compile and DDP are seen through). With sharded
            parameters this is a collective: call it on every rank.
        optimizer: the optimiser that trains it, after at least one step, with a momentum.

    Returns:
        layer -> sector -> one number a key/value head. Sectors are "qk" and "vo" and, in a model that carries unlearned
        biases (`erlangen.breaking`) beside learned ones, "qk_affine" and "vo_affine": the charge of the symmetry that
        survives when only the mean of the unlearned biases is on. The size of J = X − Xᵀ is divided by twice the sum of
        the sizes of X's terms.

    Raises:
        TypeError: the model's layouts are unknown.
        ValueError: the optimiser holds no momentum for an attention weight.
    """
    model = unwrap(model)
    motion = _Motion(model, optimizer)
    unlearned = getattr(model, "symmetry_breaking", None)
    result = {}
    for layer, layout in enumerate(head_layouts(model)):
        query_mean = value_mean = None
        if unlearned is not None:
            query_mean, value_mean = unlearned.means(layer)
            if unlearned.is_late(layer):
                query_mean = None  # behind the positions it is no part of the learned bias
        result[layer] = _layer_charges(motion, layout, query_mean, value_mean)
    return result
