"""Tables as others have them: each shape of the chapter's table trains two steps from
the command line and by the notebook, in one format or another.

The rows are written as in the data sets that the shapes are named after."""

import contextlib
import csv
import json
import re

import pandas as pd
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from grpo_nb.engine.data import as_task, load_task, task_from_rows
from grpo_nb.engine.shapes import SHAPES, makes_target, marked_answer, recognise
from grpo_nb.run.command_line import main
from grpo_nb.run.options import make_config
from grpo_nb.run.training import open_run, train
from helpers import ROOT, read_metrics, short_config

PAIRS = [(a, b) for a in range(6) for b in range(5)]


def user(a, b):
    return {"role": "user", "content": f"{a}+{b}="}


def rows(make):
    return [make(a, b, a + b) for a, b in PAIRS]


TABLES = {  # name: (file, rows)
    "prompt": ("a.jsonl", rows(lambda a, b, s: {"prompt": f"{a}+{b}=", "answer": s})),
    "prompt, messages": (
        "a.parquet",
        rows(lambda a, b, s: {"prompt": [user(a, b)], "ground_truth": str(s)}),
    ),
    "question": (
        "a.csv",
        rows(lambda a, b, s: {"question": f"{a}+{b}=", "answer": f"so\n#### {s}"}),
    ),
    "problem": (
        "a.json",
        rows(
            lambda a, b, s: {
                "problem": f"{a}+{b}=",
                "level": "Level 1",
                "solution": f"It is $\\boxed{{{s}}}$.",
            }
        ),
    ),
    "input": ("A.TSV", rows(lambda a, b, s: {"Input": f"{a}+{b}=", "Label": s})),
    "instruction": (
        "a.json.gz",
        rows(
            lambda a, b, s: {
                "instruction": "Add.",
                "input": f"{a}+{b}=",
                "output": str(s),
            }
        ),
    ),
    "messages": (
        "a.jsonl.gz",
        rows(
            lambda a, b, s: {
                "messages": [
                    {"role": "system", "content": ""},
                    user(a, b),
                    {"role": "assistant", "content": str(s)},
                ]
            }
        ),
    ),
    "conversations": (
        "train/part.jsonl",
        rows(
            lambda a, b, s: {
                "id": str(a),
                "conversations": [
                    {"from": "human", "value": f"{a}+{b}="},
                    {"from": "gpt", "value": str(s)},
                ],
            }
        ),
    ),
    "verl": (
        "data/train-00000-of-00001.parquet",
        rows(
            lambda a, b, s: {
                "data_source": "openai/gsm8k",
                "prompt": [user(a, b)],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(s)},
                "extra_info": {"index": a, "split": "train"},
            }
        ),
    ),
    "Countdown": (
        "a.parquet",
        rows(lambda a, b, s: {"target": s, "nums": [a, b]}),
    ),
}


def write(folder, name, table):
    "The rows as a file of that name; what is to be named as the task."
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    end = name.lower()
    frame = pd.DataFrame(table)
    if end.endswith(".parquet"):
        frame.to_parquet(path)
    elif end.endswith((".json", ".json.gz")):
        frame.to_json(path, orient="records")
    elif end.endswith((".jsonl", ".jsonl.gz")):
        frame.to_json(path, orient="records", lines=True)
    else:
        sep = "\t" if end.endswith("tsv") else ","
        frame.to_csv(path, index=False, sep=sep, quoting=csv.QUOTE_MINIMAL)
    return str(folder / name.split("/")[0]) if "/" in name else str(path)


def options(reader, task, directory):
    return {
        "task": task,
        "model": reader,
        "max_steps": 2,
        "num_prompts": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "eval_size": 2,
        "save_steps": 0,
        "device": "cpu",
        "output_dir": str(directory),
    }


def test_every_shape_is_trained_on():
    assert {*SHAPES} <= {*TABLES}


@pytest.mark.parametrize("name", TABLES)
def test_two_steps_from_the_command_line(tmp_path, reader, capsys, name):
    task = write(tmp_path, *TABLES[name])
    given = options(reader, task, tmp_path / "run")
    flags = [x for option, value in given.items() for x in (f"--{option}", str(value))]
    main(["train", *flags])
    shown = capsys.readouterr().out
    assert re.search(r"prompt from \w+.*, answer.*; \d+ trained on, \d+ held", shown)
    metrics = read_metrics(tmp_path / "run")
    assert len(metrics) == 2 and "eval/accuracy" in metrics[1]
    opened = open_run(tmp_path / "run").task
    assert opened.size == len(PAIRS)
    for i, (a, b) in enumerate(PAIRS):
        query = opened.query(i)
        right = f"{a}+{b}" if name == "Countdown" else str(a + b)
        assert opened.is_right(f" {right}\n", query)
        assert not opened.is_right(f"{right}1", query) and not opened.is_right(
            "", query
        )


