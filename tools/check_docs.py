"""Check a built site, without a browser; tests/browser/ looks at it in one.

    python tools/check_docs.py [docs]

Every internal link and anchor exists, nothing is fetched from another host, KaTeX
can set every formula, no link is left as it was written, every picture and table
that a notebook has saved is on its page, and the site stays small."""

import base64
import hashlib
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import quickjs

from build_docs import KATEX, ROOT, WIDGET, page_name

MAX_SITE_MB = 25
MAX_PAGE_MB = 6  # of one page; the one that trains holds weights and scripts
MAX_EMBEDDED = 4096  # characters of a picture within a page; larger ones are files
FETCHES = {
    "script": ["src"],
    "img": ["src", "srcset"],
    "iframe": ["src"],
    "source": ["src", "srcset"],
    "video": ["src", "poster"],
    "audio": ["src"],
    "embed": ["src"],
    "object": ["data"],
    "link": ["href"],
    "use": ["href", "xlink:href"],
    "image": ["href", "xlink:href"],
}
RICH = ["image/png", "image/svg+xml", "text/html"]
CODE = {
    "script",
    "noscript",
    "style",
    "textarea",
    "pre",
    "code",
    "option",
}  # where KaTeX's auto-render does not look
FORMULA = re.compile(r"\\\[(?P<display>.*?)\\\]|\\\((?P<inline>.*?)\\\)", re.S)
LEFT_OVER = re.compile(
    r"\\[()\[\]]|\$\$|\$[^$\n]*[\\_^{][^$\n]*\$"
)  # TeX that nothing will set
NO_LINK = re.compile(
    r"\]\((?:https?:|[^()\s]+\.(?:ipynb|html))[^()\s]*\)"
)  # a link of Markdown that was none: code in its words became a link of its own
HIDDEN = re.compile(
    r"^#\| *(?:hide\b|export *$|default_exp|(?:include|output): *false)", re.M
)


class Page(HTMLParser):
    """The ids of a page, what it links to (`links`) and loads (`loads`), its visible
    text, its formulas."""

    def __init__(self, html: str):
        super().__init__()
        self.ids, self.links, self.loads, self.css, self.text = (
            {"", "top"},
            [],
            [],
            [],
            [],
        )
        self.formulas, self.left_over, self.open, self.by_quarto = [], [], [], False
        self.no_links = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag in CODE:
            self.open.append(tag)
        generator = tag == "meta" and attrs.get("name") == "generator"
        self.by_quarto |= generator and (attrs.get("content") or "").startswith(
            "quarto"
        )
        self.ids |= {value for key in ("id", "name") if (value := attrs.get(key))}
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        points = tag == "link" and re.search(
            "canonical|next|prev|license", attrs.get("rel") or ""
        )  # and loads nothing
        for key in [] if points else FETCHES.get(tag, []):
            value = attrs.get(key) or ""
            urls = (
                [part.split()[0] for part in value.split(", ") if part.strip()]
                if key == "srcset"
                else [value]
            )
            self.loads += filter(None, urls)
        if attrs.get("style"):
            self.css.append(attrs["style"])

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[self.open.index(tag) :]

    def handle_data(self, data):
        if "style" in self.open:
            self.css.append(data)
        if not {"style", "script"} & set(self.open):
            self.text.append(data)
        if self.open:
            return
        for m in FORMULA.finditer(data):
            self.formulas.append(
                (m["display"] or m["inline"] or "", m["display"] is not None)
            )
        self.left_over += [m[0] for m in LEFT_OVER.finditer(FORMULA.sub("", data))]
        self.no_links += NO_LINK.findall(data)


def css_urls(css: str) -> list[str]:
    "What a stylesheet loads."
    return re.findall(r"url\(\s*[\"']?([^\"')]+)", css) + re.findall(
        r"@import\s+[\"']([^\"']+)", css
    )


