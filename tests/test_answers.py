"""Written answers: numbers, pairs, intervals and letters as people and their models
write them; what is right, what is wrong, and what must not hang."""

import time

import math_verify
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from grpo_nb.engine import answers
from grpo_nb.engine.answers import choice_reward, is_right_choice, is_right_math
from grpo_nb.engine.answers import math_reward, read_answer, read_choice
from grpo_nb.engine.answers import same_written, with_answer_rule
from grpo_nb.engine.data import as_task, load_task
from grpo_nb.task import Query


def judged(rule, answer, texts):
    query = Query("", {"answer": answer})
    return [text for text in texts if rule(text, query)]


RIGHT = [  # the answer of a row, texts that mean it
    (
        "42",
        [
            "42",
            "42.0",
            "42.",
            "$42$",
            r"\boxed{42}",
            r"$\boxed{42}$",
            "The answer is 42.",
            "**42**",
            "#### 42",
            "so x = 42",
            r"\(42\)",
            r"\[ x = 42 \]",
            "Answer: 42",
            "**Answer:** 42",
            "**Answer**: 42",
            "<answer>42</answer>",
            "42 km",
            r"\boxed{42\text{ cm}}",
            r"\boxed{x=42}",
            r"The final answer is $\boxed{42}$. I hope it is correct.",
            "The answer is: $42$",
            "Therefore, the answer is **42**.",
            "84/2",
            "Thus 6*7 = 42",
            r"\boxed{42^\circ}",
            "The result is 42, since 6*7 = 42.",
            "答案是42",
            "+42",
            "Final answer: 42",
            "the answer is therefore 42",
            "42%",
            r"\fbox{42}",
            "$$42$$",
            "The answer is\n\n42",
            r"\boxed{ 42 }",
            r"\boxed{\$42}",
            "The answer is x=42",
            r"\boxed{\mathbf{42}}",
            r"\boxed 42",
        ],
    ),
    ("-7", ["-7", "−7", r"\boxed{-7}", "$-7$", "The answer is -7."]),
    (
        "1/2",
        [
            "1/2",
            "0.5",
            ".5",
            r"\frac{1}{2}",
            r"$\frac12$",
            r"\boxed{\dfrac{1}{2}}",
            r"\tfrac{1}{2}",
            "50%",
            r"50\%",
            r"\boxed{50\%}",
            "2/4",
            "0.50",
            "1 / 2",
        ],
    ),
    (r"\frac{1}{2}", ["0.5", "1/2", r"\dfrac{1}{2}"]),
    (r"$\frac{-3}{4}$", ["-3/4", "-0.75", r"-\frac{3}{4}", r"\boxed{-\frac34}"]),
    ("3 1/2", ["3.5", "7/2", r"3\frac{1}{2}"]),
    (
        "25%",
        [
            "25%",
            "0.25",
            "1/4",
            "25",
            "25 percent",
            r"$25\%$",
            "The probability is 25%.",
            "25 %",
        ],
    ),
    (r"50\%", ["50%", "0.5"]),
    ("0.25", ["25%"]),
    (
        "1,200",
        [
            "1200",
            "1,200",
            "1{,}200",
            "1200.0",
            "$1,200",
            r"\$1{,}200",
            "It costs $1,200.",
        ],
    ),
    (1200, ["1200", "1,200"]),
    (0.5, ["1/2", "0.5"]),
    (1e-05, ["0.00001"]),
    (
        "(1, 2)",
        [
            "(1,2)",
            "(1, 2)",
            "$(1,2)$",
            r"\boxed{(1, 2)}",
            r"\left(1, 2\right)",
            "The answer is (1, 2).",
            "(1.0, 4/2)",
            "So the point is (1, 2).",
            "(x, y) = (1, 2)",
            r"\boxed{\left(1,2\right)}",
            "(1;2)",
            "**(1, 2)**",
            "The point is $(1, 2)$.",
        ],
    ),
    (
        r"\left( 3, \frac{\pi}{2} \right)",
        [r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3,\frac{\pi}{2})"],
    ),
    ("(1, 2, 3)", ["(1,2,3)"]),
    (
        r"\left(\frac{1}{2}, -3\right)",
        ["(0.5,-3)", r"(\frac12, -3)", r"\boxed{\left(\dfrac{1}{2}, -3\right)}"],
    ),
    (
        "[0, 1)",
        [
            "[0,1)",
            "$[0,1)$",
            r"x \in [0, 1)",
            r"\boxed{[0,1)}",
            r"\boxed{x\in\left[0,1\right)}",
            "The answer is [0, 1).",
        ],
    ),
    (
        r"(-\infty, 3]",
        [
            r"(-\infty,3]",
            "(-∞, 3]",
            r"\boxed{(-\infty, 3]}",
            r"\left(-\infty, 3\right]",
            "(-inf, 3]",
            "The solution is (-∞, 3].",
        ],
    ),
    ("[2,5]", ["[2, 5]", "[2.0,5]"]),
    (r"(-\infty, -1) \cup (2, \infty)", [r"\boxed{(-\infty,-1)\cup(2,\infty)}"]),
    (
        "1, 2",
        [
            "1,2",
            "2, 1",
            r"\{1, 2\}",
            "1 and 2",
            r"\boxed{1,2}",
            "x = 1 or x = 2",
            r"x=1 \text{ or } x=2",
            "The answer is 1, 2.",
            "The answers are 1 and 2.",
        ],
    ),
    (r"2\pi", [r"2\pi", r"\boxed{2\pi}", r"$2\pi$", r"The answer is $2\pi$."]),
    (r"\sqrt{3}", [r"\boxed{\sqrt{3}}"]),
    (r"\text{Evelyn}", [r"\boxed{\text{Evelyn}}", "Evelyn", "The answer is Evelyn."]),
    ("A train leaves; it takes 5 hours.\n#### 5", ["5", "#### 5"]),
    (r"So \boxed{7}", ["7"]),
    ("0", ["0", "0.0", "-0"]),
    ("18 seats", ["18", "18 seats"]),
    ("007", ["7"]),
    ("12.5", ["12.5", "25/2", "12.50"]),
    (["6", "six"], ["6", "six", "The answer is six."]),
    (r"90^\circ", ["90", r"90^\circ", r"\boxed{90^{\circ}}", "90°"]),
    ("0.333333", ["1/3"]),
    (
        "10",
        [
            "The answer is $10$ dollars.",
            "She has 10 apples left.",
            "3 + 7 = 10",
            "The answer is 3 + 7 = 10",
            r"$3 + 7 = \boxed{10}$",
            "10 apples",
        ],
    ),
]

