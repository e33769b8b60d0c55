"""Build the documentation site from the notebooks, without running their examples
again.

    python tools/build_docs.py [--output docs] [--engine auto|quarto|smalldocs]

nbdev prepares the notebooks (it runs only imports and exported cells, for
signatures); then Quarto renders them if it is on PATH, else smalldocs, a small
pure-Python reader of the same `_quarto.yml`. smalldocs lacks a few things that our
notebooks use; the functions called `mend_*` add those. All of it happens in a
temporary copy, so nothing but the output folder changes, and two builds of one
commit give the same bytes."""

import argparse
import ast
import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html import escape
from importlib.metadata import entry_points
from pathlib import Path

import build_live
import yaml
from readme import joined_options

ROOT = Path(__file__).resolve().parent.parent
KATEX = (
    Path(__file__).resolve().parent / "katex"
)  # vendored from the npm package, woff2 fonts only
VEGA = (
    Path(__file__).resolve().parent / "vega"
)  # vendored from the npm packages vega, vega-lite and vega-embed
KINDS = {"eq": "Equation", "fig": "Figure", "tbl": "Table"}
WIDGET = "application/vnd.jupyter.widget-view+json"
VEGALITE = "application/vnd.vegalite.v5+json"  # what JupyterLab draws by itself
TITLE = re.compile(r"(# .+\n*(?:> .+\n*)?(?:- [\w-]+: .+(?:\n|$))*)((?s:.*))")
PICTURE = re.compile(
    r'<img\b([^>]*?) src="data:image/(png|jpeg|gif|svg\+xml);base64,([^"]+)"([^>]*)>'
)
NUMBER = re.compile(
    r"(^|/)\d+[a-zA-Z0-9]*_"
    # nbdev drops the `03_` of `03_policy` from page names; here that of folders goes,
    # too
)


def page_name(path: str) -> str:
    """`1_figure/03_policy.ipynb` -> `figure/policy.ipynb`: the address of a page has
    no numbers."""
    return NUMBER.sub(r"\1", path).lower()


def prepare(work: Path) -> Path:
    "Let nbdev process a copy of the notebooks; returns the folder to render."
    if any(part.startswith(".") for part in work.parts):
        sys.exit(f"nbdev skips paths with a dotted folder; set TMPDIR ({work})")
    if not entry_points(group="nbdev", name="grpo_nb"):
        sys.exit("grpo_nb is not installed, links would be lost: run `make setup`")
    shutil.copytree(
        ROOT / "nbs", work / "nbs", ignore=shutil.ignore_patterns(".*", "__pycache__")
    )
    shutil.copy(ROOT / "settings.ini", work)
    for path in sorted((work / "nbs").rglob("*.ipynb")):
        ready(path)
    os.chdir(work)
    os.environ["PYTHONHASHSEED"] = "0"
    from nbdev.serve import proc_nbs

    site = proc_nbs(force=True, n_workers=min(4, os.cpu_count() or 1)).resolve()
    (site / build_live.PAGE).write_text(build_live.page())
    return site


def ready(path: Path) -> None:
    """Keep nbdev from dropping what stands below the title in the same cell and from
    running examples; leave progress bars out."""
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    head = (
        TITLE.match("".join(cells[0]["source"]))
        if cells and cells[0]["cell_type"] == "markdown"
        else None
    )
    if head and head[2].strip():
        cells[0]["source"] = head[
            1
            # nbdev reads the whole cell as front matter, so the text gets a cell of its
            # own
        ]
        cells.insert(
            1,
            {
                "cell_type": "markdown",
                "id": cells[0]["id"] + "-text",
                "metadata": {},
                "source": head[2],
            },
        )
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            source = cell["source"] = joined_options(source)
        if "outputs" in cell:
            cell["outputs"] = [
                out for out in cell["outputs"] if WIDGET not in out.get("data", {})
            ]
        if cell["cell_type"] != "code" or re.search(r"^#\| *export", source, re.M):
            continue
        try:
            tree = ast.parse(source)
        except SyntaxError:
            continue  # a magic
        imports = (ast.Import, ast.ImportFrom)
        if any(isinstance(node, imports) for node in ast.walk(tree)) and not all(
            isinstance(node, imports) for node in tree.body
        ):
            cell["source"] = (
                "#| eval: false\n" + source
            )  # nbdev runs whole cells to have the imports in them
    path.write_text(json.dumps(notebook))


