"""Take the screenshots of the service's pages in docs/images, of real runs.

python docs/screenshots.py BUNDLE          (needs Chromium, as the tests do)
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import typer
from playwright.sync_api import sync_playwright

from grace_opt.service.client import Client

IMAGES = Path(__file__).parent / "images"
PORT = "8766"
PAGES = {
    "service-runs": ("/", 520),
    "service-run": ("/runs/1", 2500),
    "service-head": ("/runs/1/heads/{head}", 1500),
    "service-compare": ("/compare?run=1&run=2", 1500),
}


def main(bundle: Path) -> None:
    """Run a service, give it two runs, look at its pages."""
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory() as data:
        server = subprocess.Popen([sys.executable, "-m", "grace_opt", "serve", "--data", data, "--port", PORT, "-q"])
        try:
            while True:
                try:
                    httpx.get(f"{url}/healthz").raise_for_status()
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
            with Client(url) as client:
                digest = client.upload(bundle).digest
                solvers = ["independent", "greedy", "spectral", "local-search", "branch-and-bound"]
                first = client.submit(digest, solvers, [0.6], name="five solvers")
                second = client.submit(
                    digest, {"greedy": {"direction": "backward"}}, [0.6], limits={"time_limit": 10}, name="backward"
                )
                for run in (first, second):
                    client.wait(run.id)
                heads = client.records(first.id, sort="time", descending="true")
            _shoot(url, heads[0]["problem"])
        finally:
            server.terminate()
            server.wait()


def _shoot(url: str, head: str) -> None:
    chromium = os.environ.get("GRACE_OPT_CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, (path, height) in PAGES.items():
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url + path.format(head=head))
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(1000)
            page.set_viewport_size({"width": 1280, "height": height})
            page.wait_for_timeout(500)
            page.screenshot(path=IMAGES / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    typer.run(main)
