"""The built site in a real browser, opened from its files with the network cut off.

make browser                              # sets up what is needed GRPO_NB_SITE=docs
pytest tests/browser    # a site that is already built
GRPO_NB_SCREENSHOTS=screenshots pytest tests/browser    # also writes a picture of
every page, width and theme"""

import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = (Path(__file__).parent / "checks.js").read_text()
sys.path.insert(0, str(ROOT / "tools"))
from build_docs import page_name

NOTEBOOKS = [
    p.relative_to(ROOT / "nbs") for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
]
PAGES = [
    page_name(p.as_posix()).replace(".ipynb", ".html")
    for p in NOTEBOOKS
    if ".ipynb_checkpoints" not in p.parts
]
PAGES.append("live.html")  # made by tools/build_live.py
WIDTHS = [390, 820, 1440]
THEMES = ["light", "dark"]
DARK = "document.documentElement.classList.contains('quarto-dark')"


def screenshot(window, name: str, width: int, theme: str) -> None:
    if not (folder := os.environ.get("GRPO_NB_SCREENSHOTS")):
        return
    path = (
        ROOT
        / folder
        / f"{width}-{theme}"
        / name.replace("/", "-").replace(".html", ".png")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    window.screenshot(path=path, full_page=True, animations="disabled")


def test_every_notebook_has_its_page_and_no_page_is_left_over(site):
    assert sorted(
        p.relative_to(site).as_posix() for p in site.rglob("*.html")
    ) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_page(open_page, name):
    """Mathematics is set, pictures load and have a text; in every width and theme
    nothing sticks out and all can be read."""
    window = open_page(name)
    assert window.evaluate(f"{CHECKS}.rawMath()") == []
    assert window.evaluate(f"{CHECKS}.mutePictures()") == []
    for theme in THEMES:
        window.emulate_media(color_scheme=theme)
        window.wait_for_function(f"{DARK} === {'true' if theme == 'dark' else 'false'}")
        assert window.evaluate(f"{CHECKS}.faintText()") == {}, theme
        for width in WIDTHS:
            window.set_viewport_size({"width": width, "height": 900})
            window.evaluate(
                "() => new Promise((done) => requestAnimationFrame(() => "
                "requestAnimationFrame(done)))"
            )
            assert window.evaluate(f"{CHECKS}.sticksOut()") == [], (
                f"{width} px, {theme}"
            )
            screenshot(window, name, width, theme)


@pytest.mark.parametrize("width", [1440, 390])
def test_search_finds_a_function_and_leads_to_it(open_page, width):
    window = open_page("index.html")
    window.set_viewport_size({"width": width, "height": 900})
    if width < 992:
        window.get_by_label("Toggle navigation").click()
    window.get_by_label("Search").first.fill("group_advantages")
    hit = window.locator(".search-result").first
    hit.wait_for()
    box = window.locator(".smalldocs-search-results").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width, (
        "the results stick out of the window"
    )
    assert "group_advantages" in hit.inner_text()
    hit.click()
    window.wait_for_url(re.compile(r"/group\.html"))
    assert window.locator("[data-anchor-id=group_advantages]").is_visible()


def test_boxes_of_the_figure_lead_to_their_chapters(open_page, site):
    window = open_page("index.html")
    links = window.evaluate(
        "[...document.querySelectorAll('main svg[role=img] a')].map((a) => "
        "a.href.baseVal)"
    )
    assert len(set(links)) >= 8
    for link in sorted(set(links)):
        page, _, anchor = link.partition("#")
        assert (site / page).is_file(), link
        window = open_page(page)
        if anchor:
            assert window.evaluate("(id) => !!document.getElementById(id)", anchor), (
                link
            )


def test_dark_mode_is_remembered(open_page):
    window = open_page("index.html")
    assert not window.evaluate(DARK)
    window.locator(".quarto-color-scheme-toggle").click()
    window.wait_for_function(DARK)
    for name in ("figure/gae.html", "experiments/train.html", "index.html"):
        window = open_page(name)
        window.wait_for_function(DARK)
        background = window.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(map(int, re.findall(r"\d+", background)[:3])) < 80
    window.locator(".quarto-color-scheme-toggle").click()
    window.wait_for_function("!" + DARK)


def test_folded_answers_unfold(open_page):
    window = open_page("figure/gae.html")
    answer = window.locator(
        "details", has=window.get_by_text("Answer", exact=True)
    ).nth(1)
    assert not answer.locator(".katex").first.is_visible()
    answer.locator("summary").click()
    assert answer.locator(".katex").first.is_visible()
