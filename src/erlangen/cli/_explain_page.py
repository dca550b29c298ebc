"""The page of ``erlangen explain``."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from erlangen import report
from erlangen.breaking.key_prior import KeyPrior, Steering, readable, top_tokens

from ._explain_figures import ClassRow, head_maps
from ._explain_figures import class_rows as drawn_classes

if TYPE_CHECKING:
    from .explain import Explanation

_LEVEL = 0.05
_LISTED = 12
_MAX_MAPS = 12
_MAX_CURVES = 6
_QUANTILES = (0.05, 0.25, 0.75, 0.95)
_LOG2 = math.log(2)


def _asked(prior: KeyPrior) -> list[int]:
    """Classes of what a token is and how frequent it is."""
    return [number for number, kind in enumerate(prior.classes.kinds) if kind != "position"]


def strongest(prior: KeyPrior) -> tuple[int, int]:
    """The head with the smallest p-value of a class against random directions; among equals, the largest effect."""
    asked = _asked(prior)
    p, size = prior.direction_p[..., asked].amin(-1), prior.effects[..., asked].abs().amax(-1)
    heads = [(float(p[cell]), -float(size[cell]), *cell) for cell in np.ndindex(*p.shape)]
    _, _, layer, head = min(heads)
    return int(layer), int(head)


def cells(result: "Explanation") -> dict[str, int | float]:
    """How many of all (layer, head, class) stand out, and how many would by chance."""
    prior, asked = result.prior, _asked(result.prior)
    direction, label = prior.direction_p[..., asked].numpy(), prior.label_p[..., asked].numpy()
    holm = np.array(report.holm(direction.ravel().tolist()))
    return {
        "cells": int(direction.size),
        "level": _LEVEL,
        "expected": _LEVEL * direction.size,
        "direction": int((direction < _LEVEL).sum()),
        "direction_holm": int((holm < _LEVEL).sum()),
        "label": int((label < _LEVEL).sum()),
        "both_holm": int((result.adjusted < _LEVEL).sum()),
    }


# --- steering ---------------------------------------------------------------------------------------------------------


def loss_change(steering: Steering, alpha: float) -> report.Interval:
    """Loss at a length of the direction less that at 1, over windows."""
    one = steering.alphas.index(1.0)
    change = steering.loss[steering.alphas.index(alpha)] - steering.loss[one]
    return report.paired_interval(change.numpy())


def class_loss_change(steering: Steering, alpha: float, name: str) -> report.Interval | None:
    """The same for the targets of a class; None where there are none."""
    which = steering.classes.names.index(name)
    changes = steering.class_loss_changes()[steering.alphas.index(alpha), :, which]
    return report.paired_interval(changes.numpy()) if bool(changes.isfinite().all()) else None


def _changes(steering: Steering, x_label: str, what: str) -> report.Figure:
    """Change of the loss without the direction, overall and by class of the target."""
    rows = [report.IntervalRow("all targets", *loss_change(steering, 0.0))]
    for name in steering.classes.names:
        found = class_loss_change(steering, 0.0, name)
        if found is not None:
            rows.append(report.IntervalRow(name, *found))
    return report.Figure(
        report.intervals(rows, x_label=x_label),
        f"Change of the loss when {what} is taken away (α = 0), by class of the token that is predicted: mean over "
        "windows and 95 % interval of paired differences. To the right: the direction was of use.",
        "A row of interval marks, one a class.",
    )


def _attention_curves(steering: Steering, what: str) -> report.Figure:
    one = steering.alphas.index(1.0)
    share = steering.attention.mean(1).numpy()
    ratio = np.log2(np.maximum(share, 1e-12) / np.maximum(share[one], 1e-12))
    order = np.argsort(-np.abs(ratio).max(0), kind="stable")[:_MAX_CURVES]
    series = [report.Series(steering.classes.names[c], steering.alphas, ratio[:, c]) for c in sorted(order.tolist())]
    return report.Figure(
        report.curves(series, x_label="α, length of the direction", y_label="log₂ of attention over that at α = 1"),
        f"Attention of {what} to keys of a class, the classes that move most.",
        "Curves over α that meet at zero where α is 1.",
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def class_rows(result: "Explanation") -> tuple[tuple[str, ...], list[tuple]]:
    """Headings, and a row a class."""
    prior = result.prior
    columns = (
        "Class of key", "Of the text, %", "Least factor", "Greatest factor", "Its head", "Beyond direction null",
        "Beyond both, Holm", "Attention, %", "Without b, %",
    )  # fmt: skip
    shares = 100 * prior.classes.counts.double() / prior.tokens.numel()
    factors, p, adjusted = prior.effects.exp().numpy(), prior.direction_p.numpy(), result.adjusted
    rows = []
    for number, name in enumerate(prior.classes.names):
        layer, head = np.unravel_index(int(np.abs(prior.effects[..., number].numpy()).argmax()), factors.shape[:2])
        position = prior.classes.kinds[number] == "position"
        rows.append((
            name, float(shares[number]), float(factors[..., number].min()), float(factors[..., number].max()),
            f"{layer}.{head}", int((p[..., number] < _LEVEL).sum()),
            None if position else int((adjusted[..., number] < _LEVEL).sum()),
            100 * float(prior.attention[..., number].mean()), 100 * float(prior.attention_without[..., number].mean()),
        ))  # fmt: skip
    return columns, rows


def token_lists(result: "Explanation", layer: int, head: int) -> dict[str, list[dict[str, Any]]]:
    """The tokens that a head favours most and least: mean factor over occurrences, and how many there are."""
    prior = result.prior
    values = prior.logits[layer, head, :, 1:].double() - prior.baseline[layer, head]
    lists = top_tokens(prior.tokens[:, 1:], values, min_count=result.min_count, number=_LISTED)
    return {
        side: [
            {
                "token": token,
                "text": readable(prior.classes.pieces.get(token, "")),
                "count": count,
                "factor": math.exp(mean),
            }
            for token, count, mean in rows
        ]
        for side, rows in zip(("highest", "lowest"), lists)
    }


def _token_table(result: "Explanation", layer: int, head: int) -> report.Table:
    lists = token_lists(result, layer, head)
    columns = ("Rank", "Favoured", "Count", "Factor", "Disfavoured", "Count ", "Factor ")
    rows = []
    for rank in range(max(len(rows) for rows in lists.values())):
        row: list[Any] = [str(rank + 1)]
        for side in ("highest", "lowest"):
            found = lists[side][rank] if rank < len(lists[side]) else None
            shown = None if found is None else f"`{found['text'].replace('`', 'ˋ') or found['token']}`"
            row += [shown, found and found["count"], found and found["factor"]]
        rows.append(tuple(row))
    return report.Table(
        columns, rows,
        f"Head {layer}.{head}: tokens by their mean factor on attention, over their occurrences in the text.",
        f"Tokens of fewer than {result.min_count} occurrences are left out. ␣ is a blank, ↵ a line end.",
        {"Factor": ".3g", "Factor ": ".3g"},
    )  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def summary(result: "Explanation") -> list[str]:
    """The answer in a few sentences."""
    prior, found = result.prior, cells(result)
    moved = prior.moved.numpy()
    layer, head = np.unravel_index(int(moved.argmax()), moved.shape)
    change = loss_change(result.steering, 0.0)
    sure = "" if change.low > 0 or change.high < 0 else ", which is not told from zero"
    return [
        f"`{result.name}` on {result.text}: the preferred directions of its heads move {100 * moved.mean():.3g} % of "
        f"attention on average, and {100 * moved.max():.3g} % in head {layer}.{head}.",
        f"Of {found['cells']:,} cells (layer, head, class of token), {found['direction']:,} have an effect that a "
        f"random direction has in less than 5 of 100 cases, where chance alone gives {found['expected']:.3g}; "
        f"{found['both_holm']:,} remain beyond both nulls after Holm's correction.",
        f"Without the directions of all heads the loss changes by {change:.3g} nats a token{sure}.",
    ]


def _maps(result: "Explanation") -> list[str | report.Figure | report.Table]:
    prior = result.prior
    asked = _asked(prior)
    order = [*asked, *(number for number in range(len(prior.classes.kinds)) if number not in asked)]
    shown = order[:_MAX_MAPS]
    effects = np.moveaxis(prior.effects.numpy(), -1, 0)[shown] / _LOG2
    marked = np.nan_to_num(np.moveaxis(result.adjusted, -1, 0)[shown], nan=1.0) < _LEVEL
    svg = head_maps(
        effects, [prior.classes.names[number] for number in shown], marked, label="log₂ of the factor on attention"
    )
    return [
        report.Figure(
            svg,
            "The factor that the direction of a head gives keys of a class, over that of all keys: 1 is twofold. Blue "
            "is favoured, orange disfavoured; a dot marks effects beyond both nulls after Holm's correction.",
            "A small map of layers by heads for every class.",
        )
    ]


def _moved(result: "Explanation") -> report.Table:
    prior = result.prior
    rows = []
    for layer in range(len(prior.moved)):
        moved, lengths = prior.moved[layer], prior.lengths[layer].mean(0)
        rows.append((
            str(layer), float(lengths[0]), float(lengths[1]), 100 * float(moved.mean()), 100 * float(moved.max()),
            int(moved.argmax()), float(prior.spread[layer].mean()), float(prior.spread_ratio[layer].mean()),
            int((prior.spread_p[layer] < _LEVEL).sum()),
        ))  # fmt: skip
    columns = (
        "Layer", "Learned", "Unlearned", "Moved, %", "At most, %", "In head", "Spread", "Over random",
        "Heads beyond",
    )  # fmt: skip
    return report.Table(
        columns, rows, "The directions of each layer, means over its heads, and the attention that they move.",
        "Learned, unlearned: length of the learned bias and of the mean of the unlearned one. Moved: total variation "
        "distance between attention with and without the direction, on the same residual stream. Spread: standard "
        "deviation of the logit over tokens, and that over the root mean square of random directions of the same "
        "length; beyond: heads with a spread that fewer than 5 of 100 of those reach.",
        dict.fromkeys(("Learned", "Unlearned", "Moved, %", "At most, %", "Spread", "Over random"), ".3g"),
    )  # fmt: skip


def _binned(values: np.ndarray, number: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Middles and means of stretches of a curve, without its first value; NaNs do not count."""
    stretches = [x for x in np.array_split(np.arange(1, len(values)), number) if x.size]
    stretches = [x[np.isfinite(values[x])] for x in stretches]
    stretches = [x for x in stretches if x.size]
    return np.array([x.mean() for x in stretches]), np.array([values[x].mean() for x in stretches])


