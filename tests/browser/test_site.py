"""The built site in a real browser, opened from its files with the network cut off.

    make browser                              # sets up what is needed
    GRPO_NB_SITE=docs pytest tests/browser    # a site that is already built
    GRPO_NB_SCREENSHOTS=screenshots pytest tests/browser    # also writes a picture of every page, width and theme
"""
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]
PAGES = [re.sub(r"^\d+[a-zA-Z0-9]*_", "", p.stem) + ".html" if p.parent.name == "nbs" else f"{p.parent.name}/{p.stem}.html" for p in NOTEBOOKS]
WIDTHS = [390, 820, 1440]
THEMES = ["light", "dark"]

# What sticks out of the window. The page cuts off what is too wide instead of scrolling, so each element is asked;
# what stands in a box that scrolls by itself (code, tables, formulas) may be as wide as it likes.
STICKS_OUT = """() => {
  const wide = document.documentElement.clientWidth + 1, found = [];
  if (document.documentElement.scrollWidth > wide) found.push("the page: " + document.documentElement.scrollWidth + " px");
  const scrolls = (e) => { for (let p = e.parentElement; p && p !== document.body; p = p.parentElement)
    if (/auto|scroll|hidden/.test(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= wide) return true; };
  for (const e of document.querySelectorAll("main *, header *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.height && (box.right > wide || box.left < -1) && !e.closest(".katex-mathml, .visually-hidden") && !scrolls(e))
      found.push(`${e.tagName.toLowerCase()}.${e.getAttribute("class")}: ${Math.round(box.left)}–${Math.round(box.right)} px, ${e.textContent.trim().slice(0, 60)}`);
  }
  return found.slice(0, 5);
}"""
# Formulas left as TeX: KaTeX reads everything but code, so no delimiter may remain in what a reader sees.
RAW_MATH = r"""() => {
  const walk = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT), found = [];
  while (walk.nextNode()) {
    const text = walk.currentNode.data;
    if (!walk.currentNode.parentElement.closest("pre, code, script, style, .katex, svg") && /\$\$|\\\(|\\\[|\$[^$\n]*[\\_^{][^$\n]*\$/.test(text)) found.push(text.trim().slice(0, 80));
  }
  return found;
}"""
NO_ALTERNATIVE = """() => {
  const text = (ids) => (ids || "").split(/ +/).map((id) => (document.getElementById(id) || {}).textContent || "").join("").trim();
  return [...document.querySelectorAll("img, main svg")].filter((e) => e.tagName === "IMG" ? !(e.getAttribute("alt") || "").trim()
    : !e.closest("[aria-hidden=true], .katex") && !(e.getAttribute("role") === "img" && (e.getAttribute("aria-label") || text(e.getAttribute("aria-labelledby")))))
    .map((e) => e.outerHTML.slice(0, 120));
}"""


# Text too faint for its background: a contrast below 4.5 (WCAG 2, level AA), or 3 if large.
FAINT = """() => {
  const parse = (c) => { const n = c.match(/[\\d.]+/g).map(Number); return c.startsWith("color(srgb") ? [...n.slice(0, 3).map((x) => 255 * x), n[3] ?? 1] : [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3]));
  const behind = (e) => { const own = e ? parse(getComputedStyle(e).backgroundColor) : [255, 255, 255, 1]; return own[3] === 1 || !e ? own : over(own, behind(e.parentElement)); };
  const light = (c) => { const [r, g, b] = c.map((x) => (x /= 255) <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = {};
  while (walk.nextNode()) {
    const e = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || e.closest("svg, script, style, .katex-mathml") || !e.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })) continue;
    const style = getComputedStyle(e), ground = behind(e), [a, b] = [light(over(parse(style.color), ground)), light(ground)];
    const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5)) found[`${e.tagName.toLowerCase()}.${e.className}`] = `${contrast.toFixed(1)}: ${text.slice(0, 40)}`;
  }
  return found;
}"""


def screenshot(window, name: str, width: int, theme: str) -> None:
    if not (folder := os.environ.get("GRPO_NB_SCREENSHOTS")): return
    path = ROOT / folder / f"{width}-{theme}" / f"{name.removesuffix('.html').replace('/', '-')}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    window.screenshot(path=path, full_page=True, animations="disabled")


def test_every_notebook_has_its_page_and_no_page_is_left_over(site):
    assert sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html")) == sorted(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_page(open_page, name):
    "Every width and theme: nothing sticks out, mathematics is set, pictures load and have a text alternative, the theme is applied."
    window = open_page(name)
    assert window.evaluate(RAW_MATH) == []
    assert window.locator(".katex-error, .katex [style*='color:#cc0000']").all_inner_texts() == []  # an unknown command is only red
    assert window.evaluate(NO_ALTERNATIVE) == []
    assert window.evaluate("[...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)") == []
    for theme in THEMES:
        window.emulate_media(color_scheme=theme)
        window.wait_for_function(f"document.documentElement.classList.contains('quarto-dark') === {str(theme == 'dark').lower()}")
        assert window.evaluate(FAINT) == {}, theme
        for width in WIDTHS:
            window.set_viewport_size({"width": width, "height": 900})
            window.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            assert window.evaluate(STICKS_OUT) == [], f"{width} px, {theme}"
            screenshot(window, name, width, theme)


@pytest.mark.parametrize("width", [1440, 390])
def test_search_finds_a_function_and_leads_to_it(open_page, width):
    window = open_page("index.html")
    window.set_viewport_size({"width": width, "height": 900})
    if width < 992: window.get_by_label("Toggle navigation").click()
    window.get_by_label("Search").first.fill("group_advantages")
    hit = window.locator(".search-result").first
    hit.wait_for()
    box = window.locator(".smalldocs-search-results").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width, "the results stick out of the window"
    assert "group_advantages" in hit.inner_text()
    hit.click()
    window.wait_for_url(re.compile(r"/group\.html"))
    assert window.locator("[data-anchor-id=group_advantages]").is_visible()


def test_boxes_of_the_figure_lead_to_their_chapters(open_page, site):
    window = open_page("index.html")
    links = window.evaluate("[...document.querySelectorAll('main svg[role=img] a')].map((a) => a.href.baseVal)")
    assert len(set(links)) >= 8
    for link in sorted(set(links)):
        page, _, anchor = link.partition("#")
        assert (site / page).is_file(), link
        window = open_page(page)
        if anchor: assert window.evaluate("(id) => !!document.getElementById(id)", anchor), link


def test_dark_mode_is_remembered(open_page):
    dark = "document.documentElement.classList.contains('quarto-dark')"
    window = open_page("index.html")
    assert not window.evaluate(dark)
    window.locator(".quarto-color-scheme-toggle").click()
    window.wait_for_function(dark)
    for name in ("gae.html", "experiments/train.html", "index.html"):
        window = open_page(name)
        window.wait_for_function(dark)
        red, green, blue = map(int, re.findall(r"\d+", window.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
        assert max(red, green, blue) < 80
    window.locator(".quarto-color-scheme-toggle").click()
    window.wait_for_function("!" + dark)


def test_folded_answers_unfold(open_page):
    window = open_page("gae.html")
    answer = window.locator("details", has=window.get_by_text("Answer", exact=True)).nth(1)
    assert not answer.locator(".katex").first.is_visible()
    answer.locator("summary").click()
    assert answer.locator(".katex").first.is_visible()
