"The monitoring page in a real browser: it asks for nothing, fits a phone, and follows light and dark."
from __future__ import annotations

import pytest

from app.lab import ARGS, CHROMIUM, shoot
from code_monitoring import filled, seeing_bundle
from dlpipe_nb.inference import Rule
from dlpipe_nb.monitoring import alert, monitor, write_dashboard

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: the page is not looked at in a browser")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    bundle = seeing_bundle(folder / "bundle")
    store = filled(folder, bundle, dark=True)
    alert(monitor(store, bundle), store, [Rule("caretaker", lambda p: True, lambda p: None)])
    return write_dashboard(store, bundle, folder / "page.html")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: the page is not looked at in a browser")
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.fixture(scope="module", params=[(1200, "light"), (380, "light"), (1200, "dark"), (380, "dark")], ids=lambda v: f"{v[0]}-{v[1]}")
def page(request, browser, path):
    width, theme = request.param
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    page.asked, page.alarms, page.theme = [], [], theme
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("dialog", lambda d: (page.alarms.append(d.message), d.dismiss()))
    page.on("console", lambda m: page.alarms.append(m.text) if m.type == "error" else None)
    page.goto(path.as_uri())
    page.set_viewport_size({"width": width, "height": page.evaluate("document.documentElement.scrollHeight")})
    shoot(page, f"dashboard-{width}-{theme}")
    yield page
    page.close()


def test_it_asks_for_nothing_and_runs_nothing(page, path):
    assert [u for u in page.asked if not u.startswith("data:")] == [path.as_uri()] and page.alarms == []
    assert page.locator("script").count() == 0 and page.locator("img[src=x]").count() == 0


def test_nothing_sticks_out(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    out = page.evaluate("[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && !e.closest('svg') && "
                        "e.getBoundingClientRect().right > window.innerWidth + 1).map(e => e.outerHTML.slice(0, 80))")
    assert out == []


def test_pictures_and_shapes_are_there_and_described(page):
    found = page.evaluate("[...document.images].map(i => [i.naturalWidth > 0, i.alt])")
    assert len(found) >= 20 and all(there and alt for there, alt in found)
    assert page.locator("svg").count() >= 6 and all(s.get_attribute("aria-label") for s in page.locator("svg").all())


def test_headings_tables_and_regions_lead_through_it(page):
    assert page.locator("h1").count() == 1
    assert page.locator("h2").all_inner_texts() == ["Drift", "Accuracy", "Week by week", "Alarms", "Pictures to look at", "Couldn't be read"]
    for table in page.locator("table").all():
        assert table.locator("caption").count() == 1 and table.locator("th[scope=col]").count() > 2
    for region in page.locator("[role=region]").all(): assert region.get_attribute("tabindex") == "0" and region.get_attribute("aria-label")


CONTRAST = """(() => {
  const light = c => { const v = c.match(/[\\d.]+/g).slice(0, 3).map(x => (x /= 255) <= .03928 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4);
                       return .2126 * v[0] + .7152 * v[1] + .0722 * v[2]; };
  const behind = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c != 'rgba(0, 0, 0, 0)') return c; } };
  const bad = [];
  for (const e of document.querySelectorAll('main *')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    const s = getComputedStyle(e), svg = e.closest('svg'), a = light(svg ? s.fill : s.color), b = light(behind(e));
    if ((Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5 || (!svg && parseFloat(s.fontSize) < 11)) bad.push(e.outerHTML.slice(0, 80));
  }
  return bad;
})()"""


def test_letters_can_be_read_in_both_themes(page):
    assert page.evaluate(CONTRAST) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (page.theme == "dark")
