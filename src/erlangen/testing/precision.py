"""Low precision judged by an error ratio, not by a guessed tolerance.

The rule is that of FlashAttention's tests (``tests/test_flash_attn.py``): against a float64 reference, the candidate
may err at most ``ratio`` times as much as the plain implementation does in the same low precision. The rounding band is
that of attention-gym: where the plain implementation happens to be exact, the last bit of the result is still free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._text import fixed_width, worst

Tensors = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class PrecisionRow(NamedTuple):
    """One tensor: the error of the candidate, what it may be, and what both are measured against.

    ``reference_error`` is the error of the low-precision reference and ``scale`` is ``max |float64 reference|``.
    """

    tensor: str
    error: float
    budget: float
    reference_error: float
    scale: float

    @property
    def passed(self) -> bool:
        """Whether the error is within a finite budget; a NaN is not."""
        return self.error <= self.budget < float("inf")


@dataclass(frozen=True)
class PrecisionTable:
    """Errors against their budgets, one row a tensor; ``str()`` gives a table of fixed width."""

    rows: tuple[PrecisionRow, ...]

    @property
    def max_error(self) -> float:
        """The largest error, NaN if one is NaN."""
        return worst(row.error for row in self.rows)

    @property
    def passed(self) -> bool:
        """Whether each row passed."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        header = ("tensor", "error", "budget", "reference error", "scale", "")
        return fixed_width(header, ((*row, "" if row.passed else "FAILED") for row in self.rows))


def assert_low_precision(
    candidate: Tensors,
    low_precision_reference: Tensors,
    float64_reference: Tensors,
    *,
    ratio: float = 2.0,
    name: str = "",
) -> PrecisionTable:
    """Check ``max|c − r64| <= ratio · max|r_low − r64| + eps(dtype of c) · max|r64|`` for each tensor, all finite.

    Args:
        candidate: the fast path's result: a tensor, a sequence of tensors, or a mapping (values and gradients).
        low_precision_reference: the plain implementation's result in the same dtype, with the same structure.
        float64_reference: the plain implementation's result in float64.
        ratio: how many times the error of the plain implementation is allowed.
        name: what is tested, for the message.

    Returns:
        The table of errors and budgets.

    Raises:
        AssertionError: an error is above its budget, a value is not finite, or structure, shape or dtype differ.
        TypeError: an entry is not a floating tensor, or the float64 reference is not float64.
        ValueError: the candidate is the low-precision reference itself, which always passes.
    """
    __tracebackhide__ = True
    title = f"{name}: " if name else ""
    candidates, lows, references = _label(candidate), _label(low_precision_reference), _label(float64_reference)
    if not candidates.keys() == lows.keys() == references.keys():
        found = "; ".join(", ".join(tensors) or "none" for tensors in (candidates, lows, references))
        raise AssertionError(f"{title}candidate, low-precision and float64 reference hold different tensors: {found}")
    rows = []
    for label, value in candidates.items():
        low, reference = lows[label], references[label]
        if reference.dtype != torch.float64:
            raise TypeError(f"{title}{label}: the float64 reference is {reference.dtype}")
        if value.numel() and value.data_ptr() == low.data_ptr():
            raise ValueError(
                f"{title}{label}: the candidate is the low-precision reference itself, which always passes"
            )
        if not value.shape == low.shape == reference.shape:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (value, low, reference))
            raise AssertionError(f"{title}{label}: candidate and references differ in shape: {shapes}")
        if value.dtype != low.dtype:
            raise AssertionError(f"{title}{label}: candidate is {value.dtype}, its reference {low.dtype}")
        scale = _distance(torch.zeros_like(reference), reference)
        reference_error = _distance(low, reference)
        budget = ratio * reference_error + torch.finfo(value.dtype).eps * scale
        rows.append(PrecisionRow(label, _distance(value, reference), budget, reference_error, scale))
    table = PrecisionTable(tuple(rows))
    if not table.passed:
        raise AssertionError(
            f"{title}error above {ratio:g} x that of the low-precision reference plus rounding, or not finite\n{table}"
        )
    return table


def _label(tensors: Tensors) -> dict[str, Tensor]:
    if isinstance(tensors, Tensor):
        labelled = {"value": tensors}
    elif isinstance(tensors, Mapping):
        labelled = dict(tensors)
    else:
        labelled = {str(index): tensor for index, tensor in enumerate(tensors)}
    for label, tensor in labelled.items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{label}: a floating tensor is needed, not {kind}")
    return {label: tensor.detach() for label, tensor in labelled.items()}


def _distance(tensor: Tensor, reference: Tensor) -> float:
    # On the CPU, so that a reference may live on another device than the candidate.
    return (tensor.cpu().double() - reference.cpu()).abs().max().item() if tensor.numel() else 0.0
