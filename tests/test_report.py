"""The report says what the rows say, is one self-contained file, and a browser shows it without an error."""

from __future__ import annotations

import html.parser
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import DARK, LIGHT
from PIL import ImageStat
from rich.console import Console

from kernelize.errors import InputError
from kernelize.evaluate import Row, load_rows, save_rows
from kernelize.pictures import PICTURES, SOURCES, _pareto, break_even, crossing, latency_by_length
from kernelize.report import (
    compare,
    load_all,
    rows_table,
    tables,
    write_report,
)


def row(model, metric, length=None, value=1.0, depth=None, spread=0.0, suite="ppl") -> Row:
    low, high = (value - spread, value + spread) if spread else (None, None)
    return Row(model, suite, metric, length, depth, value, low, high, 6)


def model_rows(model: str, factor: float, a_token: int, constant: int) -> list[Row]:
    lengths = (512, 1024, 2048)
    rows = [row(model, "ppl", 2048, 20 * factor, spread=3), row(model, "trained_length", value=1024, suite="model")]
    rows += [row(model, "ppl_at", n, 20 * factor, spread=3) for n in lengths]
    rows += [row(model, "cache_bytes", n, float(constant + a_token * n), suite="memory") for n in lengths]
    for metric in ("passkey", "needle_single"):
        rows += [row(model, metric, n, 0.9 / factor, d, 0.05, "recall") for n in lengths for d in (None, 0.1, 0.9)]
    if model != "teacher":
        rows += [row(model, "ppl_ratio", 2048, factor, spread=0.01)]
        rows += [row(model, "kl_at", n, 0.1 * factor, spread=0.01) for n in lengths]
    rows += [row(model, "ppl_at", n, 5 * factor, spread=0.5, suite="code") for n in lengths]
    return rows


def bench_rows(model: str, a_token: float, constant: float) -> list[Row]:
    return [
        row(model, metric, n, scale * (constant + a_token * n), suite="bench")
        for metric, scale in (("prefill_ms", 8.0), ("decode_ms", 1.0))
        for n in (1024, 4096, 16384)
    ]


def test_batches_are_not_mixed_into_the_picture_of_one_sequence():
    one, many = bench_rows("a", 0.01, 10), [replace(r, suite="bench ×16") for r in bench_rows("a", 0.05, 90)]
    alone, both = (latency_by_length(rows) for rows in (one, one + many))
    assert [list(line.get_ydata()) for line in both.axes[0].lines] == [
        list(line.get_ydata()) for line in alone.axes[0].lines
    ]
    assert latency_by_length(many) is None


def audit_rows(model: str) -> list[Row]:
    parts = {"teacher": 20.0, f"{model}, whole": 21.0, f"{model}, no memory": 24.0, f"{model}, no attention": 4000.0}
    rows = [row(name, "ppl", 2048, ppl, spread=1, suite="audit") for name, ppl in parts.items()]
    rows += [row(name, "kl", 2048, ppl / 20 - 1, suite="audit") for name, ppl in parts.items()]
    rows += [row(name, "passkey", 2048, 10 / ppl, suite="audit") for name, ppl in parts.items()]
    for source in SOURCES:
        rows += [row(f"{model}, whole", f"mass_{source}", None, 0.25, suite="audit")]
    return rows + [
        row(f"{model}, whole", f"mass_{source}_at", edge, 0.125, suite="audit")
        for source in SOURCES[:3]
        for edge in (64, 2**31)
    ]


ROWS = model_rows("kernelized", 1.05, 0, 4096) + model_rows("teacher", 1.0, 16, 0) + model_rows("a<b|c", 1.5, 0, 1024)
ROWS += bench_rows("teacher", 0.01, 10) + bench_rows("kernelized", 0.0, 41) + audit_rows("kernelized")
MODELS = ["teacher", "kernelized", "a<b|c"]


def test_the_teacher_comes_first_and_differences_are_marked():
    models, cells = compare(tables(ROWS)[0])
    assert models == MODELS
    found = cells["ppl", "ppl_at", 512, None]
    assert (found["kernelized"].change, found["kernelized"].verdict) == ("+5.0%", "same")
    assert (found["a<b|c"].change, found["a<b|c"].verdict) == ("+50.0%", "worse")
    assert cells["memory", "cache_bytes", 2048, None]["kernelized"].verdict == "better"
    assert cells["recall", "passkey", 512, 0.1]["a<b|c"].change == "-0.30"
    assert found["teacher"].verdict == ""


def test_the_paired_ratio_decides_where_there_is_one():
    _, cells = compare(ROWS)
    assert cells["ppl", "ppl", 2048, None]["kernelized"].verdict == "worse"  # 1.05 ± 0.01, though 21 ± 3 against 20 ± 3


def test_a_difference_that_does_not_show_is_none():
    _, cells = compare([row("teacher", "ppl_at", 512, 20.0), row("k", "ppl_at", 512, 20.0 - 1e-9)])
    assert (cells["ppl", "ppl_at", 512, None]["k"].change, cells["ppl", "ppl_at", 512, None]["k"].verdict) == (
        "+0.0%",
        "same",
    )


def test_without_a_teacher_nothing_is_compared():
    _, cells = compare([r for r in ROWS if r.model != "teacher"])
    assert {cell.verdict for found in cells.values() for cell in found.values()} == {""}
    with pytest.raises(InputError, match="teacher='nobody' has no rows"):
        compare(ROWS, "nobody")


