"""Makes the two pictures of docs/MONITOR.md from a real run.

    python docs/make_screenshots.py

The demo's model is let in step by step on the demo's images, in the drill's rehearsal (a clock that is turned by hand,
late labels), and the room grows darker on the way. The live page is taken while that goes on, in the canary; the
report, after an operator has rolled it back. Needs Chromium and playwright.
"""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
import time
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from torch import Tensor

from normadapt.dashboard_command import server_of
from normadapt.monitor import Recorder, app
from normadapt.monitor.kept import write_report
from normadapt.pilot import Disagreement, LabelledError, NonFinite, Plan, StageRule, VarianceRatio
from normadapt.pilot.faults import Change
from normadapt.pilot.rehearsal import Rehearsal

HERE = Path(__file__).parent
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
WIDTH, LIVE, REPORT = 1280, 1100, 1290


def plan() -> Plan:
    """Shorter stages than the default's."""
    steps = ((0.05, 60), (0.25, 2000), (0.5, 2000))
    return Plan(
        guards=(Disagreement(), LabelledError(), NonFinite(), VarianceRatio()),
        shadow=StageRule(1500, 1800.0),
        canary=tuple(StageRule(items, 1800.0, share=share) for share, items in steps),
        paired_share=0.3,
        label_margin=0.05,
        save_every=160,
    )


def darker(level: float) -> Change:
    """A change of the images: so much contrast is left."""

    def change(images: Tensor) -> Tensor:
        return (images + 1) * level - 1

    return change


def main() -> None:
    """Run, look, and write both pictures."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("no Chromium -> apt-get install chromium")
    torch.set_num_threads(1)
    recorders: list[Recorder] = []
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver, torch.no_grad():
        store = Path(temporary) / "store"
        trial = Rehearsal(store, plan(), 0, None, lambda pilot: recorders.append(Recorder(pilot)))
        made = app(recorders[0], title="USPSNet on the camera of line 3")
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": WIDTH, "height": LIVE}, color_scheme="light")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = server_of(made)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/")
            trial.until(lambda: trial.pilot.position.step == 1, 40_000)
            for place in range(120):
                trial.send(change=darker(1.0 - 0.4 * min(1.0, place / 60)))
            page.wait_for_selector("#map .heatmaplayer image")
            time.sleep(2.0)  # the last look, with the dear parts of it
            page.wait_for_timeout(500)
            page.screenshot(path=HERE / "live-page.png")
            server.should_exit = True
            thread.join(20)
        trial.pilot.rollback("ann", reason="the lamp was changed")
        trial.pilot.close()
        write_report(store, Path(temporary) / "report.html", title="The camera of line 3")
        page.set_viewport_size({"width": WIDTH, "height": REPORT})
        page.goto((Path(temporary) / "report.html").as_uri())
        page.wait_for_selector("#map .heatmaplayer image")
        page.wait_for_timeout(500)
        page.screenshot(path=HERE / "report.png")
        browser.close()
    for name in ("live-page.png", "report.png"):
        print(f"{HERE / name}: {(HERE / name).stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
