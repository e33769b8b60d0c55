"""The notebooks: saved with their outputs, none of them an error; and the ones that
are run with parameters run."""

import ast
import json
import re
import shlex
import shutil

import nbformat
import pandas as pd
import papermill
import pytest
import yaml
from nbconvert import HTMLExporter
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from grpo_nb.evidence.statistics import verdicts
from grpo_nb.run.options import CONFIGS, make_config
from helpers import ROOT, python, read_metrics, tagged

NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
BOXES = [
    path
    for path in NOTEBOOKS
    if re.match(r"1_figure/(0\d|1[023])_", str(path.relative_to(ROOT / "nbs")))
]
EXPERIMENTS = ROOT / "nbs" / "experiments"
TRAIN, COMPARE, RECIPES = (
    EXPERIMENTS / f"{name}.ipynb" for name in ("train", "compare", "recipes")
)


def name_of(path):
    return str(path.relative_to(ROOT / "nbs"))


def parameters_of(path, cells_above=0):
    "What the one cell tagged `parameters` sets, with so many cells above it."
    cells = nbformat.read(path, 4).cells
    (place,) = tagged(cells)
    values = {}
    for cell in cells[place - cells_above : place + 1]:
        exec(cell["source"], {}, values)
    return values


def run(notebook, tmp_path, monkeypatch, **parameters):
    "Run it as papermill does, pictures included; the executed notebook."
    monkeypatch.delenv("MPLBACKEND", raising=False)
    return papermill.execute_notebook(
        notebook,
        tmp_path / "out.ipynb",
        parameters,
        cwd=tmp_path,
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )


def run_here(notebook, tmp_path, monkeypatch, **parameters):
    """Its code cells in this process, as papermill would hand them to a kernel, which
    takes longer to start than they take; what they show is not looked at."""
    monkeypatch.chdir(tmp_path)
    injected = parameterize_notebook(
        load_notebook_node(str(notebook)),
        parameters,
        kernel_name="python3",
        language="python",
    )
    variables = {}
    for cell in injected.cells:
        if cell.cell_type == "code":
            exec(cell.source, variables)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_no_saved_output_is_an_error(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert (
                output.output_type != "error"
                and "Traceback (most recent call last)"
                not in str(output.get("text", ""))
            )
            assert output.get("name") != "stderr" or "Error" not in output["text"], (
                output["text"]
            )


def lacks_png(data):
    """Whether an output is a picture that is drawn only where SVG or Vega-Lite is: by
    JupyterLab and VS Code no SVG of a notebook that they do not trust, and by GitHub
    and nbviewer no Vega-Lite."""
    picture = any(kind == "image/svg+xml" or "vega" in kind for kind in data)
    embedded = '<img src="data:image/png;base64,' in data.get("text/html", "")
    return picture and not embedded and "image/png" not in data


@pytest.mark.parametrize(
    "kinds, expected",
    [
        (["image/svg+xml", "text/plain"], True),
        (["application/vnd.vegalite.v5+json", "image/svg+xml"], True),
        (["application/vnd.vega.v6+json", "text/html"], True),
        (["application/vnd.vegalite.v5+json", "image/png"], False),
        (["image/svg+xml", "image/png"], False),
        (["text/html", "text/plain"], False),
    ],
)
def test_a_picture_without_png_is_seen(kinds, expected):
    assert lacks_png(dict.fromkeys(kinds, "")) == expected
    page = {"text/html": '<img src="data:image/png;base64,AA==">'}
    assert not lacks_png(dict.fromkeys(kinds, "") | page)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_every_picture_is_saved_as_png(path):
    "Beside what moves or is sharper: whoever does not trust it, shows the PNG."
    for cell in nbformat.read(path, 4).cells:
        for output in cell.get("outputs", []):
            assert not lacks_png(output.get("data", {})), cell.source


def raw_syntax(markdown):
    "What only Quarto reads: GitHub, nbviewer and JupyterLab show it as it is."
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown, flags=re.M | re.S)
    pattern = r":::|\{\{<|\{[#.][a-zA-Z][^}]*\}|@(?:eq|fig|sec|tbl)-\w+|\[\^\w+\]"
    return re.findall(pattern, text)


