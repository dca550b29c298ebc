"""Figures are repeatable, well formed, and meet NaN, one seed and zeros."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from erlangen.report import Arrows, IntervalRow, Series, arrows, curves, heat_map, intervals, small_multiples
from erlangen.report import figures as report_figures

matplotlib = pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

STEPS = np.arange(20)
BLUE, ORANGE = "#0072b2", "#d55e00"  # of the first and the second label
LABELS = {"x_label": "step", "y_label": "loss"}


def noisy(seeds=3, scale=1.0):
    return scale * np.exp(np.random.default_rng(0).normal(size=(seeds, len(STEPS))))


def texts(svg):
    ET.fromstring(svg)  # well formed
    return [text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if (text := node.text)]


@pytest.fixture
def drawn(monkeypatch):
    """Calls a figure function and gives matplotlib's figure, of which it made the SVG."""
    figures, write = [], report_figures._svg
    monkeypatch.setattr(report_figures, "_svg", lambda figure: write(figures.append(figure) or figure))

    def draw(function, *args, **options):
        texts(function(*args, **options))
        return figures.pop()

    return draw


def ticks(axis):
    """Place of each label of an axis."""
    return {label.get_text(): place for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs())}


def assert_curves_are_drawn(axes, y, colour):
    """All of one series [seeds, 20]: the mean, where all seeds have a value, up to eight thin seeds, and one band.

    On a logarithmic axis, what is below the tick that says 0 is drawn there.
    """
    y = np.where(np.isfinite(np.atleast_2d(y)), y, np.nan)
    floor = ticks(axes.yaxis).get("0", 0.0) if axes.get_yscale() == "log" else -np.inf
    lines = {width: [] for width in (0.6, 1.8)}
    for line in axes.lines:
        if line.get_color() == colour:
            lines[line.get_linewidth()].append(line.get_xydata())
    expected = [y.mean(0)], (list(y) if 1 < len(y) <= 8 else [])
    for found, wanted in zip((lines[1.8], lines[0.6]), expected):
        assert len(found) == len(wanted)
        for xy, values in zip(found, wanted):
            finite = np.isfinite(values)
            np.testing.assert_array_equal(xy[:, 0], STEPS[finite])
            np.testing.assert_allclose(xy[:, 1], np.maximum(values[finite], floor), rtol=1e-12, atol=0)
            low, high = axes.get_ylim()
            assert ((low <= xy[:, 1]) & (xy[:, 1] <= high)).all() and low < high
    bands = [band for band in axes.collections if matplotlib.colors.to_hex(band.get_facecolor()[0]) == colour]
    assert len(bands) == (len(y) > 1)


def test_curves_name_their_labels_groups_and_axes():
    series = [Series("AdamW", STEPS, noisy(), "broken"), Series("AdamW", STEPS, 2 * noisy(), "symmetric")]
    words = texts(curves(series, title="Loss", **LABELS))
    assert {"AdamW", "broken", "symmetric", "step", "loss", "Loss"} <= set(words)
    assert words.count("AdamW") == 1  # one colour for a label, whatever the group


def test_the_same_data_gives_the_same_bytes_whatever_the_users_settings():
    def draw():
        return curves([Series("a", STEPS, noisy()), Series("b", STEPS, noisy(1))], log_y=True, **LABELS)

    first = draw()
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "other", "lines.linewidth": 9}):
        assert draw() == first
        assert matplotlib.rcParams["font.size"] == 30
    assert "<dc:date>" not in first


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "y",
    [
        np.zeros((3, 20)),
        np.full((3, 20), np.nan),
        np.where(STEPS > 10, np.nan, noisy()),
        np.where(STEPS > 10, np.inf, noisy(1)),
        noisy(1)[0],
        noisy(12),
        np.full((2, 20), 3.0),
        1e-300 * noisy(),
    ],
    ids=["zeros", "nan", "part", "infinite", "one seed, flat", "many", "constant", "tiny"],
)
def test_awkward_values_are_drawn(y, log_y, drawn):
    awkward, plain = Series("awkward", STEPS, y), Series("plain", STEPS, noisy())
    for series in ([awkward, plain], [awkward]):
        figure = drawn(curves, series, log_y=log_y, **LABELS)
        (axes,) = figure.axes
        assert_curves_are_drawn(axes, y, BLUE)
        if len(series) == 2:
            assert_curves_are_drawn(axes, noisy(), ORANGE)
        assert [text.get_text() for text in figure.legends[0].texts] == [one.label for one in series]
        finite = np.concatenate([np.ravel(one.y) for one in series])
        finite = finite[np.isfinite(finite)]
        says_zero = "drawn as 0" in axes.get_ylabel()
        assert says_zero == (log_y and (not finite.any() or finite.min() < 1e-18 * finite.max()))
        assert not log_y or says_zero == ("0" in ticks(axes.yaxis))


