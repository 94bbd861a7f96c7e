"""What a report is written as: safe, whole, in two languages, without the network."""

import re
import subprocess
import xml.dom.minidom
from pathlib import Path

import pytest

from clusters.safe.reading import printable
from orchestrator.report import plots
from orchestrator.report.blocks import Code, Facts, Figure, Paragraph, Report, SampleOutput, Table
from orchestrator.report.html import html
from orchestrator.report.markdown import write_markdown
from tests.browser import needs_chromium

FOLDER = Path(__file__).resolve().parents[3] / "orchestrator" / "report"
FIGURES = {
    "curves": lambda: plots.curves({"a": [(1, 2.0), (2, 1.0)], "b": [(0, 3.0)]}, "step", "loss", ("b",), log=True),
    "stacked": lambda: plots.stacked({"card (pc)": {"weights": 1.0, "重み": 2.0}}, "GiB", {"card (pc)": 2.5}),
    "bars": lambda: plots.bars({"exact_match": {"before": 0.0, "after": 0.9}}, "", percent=True),
    "stages": lambda: plots.stage_timelines(
        {"predicted": {"stage 0": {"forward": [(0.0, 1.0, "0")], "waits": [(1.0, 2.0, "")]}}}, "seconds"
    ),
    "rates": lambda: plots.rates({"a": [(1, 2.0, 1.0, 3.0), (8, 5.0, 5.0, 5.0)], "b": [(1, 3.0, 3.0, 3.0)]}, "x", "y"),
    "scatter": lambda: plots.scatter({"x": [(1.0, 2.0, "1")], "y": []}, "a", "b", [(1.0, 2.0)], diagonal=True),
}


def a_report(lang="en"):
    report = Report("name", "run <1> & co", lang)
    report.section(
        "Everything",
        Facts([("tokens/s", "100")]),
        Paragraph("<script>alert(1)</script>"),
        Table(("a|b", "c"), [("1", "2|3"), ("x", "y")], (1,)),
        Code("python -m orchestrator"),
        SampleOutput("prompt", None, "out", "wanted"),
        None,
        *(Figure(name, draw(), "caption") for name, draw in FIGURES.items()),
    )
    report.section("Nothing", None)
    return report


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_a_figure_is_svg_in_the_pages_own_colours(name):
    svg = FIGURES[name]()

    document = xml.dom.minidom.parseString(svg)
    assert document.documentElement.tagName == "svg" and document.documentElement.getAttribute("viewBox")
    assert "currentColor" in svg and "#010203" not in svg
    assert svg == FIGURES[name]()  # the same data, the same bytes


@pytest.mark.parametrize("lang", ["en", "ja"])
def test_a_page_needs_nothing_from_elsewhere_and_runs_nothing(lang):
    page = html(a_report(lang))

    assert "<script" not in page and "&lt;script&gt;" in page
    outside = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', page)
    assert outside == []
    assert not re.search(r"url\((?!#)", page)
    assert f'lang="{lang}"' in page
    assert "Nothing" not in page  # a section without blocks


def test_every_kind_of_block_is_in_the_page():
    page = html(a_report())

    for text in ("tokens/s", "100", "&lt;script&gt;alert(1)", "2|3", "python -m orchestrator", "out", "wanted"):
        assert f">{text}<" in page or f">{text}&" in page, text
    assert page.count("<figcaption>caption</figcaption>") == len(FIGURES)