def _position_figures(result: "Explanation") -> list[str | report.Figure | report.Table]:
    prior = result.prior
    layers = _spread(len(prior.moved), _MAX_CURVES)
    positions = prior.positions.numpy() / _LOG2
    curves = [report.Series(f"layer {n}", *_binned(positions[n].mean(0))) for n in layers]
    curves += [report.Series(f"head {n}.{h}", *_binned(positions[n, h])) for n, h in result.depth]
    first = "; ".join(f"{positions[n, h, 0]:.2g} in head {n}.{h}" for n, h in result.depth)
    found: list[str | report.Figure | report.Table] = [
        report.Figure(
            report.curves(
                curves, x_label="place of the key, from the second on", y_label="log₂ of the factor on attention"
            ),
            "The factor by the place of the key, means over windows and stretches of places, of all heads of a layer "
            f"and of heads in depth. The first place is left out: it is at {positions[..., 0].mean():.2g} on average "
            f"over all heads, and at {first}.",
            "Curves over the places of a window.",
        )
    ]
    if prior.distances is not None:
        distances = (prior.distances - prior.baseline[..., None]).numpy() / _LOG2
        curves = [report.Series(f"layer {n}", *_binned(distances[n].mean(0))) for n in layers]
        curves += [report.Series(f"head {n}.{h}", *_binned(distances[n, h])) for n, h in result.depth]
        found.append(report.Figure(
            report.curves(
                curves, x_label="tokens from the key to the query", y_label="log₂ of the factor on attention"
            ),
            "Rotary positions turn the direction: the factor by the distance from key to query, means over all pairs.",
            "Curves over distances.",
        ))  # fmt: skip
    return found