def test_the_comparison_of_curves_sees_what_is_wrong(drawn):
    y = noisy()
    (axes,) = drawn(curves, [Series("a", STEPS, y)], **LABELS).axes
    assert_curves_are_drawn(axes, y, BLUE)
    half = np.where(STEPS > 10, np.nan, y)
    for wrong, colour in ((1.001 * y, BLUE), (y[:2], BLUE), (half, BLUE), (y, ORANGE)):
        with pytest.raises(AssertionError):
            assert_curves_are_drawn(axes, wrong, colour)
    axes.set_ylim(0, y.mean())  # cuts the top off
    with pytest.raises(AssertionError):
        assert_curves_are_drawn(axes, y, BLUE)


@pytest.mark.parametrize("log_y", [False, True])
def test_a_single_point_is_drawn(log_y, drawn):
    series = [Series("one point", [3], noisy()[:, :1]), Series("zero", [3], [0.0])]
    (axes,) = drawn(curves, series, log_y=log_y, **LABELS).axes
    points = [line for line in axes.lines if line.get_marker() == "o" and line.get_linewidth() == 1.8]
    assert [line.get_color() for line in points] == [BLUE, ORANGE]
    zero = ticks(axes.yaxis)["0"] if log_y else 0.0
    np.testing.assert_allclose([line.get_xydata()[0] for line in points], [[3, noisy()[:, 0].mean()], [3, zero]])
    for low, high, places in ((*axes.get_xlim(), [3]), (*axes.get_ylim(), [zero, noisy()[:, 0].max()])):
        assert all(low < place < high for place in places)


def test_a_logarithmic_x_axis_is_marked_at_values_of_the_series(drawn):
    sizes = [256, 512, 1024, 2048]
    series = [Series("a", sizes, [1.0, 2.0, 4.0, 8.0]), Series("b", sizes[:2], [3.0, 9.0])]
    words = texts(curves(series, log_x=True, log_y=True, **LABELS))
    assert {"256", "512", "1024", "2048"} <= set(words)
    places = re.findall(r'id="xtick_\d+".*?<use [^>]*x="([\d.]+)"', curves(series, log_x=True, **LABELS), re.S)
    assert np.allclose(np.diff(np.diff(np.array(places, dtype=float))), 0, atol=1e-3), "equal factors, equal distances"
    (axes,) = drawn(curves, [Series("one point", [64], [3.0])], log_x=True, log_y=True, **LABELS).axes
    assert ticks(axes.xaxis) == {"64": 64} and axes.get_xlim()[0] < 64 < axes.get_xlim()[1]
    assert axes.lines[0].get_xydata().tolist() == [[64, 3]] and axes.lines[0].get_marker() == "o"
    with pytest.raises(ValueError, match="x axis has no place for 0"):
        curves([Series("a", [0, 1], [1.0, 2.0])], log_x=True, **LABELS)


def test_one_seed_has_no_band():
    def num_bands(seeds, bands=True):
        return curves([Series("a", STEPS, noisy(seeds))], bands=bands, **LABELS).count("PolyCollection")

    assert num_bands(3) > 0
    assert num_bands(1) == 0
    assert num_bands(3, bands=False) == 0


def test_zeros_on_a_log_axis_have_a_tick_and_the_label_says_where():
    y = np.concatenate([np.zeros(10), np.full(10, 3e-16)])
    words = texts(curves([Series("exact", STEPS, y), Series("broken", STEPS, noisy(scale=0.1))], log_y=True, **LABELS))
    assert "0" in words
    assert any("(below 10⁻¹⁷ drawn as 0)" in word for word in words)
    assert not any("drawn as 0" in word for word in texts(curves([Series("a", STEPS, noisy())], log_y=True, **LABELS)))


