"""Every notebook as a reader meets it: in JupyterLab, saved on another machine, and so
not trusted, in both themes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from grpo_nb.run.command_line import copy_notebooks

ROOT = Path(__file__).resolve().parents[2]
CHECKS = Path(__file__).with_name("lab.js").read_text(encoding="utf-8")
NOTEBOOKS = sorted(
    path.relative_to(ROOT / "nbs").as_posix()
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
# in dark, a third of the notebooks each time
TURN = int(os.environ.get("GRPO_NB_TURN", time.time() // 86400)) % 3
SHOTS = os.environ.get("GRPO_NB_SCREENSHOTS")
# the whole notebook is there, not only what is in sight; no news, no updates
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
    },
}
# Without a kernel JupyterLab asks a session that is not there, and says that a newer
# Vega-Lite than its own has written a picture.
NO_MATTER = ("reading 'kernel'", "The input spec uses Vega-Lite")


@pytest.fixture(scope="module")
def server_book(tmp_path_factory) -> Path:
    "A copy of the notebooks."
    return copy_notebooks(tmp_path_factory.mktemp("notebooks") / "book")


@pytest.fixture(scope="module")
def server(tmp_path_factory, server_book):
    "JupyterLab with these notebooks, on a machine that has run none of them."
    pytest.importorskip("jupyterlab")
    home = tmp_path_factory.mktemp("home")
    (home / "app").mkdir()
    (home / "app/overrides.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
    folders = {
        f"JUPYTER_{kind}_DIR": str(home / kind.lower())
        for kind in ("DATA", "CONFIG", "RUNTIME")
    }
    log = home / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "jupyterlab",
                "--no-browser",
                "--allow-root",
                "--expose-app-in-browser",
                "--ServerApp.port=0",
                "--IdentityProvider.token=t",
                f"--ServerApp.root_dir={server_book / 'nbs'}",
                f"--LabApp.app_settings_dir={home / 'app'}",
                f"--LabApp.user_settings_dir={home / 'user'}",
                f"--LabApp.workspaces_dir={home / 'workspaces'}",
            ],
            env=os.environ | folders | {"IPYTHONDIR": str(home / "ipython")},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield _address(process, home / "runtime", log)
    finally:
        process.terminate()
        process.wait(30)


def _address(process, runtime: Path, log: Path) -> str:
    "Where the server answers, once it does."
    for _ in range(240):
        time.sleep(0.5)
        if process.poll() is not None:
            break
        for file in runtime.glob("jpserver-*.json"):
            try:
                address = json.loads(file.read_text())["url"]
                urlopen(f"{address}api?token=t")
                return address
            except (URLError, ValueError):
                continue
    raise RuntimeError(log.read_text()[-2000:])


@pytest.fixture(scope="module")
def lab(browser, server):
    "One window with JupyterLab, and the list of what it complains about."
    context = browser.new_context(viewport={"width": 1500, "height": 1000})
    page = context.new_page()
    complaints = []

    def complain(kind: str, text: str):
        if not any(words in text for words in NO_MATTER):
            complaints.append(f"{kind}: {text}")

    page.on(
        "console",
        lambda message: (
            message.type in ("error", "warning") and complain("console", message.text)
        ),
    )
    page.on("pageerror", lambda error: complain("page error", str(error)))
    page.goto(f"{server}lab?token=t")
    page.wait_for_function("window.jupyterapp")
    page.evaluate("() => window.jupyterapp.restored")
    page.evaluate(f"() => {{ window.checks = {CHECKS}; }}")
    yield page, complaints
    context.close()


def change_theme(page, theme: str):
    page.evaluate("(theme) => checks.changeTheme(theme)", theme)
    is_light = str(theme == "Light").lower()
    page.wait_for_function(f"document.body.dataset.jpThemeLight === '{is_light}'")
    # its splash goes a moment later, and is not there twice to be taken away
    page.wait_for_function("!document.getElementById('jupyterlab-splash')")


def wrong(page, checks: list[str]) -> dict[str, list[str]]:
    "What is wrong with the open notebook, by check."
    found = {
        check: page.evaluate(f"() => checks.{check}(notebook)") for check in checks
    }
    return {check: where for check, where in found.items() if where}


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook_is_shown_untrusted(lab, path):
    """Pictures, tables and formulas are there, none of the site's syntax is, and no
    line of code is cut off at a width of 1500 pixels."""
    page, complaints = lab
    complaints.clear()
    change_theme(page, "Light")
    page.evaluate("(path) => checks.open(path, false)", path)
    page.wait_for_function("checks.isDrawn(notebook)")
    page.wait_for_timeout(300)
    trusted = page.evaluate("() => checks.isTrusted(notebook)")
    checks = ["plainText", "rawSyntax", "wideCode", "badPictures", "faintText"]
    found = wrong(page, checks)
    _picture(page, path, "light")
    if NOTEBOOKS.index(path) % 3 == TURN or SHOTS:
        change_theme(page, "Dark")
        if dark := wrong(page, ["badPictures", "faintText"]):
            found["dark"] = dark
        _picture(page, path, "dark")
    page.evaluate("() => checks.close(notebook)")
    assert not trusted
    assert not found
    assert not complaints


# what a run of train takes by default is for a reader's patience, not for a test's
SHORT = "max_steps = 3"


@pytest.mark.parametrize(
    "path",
    [
        "1_figure/05_reference.ipynb",
        "1_figure/09_group.ipynb",
        "1_figure/02_rollout.ipynb",
        "experiments/train.ipynb",
    ],
)
def test_run_all(lab, path):
    """In a fresh kernel each cell runs, and what it shows is shown; in `train` the
    curves are there while it trains."""
    page, complaints = lab
    complaints.clear()
    change_theme(page, "Light")
    page.evaluate("(path) => checks.open(path, true)", path)
    page.wait_for_function("checks.isDrawn(notebook)")
    if path.endswith("train.ipynb"):
        page.evaluate("(text) => checks.appendTo(notebook, 'parameters', text)", SHORT)
    page.evaluate("() => checks.clear(notebook)")
    page.evaluate("() => checks.runAll(notebook)")
    if path.endswith("train.ipynb"):
        page.wait_for_function("progress.pictures > 0", timeout=240_000)
        assert not page.evaluate("progress.done")
    page.wait_for_function("progress.done", timeout=240_000)
    found = wrong(page, ["failures", "plainText", "wideCode", "badPictures"])
    _picture(page, path, "run")
    page.evaluate("() => notebook.sessionContext.shutdown()")
    page.evaluate("() => checks.close(notebook)")
    assert not found
    assert not complaints


def test_the_page_trains_in_a_cell(lab, server_book):
    "What the guide of `live.html` shows in a cell is the page, and it trains there."
    page, complaints = lab
    complaints.clear()
    shutil.copytree(ROOT / "tools", server_book / "tools")
    page.evaluate("() => checks.open('guides/live.ipynb', true)")
    page.wait_for_function("checks.isDrawn(notebook)")
    page.evaluate("() => checks.clear(notebook)")
    page.evaluate("() => checks.append(notebook, 'show([own])')")
    page.evaluate("() => checks.runAll(notebook)")
    page.wait_for_function("progress.done", timeout=240_000)
    failures = wrong(page, ["failures"])
    live = page.frame_locator("iframe[srcdoc]")
    live.locator("#step:enabled").wait_for(timeout=120_000)
    live.locator("#speed").select_option("fast")
    live.locator("#step").click()
    status = live.locator("#status", has_text="Step 1: mean reward")
    status.wait_for(timeout=120_000)
    live.locator("#tab-replay").click()
    runs = live.locator("#run-a option").all_inner_texts()
    page.evaluate("() => notebook.sessionContext.shutdown()")
    page.evaluate("() => checks.close(notebook)")
    assert runs == ["my run"]
    assert not failures
    assert not complaints


def _picture(page, path: str, theme: str):
    "A picture of the whole notebook in GRPO_NB_SCREENSHOTS, if that is set."
    if not SHOTS:
        return
    height = page.evaluate("() => checks.height(notebook)")
    page.set_viewport_size({"width": 1500, "height": min(height + 150, 16000)})
    target = Path(SHOTS) / f"lab-{path.replace('/', '-')}-{theme}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=target)
    page.set_viewport_size({"width": 1500, "height": 1000})