def cells_of_train(**parameters):
    "The code of the train notebook with parameters as papermill puts them in."
    path = str(ROOT / "nbs/experiments/train.ipynb")
    notebook = parameterize_notebook(
        load_notebook_node(path), parameters, kernel_name="python3", language="python"
    )
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", TABLES)
def test_two_steps_from_the_notebook(tmp_path, reader, name, monkeypatch):
    """Its cells up to the run, in this process: a kernel for each would take minutes.

    (test_notebooks.py runs it in a kernel, on such a file.)"""
    task = write(tmp_path, *TABLES[name])
    monkeypatch.setattr("grpo_nb.evidence.plots.LivePlot", contextlib.nullcontext)
    space = {}
    for source in cells_of_train(**options(reader, task, tmp_path / "run")):
        exec(source, space)
        if "run" in space:
            break
    assert len(read_metrics(space["run"].directory)) == 2
    assert space["run"].config.task == task


# Columns ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, prompt, answer",
    [
        ({"prompt": "1?", "answer": "#### 2"}, "1?", "#### 2"),  # ours: every letter
        ({"prompt": "1?", "solution": "so \\boxed{2}"}, "1?", "2"),
        ({"Question": "1?", "ANSWER": 2}, "1?", 2),
        ({"problem": "1?", "solution": "x", "answer": "\\pi"}, "1?", "\\pi"),
        ({"problem": "1?", "expected_answer": "2"}, "1?", "2"),
        ({"question": "1?", "final_answer": "2", "r1_solution_1": "x"}, "1?", "2"),
        ({"instruction": "1?", "input": None, "output": "2"}, "1?", "2"),
        ({"instruction": "1?", "context": "Say.", "response": "2"}, "1?\n\nSay.", "2"),
        ({"input": "1?", "label": "B"}, "1?", "B"),
        ({"prompt": "1?", "messages": [], "ground_truth": "2"}, "1?", "2"),
        ({"prompt": "1?", "ground_truth": {"target": 2}}, "1?", None),
        (
            {"prompt": "1?", "reward_model": {"ground_truth": ["2", "3"]}},
            "1?",
            ["2", "3"],
        ),
    ],
)
def test_what_is_recognised(row, prompt, answer):
    query = as_task([row]).query(0)
    assert query.prompt == prompt and query.columns.get("answer") == answer


@pytest.mark.parametrize(
    "value, prompt, answer",
    [
        (
            [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "1?"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "3?"},
                {"from": "gpt", "value": "4"},
            ],
            ["system", "user", "assistant", "user"],
            "4",
        ),
        ({"from": ["human", "gpt"], "value": ["1?", "2"]}, ["user"], "2"),
        ([{"role": "user", "content": "1?"}], ["user"], None),
        (
            [
                {"role": "user", "content": [{"type": "text", "text": "1?"}]},
                {"role": "assistant", "content": "2", "tool_calls": None},
            ],
            ["user"],
            "2",
        ),
    ],
)
def test_talks(value, prompt, answer):
    for column in ("messages", "conversations"):
        query = as_task([{column: value}]).query(0)
        assert [message["role"] for message in query.prompt] == prompt
        assert all({*message} == {"role", "content"} for message in query.prompt)
        assert query.columns.get("answer") == answer


@pytest.mark.parametrize(
    "wrong, says",
    [
        ([{"from": "alien", "value": "1?"}], "role, content"),
        ([], "role, content"),
        (None, "got None"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image'"),
        ("1?", None),
    ],
)
def test_talks_that_are_none(wrong, says):
    right = [{"role": "user", "content": "1?"}]
    table = [{"messages": right}, {"messages": wrong}]
    if says is None:
        assert as_task(table).query(1).prompt == "1?"
        return
    with pytest.raises(ValueError, match=f"row 2 .*{says}"):
        as_task(table)


def test_columns_by_name(tmp_path):
    "Of any name, with a dot inside of another; what is not there is refused with all."
    table = [{"Frage": "1?", "info": {"A b": {"c": 2}}, "x.y": 3, "prompt": "no"}] * 3
    (tmp_path / "a.json").write_text(json.dumps(table))
    for column, right in (("info.A b.c", "2"), ("x.y", "3")):
        columns = {"prompt_column": "Frage", "answer_column": column}
        for task in (
            as_task(table, **columns),
            load_task(str(tmp_path / "a.json"), **columns),
        ):
            assert task.query(0).prompt == "1?"
            assert task.is_right(right, task.query(0))
    for option in ("prompt_column", "answer_column"):
        with pytest.raises(ValueError, match=rf"{option} = 'frage': .*Frage, info"):
            as_task(table, **{option: "frage"})
    with pytest.raises(ValueError, match="Frage; name the one.*prompt_column.*nums"):
        as_task([{"Frage": "1?"}])


# What is right ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, answer",
    [
        ("The answer is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1}, no: \\boxed{2}", "2"),
        ("so\n#### 1,200", "1,200"),
        ("<think>#### 3</think><answer> B </answer>", "B"),
        ("Steps.\nAnswer: $34$", "34"),
        ("**Final Answer:** 7", "7"),
        ("The answer is: 7\n", "7"),
        ("Answer: 3\n#### 4", "4"),
        ("\\boxed{}", "\\boxed{}"),
        ("\\boxed{1", "\\boxed{1"),
        ("no mark", "no mark"),
        ("", ""),
        ("\\boxed{" * 10_000, "\\boxed{" * 10_000),
    ],
)
def test_what_a_text_marks(text, answer):
    assert marked_answer(text) == answer