@pytest.mark.parametrize(
    "markdown, found",
    [
        ("::: {.callout-note}\nx\n:::", [":::", "{.callout-note}", ":::"]),
        ("$$x$$ {#eq-x}, see @eq-x and @fig-y", ["{#eq-x}", "@eq-x", "@fig-y"]),
        ("a footnote[^1]", ["[^1]"]),
        ("`{#eq-x}` is a name, $\\frac{.3}{.8}$ a formula, a@b.org an address", []),
        ("```\n::: {.callout}\n```", []),
    ],
)
def test_raw_syntax_is_seen(markdown, found):
    assert raw_syntax(markdown) == found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_needs_no_quarto(path):
    "Its texts and its pictures are seen where only nbconvert looks at it."
    for cell in nbformat.read(path, 4).cells:
        assert cell.cell_type != "markdown" or not raw_syntax(cell.source)
        hidden = cell.source.startswith("#| hide")
        for output in [] if hidden else cell.get("outputs", []):
            data = output.get("data", {})
            shown = set(data) - {"text/plain"}
            text = data.get("text/plain", "")
            assert shown or not re.match(r"<[\w.]+ .*at 0x|<Figure|<IPython", text)


@pytest.mark.parametrize("name", ["1_figure/08_gae", "experiments/compare"])
def test_pictures_survive_nbconvert(name):
    "As many pictures as were saved."
    notebook = nbformat.read(ROOT / f"nbs/{name}.ipynb", 4)
    page, _ = HTMLExporter().from_notebook_node(notebook)
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    kinds = [set(output.get("data", {})) for output in outputs]
    pictures = {"image/png", "image/svg+xml"}
    assert page.count('class="jp-RenderedImage') + page.count(
        'class="jp-RenderedSVG'
    ) >= sum(bool(kind & pictures) for kind in kinds)


def code_of(path):
    "The cells of code that are not empty."
    cells = nbformat.read(path, 4).cells
    return [c for c in cells if c.cell_type == "code" and c.source.strip()]


def prints(statement):
    "Whether a statement is a call of print or display."
    call = getattr(statement, "value", None)
    name = getattr(getattr(call, "func", None), "id", None)
    return isinstance(statement, ast.Expr) and name in ("print", "display")


def shows(source):
    """Whether a cell surely has an output: it prints, or ends in an expression that
    is no call (a call may return None)."""
    if re.search(r"^#\| (export|exports|exporti|hide|eval: *false)\b", source, re.M):
        return False
    body = ast.parse(re.sub(r"^\s*[!%].*$", "", source, flags=re.M)).body
    if not body or source.rstrip().endswith(";"):
        return any(map(prints, body))
    last = body[-1]
    value = isinstance(last, ast.Expr) and not isinstance(last.value, ast.Call)
    return value or any(map(prints, body))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("print(1)\nx = 2", True),
        ("x = 2\nx.y", True),
        ("display(x)", True),
        ("x = 2", False),
        ("check(x)", False),
        ("x;", False),
        ("#| export\nx", False),
        ("#| hide\nprint(1)", False),
        ("%time f()", False),
    ],
)
def test_what_a_cell_shows(source, expected):
    assert shows(source) == expected


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_saved_executed(path):
    "Every cell that surely shows something shows it."
    cells = [cell for cell in code_of(path) if shows(cell.source)]
    silent = [cell.source for cell in cells if not cell.outputs]
    assert not silent, f"execute {name_of(path)}"


