"""A report as one HTML file: text, tables and inline SVG, readable on a phone, in print, in light and in dark."""

import csv
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ._style import CSS
from .statistics import Interval

Cell = str | int | float | Interval | None
Format = str | Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Args:
        columns: the headings.
        rows: the cells: text, numbers, an :class:`~erlangen.report.Interval`, or None for what was not measured.
        caption: what the table shows; plain text with ``code`` in backticks.
        note: a remark under it, in the same markup.
        formats: how to write the numbers of a column: a format specification (default ``".4g"``) or a function.
        emphasised: indices of the rows to stress.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str
    note: str = ""
    formats: Mapping[str, Format] = field(default_factory=dict)
    emphasised: Collection[int] = ()

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {index} has {len(row)} cells, the table {len(self.columns)} columns: {row!r}")
        unknown = set(self.formats) - set(self.columns)
        if unknown:
            raise ValueError(f"formats names columns that are not there: {sorted(unknown)}; columns: {self.columns}")

    def csv(self) -> str:
        """The raw cells, with all digits; an interval takes three columns (mean, low, high), None is empty."""
        wide = [any(isinstance(row[index], Interval) for row in self.rows) for index in range(len(self.columns))]
        header = [
            name
            for column, is_interval in zip(self.columns, wide)
            for name in ((f"{column} mean", f"{column} low", f"{column} high") if is_interval else (column,))
        ]
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(header)
        for row in self.rows:
            cells: list[Any] = []
            for cell, is_interval in zip(row, wide):
                if isinstance(cell, Interval):
                    cells += cell
                else:
                    cells += [cell, None, None] if is_interval else [cell]
            writer.writerow(cells)
        return buffer.getvalue()


@dataclass(frozen=True)
class Figure:
    """An SVG with its caption, and a description for those who cannot see it: what it shows, in a sentence or two."""

    svg: str
    caption: str
    description: str


@dataclass(frozen=True)
class Section:
    """A heading and what is under it. Text is plain, with ``code`` in backticks."""

    heading: str
    body: Sequence[str | Table | Figure] = ()


