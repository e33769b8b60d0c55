"The packaging and the tools that make README.md and docs/."

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path
from urllib.request import urlopen

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from watchdog.events import FileModifiedEvent, FileMovedEvent, FileOpenedEvent

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build_docs
import check_docs
import preview
import readme
import version_ends
from grpo_nb.names import how_to_install


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters="=")
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_metadata_is_that_of_settings(settings):
    package = distribution("grpo_nb")
    extras = {
        key.removeprefix("extras_") for key in settings if key.startswith("extras_")
    }
    required = {Requirement(r).name for r in settings["requirements"].split()}
    assert package.version == settings["version"]
    assert set(package.metadata.get_all("Provides-Extra")) == extras
    assert required <= {Requirement(r).name for r in package.requires}


def test_every_extra_is_named_where_one_installs(settings):
    "The table of the home page has each once; messages name extras that there are."
    extras = {
        key.removeprefix("extras_") for key in settings if key.startswith("extras_")
    }
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text())["cells"]
    text = "".join(line for cell in cells for line in cell["source"])
    table = text.partition("| extra | what needs it |")[2].partition("\n\n")[0]
    firsts = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(firsts))) == sorted(extras)
    peft, vllm = (
        how_to_install(extra).removeprefix("in the clone, ")
        for extra in ("peft", "vllm")
    )
    assert peft.replace("peft", "notebooks,peft,math") in text
    assert f"`{vllm}`" in table  # it has pins of its own
    named = set()
    for path in (ROOT / "grpo_nb").rglob("*.py"):
        source = path.read_text()
        assert 'pip install "grpo_nb' not in source, path
        named |= set(re.findall(r"how_to_install\(['\"](\w+)", source))
    assert named == {"peft", "vllm", "math"} <= extras


def test_every_requirement_is_pinned_within_its_range(settings):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        canonicalize_name(name): version
        for name, _, version in (
            line.partition("==") for line in lines if not line.startswith("#")
        )
    }
    for key in (
        "requirements",
        *(k for k in settings if k.startswith("extras_") and k != "extras_vllm"),
    ):  # vLLM has an environment of its own
        for r in map(Requirement, settings[key].split()):
            assert pins[canonicalize_name(r.name)] in r.specifier, r


def test_lowest_versions_are_the_lower_ends():
    "Each requirement once; without a lower end there is nothing to try."
    lines = version_ends.requirements(["peft", "test", "bench"])
    assert "trl>=1.16,<1.17" in lines and len(set(lines)) == len(lines)
    lowest = dict(version_ends.lowest(line).split("==") for line in lines)
    for requirement in map(Requirement, lines):
        version = lowest[requirement.name]
        assert version in requirement.specifier, requirement
        below = Version(version).release[:-1] + (Version(version).release[-1] - 1,)
        if below[-1] >= 0:
            assert ".".join(map(str, below)) not in requirement.specifier
    with pytest.raises(ValueError, match="^tqdm has no lower end in settings.ini$"):
        version_ends.lowest("tqdm")


def test_installed_versions_are_told():
    assert (
        version_ends.installed("torch>=2.9") == f"torch {distribution('torch').version}"
    )
    assert version_ends.installed("no-such>=1") == "no-such is not installed"


@pytest.mark.parametrize(
    "body, problem",
    [
        (
            '<h2 id="x">X</h2><a href="#x">x</a><a href="other.html#y">y</a><a '
            'href="https://example.org">out</a>',
            None,
        ),
        ('<a href="none.html">x</a>', "none.html does not exist"),
        ('<a href="other.html#z">x</a>', "other.html#z has no such anchor"),
        ('<a href="/other.html">x</a>', "/other.html is not relative"),
        ('<img src="none.png">', "none.png does not exist"),
        ('<script src="https://example.org/a.js"></script>', "from another host"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "from another host"),
        (
            '<link rel="preload" href="https://example.org/a.woff2">',
            "from another host",
        ),
        (
            '<img srcset="other.html 1x, https://example.org/a.png 2x">',
            "from another host",
        ),
        ('<style>@import "//example.org/a.css";</style>', "from another host"),
        ('<p style="background: url(https://example.org/a.png)">', "from another host"),
        (f'<img src="data:image/png;base64,{"A" * 1000}">', None),
        (f'<img src="data:image/png;base64,{"A" * 5000}">', "is embedded"),
        (
            r"<p>\(\frac{a}{b}\) &lt; \[\sum_i x_i "
            r"\tag{1}\]</p><pre>\(\nonsense\)</pre><p>$5 and $6</p>",
            None,
        ),
        (
            r"<p>\(\frac{a}{b}\) and \[\nonsense\]</p>",
            "Undefined control sequence: \\nonsense",
        ),
        (r"<p>\(\frac{a}\)</p>", "KaTeX parse error"),
        (r"<details>every $V_{t+1}$ is</details>", "not set as mathematics"),
        (r"<p>\(a<em>b</em></p>", "not set as mathematics"),
        ("<p>[the <code>x</code>](y.ipynb#z)</p>", "not made a link"),
        ("<p><code>[x](y.ipynb)</code></p><pre>[x](y.ipynb)</pre>", None),
    ],
)
def test_site_check(tmp_path, body, problem):
    (tmp_path / "index.html").write_text(body)
    (tmp_path / "other.html").write_text('<p id="y">')
    problems = check_docs.check(tmp_path)
    assert (problem is None and not problems) or (
        len(problems) == 1 and problem in problems[0]
    ), problems