def test_an_absurdly_small_value_does_not_stretch_the_axis():
    y = noisy()
    y[0, 3] = 1e-280
    assert any("drawn as 0" in word for word in texts(curves([Series("a", STEPS, y)], log_y=True, **LABELS)))


def test_negative_values_have_no_place_on_a_log_axis():
    with pytest.raises(ValueError, match="negative values; the smallest is -1"):
        curves([Series("a", STEPS, STEPS - 1.0)], log_y=True, **LABELS)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"'a': x must be \[n\] and y \[seeds, n\]; received \(20,\) and \(3, 19\)"):
        curves([Series("a", STEPS, noisy()[:, 1:])], **LABELS)
    with pytest.raises(ValueError, match="no series"):
        curves([], **LABELS)


def test_small_multiples_have_one_legend():
    panels = {name: [Series("loss", STEPS, noisy()), Series("other", STEPS, noisy())] for name in ("A", "B", "C")}
    words = texts(small_multiples(panels, title="All", **LABELS))
    assert {"A", "B", "C", "All"} <= set(words)
    assert words.count("other") == 1


def test_more_labels_than_colours_are_told_apart_by_a_marker(drawn):
    figure = drawn(curves, [Series(f"label {k}", STEPS, noisy() + k) for k in range(10)], **LABELS)
    lines = [line for line in figure.axes[0].lines if line.get_linewidth() == 1.8]
    looks = [(line.get_color(), line.get_marker()) for line in lines]
    assert len(set(looks)) == 10 and len({colour for colour, _ in looks}) == 8
    assert [marker for _, marker in looks] == [""] * 8 + ["o"] * 2
    for k, line in enumerate(lines):
        np.testing.assert_allclose(line.get_ydata(), noisy().mean(0) + k)
    (legend,) = figure.legends  # which says the same
    entries = zip(legend.texts, legend.legend_handles)
    named = {text.get_text(): (handle.get_color(), handle.get_marker()) for text, handle in entries}
    assert [named[f"label {k}"] for k in range(10)] == looks


def test_intervals_say_where_there_is_one_seed_or_no_value():
    rows = [
        IntervalRow("clear", 0.5, 0.2, 0.8, [0.4, 0.6]),
        IntervalRow("one", 0.1, -math.inf, math.inf, [0.1]),
        IntervalRow("diverged & <lost>", math.nan, math.nan, math.nan, [math.nan]),
    ]
    words = texts(intervals(rows, x_label="difference", title="Differences"))
    assert {"clear", "one", "diverged & <lost>", "n = 1", "no value", "difference", "Differences"} <= set(words)


def test_arrows_name_their_labels_and_leave_out_what_is_not_finite(drawn):
    def draw(x=(0.0, 2.0)):
        groups = [Arrows("given", x, [0.0, 1.0], [0.0, 1.0], "given"), Arrows("missing", [1.0], [0.5], [0.5], "truth")]
        return arrows(
            [*groups, Arrows("answer", [np.nan, 1.0], [0.0, 0.5], [0.0, 0.4])], x_label="east", y_label="north"
        )

    first = draw()
    assert {"given", "missing", "answer", "east", "north"} <= set(texts(first))
    assert draw() == first != draw((0.0, 2.5))
    assert "nan" not in first.lower()
    (axes,) = drawn(arrows, [Arrows("one", [3.0], [2.0], [0.0])], **LABELS).axes
    (quiver,) = axes.collections
    assert quiver.get_offsets().tolist() == [[3, 2]] and (quiver.U.item(), quiver.V.item()) == (1, 0)
    assert axes.get_xlim()[0] < 3 < axes.get_xlim()[1] and axes.get_ylim()[0] < 2 < axes.get_ylim()[1]
    with pytest.raises(ValueError, match="no place"):
        arrows([Arrows("none", [np.nan], [0.0], [0.0])], **LABELS)
    with pytest.raises(ValueError, match=r"'short'.*\(2,\)"):
        arrows([Arrows("short", [0.0, 1.0], [0.0], [0.0])], **LABELS)