def page(title: str, summary: str | Sequence[str], sections: Sequence[Section]) -> str:
    """The HTML of a report.

    Args:
        title: the title of the page.
        summary: the answer, in one or several paragraphs.
        sections: the sections, in order. Tables and figures are numbered through the page.

    Returns:
        A complete document with no script and nothing to load.
    """
    parts, num_tables, num_figures = [], 0, 0
    for index, section in enumerate(sections, 1):
        blocks = []
        for item in section.body:
            if isinstance(item, str):
                blocks.append(f"<p>{_inline(item)}</p>")
            elif isinstance(item, Table):
                num_tables += 1
                blocks.append(_table(item, num_tables))
            else:
                num_figures += 1
                blocks.append(_figure(item, num_figures))
        body = "\n".join(blocks)
        parts.append(f'<section id="section-{index}">\n<h2>{_inline(section.heading)}</h2>\n{body}\n</section>')
    contents = ""
    if len(sections) > 2:
        links = "".join(
            f'<li><a href="#section-{index}">{_inline(section.heading)}</a></li>\n'
            for index, section in enumerate(sections, 1)
        )
        contents = f'<nav aria-label="Contents">\n<ol>\n{links}</ol>\n</nav>\n'
    paragraphs = [summary] if isinstance(summary, str) else summary
    lead = "".join(f"<p>{_inline(paragraph)}</p>\n" for paragraph in paragraphs if paragraph)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<h1>{_inline(title)}</h1>\n<div class="summary">\n{lead}</div>\n</header>\n{contents}'
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_report(folder: str | Path, name: str, page_html: str, data: Any, tables: Mapping[str, Table]) -> Path:
    """Write ``<name>.html``, ``<name>.json`` and ``<name>.<key>.csv`` for each table, over what was there.

    Everything is prepared before the first file is written, and each file is written aside and renamed: none is ever
    half there. In the JSON, NaN and infinities are null, since JSON has no word for them.

    Args:
        folder: where to write; created if needed.
        name: stem of the files: letters, digits, ``.``, ``_`` and ``-``.
        page_html: the page, from :func:`page`.
        data: what the report was made from: mappings, sequences, numbers, text, dataclasses, arrays and tensors.
        tables: the tables to write as CSV, by a key of the same letters as ``name``.

    Returns:
        The path of the HTML file.
    """
    for word in (name, *tables):
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", word):
            raise ValueError(f"names of files must be of letters, digits, '.', '_' and '-'; received {word!r}")
    folder = Path(folder)
    contents = {f"{name}.json": json.dumps(_plain(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n"}
    contents |= {f"{name}.{key}.csv": table.csv() for key, table in tables.items()}
    contents[f"{name}.html"] = page_html  # last: who sees the new page finds the new data beside it
    encoded = {file_name: text.encode("utf-8") for file_name, text in contents.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, content in encoded.items():
        aside = folder / f".{file_name}.{os.getpid()}.tmp"
        try:
            aside.write_bytes(content)
            os.replace(aside, folder / file_name)
        finally:
            aside.unlink(missing_ok=True)
    return folder / f"{name}.html"


def _plain(value: Any) -> Any:
    """``value`` in the types that JSON has."""
    if isinstance(value, Interval):
        return {"mean": _plain(value.mean), "low": _plain(value.low), "high": _plain(value.high)}
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    raise TypeError(f"data of type {type(value).__name__} has no place in JSON: {value!r}")


def _inline(text: str) -> str:
    # Short code stays on one line: a browser would break `1e-16` at the hyphen.
    text = re.sub(r"`([^`\s]{1,24})`", r'<code class="short">\1</code>', html.escape(text))
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


def _table(table: Table, number: int) -> str:
    numeric = [any(_is_number(row[index]) for row in table.rows) for index in range(len(table.columns))]
    head = "".join(
        f'<th scope="col"{_class("number" if is_number else "")}>{_inline(column)}</th>'
        for column, is_number in zip(table.columns, numeric)
    )
    body = []
    for index, row in enumerate(table.rows):
        cells = []
        for position, (column, cell, is_number) in enumerate(zip(table.columns, row, numeric)):
            tag, scope = ("td", "") if position else ("th", ' scope="row"')
            text = _cell(cell, table.formats.get(column, ".4g"))
            cells.append(f"<{tag}{scope}{_class('number' if is_number else '')}>{text}</{tag}>")
        body.append(f"<tr{_class('stressed' if index in table.emphasised else '')}>{''.join(cells)}</tr>")
    caption = f"table-{number}-caption"
    note = f'\n<p class="note">{_inline(table.note)}</p>' if table.note else ""
    return (
        f'<figure class="table" id="table-{number}">\n'
        f'<figcaption id="{caption}"><b>Table {number}.</b> {_inline(table.caption)}</figcaption>\n'
        f'<div class="scroll" role="region" aria-labelledby="{caption}" tabindex="0">\n'
        f'<table aria-labelledby="{caption}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f"\n</tbody>\n</table>\n</div>{note}\n</figure>"
    )


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, (Real, Interval)) and not isinstance(cell, bool)


def _cell(cell: Cell, how: Format) -> str:
    if cell is None:
        return '<span title="not measured">–</span>'
    if isinstance(cell, (str, bool)):
        return _inline(str(cell))
    if callable(how):
        return html.escape(how(cell))
    if isinstance(cell, Integral) and how == ".4g":
        how = "d"
    return html.escape(format(cell, how)).replace("-", "−")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _figure(figure: Figure, number: int) -> str:
    return (
        f'<figure class="plot" id="figure-{number}">\n<div class="card">\n'
        f"{_embed(figure.svg, f'f{number}-', figure.description)}\n</div>\n"
        f"<figcaption><b>Figure {number}.</b> {_inline(figure.caption)}</figcaption>\n</figure>"
    )


def _embed(svg: str, prefix: str, description: str) -> str:
    """The SVG for use inside a page: ids of its own, a description, a size that follows the page."""
    svg = svg[svg.index("<svg") :].strip()
    opening, rest = svg[: svg.index(">")], svg[svg.index(">") :]
    width = re.search(r'\swidth="([0-9.]+)(pt|px)?"', opening)
    # Namespaces are implied inside HTML, and the size is that of the page's column.
    opening = re.sub(r'\s(?:width|height|version|xmlns(?::\w+)?|role|aria-label)="[^"]*"', "", opening)
    size = f' style="width: {float(width[1]) * (4 / 3 if width[2] == "pt" else 1) * 1.12:.0f}px"' if width else ""
    rest = rest.replace("xlink:href=", "href=")
    rest = re.sub(r'(\sid=")', rf"\g<1>{prefix}", rest)
    rest = re.sub(r'(\shref="#|url\(#)', rf"\g<1>{prefix}", rest)
    return f'{opening} role="img" aria-label="{html.escape(description)}"{size}{rest}'