def _spread(number: int, at_most: int) -> list[int]:
    if number <= at_most:
        return list(range(number))
    return sorted({round(place) for place in np.linspace(0, number - 1, at_most)})


def _depth(result: "Explanation", layer: int, head: int, alone: Steering) -> report.Section:
    prior = result.prior
    centred = (prior.logits[layer, head].double() - prior.baseline[layer, head]) / _LOG2
    p = prior.direction_p[layer, head]
    null = _null_bands(prior, layer, head)
    rows = []
    for number, name in enumerate(prior.classes.names):
        values = centred[prior.classes.members[number]].numpy()
        rows.append(ClassRow(
            name, np.quantile(values, _QUANTILES).tolist(), float(values.mean()), float(null[number]) / _LOG2,
            float(p[number]) < _LEVEL,
        ))  # fmt: skip
    change = loss_change(alone, 0.0)
    return report.Section(f"Head {layer}.{head} in depth", [
        f"Its direction moves {100 * prior.moved[layer, head]:.3g} % of its attention; without it, in this head alone, "
        f"the loss changes by {change:.2g} nats a token.",
        report.Figure(
            drawn_classes(rows, x_label="log₂ of the factor on attention"),
            f"Head {layer}.{head}: logits of the tokens of a class (thin: 5 to 95 %, thick: the middle half, mark: "
            "mean). Coloured where the mean is beyond what 95 of 100 random directions give (grey), one class at a "
            "time.",
            "A row for every class, with a grey band around zero.",
        ),
        _token_table(result, layer, head),
        _attention_curves(alone, f"head {layer}.{head}, scaled alone,"),
    ])  # fmt: skip


