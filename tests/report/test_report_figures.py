"""Figures are repeatable, well formed, and meet NaN, one seed and zeros."""

import math
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from erlangen.report import Arrows, IntervalRow, Series, arrows, curves, heat_map, intervals, small_multiples

matplotlib = pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")

STEPS = np.arange(20)
LABELS = {"x_label": "step", "y_label": "loss"}


def noisy(seeds=3, scale=1.0):
    return scale * np.exp(np.random.default_rng(0).normal(size=(seeds, len(STEPS))))


def texts(svg):
    ET.fromstring(svg)  # well formed
    return [text for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text") if (text := node.text)]


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
def test_awkward_values_are_drawn_without_a_warning(y, log_y):
    texts(curves([Series("awkward", STEPS, y), Series("plain", STEPS, noisy())], log_y=log_y, **LABELS))
    texts(curves([Series("awkward", STEPS, y)], log_y=log_y, **LABELS))


@pytest.mark.parametrize("log_y", [False, True])
def test_a_single_point_is_drawn(log_y):
    texts(curves([Series("one point", [3], noisy()[:, :1]), Series("zero", [3], [0.0])], log_y=log_y, **LABELS))


def test_a_logarithmic_x_axis_is_marked_at_values_of_the_series():
    sizes = [256, 512, 1024, 2048]
    series = [Series("a", sizes, [1.0, 2.0, 4.0, 8.0]), Series("b", sizes[:2], [3.0, 9.0])]
    words = texts(curves(series, log_x=True, log_y=True, **LABELS))
    assert {"256", "512", "1024", "2048"} <= set(words)
    ticks = re.findall(r'id="xtick_\d+".*?<use [^>]*x="([\d.]+)"', curves(series, log_x=True, **LABELS), re.S)
    assert np.allclose(np.diff(np.diff(np.array(ticks, dtype=float))), 0, atol=1e-3), "equal factors, equal distances"
    texts(curves([Series("one point", [64], [3.0])], log_x=True, log_y=True, **LABELS))
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


def test_more_labels_than_colours_are_told_apart_by_a_marker():
    texts(curves([Series(f"label {k}", STEPS, noisy() + k) for k in range(10)], **LABELS))


def test_intervals_say_where_there_is_one_seed_or_no_value():
    rows = [
        IntervalRow("clear", 0.5, 0.2, 0.8, [0.4, 0.6]),
        IntervalRow("one", 0.1, -math.inf, math.inf, [0.1]),
        IntervalRow("diverged & <lost>", math.nan, math.nan, math.nan, [math.nan]),
    ]
    words = texts(intervals(rows, x_label="difference", title="Differences"))
    assert {"clear", "one", "diverged & <lost>", "n = 1", "no value", "difference", "Differences"} <= set(words)


def test_arrows_name_their_labels_and_leave_out_what_is_not_finite():
    def draw(x=(0.0, 2.0)):
        groups = [Arrows("given", x, [0.0, 1.0], [0.0, 1.0], "given"), Arrows("missing", [1.0], [0.5], [0.5], "truth")]
        return arrows(
            [*groups, Arrows("answer", [np.nan, 1.0], [0.0, 0.5], [0.0, 0.4])], x_label="east", y_label="north"
        )

    first = draw()
    assert {"given", "missing", "answer", "east", "north"} <= set(texts(first))
    assert draw() == first != draw((0.0, 2.5))
    assert "nan" not in first.lower()
    texts(arrows([Arrows("one", [3.0], [3.0], [0.0])], **LABELS))
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


@pytest.mark.parametrize("values", [np.zeros((2, 2)), np.full((2, 2), np.nan), [[np.inf, 1], [-np.inf, 0]]])
def test_awkward_cells_are_drawn_without_a_warning(values):
    texts(heat_map(values, ["a", "a label of many words"], ["b", "another label of many words"]))


def test_a_heat_map_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"\[rows, columns\] = \[2, 1\] .* received \[1, 2\]"):
        heat_map([[1.0, 2.0]], ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="at least one cell"):
        heat_map(np.zeros((0, 0)), [], [])
    with pytest.raises(ValueError, match=r"at most 12 columns.*received 13"):
        heat_map(np.zeros((1, 13)), ["a"], ["b"] * 13)