def check_sidebar(site: Path) -> None:
    "Every notebook is in the sidebar, and every entry of the sidebar is a notebook."
    listed = set(re.findall(r"[\w/.-]+\.ipynb", (site / "sidebar.yml").read_text()))
    found = {p.relative_to(site).as_posix() for p in site.rglob("*.ipynb")}
    if listed != found:
        sys.exit(
            f"nbs/sidebar.yml: not listed {sorted(found - listed)}; not there "
            f"{sorted(listed - found)}"
        )


# ---------------------------------------------------------------- mends before
# smalldocs


def mend_pages(site: Path) -> None:
    "Number what is referred to, and rename pages and the links to them."
    for path in sorted(site.rglob("*.ipynb")):
        notebook = json.loads(path.read_text())
        mend_references(notebook, path.name)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                source = "".join(cell["source"])
                cell["source"] = unfold(relink(source))
            for data in (
                output["data"]
                for output in cell.get("outputs", [])
                if "text/markdown" in output.get("data", {})
            ):
                page = page_name(path.relative_to(site).as_posix())
                text = own_source("".join(data["text/markdown"]), module_of(page))
                data["text/markdown"] = relink(
                    re.sub(r"```.*?```", signature, text, flags=re.S)
                )
        mend_interactive(notebook)
        path.unlink()
        page = site / page_name(path.relative_to(site).as_posix())
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(json.dumps(notebook))
    sidebar = site / "sidebar.yml"
    sidebar.write_text(
        re.sub(r"[\w/.-]+\.ipynb", lambda m: page_name(m[0]), sidebar.read_text())
    )


def relink(source: str) -> str:
    """Links to notebooks lead to their pages; a name that is a link already gets no
    second one from nbdev."""
    source = re.sub(r"\[\[(`[^`]+`)\]\([^)]*\)\]\(", r"[\1](", source)
    return re.sub(
        r"(\]\(|href=\")([\w./-]+\.ipynb)", lambda m: m[1] + page_name(m[2]), source
    )


def unfold(source: str) -> str:
    """Blank lines around what is folded, or it would be read as raw HTML, its
    mathematics and code unread."""
    source = re.sub(
        r"(<details[^>]*>\s*<summary>.*?</summary>)\s*", r"\1\n\n", source, flags=re.S
    )
    return re.sub(r"\s*(</details>)", r"\n\n\1", source)


def signature(code: re.Match) -> str:
    """nbdev makes links of names in backticks, which cannot be links here, and says
    of types where they were defined."""
    return re.sub(
        r"\b(?:__main__|jaxtyping)\.",
        "",
        re.sub(r"\[(`[^`]+`)\]\([^)]*\)", r"\1", code[0]),
    )


def module_of(page: str) -> str:
    """`engine/packing.ipynb` -> `engine/packing`; the modules of the figure lie at
    the top."""
    return page.removesuffix(".ipynb").removeprefix("figure/")


def own_source(text: str, module: str) -> str:
    """nbdev looks a name up by the name alone; where two modules have one, the page
    of a module means its own."""
    link = re.search(r"/grpo_nb/([\w/]+)\.py#L\d+", text)
    name = re.search(r"^#+ +(\w+)$", text, re.M)
    path = ROOT / "grpo_nb" / f"{module}.py"
    if not link or not name or link[1] == module or not path.exists():
        return text
    line = next(
        (
            node.lineno
            for node in ast.parse(path.read_text()).body
            if getattr(node, "name", None) == name[1]
        ),
        None,
    )
    return (
        text if line is None else text.replace(link[0], f"/grpo_nb/{module}.py#L{line}")
    )


def mend_interactive(notebook: dict) -> None:
    """An interactive picture is its static one, with the specification beside it,
    which `tools/vega/start.js` brings to life."""
    for output in (
        output
        for cell in notebook["cells"]
        for output in cell.get("outputs", [])
        if VEGALITE in output.get("data", {})
    ):
        spec, picture = (
            output["data"][VEGALITE],
            "".join(output["data"]["image/svg+xml"]),
        )
        text = json.dumps(spec, ensure_ascii=False, separators=(",", ":")).replace(
            "</", "<\\/"
        )  # a script ends at the first `</`
        encoded = base64.b64encode(picture.encode()).decode()
        image = (
            f'<img alt="{escape(spec["description"])}" '
            f'src="data:image/svg+xml;base64,{encoded}">'
        )
        output["data"] = {
            "text/html": f'<div class="interactive"><div>{image}</div><script '
            f'type="application/json">{text}</script></div>'
        }


