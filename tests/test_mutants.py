"""The list of known bugs still fits the library and the tests; `make mutants` puts
them in and sees the tests fail."""

import ast
import os
import re
import subprocess
import sys
import tomllib

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import mutants
import random_mutants


def test_every_mutant_fits():
    """`find` occurs exactly once, the test exists; each name comes once, and each of
    the 28 known bugs is there."""
    chosen = mutants.mutants()
    assert mutants.problems(chosen) == []
    assert len({mutant["name"] for mutant in chosen}) == len(chosen)
    assert {mutant["bug"] for mutant in chosen} == set(range(29))
    for mutant in chosen:
        assert set(mutant) - {"raises"} == {
            "name",
            "bug",
            "title",
            "file",
            "find",
            "replace",
            "test",
        }, mutant["name"]
        assert mutant["find"] != mutant["replace"] and mutant["file"].startswith(
            "grpo_nb/"
        ), mutant["name"]


def test_every_known_bug_has_its_source():
    "A project, an address, and what it did."
    bugs = tomllib.loads((ROOT / "tests/mutants/mutants.toml").read_text())["bug"]
    assert [bug["number"] for bug in bugs] == list(range(1, 29))
    for bug in bugs:
        assert (
            re.fullmatch(
                rf"https://github\.com/{re.escape(bug['project'])}"
                r"/((issues|pull)/\d+|blob/[0-9a-f]{40}/.+)",
                bug["url"],
            )
            and bug["what"]
        ), bug


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"find": "no such line"}, "`find` occurs 0 times in grpo_nb/gae.py"),
        ({"find": "mask"}, r"`find` occurs \d+ times"),
        ({"file": "grpo_nb/none.py"}, "`find` occurs 0 times in grpo_nb/none.py"),
        ({"test": "tests/test_equations.py::test_none"}, "there is no .*test_none"),
        ({"test": "tests/test_none.py::test_none[1]"}, "there is no .*test_none"),
    ],
    ids=str,
)
def test_drift_is_noticed(change, problem):
    """A formula that was rewritten, or a test that was renamed, is named; nothing is
    skipped in silence."""
    (mutant,) = (
        mutant
        for mutant in mutants.mutants()
        if mutant["name"] == "gae-2-no-gamma-in-the-trace"
    )
    (found,) = mutants.problems([mutant | change])
    assert re.search(f"{mutant['name']}: {problem}", found)


# Mutants that nobody chose ------------------------------------------------------------

MODULE = """"A module. 1 + 1."

from math import log

LIMIT: int = 3


def clipped(x: "1 + 1", mask: bool = True, low: float = 0.5) -> "2 - 1":
    "Clip, 3 - 2 times."
    if x is None or x != x and not mask:
        raise ValueError(f"x = {x + 1}" + " is 1")
    warn("below", 1 + 1)
    x = log(x * 2)  # a comment with + and *
    for _ in range(LIMIT):
        x += max(low, x)[1:]
    return x.detach() * mask
"""


def written():
    "Each mutant of it that is another program, as (operator, its changed line)."
    return {
        (mutant.operator, line[1:].strip())
        for mutants in random_mutants.mutants_of("grpo_nb/clipped.py", MODULE)
        for mutant in filter(random_mutants.is_another, mutants)
        for line in mutant.diff().splitlines()[3:]
        if line.startswith("+")
    }


@pytest.mark.parametrize(
    "operator, line",
    [
        ("constant", "LIMIT: int = 4"),
        ("constant", "LIMIT: int = -3"),
        ("comparison", "if x is not None or x != x and not mask:"),
        ("logic", "if x is None and x != x and not mask:"),
        ("logic", "if x is None or x != x or not mask:"),
        ("negation", "if x is None or x != x and mask:"),
        ("statement dropped", "pass"),
        ("arithmetic", "x = log(x / 2)  # a comment with + and *"),
        ("arithmetic", "x -= max(low, x)[1:]"),
        ("name", "x += min(low, x)[1:]"),
        ("bound dropped", "x += max(low, x)[:]"),
        ("call dropped", "return x * mask"),
        ("operand dropped", "return (x.detach())"),
    ],
)
def test_each_operator(operator, line):
    assert (operator, line) in written()


