"The dashboard as a widget in JupyterLab: it shows the page, and its button looks again."
from app.lab import HEAD, opened, serving, shoot
from code_monitoring import filled, seeing_bundle


def test_the_widget_shows_the_page_and_its_button_looks_again(tmp_path_factory):
    home = tmp_path_factory.mktemp("lab")
    bundle = seeing_bundle(home / "bundle")
    filled(home, bundle).close()
    code = HEAD + (f"from dlpipe_nb.inference import Predictor, Store, classify\nfrom dlpipe_nb.monitoring import Dashboard\nimport numpy as np\n"
                   f"store, predictor = Store({str(home / 'store.db')!r}), Predictor({str(bundle)!r})\n"
                   "board = Dashboard(store, predictor, every=0, height=500)\n"
                   "classify([('one more.png', np.full((40, 40, 3), 90, np.uint8))], predictor, store)\nboard")
    with serving(home, {"board.ipynb": code}) as lab, opened(lab, "board.ipynb", "iframe[title=Dashboard]") as page:
        inside = page.frame_locator("iframe[title=Dashboard]")
        inside.get_by_role("heading", name="Drift").wait_for()
        assert inside.get_by_text("one more.png").count() == 0
        page.get_by_role("button", name="Look again").click()
        inside.get_by_text("one more.png").first.wait_for()
        page.get_by_role("status").filter(has_text="Looked at").wait_for()
        shoot(page, "dashboard-widget")
