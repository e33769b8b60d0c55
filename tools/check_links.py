"""Check a built site: every internal link and anchor exists, and nothing is fetched from another host.

    python tools/check_links.py [docs]
"""
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

FETCHES = {"script": ["src"], "img": ["src"], "iframe": ["src"], "source": ["src"], "video": ["src"], "audio": ["src"], "embed": ["src"],
           "object": ["data"], "use": ["href", "xlink:href"], "image": ["href", "xlink:href"], "link": ["href"]}


class Page(HTMLParser):
    "The ids of a page, and what it links to (`links`) and loads (`loads`)."
    def __init__(self, path: Path):
        super().__init__()
        self.ids, self.links, self.loads, self.css = {"", "top"}, [], [], []
        self.in_style = self.by_quarto = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.in_style = tag == "style"
        self.by_quarto |= tag == "meta" and attrs.get("name") == "generator" and (attrs.get("content") or "").startswith("quarto")
        self.ids |= {value for key in ("id", "name") if (value := attrs.get(key))}
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        loads = tag in FETCHES and (tag != "link" or not re.search("canonical|next|prev|license", attrs.get("rel") or ""))
        if loads: self.loads += [attrs[key] for key in FETCHES[tag] if attrs.get(key)]
        if attrs.get("style"): self.css.append(attrs["style"])

    def handle_data(self, data):
        if self.in_style: self.css.append(data)


def css_urls(css: str) -> list[str]:
    "What a stylesheet loads."
    return re.findall(r"url\(\s*[\"']?([^\"')]+)", css) + re.findall(r"@import\s+[\"']([^\"']+)", css)


def check(site: Path) -> list[str]:
    "The problems of the site, one line each."
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    problems = [] if pages else [f"{site} has no pages"]
    offline = not any(page.by_quarto for page in pages.values())  # Quarto's themes and mathematics come from other hosts

    def look(source: Path, url: str, load: bool) -> None:
        where, parts = source.relative_to(site), urlsplit(url)
        if parts.scheme in ("data", "mailto", "javascript"): return
        if parts.scheme or parts.netloc:
            if load and offline: problems.append(f"{where}: loads {url} from another host")
            return
        if parts.path.startswith("/"): return problems.append(f"{where}: {url} is not relative")
        target = (source.parent / unquote(parts.path)).resolve() if parts.path else source.resolve()
        if target.is_dir(): target /= "index.html"
        if not target.exists(): problems.append(f"{where}: {url} does not exist")
        elif target in pages and not load and unquote(parts.fragment) not in pages[target].ids: problems.append(f"{where}: {url} has no such anchor")

    for path, page in pages.items():
        source = site / path.relative_to(site.resolve())
        for url in page.links: look(source, url, load=False)
        for url in page.loads + [url for css in page.css for url in css_urls(css)]: look(source, url, load=True)
    for path in sorted(site.rglob("*.css")):
        for url in css_urls(path.read_text(encoding="utf-8")): look(path, url, load=True)
    return problems


if __name__ == "__main__":
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    problems = check(site)
    print("\n".join(problems) if problems else f"{site}: all links resolve, nothing comes from another host")
    sys.exit(bool(problems))
