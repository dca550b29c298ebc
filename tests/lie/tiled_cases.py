"""Problems of attention between poses, with every gradient, for the tests of its tiles."""

import torch

from erlangen.lie import SE2, SE3, SO2, SO3, Product, Translation
from erlangen.lie.attention import lie_attention

FAST = [SO2, SE2, SO3, SE3, Translation(3), Product(SE2, SO3), Product(SE3, Translation(1))]
H, D, E = 3, 4, 5


def poses(group, *batch, generator, wide):
    """Poses all over a compact group and metres apart; or, without ``wide``, whose relative poses are in the chart."""
    if not wide:
        xi = 0.3 * torch.randn(*batch, group.dim, generator=generator, dtype=torch.float64)
        return group.exp(xi.clamp(-0.6, 0.6))
    return group.random(*batch, generator=generator, dtype=torch.float64)


def problem(group, generator, *, num_queries=10, num_keys=None, batch=2, heads=(1, 1), displaced=False, content=False):
    """Arguments of lie_attention; without num_keys the queries are the keys."""
    wide = group in FAST
    H1, H2 = heads
    query = poses(group, batch, *([H] if H1 > 1 else []), num_queries, generator=generator, wide=wide)
    out = {"query": query}
    if num_keys is not None:
        out["key"] = poses(group, batch, *([H] if H2 > 1 else []), num_keys, generator=generator, wide=wide)
    num_keys = num_keys or num_queries

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out["value"] = normal(batch, H, num_keys, D)
    out["block_weights"] = 0.3 + normal(H, len(group.blocks)).abs()
    out["temperature"] = 0.5 + normal(H).abs()
    if displaced:
        out["displacement"] = poses(group, H, generator=generator, wide=False)
    if content:
        out["content_query"], out["content_key"] = normal(batch, H, num_queries, E), normal(batch, H, num_keys, E)
    return out


def attend(impl, group, tensors, compiled=False, **options):
    """Output and the gradient of every tensor."""
    function = torch.compile(lie_attention, backend="eager", fullgraph=True) if compiled else lie_attention
    tensors = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    arguments = dict(tensors)
    arguments.setdefault("key", arguments["query"])
    out = function(**arguments, group=group, impl=impl, **options)
    probe = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(probe + 0.3 * out.detach())
    return {"output": out.detach()} | {name: tensor.grad for name, tensor in tensors.items()}
