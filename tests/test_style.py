"""The code that readers meet: how dense, how wide and how long it may be.

A statement holds one idea. What is counted is what no formatter changes: nodes of the
syntax tree (expressions and statements) per statement, and statements per function.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize

import pytest
from helpers import ROOT, imports

PACKAGE = ROOT / "grpo_nb"
MODULES = {
    str(path.relative_to(PACKAGE).with_suffix("")).replace("/", "."): path
    for path in sorted(PACKAGE.rglob("[a-z]*.py"))
}
FIGURE = [name for name in MODULES if "." not in name]  # Book I
NODES = {True: 7, False: 8}  # per statement, in the figure and elsewhere
STATEMENTS = 25  # of a function
PUBLIC = {True: 8, False: 15}  # names of a module, its options and box left out
COLUMNS = 88
PRODUCTION = {"vllm", "peft", "accelerate", "deepspeed"}


def tree(name):
    return ast.parse(MODULES[name].read_text())


def count(node, kinds):
    return sum(isinstance(child, kinds) for child in ast.walk(node))


@pytest.mark.parametrize("name", MODULES)
def test_one_idea_a_statement(name):
    module = tree(name)
    statements = count(module, ast.stmt)
    nodes = statements + count(module, ast.expr)
    assert nodes <= NODES[name in FIGURE] * statements, nodes / statements


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert count(node, ast.stmt) - 1 <= STATEMENTS, node.name


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_few_public_names(name):
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree(name).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ] or [[]]
    names = [x for x in names if not x.endswith("Options")]
    assert len(names) <= PUBLIC[name in FIGURE], names


@pytest.mark.parametrize("name", FIGURE)
def test_the_figure_stands_alone(name):
    "Book I imports nothing from the other books, and knows no production."
    found = set(imports(MODULES[name].read_text()))
    modules = {module.removeprefix("grpo_nb.") for module in found}
    assert not {module.split(".")[0] for module in modules} & {
        "run",
        "engine",
        "evidence",
        *PRODUCTION,
    }
    assert not any(module.startswith("torch.distributed") for module in modules)
    words = {
        node.attr for node in ast.walk(tree(name)) if isinstance(node, ast.Attribute)
    }
    assert not words & {"distributed", "autocast"}


def sources():
    "Every Python file that a person writes, and every code cell."
    for folder in ("tests", "tools", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path, path.read_text()
    for path in sorted((ROOT / "nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" not in path.parts:
            for cell in json.loads(path.read_text())["cells"]:
                if cell["cell_type"] == "code":
                    yield f"{path.name} {cell['id']}", "".join(cell["source"])


def docstrings(text):
    "Lines within a docstring."
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    found = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    return {line for x in found for line in range(x.lineno, x.end_lineno + 1)}


def text_of_others(text):
    "Lines within a string of several lines: a script, a page, a model card."
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        written_for_readers = docstrings(text)
    except (tokenize.TokenError, SyntaxError):  # a magic
        return set()
    return {
        line
        for token in tokens
        if token.type == tokenize.STRING and token.start[0] < token.end[0]
        for line in range(token.start[0], token.end[0] + 1)
    } - written_for_readers


def test_no_line_is_wide():
    """Code, comments, docstrings and strings.

    A cell's directives, too: JupyterLab shows them, and a long one goes on on the next
    line. What is written for another reader (a script in a string, say) has its own
    form."""
    found = []
    for where, text in sources():
        wide = {
            number: line
            for number, line in enumerate(text.splitlines(), 1)
            if len(line) > COLUMNS
        }
        for number in wide.keys() - (text_of_others(text) if wide else set()):
            found.append(f"{where}: {wide[number][:60]}")
    assert not found, found


def ruff(*arguments):
    "What ruff has to say, a line each."
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise"]
        + list(map(str, arguments)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stderr  # 2: it could not look
    return [line for line in done.stdout.splitlines() if re.search(r": [A-Z]\d", line)]


def test_ruff_finds_nothing():
    "The rules of pyproject.toml, over notebooks, tests, tools and benchmarks."
    assert ruff(".") == []


def test_every_name_is_defined():
    "But for the letters of shapes, which are names to ruff and none to Python."
    folders = ["nbs", "tests", "tools", "benchmarks", *MODULES.values()]
    found = ruff("--isolated", "--select", "F821", *folders)
    assert [x for x in found if not re.search(r"name `[A-Za-z]`", x)] == []


def test_no_module_imports_in_vain():
    "What a chapter exports uses all that it imports; `load_policy` is also policy's."
    found = ruff("--isolated", "--select", "F401,F811", *MODULES.values())
    assert [line for line in found if "load_policy" not in line] == []