def test_site_check_reads_stylesheets_and_weighs_the_site(tmp_path):
    (tmp_path / "index.html").write_text("x")
    (tmp_path / "a.css").write_text(
        "@font-face { src: url('https://example.org/a.woff2') }"
    )
    with (tmp_path / "big.bin").open("wb") as file:
        file.truncate(26_000_000)
    (tmp_path / "page.html").write_text("x" * 7_000_000)
    size, page, font = check_docs.check(tmp_path)
    assert (
        "33.0 MB" in size
        and "page.html has 7.0 MB" in page
        and "loads https://example.org/a.woff2" in font
    )


def test_saved_pictures_must_be_on_the_page(tmp_path):
    svg, table = (
        "<svg><title>A box</title></svg>",
        "<style>td {color: red}</style><table><tr><td>1 &lt; 2</td></tr></table>",
    )
    outputs = [
        {"data": {"image/png": base64.b64encode(b"png").decode()}},
        {"data": {"image/svg+xml": svg}},
        {"data": {"text/html": table}},
    ]
    cell = {"cell_type": "code", "source": "plot()", "outputs": outputs}
    hidden = {
        "cell_type": "code",
        "source": "#| hide\nplot()",
        "outputs": [{"data": {"image/png": "AAAA"}}],
    }
    notebooks, site = tmp_path / "nbs", tmp_path / "site"
    for folder in (notebooks, site):
        folder.mkdir()
    (notebooks / "03_x.ipynb").write_text(json.dumps({"cells": [cell, hidden]}))
    assert check_docs.check(site, notebooks)[1:] == ["03_x.ipynb: has no page x.html"]
    (site / "x.png").write_bytes(b"png")
    parts = {
        "image/png": '<img src="x.png">',
        "image/svg+xml": svg,
        "text/html": "<table><tr> <td>1 &lt; 2</td></tr></table>",
    }
    (site / "x.html").write_text("".join(parts.values()))
    assert check_docs.check(site, notebooks) == []
    for mime in parts:
        (site / "x.html").write_text(
            "".join(part for other, part in parts.items() if other != mime)
        )
        assert check_docs.check(site, notebooks) == [
            f"03_x.ipynb, cell 0: its {mime} is not on x.html"
        ]


def test_pictures_become_files(tmp_path):
    png = (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
        + (300).to_bytes(4, "big")
        + (200).to_bytes(4, "big")
    )
    source = f'src="data:image/png;base64,{base64.b64encode(png).decode()}"'
    html = build_docs.mend_pictures(
        f'<h2>On <em>x</em></h2><img {source} class="a"><img alt="A curve" {source} '
        'width="9">',
        tmp_path,
        "../",
    )
    [file] = (tmp_path / "images").iterdir()
    assert file.read_bytes() == png
    assert html == (
        f'<h2>On <em>x</em></h2><img src="../images/{file.name}" class="a" alt="Plot '
        'in the section “On x”, made by the code above it"'
        f' width="300" height="200"><img src="../images/{file.name}" alt="A curve" '
        'width="9">'
    )


def test_folded_text_is_markdown():
    assert build_docs.unfold(
        "<details><summary>Answer</summary>The $\\delta$.</details>"
    ) == ("<details><summary>Answer</summary>\n\nThe $\\delta$.\n\n</details>")
    assert build_docs.unfold("no details") == "no details"


def test_links_to_notebooks_lead_to_pages():
    assert build_docs.relink(
        "[a](03_policy.ipynb#x) [[`b`](https://x.org/b.html)](01_task.ipynb) "
        "[c](c.html)"
    ) == ("[a](policy.ipynb#x) [`b`](task.ipynb) [c](c.html)")


def test_signatures_are_plain():
    source = (
        "[`a`](a.html)\n```python\ndef f(x:jaxtyping.Float[Tensor, "
        "'N'])->__main__.Run: # see [`g`](x.html#g)\n```"
    )
    assert re.sub(r"```.*?```", build_docs.signature, source, flags=re.S) == (
        "[`a`](a.html)\n```python\ndef f(x:Float[Tensor, 'N'])->Run: # see `g`\n```"
    )