def test_only_what_can_matter_is_mutated():
    """Not a docstring, an annotation, a message, an import; arguments of max stay in
    order."""
    changed = {line for _, line in written()}
    for never in ("A module", "Clip", "import", "raise", "warn", "max(x, low)"):
        assert not any(never in line for line in changed), never
    for head in (line for line in changed if line.startswith("def")):
        assert re.fullmatch(
            r'def clipped\(x: "1 \+ 1", mask: bool = \w+, low: float = \S+\) -> "2 - '
            r'1":',
            head,
        )


def test_a_mutant_is_one_small_edit_of_another_program():
    "Of the whole core: it parses, differs, and its diff lies within one statement."
    for module in ("gae", "objective"):
        path = ROOT / f"grpo_nb/{module}.py"
        plain = ast.dump(ast.parse(path.read_text()))
        drawn = random_mutants.draw(ROOT, (module,), 30, seed=0)
        assert len({mutant.new for mutant in drawn}) == 30
        for mutant in drawn:
            assert ast.dump(ast.parse(mutant.new)) != plain
            assert mutant.old == path.read_text()
            assert mutant.diff().count("\n@@") <= 2, mutant.diff()


def test_a_seed_draws_the_same():
    first, second, other = (
        random_mutants.draw(ROOT, ("gae", "group", "value"), 12, seed)
        for seed in (1, 1, 2)
    )
    assert [m.diff() for m in first] == [m.diff() for m in second]
    assert [m.diff() for m in first] != [m.diff() for m in other]


def test_the_tests_of_a_statement():
    """Those that run it, quickest first, as long as the seconds last; never none of
    them."""
    (mutant,) = random_mutants.draw(ROOT, ("gae",), 1, seed=0)
    lines = {mutant.file: [mutant.lines[0]]}
    trace = {
        "slow": {"seconds": 5.0, "lines": lines},
        "quick": {"seconds": 1.0, "lines": lines},
        "elsewhere": {
            "seconds": 0.1,
            "lines": {"grpo_nb/group.py": lines[mutant.file]},
        },
    }
    assert random_mutants.tests_for(mutant, trace, 10) == ["quick", "slow"]
    assert random_mutants.tests_for(mutant, trace, 3) == ["quick"]
    assert random_mutants.tests_for(mutant, trace, 0.5) == ["quick"]


TESTED = """
import pytest

from grpo_nb.clipped import clipped

def test_clipped():
    assert clipped(0.2) == 0.5 and clipped(2.0) == 2.0

def test_no_end():
    assert clipped(0.2) < 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked children")
def test_random_mutants_are_killed_or_told(tmp_path):
    """A library of one function: a wrong clip is killed, a bound that no test meets
    is told."""
    for part in ("grpo_nb", "tests", "tools"):
        (tmp_path / part).mkdir()
    for tool in ("mutants.py", "random_mutants.py"):
        (tmp_path / "tools" / tool).write_text((ROOT / "tools" / tool).read_text())
    (tmp_path / "grpo_nb/__init__.py").touch()
    (tmp_path / "grpo_nb/clipped.py").write_text(
        "def clipped(x, low=0.5):\n    if x >= 9:\n        return 9\n"
        "    return max(x, low)\n"
    )
    (tmp_path / "tests/test_clipped.py").write_text(TESTED)
    command = "--random 12 --seed 1 --modules clipped --tests tests/test_clipped.py"
    quick = "import mutants; mutants.PRELOADED = ('pytest',); mutants.main()"
    done = subprocess.run(
        [sys.executable, "-c", quick, *command.split()],
        cwd=tmp_path / "tools",
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"killed +name +grpo_nb/clipped.py:4 ", done.stdout)
    assert "survived: comparison" in done.stdout
    assert "-    if x >= 9:\n+    if x > 9:" in done.stdout
    assert re.search(r"[1-9]\d* killed, [1-9]\d* survived, 0 broken", done.stdout)