def test_marks_count_in_the_shapes_of_others_alone():
    for table, verdict in (
        ([{"question": "1?", "answer": "#### 2"}], True),
        ([{"prompt": "1?", "answer": "2"}], False),
    ):
        task = as_task(table)
        query = task.query(0)
        assert task.is_right("2", query) and not task.is_right("#### 3", query)
        for text in ("so\n#### 2", "\\boxed{2}", "<answer>2</answer>"):
            assert task.is_right(text, query) == verdict


@pytest.mark.parametrize(
    "text, right",
    [
        ("(1+2)*3-4", True),
        ("3*(2+1)-4=5", True),
        ("<answer>( 1 + 2 ) * 3 - 4</answer>", True),
        ("(1+2)×3−4", True),
        ("1+4", False),
        ("5", False),
        ("(1+2)*3-4+0", False),
        ("4-3/(1-1*2)", False),
        ("12+3-4", False),
        ("(1+2)*3-4)", False),
        ("((1+2)*3-4", False),
        ("1+2*3-+4", False),
        ("1/(2-2)", False),
        ("9**9**9", False),
        ("(" * 150 + "1", False),
        ("(1+2)*3-4" + " " * 9000, True),
        ("__import__('os')", False),
        ("", False),
    ],
)
def test_countdown(text, right):
    query = as_task([{"nums": [1, 2, 3, 4], "target": 5}]).query(0)
    assert makes_target(text, query) == right


# What is held out ---------------------------------------------------------------------

SUMS = rows(lambda a, b, s: {"prompt": f"{a}+{b}=", "answer": str(s)})


def sides(task):
    return [
        {query.text for query in task.queries(side, 300)}
        for side in ("train", "heldout")
    ]


@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_five_prompts_of_ones_own(n):
    task = as_task(SUMS[:n])
    assert f"all {n} are trained on, and evaluated on the same" in task.about
    assert sides(task) == [{row["prompt"] for row in SUMS[:n]}] * 2


@pytest.mark.parametrize("n", [1, 7, 29])
def test_heldout_size(n):
    "So many, the same each time, however the rows lie; a question on one side alone."
    task = as_task(SUMS, heldout_size=n)
    trained, held = sides(task)
    assert len(held) == n and len(trained) == 30 - n and not trained & held
    assert sides(as_task(SUMS[::-1], heldout_size=n)) == [trained, held]
    if n <= 10:
        first = min(i for i, row in enumerate(SUMS, 1) if row["prompt"] in held)
        assert re.search(rf"{n} held out \(row {first}\b.*by checksum", task.about)
    twice = as_task(SUMS * 2, heldout_size=n)
    assert not set.intersection(*sides(twice))


def test_heldout_size_at_its_ends():
    task = as_task(SUMS, heldout_size=0)
    assert sides(task) == [{row["prompt"] for row in SUMS}] * 2
    with pytest.raises(ValueError, match="heldout_size = 30: every question"):
        as_task(SUMS, heldout_size=30)
    own = task_from_rows("rows", SUMS, heldout=SUMS[:3])
    assert "27 trained on, 3 held out by its own split" in own.about
    assert "(3 rows that are there, too, are left out)" in own.about


def test_a_heldout_file(tmp_path):
    "Of another shape and format than the task; its questions are not trained on."
    (tmp_path / "test.csv").write_text("question,label\n1+1=,2\n2+2=,4\n")
    write(tmp_path, "train.jsonl", SUMS)
    options = {"task": str(tmp_path / "train.jsonl"), "model": "tiny", "max_steps": 2}
    options |= {"heldout_file": str(tmp_path / "test.csv"), "eval_size": 5}
    run = train(short_config(output_dir=str(tmp_path / "r"), **options), progress=False)
    assert sides(run.task)[1] == {"1+1=", "2+2="} and len(sides(run.task)[0]) == 28
    with pytest.raises(ValueError, match="heldout_size = 3 and heldout_file"):
        make_config(**options, heldout_size=3)
    for wrong, says in (("test.cvs", "no such file; near.*test.csv|must be one"),):
        with pytest.raises(ValueError, match=f"heldout_file .*({says})"):
            make_config(heldout_file=str(tmp_path / wrong))
    with pytest.raises(
        ValueError, match="heldout_size = 3: task 'add' has only digits"
    ):
        train(make_config(heldout_size=3, output_dir=str(tmp_path / "x")))
    assert not (tmp_path / "x").exists()


def test_recognise_names_what_it_found():
    for name, (_, table) in TABLES.items():
        words = str(recognise(name, table))
        assert words.startswith("prompt from ") and "answer" in words
