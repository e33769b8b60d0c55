"The browser, the site and its pages, for the tests in this folder."

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def find_browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("GRPO_NB_BROWSER") or next(
        filter(None, map(shutil.which, names)), None
    )
    return found or pytest.skip(
        f"no browser: none of {', '.join(names)} is on PATH, and GRPO_NB_BROWSER is "
        "not set"
    )


@pytest.fixture(scope="session")
def browser():
    sync_api = pytest.importorskip(
        "playwright.sync_api",
        reason="playwright is missing (`make browser` installs it)",
    )
    executable = find_browser()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--hide-scrollbars"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def site(browser, tmp_path_factory) -> Path:
    "The site of GRPO_NB_SITE, else one built now."
    if given := os.environ.get("GRPO_NB_SITE"):
        return (ROOT / given).resolve()
    folder = tmp_path_factory.mktemp("built") / "site"
    subprocess.run(
        [
            sys.executable,
            ROOT / "tools/build_docs.py",
            "--engine",
            "smalldocs",
            "--output",
            folder,
        ],
        check=True,
    )
    return folder


@pytest.fixture
def open_page(browser, site):
    """Opens pages, as many as one likes, in one window; what it complains about is
    in `complaints`, and must be nothing at the end."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    complaints = []

    def guard(route):
        if route.request.url.startswith(("file:", "data:", "blob:")):
            return route.continue_()
        complaints.append(f"request to {route.request.url}")
        route.abort()

    context.route("**/*", guard)
    window = context.new_page()
    window.emulate_media(reduced_motion="reduce")
    window.on(
        "console",
        lambda message: (
            message.type in ("error", "warning")
            and complaints.append(f"console: {message.text}")
        ),
    )
    window.on("pageerror", lambda error: complaints.append(f"page error: {error}"))
    window.on(
        "requestfailed", lambda request: complaints.append(f"not loaded: {request.url}")
    )

    def go(name: str):
        window.goto((site / name).as_uri(), wait_until="load")
        return window

    yield go
    context.close()
    assert not complaints, "\n".join(complaints)
