"""The page of ``erlangen channels``: windows of sequences or motifs, or attention maps."""

import math
import re

import numpy as np

from erlangen import report

from ._channels_config import ChannelsConfig
from ._channels_maps import Maps
from ._channels_windows import Windows

NUM_BEST = 20
NUM_CHANNELS = 8  # in a heat map, as many as can be read on a phone
_FEW_SEQUENCES = 6
_BINS = 60


def percent(share: float) -> str:
    """A share in per cent, with three digits at most, and 0 or 100 for what rounds to them."""
    value = 100 * share
    return f"{value:.0f}" if value < 0.005 or value >= 99.95 else f"{value:.2f}" if value < 9.995 else f"{value:.1f}"


def summary(config: ChannelsConfig, result: Windows | Maps) -> list[str]:
    """The answer in a few sentences."""
    return _maps_summary(config, result) if isinstance(result, Maps) else _windows_summary(config, result)


# --- sequences and motifs -------------------------------------------------------------------------------------------


def _windows_summary(config: ChannelsConfig, result: Windows) -> list[str]:
    num_windows, found = len(result.energy), int((result.q <= config.fdr).sum())
    whole = result.kind == "motifs" and result.group is None
    window = "each as a whole" if whole else f"in {_number(num_windows, 'windows')} of {result.length[0]} positions"
    group = f"`{result.group_text}`" + (f", of order {result.group.order}" if result.group else "")
    lines = [f"{_number(len(result.names), result.kind)} of `{config.file.name}`, {window}, under {group}."]
    if result.stopped:
        lines.append(f"It was stopped after {num_windows + result.skipped:,} of {result.total:,} windows.")
    left_out = []
    if result.skipped:
        why = "with unknown letters" if result.kind == "sequences" else "without preference for any letter"
        left_out.append(f"{_number(result.skipped, 'windows')} {why}")
    if result.too_short:
        left_out.append(f"{_number(result.too_short, result.kind)} shorter than a window")
    if left_out:
        lines.append(f"Left out: {'; '.join(left_out)}.")
    expected = float(result.null_values @ result.null_probabilities)
    (best,) = result.best(1)
    things = result.kind if whole else "windows"
    lines.append(
        f"Found at a false-discovery rate of {100 * config.fdr:g} %: {found:,} of {num_windows:,} {things}. The best "
        f"is `{_short(result.names[result.source[best]], 40)}` from {result.start[best]}, energy "
        f"{result.energy[best]:.3f}, p = {result.p[best]:.2g}, q = {result.q[best]:.2g}."
    )
    chance = "independent letters of the same frequencies" if result.kind == "sequences" else "random columns"
    lines.append(f"Mean energy in the trivial channel: {result.energy.mean():.4f}; {chance} have {expected:.4f}.")
    return lines


def windows_page(config: ChannelsConfig, result: Windows) -> str:
    """The HTML for windows of sequences or motifs."""
    sequences = result.kind == "sequences"
    whole = not sequences and result.group is None
    thing = "motif" if whole else "window"
    null = "independent letters" if sequences else "random columns"
    how = (
        "The null distribution is exact."
        if result.null_samples is None
        else f"The null distribution was drawn from {result.null_samples:,} windows{'' if sequences else ' a length'}."
    )
    what = (
        "How much energy a window has in the trivial channel: the share that the group leaves as it is. It is 1 for a "
        "window that every element of the group maps to itself."
        if sequences
        else "How much energy the letter frequencies, less 1/4, have in the trivial channel: the share that the group "
        "leaves as it is. It is 1 for a motif that every element of the group maps to itself."
    )
    sections = [
        report.Section("Energy against chance", [
            what,
            report.Figure(
                _histogram(result, null),
                f"Share of {thing}s by their energy, and what {null} would have. {how}",
                f"Two curves, of the {thing}s measured and of {null}, against the energy.",
            ),
            *([_frequencies(result)] if sequences else []),
        ]),
    ]  # fmt: skip
    along = _along(config, result) if sequences else None
    if along:
        sections.append(report.Section("Energy along the sequences", [along]))
    sections.append(report.Section(f"The best {thing}s", [_best(config, result, thing)]))
    if result.channels:
        sections.append(report.Section("Every channel", [_channels(result)]))
    if result.strand is not None:
        sections.append(report.Section("The other strand", [_strand(result)]))
    law = (
        "The null hypothesis is that all letters are independent, with the frequencies of the file."
        if sequences
        else "The null hypothesis is that the columns of a motif are drawn from all columns of the file."
    )
    dependent = result.group is not None and config.stride < result.group.degree
    rates = (
        "Benjamini and Yekutieli's, as windows that overlap depend on each other"
        if dependent
        else "Benjamini and Hochberg's"
    )
    num_rows = len(result.rows())
    every = f"every {thing}" if num_rows == len(result.energy) else f"the {num_rows:,} most significant {thing}s"
    sections.append(report.Section("How it was tested", [
        f"{law} To refuse it says: more symmetric than that. It does not say why: repeats and low complexity are "
        "symmetric in many ways. `p` is the probability of so much energy, or more. `q` is the least false-discovery "
        f"rate at which the {thing} is called found, {rates}.",
        f"`channels.csv` has {every}, `channels.json` the summary and the distributions. Places count from 0, "
        "and `end` is the first place after.",
    ]))  # fmt: skip
    return report.page(f"Channels of {config.file.name}", _windows_summary(config, result), sections)


