"""The arms: one transformer, for the group of both strands, for the trivial group, and with dials in between.

Shape suffixes: B windows, N positions, C copies of the regular representation, G order of the group.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from erlangen.finite import PermutationGroup, reverse_complement
from erlangen.finite.attention import EquivariantBlock, InvariantPool
from erlangen.finite.linear import EquivariantEmbedding, EquivariantLinear, EquivariantNorm, GroupBasis
from erlangen.finite.partial import PartialLinear

from .._jobs import Tick
from .tasks import LENGTH, other_strand

ARMS = ("strict", "dial", "free", "augmentation", "post-hoc")
TRAINED = ARMS[:-1]
DIM, NUM_HEADS, HIDDEN, NUM_LAYERS = 32, 4, 64, 2
PENALTY = 1e-3
"""Weight of the sum of squared equivariance errors of the linear layers in the loss of the dials."""
DIAL_RATE = 10.0
"""Learning rate of the dials in that of the weights: they have a way of 0.5 to go."""


class PositionFeatures(nn.Module):
    """A learned vector for each position, N(0, 1), that moves with the group: t_c[σ_g⁻¹ i] is copy c at g."""

    def __init__(self, group: PermutationGroup, dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(dim // group.order, group.degree))
        self.group_basis = GroupBasis(group)
        moved_back_GN = torch.from_numpy(np.argsort(group.positions, axis=1).astype(np.int64))
        self.register_buffer("moved_back_NG", moved_back_GN.T.contiguous(), persistent=False)

    def forward(self) -> Tensor:
        """[N, dim], in the Fourier basis."""
        return self.group_basis.to_fourier(self.table[:, self.moved_back_NG].transpose(0, 1))


class Classifier(nn.Module):
    """A transformer from windows to logits that are invariant under the group: all the same for the trivial group."""

    def __init__(self, group: PermutationGroup) -> None:
        super().__init__()
        self.embedding = EquivariantEmbedding(group, DIM, num_letters=4)
        self.positions = PositionFeatures(group, DIM)
        self.blocks = nn.Sequential(
            *(EquivariantBlock(group, DIM, NUM_HEADS, position="none", hidden_dim=HIDDEN) for _ in range(NUM_LAYERS))
        )
        self.norm = EquivariantNorm(self.embedding.representation)
        self.pool = InvariantPool(group, DIM, 1, NUM_HEADS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Letters int64 [B, N] to the logit of label 1, [B]."""
        return self.pool(self.norm(self.blocks(self.embedding(tokens) + self.positions())))[:, 0]


def build(arm: str, length: int = LENGTH) -> Classifier:
    """A trained arm for windows of ``length`` letters, with fresh weights from torch's global generator.

    "dial" is "strict" with a `PartialLinear` for each `EquivariantLinear`. "free" and "augmentation" are the same for
    the trivial group, with ``nn.Linear`` for each, which is what an `EquivariantLinear` of that group is.
    """
    strict = arm in ("strict", "dial")
    model = Classifier(reverse_complement(length) if strict else PermutationGroup([range(length)]))
    if arm == "strict":
        return model
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, EquivariantLinear):
                other = PartialLinear(layer.group, layer.source, layer.target) if strict else _dense(layer)
                setattr(parent, name, other)
    return model


@torch.no_grad()
def _dense(layer: EquivariantLinear) -> nn.Linear:
    """An ordinary layer with the same weights."""
    dense = nn.Linear(layer.in_dim, layer.out_dim)
    dense.weight.copy_(layer.weight_matrix())
    dense.bias.zero_()
    return dense


def dial_layers(model: nn.Module) -> dict[str, PartialLinear]:
    """The layers with a dial, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PartialLinear)}


def dial_values(model: nn.Module) -> dict[str, dict[str, float]]:
    """Of each layer with a dial: ``gamma``, and ``share``, how much of ‖W(γ)‖² does not commute with the group."""
    found = {}
    for name, layer in dial_layers(model).items():
        energies = [float(row["energy"]) for row in layer.table()]
        found[name] = {"gamma": float(layer.gamma.detach()[0]), "share": sum(energies[1:]) / sum(energies)}
    return found


def train(
    arm: str,
    windows: tuple[Tensor, Tensor],
    *,
    seed: int,
    steps: int,
    batch_size: int,
    lr: float,
    penalty: float = PENALTY,
    tick: Tick | None = None,
) -> Classifier:
    """Train one arm in float32: Adam, 5 % warm-up, cosine schedule to zero, on the cross entropy.

    Args:
        arm: one of `TRAINED`.
        windows: int64 [B, N] and labels [B].
        seed: of initial weights, order and strands.
        steps, batch_size, lr: of Adam.
        penalty: of the arm "dial", see `PENALTY`.
        tick: called after each step.

    Raises:
        KeyboardInterrupt: ``tick`` said to stop before the last step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(arm, windows[0].shape[1])
    generator = torch.Generator().manual_seed(seed)
    layers = dial_layers(model).values()
    dials = {id(layer.dials) for layer in layers}
    groups = [
        {"params": [p for p in model.parameters() if (id(p) in dials) == is_dial], "rate": rate}
        for is_dial, rate in ((False, lr), (True, DIAL_RATE * lr))
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=lr, fused=True)
    tokens_BN, labels_B = windows
    warmup = max(1, steps // 20)
    for step in range(steps):
        rows = torch.randint(len(labels_B), (batch_size,), generator=generator)
        tokens = tokens_BN[rows]
        if arm == "augmentation":
            turned = torch.rand(batch_size, generator=generator) < 0.5
            tokens = torch.where(turned[:, None], other_strand(tokens), tokens)
        loss = F.binary_cross_entropy_with_logits(model(tokens), labels_B[rows])
        if layers:
            loss = loss + penalty * torch.stack([layer.equivariance_error() for layer in layers]).sum()
        for group in optimizer.param_groups:
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = group["rate"] * min(1.0, (step + 1) / warmup) * decay
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if tick is not None and tick(step + 1) and step + 1 < steps:
            raise KeyboardInterrupt
    return model.eval()


@torch.no_grad()
def score(model: nn.Module, windows: tuple[Tensor, Tensor], *, both: bool = False) -> dict[str, float]:
    """Measures of a model, or of its average over both strands, on windows whose second half are the other strands.

    Returns:
        ``error``, the share of wrong labels (a logit of zero is half a wrong one); ``log_loss``, in nats;
        ``invariance``, the mean of |logit(x) − logit(hx)|; ``flips``, the share of windows whose label depends on the
        strand.
    """
    tokens_BN, labels_B = windows
    logits_B = model(tokens_BN).double()
    first, second = logits_B.chunk(2)
    if both:
        first = second = (first + second) / 2
        logits_B = torch.cat([first, second])
    signed_B = logits_B * (2 * labels_B - 1)
    return {
        "error": float((0.5 - 0.5 * signed_B.sign()).mean()),
        "log_loss": float(F.softplus(-signed_B).mean()),
        "invariance": float((first - second).abs().mean()),
        "flips": float((first.sign() != second.sign()).double().mean()),
    }
