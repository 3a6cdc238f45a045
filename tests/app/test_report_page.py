"The report in a real browser: it asks for nothing, fits a phone, shows every picture, and prints."
import pytest

from app.lab import ARGS, CHROMIUM, shoot
from dlpipe_nb.testing import report
from report_runs import EVIL, made

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine: the page is not looked at in a browser")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    run = made(tmp_path_factory.mktemp("page") / "run", labels=EVIL, n=180, names="<img src=x onerror=alert(1)> a very long name of a picture & more" + "x" * 60)
    return report(run)


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright isn't installed: the page is not looked at in a browser")
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield b
        b.close()


@pytest.fixture(scope="module", params=[1200, 380], ids=["wide", "phone"])
def page(request, browser, path):
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    page.asked, page.alarms = [], []
    page.on("request", lambda r: page.asked.append(r.url))
    page.on("dialog", lambda d: (page.alarms.append(d.message), d.dismiss()))
    page.on("console", lambda m: page.alarms.append(m.text) if m.type == "error" else None)
    page.goto(path.as_uri())
    shoot(page, f"report-{request.param}")
    return page


def test_it_asks_for_nothing_but_itself(page, path):
    assert [u for u in page.asked if not u.startswith("data:")] == [path.as_uri()] and page.alarms == []


def test_nothing_sticks_out(page):
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    out = page.evaluate("[...document.querySelectorAll('main *')].filter(e => !e.closest('.wide') && e.getBoundingClientRect().right > window.innerWidth + 1)"
                        ".map(e => e.outerHTML.slice(0, 80))")
    assert out == []


def test_every_picture_is_there_and_described(page):
    found = page.evaluate("[...document.images].map(i => [i.naturalWidth > 0, i.alt, i.src.slice(0, 11)])")
    assert len(found) > 30 and all(there and alt and src == "data:image/" for there, alt, src in found)


def test_names_are_text_and_not_code(page):
    assert page.locator("script").count() == 0 and page.locator("img[src=x]").count() == 0
    assert page.locator("figcaption", has_text="<b>cat</b>").count() and page.locator("small", has_text="<img src=x").count()


def test_the_headings_lead_through_the_page(page):
    assert page.locator("h1").all_inner_texts() == ["Test report"]
    assert page.locator("h2").all_inner_texts() == ["Training", "Inference", "What to do next"]
    for link in page.locator("a").all():
        assert page.locator(f"[id='{link.get_attribute('href')[1:]}']").count() == 1, link
    assert page.locator("details[open]").count() == 0, "the code is folded away"


def test_letters_are_large_enough_and_dark_on_light(page):
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    small = page.evaluate("[...document.querySelectorAll('main *')].filter(e => e.childNodes.length && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())"
                          " && parseFloat(getComputedStyle(e).fontSize) < 11).map(e => e.outerHTML.slice(0, 60))")
    assert small == []


def test_it_prints(browser, path):
    page = browser.new_page()
    page.goto(path.as_uri())
    page.emulate_media(media="print")
    assert page.locator(".input").first.is_hidden() and page.locator(".verdict").is_visible()
    assert page.pdf(format="A4").startswith(b"%PDF")