def test_no_name_stands_twice_in_a_page():
    page = html(a_report())

    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names)) > 10
    used = set(re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', page))
    assert used <= set(names)


def test_markdown_has_the_figures_beside_it(tmp_path):
    write_markdown(a_report(), tmp_path / "report.md")

    text = (tmp_path / "report.md").read_text()
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert len(linked) == len(FIGURES) and all((tmp_path / file).is_file() for file in linked)
    assert "| 1 | 2\\|3 |" in text and "| **x** | **y** |" in text


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [1200, 400])
def test_a_browser_shows_it_without_complaints(tmp_path, width):
    file = tmp_path / "report.html"
    file.write_text(html(a_report("ja")), encoding="utf-8")
    probe = (
        "<script>document.title = [document.querySelectorAll('figure svg').length,"
        " [...document.querySelectorAll('figure svg')].every(svg => svg.getBoundingClientRect().height > 50),"
        " document.documentElement.scrollWidth <= window.innerWidth].join()</script></body>"
    )
    (tmp_path / "probed.html").write_text(file.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}"),
        *("--enable-logging=stderr", f"--window-size={width},1000", "--dump-dom"),
    ]

    shown = subprocess.run(
        ["chromium", *flags, (tmp_path / "probed.html").as_uri()], capture_output=True, text=True, timeout=600
    )

    assert "CONSOLE" not in shown.stderr
    title = re.search(r"<title>([^<]*)</title>", shown.stdout)
    assert title and title[1] == f"{len(FIGURES)},true,true"


HOSTILE = [
    "[bold]name[/bold] [/nope]",
    "$x_1$ costs $5",
    "\x1b[31mred\x1b[0m\x07",
    "a|b `code` *x* _y_ <img src=x onerror=alert(1)>",
    "line one\nline two\r\n# title\n- item",
    "]( javascript:alert(1) )![x](y)",
    "\u202eright to left",
    "--- \ufeff&amp; \\",
    "1. one",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_names_and_outputs_are_shown_in_markdown_as_they_are(text, tmp_path):
    from markdown_it import MarkdownIt

    report = Report(text, text, "en")
    report.section(
        "Everything",
        Facts([("name", text)]),
        Paragraph(text),
        Table(("a", text), [("1", text)], (0,)),
        Code(f"{text}\n```\nmore"),
        SampleOutput(text, text, text, text),
    )

    write_markdown(report, tmp_path / "report.md")

    page = (tmp_path / "report.md").read_text()
    assert not any(ord(c) < 32 and c != "\n" for c in page) and "\u202e" not in page
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(page)
    inside = [child for token in tokens for child in token.children or []]
    kinds = {token.type for token in [*tokens, *inside]}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "em_open", "code_inline", "hr"}
    assert sum(token.type == "heading_open" for token in tokens) == 2
    assert sum(token.type == "fence" for token in tokens) == 1
    assert sum(token.type == "td_open" for token in tokens) == 2
    shown = "".join(child.content for token in tokens for child in token.children or [] if child.type == "text")
    plain = printable(" ".join(text.split()))
    assert shown.count(plain) >= 8


def test_names_and_outputs_reach_no_page_and_no_picture_as_markup():
    groups, first = {text: {"before\x1b": 1.0, "after$": 2.0} for text in HOSTILE}, HOSTILE[0]
    figures = [
        plots.bars(groups, first),
        plots.stacked(groups, first, dict.fromkeys(HOSTILE, 1.5)),
        plots.curves({text: [(1, 2.0), (2, 0.01)] for text in HOSTILE}, first, first, HOSTILE, log=True),
        plots.rates({text: [(1, 2.0, 3.0, 1.0)] for text in HOSTILE}, first, first),
        plots.scatter({"x": [(1.0, 2.0, text) for text in HOSTILE], "b": []}, "\x1b", first),
    ]
    report = Report(first, first, "en")
    for text in HOSTILE:
        report.section(text, Table((text,), [(text,)]), Code(text), Facts([(text, text)]), SampleOutput(*[text] * 4))
    report.section("Figures", *(Figure("f", svg, text) for svg, text in zip(figures, HOSTILE, strict=False)))

    page = html(report)

    assert not any(ord(c) < 32 and c != "\n" for c in page) and "\u202e" not in page
    assert "<img" not in page and "mathdefault" not in page
    for svg in figures:
        drawn = " ".join(words_in(svg))
        assert all(printable(text).strip() in drawn for text in HOSTILE)


def words_in(svg):
    elements = xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    return [element.firstChild.data for element in elements if element.firstChild]


def test_a_log_axis_is_labelled_in_plain_numbers():
    svg = plots.curves({"a": [(1, 20.0), (2, 0.01)]}, "step", "loss", log=True)

    assert {"0.01", "0.1", "1", "10"} <= set(words_in(svg))
