"""Items of a family, drawn from a seed."""

from collections.abc import Callable
from dataclasses import replace
from random import Random

from . import facts, pairs, patterns
from ._items import Item as Item

_DRAFTS: dict[str, Callable[[Random], list[Item]]] = {
    "numeric": patterns.numeric,
    "alphabetic": patterns.alphabetic,
    "near": facts.near,
    "far": facts.far,
    "inference": facts.inference,
    "copy": facts.copy,
    "negation": pairs.negation,
    "syntax": pairs.syntax,
}
FAMILIES = tuple(_DRAFTS)
"""Names of the families."""
PAIRS = ("negation", "syntax")
"""Those whose items are minimal pairs."""
_DRAFTS_AN_ITEM = 60  # tries until a family counts as exhausted


def check_families(families: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The families, each known and named once.

    Raises:
        ValueError: one is unknown or named twice, or there is none.
    """
    unknown = [family for family in families if family not in _DRAFTS]
    if unknown:
        raise ValueError(f"there is no family {unknown[0]!r}: choose among {', '.join(FAMILIES)}")
    if not families or len({*families}) != len(families):
        raise ValueError(f"name each family once, and one at least, received {', '.join(families) or 'none'}")
    return tuple(families)


def make_items(
    family: str, num_items: int = 500, *, seed: int = 0, fits: Callable[[Item], bool] | None = None
) -> tuple[list[Item], int]:
    """Distinct items of a family.

    Args:
        family: one of `FAMILIES`.
        num_items: at least so many; a block is never cut.
        seed: of the draws. The items are a function of it, of the family and of what fits.
        fits: items for which it is false are not asked, nor the others of their block. None: all fit.

    Returns:
        The items, and how many drafts did not fit.

    Raises:
        ValueError: the family is unknown, ``num_items`` is not positive, or too few distinct items fit.
    """
    check_families([family])
    if num_items < 1:
        raise ValueError(f"num_items is at least 1, received {num_items}")
    rng = Random(f"{family} {seed}")
    items: list[Item] = []
    seen: set[str] = set()
    blocks = too_long = 0
    for _ in range(_DRAFTS_AN_ITEM * (num_items + 20)):
        drafts = _DRAFTS[family](rng)
        prompts = {draft.prompt for draft in drafts}
        if not drafts or prompts & seen or len(prompts) < len(drafts):
            continue
        if fits is not None and not all(fits(draft) for draft in drafts):
            too_long += 1
            continue
        seen |= prompts
        items += [replace(draft, block=blocks) for draft in drafts]
        blocks += 1
        if len(items) >= num_items:
            return items, too_long
    raise ValueError(
        f"{len(items)} distinct items of the family {family!r} could be made, {num_items} were asked for"
        + (f" ({too_long} drafts were longer than the context)" if too_long else "")
        + ": ask for fewer items, leave the family out, or use a model with a longer context"
    )
