"""Reports are well formed, self-contained, escaped and repeatable; their files hold what was given."""

import csv
import functools
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from html.parser import HTMLParser

import numpy as np
import pytest

from erlangen.report import (
    Figure,
    Interval,
    Section,
    Series,
    Table,
    curves,
    intervals,
    page,
    paired_interval,
    write_report,
)

EVIL = '<script>alert("x")</script> & "quoted"'


class Checker(HTMLParser):
    """Balanced tags, unique ids, resolved references, headings in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.references, self.headings, self.tags, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name == "href":
                assert value.startswith("#")
                self.references.append(value[1:])
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TABLE = Table(
    ["Name", "Loss", "Difference", "Steps", "Note"],
    [
        ["plain", 3.25, Interval(-0.1, -0.2, 0.0), 12345678, EVIL],
        ["`code`", None, paired_interval([0.1]), None, "-"],
        ["numpy", np.float32(-0.5), None, np.int64(3), True],
    ],
    "Losses of `model`",
    note="A note.",
    formats={"Loss": ".3f", "Difference": "+.2f"},
    emphasised={1},
)


@functools.cache
def demo():
    pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install 'erlangen[report]'")
    x = np.arange(10)
    line = curves([Series("a", x, np.stack([x, x + 1.0])), Series("b", x, x)], x_label="x", y_label="y")
    forest = intervals([("row", 0.1, 0.0, 0.2, [0.1])], x_label="difference")
    figures = [Figure(line, "First", EVIL), Figure(line, "Again", "The same."), Figure(forest, "Forest", "A row.")]
    sections = [Section("One", ["Text with `code`.", TABLE]), Section("Two", figures), Section(EVIL, [TABLE])]
    return page(f"Title {EVIL}", ["First `1e-16`.", "Second."], sections)


def test_the_page_is_well_formed_with_unique_ids_and_headings_in_order():
    checker = Checker(demo())
    assert len(checker.ids) == len(set(checker.ids))
    assert set(checker.references) <= set(checker.ids)
    assert checker.headings == [1, 2, 2, 2]
    attributes = [dict(attrs) for tag, attrs in checker.tags if tag in {"html", "svg", "th"}]
    assert attributes[0]["lang"] == "en"
    assert sum(a.get("role") == "img" and bool(a.get("aria-label")) for a in attributes) == 3
    assert all(attrs.get("scope") in {"col", "row"} for tag, attrs in checker.tags if tag == "th")


def test_the_checker_sees_a_bad_page():
    with pytest.raises(AssertionError):
        Checker("<p><b></p></b>")
    with pytest.raises(AssertionError):
        Checker("<p>")
    with pytest.raises(AssertionError):
        Checker('<a href="https://example.org"></a>')


def test_nothing_is_loaded_and_nothing_runs():
    text = demo()
    assert not re.search(r"(src|href)\s*=", re.sub(r'href="#', "", text))
    assert not re.search(r"https?:|//|@import|<script|<link|\son\w+=", text)


def test_markup_in_texts_is_escaped_and_still_readable():
    text = demo()
    checker = Checker(text)
    assert "script" not in {tag for tag, _ in checker.tags}
    assert checker.text.count(EVIL) >= 4
    assert EVIL in [attrs.get("aria-label") for _, attrs in checker.tags]


def test_the_same_report_has_the_same_bytes():
    assert demo.__wrapped__() == demo()


def test_cells_are_formatted_and_aligned():
    text = page("t", "", [Section("s", [TABLE])])
    assert '<td class="number">3.250</td><td class="number">−0.10 [−0.20, +0.00]</td>' in text
    assert '<td class="number">12345678</td>' in text
    assert "+0.10 (n = 1)" in text
    assert '<tr class="stressed"><th scope="row"><code class="short">code</code></th>' in text
    assert '<td class="number">−0.500</td>' in text
    assert "<td>True</td>" in text
    assert page("t", "", [Section("s", [Table(["a"], [[0.5]], "c", formats={"a": lambda v: f"<{v}>"})])]).count(
        "&lt;0.5&gt;"
    )


def test_a_table_checks_its_shape():
    with pytest.raises(ValueError, match="row 0 has 1 cells, the table 2 columns"):
        Table(["a", "b"], [["x"]], "")
    with pytest.raises(ValueError, match="columns that are not there"):
        Table(["a"], [], "", formats={"c": ".2f"})


@dataclass
class Config:
    learning_rate: float
    name: str


def test_the_files_hold_what_was_given(tmp_path):
    data = {
        "config": Config(1e-3, "é"),
        "losses": np.array([0.1, math.nan]),
        "interval": paired_interval([0.3]),
        "seeds": (1, np.int64(2)),
        "float32": np.float32(0.5),
    }
    for _ in range(2):  # the second time over its own files
        path = write_report(tmp_path / "new" / "folder", "study-1", "<p>é</p>", data, {"loss": TABLE})
    assert path.read_text(encoding="utf-8") == "<p>é</p>"
    assert sorted(file.name for file in path.parent.iterdir()) == ["study-1.html", "study-1.json", "study-1.loss.csv"]
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == {
        "config": {"learning_rate": 1e-3, "name": "é"},
        "losses": [0.1, None],
        "interval": {"mean": 0.3, "low": None, "high": None},
        "seeds": [1, 2],
        "float32": 0.5,
    }
    with open(path.parent / "study-1.loss.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["Name", "Loss", "Difference mean", "Difference low", "Difference high", "Steps", "Note"]
    assert rows[1] == ["plain", "3.25", "-0.1", "-0.2", "0.0", "12345678", EVIL]
    assert rows[2] == ["`code`", "", "0.1", "-inf", "inf", "", "-"]
    assert rows[3] == ["numpy", "-0.5", "", "", "", "3", "True"]


def test_floats_in_csv_keep_all_digits(tmp_path):
    value = 0.1 + 0.2
    assert float(Table(["a"], [[value]], "").csv().splitlines()[1]) == value


def test_bad_input_writes_nothing(tmp_path):
    with pytest.raises(TypeError, match="object has no place in JSON"):
        write_report(tmp_path, "a", "", {"x": object()}, {})
    for name in ("", "../a", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="names of files"):
            write_report(tmp_path, name, "", {}, {})
    with pytest.raises(ValueError, match="names of files"):
        write_report(tmp_path, "a", "", {}, {"b/c": TABLE})
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = write_report(tmp_path, "a", "old", {}, {})
    with pytest.raises(UnicodeEncodeError):
        write_report(tmp_path, "a", "\ud800", {"new": 1}, {})
    assert json.loads(path.with_suffix(".json").read_text()) == {}

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path, "a", "new", {}, {})
    assert path.read_text() == "old"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.html", "a.json"]


def test_importing_does_not_import_matplotlib():
    code = "import sys, erlangen.report, erlangen.testing; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