WRONG = [  # the answer of a row, texts that do not mean it
    (
        "42",
        [
            "43",
            "421",
            "4.2",
            "42/0",
            r"42\pi",
            r"\boxed{42x}",
            "142",
            "42.5",
            "-42",
            "(42, 1)",
            "41-42",
            "2^42",
            "1e42",
            "42!",
            r"\boxed{42!}",
            "42 or 43",
            r"\boxed{}",
            r"\boxed{41} 42",
            "The answer is 41. Not 42",
            "forty-two",
            "",
            "42 million",
            r"\sqrt{42}",
            "sqrt 42",
            "42 pi",
            "0.42",
            "[42, 42]",
            "42, 43",
            "4 2",
            "42/1/2024",
            "12:42",
            "42k",
            "n = 42k",
            "The answer is 5 since 2x = 42",
            "42\n\\boxed{41",
            "10-42",
            "log 42",
        ],
    ),
    ("1/2", ["1", "2", "1/20", "-1/2", "0.5000011", "12", "0.05", "5%"]),
    (
        "(1, 2)",
        [
            "(2, 1)",
            "[1, 2]",
            "1, 2",
            "(1, 2, 3)",
            "(1)",
            "12",
            "(1, 2.1)",
            "3",
            r"\{1,2\}",
        ],
    ),
    ("[0, 1)", ["(0, 1)", "[0, 1]", "(0,1]", "[0,2)", "0, 1", "[1, 0)"]),
    (r"(-\infty, 3]", [r"(\infty,3]", r"(-\infty,3)", "3", r"[-\infty, 3]"]),
    ("1, 2", ["1", "(1, 2)", "1, 2, 3", "1, 3", "[1,2]", "12"]),
    (r"2\pi", ["2", r"\boxed{2}", "6.28", r"\boxed{\pi}"]),
    ("25%", ["2500", "0.0025", "26%"]),
    ("[3,1]", ["[5,2]"]),
    ("2", [r"\boxed{2\pi}", r"\boxed{2 pi}", "1-2", "2^10", "2e5"]),
    ("1200", ["1 200 000", "1,20", "200", "2,001,200"]),
]


@pytest.mark.parametrize("answer, texts", RIGHT, ids=lambda x: str(x)[:20])
def test_right_answers(answer, texts):
    assert judged(is_right_math, answer, texts) == texts


@pytest.mark.parametrize("answer, texts", WRONG, ids=lambda x: str(x)[:20])
def test_wrong_answers(answer, texts):
    assert judged(is_right_math, answer, texts) == []


LETTERS = [
    "B",
    "b",
    "B.",
    "(B)",
    "(b)",
    "[B]",
    "**B**",
    "**B.**",
    "$B$",
    "B)",
    "b)",
    r"\boxed{B}",
    r"\boxed{\text{B}}",
    r"\boxed{\text{(B)}}",
    r"\boxed{(B)}",
    "<answer>B</answer>",
    "<answer> (B) </answer>",
    "Answer: B",
    "answer: b",
    "Answer: (B)",
    "**Answer: B**",
    "**Answer:** B",
    "The answer is B",
    "The answer is B.",
    "The answer is (B).",
    "The answer is **B**.",
    "The correct answer is **(B)**.",
    "The answer is B because Paris",
    "The answer is option B",
    "The answer is: B",
    "B. Paris",
    "(B) Paris",
    "B: Paris",
    "B) Paris",
    "I think so.\nB",
    "Let me see.\n\n**B**",
    "A is wrong. So the answer is B.",
    r"The answer is $\boxed{B}$.",
    "Answer: B. Paris",
    "Answer: B) Paris",
    "Final answer: B",
    "The correct option is B",
    "The correct choice is (B).",
    "Option B",
    "#### B",
    "The answer is (B) Paris, not London",
    "B is the correct answer.",
    "(B) is correct",
    "So **B** is right.",
    "答案是B",
    'The answer is "B".',
    "`B`",
    "**B. Paris**",
    "**(B) Paris**",
    "The best answer is B",
    "Correct answer: B",
    r"$\text{B}$",
    r"The answer is $\text{(B)}$.",
]  # all of them choose B
OTHERS = [
    "A",
    "A.",
    "(A)",
    "C",
    "",
    "Bob",
    "Beta",
    "A or B",
    "B or C",
    "The answer is a dog.",
    "The answer is A, not B",
    "A. Rome\nB. Paris\nC. London",
    r"\boxed{C} B",
    "The answer is A. B is wrong",
    "Both B and C",
    "AB",
    "I think B is wrong",
    "The answer is not B.",
    r"\boxed{A, B}",
    "Answer: A/B",
    "BB",
    "The answer is B or C.",
    "(A)(B)",
]  # none of them does