@pytest.mark.parametrize("path", BOXES, ids=name_of)
def test_a_chapter_is_saved_with_its_outputs(path):
    "A box of the figure is shown at work, in numbers and in a picture."
    outputs = [cell.outputs for cell in code_of(path) if cell.outputs]
    kinds = {kind for cell in outputs for o in cell for kind in o.get("data", {})}
    assert len(outputs) >= 3
    assert kinds & {"image/png", "image/svg+xml", "text/html"}, "no picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_first_cell_is_title_and_sentence(path):
    "What nbdev reads as front matter."
    assert re.match(r"# .+\n\n> .+", nbformat.read(path, 4).cells[0].source)


def test_api_reference_is_up_to_date():
    """The saved page has a row for every public function and class of the library,
    with its docstring's first line."""
    outputs = [
        o
        for c in nbformat.read(ROOT / "nbs" / "api.ipynb", 4).cells
        for o in c.get("outputs", [])
    ]
    page = "".join(
        o["data"]["text/markdown"]
        for o in outputs
        if "text/markdown" in o.get("data", {})
    )
    for path in sorted((ROOT / "grpo_nb").rglob("[a-z]*.py")):
        module = path.relative_to(ROOT / "grpo_nb").with_suffix("")
        name = str(module).replace("/", ".")
        body = ast.parse(path.read_text()).body
        listed = [
            ast.literal_eval(node.value)
            for node in body
            if isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "__all__"
        ]
        public = {public for names in listed for public in names}
        for thing in body:
            if not isinstance(thing, (ast.FunctionDef, ast.ClassDef)):
                continue
            if thing.name not in public:
                continue
            about = (ast.get_docstring(thing) or "").splitlines()[0].replace("|", "\\|")
            row = re.search(
                rf"^\| \[`{thing.name}`\].*$",
                page.partition(f"## {name}\n")[2],
                re.M,
            )
            assert row and about in row[0], (
                f"run nbs/api.ipynb again: {name}.{thing.name}"
            )


def test_the_parameters_of_train_are_the_fields_of_the_configs():
    """One parameter for each option of either algorithm, all of them None or their
    default; papermill knows each."""
    fields = {
        name for config in CONFIGS.values() for name in config.__dataclass_fields__
    }
    values = parameters_of(TRAIN, cells_above=1)
    assert values.keys() == fields == papermill.inspect_notebook(TRAIN).keys()
    assert make_config(**values) == make_config()


PARAMETERIZED = [path for path in NOTEBOOKS if tagged(nbformat.read(path, 4).cells)]


def derived(source):
    """The lines of a `parameters` cell that papermill would leave old: all but names
    with a literal, and a name that is itself (set in a cell above)."""
    wrong = []
    for statement in ast.parse(source).body:
        line = ast.unparse(statement)
        try:
            name, text = line.split(" = ", 1)
            if not name.isidentifier():
                raise ValueError
            if text != name:
                ast.literal_eval(text)
        except ValueError:
            wrong.append(line)
    return wrong


@pytest.mark.parametrize(
    "source, wrong",
    [
        ("G = 8  # of a query\nbeta = None\nnames = ['a', 1e-4, -1]", []),
        ("model = model", []),
        ("sampled = G * prompts", ["sampled = G * prompts"]),
        ("G = H", ["G = H"]),
        ("path = f'{x}'\nG: int = 8", ["path = f'{x}'", "G: int = 8"]),
        ("seeds = list(range(3))", ["seeds = list(range(3))"]),
        ("import os", ["import os"]),
        ("a, b = 1, 2", ["a, b = (1, 2)"]),
    ],
)
def test_what_is_derived_is_seen(source, wrong):
    assert derived(source) == wrong


@pytest.mark.parametrize("path", PARAMETERIZED, ids=name_of)
def test_parameters_are_literals(path):
    """One tagged cell; papermill injects its own below it, so what is computed there
    would stay as it was; and papermill's help knows every name."""
    cells = nbformat.read(path, 4).cells
    (place,) = tagged(cells)
    source = cells[place].source
    assert not derived(source)
    names = [a.targets[0].id for a in ast.parse(source).body]
    assert list(papermill.inspect_notebook(path)) == names


