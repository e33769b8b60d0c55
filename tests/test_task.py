"""The tasks: a parser against Python's own, a split that never leaks, and answers
that their own task finds right."""

import os
import random
import re
import subprocess
import sys
from ast import literal_eval

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_nb.task import TASKS, Query, evaluate_expression, load_task

SETTINGS = [(name, digits) for name in TASKS for digits in (1, 2, 3)]
numbers = st.integers(0, 99).map(str)
expressions = st.recursive(
    numbers,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map("".join),
        inner.map("({})".format),
    ),
    max_leaves=8,
)


def python_value(text):
    """What Python makes of it; None where it is not an expression of the numbers,
    signs and parentheses that the task allows."""
    if not re.fullmatch(r"[0-9+*()-]{1,64}", text) or "**" in text:
        return None
    text = re.sub(
        r"\d+", lambda number: str(int(number[0])), text
    )  # 007 is 7 here, and an error in Python
    if re.search(r"(^|[-+*(])[-+]", text) or re.search(r"\d\(|\)\d|\)\(", text):
        return None  # signs and calls that Python knows and the task does not
    try:
        return eval(text)
    except SyntaxError:
        return None


@given(expressions)
def test_expressions_have_the_value_that_python_gives_them(text):
    assert evaluate_expression(text) == python_value(text)


@given(st.text("0123456789+-*()", max_size=7))
def test_any_text_is_an_expression_or_none(text):
    assert evaluate_expression(text) == python_value(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1/2",
        "2**3",
        "1 + 1",
        "x",
        "1e3",
        "__import__('os')",
        "1+1;2",
        "٣",
        "1_0",
        "+1",
        "-1",
        "1+",
        "(",
        "()",
        "1" * 65,
        "(" * 60 + "1",
    ],
)
def test_what_is_not_an_expression(text):
    assert evaluate_expression(text) is None


@pytest.mark.parametrize("name, digits", SETTINGS)
def test_the_split_does_not_leak(name, digits):
    """Training queries and held-out queries share no key; the same seed gives the
    same queries; all are of the right side."""
    task = load_task(name, digits=digits)
    train, heldout = task.queries("train", 300, seed=1), task.queries("heldout", 60)
    assert not {query.key for query in train} & {query.key for query in heldout}
    assert not any(query.is_heldout for query in train)
    assert all(query.is_heldout for query in heldout)
    assert task.queries("train", 300, seed=1) == train and (
        digits == 1 or task.queries("train", 300, seed=2) != train
    )


@pytest.mark.parametrize("salt", [1, 2])
def test_the_split_is_the_same_in_every_process(salt):
    """A key is held out if its CRC-32 is a multiple of 5, whatever Python's salt of
    `hash`: a resumed run must not train on what it is tested with."""
    source = (
        "import zlib; from grpo_nb.task import load_task; print([(q.key, "
        "zlib.crc32(q.key.encode()) % 5 == 0) for s in ('train', 'heldout') for q in "
        "load_task('add').queries(s, 20)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONHASHSEED": str(salt)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [heldout for _, heldout in literal_eval(done.stdout)] == [False] * 20 + [
        True
    ] * 20


@pytest.mark.parametrize("name", ["rows.jsonl", "owner/name", "gsm8k:x", "sub", 3, []])
def test_other_sources_are_elsewhere(name):
    "The figure opens its own tasks only, and says who opens the others."
    with pytest.raises(ValueError, match="one of add, sums, .*engine.data.load_task"):
        load_task(name)


def test_a_sum_and_its_mirror_are_one_question():
    task = load_task("add")
    assert task.parse("12+34=").key == task.parse("34 + 12").key and task.parse(
        "12+34="
    ) != task.parse("34+12=")


def test_no_query_comes_twice_before_all_have_come_once():
    assert (
        len({query.prompt for query in load_task("add").queries("train", 6000, seed=3)})
        == 6000
    )


@pytest.mark.parametrize("name, digits", SETTINGS)
def test_solutions_are_right(name, digits):
    task, rng = load_task(name, digits=digits), random.Random(0)
    for query in task.queries("train", 50):
        assert task.is_right(task.solve(query, rng), query)
        assert not task.is_right("", query) and not task.is_right(
            str(int(query.columns["answer"]) + 1), query
        )


@pytest.mark.parametrize(
    "prompt, completion, right",
    [
        ("24:", "20+4", True),
        ("24:", "4*6", True),
        ("24:", "(9-3)*4", True),
        ("24:", "24", False),
        ("24:", "20+5", False),
        ("24:", "20+4=", False),
        ("24:", "20 + 4", False),
        ("12+34=", "46", True),
        ("12+34=", "46 ", False),
        ("12+34=", "046", False),
        ("12+34=", "45", False),
    ],
)
def test_right_and_wrong(prompt, completion, right):
    task = load_task("target" if ":" in prompt else "add")
    assert task.is_right(completion, task.parse(prompt)) == right


def test_what_is_not_a_query():
    for name in TASKS:
        assert (
            load_task(name).parse("hello") is None and load_task(name).parse("") is None
        )
    assert (
        Query(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ).text
        == "a\nb"
    )