def check_links(site: Path, pages: dict[Path, Page]) -> list[str]:
    "Links, anchors, and what is loaded from elsewhere."
    problems = []
    offline = not any(
        page.by_quarto for page in pages.values()
    )  # Quarto's themes and mathematics come from other hosts

    def look(source: Path, url: str, load: bool) -> None:
        where, parts = source.relative_to(site), urlsplit(url)
        if parts.scheme == "data" and len(url) > MAX_EMBEDDED:
            problems.append(
                f"{where}: {url[:30]}… is embedded, {len(url):,} characters"
            )
        if parts.scheme in ("data", "mailto", "javascript"):
            return
        if parts.scheme or parts.netloc:
            if load and offline:
                problems.append(f"{where}: loads {url} from another host")
            return
        if parts.path.startswith("/"):
            return problems.append(f"{where}: {url} is not relative")
        target = (
            (source.parent / unquote(parts.path)).resolve() if parts.path else source
        )
        if target.is_dir():
            target /= "index.html"
        if not target.exists():
            problems.append(f"{where}: {url} does not exist")
        elif (
            target in pages
            and not load
            and unquote(parts.fragment) not in pages[target].ids
        ):
            problems.append(f"{where}: {url} has no such anchor")

    for path, page in pages.items():
        for url in page.links:
            look(path, url, load=False)
        for url in page.loads + [url for css in page.css for url in css_urls(css)]:
            look(path, url, load=True)
        where = path.relative_to(site)
        problems += [f"{where}: not made a link: {text!r}" for text in page.no_links]
    for path in sorted(site.rglob("*.css")):
        for url in css_urls(path.read_text(encoding="utf-8")):
            look(path, url, load=True)
    return problems


def check_formulas(site: Path, pages: dict[Path, Page]) -> list[str]:
    """Set every formula with the KaTeX that the pages use, in an interpreter of
    JavaScript."""
    context = quickjs.Context()
    context.eval((KATEX / "katex.min.js").read_text(encoding="utf-8"))
    error = context.eval("""(tex, displayMode) => {
        try { katex.renderToString(tex, {displayMode, throwOnError: true}) } catch (e) { return e.message } }""")
    problems = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found = [(error(tex, display), tex) for tex, display in page.formulas]
        problems += [
            f"{where}: {message.splitlines()[0]} in {tex!r}"
            for message, tex in found
            if message
        ]
        problems += [
            f"{where}: not set as mathematics: {tex!r}" for tex in page.left_over
        ]
    return problems


def squeeze(texts: list[str]) -> str:
    return re.sub(r"\s", "", "".join(texts))


def check_outputs(site: Path, pages: dict[Path, Page], notebooks: Path) -> list[str]:
    """Every picture and table that a notebook shows is on its page: a picture by its
    bytes, others by their words."""
    problems = []
    for source in sorted(notebooks.rglob("*.ipynb")):
        name = source.relative_to(notebooks).as_posix()
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        path = site / Path(page_name(name)).with_suffix(".html")
        if path not in pages:
            problems.append(f"{name}: has no page {path.relative_to(site)}")
            continue
        page = pages[path]
        words, drawings = (
            squeeze(page.text),
            path.read_text(encoding="utf-8").count("<svg"),
        )
        files = [
            path.parent / unquote(url)
            for url in page.loads
            if url.endswith((".png", ".svg"))
        ]
        pictures = {
            hashlib.sha256(file.read_bytes()).digest()
            for file in files
            if file.is_file()
        }

        def shown(mime: str, content: str) -> bool:
            if mime == "image/png":
                return hashlib.sha256(base64.b64decode(content)).digest() in pictures
            if hashlib.sha256(content.encode()).digest() in pictures:
                return True  # beside an interactive one
            return (mime == "text/html" or drawings > 0) and squeeze(
                Page(content).text
            ) in words

        for number, cell in enumerate(
            json.loads(source.read_text(encoding="utf-8"))["cells"]
        ):
            if cell["cell_type"] != "code" or HIDDEN.search("".join(cell["source"])):
                continue
            for data in (output.get("data", {}) for output in cell["outputs"]):
                rich = {mime: "".join(data[mime]) for mime in RICH if mime in data}
                if (
                    rich
                    and WIDGET not in data
                    and not any(shown(*item) for item in rich.items())
                ):
                    problems.append(
                        f"{name}, cell {number}: its {' or '.join(rich)} is not on "
                        f"{path.relative_to(site)}"
                    )
    return problems


def check(site: Path, notebooks: Path | None = None) -> list[str]:
    "The problems of the site, one line each."
    site = site.resolve()
    pages = {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }
    problems = [] if pages else [f"{site} has no pages"]
    size = sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) / 1e6
    if size > MAX_SITE_MB:
        problems.append(f"the site has {size:.1f} MB, more than {MAX_SITE_MB}")
    for path in pages:
        size = path.stat().st_size / 1e6
        if size > MAX_PAGE_MB:
            where = path.relative_to(site)
            problems.append(f"{where} has {size:.1f} MB, more than {MAX_PAGE_MB}")
    if notebooks:
        problems += check_outputs(site, pages, notebooks)
    return problems + check_links(site, pages) + check_formulas(site, pages)


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    problems = check(site, ROOT / "nbs")
    print(
        "\n".join(problems)
        or f"{site}: links, formulas and pictures are in order, nothing comes from "
        "another host"
    )
    sys.exit(bool(problems))