@pytest.mark.parametrize(
    "path", [p for p in PARAMETERIZED if p.parent == EXPERIMENTS], ids=name_of
)
def test_an_experiment_says_where_its_parameters_are(path):
    "Above them: which cell it is, where the guide is, where what it makes goes."
    cells = nbformat.read(path, 4).cells
    above = cells[: tagged(cells)[0]]
    text = "\n".join(c.source for c in above if c.cell_type == "markdown")
    for words in ("tag", "`parameters`", "papermill", "`output_dir`"):
        assert words in text
    assert "(../guides/parameters.ipynb)" in text


def test_the_parameters_of_compare_and_recipes_are_the_defaults():
    "What they write out is what the config has, but for the size of the experiment."
    sized = {"seeds", "max_steps", "completions_per_step", "eval_steps", "recipes"}
    for path in (COMPARE, RECIPES):
        values = parameters_of(path)
        for algorithm, config in CONFIGS.items():
            own = values.keys() & config.__dataclass_fields__.keys() - sized
            written = make_config(algorithm=algorithm, **{x: values[x] for x in own})
            assert written == make_config(algorithm=algorithm)


def documented_commands():
    "Every `papermill` line of the texts, as words; lines that go on are joined."
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            text = cell.source.replace("\\\n", " ")
            blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
            for block in blocks if cell.cell_type == "markdown" else []:
                for line in block.splitlines():
                    if line.startswith("papermill "):
                        yield shlex.split(line, comments=True)


def test_documented_commands_give_parameters_that_exist():
    "Each name is the notebook's, and a list is not given with -p, which is for texts."
    commands = list(documented_commands())
    assert len(commands) >= 8
    for words in commands:
        known = papermill.inspect_notebook(ROOT / words[1])
        for flag, name, value in zip(words, words[1:], [*words[2:], ""]):
            if flag == "-p":
                assert name in known and value[0] not in "[{", words
            if flag == "-y":
                given = yaml.safe_load(name)
                assert given.keys() <= known.keys(), words


def test_train_notebook(tmp_path, monkeypatch):
    "PPO, on a file of others: `problem` and `solution`, as in MATH."
    problems = [
        {"problem": f"{a}+{b}=", "solution": f"It is \\boxed{{{a + b}}}."}
        for a in range(10)
        for b in range(10)
    ]
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    notebook = run(
        TRAIN,
        tmp_path,
        monkeypatch,
        algorithm="ppo",
        task=str(tmp_path / "problems.json"),
        max_steps=2,
        num_prompts=8,
        eval_size=10,
        device="cpu",
        output_dir=str(tmp_path / "run"),
    )
    assert len(read_metrics(tmp_path / "run")) == 2
    assert len(pd.read_parquet(tmp_path / "run/completions.parquet")) == 2 * 8
    assert {"summary.txt", "curves.png", "model", "config.json"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    shown = str([cell.get("outputs") for cell in notebook.cells])
    assert "held-out accuracy after" in shown and "image/png" in shown
    assert "prompt from problem, answer from solution" in shown
    (live,) = [cell for cell in notebook.cells if "LivePlot()" in cell.source]
    assert (
        sum("image/png" in output.get("data", {}) for output in live.outputs) == 1
    )  # redrawn in its place


def test_recipes_notebook(tmp_path, monkeypatch):
    "Recipes by name, each with the same number of completions."
    run(
        RECIPES,
        tmp_path,
        monkeypatch,
        recipes=["dapo", "rloo", "ppo"],
        max_steps=2,
        completions_per_step=32,
        output_dir=str(tmp_path / "runs"),
    )
    lengths = {
        path.parent.name: len(pd.read_parquet(path))
        for path in (tmp_path / "runs").rglob("completions.parquet")
    }
    assert (
        lengths["rloo-seed0"] == lengths["ppo-seed0"] == 64 and "dapo-seed0" in lengths
    )


def test_a_recipe_that_is_not_there_is_refused(tmp_path, monkeypatch):
    "Before anything is trained."
    with pytest.raises(ValueError, match="'dapoo' is not a recipe"):
        wrong = {"recipes": ["dapoo"], "output_dir": str(tmp_path / "none")}
        run_here(RECIPES, tmp_path, monkeypatch, **wrong)
    assert not (tmp_path / "none").exists()


def test_train_notebook_with_a_recipe(tmp_path, monkeypatch):
    "GRPO: `-p recipe dapo` is all it takes; what is given beside it wins."
    run_here(
        TRAIN,
        tmp_path,
        monkeypatch,
        recipe="dapo",
        max_steps=2,
        num_prompts=4,
        num_generations=4,
        eval_size=10,
        device="cpu",
        output_dir=str(tmp_path / "run"),
    )
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert (
        config["epsilon_high"] == 0.28
        and config["dynamic_sampling"] == 4
        and config["num_generations"] == 4
    )
    assert read_metrics(tmp_path / "run")[-1]["num_completions"] >= 32


def test_compare_notebook(tmp_path, monkeypatch):
    run(
        COMPARE,
        tmp_path,
        monkeypatch,
        seeds=1,
        max_steps=2,
        completions_per_step=16,
        num_generations=4,
        output_dir=str(tmp_path / "runs"),
    )
    runs = {path.parent for path in (tmp_path / "runs").rglob("config.json")}
    assert len(runs) >= 2 and all(
        len(read_metrics(directory)) == 2
        for directory in runs
        if (directory / "metrics.jsonl").exists()
    )


# The claims ---------------------------------------------------------------------------

CLAIMS = sorted(EXPERIMENTS.glob("claims/[0-9]*.ipynb"))
DECIDED = [
    path.stem
    for path in sorted(EXPERIMENTS.glob("claims/*.ipynb"))
    if "claim.conclude(" in path.read_text(encoding="utf-8")
]


def printed(path):
    "All text that the cells of a saved notebook have put out."
    outputs = [
        o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])
    ]
    return "\n".join(
        o.get("text", "") or o.get("data", {}).get("text/markdown", "") for o in outputs
    )


