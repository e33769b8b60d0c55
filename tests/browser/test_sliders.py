"""The interactive pictures in a real browser: a slider is moved, and the numbers on
the page become those of the library.

What the specifications compute is tested without a browser in
tests/test_pictures.py; here are the scripts of the site."""

import pytest
import torch

from grpo_nb.gae import gae
from grpo_nb.group import group_advantages

PAGES = {
    "figure/group.html": 7,
    "figure/gae.html": 3,
    "figure/objective.html": 2,
    "figure/reference.html": 1,
}  # sliders
MOVE = """([name, value]) => {
  const label = [...document.querySelectorAll(".vega-bind label")].find((label) => label.firstChild.textContent === name);
  const slider = label.querySelector("input");
  slider.value = value;
  slider.dispatchEvent(new Event("input"));
  return document.querySelector(".interactive").view.runAsync().then(() => label.lastChild.textContent);
}"""
NUMBERS = """(key) => [...document.querySelectorAll(".interactive svg .mark-rect [aria-label]")].map((mark) => mark.getAttribute("aria-label"))
  .filter((label) => label.includes(`; ${key}: `)).map((label) => Number(label.split(`; ${key}: `)[1].replace("−", "-")))"""


def opened(go, page):
    window = go(page)
    window.wait_for_selector(".interactive svg[role=img]")
    return window


@pytest.mark.parametrize("page", PAGES)
def test_a_picture_is_alive_and_fits_a_telephone(open_page, page):
    window = opened(open_page, page)
    assert window.locator(".vega-bind input").count() == PAGES[page]
    assert not window.locator(
        "details:has(summary svg)"
    ).count()  # no menu that would open another site
    window.set_viewport_size({"width": 390, "height": 800})
    box = window.locator(".interactive svg").bounding_box()
    assert box["width"] > 300 and box["x"] + box["width"] <= 390


def test_only_pages_with_a_picture_load_the_scripts(site):
    loading = {
        page.relative_to(site).as_posix()
        for page in site.rglob("*.html")
        if "vega.min.js" in page.read_text()
    }
    assert loading == set(PAGES)


def test_moved_rewards_give_the_advantages_of_the_library(open_page):
    window = opened(open_page, "figure/group.html")
    for name, value in [("r2", 0.45), ("r6", 0.8), ("V", 0.25)]:
        assert float(window.evaluate(MOVE, [name, value])) == value
    r = torch.tensor([1, 0.45, 0, 1, 0, 0.8], dtype=torch.float64)
    assert window.evaluate(NUMBERS, "grpo") == pytest.approx(
        group_advantages(r, 6).tolist(), abs=1e-9
    )
    assert window.evaluate(NUMBERS, "dr_grpo") == pytest.approx(
        group_advantages(r, 6, "none").tolist(), abs=1e-9
    )
    assert window.evaluate(NUMBERS, "ppo") == pytest.approx(
        (r - 0.25).tolist(), abs=1e-9
    )


def test_moved_lambda_gives_the_advantages_of_the_library(open_page):
    window = opened(open_page, "figure/gae.html")
    V = torch.tensor(
        [window.evaluate(NUMBERS, "R")], dtype=torch.float64
    ) - torch.tensor([window.evaluate(NUMBERS, "A")], dtype=torch.float64)
    for name, value in [("λ", 0.6), ("γ", 0.9)]:
        window.evaluate(MOVE, [name, value])
    A, R = gae(
        torch.tensor([[0.0] * 7 + [1.0]], dtype=torch.float64),
        V,
        torch.ones(1, 8, dtype=torch.bool),
        0.9,
        0.6,
    )
    assert window.evaluate(NUMBERS, "A") == pytest.approx(A[0].tolist(), abs=1e-9)
    assert window.evaluate(NUMBERS, "R") == pytest.approx(R[0].tolist(), abs=1e-9)