def _null_bands(prior: KeyPrior, layer: int, head: int) -> np.ndarray:
    """[C]: what 95 of 100 random directions stay within."""
    # The quantile of a coordinate of a random direction, from that of Student's t.
    degrees = prior.head_dim - 1
    if degrees == 0:
        quantile = 1.0
    else:
        t = report.student_t_quantile(1 - _LEVEL / 2, degrees)
        quantile = t / math.sqrt(degrees + t * t) * math.sqrt(prior.head_dim)
    return quantile * prior.direction_deviation[layer, head].numpy()


def explain_page(result: "Explanation") -> str:
    """The HTML of an explanation."""
    prior, found = result.prior, cells(result)
    columns, rows = class_rows(result)
    note = [prior.classes.note] if prior.classes.note else []
    steering = result.steering
    alphas = [
        (f"{alpha:g}", float(steering.loss[number].mean()), loss_change(steering, alpha))
        for number, alpha in enumerate(steering.alphas)
    ]
    sections = [
        report.Section("By class", [
            "Every query of a head has its preferred direction `b` added: the learned query bias and the mean of the "
            "unlearned one. Key `j` gets the logit `s_j = scale · b · k_j` from it, whatever the query, which "
            "multiplies its share of attention by `exp(s_j − mean)`. Keys are those that attention sees on this text: "
            f"{prior.tokens.shape[0]:,} windows of {prior.tokens.shape[1]:,} tokens.",
            *note,
            report.Table(
                columns, rows, "What the directions do to keys of a class, over all heads.",
                "Factors are geometric means over the occurrences of a class, over that of all tokens but the first of "
                "each window; least and greatest of all heads. Its head: LAYER.HEAD of the largest effect, up or down. "
                "Beyond direction null: heads with p < 0.05, one at a time. Attention: the share that goes to the "
                "class, mean over heads and queries, with the directions and without, on the same residual stream.",
                {column: ".3g" for column in columns if "factor" in column or "%" in column},
            ),
            *_maps(result),
        ]),
        report.Section("What chance gives", [
            "Two nulls. A random direction of the same length, in the same head, against the same keys: does `b` "
            "point at a class more than any direction would? And labels permuted between windows, each staying at its "
            "place: do tokens of a class have other logits than tokens that stand where they stand? The second is "
            "weak where a class has few different tokens, as any function of the token then tells it apart.",
            report.Table(
                ("Null", "Cells with p < 0.05", "Expected by chance", "After Holm"),
                [
                    ("random directions", found["direction"], found["expected"], found["direction_holm"]),
                    ("permuted labels", found["label"], found["expected"], None),
                    ("both", None, None, found["both_holm"]),
                ],
                f"Of {found['cells']:,} cells (layer, head, class of token or frequency).",
                "p-values of random directions are exact, those of labels a normal approximation with exact moments. "
                "Cells share keys and directions and are not independent: Holm's correction holds all the same, the "
                "expected number is a mean.",
                {"Expected by chance": ".3g"},
            ),
            _moved(result),
        ]),
        report.Section("What the directions cause", [
            "The directions of all heads, learned and unlearned, made α times as long, with everything that follows "
            "from it in later layers.",
            report.Table(
                ("α", "Loss", "Against α = 1"), alphas, "Loss in nats a token, and paired differences over windows.",
                "95 % intervals.", {"Loss": ".4f", "Against α = 1": ".4f"},
            ),
            _changes(steering, "change of the loss, nats a token", "the direction of all heads"),
            _attention_curves(steering, "all heads"),
        ]),
        report.Section("Positions", _position_figures(result)),
        *(_depth(result, layer, head, alone) for (layer, head), alone in zip(result.depth, result.depth_steering)),
    ]  # fmt: skip
    return report.page(f"Preferred directions of {result.name}", summary(result), sections)