def prose(path):
    "The texts of a notebook, cell by cell."
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if cell.cell_type == "markdown"]


@pytest.mark.parametrize("path", CLAIMS, ids=name_of)
def test_a_claim_is_saved_with_the_verdict_of_its_results(path):
    "Its page, the page of all claims and the README say the same."
    noted = json.loads((ROOT / "benchmarks/claims" / f"{path.stem}.json").read_text())
    assert re.match(r"(holds|does not hold|undecided)\b", noted["verdict"])
    assert len(noted["reason"]) > 40 and noted["practice"]
    assert f"Verdict: {noted['verdict']}\n" in printed(path)
    found = verdicts(ROOT / "benchmarks/claims").loc[path.stem]
    for page, lines in (
        (printed(EXPERIMENTS / "claims/index.ipynb"), found["headlines"]),
        ((ROOT / "README.md").read_text(), found["in_brief"]),
    ):
        assert noted["claim"] in page
        assert lines and all(line in page for line in lines)
    for table in noted["tables"]:
        rows = pd.read_csv(ROOT / "benchmarks/claims" / f"{path.stem}_{table}.csv")
        assert len(rows) == noted["tables"][table]["rows"] > 0
        assert not rows.map(lambda x: str(x).startswith("/")).any().any(), (
            "a path of one machine"
        )