def test_the_terminal_table_marks_differences():
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(rows_table(tables(ROWS)[0]))
    text = console.export_text()
    assert "21.00 +5.0% ≈" in text
    assert "30.00 +50.0% ▼" in text
    assert re.search(r"ppl_at +│ 512–2k +│ +│ +▁▁▁ +│ +▂▂▂ +│ +███", text)
    assert "10%" not in text
    console.print(rows_table(ROWS, full=True))
    assert "10%" in console.export_text()


def test_break_even_is_where_the_growing_cache_reaches_the_constant_one():
    growing = [row("t", "cache_bytes", n, 16.0 * n) for n in (512, 2048)]
    assert break_even(growing, [row("k", "cache_bytes", n, 4096.0) for n in (512, 2048)]) == 256
    assert break_even([], growing) is None


def test_break_even_in_time_is_where_the_curves_cross():
    slow, fast = ([row(m, "decode_ms", n, v) for n, v in zip((1000, 4000), vs, strict=True)]
                  for m, vs in (("t", (10.0, 40.0)), ("k", (20.0, 20.0))))  # fmt: skip
    assert crossing(slow, fast) == pytest.approx((2000, 20.0))
    assert crossing(fast, slow) is None
    assert crossing(slow, fast[:1]) is None


def test_the_front_is_what_nothing_beats():
    points = [(1, 9.0), (2, 9.0), (2, 5.0), (3, 6.0), (4, 1.0)]
    assert _pareto(points) == [(1, 9.0), (2, 5.0), (4, 1.0)]


def test_parts_of_a_model_stand_in_a_table_of_their_own():
    models, parts = (compare(part)[0] for part in tables(ROWS))
    assert models == MODELS
    assert parts[0] == "teacher"
    assert "kernelized, no memory" in parts


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    extra = {"How to <reproduce>": "kernelize evaluate", "Run": {"seed": 0}}
    return write_report(ROWS, tmp_path_factory.mktemp("report") / "out", extra=extra)


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.targets: list[str] = []

    def handle_starttag(self, tag, attributes):
        self.ids += [value for name, value in attributes if name == "id"]
        self.targets += [value for name, value in attributes if name in ("src", "href", "xlink:href")]


def test_the_page_needs_no_other_file_and_its_ids_are_unique(page):
    text, links = page.read_text(), _Links()
    links.feed(text)
    assert len(set(links.ids)) == len(links.ids)
    assert {target for target in links.targets if not target.startswith("#")} == {"data:,"}
    assert {target[1:] for target in links.targets if target.startswith("#")} <= set(links.ids)
    assert not re.search(r"url\((?!#)", text)


def test_every_picture_is_drawn_in_both_formats(page):
    text = page.read_text()
    for name, (title, _) in PICTURES.items():
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert title in text
        assert f"]({name}.png)" in (page.parent / "report.md").read_text()
    assert text.count("<svg ") == len(PICTURES)


def test_light_and_dark_define_every_colour(page):
    text = page.read_text()
    used = set(re.findall(r"var\((--c\w+)\)", text))
    light, dark = re.findall(r":root\{(.*?)\}", text)
    assert used <= set(re.findall(r"--c\w+", light)) == set(re.findall(r"--c\w+", dark))


def test_names_are_escaped(page):
    assert "a<b" not in page.read_text().replace("a&lt;b", "")
    assert "How to &lt;reproduce&gt;" in page.read_text()
    assert r"a<b\|c" in (page.parent / "report.md").read_text()


def test_the_report_is_the_same_from_its_own_rows_file(page, tmp_path):
    assert load_rows(page.parent / "rows.json") == ROWS
    again = write_report(page.parent / "rows.json", tmp_path, extra={"How to <reproduce>": "kernelize evaluate",
                                                                     "Run": {"seed": 0}})  # fmt: skip
    assert again.read_text() == page.read_text()


def test_pictures_without_rows_are_left_out(tmp_path):
    rows = [row("a", "ppl_at", n, 20.0) for n in (512, 1024)] + [row("a", "kl_at", n, 0.0) for n in (512, 1024)]
    for name in ("memory.png", "mine.png"):  # an earlier report's, and one that is none of a report's
        (tmp_path / name).write_bytes(b"")
    page = write_report(rows, tmp_path)
    assert page.read_text().count("<svg ") == 2
    assert not (tmp_path / "memory.png").exists()
    assert (tmp_path / "mine.png").exists()
    assert "a</b>" in page.read_text()


@pytest.mark.parametrize("rows", [[], "missing.json"])
def test_nothing_to_report_is_an_error(rows, tmp_path):
    with pytest.raises(InputError):
        write_report(rows, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_later_files_win(tmp_path):
    for name, value in (("a", 1.0), ("b", 2.0)):
        save_rows([row("m", "ppl", 512, value)], tmp_path / name)
    assert [r.value for r in load_all([tmp_path / "a", tmp_path / "b"])] == [2.0]


def test_a_browser_shows_the_page_without_an_error_light_and_dark(page, browser):
    shown = [browser.open(page, name, flag) for name, flag in (("light", LIGHT), ("dark", DARK))]
    assert not any(one.console for one in shown)
    light, dark = (ImageStat.Stat(one.grey()) for one in shown)
    assert light.mean[0] > 200 > 60 > dark.mean[0]
    assert min(light.stddev[0], dark.stddev[0]) > 10  # something is drawn
    assert shown[0].document.count("<svg ") == len(PICTURES)


def test_an_error_on_the_page_would_be_seen(browser, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>nothing.here()</script>")
    assert "nothing is not defined" in browser.open(broken, "broken").console[0]
