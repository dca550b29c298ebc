"""Does ``f(g·x) = g·f(x)`` hold? Measured in float64, where a broken symmetry cannot hide in the rounding.

The design follows e3nn's public tester (``e3nn/util/test.py``): the group acts in float64 and the answer is a table of
errors. Ours also refuses a test that any constant, or the identity map, would pass.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ._text import fixed_width, worst

_LABEL_WIDTH = 40


class ErrorRow(NamedTuple):
    """The error of one group element: ``max |f(g·x) − g·f(x)|``, and the same over ``max(|f(x)|, |g·f(x)|)``."""

    element: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class ErrorTable:
    """The errors of a module, one row a group element; ``str()`` gives a table of fixed width."""

    rows: tuple[ErrorRow, ...]

    @property
    def max_absolute(self) -> float:
        """The largest absolute error, NaN if one is NaN."""
        return worst(row.absolute for row in self.rows)

    @property
    def max_relative(self) -> float:
        """The largest relative error, NaN if one is NaN."""
        return worst(row.relative for row in self.rows)

    def __str__(self) -> str:
        total = ErrorRow("max", self.max_absolute, self.max_relative)
        return fixed_width(("element", "absolute", "relative"), (*self.rows, total))


def assert_equivariant(
    module: Callable[..., Any],
    group: Any,
    inputs: Tensor | Sequence[Any],
    *,
    act_in: Callable[..., Any] | None = None,
    act_out: Callable[[Any, Any], Any] | None = None,
    elements: Iterable[Any] | None = None,
    num_elements: int = 8,
    tolerance: float = 1e-10,
    allow_trivial: bool = False,
    generator: torch.Generator | None = None,
) -> ErrorTable:
    """Check in float64 that ``module(act_in(g, x))`` is ``act_out(g, module(x))`` for elements ``g`` of a group.

    Args:
        module: any callable. An ``nn.Module`` is copied; the copy is put in float64 and in eval mode.
        group: a finite group (``group.elements``; all of them when there are at most ``num_elements``, else a sample)
            or a matrix Lie group (``group.random(num_elements, generator=, dtype=)`` of shape [num_elements, m, m]).
            It may be None when ``elements`` is given.
        inputs: a tensor, or a sequence of the arguments of ``module``; floating ones are converted to float64.
        act_in: ``act_in(element, *inputs)`` gives the moved inputs. Default: ``module.act_in``.
        act_out: ``act_out(element, output)`` gives the moved output. Default: ``module.act_out``.
        elements: the group elements to use, instead of those of ``group``.
        num_elements: how many elements to sample.
        tolerance: the largest relative error that passes. The scale of each output tensor is ``max(|f(x)|, |g·f(x)|)``.
        allow_trivial: accept a test that proves nothing: no element moves the inputs, an output does not depend on
            them (a layer initialised at zero), or the module returns its inputs (a residual block initialised at zero).
        generator: source of the sample. Default: a new one with seed 0; the global one is never used.

    Returns:
        The table of errors, one row an element.

    Raises:
        AssertionError: an error is above ``tolerance`` or not finite, shapes differ, or the test proves nothing.
        TypeError: an action, the elements or an output is missing or of a kind we cannot use.
    """
    __tracebackhide__ = True
    function = _float64_copy(module)
    act_in = _action(module, function, act_in, "act_in")
    act_out = _action(module, function, act_out, "act_out")
    inputs = tuple(_float64(value) for value in ((inputs,) if isinstance(inputs, Tensor) else inputs))
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    chosen = _choose(group, elements, num_elements, generator, inputs)

    output = _call(function, inputs)
    before = _tensors(output, "the module's output")
    rows, inputs_move, outputs_move = [], False, [False] * len(before)
    for index, element in enumerate(chosen):
        moved_inputs = act_in(element, *inputs)
        moved_inputs = (moved_inputs,) if isinstance(moved_inputs, Tensor) else tuple(moved_inputs)
        if len(moved_inputs) != len(inputs):
            raise TypeError(f"act_in must return as many inputs as it is given: {len(inputs)}, not {len(moved_inputs)}")
        inputs_move |= any(_moved(old, new) for old, new in zip(inputs, moved_inputs) if isinstance(old, Tensor))
        actual = _tensors(_call(function, moved_inputs), "the module's output on moved inputs")
        expected = _tensors(act_out(element, output), "the result of act_out")
        outputs_move = [moves or _moved(old, new) for moves, old, new in zip(outputs_move, before, expected)]
        label = f"g[{index}]" if isinstance(element, Tensor) else f"g[{index}] {_brief(element)}"
        rows.append(_compare(label, before, actual, expected))

    table = ErrorTable(tuple(rows))
    # The comparison is written so that a NaN fails. An infinite value has an error of NaN or infinity.
    if not table.max_relative <= tolerance:
        low = {tensor.dtype for tensor in before if tensor.is_floating_point()} - {torch.float64}
        hint = f"\nThe output is {low.pop()} although the inputs are float64: the module rounds inside." if low else ""
        raise AssertionError(f"not equivariant: relative error above {tolerance:.0e}, or not finite\n{table}{hint}")
    if not allow_trivial:
        reason = _why_trivial(function, inputs, before, inputs_move, outputs_move, generator)
        if reason:
            raise AssertionError(
                f"this test of equivariance proves nothing: {reason}. Give generic inputs and weights, or pass "
                f"allow_trivial=True if this is what you want to see\n{table}"
            )
    return table


def assert_invariant(
    module: Callable[..., Any],
    group: Any,
    inputs: Tensor | Sequence[Any],
    *,
    act_in: Callable[..., Any] | None = None,
    elements: Iterable[Any] | None = None,
    num_elements: int = 8,
    tolerance: float = 1e-10,
    allow_trivial: bool = False,
    generator: torch.Generator | None = None,
) -> ErrorTable:
    """Check in float64 that ``module(act_in(g, x))`` is ``module(x)``; as :func:`assert_equivariant` otherwise."""
    __tracebackhide__ = True
    return assert_equivariant(
        module,
        group,
        inputs,
        act_in=act_in,
        act_out=lambda element, output: output,
        elements=elements,
        num_elements=num_elements,
        tolerance=tolerance,
        allow_trivial=allow_trivial,
        generator=generator,
    )


def _float64_copy(module: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(module, nn.Module):
        return module
    module = copy.deepcopy(module).double().eval()
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_complex():  # Module.double() leaves these at complex64
            tensor.data = tensor.data.to(torch.complex128)
    return module


def _float64(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    if value.is_complex():
        return value.to(torch.complex128)
    return value.double() if value.is_floating_point() else value


def _action(original: Any, function: Any, action: Callable[..., Any] | None, name: str) -> Callable[..., Any]:
    if action is None:
        action = getattr(function, name, None)
        if action is None:
            raise TypeError(f"{type(original).__name__} has no method {name}(element, ...): pass {name}=")
    elif isinstance(original, nn.Module) and getattr(action, "__self__", None) is original:
        action = getattr(function, action.__name__)  # a method given by hand must act in float64 as well
    return cast(Callable[..., Any], action)


def _choose(
    group: Any, elements: Any, num_elements: int, generator: torch.Generator, inputs: Sequence[Any]
) -> list[Any]:
    if num_elements < 1:
        raise ValueError(f"num_elements must be at least 1, not {num_elements}")
    if elements is not None:
        chosen = list(elements)
    elif hasattr(group, "elements"):
        everything = group.elements
        if len(everything) <= num_elements:
            chosen = list(everything)
        else:
            sample = torch.randperm(len(everything), generator=generator, device=generator.device)[:num_elements]
            chosen = [everything[index] for index in sorted(sample.tolist())]
    elif hasattr(group, "random"):
        device = next((value.device for value in inputs if isinstance(value, Tensor)), None)
        chosen = list(group.random(num_elements, generator=generator, dtype=torch.float64).to(device))
    else:
        raise TypeError(f"group must have .elements or .random(...), or elements= be given; received {group!r}")
    if not chosen:
        raise ValueError("there is no group element to test with")
    return chosen


def _call(function: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    # On clones: a function that works in place must not change what the next element is applied to.
    return function(*(value.clone() if isinstance(value, Tensor) else value for value in inputs))


def _tensors(output: Any, what: str) -> list[Tensor]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [part.detach() for part in parts if isinstance(part, Tensor)]
    if not tensors or any(not isinstance(part, Tensor) and part is not None for part in parts):
        raise TypeError(f"{what} must be a tensor or a tuple of tensors (None is skipped), not {_brief(output)}")
    return tensors


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _largest(tensor: Tensor) -> float:
    return _wide(tensor).abs().max().item() if tensor.numel() else 0.0


def _moved(old: Tensor, new: Any) -> bool:
    return not isinstance(new, Tensor) or old.shape != new.shape or not torch.equal(old, new)


def _compare(label: str, before: list[Tensor], actual: list[Tensor], expected: list[Tensor]) -> ErrorRow:
    __tracebackhide__ = True
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (actual, expected)]
    if shapes[0] != shapes[1] or len(before) != len(expected):
        raise AssertionError(f"not equivariant at {label}: f(g·x) has shapes {shapes[0]} and g·f(x) has {shapes[1]}")
    absolute, relative = [], []
    for old, left, right in zip(before, actual, expected):
        error = _largest(_wide(left) - _wide(right))
        scale = worst((_largest(old), _largest(right)))
        absolute.append(error)
        relative.append(error / scale if scale else (0.0 if error == 0 else float("inf")))
    return ErrorRow(label, worst(absolute), worst(relative))


def _why_trivial(
    function: Callable[..., Any],
    inputs: Sequence[Any],
    outputs: list[Tensor],
    inputs_move: bool,
    outputs_move: list[bool],
    generator: torch.Generator,
) -> str:
    if not inputs_move:
        return "no group element moves the inputs"
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    if all(any(not _moved(value, output) for value in tensors) for output in outputs):
        return "the module returns its inputs unchanged"
    for index, (output, moves) in enumerate(zip(outputs, outputs_move)):
        name = "the output" if len(outputs) == 1 else f"output {index}"
        if not output.count_nonzero():
            return f"{name} is zero"
        # Equivariance holds here, so an output that g moves depends on the input. One that no g moves may be constant.
        if not moves and _is_constant(function, inputs, output, index, generator):
            return f"{name} does not depend on the inputs"
    return ""


def _is_constant(
    function: Callable[..., Any], inputs: Sequence[Any], output: Tensor, index: int, generator: torch.Generator
) -> bool:
    """Whether moving the inputs by their own size moves the output by less than its rounding, to first order.

    Without a gradient (an integer among the inputs, a function with no derivative) we only see whether all entries of
    the output are equal.
    """
    all_equal = output.numel() > 1 and bool((output == output.flatten()[0]).all())
    with torch.enable_grad():
        leaves = [
            value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for value in inputs
        ]
        floating = [value for value in leaves if isinstance(value, Tensor) and value.requires_grad]
        result = function(*(value.clone() if isinstance(value, Tensor) else value for value in leaves))
        parts = result if isinstance(result, (tuple, list)) else (result,)
        target = [part for part in parts if isinstance(part, Tensor)][index]
        only_floating = len(floating) == sum(isinstance(value, Tensor) for value in inputs)
        if not only_floating or not target.is_floating_point() or not target.requires_grad:
            return all_equal
        # A random direction, as the sum of the entries may be constant when the entries are not (a softmax).
        direction = torch.randn(target.shape, generator=generator, dtype=torch.float64, device=generator.device)
        try:
            gradients = torch.autograd.grad(target, floating, direction.to(target), allow_unused=True)
        except RuntimeError:  # no backward formula
            return all_equal
    change = worst(
        0.0 if gradient is None else _largest(gradient) * _largest(value)
        for gradient, value in zip(gradients, floating)
    )
    return change <= torch.finfo(torch.float64).eps * _largest(output)


def _brief(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= _LABEL_WIDTH else text[: _LABEL_WIDTH - 3] + "..."
