"The packaging and the tools that make README.md and docs/."
import json
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import build_docs
import check_links
import readme


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters="=")
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def test_metadata_is_that_of_settings(settings):
    package = distribution("grpo_nb")
    extras = {key.removeprefix("extras_") for key in settings if key.startswith("extras_")}
    required = {Requirement(r).name for r in settings["requirements"].split()}
    assert package.version == settings["version"]
    assert set(package.metadata.get_all("Provides-Extra")) == extras
    assert required <= {Requirement(r).name for r in package.requires}


def test_every_requirement_is_pinned_within_its_range(settings):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))}
    for key in ("requirements", *(k for k in settings if k.startswith("extras_"))):
        for r in map(Requirement, settings[key].split()):
            assert pins[canonicalize_name(r.name)] in r.specifier, r


@pytest.mark.parametrize("body, problem", [
    ('<h2 id="x">X</h2><a href="#x">x</a><a href="other.html#y">y</a><a href="https://example.org">out</a>', None),
    ('<a href="none.html">x</a>', "none.html does not exist"),
    ('<a href="other.html#z">x</a>', "other.html#z has no such anchor"),
    ('<a href="/other.html">x</a>', "/other.html is not relative"),
    ('<script src="https://example.org/a.js"></script>', "from another host"),
    ('<style>@import "//example.org/a.css";</style>', "from another host"),
])
def test_link_check(tmp_path, body, problem):
    (tmp_path / "index.html").write_text(body)
    (tmp_path / "other.html").write_text('<p id="y">')
    problems = check_links.check(tmp_path)
    assert (problem is None and not problems) or (len(problems) == 1 and problem in problems[0])


def test_readme_prose():
    source = ("::: {.callout-note title=\"Ways\"}\nSee [setup](01_task.ipynb#add).\n:::\n\n$$x^{.5}$$ {#eq-x}\n\n## Why {#sec-why}\n\n"
              "[p](https://host/blob/main/LICENSE){target=\"_blank\"} and `a[0](b){#c}`")
    assert readme.prose(source, "https://host/blob/main/") == (
        "> [!NOTE]\n> **Ways**\n>\n> See [setup](nbs/01_task.ipynb#add).\n\n$$x^{.5}$$\n\n## Why\n\n[p](LICENSE) and `a[0](b){#c}`")
    with pytest.raises(SystemExit, match="nowhere"): readme.prose("[x](none.ipynb)", "")
    assert readme.title("# T\n\n> D\n\n- skip_exec: true\n\nText\n\n- a: b") == "# T\n\n> D\n\n\nText\n\n- a: b"


def test_readme_code():
    images = {}
    svg = {"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"], "text/plain": ["<SVG>"]}}
    out = {"output_type": "stream", "name": "stdout", "text": ["hi\n"]}
    assert readme.code({"source": '#| echo: false\n#| fig-alt: "A"\ndraw()', "outputs": [svg]}, images) == ["![A](nbs/images/index-1.svg)"]
    assert readme.code({"source": "print('hi')", "outputs": [out]}, images) == ["```python\nprint('hi')\n```", "```text\nhi\n```"]
    assert readme.code({"source": "#| hide\n1", "outputs": []}, images) == [] and images == {"index-1.svg": b"<svg/>\n"}


def test_notebooks_are_made_ready_for_nbdev(tmp_path):
    path = tmp_path / "x.ipynb"
    markdown = {"cell_type": "markdown", "id": "a", "source": ["# T\n", "\n", "> D\n", "\n", "- skip_exec: true\n", "\n", "Text\n", "\n", "- a: b"]}
    code = [{"cell_type": "code", "id": "b", "source": source} for source in ("import os", "import os\nrun()", "#| export\nimport os\nx = 1", "run()", "%%bash\nls")]
    path.write_text(json.dumps({"cells": [markdown, *code]}))
    build_docs.ready(path)
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    assert cells[:2] == ["# T\n\n> D\n\n- skip_exec: true\n", "\nText\n\n- a: b"]
    assert [cell.startswith("#| eval: false") for cell in cells[2:]] == [False, True, False, False, False]


def test_page_names():
    assert [build_docs.page_name(p) for p in ("03_policy.ipynb", "experiments/train.ipynb", "index.ipynb")] == [
        "policy.ipynb", "experiments/train.ipynb", "index.ipynb"]


def test_references_are_numbered():
    def markdown(source): return {"cell_type": "markdown", "source": source}
    code = {"cell_type": "code", "source": '#| label: fig-a\n#| fig-cap: "Seen."\nplot()'}
    notebook = {"cells": [markdown("See @eq-b and @fig-a."), markdown("$$a$$ {#eq-a}\n\n$$b$$ {#eq-b}"), code]}
    build_docs.mend_references(notebook, "x")
    text, equations, figure = (cell["source"] for cell in notebook["cells"])
    assert text == "See [Equation 2](#eq-b) and [Figure 1](#fig-a)."
    assert equations == "::: {#eq-a}\n$$\na \\tag{1}\n$$\n:::\n\n::: {#eq-b}\n$$\nb \\tag{2}\n$$\n:::"
    assert '#| fig-cap: "Figure 1: Seen."' in figure
    with pytest.raises(SystemExit, match="@eq-c"): build_docs.mend_references({"cells": [markdown("@eq-c")]}, "x")