@pytest.mark.parametrize("name", DECIDED)
def test_a_verdict_follows_from_the_committed_tables(name):
    "Decided again: what `make verdicts` would write is what is there."
    done = python(ROOT / "tools/verdicts.py", "--check", name, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_page_of_all_claims_runs(tmp_path, monkeypatch):
    "It checks what its texts say. (nbdev_test leaves out the folder of the claims.)"
    monkeypatch.delenv("MPLBACKEND", raising=False)
    papermill.execute_notebook(
        EXPERIMENTS / "claims/index.ipynb",
        tmp_path / "out.ipynb",
        cwd=EXPERIMENTS / "claims",
        kernel_name="python3",
        progress_bar=False,
    )


@pytest.mark.parametrize("path", CLAIMS, ids=name_of)
def test_a_claim_opens_with_the_words_of_the_article(path):
    """The first cell behind the title quotes them, in Chinese and translated; the rule,
    and what the verdict does not license, are there, too."""
    opening = nbformat.read(path, 4).cells[1].source
    assert opening.startswith("**In the article's words.** 「")
    assert re.search("[一-鿿]{6}.*」\\.? \\*[A-Z]", opening)
    texts = prose(path)
    assert sum("46_statistics.ipynb#from-an-interval" in text for text in texts) == 1
    assert sum(text.startswith("## What this does not license") for text in texts) == 1


@pytest.mark.parametrize("path", CLAIMS, ids=name_of)
def test_a_claim_says_what_others_found(path):
    """In a section of its own, before how far it goes: whether they agree, and where
    it is written."""
    texts = prose(path)
    titles = [text.splitlines()[0] for text in texts]
    place = titles.index("## In the literature")
    assert titles[place + 1] == "## How far it goes"
    lines = [line for line in texts[place].splitlines() if line.startswith("- ")]
    assert len(lines) >= 3
    for line in lines:
        assert re.match(r"- \*[^*]+\*: ", line), line
        assert re.search(r"\]\(https://(arxiv\.org/abs|github\.com)/", line), line
    paper = r"\[([\d.]+)\]\(https://arxiv\.org/abs/([\d.]+)\)"
    for number, address in re.findall(paper, texts[place]):
        assert number == address
    assert "arxiv.org" not in texts[place + 1]


def test_the_guide_to_choosing_is_found():
    "From the home page, the Chinese one, the guide to faults and the claims."
    pages = ("index", "zh", "guides/troubleshooting", "experiments/claims/index")
    for page in pages:
        text = "".join(prose(ROOT / f"nbs/{page}.ipynb"))
        assert re.search(r"\]\([./]*(guides/)?choosing\.ipynb\)", text), page


def test_the_home_page_shows_three_claims():
    "One picture, and for each of its panels a line with a link to the page it is of."
    home = ROOT / "nbs/index.ipynb"
    (cell,) = [
        cell
        for cell in nbformat.read(home, 4).cells
        if cell.cell_type == "code" and "subplots(1, 3" in cell.source
    ]
    assert [set(out.data) >= {"image/png"} for out in cell.outputs] == [True]
    for page in ("07_stability", "10_groups", "08_performance"):
        line = rf"- \*\*\[\w+\]\(experiments/claims/{page}\.ipynb\)\*\*.*\[.*\]"
        assert re.search(line, printed(home)), page
    assert "(nbs/images/index-2.png)" in (ROOT / "README.md").read_text()


def test_ten_claims():
    assert [int(path.name[:2]) for path in CLAIMS] == list(range(1, 11))


def test_a_claim_in_miniature(tmp_path, monkeypatch):
    """In a checkout of its own: it runs, keeps nothing, and says what it says. All
    ten: make claims SMOKE=1."""
    name = "03_parameters"
    (tmp_path / "benchmarks/claims").mkdir(parents=True)
    shutil.copytree(EXPERIMENTS, tmp_path / "nbs/experiments")
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = papermill.execute_notebook(
        EXPERIMENTS / f"claims/{name}.ipynb",
        tmp_path / "out.ipynb",
        {"smoke": True, "jobs": 2},
        cwd=tmp_path / "nbs/experiments/claims",
        kernel_name="python3",
        progress_bar=False,
        log_output=False,
    )
    said = "".join(
        o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", [])
    )
    assert re.search(
        r"^Verdict: (holds|does not hold|undecided).*\(a smoke run: it says nothing\)$",
        said,
        re.M,
    )
    assert not any((tmp_path / "benchmarks/claims").iterdir())
    assert list((tmp_path / f"runs/claims/smoke-{name}").glob(f"{name}_*.csv"))
