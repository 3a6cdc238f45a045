"""Chapter 05's live plot and stop button, as a person uses them: JupyterLab and a real Chromium, a click while the cell runs."""
from __future__ import annotations

import re

import pytest

from app.lab import HEAD, opened, serving, shoot

#: Noise with labels, so that there is nothing to wait for but the training itself.
WATCH = HEAD + """\
import torch
torch.set_num_threads(1)
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from dlpipe_nb.training import TrainingWatch, train
torch.manual_seed(0)
data = [(torch.randn(3, 32, 32) + n % 2, n % 2) for n in range(64)]
made = DataLoader(data, bs=8, shuffle=True, num_workers=0)
dls = DataLoaders(made, made.new(shuffle=False), device="cpu")
dls.train.vocab = dls.valid.vocab = ["cat", "dog"]
watch = TrainingWatch()
watch"""
TRAIN = """\
import time
def slowly():
    time.sleep(0.05)
    return False
learn = train(dls, "small4", False, epochs=EPOCHS, precision="fp32", device="cpu", watch=watch, stop=slowly)
print("record:", learn.record["stopped"], len(learn.record["history"]))"""
EPOCHS = 200      # at 20 batches a second far longer than any test waits


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    long, short = (TRAIN.replace("EPOCHS", str(n)) for n in (EPOCHS, 2))
    with serving(tmp_path_factory.mktemp("lab"), {"click.ipynb": [WATCH, long], "interrupt.ipynb": [WATCH, long],
                                                  "whole.ipynb": [WATCH, short]}) as lab: yield lab


def wait_for(page, words): page.locator(".dlp-watch [role=status]", has_text=re.compile(words)).wait_for(timeout=60_000)
def record(page):
    "What the training's record says of its stop, once the cell has ended."
    page.locator(".jp-OutputArea-output", has_text="record:").last.wait_for()
    return page.locator(".jp-OutputArea-output", has_text="record:").last.inner_text()


@pytest.mark.timeout(240)
def test_a_click_while_the_cell_runs_stops_it_and_keeps_the_best(lab):
    with opened(lab, "click.ipynb", ".dlp-watch") as page:
        button = page.get_by_role("button", name="Stop and keep the best")
        wait_for(page, rf"Epoch [2-9]\d* of {EPOCHS}: \d+")
        assert button.is_enabled() and page.locator(".dlp-watch polyline").get_attribute("points")
        assert page.locator(".dlp-watch circle").count() >= 2
        shoot(page, "training 1 live")
        button.click()
        wait_for(page, r"Stopped after epoch \d+ \(as asked\); epoch \d+ is kept: \d+\.\d% of the validation pictures right")
        said = re.search(r"'after': (\d+), 'kept': (\d+), 'why': 'as asked'\} (\d+)", record(page))
        assert said and int(said[2]) <= int(said[1]) == int(said[3]) < EPOCHS
        assert button.is_disabled()
        shoot(page, "training 2 stopped")
        assert page.locator(".dlp-watch").evaluate("e => e.scrollWidth <= e.clientWidth + 1")
        sizes = page.locator(".dlp-watch").evaluate("e => [...e.querySelectorAll('p, button')].map(x => parseFloat(getComputedStyle(x).fontSize))")
        assert min(sizes) >= 18
        page.set_viewport_size({"width": 390, "height": 844})
        page.wait_for_timeout(500)
        shoot(page, "training 3 phone")
        assert page.locator(".dlp-watch").evaluate("e => e.scrollWidth <= e.clientWidth + 1"), "the watch is wider than the window"


@pytest.mark.timeout(240)
def test_jupyters_own_stop_ends_it_cleanly_too(lab):
    with opened(lab, "interrupt.ipynb", ".dlp-watch") as page:
        wait_for(page, rf"Epoch [2-9]\d* of {EPOCHS}: \d+")
        page.locator('[data-command="notebook:interrupt-kernel"], jp-button[data-command="notebook:interrupt-kernel"]').first.click()
        wait_for(page, r"Stopped after epoch \d+ \(as asked\); epoch \d+ is kept")
        assert "as asked" in record(page)
        assert page.locator(".jp-OutputArea-output", has_text="KeyboardInterrupt").count() == 0


@pytest.mark.timeout(120)
def test_left_alone_it_says_how_it_ended(lab):
    with opened(lab, "whole.ipynb", ".dlp-watch") as page:
        wait_for(page, r"Finished after 2 epochs and \d+ s: \d+\.\d% of the validation pictures right")
        assert "None 2" in record(page)
        assert page.locator(".dlp-watch svg").get_attribute("aria-label").startswith("The loss so far: training 0")
        assert page.get_by_role("button", name="Stop and keep the best").is_disabled()