def mend_references(notebook: dict, name: str) -> None:
    """Number `$$…$$ {#eq-x}` and cells with `#| label: fig-x`, and make links of
    `@eq-x` and `@fig-x`."""
    numbers, count = {}, dict.fromkeys(KINDS, 0)

    def number(label):
        kind = label.split("-")[0]
        count[kind] += 1
        numbers[label] = count[kind]
        return count[kind]

    def equation(m):
        return f"::: {{#{m[2]}}}\n$$\n{m[1].strip()} \\tag{{{number(m[2])}}}\n$$\n:::"

    def caption(m):
        kind = re.search(r"^#\| *label: *(fig|tbl)-", source, re.M)[1]
        text = f"{KINDS[kind]} {count[kind]}: {yaml.safe_load(m[2])}"
        return f"{m[1]}{json.dumps(text, ensure_ascii=False)}"

    def link(m):
        if m[1] not in numbers:
            sys.exit(f"{name}: @{m[1]} refers to nothing in this notebook")
        return f"[{KINDS[m[1].split('-')[0]]} {numbers[m[1]]}](#{m[1]})"

    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(
                r"\$\$(.+?)\$\$ *\{#(eq-[\w-]+)\}", equation, source, flags=re.S
            )
        elif label := re.search(r"^#\| *label: *((?:fig|tbl)-[\w-]+)", source, re.M):
            number(label[1])
            source = re.sub(
                r"^(#\| *(?:fig|tbl)-cap: *)(.+)$", caption, source, count=1, flags=re.M
            )
        cell["source"] = source
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = re.sub(
                r"(?<![\w`/@])@((?:eq|fig|tbl)-[\w-]*\w)", link, cell["source"]
            )


# ---------------------------------------------------------------- mends after smalldocs


def mend_site(out: Path, base: str) -> None:
    """Make the site work from any folder and without a network: own KaTeX, no web
    fonts, relative links, dates left out."""
    shutil.copytree(KATEX, out / "site_libs/katex")
    ids = {
        p.relative_to(out).as_posix(): set(re.findall(r' id="([^"]+)"', p.read_text()))
        for p in out.rglob("*.html")
    }

    def doclink(
        m,
        # nbdev links every name, also a method or a private one, which have no heading:
        # then to their class or page
    ):
        name, anchor = page_name(m[2]), m[3] or ""
        while anchor and anchor not in ids.get(name, ()):
            anchor = anchor.rpartition(".")[0]
        return f"{m[1]}{up}{name}" + (f"#{anchor}" if anchor else "")

    for page in sorted(set(out.rglob("*.html")) - {out / build_live.PAGE}):
        up = "../" * (len(page.relative_to(out).parts) - 1)
        html = page.read_text()
        html = re.sub(
            r"https://[^\"]*/katex@[^/\"]+/dist/", f"{up}site_libs/katex/", html
        )
        html = re.sub(
            rf'(<a\b[^>]*? href="){re.escape(base)}/([^"#]*)(?:#([^"]*))?',
            doclink,
            html,
        )
        html = add_vega(html, out, up)
        html = mend_pictures(html, out, up)
        page.write_text(re.sub(r" at 0x[0-9a-f]{6,}", "", html))
    for css in sorted((out / "site_libs").rglob("*.css")):
        css.write_text(
            re.sub(r"@import url\([\"']?https?:[^)]*\);?", "", css.read_text())
        )
    sitemap = out / "sitemap.xml"
    sitemap.write_text(re.sub(r"\s*<lastmod>[^<]*</lastmod>", "", sitemap.read_text()))
    (out / ".nojekyll").touch()
    mend_search(out)


