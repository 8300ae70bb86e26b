"""A report from evaluation rows: one self-contained HTML page, the same as Markdown, and its pictures as PNG."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .comparison import Cell, Key, compare, depth_text, length_text, rows_table, tables
from .errors import InputError
from .files import write_file, writing
from .pictures import DARK, GRID, INK, PAPER, PICTURES, SERIES, theme
from .rows import Row, load_rows, metric_of, save_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["compare", "draw", "load_all", "rows_table", "tables", "write_report"]


@dataclass(frozen=True)
class Picture:
    name: str
    title: str
    caption: str
    svg: str
    png: bytes


def draw(rows: Sequence[Row]) -> list[Picture]:
    """All pictures for which there are rows."""
    import matplotlib

    with matplotlib.rc_context(theme()):
        figures = {name: picture(rows) for name, (_, picture) in PICTURES.items()}
        return [_picture(name, figure) for name, figure in figures.items() if figure is not None]


def _picture(name: str, figure: Figure) -> Picture:
    title, draw = PICTURES[name]
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None})
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)  # the page has it as a heading already
    figure.savefig(png, format="png", dpi=160)
    caption = " ".join((draw.__doc__ or "").split())
    return Picture(name, title, caption, _themed(svg.getvalue(), name), png.getvalue())


def _themed(svg: str, name: str) -> str:
    """The <svg> element alone, its ids made unique, its placeholder colours as CSS variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color in DARK:
        svg = svg.replace(color, f"var({_variable(color)})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _variable(color: str) -> str:
    return f"--c{color[1:]}"


def write_report(
    rows: Sequence[Row] | str | Path, output: str | Path, *, teacher: str | None = None, extra: Mapping | None = None
) -> Path:
    """Writes index.html (self-contained), report.md, one PNG a picture and rows.json into the folder `output`.

    rows: rows, or a file that `save_rows` wrote. extra: further sections before the table, heading → a paragraph, or
    heading → a mapping, shown as a list of names and values. Returns the path of index.html.
    """
    rows = load_rows(rows) if isinstance(rows, (str, Path)) else list(rows)
    if not rows:
        raise InputError("there are no rows to report")
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output={str(output)!r} is a file, not a folder")
    compared = [compare(part, _teacher_of(part, rows, teacher)) for part in tables(rows)]
    pictures = draw(rows)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name in PICTURES.keys() - {picture.name for picture in pictures}:  # of other rows, drawn here before
            (folder / f"{name}.png").unlink(missing_ok=True)
    for picture in pictures:
        write_file(folder / f"{picture.name}.png", picture.png)
    save_rows(rows, folder / "rows.json")
    write_file(folder / "report.md", _markdown(compared, pictures, extra or {}))
    return write_file(folder / "index.html", _page(compared, pictures, extra or {}))


def _teacher_of(part: Sequence[Row], rows: Sequence[Row], teacher: str | None) -> str | None:
    """`teacher` where this part of the rows has it; InputError where none has."""
    if teacher in {row.model for row in rows} - {row.model for row in part}:
        return None
    return teacher


LEGEND = "▲ better and ▼ worse than the teacher beyond the intervals, ≈ inside them; brackets: 95 % intervals."


def _table_rows(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]):
    for (suite, metric, length, depth), found in cells.items():
        head = (suite, metric, length_text(length), depth_text(depth))
        yield head, [found.get(model) for model in models]


Compared = Sequence[tuple[list[str], dict[Key, dict[str, Cell]]]]


def _markdown(compared: Compared, pictures: Sequence[Picture], extra: Mapping) -> str:
    parts = ["# Evaluation", " · ".join(f"**{model}**" for model in compared[0][0])]
    parts += [
        f"## {picture.title}\n{picture.caption}\n\n![{picture.title}]({picture.name}.png)" for picture in pictures
    ]
    for heading, content in extra.items():
        body = content if isinstance(content, str) else "\n".join(f"- {k}: {v}" for k, v in content.items())
        parts.append(f"## {heading}\n{body}")
    return "\n\n".join([*parts, f"## All numbers\n{LEGEND}", *(_markdown_table(*one) for one in compared)]) + "\n"