def _histogram(result: Windows, null: str) -> str:
    """Shares by energy, on the values that occur if they are few, else in bins."""
    likely = result.null_probabilities > 1e-3 / max(len(result.energy), 1000)
    lowest = min(float(result.energy.min()), float(result.null_values[likely].min()))
    highest = max(float(result.energy.max()), float(result.null_values[likely].max()))
    values = result.null_values[(result.null_values > lowest - 1e-9) & (result.null_values < highest + 1e-9)]
    if result.null_samples is None and len(values) <= _BINS:
        middles = values
        edges = np.concatenate([[-math.inf], (values[1:] + values[:-1]) / 2, [math.inf]])
    else:
        edges = np.linspace(0, 1, 41) if result.kind == "motifs" else np.linspace(lowest, highest + 1e-9, 31)
        middles = (edges[1:] + edges[:-1]) / 2
    measured = np.histogram(result.energy, edges)[0] / len(result.energy)
    expected = np.histogram(result.null_values, edges, weights=result.null_probabilities)[0]
    series = [report.Series("measured", middles, measured), report.Series(null, middles, expected)]
    return report.curves(
        series, x_label="energy in the trivial channel", y_label="share", log_y=result.kind == "sequences"
    )


def _frequencies(result: Windows) -> str:
    shares = ", ".join(f"{letter} {share:.3f}" for letter, share in result.frequencies.items())
    return f"Frequencies of the letters: {shares}."


