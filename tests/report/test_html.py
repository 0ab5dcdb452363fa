"""Parts of the report pages: text that comes from users is escaped everywhere."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from fat.report.html import (
    Column,
    Sorted,
    _environment,
    cell,
    command_line,
    embed,
    escape,
    format_number,
    number_cell,
    plot,
    render,
    section,
    short,
    table,
    tiles,
)
from tests.report.fake_runs import HOSTILE

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.text())
def test_escaped_text_is_read_back_and_opens_nothing(text: str) -> None:
    escaped = escape(text)
    assert not re.search(r"[<>\"']", escaped)
    if not re.search("[\0\x1b]", text):
        assert html.unescape(escaped) == text


def test_what_no_page_can_hold_is_taken_out() -> None:
    assert escape("\x1b[31mred\x1b[0m \ud800 a\0b") == "red ? ab"


@given(values)
def test_embedded_data_is_json_and_closes_nothing(content: object) -> None:
    text = embed(content)
    assert not re.search(r"[<>&]", text)
    parsed = json.loads(text, parse_constant=pytest.fail)
    assert json.dumps(parsed, default=str) is not None

    def same(ours: object, theirs: object) -> None:
        if isinstance(ours, dict):
            assert isinstance(theirs, dict)
            for key, value in ours.items():
                same(value, theirs[key])
        elif isinstance(ours, list):
            assert isinstance(theirs, list)
            for a, b in zip(ours, theirs, strict=True):
                same(a, b)
        elif isinstance(ours, float):
            if abs(ours) < 1e300:  # finite, and its rounding, too
                assert theirs == pytest.approx(ours, rel=1e-5)
            elif ours != ours:
                assert theirs is None
        else:
            assert ours == theirs

    same(content, parsed)


@pytest.mark.parametrize(
    ("value", "digits", "wanted"),
    [
        (-0.001, 2, "0.00"),
        (1234567.5, 1, "1\u202f234\u202f567.5"),
        (-3.14159, 3, "−3.142"),
        ("2.5", 1, "2.5"),
        (float("inf"), 1, "–"),
        (True, 1, "–"),
    ],
)
def test_numbers_for_people(value: object, digits: int, wanted: str) -> None:
    assert format_number(value, digits) == wanted
    assert short(1e9) == "1e+09"


def test_cells_are_sorted_by_all_their_digits() -> None:
    assert number_cell(1.23456, 1) == '<td class="n" data-sort="1.23456">1.2</td>'
    assert number_cell(None) == '<td class="n" data-sort="">–</td>'
    assert cell("x", HOSTILE).startswith('<td data-sort="&lt;/script&gt;')


def test_a_hostile_command_stays_in_its_attributes() -> None:
    line = command_line(HOSTILE)
    assert line.count("<") == line.count(">") == 6
    assert html.unescape(re.findall(r'data-copy="([^"]*)"', line)[0]) == HOSTILE
    assert "unknown" in command_line(None)


def test_empty_parts_leave_nothing() -> None:
    assert section("T", caller=lambda: " \n") == tiles([("a", "–", "")]) == ""
    assert "<h2" in section("T", caller=lambda: "x")


def test_a_table_says_what_it_is() -> None:
    text = table("All <runs>", [Column("a"), Column("b", True, "why")], [["1", 1.0]])
    assert '<table id="table-all-runs" data-sortable>' in text
    assert "All &lt;runs&gt;" in text
    assert text.count('<th scope="col"') == text.count("<button") == 2
    assert 'title="why"' in text
    assert '<tr><td>1</td><td class="n" data-sort="1.0">1.00</td></tr>' in text
    still = table("t", [Column("a")], [["1"]], interactive=False)
    assert "<button" not in still
    assert "<input" not in still


def test_cells_may_be_sorted_by_something_else() -> None:
    text = table("t", [Column("a"), Column("b", True, digits=None)], [[Sorted("<x>", 3), "007"]])
    assert '<td data-sort="3">&lt;x&gt;</td><td class="n" data-sort="007">007</td>' in text
    assert '<td class="n" data-sort="">–</td>' in table("t", [Column("b", True, "", None)], [[""]])


def scripts(text: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", text, re.S)


def rendered(body: str, title: str = "t", **context: object) -> str:
    source = '{% extends "page.html.j2" %}{% block main %}{{ body }}{% endblock %}'
    return render(_environment().from_string(source), title=title, body=body, **context)


def test_a_page_allows_its_own_scripts_alone() -> None:
    drawing = rendered(plot({"data": [], "layout": {}}, "none", height=10))
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', drawing)[0]
    assert "default-src 'none'" in policy
    found = scripts(drawing)
    assert len(found) == 2
    assert "plotly.js" in found[0][:200]
    for script in found:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_a_page_that_draws_nothing_is_small() -> None:
    body = Markup("").join(section(title, caller=lambda: "x") for title in "ABC")
    text = rendered(body, "<t>", data=[1])
    assert len(text) < 40_000
    assert "<title>&lt;t&gt;</title>" in text
    assert len(scripts(text)) == 1
    assert re.findall(r"<nav.*?</nav>", text)[0].count("<a ") == 3
    assert '<script type="application/json" id="runs">[1]</script>' in text
