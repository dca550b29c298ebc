"""A layer made for windows of a fixed length, applied along a longer sequence.

The group of the layer then acts inside each window: the symmetry is local.

Shape suffixes: B batch, M positions of the sequence, W windows, K positions of a window (length), D features in,
E features out.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .groups import PermutationGroup
from .partial import unit_interval

Mode = Literal["overlap-add", "gather"]


class Windows(nn.Module):
    """Apply ``module`` to windows of a sequence, and put the results back where the windows were.

    Each position receives the mean of what its windows give for it. A window has a gate g in [0, 1]: it gives
    ``g module(window) + (1 - g) window``, so that 0 leaves the window alone. Where there is no gate, it is 1. A module
    that returns its input therefore returns the sequence, whatever the gates and overlaps.

    ``"overlap-add"`` puts windows at 0, stride, 2 stride ... as far as they fit, and one more that ends at the end of
    the sequence where these leave positions over. So every position is in a window, no window is padded, and the last
    two may overlap by more than the others. (A symmetry that turns the *whole* sequence around maps windows to
    windows only if the stride divides M - length.) ``"gather"`` takes the starts from the caller; windows may overlap
    and leave positions out, which then keep what they are.

    All windows go through the module as one batch, [B W, length, D], so a window costs memory as often as it overlaps.

    Args:
        module: maps [batch, length, D] to [batch, length, E].
        length: positions of a window, the degree of the groups in ``module``.
        stride: from a window to the next, 1 to length; with ``"overlap-add"`` only, where it is length unless given.
        mode: ``"overlap-add"`` or ``"gather"``.
        num_gates: learn a gate for each of so many windows, which start at 1: the sequences must then have that many.
            Gates stay in [0, 1] as the dials of `PartialLinear` do. None: no gates but those given to ``forward``.

    Raises:
        ValueError: a length or stride out of range, or a group in ``module`` with another degree than length.
    """

    def __init__(
        self,
        module: nn.Module,
        length: int,
        stride: int | None = None,
        mode: Mode = "overlap-add",
        *,
        num_gates: int | None = None,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"mode must be one of {', '.join(get_args(Mode))}, received {mode!r}")
        if length < 1:
            raise ValueError(f"length must be at least 1, received {length}")
        if mode == "gather" and stride is not None:
            raise ValueError(f'a stride belongs to mode="overlap-add", received stride={stride} with mode="gather"')
        stride = length if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(
                f"stride must be from 1 to length = {length}, so that each position is in a window, received {stride}; "
                'for windows with gaps use mode="gather"'
            )
        if num_gates is not None and num_gates < 1:
            raise ValueError(f"num_gates must be at least 1, or None for no learned gates, received {num_gates}")
        for name, part in module.named_modules():
            for value in vars(part).values():
                group = getattr(value, "group", value)  # of a Representation, or the value itself
                if isinstance(group, PermutationGroup) and group.degree != length:
                    where = f"module.{name}" if name else "module"
                    raise ValueError(
                        f"the groups of the module must move length = {length} positions, "
                        f"received {where} of {group}, which moves {group.degree}: change length or the group"
                    )
        self.module, self.length, self.stride, self.mode = module, length, stride, mode
        self.dials = None if num_gates is None else nn.Parameter(torch.ones(num_gates))

    def extra_repr(self) -> str:
        stride = f", stride={self.stride}" if self.mode == "overlap-add" else ""
        gates = "" if self.dials is None else f", num_gates={len(self.dials)}"
        return f"length={self.length}{stride}, mode={self.mode!r}{gates}"

    @property
    def gates(self) -> Tensor | None:
        """The learned gates [W], or None."""
        return None if self.dials is None else unit_interval(self.dials)

    def starts(self, num_positions: int, device: torch.device | str | None = None) -> Tensor:
        """Where the windows of ``"overlap-add"`` start along so many positions: int64 [W], increasing.

        Raises:
            ValueError: the sequence is shorter than a window, or mode is ``"gather"``.
        """
        if self.mode == "gather":
            raise ValueError('the starts of mode="gather" are the caller\'s: give them to forward')
        self._expect_room(num_positions)
        last = num_positions - self.length
        starts = torch.arange(0, last + 1, self.stride, device=device)
        if last % self.stride:
            starts = torch.cat([starts, starts.new_full((1,), last)])
        return starts

    def unfold(self, x: Tensor, starts: Tensor) -> Tensor:
        """The windows of x [B, M, D] at int64 starts [W] or [B, W]: [B, W, length, D]."""
        if starts.dim() == 1:
            return x[:, starts[:, None] + torch.arange(self.length, device=x.device)]
        return x.flatten(0, 1)[self._rows(x, starts)]

    def forward(self, x: Tensor, starts: Tensor | None = None, gates: Tensor | None = None) -> Tensor:
        """The sequence after the layer.

        Args:
            x: [B, M, D].
            starts: with ``"gather"``, integers [W], or [B, W] for other windows in each sequence.
            gates: [W] or [B, W] in [0, 1], in place of the learned ones.

        Returns:
            [B, M, E]. With gates, or with ``"gather"``, E must be D.

        Raises:
            ValueError: shapes do not fit, a window is longer than the sequence or reaches beyond it, gates are outside
                [0, 1], or the module changes the number of positions.
        """
        if x.dim() != 3:
            raise ValueError(f"x must have shape [B, M, D], received {list(x.shape)}")
        num_sequences, num_positions, _ = x.shape
        self._expect_room(num_positions)
        if (starts is None) == (self.mode == "gather"):
            wanted = "needs starts" if self.mode == "gather" else "places the windows itself"
            raise ValueError(f"mode={self.mode!r} {wanted}, received {'no' if starts is None else 'some'} starts")
        if starts is None:
            starts = self.starts(num_positions, x.device)
        else:
            starts = self._checked_starts(starts, x)
        num_windows = starts.shape[-1]
        if num_windows == 0:
            return x
        gates = self._checked_gates(gates, num_sequences, num_windows)

        windows_BWKD = self.unfold(x, starts)
        given = self.module(windows_BWKD.flatten(0, 1))
        if (
            not isinstance(given, Tensor)
            or given.dim() != 3
            or given.shape[:2]
            != (
                num_sequences * num_windows,
                self.length,
            )
        ):
            received = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ValueError(
                f"the module must map [batch, length, D] = {list(windows_BWKD.flatten(0, 1).shape)} to "
                f"[batch, length, E], received {received} from it"
            )
        given_BWKE = given.unflatten(0, (num_sequences, num_windows))
        blends = gates is not None or self.mode == "gather"
        if blends and given_BWKE.shape[-1] != x.shape[-1]:
            raise ValueError(
                f"with gates, or mode='gather', the module must keep the number of features, as others pass by it; "
                f"received {given_BWKE.shape[-1]} for {x.shape[-1]}"
            )
        if gates is not None:
            # On the difference, so that a module that returns its input returns the sequence without rounding.
            given_BWKE = windows_BWKD + gates[..., None, None].to(x.dtype) * (given_BWKE - windows_BWKD)

        rows = self._rows(x, starts).flatten()
        given = given_BWKE.flatten(0, 2)
        sum_dtype = torch.promote_types(given.dtype, torch.float32)  # a position may be in hundreds of windows
        count = torch.zeros(num_sequences * num_positions, 1, device=x.device, dtype=sum_dtype)
        count = count.index_add(0, rows, count.new_ones(len(rows), 1))
        total = torch.zeros(num_sequences * num_positions, given.shape[-1], device=x.device, dtype=sum_dtype)
        mean = (total.index_add(0, rows, given.to(sum_dtype)) / count.clamp(min=1)).to(given.dtype)
        if self.mode == "gather":
            mean = torch.where(count > 0, mean, x.flatten(0, 1))
        return mean.unflatten(0, (num_sequences, num_positions))

    def _rows(self, x: Tensor, starts: Tensor) -> Tensor:
        """Row of ``x.flatten(0, 1)`` for each position of each window: int64 [B, W, length]."""
        firsts = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        return (firsts + starts)[..., None] + torch.arange(self.length, device=x.device)

    def _expect_room(self, num_positions: int) -> None:
        if num_positions < self.length:
            raise ValueError(
                f"a window must not be longer than the sequence: received length = {self.length} and {num_positions} "
                "positions; take a shorter window or leave such sequences out"
            )

    def _checked_starts(self, starts: Tensor, x: Tensor) -> Tensor:
        starts = torch.as_tensor(starts, device=x.device)
        if starts.is_floating_point() or starts.is_complex() or starts.dtype == torch.bool:
            raise ValueError(f"starts must be integers, received {starts.dtype}")
        if starts.dim() not in (1, 2) or (starts.dim() == 2 and starts.shape[0] != x.shape[0]):
            raise ValueError(
                f"starts must have shape [W] or [B, W] with B = {x.shape[0]}, received {list(starts.shape)}"
            )
        last = x.shape[1] - self.length
        outside = (starts < 0) | (starts > last)
        if bool(outside.any()):
            raise ValueError(
                f"starts must be from 0 to M - length = {last}, so that the windows are inside the sequence; "
                f"received {int(starts[outside][0])}"
            )
        return starts.long()

    def _checked_gates(self, gates: Tensor | None, num_sequences: int, num_windows: int) -> Tensor | None:
        if gates is None:
            if self.dials is None:
                return None
            if len(self.dials) != num_windows:
                raise ValueError(
                    f"there must be as many windows as learned gates: received {num_windows} windows and "
                    f"num_gates = {len(self.dials)}"
                )
            return unit_interval(self.dials)
        if tuple(gates.shape) not in ((num_windows,), (num_sequences, num_windows)):
            raise ValueError(
                f"gates must have shape [W] = [{num_windows}] or [B, W] = [{num_sequences}, {num_windows}], "
                f"received {list(gates.shape)}"
            )
        if not bool(((gates >= 0) & (gates <= 1)).all()):
            raise ValueError(f"gates must be from 0 to 1, received values from {gates.min():.4g} to {gates.max():.4g}")
        return gates