def _along(config: ChannelsConfig, result: Windows) -> report.Figure | None:
    """Mean energy by the place in the sequence; of a few sequences, the largest energy of each."""
    assert result.group is not None
    length = result.group.degree
    lengths = np.asarray(result.lengths)
    few = len(lengths) <= _FEW_SEQUENCES
    alike = few or bool((lengths == lengths[0]).all())
    # Starts from 0 to the last, as a share of the sequence if these differ in length.
    reach = (int(lengths.max()) if alike else lengths[result.source]) - length
    relative = result.start / np.maximum(reach, 1)
    num_bins = min(_BINS, int(lengths.min() - length) // config.stride + 1)
    if num_bins < 3:
        return None
    bins = np.minimum((relative * num_bins).astype(np.int64), num_bins - 1)
    middles = (np.arange(num_bins) + 0.5) / num_bins
    if alike:
        middles = middles * (int(lengths.max()) - length) + length / 2
    x_label = "place of the middle of the window" if alike else "place in the sequence, from its start to its end"
    if few:
        largest = np.full((len(lengths), num_bins), np.nan)
        np.fmax.at(largest, (result.source, bins), result.energy)
        series = [report.Series(_short(name), middles, row) for name, row in zip(result.names, largest)]
        found = result.energy[result.q <= config.fdr]
        caption = "The largest energy of the windows at each place."
        if len(found):
            level = np.full(num_bins, found.min())
            series.append(report.Series("found above", middles, level, group="found above"))
        svg = report.curves(series, x_label=x_label, y_label="largest energy")
        return report.Figure(svg, caption, "A curve a sequence, of the largest energy against the place.")
    cells = result.source * num_bins + bins
    sums = np.bincount(cells, result.energy, len(lengths) * num_bins).reshape(-1, num_bins)
    counts = np.bincount(cells, minlength=len(lengths) * num_bins).reshape(-1, num_bins)
    complete = (counts > 0).all(1)
    if complete.sum() < 2:
        return None
    mean = sums[complete] / counts[complete]
    expected = np.full(num_bins, float(result.null_values @ result.null_probabilities))
    series = [report.Series("measured", middles, mean), report.Series("independent letters", middles, expected)]
    caption = (
        f"Mean energy of the windows at each place, over {int(complete.sum()):,} sequences. The band is one standard "
        "error."
    )
    svg = report.curves(series, x_label=x_label, y_label="mean energy")
    return report.Figure(svg, caption, "The mean energy against the place in the sequence, and the one expected.")


def _best(config: ChannelsConfig, result: Windows, thing: str) -> report.Table:
    rows: list[tuple] = []
    emphasised = []
    for w in result.best(NUM_BEST):
        start = int(result.start[w])
        text = result.texts(w)
        letters = f"`{text if len(text) <= 60 else text[:57] + '...'}`"
        if result.q[w] <= config.fdr:
            emphasised.append(len(rows))
        place = () if thing == "motif" else (start,)
        numbers = (float(result.energy[w]), float(result.p[w]), float(result.q[w]))
        rows.append((_short(result.names[result.source[w]], 26), *place, *numbers, letters))
    place = () if thing == "motif" else ("From",)
    note = [] if thing == "motif" else ["Windows that overlap a better one are left out."]
    if emphasised:
        note.append(f"Shaded: found at a false-discovery rate of {100 * config.fdr:g} %.")
    if result.kind == "motifs":
        note.append("Letters are the most frequent ones, small below one half.")
    return report.Table(
        ("Motif" if result.kind == "motifs" else "Sequence", *place, "Energy", "p", "q", "Letters"),
        rows,
        f"The most significant {thing}s.",
        " ".join(note),
        {"Energy": ".3f", "p": ".2g", "q": ".2g"},
        emphasised,
    )


def _channels(result: Windows) -> report.Table:
    rows = [(c["name"], c["dimension"], c["kind"], 100 * c["share"], 100 * c["expected"]) for c in result.channels]
    left = max(0, len(rows) - 40)
    what = "all windows" if result.num_pooled == len(result.energy) else f"{result.num_pooled:,} windows, evenly spaced"
    return report.Table(
        ("Channel", "Dimension", "Kind", "Measured, %", "Independent, %"),
        rows[:40],
        f"Share of each channel in the energy of {what}, and in that of independent letters.",
        "A channel is an irreducible representation of the group: `1` is the trivial one, what the group leaves as it "
        "is." + (f" {left} more are in the JSON." if left else ""),
        {"Measured, %": ".3f", "Independent, %": ".3f"},
    )


def _strand(result: Windows) -> str:
    assert result.strand is not None
    values = np.array([value for value in result.strand if value is not None])
    if not len(values):
        return "No motif has the 6 positions that a comparison with the other strand needs."
    return (
        f"The correlation of a motif with its own reverse complement, at the shift where it is largest: of "
        f"{len(values):,} motifs with 6 or more positions {int((values >= 0.8).sum()):,} have at least 0.8, and "
        f"{int((values >= 0.95).sum()):,} at least 0.95. Unlike the energy, it also finds palindromes beside the "
        "middle."
    )


def _number(number: int, things: str) -> str:
    return f"{number:,} {things if number != 1 else things[:-1]}"


def _short(text: str, width: int = 30) -> str:
    text = text.replace("`", "'")
    text = re.sub(r"^(\S+)_\1(?=\.)", r"\1", text)  # GimmeMotifs writes the number of a JASPAR motif twice
    return text if len(text) <= width else text[: width - 1] + "…"


# --- attention maps -------------------------------------------------------------------------------------------------


def _maps_summary(config: ChannelsConfig, result: Maps) -> list[str]:
    num_maps, group = len(result.labels), result.group
    windows = f", in {result.num_windows:,} windows along the diagonal of each" if result.num_windows > 1 else ""
    kept = float(np.mean([transfer.trace() for transfer in result.transfer]))
    by_chance = (int(group.orbitals().max()) + 1) / group.degree**2
    kept_by_chance = sum(c["kept_by_a_random_map"] for c in result.channels)
    lines = [
        f"{_number(num_maps, 'attention maps')} of `{config.file.name}`{windows}, under "
        f"`{result.group_text}`, of order {group.order}, on {group.degree} positions.",
        f"{percent(result.commuting.mean())} % of the energy commutes with the group (a random map: "
        f"{percent(by_chance)} %), and {percent(kept)} % stays in its channel (a random map: "
        f"{percent(kept_by_chance)} %).",
    ]
    if result.stopped:
        lines.append(f"It was stopped after {num_maps:,} of {result.total:,} maps.")
    return lines


def merged(result: Maps) -> tuple[list[str], np.ndarray]:
    """The mean transfer matrix, with the channels that have least in one."""
    mean_KK = result.transfer.mean(0)
    names = [str(c["name"]) for c in result.channels]
    if len(names) <= NUM_CHANNELS:
        return names, mean_KK
    most = np.argsort(-(mean_KK.sum(0) + mean_KK.sum(1)), kind="stable")[: NUM_CHANNELS - 1]
    kept = sorted(most.tolist())
    place = np.full(len(names), len(kept))
    place[kept] = np.arange(len(kept))
    small = np.zeros((len(kept) + 1, len(kept) + 1))
    np.add.at(small, (place[:, None], place[None, :]), mean_KK)
    return [names[k] for k in kept] + [f"{len(names) - len(kept)} others"], small


def maps_page(config: ChannelsConfig, result: Maps) -> str:
    """The HTML for attention maps."""
    names, cells = merged(result)
    rows = [
        (c["name"], c["dimension"], c["kind"], c["multiplicity"],
         *(100 * c[key] for key in ("to", "from", "kept", "kept_by_a_random_map")))
        for c in result.channels[:40]
    ]  # fmt: skip
    shares = ("To it, %", "From it, %", "Kept, %", "Kept by chance, %")
    sections = [
        report.Section("From channel to channel", [
            "An attention map takes features of some positions to others. Its energy `‖A‖²` is the sum of what it "
            "takes from each channel `l` of the group to each channel `k`, `‖P_k A P_l‖²`. A map that commutes with "
            "the group keeps every channel: what is off the diagonal breaks the symmetry.",
            report.Figure(
                report.heat_map(
                    cells, names, names, x_label="from channel", y_label="to channel", cell=percent
                ),
                "Share of the energy that goes from each channel to each other, in per cent"
                + (f", the mean of {len(result.labels):,} maps." if len(result.labels) > 1 else "."),
                "A matrix of coloured cells with the share in each.",
            ),
            report.Table(
                ("Channel", "Dimension", "Kind", "Copies", *shares),
                rows,
                "Energy that goes to each channel, comes from it, and both.",
                "A channel is all copies of an irreducible representation of the group; `1` is the trivial one, what "
                "the group leaves as it is. By chance: of a map with independent entries of mean zero."
                + (f" {len(result.channels) - 40} more are in the JSON." if len(result.channels) > 40 else ""),
                dict.fromkeys(shares, lambda value: percent(value / 100)),
            ),
        ]),
    ]  # fmt: skip
    if len(result.labels) > 1:
        sections.append(report.Section("Map by map", _map_by_map(result)))
    sections.append(report.Section("The files", [
        "`channels.csv` has a row for each map and channel, `channels.json` the transfer matrices.",
    ]))  # fmt: skip
    return report.page(f"Channels of {config.file.name}", _maps_summary(config, result), sections)


def _map_by_map(result: Maps) -> list[str | report.Figure | report.Table]:
    body: list[str | report.Figure | report.Table] = []
    sizes = np.array(result.indices).max(0) + 1 if len({len(index) for index in result.indices}) == 1 else np.array([])
    wide = np.flatnonzero(sizes > 1)
    complete = len(sizes) and int(np.prod(sizes)) == len(result.labels)
    if complete and len(wide) == 2 and sizes[wide[1]] <= 12 and sizes[wide[0]] <= 48:
        grid = result.commuting.reshape(sizes[wide])
        rows, columns = ([str(i) for i in range(size)] for size in grid.shape)
        body.append(report.Figure(
            report.heat_map(
                grid, rows, columns, x_label=f"index in dimension {wide[1]}", y_label=f"index in dimension {wide[0]}",
                cell=percent,
            ),
            "Share of the energy of each map that commutes with the group, in per cent.",
            "A matrix of coloured cells, one a map.",
        ))  # fmt: skip
    order = np.argsort(-result.commuting, kind="stable").tolist()
    chosen = order if len(order) <= NUM_BEST else [*order[: NUM_BEST // 2], *order[-NUM_BEST // 2 :]]
    columns = ("Commutes, %", "Stays, %")
    half = NUM_BEST // 2
    which = f": the {half} most and the {half} least symmetric maps." if len(order) > NUM_BEST else "."
    body.append(report.Table(
        ("Map", *columns),
        [(_short(result.labels[m], 40), 100 * result.commuting[m], 100 * result.transfer[m].trace()) for m in chosen],
        "Share of each map that commutes with the group, and share that stays in its channel" + which,
        formats=dict.fromkeys(columns, lambda value: percent(value / 100)),
    ))  # fmt: skip
    return body