def test_readme_prose():
    source = (
        '::: {.callout-note title="Ways"}\nSee '
        "[setup](1_figure/01_task.ipynb#add).\n:::\n\n$$x^{.5}$$ {#eq-x}\n\n## Why "
        "{#sec-why}\n\n"
        '[p](https://host/blob/main/LICENSE){target="_blank"} and `a[0](b){#c}`'
    )
    assert readme.prose(source, "https://host/blob/main/") == (
        "> [!NOTE]\n> **Ways**\n>\n> See "
        "[setup](nbs/1_figure/01_task.ipynb#add).\n\n$$x^{.5}$$\n\n## Why\n\n"
        "[p](LICENSE) and "
        "`a[0](b){#c}`"
    )
    with pytest.raises(SystemExit, match="nowhere"):
        readme.prose("[x](none.ipynb)", "")
    assert (
        readme.title("# T\n\n> D\n\n- skip_exec: true\n\nText\n\n- a: b")
        == "# T\n\n> D\n\n\nText\n\n- a: b"
    )


def test_readme_code():
    images = {}
    svg = {
        "output_type": "display_data",
        "data": {"image/svg+xml": ["<svg/>"], "text/plain": ["<SVG>"]},
    }
    out = {"output_type": "stream", "name": "stdout", "text": ["hi\n"]}
    assert readme.code(
        {"source": '#| echo: false\n#| fig-alt: "A"\ndraw()', "outputs": [svg]}, images
    ) == ["![A](nbs/images/index-1.svg)"]
    folded = '#| echo: false\n#| fig-alt: "A,\n#|   B"\ndraw()'
    assert readme.code({"source": folded, "outputs": [svg]}, {}) == [
        "![A, B](nbs/images/index-1.svg)"
    ]
    linked = {"data": {"text/markdown": "| [a](experiments/train.ipynb) |"}}
    assert readme.code(
        {"source": "#| echo: false\nmade()", "outputs": [linked]}, images
    ) == ["| [a](nbs/experiments/train.ipynb) |"]
    assert readme.code({"source": "print('hi')", "outputs": [out]}, images) == [
        "```python\nprint('hi')\n```",
        "```text\nhi\n```",
    ]
    assert readme.code(
        {"source": "#| hide\n1", "outputs": []}, images
    ) == [] and images == {"index-1.svg": b"<svg/>\n"}


def test_notebooks_are_made_ready_for_nbdev(tmp_path):
    path = tmp_path / "x.ipynb"
    markdown = {
        "cell_type": "markdown",
        "id": "a",
        "source": [
            "# T\n",
            "\n",
            "> D\n",
            "\n",
            "- skip_exec: true\n",
            "\n",
            "Text\n",
            "\n",
            "- a: b",
        ],
    }
    code = [
        {"cell_type": "code", "id": "b", "source": source}
        for source in (
            "import os",
            "import os\nrun()",
            "#| export\nimport os\nx = 1",
            "run()",
            "%%bash\nls",
            '#| fig-alt: "A,\n#|   B"\ndraw()',
        )
    ]
    path.write_text(json.dumps({"cells": [markdown, *code]}))
    build_docs.ready(path)
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    assert cells[:2] == ["# T\n\n> D\n\n- skip_exec: true\n", "\nText\n\n- a: b"]
    assert [cell.startswith("#| eval: false") for cell in cells[2:]] == [
        False,
        True,
        False,
        False,
        False,
        False,
    ]
    assert cells[-1] == '#| fig-alt: "A, B"\ndraw()'


def test_page_names():
    assert [
        build_docs.page_name(p)
        for p in ("03_policy.ipynb", "experiments/train.ipynb", "index.ipynb")
    ] == ["policy.ipynb", "experiments/train.ipynb", "index.ipynb"]


def test_references_are_numbered():
    def markdown(source):
        return {"cell_type": "markdown", "source": source}

    code = {
        "cell_type": "code",
        "source": '#| label: fig-a\n#| fig-cap: "Seen."\nplot()',
    }
    notebook = {
        "cells": [
            markdown("See @eq-b and @fig-a."),
            markdown("$$a$$ {#eq-a}\n\n$$b$$ {#eq-b}"),
            code,
        ]
    }
    build_docs.mend_references(notebook, "x")
    text, equations, figure = (cell["source"] for cell in notebook["cells"])
    assert text == "See [Equation 2](#eq-b) and [Figure 1](#fig-a)."
    assert (
        equations == "::: {#eq-a}\n$$\na \\tag{1}\n$$\n:::\n\n::: {#eq-b}\n$$\nb "
        "\\tag{2}\n$$\n:::"
    )
    assert '#| fig-cap: "Figure 1: Seen."' in figure
    with pytest.raises(SystemExit, match="@eq-c"):
        build_docs.mend_references({"cells": [markdown("@eq-c")]}, "x")