def _markdown_table(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]) -> str:
    head = ["suite", "metric", "length", "depth", *models]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    lines += [
        [*names, *(cell.show() if cell else "–" for cell in values)] for names, values in _table_rows(models, cells)
    ]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(compared: Compared, pictures: Sequence[Picture], extra: Mapping) -> str:
    models = compared[0][0]
    sections = [f"<figure><h2>{html.escape(p.title)}</h2><div class='scroll'>{p.svg}</div>"
                f"<figcaption>{html.escape(p.caption)}</figcaption></figure>" for p in pictures]  # fmt: skip
    sections += [
        f"<section><h2>{html.escape(str(h))}</h2>{_content(content)}</section>" for h, content in extra.items()
    ]
    shown = "".join(_html_table(*one) for one in compared)
    sections.append(f"<section><h2>All numbers</h2><p>{LEGEND}</p>{shown}</section>")
    names = " · ".join(f"<b>{html.escape(model)}</b>" for model in models)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<title>Evaluation: {html.escape(', '.join(models))}</title><style>{_css()}</style></head>\n"
        f"<body><main><h1>Evaluation</h1><p>{names}</p>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _content(content: str | Mapping) -> str:
    if isinstance(content, str):
        return "".join(f"<p>{html.escape(part)}</p>" for part in content.split("\n\n"))
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in content.items())
    return f"<dl>{items}</dl>"


def _html_table(models: Sequence[str], cells: Mapping[Key, Mapping[str, Cell]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("suite", "metric", "length", "depth", *models))
    body = []
    for names, values in _table_rows(models, cells):
        title = html.escape(metric_of(names[1]).title)
        labels = "".join(f"<td title='{title}'>{html.escape(name)}</td>" for name in names)
        body.append(f"<tr>{labels}{''.join(map(_html_cell, values))}</tr>")
    return (f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
            f"<tbody>{''.join(body)}</tbody></table></div>")  # fmt: skip


def _html_cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td>–</td>"
    mark = f" <span class='{cell.verdict or 'none'}'>{cell.change} {cell.MARKS[cell.verdict]}</span>" * bool(
        cell.change
    )
    return f"<td>{cell.text}{mark}<br><small>{cell.interval}</small></td>"


def _css() -> str:
    light = ";".join(f"{_variable(color)}:{color}" for color in DARK)
    dark = ";".join(f"{_variable(color)}:{other}" for color, other in DARK.items())
    ink, paper, grid = (f"var({_variable(color)})" for color in (INK, PAPER, GRID))
    worse, better = (f"var({_variable(list(SERIES)[i])})" for i in (1, 2))
    return f"""
:root{{color-scheme:light dark;{light}}}
@media(prefers-color-scheme:dark){{:root{{{dark}}}}}
body{{margin:0;background:{paper};color:{ink};font:16px/1.5 system-ui,sans-serif}}
main{{max-width:64rem;margin:auto;padding:1.5rem}}
h1{{margin:.2em 0}} h2{{font-size:1.15rem;margin:1.6em 0 .3em}}
figure{{margin:0}} figcaption{{max-width:46rem;font-size:.9rem}}
svg{{max-width:100%;height:auto}} .scroll{{overflow-x:auto}}
svg text{{font-family:'DejaVu Sans',Verdana,sans-serif !important}}
table{{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}}
th,td{{padding:.25em .7em;text-align:right;border-bottom:1px solid {grid};white-space:nowrap;vertical-align:top}}
th:nth-child(-n+2),td:nth-child(-n+2){{text-align:left}}
thead th{{border-bottom:2px solid {ink}}}
small{{opacity:.75}} .worse{{color:{worse};font-weight:bold}} .better{{color:{better};font-weight:bold}}
dl{{display:grid;grid-template-columns:max-content 1fr;gap:.2em 1em}} dd{{margin:0}}
"""


def load_all(paths: Sequence[str | Path]) -> list[Row]:
    """The rows of several results files; of the same measurement in two files, the later file's."""
    if not paths:
        raise InputError("no results file given")
    rows = [row for path in paths for row in load_rows(path)]
    latest = {json.dumps([row.model, row.suite, row.metric, row.length, row.depth]): row for row in rows}
    return list(latest.values())