def add_vega(page: str, out: Path, up: str) -> str:
    "Vega's scripts on the pages with an interactive picture, and only there."
    if 'class="interactive"' not in page:
        return page
    shutil.copytree(VEGA, out / "site_libs/vega", dirs_exist_ok=True)
    scripts = "".join(
        f'<script src="{up}site_libs/vega/{name}.js"></script>\n'
        for name in ("vega.min", "vega-lite.min", "vega-embed.min", "start")
    )
    return page.replace("</body>", scripts + "</body>")


def mend_pictures(html: str, out: Path, up: str) -> str:
    """Pictures become files, named by their content so that equal ones are one;
    those without a text get a plain one."""
    headings = [
        (m.start(), re.sub("<[^>]+>", "", m[1]).strip())
        for m in re.finditer(r"<h[1-6].*?>(.*?)</h[1-6]>", html, re.S)
    ]

    def picture(m):
        kind, content, attributes = m[2], base64.b64decode(m[3]), m[1] + m[4]
        file = (
            out
            / "images"
            / f"{hashlib.sha256(content).hexdigest()[:16]}.{kind.partition('+')[0]}"
        )
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
        if " alt=" not in attributes:  # no `#| fig-alt`
            section = next(
                (text for start, text in reversed(headings) if start < m.start()),
                "this page",
            )
            attributes += (
                f' alt="Plot in the section “{section}”, made by the code above it"'
            )
            print(f"no fig-alt: a picture in the section “{section}”")
        if (
            kind == "png" and " width=" not in attributes
        ):  # the text does not jump when the picture arrives
            attributes += ' width="{}" height="{}"'.format(
                *(int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
            )
        return f'<img src="{up}images/{file.name}"{attributes}>'

    return PICTURE.sub(picture, html)


def mend_search(out: Path) -> None:
    """Let search work from a file:// page too, where fetch() does not: load the
    index as a script, on first use."""
    script, index = out / "site_libs/smalldocs.js", out / "search.json"
    old = (
        'const r = await fetch(offset + "search.json");\n      index = await r.json();'
    )
    new = (
        "await new Promise((done, failed) => { const s = "
        'document.createElement("script"); s.src = offset + "search.js";'
        " s.onload = done; s.onerror = failed; document.head.append(s); });\n      "
        "index = window.searchIndex;"
    )
    text = script.read_text()
    assert old in text, "smalldocs.js has changed: see mend_search"
    script.write_text(text.replace(old, new))
    (out / "search.js").write_text(f"window.searchIndex = {index.read_text()};\n")
    index.unlink()


def render_smalldocs(site: Path) -> Path:
    "Render with smalldocs; a link that leads nowhere is an error."
    from smalldocs.site import build

    check_sidebar(site)
    mend_pages(site)
    built = build(site, quiet=True)
    for warning in built.warnings:
        if "output-file" not in warning:
            print(
                "smalldocs:", warning
            )  # nbdev's name of the page: mend_pages sees to it
    if built.broken:
        sys.exit(
            "broken links: "
            + ", ".join(f"{page}: {href}" for page, href in built.broken)
        )
    mend_site(built.out, str(built.project.website["site-url"]).rstrip("/"))
    return built.out


def render_quarto(site: Path) -> Path:
    "Render with Quarto."
    check_sidebar(site)
    subprocess.run(["quarto", "render", "--no-cache"], cwd=site, check=True)
    return site / "docs"


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs",
        help="folder to (re)place the site in (default: docs)",
    )
    parser.add_argument(
        "--engine",
        choices=["auto", "quarto", "smalldocs"],
        default="auto",
        help="auto: quarto if on PATH, else smalldocs",
    )
    args = parser.parse_args()
    output, engine = args.output.resolve(), args.engine
    if engine == "auto":
        engine = "quarto" if shutil.which("quarto") else "smalldocs"
    if (
        output.exists()
        and any(output.iterdir())
        and not (output / "index.html").exists()
    ):
        sys.exit(f"{output} is not empty and is not a built site")
    with tempfile.TemporaryDirectory(prefix="grpo_nb_docs_") as work:
        site = prepare(Path(work).resolve())
        built = {"quarto": render_quarto, "smalldocs": render_smalldocs}[engine](site)
        pages = len(list(built.rglob("*.html")))
        os.chdir(ROOT)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(built, output)
    print(f"{engine}: {pages} pages in {os.path.relpath(output)}")


if __name__ == "__main__":
    main()
