"The list of known bugs still fits the library and the tests; `make mutants` puts them in and sees the tests fail."

import re
import sys
import tomllib

import pytest

from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import mutants


def test_every_mutant_fits():
    "`find` occurs exactly once, the test exists; each name comes once, and each of the 28 known bugs is there."
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
                rf"https://github\.com/{re.escape(bug['project'])}/(issues|pull)/\d+|https://github\.com/{re.escape(bug['project'])}/blob/[0-9a-f]{{40}}/.+",
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
    "A formula that was rewritten, or a test that was renamed, is named; nothing is skipped in silence."
    (mutant,) = (
        mutant
        for mutant in mutants.mutants()
        if mutant["name"] == "gae-2-no-gamma-in-the-trace"
    )
    (found,) = mutants.problems([mutant | change])
    assert re.search(f"{mutant['name']}: {problem}", found)