@pytest.mark.parametrize("text", LETTERS)
def test_the_letter_that_is_chosen(text):
    assert read_choice(text) == {"B"}


@pytest.mark.parametrize("text", OTHERS)
def test_another_letter_or_none(text):
    assert read_choice(text) != {"B"}


def test_several_letters():
    texts = ["A, C", "A and C", "AC", r"\boxed{A, C}", "The answer is A and C.", "C, A"]
    for answer in ("A, C", "AC", ["C", "A"]):
        assert judged(is_right_choice, answer, texts) == texts
        assert judged(is_right_choice, answer, ["A", "A, B", "A or B", "B, C"]) == []


def test_a_row_whose_answer_is_no_letter_is_refused():
    rows = [{"prompt": f"q{i}", "answer": "(B)"} for i in range(5)]
    choice_reward(as_task(rows))
    for bad in ("Paris", 1, ["A", "Paris"]):
        with pytest.raises(ValueError, match="row 6 must have as its answer a letter"):
            choice_reward(as_task([*rows, {"prompt": "q", "answer": bad}]))


HOSTILE = [
    "1e999999999",
    r"\boxed{" * 200_000,
    "9" * 10**6,
    "(" * 500_000 + "1, 2" + ")" * 500_000,
    "\n" * 10**6,
    "answer:" * 150_000,
    "answer" + "*" * 10**6,
    r"\frac" * 200_000,
    "(1" + ",1" * 500_000 + ")",
    r"\boxed{(1" + ",1" * 400 + ")}",
    "A, " * 300_000,
    "1 and " * 150_000,
    "1 " * 500_000,
    r"\boxed{" + "10^" * 300 + "}",
    "__import__('os').system('id')",
    "answer is " + "(" * 10**6 + "A",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_texts_are_wrong_and_quick(text):
    begun = time.perf_counter()
    assert not judged(is_right_math, "2", [text]) + judged(is_right_choice, "B", [text])
    assert time.perf_counter() - begun < 3


def test_no_parser_sees_a_text(monkeypatch):
    "Neither math-verify's reader nor sympy's is called, whatever is written."

    def forbidden(*args, **kwargs):
        raise AssertionError("a parser was called")

    for module, name in (
        (math_verify, "parse"),
        (sympy, "sympify"),
        (sympy, "parse_expr"),
        (sympy.parsing.sympy_parser, "parse_expr"),
    ):
        monkeypatch.setattr(module, name, forbidden)
    for answer, texts in RIGHT + WRONG:
        judged(is_right_math, answer, texts)


@given(st.text(max_size=60), st.sampled_from(["2", "(1, 2)", "[0, 1)", "x^2", "50%"]))
def test_any_text_is_judged(text, answer):
    "A reward is 0 or 1, whatever is written; what is read is the same as itself."
    (reward,) = math_reward()(prompts=[""], completions=[text], answer=[answer])
    assert reward in (0, 1)
    found = read_answer(text)
    assert found is None or same_written(found, found)
    letters = read_choice(text)
    assert letters is None or all(letter.isupper() for letter in letters)


def test_where_the_answer_is_written_as_such_the_figure_agrees():
    "Of the figure's own task both rules call the same answers right."
    task = load_task("add")
    for query in task.queries("train", 50):
        right = int(query.columns["answer"])
        texts = [str(right), str(right + 1), str(-right), f"{right}0"]
        strict = [task.is_right(text, query) for text in texts]
        assert strict == [is_right_math(text, query) for text in texts]


def test_who_names_math_is_evaluated_by_it():
    task = as_task([{"prompt": f"{i}+1=", "answer": i + 1} for i in range(9)])
    query = task.query(1)
    ruled = with_answer_rule(task, ["math", "brevity"])
    assert ruled.is_right(r"\boxed{2}", query) and not task.is_right(
        r"\boxed{2}", query
    )
    assert with_answer_rule(task, ["math", "accuracy"]) is task
    assert with_answer_rule(task, ["brevity"]) is task
    assert set(answers.ANSWER_RULES) == {"math", "choice"}
