"""Chapter 01's cost explorer, as a person uses it: JupyterLab and a real Chromium, sliders moved by key and by mouse."""
from __future__ import annotations

import re

import pytest

from app.lab import HEAD, opened, serving, shoot

NOTEBOOK = HEAD + """\
from dlpipe_nb.problem import CostExplorer, Problem
careful, accurate = [[550, 70], [10, 370]], [[595, 25], [35, 345]]
explorer = CostExplorer({"careful": careful, "accurate": accurate}, Problem("?", ("cat", "dog"), costs={"dog": {"cat": 10}}))
explorer"""
SEEN = "print(explorer.winner, explorer.costs['dog']['cat'], explorer.costs['cat']['dog'])"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("lab"), {"costs.ipynb": [NOTEBOOK, SEEN]}) as lab: yield lab


@pytest.fixture(scope="module")
def page(lab):
    with opened(lab, "costs.ipynb", ".dlp-verdict") as page: yield page


def slider(page, error): return page.locator(".dlp-explorer .widget-slider", has=page.get_by_text(f"a {error} costs", exact=True))
def handle(page, error): return slider(page, error).locator(".noUi-handle")
def said(page): return page.locator(".dlp-explorer [role=status]").inner_text()


def wait_for(page, words): page.locator(".dlp-explorer [role=status]", has_text=re.compile(words)).wait_for()


@pytest.mark.timeout(240)
def test_the_arrow_keys_move_a_cost_and_the_winner_changes(page):
    wait_for(page, "careful costs less: 0.17 on average, accurate 0.375. Break-even for a dog called cat: it is 1.8")
    shoot(page, "costs 1 careful")
    h = handle(page, "dog called cat")
    h.focus()
    page.keyboard.press("Home")
    wait_for(page, "accurate costs less")
    page.keyboard.press("ArrowRight")
    wait_for(page, "accurate costs less: 0.0285 on average, careful 0.071")
    shoot(page, "costs 2 accurate")
    page.keyboard.press("End")
    wait_for(page, "careful costs less: 0.27")
    assert page.locator("table.dlp-wins caption").inner_text() == "careful ✓"


@pytest.mark.timeout(120)
def test_a_typed_number_is_taken(page):
    readout = slider(page, "dog called cat").locator(".widget-readout")
    readout.click()
    page.keyboard.press("Control+a")
    page.keyboard.type("1.8")
    page.keyboard.press("Enter")
    wait_for(page, "Both cost the same: 0.088")
    assert page.locator("table.dlp-wins").count() == 0


@pytest.mark.timeout(120)
def test_the_mouse_moves_the_other_cost_and_the_picture_turns_to_it(page):
    track = slider(page, "cat called dog").locator(".noUi-target").bounding_box()
    page.mouse.click(track["x"] + .5 * track["width"], track["y"] + track["height"] / 2)
    wait_for(page, "Break-even for a cat called dog")
    assert "accurate costs less" in said(page)
    picture = page.locator(".dlp-explorer svg")
    assert "against the cost of a cat called dog" in picture.get_attribute("aria-label")
    shoot(page, "costs 3 other error")
    picture.scroll_into_view_if_needed()
    shoot(page, "costs 4 picture")


@pytest.mark.timeout(120)
def test_python_sees_what_was_set(page):
    page.locator(".jp-Notebook .jp-CodeCell").nth(1).locator(".cm-content").click()
    page.keyboard.press("Control+Enter")
    page.locator(".jp-OutputArea-output", has_text=re.compile(r"accurate 1\.8 (9\.\d|10\.\d)")).wait_for()


@pytest.mark.timeout(120)
def test_it_can_be_read_from_afar_and_fits_a_phone(page):
    sizes = page.locator(".dlp-explorer").evaluate(
        "e => [...e.querySelectorAll('.dlp-verdict, td, th, .widget-label, .widget-readout')].map(x => parseFloat(getComputedStyle(x).fontSize))")
    assert sizes and min(sizes) >= 18
    for error in ("dog called cat", "cat called dog"):
        assert slider(page, error).locator(".widget-label").inner_text() == f"a {error} costs"
        assert handle(page, error).get_attribute("tabindex") == "0" and handle(page, error).get_attribute("role") == "slider"
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    page.locator(".dlp-explorer").scroll_into_view_if_needed()
    shoot(page, "costs 5 phone")
    assert page.locator(".dlp-explorer").evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the explorer is wider than the window"
    page.set_viewport_size({"width": 1280, "height": 1000})