def test_an_arrow_points_where_its_angle_says():
    """The angle alone turns the arrow: what is drawn at a quarter turn is not what is drawn at none."""
    right, up = (arrows([Arrows("a", [0.0], [0.0], [angle])], **LABELS) for angle in (0.0, math.pi / 2))

    def extent(svg):
        path = next(
            node for group in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}g")
            if group.get("id", "").startswith("Quiver") for node in group.iter("{http://www.w3.org/2000/svg}path")
        )  # fmt: skip
        numbers = np.array([float(word) for word in path.get("d").split() if word not in "MLz"]).reshape(-1, 2)
        return np.ptp(numbers, axis=0)

    assert extent(right)[0] > 3 * extent(right)[1] and extent(up)[1] > 3 * extent(up)[0]


def test_a_heat_map_has_every_number_and_label():
    values = [[0.25, 0.5, 12.0], [0.0, 1e-3, 7.125]]
    svg = heat_map(values, ["1", "sign"], ["1", "sign", "2a"], x_label="from", y_label="to", title="All")
    words = texts(svg)
    assert {"0.25", "0.5", "12", "0", "0.001", "7.1", "from", "to", "All", "2a"} <= set(words)
    assert words.count("sign") == 2
    assert heat_map(values, ["1", "sign"], ["1", "sign", "2a"], x_label="from", y_label="to", title="All") == svg
    percent = texts(heat_map(values, ["1", "sign"], ["1", "sign", "2a"], cell=lambda value: f"{100 * value:.0f} %"))
    assert {"25 %", "1200 %"} <= set(percent)


def fills(svg):
    """Colours of the cells, by rows: red, green and blue from 0 to 255."""
    found = re.findall(r'<g id="patch_\d+">\s*<path [^>]*?style="fill: #(\w{6}); stroke', svg)
    return [tuple(int(colour[i : i + 2], 16) for i in (0, 2, 4)) for colour in found]


def test_the_colours_of_a_heat_map_say_size_and_sign():
    svg = heat_map([[0.0, 1.0, 2.0], [-1.0, -2.0, np.nan]], ["a", "b"], ["c", "d", "e"])
    zero, half, most, less, least, missing = fills(svg)[-6:]
    assert zero == (255, 255, 255) and most == (0, 114, 178) and least == (213, 94, 0)
    assert half == pytest.approx(np.add(zero, most) / 2, abs=1) and less == pytest.approx(
        np.add(zero, least) / 2, abs=1
    )
    assert len(set(missing)) == 1, "grey"
    assert {"–", "−1", "−2"} <= set(texts(svg))
    white = re.findall(r"<text[^>]*fill: #ffffff[^>]*>([^<]+)<", svg)
    assert white == ["2", "−2"], "white numbers on dark cells only"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((2, 2)), "0000"),
        (np.full((2, 2), np.nan), "––––"),
        ([[np.inf, 1], [-np.inf, 0]], "–1–0"),
        ([[1e-300, 0], [-1e300, np.nan]], ["1e−300", "0", "−1e+300", "–"]),
    ],
    ids=["zeros", "nan", "infinite", "far apart"],
)
def test_awkward_cells_are_drawn(values, says, drawn):
    rows, columns = ["a", "a label of many words"], ["b", "another label of many words"]
    figure = drawn(heat_map, values, rows, columns)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == list(says)
    assert [text.get_position() for text in axes.texts] == [(0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5)]
    for cell, place, text in zip(axes.patches, np.ndindex(2, 2), says):
        assert cell.get_xy() == place[::-1]
        colour = matplotlib.colors.to_hex(cell.get_facecolor())
        wanted = {"0": "#ffffff", "1e−300": "#ffffff", "1": BLUE, "−1e+300": ORANGE, "–": "#ededed"}
        assert colour == wanted[text]
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 2), (2, 0)), "the first row is on top"
    for axis, labels in ((axes.xaxis, columns), (axes.yaxis, rows)):
        assert [label.replace("\n", " ") for label in ticks(axis)] == labels
        for label in axis.get_ticklabels():
            box = label.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, "a label is cut off"
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, "a label is cut off"


def test_a_heat_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[rows, columns\] = \[2, 1\] .* received \[1, 2\]"):
        heat_map([[1.0, 2.0]], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="at least one cell"):
        heat_map(np.zeros((0, 0)), [], [])
    with pytest.raises(ValueError, match=r"at most 12 columns.*received 13"):
        heat_map(np.zeros((1, 13)), ["a"], ["b"] * 13)
