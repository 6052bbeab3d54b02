"""Measured figures are the same wherever they stand: docs/results.md has them, other pages repeat them."""

import re
from pathlib import Path

import pytest
from test_docs import PAGES, prose
from tiny import ROOT

RESULTS = ROOT / "docs" / "results.md"
LINK = re.compile(r"\[([^\]]+)\]\((?:docs/)?results\.md#([\w-]+)\)")
FIGURE = re.compile(r"\d+(?:[.,]\d+)*")
OTHERS = [page for page in PAGES if page != RESULTS]


def section(anchor: str) -> str:
    """What stands below the heading of that anchor."""
    parts = re.split(r"^## (.*)$", prose(RESULTS), flags=re.M)
    anchors = [title.lower().replace(" ", "-") for title in parts[1::2]]
    return parts[2::2][anchors.index(anchor)]


def disagreements(text: str) -> list[str]:
    """What a page repeats otherwise than docs/results.md has it: figures in links to it, and rows of a table
    before which the paragraph has such a link.
    """
    wrong = []
    for label, anchor in LINK.findall(text):
        known = FIGURE.findall(section(anchor))
        wrong += [f"{figure} in [{label}]" for figure in FIGURE.findall(label) if figure not in known]
    for paragraph, table in re.findall(r"^([^|\n]*\n)\n((?:\|.*\n)+)", text, re.M):
        if links := LINK.findall(paragraph):
            known = section(links[-1][1]).splitlines()
            wrong += [row for row in table.splitlines() if row not in known]
    return wrong


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
def test_figures_are_repeated_as_they_are(page):
    assert disagreements(prose(page)) == []


def test_what_differs_is_found():
    row = "| mean of the six (`r_mean`) | 1.1 | 0.9 | 75.1 |"
    same = f"It took [8 minutes](docs/results.md#the-demo).\n\n{row}\n"
    assert disagreements(same) == []
    assert disagreements(same.replace("8 min", "6 min")) == ["6 in [6 minutes]"]
    assert len(disagreements(same.replace("75.1", "74.0"))) == 1


def test_the_readme_repeats_the_table_of_every_task():
    text = prose(ROOT / "README.md")
    rows = [row for row in section("every-task").splitlines() if row.startswith("|")]
    assert len(rows) > 7 and all(row in text for row in rows)
    assert "results.md#the-demo" in text and "results.md#every-task" in text


@pytest.mark.parametrize("file", ["README.md", "docs/demo.md", "Makefile"])
def test_how_long_a_command_takes_is_said_with_a_link(file):
    text = LINK.sub("", Path(ROOT, file).read_text(encoding="utf-8"))
    assert re.findall(r"\d+(?:\.\d+)? (?:minutes|min)\b.*", text) == []