def contents(site):
    return {
        path.relative_to(site): path.read_bytes()
        for path in site.rglob("*")
        if path.is_file()
    }


def differing(first, second):
    "The files that two sites do not have alike."
    names = first.keys() | second.keys()
    return [name for name in names if first.get(name) != second.get(name)]


def build(root, folder):
    "Build the site of a checkout."
    command = [sys.executable, root / "tools/build_docs.py"]
    command += ["--engine", "smalldocs", "--output", folder]
    subprocess.run(command, check=True)
    return folder


PAGES = ("index.ipynb", "1_figure/08_gae.ipynb", "api.ipynb")
LINK = r"\[([^\]\[]*)\]\([^()\s]*\.ipynb[^()\s]*\)|<a [^>]*>|</a>"


@pytest.fixture
def small(tmp_path):
    """A checkout whose book has three pages: a chapter with code, a figure and a chart
    with sliders, and two that link to everything; here to nothing."""
    root = tmp_path / "small"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.ipynb")
    for folder in ("nbs", "tools", "grpo_nb"):
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    shutil.copy(ROOT / "settings.ini", root)
    for page in PAGES:
        text = (ROOT / "nbs" / page).read_text(encoding="utf-8")
        target = root / "nbs" / page
        target.parent.mkdir(exist_ok=True)
        target.write_text(re.sub(LINK, r"\1", text), encoding="utf-8")
    sidebar = {"website": {"sidebar": {"contents": list(PAGES)}}}
    (root / "nbs/sidebar.yml").write_text(yaml.safe_dump(sidebar))
    return root


def test_preview_serves_the_site_and_stops_at_an_interrupt(small, tmp_path):
    "What it has built is what another build has made: a rebuild changes no byte."
    command = [sys.executable, small / "tools/preview.py", "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as server:
        try:
            said = []
            for line in server.stdout:
                said.append(line)
                if line.startswith("http://127.0.0.1:"):
                    break
            assert said[-1].startswith("http"), said
            with urlopen(said[-1].split()[0] + "figure/gae.html") as page:
                assert b"<h1" in page.read()
            (folder,) = tmp_path.glob("grpo_nb_preview_*/site")
            first, second = contents(folder), contents(build(small, tmp_path / "other"))
            assert {path.suffix for path in first} >= {".html", ".css", ".js", ".svg"}
            assert differing(first, second) == []
            server.send_signal(signal.SIGINT)
            assert (
                server.communicate(timeout=20)[0].split() == ["stopped"]
                and server.returncode == 0
            )
        finally:
            server.kill()  # whatever happened: it must not outlive the test


def test_a_rebuild_changes_no_byte_of_the_site(tmp_path):
    "All pages, where there is a site of this commit: .ci/run has built one."
    site = os.environ.get("GRPO_NB_SITE")
    if not site:
        pytest.skip("GRPO_NB_SITE names no site; three pages are built twice")
    first = contents((ROOT / site).resolve())
    assert len(first) > 100
    assert differing(first, contents(build(ROOT, tmp_path / "other"))) == []


@pytest.mark.parametrize(
    "event, counts",
    [
        (FileModifiedEvent("nbs/1_figure/08_gae.ipynb"), True),
        (FileMovedEvent("nbs/.~08_gae.ipynb", "nbs/1_figure/08_gae.ipynb"), True),
        (FileModifiedEvent("nbs/styles.css"), True),
        (FileOpenedEvent("nbs/1_figure/08_gae.ipynb"), False),
        (FileModifiedEvent("nbs/.ipynb_checkpoints/08_gae-checkpoint.ipynb"), False),
        (FileModifiedEvent("nbs/1_figure/08_gae.ipynb.swp"), False),
    ],
)
def test_preview_notices_a_changed_source(event, counts):
    changes = preview.Changes()
    event.src_path, event.dest_path = (
        path and str(ROOT / path) for path in (event.src_path, event.dest_path)
    )
    changes.on_any_event(event)
    assert changes.changed.is_set() == counts


def test_source_of_a_name_that_two_modules_have():
    "`advantages` stands in gae and in group: each page links to its own."
    shown = (
        "[source](https://example.org/blob/main/grpo_nb/gae.py#L52)\n\n### advantages\n"
    )
    lines = (ROOT / "grpo_nb/group.py").read_text().splitlines()
    assert build_docs.own_source(shown, "gae") == shown
    assert build_docs.own_source(shown, "group") == shown.replace(
        "gae.py#L52", f"group.py#L{lines.index('def advantages(') + 1}"
    )
