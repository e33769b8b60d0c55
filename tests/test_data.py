"""Questions of one's own: files, data sets, GSM8K and reasoning-gym, as tasks that
train like the built-in ones.

The files are written here. Independent truths: pandas and datasets for reading,
math-verify's own reader for numbers, a search through reasoning-gym's source for
what its checkers execute."""

import ast
import builtins
import dataclasses
import datetime
import inspect
import itertools
import json
import math
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
import types
import zlib
from decimal import Decimal
from fractions import Fraction

import datasets
import math_verify
import numpy as np
import pandas as pd
import pyarrow
import pytest
import reasoning_gym
from hypothesis import given
from hypothesis import strategies as st

from grpo_nb.run.options import make_config
from grpo_nb.evidence.plots import plot_run
from grpo_nb.reward import accuracy_reward, process_reward
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.data import _GYM_UNFIT as GYM_UNFIT
from grpo_nb.engine.data import (
    MAKERS,
    as_task,
    check_task,
    extract_answer,
    gsm8k,
    gym,
    is_same_answer,
    load_task,
    same_number,
    task_from_rows,
)
from grpo_nb.names import how_to_install
from grpo_nb.run import training
from grpo_nb.run.build import open_task
from grpo_nb.run.command_line import chat, main
from grpo_nb.run.training import evaluate, open_run, train
from grpo_nb.task import TASKS
from helpers import ROOT, read_metrics, reproducible, short_config

SUMS = [
    {
        "prompt": f"{a}+{b}=",
        "answer": str(a + b),
        "level": "easy" if a + b < 10 else "hard",
    }
    for a in range(10)
    for b in range(10)
]
CHATS = [
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": row["prompt"]},
        ],
        "answer": row["answer"],
    }
    for row in SUMS
]
PROBLEMS = [
    {
        "question": f"Ann has {a} apples and buys {b} more. How many has she now?",
        "answer": f"{a} + {b} = {a + b}\n#### {a + b}",
    }
    for a in range(2, 8)
    for b in range(2, 8)
]


def write(path, rows):
    "Rows as a file of the kind that its name says."
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path, index=False)
    if not path.suffix:
        datasets.Dataset.from_list(rows).save_to_disk(path)
    return str(path)


def two_steps(directory, model="tiny", functions=None, **options):
    return train(
        short_config(
            model=model,
            output_dir=str(directory),
            **{"max_steps": 2, "eval_size": 3} | options,
        ),
        reward_funcs=functions,
        progress=False,
    )


# Files and data sets ------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, kinds",
    [(SUMS, [".jsonl", ".csv", ".parquet", ""]), (CHATS, [".jsonl", ".parquet", ""])],
    ids=["plain", "chat"],
)
def test_all_formats_give_the_same_queries(tmp_path, rows, kinds):
    tasks = [load_task(write(tmp_path / f"rows{kind}", rows)) for kind in kinds]
    for split in ("train", "heldout"):
        for seed in (0, "again"):
            drawn = [task.queries(split, 15, seed) for task in tasks]
            assert all(queries == drawn[0] for queries in drawn[1:])
    assert [query.prompt for query in map(tasks[0].query, range(len(rows)))] == [
        row["prompt"] for row in rows
    ]
    assert all(
        task.is_right(f" {row['answer']}\n", task.query(i))
        and not task.is_right(row["answer"] + ".", task.query(i))
        for task in tasks
        for i, row in enumerate(rows)
    )


def test_a_file_of_sums_means_what_the_embedded_task_means(tmp_path):
    "Each row has the answer of `add`, and each answer its verdict."
    embedded = load_task("add", digits=1)
    rows = [
        {"prompt": query.prompt, **query.columns}
        for query in map(embedded.query, range(embedded.size))
    ]
    for kind in (".jsonl", ".csv", ".parquet"):
        from_file = load_task(write(tmp_path / f"sums{kind}", rows))
        for i in range(embedded.size):
            query, row = embedded.query(i), from_file.query(i)
            assert (row.prompt, row.columns) == (query.prompt, query.columns)
            for answer in map(str, range(20)):
                verdict = embedded.is_right(answer, query)
                assert from_file.is_right(answer, row) == verdict


@pytest.mark.parametrize("name", TASKS)
def test_the_figures_tasks_are_opened_here_too(name):
    for digits in (1, 2, 3):
        here, there = load_task(name, digits=digits), TASKS[name](digits)
        assert here.queries("train", 20) == there.queries("train", 20)
        assert here.name == there.name == name


def test_a_maker_of_ones_own(monkeypatch):
    "An entry of the table is a name, in messages, too."
    monkeypatch.setitem(MAKERS, "doubles", lambda n: as_task(SUMS[: int(n)]))
    assert (
        load_task("doubles:7").size == 7 and load_task("doubles:7").name == "doubles:7"
    )
    with pytest.raises(ValueError, match="gym_chat:, doubles:"):
        load_task("doubles:")


def test_the_split_is_that_of_the_checksum(tmp_path):
    task = load_task(write(tmp_path / "rows.jsonl", SUMS))
    out = {row["prompt"] for row in SUMS if zlib.crc32(row["prompt"].encode()) % 5 == 0}
    assert {query.prompt for query in task.queries("heldout", 50)} == out
    drawn = [query.prompt for query in task.queries("train", 100 - len(out))]
    assert (
        len(set(drawn)) == len(drawn)
        and set(drawn) == {row["prompt"] for row in SUMS} - out
    )  # each once before any twice
    assert len(task.queries("train", 500)) == 500


@pytest.mark.parametrize(
    "names, held",
    [
        (("train", "test"), "test"),
        (("train", "validation"), "validation"),
        (("train", "validation", "test"), "test"),
        (("train",), None),
        (("only",), None),
    ],
)
def test_splits_of_the_source(tmp_path, names, held):
    """Where there is a split test or validation, that is held out; of a prompt on
    both sides nothing is trained on."""
    parts = {
        name: datasets.Dataset.from_list(SUMS[20 * i : 20 * i + 22])
        for i, name in enumerate(names)
    }  # two rows overlap
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    task = load_task(str(tmp_path / "saved"))
    trained, tested = (
        {query.prompt for query in task.queries(split, 60)}
        for split in ("train", "heldout")
    )
    assert not trained & tested
    if held is None:
        assert tested == {
            row["prompt"]
            for row in SUMS[:22]
            if zlib.crc32(row["prompt"].encode()) % 5 == 0
        }
    else:
        assert (
            tested == set(parts[held]["prompt"])
            and trained == {row["prompt"] for row in SUMS[:22]} - tested
        )


def test_a_small_test_split_is_found_among_many_rows():
    task = task_from_rows("rows", SUMS[1:] * 20, heldout=SUMS[:1])
    assert [query.prompt for query in task.queries("heldout", 300)] == ["0+0="] * 300


def test_what_csv_holds_is_text(tmp_path):
    "Nothing is guessed: numbers, missing values and JSON stay what was written."
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,answer,note\n"[{""role"": ""user"", ""content"": '
        '""hi""}]",007,NA\n"two\nlines",1.50,\n'
    )
    first, second = map(load_task(str(path)).query, range(2))
    assert first.prompt == '[{"role": "user", "content": "hi"}]' and first.columns == {
        "answer": "007",
        "note": "NA",
    }
    assert second.prompt == "two\nlines" and second.columns == {
        "answer": "1.50",
        "note": "",
    }


def test_a_byte_order_mark_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(
        "\ufeff".encode()
        + b'{"prompt": "1+1=", "answer": 2}\n\n{"prompt": "2+2=", "answer": 4}\n'
    )
    task = load_task(str(tmp_path / "rows.jsonl"))
    assert task.size == 2 and task.is_right(
        "2", task.query(0)
    )  # a number is compared as it is written


def test_a_name_on_the_hub(monkeypatch, tmp_path):
    """Only where nothing of that name is there locally; owner/name:config names a
    configuration."""
    asked = []
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names: asked.append(names) or datasets.Dataset.from_list(SUMS),
    )
    monkeypatch.chdir(tmp_path)
    assert load_task("owner/name").size == load_task("owner/name:main").size == 100
    write(tmp_path / "owner" / "name", SUMS[:30])
    assert load_task("owner/name").size == 30
    assert asked == [("owner/name", None), ("owner/name", "main")]

    def offline(*names):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match="other/name.*no network"):
        load_task("other/name")


def test_columns_reach_the_reward_functions(tmp_path):
    """Each by its name, one entry a completion; and nothing of the file leaks into
    the prompt."""
    seen = []

    def recorder(prompts, completions, level, answer, **columns):
        seen.extend(zip(prompts, level, answer))
        return [float(len(completion)) for completion in completions]

    two_steps(
        tmp_path / "run",
        task=write(tmp_path / "rows.parquet", SUMS),
        functions=[recorder],
    )
    held_out = 2 * 3  # three rows, evaluated before and after
    assert len(seen) == 2 * 16 + held_out
    assert set(seen) <= {(row["prompt"], row["level"], row["answer"]) for row in SUMS}


@pytest.mark.parametrize(
    "name, lines, says",
    [
        ("a.jsonl", "", ["a.jsonl", "must have a row"]),
        ("a.csv", "", ["a.csv", "must have a row"]),
        ("a.csv", "prompt,answer\n", ["must have a row"]),
        ("a.jsonl", '{"prompt": "1+1="}\n{"prompt": \n', ["a.jsonl", "line 2", "JSON"]),
        ("a.jsonl", '"1+1="\n', ["line 1", "object", "str"]),
        ("a.jsonl", "[" * 100_000, ["item 1 is not JSON"]),
        (
            "a.jsonl",
            '{"frage": "1+1="}\n',
            ["a.jsonl", "row 1", "no column prompt", "frage", "prompt_column"],
        ),
        ("a.jsonl", '{"prompt": "1"}\n{"prompt": ""}\n', ["row 2", "text", "''"]),
        ("a.jsonl", '{"prompt": null}\n', ["row 1", "None"]),
        ("a.jsonl", '{"prompt": 7}\n', ["row 1", "7"]),
        ("a.jsonl", '{"prompt": []}\n', ["row 1", "role, content"]),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": 7}]}\n',
            ["row 1", "role, content"],
        ),
        ("a.jsonl", '{"prompt": "1", "completions": 1}\n', ["row 1", "completions"]),
        (
            "a.jsonl",
            '{"prompt": "1", "answer": 1}\n{"prompt": "2"}\n',
            ["row 2", "no answer", "all or none"],
        ),
        ("a.jsonl", '{"prompt": "\\ud800"}\n', ["row 1", "surrogates"]),
        ("a.csv", "prompt,answer\n1+1=,2,3\n", ["2 fields", "line 2", "saw 3"]),
        ("a.csv", "prompt,answer\n1,2\n1+1=,2,3\n", ["2 fields", "line 3", "saw 3"]),
        ("a.csv", "prompt,answer\n1+1=,2\n1+2=\n", ["row 2", "no answer"]),
        ("a.csv", "prompt,prompt\n1,2\n", ["two columns", "prompt"]),
        ("a.csv", 'prompt\n"1+1=\n', ["a.csv", "EOF inside string"]),
        ("a.csv", b"prompt\n\xff\n", ["a.csv", "utf-8"]),
        ("a.parquet", "prompt\n", ["a.parquet"]),
        ("a.txt", "1+1=\n", ["a.txt", ".jsonl, .json, .csv, .tsv, .parquet"]),
    ],
)
def test_bad_files(tmp_path, name, lines, says):
    "What is wrong is said with the path, the row or line, and what is allowed."
    (tmp_path / name).write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    with pytest.raises(ValueError) as error:
        load_task(str(tmp_path / name))
    for words in says:
        assert words in str(error.value), str(error.value)


def test_a_directory_that_is_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="could not be read"):
        load_task(str(tmp_path))
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(SUMS[:5]) for name in ("a", "b")}
    ).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="split train.*a, b"):
        load_task(str(tmp_path / "saved"))
    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(SUMS[:5]),
            "test": datasets.Dataset.from_dict({"prompt": []}),
        }
    ).save_to_disk(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty"):
        load_task(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "chess",
        "nothing.jsonl",
        "a/b/c",
        "gsm8k:",
        "gym:",
        "gsm8k:chess",
        "gsm8k:gym:gcd",
        "http://x/y.jsonl",
        "add:",
        "\0",
        "x" * 5000,
        "../../x y/z",
    ],
)
def test_a_wrong_name_is_refused_by_the_config(name):
    "Before anything is loaded, and with what is allowed."
    for refused in (
        lambda: make_config(task=name),
        lambda: check_task(name),
        lambda: load_task(name),
    ):
        with pytest.raises(
            ValueError,
            match="no such file|add, sums, target, add_chat; .*a file that ends in "
            ".jsonl|task must be one of add, sums, target, add_chat",
        ):
            refused()


def test_the_config_reads_no_file(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", SUMS)
    monkeypatch.setattr(builtins, "open", lambda *a, **k: pytest.fail("was read"))
    for name in (
        path,
        f"gsm8k:{path}",
        f"gsm8k_chat:{path}",
        "gym:anything",
        "gym_chat:gcd",
        "owner/name",
        "owner/name:main",
        str(tmp_path),
        *TASKS,
    ):
        assert make_config(task=name).task == name


@pytest.mark.parametrize(
    "name, package, extra",
    [
        ("gsm8k:{}", "math_verify", "math"),
        ("gym:gcd", "reasoning_gym", "gym"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    tmp_path, monkeypatch, name, package, extra
):
    path = write(tmp_path / "rows.jsonl", PROBLEMS)
    same_number.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape(how_to_install(extra))):
        load_task(name.format(path))


# Answers ------------------------------------------------------------------------------

GAPS = {
    "nothing": None,
    "empty": "",
    "spaces": " \t\n",
    "nan": math.nan,
    "numpy": np.float32("nan"),
    "decimal": Decimal("nan"),
    "pandas": pd.NA,
    "time": pd.NaT,
    "no answers": [],
    "array": np.array([]),
}


@pytest.mark.parametrize("gap", GAPS.values(), ids=GAPS)
def test_a_missing_answer_is_refused_with_its_row(gap):
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(5)]
    rows[3]["answer"] = gap
    with pytest.raises(ValueError, match="row 4 has no answer.*all or none"):
        task_from_rows("rows", rows)
    with pytest.raises(ValueError, match="held-out row 4 has no answer"):
        task_from_rows("rows", rows[:3], heldout=rows)
    none = task_from_rows("rows", [row | {"answer": gap} for row in rows])
    assert none.is_right is None  # no row has one: there is no rule


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", "", "frame"])
def test_an_empty_completion_is_never_right(tmp_path, kind):
    "A gap is refused, whatever holds it: none is left that nothing would answer."
    frame = pd.DataFrame({"prompt": ["1+3=", "2+2=", "3+3="], "answer": [4, None, 6]})
    rows = [{"prompt": p, "answer": a} for p, a in zip(frame.prompt, ["4", "", "6"])]
    if kind == "frame":
        load = lambda: as_task(frame)
    elif kind == ".parquet":  # as pandas writes it: 4.0, null, 6.0
        frame.to_parquet(tmp_path / "rows.parquet")
        load = lambda: load_task(str(tmp_path / "rows.parquet"))
    else:
        load = lambda: load_task(write(tmp_path / f"rows{kind}", rows))
    with pytest.raises(ValueError, match="row 2 has no answer"):
        load()
    for answer in ("4", "", " ", [], None, 4, ["4", "5"]):
        task = task_from_rows("rows", [{"prompt": "1+3=", "answer": answer}])
        wrong = [] if task.is_right is None else ["", " ", "\n", "None", "nan", "[]"]
        assert not any(task.is_right(text, task.query(0)) for text in wrong)


def is_right(completion, answer):
    "The verdict of a table of one row, through the reward function."
    task = task_from_rows("rows", [{"prompt": "?", "answer": answer}])
    (verdict,) = accuracy_reward(task)(
        prompts=["?"], completions=[completion], completion_ids=[[1]], answer=[answer]
    )
    assert task.is_right(task.solve(task.query(0), None), task.query(0))
    return verdict == 1


SIXES = ["6", 6, 6.0, "6.0", " 6 ", Decimal("6.00"), np.int64(6), np.float32(6), "+6"]


@pytest.mark.parametrize("answer", SIXES, ids=repr)
def test_equal_numbers_are_one_answer(answer):
    for text in ("6", "6.0", " 6.00\n", "+6"):
        assert is_right(text, answer)
    for text in (
        "-6",
        "60",
        "6.01",
        "06",
        "6.",
        "6,0",
        "six",
        "6e0",
        "٦",
        "6 6",
        "0.6",
    ):
        assert not is_right(text, answer)


@pytest.mark.parametrize(
    "answer, right, wrong",
    [
        ("007", ["007"], ["7", "7.0", "07"]),
        ("1,200", ["1,200"], ["1200"]),
        (2**53 + 1, [str(2**53 + 1)], [str(2**53), str(2**53 + 2)]),
        (float(2**70), [str(2**70)], [str(2**70 + 1), "1.1805916207174113e+21"]),
        ("9" * 5000, ["9" * 5000 + ".0"], ["9" * 4999 + "8"]),
        (1e-7, ["0.0000001", ".0000001"], ["0", "1e-07"]),
        (0.1, ["0.1", ".1", "0.10"], ["0.11"]),
        (np.float32(0.1), ["0.1"], ["0.10000000149011612"]),
        (0, ["0", "-0", "0.0", "−0"], ["", "00", "False"]),
        (-7, ["-7", "−7", "-7.0"], ["7", "+7", "- 7"]),
        (True, ["True", "true"], ["1", "False", "TRUE", ""]),
        (np.bool_(False), ["False", "false"], ["0", "True", ""]),
        ("True", ["True"], ["true", "1"]),
        (Fraction(7, 2), ["7/2"], ["3.5", "7"]),
        (datetime.date(2024, 3, 4), ["2024-03-04"], ["2024"]),
        (np.datetime64("2024-03-04"), ["2024-03-04"], ["2024"]),
        ("1e3", ["1e3"], ["1000"]),
        ("NA", ["NA"], ["", "na"]),
        ("Nairobi", [" Nairobi\n"], ["nairobi", "Nairobi."]),
        (
            ["6", "six", "VI"],
            ["6", "6.0", "six", "VI"],
            ["", "['6', 'six', 'VI']", "v"],
        ),
        (("6",), ["6"], ["('6',)"]),
        (np.array([6, 7]), ["6", "7.0"], ["[6 7]", "67"]),
        ([4.0, 5], ["4", "5.0"], ["4, 5"]),
    ],
    ids=repr,
)
def test_what_is_an_answer(answer, right, wrong):
    assert [text for text in right if not is_right(text, answer)] == []
    assert [text for text in wrong if is_right(text, answer)] == []


@given(st.decimals(-(10**12), 10**12, places=3), st.booleans())
def test_equal_numbers_by_python(number, is_float):
    "Python's exact comparison is the truth."
    answer = float(number) if is_float else number
    text = format(number, "f")
    assert is_same_answer(text, answer) == (Fraction(number) == Fraction(str(answer)))
    assert not is_same_answer(text + "1", answer)


@pytest.mark.parametrize("answer", [[["6"]], {"value": 6}, ["6", {}], b"6", {6}])
def test_what_is_no_answer(answer):
    rows = [{"prompt": "1", "answer": 1}, {"prompt": "2", "answer": answer}]
    with pytest.raises(ValueError, match="row 2 must have as its answer a text"):
        task_from_rows("rows", rows)


@pytest.mark.parametrize("answer", [["6", None], ["", "6"], [math.nan, 6.0]])
def test_a_list_of_answers_has_no_gap(answer):
    with pytest.raises(ValueError, match="row 1 must not have a gap"):
        task_from_rows("rows", [{"prompt": "1", "answer": answer}])


def test_lists_of_answers_in_files(tmp_path):
    rows = [
        {"prompt": f"{a}+{a}=", "answer": [str(2 * a), f"={2 * a}"]} for a in range(9)
    ]
    tasks = [
        load_task(write(tmp_path / f"rows{kind}", rows))
        for kind in (".jsonl", ".parquet", "")
    ]
    tasks += [as_task(pd.read_parquet(tmp_path / "rows.parquet")), as_task(rows)]
    for task in tasks:
        assert all(task.is_right(text, task.query(4)) for text in ("8", "=8", "8.0"))
        assert not any(task.is_right(text, task.query(4)) for text in ("", "10", "88"))


# Rows in memory -----------------------------------------------------------------------


def in_memory(kind, rows):
    return {
        "list": lambda: rows,
        "tuple": lambda: tuple(rows),
        "frame": lambda: pd.DataFrame(rows),
        "arrow": lambda: pyarrow.Table.from_pylist(rows),
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "splits": lambda: datasets.DatasetDict(
            {"train": datasets.Dataset.from_list(rows)}
        ),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["list", "tuple", "frame", "arrow", "dataset", "splits"]
)
def test_rows_in_memory_are_as_rows_of_a_file(tmp_path, kind):
    task, file = (
        as_task(in_memory(kind, SUMS)),
        load_task(write(tmp_path / "a.csv", SUMS)),
    )
    assert task.name == as_task(SUMS).name != as_task(SUMS[1:]).name
    for split in ("train", "heldout"):
        assert task.queries(split, 15, 3) == file.queries(split, 15, 3)
    assert task.query(7).source.endswith("row 8")


def test_a_run_on_rows_in_memory(tmp_path):
    """The same numbers as on a file with these rows; resumed and opened with the
    same rows alone."""
    from_file = two_steps(tmp_path / "a", task=write(tmp_path / "rows.csv", SUMS))
    config = short_config(
        model="tiny", output_dir=str(tmp_path / "b"), max_steps=2, eval_size=3
    )
    run = train(config, task=pd.DataFrame(SUMS), progress=False)
    assert run.completions.equals(from_file.completions)
    lines = [list(map(reproducible, read_metrics(tmp_path / name))) for name in "ab"]
    assert lines[0] == lines[1]
    name = json.loads((tmp_path / "b/config.json").read_text())["task"]
    assert name == as_task(SUMS).name
    resumed = dataclasses.replace(config, resume=True)
    assert len(train(resumed, task=SUMS, progress=False).metrics) == 2
    changed = [*SUMS[:-1], SUMS[-1] | {"answer": "19"}]
    with pytest.raises(ValueError, match="other settings.*sha256"):
        train(resumed, task=changed, progress=False)
    assert (
        open_run(tmp_path / "b", task=datasets.Dataset.from_list(SUMS)).task.size == 100
    )


def test_a_gap_in_a_frame_leaves_integers_alone():
    frame = pd.DataFrame(
        {"prompt": ["1", "2", "3"], "level": [4, None, 6], "share": [0.5, None, 2.0]}
    )
    columns = [as_task(frame).query(i).columns for i in range(3)]
    assert columns == [
        {"level": 4, "share": 0.5},
        {"level": None, "share": None},
        {"level": 6, "share": 2.0},
    ]
    assert [type(x["level"]) for x in columns] == [int, type(None), int]


@pytest.mark.parametrize(
    "rows, says",
    [
        (7, "got int"),
        ("rows.csv", "make_config"),
        ([], "must have a row"),
        (["1+1="], "row 1 must be a dict"),
        ([SUMS[0], None], "row 2 must be a dict"),
        ({"prompt": ["1"], "answer": ["2"]}, "split train.*prompt, answer"),
        (pd.DataFrame({"frage": ["1"]}), "no column prompt, but frage"),
        (iter(SUMS), "list_iterator"),
        (pd.DataFrame([["1", "2"]], columns=["prompt", "prompt"]), "different names"),
    ],
)
def test_rows_that_are_none(tmp_path, rows, says):
    with pytest.raises(ValueError, match=says):
        train(short_config(output_dir=str(tmp_path / "run")), task=rows)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet", "", "list"])
@pytest.mark.parametrize(
    "prompt, says", [("1+" * 1000, "too long"), ("What is 1+1=", "cannot read")]
)
def test_a_row_is_named_as_the_file_counts_it(tmp_path, kind, prompt, says):
    rows = [*SUMS * 15, {"prompt": prompt, "answer": "1", "level": "x"}, *SUMS]
    options = {"max_steps": 1, "model": "tiny", "output_dir": str(tmp_path / "run")}
    source = rows if kind == "list" else write(tmp_path / f"rows{kind}", rows)
    task = source if kind == "list" else load_task(source)
    with pytest.raises(ValueError, match=rf"{says}|{says}.*") as error:
        train(short_config(**options), task=task, progress=False)
    assert "row 1501" in str(error.value) and "query" not in str(error.value)
    assert not (tmp_path / "run").exists()


# Training -----------------------------------------------------------------------------


def test_a_run_on_a_file_resumes_bit_for_bit(tmp_path):
    """Two steps at once, or one, and another one resumed: the same weights, metrics
    and completions."""
    path = write(tmp_path / "rows.csv", SUMS)
    whole = two_steps(tmp_path / "a", task=path)
    two_steps(tmp_path / "b", task=path, max_steps=1, save_steps=1)
    (tmp_path / "b/model").rename(tmp_path / "gone")
    again = two_steps(tmp_path / "b", task=path, save_steps=1, resume=True)
    lines = [list(map(reproducible, read_metrics(tmp_path / name))) for name in "ab"]
    assert (
        lines[0][1] == lines[1][1]
        and {name: x for name, x in lines[1][0].items() if name != "eval/accuracy"}
        == lines[0][0]
    )
    assert (
        whole.completions.equals(again.completions)
        and (tmp_path / "a/model/model.safetensors").read_bytes()
        == (tmp_path / "b/model/model.safetensors").read_bytes()
    )
    prompts = {
        query.prompt: query.columns["answer"]
        for query in whole.task.queries("train", 200)
    }
    assert all(
        row.reward == (row.completion.strip() == prompts[row.query])
        for row in whole.completions.itertuples()
    )
    opened = open_run(tmp_path / "b")
    assert (
        opened.config.task == path
        and opened.task.size == 100
        and opened.answers("1+1=", 4)["reward"].notna().all()
    )
    assert opened.summary()["task"] == path


def test_the_command_line(tmp_path, monkeypatch, capsys):
    write(tmp_path / "rows.jsonl", SUMS)
    flags = (
        "--max_steps 1 --num_prompts 4 --num_generations 4 --eval_size 5 --device "
        "cpu --output_dir out"
    ).split()
    monkeypatch.chdir(tmp_path)
    main(["train", "--task", "rows.jsonl", *flags])
    shown = capsys.readouterr().out
    assert "held-out accuracy after" in shown
    assert re.search(r"^task +rows.jsonl$", shown, re.MULTILINE)
    chat(open_run("out"), ["1+1="], 4)
    assert "reward" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="error: task 'row.jsonl': there is no such file"
    ):
        main(["train", "--task", "row.jsonl"])
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        SystemExit, match="error: .*" + re.escape(how_to_install("gym"))
    ):
        main(["train", "--task", "gym:gcd", "--output_dir", "other"])
    assert not (tmp_path / "other").exists()


def test_a_file_without_answers(tmp_path, reader):
    """There is no accuracy; what is reported is the mean reward of the greedy
    answers, here computed again."""
    path = write(tmp_path / "rows.jsonl", [{"prompt": row["prompt"]} for row in SUMS])
    for asked in ("accuracy", "process", "learned"):
        with pytest.raises(
            ValueError, match=f"reward_funcs {asked}: .*no column answer.*brevity"
        ):
            two_steps(
                tmp_path / "run",
                task=path,
                reward_funcs=["brevity", asked],
                model="not loaded",
            )
    assert not (tmp_path / "run").exists()
    run = two_steps(
        tmp_path / "run", task=path, reward_funcs=["brevity"], eval_size=7, eval_steps=2
    )
    metrics = read_metrics(run.directory)
    assert [
        {name for name in line if name.startswith("eval/")} for line in metrics
    ] == [{"eval/initial_reward"}, {"eval/reward"}]
    queries = {query.text: query for query in run.task.queries("heldout", 7)}.values()
    greedy = sample(run.policy, run.tokenizer, list(queries), 1, 8, top_k=1).completions
    assert (
        abs(
            metrics[1]["eval/reward"]
            - sum(max(0, 1 - len(text) / 16) for text in greedy) / len(greedy)
        )
        < 1e-6
    )
    assert (
        all(map(math.isnan, run.accuracy))
        and run.summary()["held-out reward after"] == f"{metrics[1]['eval/reward']:.3f}"
    )
    assert open_run(run.directory).summary().equals(run.summary()) and plot_run(run)
    with pytest.raises(ValueError, match="no rule"):
        evaluate(run.policy, run.tokenizer, run.task, 3, 8)


def test_a_file_without_answers_of_which_nothing_is_scored(tmp_path):
    def silent(completions, **columns):
        return [None] * len(completions)

    run = two_steps(
        tmp_path / "run",
        task=write(
            tmp_path / "rows.jsonl", [{"prompt": row["prompt"]} for row in SUMS]
        ),
        functions=[silent],
    )
    assert (
        run.summary()["held-out reward after"] == "nan"
        and read_metrics(run.directory)[1]["eval/reward"] is None
    )


def test_a_table_is_evaluated_by_rewards_of_ones_own_too(tmp_path):
    """Its strict rule takes no sum for the sentence that the row has; the reward does.
    Both are of the same greedy answers, here judged again. What a function logs then is
    no step's."""
    rows = [row | {"answer": f"It is {row['answer']}."} for row in SUMS]
    path = write(tmp_path / "rows.jsonl", rows)

    def within(completions, answer, log_metric, **columns):
        log_metric("judged", len(completions))
        pairs = zip(completions, answer)
        return [float(f" {text.strip()}." in right) for text, right in pairs]

    options = {"task": path, "eval_size": 7, "eval_steps": 2}
    run = two_steps(tmp_path / "own", functions=[within], **options)
    first, last = read_metrics(run.directory)
    queries = {query.text: query for query in run.task.queries("heldout", 7)}.values()
    greedy = sample(run.policy, run.tokenizer, list(queries), 1, 8, top_k=1).completions
    answers = [query.columns["answer"] for query in queries]
    rewards = within(greedy, answers, lambda *_: None)
    assert sum(rewards) > 0
    assert last["eval/reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert last["eval/accuracy"] == first["eval/initial_accuracy"] == 0
    assert first["judged"] == last["judged"] == len(run.completions) / 2
    shown = run.summary()
    assert shown["held-out accuracy after"] == "0.0%"
    assert shown["held-out reward before"] == f"{first['eval/initial_reward']:.3f}"
    assert shown["held-out reward after"] == f"{last['eval/reward']:.3f}"
    assert shown.equals(open_run(run.directory, reward_funcs=[within]).summary())


@pytest.mark.parametrize("named", [None, ["math"], ["accuracy", len], ["learned"]])
def test_a_table_whose_rule_is_a_reward_is_evaluated_by_it_alone(tmp_path, named):
    config = make_config(task=write(tmp_path / "rows.jsonl", SUMS))
    assert not open_task(config, reward_funcs=named).reports_reward
    assert open_task(config, reward_funcs=[len, "brevity"]).reports_reward


def test_what_is_typed_is_asked_as_the_rows_are(tmp_path, monkeypatch, reader):
    """A question is found without the system prompt of its row, and has its reward;
    another one gets the system prompt."""
    path = write(tmp_path / "rows.jsonl", CHATS)
    run = two_steps(tmp_path / "run", reader, task=path, max_steps=1)
    asked = []

    def spy(policy, tokenizer, queries, *arguments, **options):
        asked.append(queries[0].prompt)
        return sample(policy, tokenizer, queries, *arguments, **options)

    monkeypatch.setattr(training, "sample", spy)
    row = CHATS[34]
    typed = row["prompt"][-1]["content"]
    assert run.answers(typed, 4)["reward"].notna().all()
    assert run.answers("And now?", 4)["reward"].isna().all()
    assert asked == [row["prompt"], row["prompt"][:1] + [user("And now?")]]
    plain = dataclasses.replace(run, task=load_task("add"))
    plain.answers("And now?", 4)
    assert asked[2] == "And now?"


def user(text):
    return {"role": "user", "content": text}


def test_a_word_problem_is_found_by_its_question(tmp_path):
    task = load_task(f"gsm8k:{write(tmp_path / 'rows.jsonl', PROBLEMS)}")
    for problem in PROBLEMS[::7]:
        found = task.parse(problem["question"])
        assert found.columns["answer"] == problem["answer"]
    assert task.parse("How many has she now?") is None


def test_a_model_that_cannot_read_the_prompts_is_refused(tmp_path):
    """The embedded model knows digits and signs, and its context is short; the whole
    table is looked at, also a row that no early step draws."""
    for prompt, says in (
        ("What is 1+1=", "cannot read 'What is"),
        ("1+" * 1000, "too long"),
    ):
        path = write(
            tmp_path / "rows.jsonl", [*SUMS * 20, {"prompt": prompt, "answer": "1"}]
        )
        with pytest.raises(ValueError, match=says):
            two_steps(tmp_path / "run", task=path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind", ["chat", "gsm8k", "gsm8k_chat", "gym:gcd", "gym_chat:leg_counting"]
)
def test_two_steps_on_texts(tmp_path, reader, kind):
    path = write(tmp_path / "rows.jsonl", CHATS if kind == "chat" else PROBLEMS)
    name = (
        kind if kind.startswith("gym") else path if kind == "chat" else f"{kind}:{path}"
    )
    run = two_steps(
        tmp_path / "run",
        reader,
        task=name,
        eval_steps=2,
        reward_funcs=["accuracy", "format"],
        format_pattern=None if kind.startswith("gsm8k") else ".+",
    )
    assert (
        run.metrics["eval/accuracy"].iloc[-1] == 0
        and len(run.completions) == 32
        and json.loads((run.directory / "config.json").read_text())["task"] == name
    )


# GSM8K --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, right",
    [
        ("#### 18", True),
        ("40 - 22\n#### 18", True),
        ("#### 18.00", True),
        ("####18", True),
        ("#### $18", True),
        ("#### 18 seats of 40", True),
        ("\\boxed{18}", True),
        ("\\boxed{\\frac{36}{2}}", True),
        ("\\boxed{17} no, \\boxed{18}", True),
        ("It is 18.", True),
        ("**18**", True),
        ("18", True),
        ("She has\n18 left, so 18%", True),
        ("#### 17\n#### 18", True),
        ("#### 17", False),
        ("#### -18", False),
        ("18 of 40", False),
        ("#### 1.8", False),
        ("#### 18\n#### 17", False),
        ("####\n18", False),
        ("\\boxed{} 18", False),
        ("\\boxed{\\text{about }18\\text{ seats}}", True),
        ("\\boxed{\\text{18 seats}}", True),
        ("\\boxed{17} = 18", False),
        ("#### eighteen", False),
        ("", False),
        ("#### 018000", False),
        ("#### 1,8", False),
        ("18 1", False),
        ("#### 18e3", False),
        ("١٨", False),
    ],
)
def test_right_and_wrong_solutions(text, right):
    assert (
        extract_answer(text) is not None and same_number("18", extract_answer(text))
    ) == right


def digits_at(text, i):
    "Where the digits that begin at i end."
    while i < len(text) and text[i] in "0123456789":
        i += 1
    return i


def scanned_integer(text, i):
    "(value, end) of an integer at i, perhaps grouped by commas; None if there is none."
    end = digits_at(text, i)
    if end == i:
        return None
    groups, j = [text[i:end]], end
    while j < len(text) and text[j] == ",":
        after = digits_at(text, j + 1)
        groups.append(text[j + 1 : after])
        j = after
    if len(groups) == 1:
        return int(groups[0]), end
    good = 1 <= len(groups[0]) <= 3 and groups[0][0] != "0"
    if not good or any(len(group) != 3 for group in groups[1:]):
        return None
    return int("".join(groups)), j


def scanned(text):
    """The value of a text by the grammar of the chapter, character by character,
    without a regular expression; None: no number."""
    sign, i = 1, 0
    if text[:1] in ("-", "+"):
        sign, i = (-1 if text[0] == "-" else 1), 1
    if text[i : i + 1] == ".":
        end = digits_at(text, i + 1)
        fraction = text[i + 1 : end]
        value = Fraction(int(fraction), 10 ** len(fraction)) if fraction else None
        return sign * value if fraction and end == len(text) else None
    first = scanned_integer(text, i)
    if first is None:
        return None
    value, i = first
    rest = text[i:]
    if not rest:
        return sign * Fraction(value)
    if rest[0] == ".":
        end = digits_at(rest, 1)
        if end == 1 or end < len(rest):
            return None
        return sign * (value + Fraction(int(rest[1:end]), 10 ** (end - 1)))
    whole = 0
    if rest[0] == " ":
        top = scanned_integer(rest, 1)
        if top is None:
            return None
        whole, value, rest = value, top[0], rest[top[1] :]
    if rest[:1] != "/":
        return None
    bottom = scanned_integer(rest, 1)
    if bottom is None or bottom[1] < len(rest) or bottom[0] == 0:
        return None
    is_mixed = text.count(" ") > 0
    if is_mixed and value >= bottom[0]:
        return None
    return sign * (whole + Fraction(value, bottom[0]))


def read(text):
    number = extract_answer(text)
    return None if number is None else Fraction(number)


def test_the_grammar_against_a_scanner():
    """All texts of up to five characters, and grouped ones, behind each mark: the
    value, or none; a gold answer likewise."""
    short = map(
        "".join,
        itertools.chain(*(itertools.product("07-/ .,", repeat=n) for n in range(1, 6))),
    )
    groups = ("1", "12", "0", "123", "1234", "000", "200")
    grouped = [
        sign + ",".join(parts) + end
        for n in (2, 3)
        for parts in itertools.product(groups, repeat=n)
        for sign in ("", "-")
        for end in ("", ".5", "/7", ",")
    ]
    many = 0
    for text in [*short, *grouped]:
        words = text.split(" ")
        if text[-1] in ".," or any(not re.search("[0-9]", word) for word in words):
            continue  # punctuation and signs that stand around a number: see below
        if ". " in text:
            continue  # the end of a sentence
        right = scanned(text)
        assert read(f"#### {text}") == right, text
        assert read(f"So \\boxed{{{text}}}.") == right, text
        many += right is not None
    assert many > 500


NUMBERS = [
    ("#### −7", "-7"),
    ("#### –7", "-7"),
    ("#### - 7", "-7"),
    ("#### +7", "7"),
    ("#### 3 1/2", "7/2"),
    ("#### -3 1/2", "-7/2"),
    ("#### 3 3/2", None),
    ("3\\frac{1}{2}", "7/2"),
    ("\\frac12", "1/2"),
    ("\\boxed{\\dfrac{-1}{2}}", "-1/2"),
    ("\\boxed{-\\frac{1}{2}}", "-1/2"),
    ("\\boxed{\\frac{1}{2}x}", None),
    ("\\boxed{x\\frac{1}{2}}", None),
    ("\\boxed{\\sqrt{\\frac{1}{4}}}", None),
    ("\\boxed{\\sqrt 2}", None),
    ("\\boxed{2\\pi}", None),
    ("\\boxed{2 \\pi}", None),
    ("#### 2^10", None),
    ("#### 2 ^ 10", None),
    ("\\boxed{10^{5}}", None),
    ("\\boxed{10^5}", None),
    ("#### 10²", None),
    ("#### 1 200", None),
    ("#### 1\u202f200", None),
    ("\\boxed{1\\,200}", None),
    ("#### 1,00,000", None),
    ("#### 1, 200", None),
    ("#### 0,200", None),
    ("#### 1'200", None),
    ("#### 1_200", None),
    ("\\boxed{1{,}200}", "1200"),
    ("\\boxed{1,\\!200}", "1200"),
    ("#### €1,200.50", "1200.50"),
    ("#### -£5", "-5"),
    ("#### $-5", "-5"),
    ("$72$.", "72"),
    ("\\(72\\)", "72"),
    ("#### 50%", "50"),
    ("#### 50\\%", "50"),
    ("#### 72.", "72"),
    ("#### 72.0.1", None),
    ("#### 3/4/2024", None),
    ("#### 2024-03-04", None),
    ("#### 10:30", None),
    ("#### 3:4", None),
    ("#### 1e5", None),
    ("#### 1.5e5", None),
    ("#### 0x10", None),
    ("#### 5k", None),
    ("#### 5 million", None),
    ("#### 2 and a half", None),
    ("#### minus 5", None),
    ("The answer is minus 5.", None),
    ("#### 5-3", None),
    ("3-4", None),
    ("40 - 22", None),
    ("40 - 22 = 18", "18"),
    ("40-22=18", "18"),
    ("18 = 40 - 22", None),
    ("40 - 22 = <<40-22=18>>18", "18"),
    ("#### ½", None),
    ("#### 3½", None),
    ("#### ７２", None),
    ("#### 7٢", None),
    ("#### 5!", None),
    ("#### 3(4)", None),
    ("#### 18th", None),
    ("\\boxed{48+24=72}", "72"),
    ("\\boxed{72=48+24}", None),
    ("\\boxed{x = 72}", "72"),
    ("\\boxed{x \\le 72}", None),
    ("\\boxed{3, 4}", None),
    ("\\boxed{3 \\text{ or } 4}", None),
    ("\\boxed{(3,4)}", None),
    ("\\boxed{72", None),
    ("\\boxed{\\boxed{72}}", "72"),
    ("\\boxed {72}", "72"),
    ("\\boxed{72\\text{ cm}^2}", "72"),
    ("\\boxed{\\textbf{72}}", "72"),
    ("#### Step 3: add\nSo \\boxed{72}", "72"),
    ("#### Step 3 of it, so \\boxed{72}", "72"),
    ("#### Step 3", None),
    ("\\boxed{3}\n#### 72", "72"),
    ("#### **72**", "72"),
    ("So it is **72**.", "72"),
    ("So it is *72*", "72"),
    ("9**72", None),
    ("9*72", None),
    ("<answer>72</answer>", "72"),
    ("Answer:72", "72"),
    ("It is (72).", "72"),
    ('It is "72."', "72"),
    ("答案是72。", "72"),
    ("一共72个", "72"),
    ("共72万元", None),
    ("H2O", None),
]


@pytest.mark.parametrize("text, number", NUMBERS)
def test_a_number_is_never_cut_short(text, number):
    assert extract_answer(text) == number


GOLDS = (
    "18 1,200 -7 −7 +7 0.75 .5 1,234,567.25 3/4 3\u00a01/2 $5 €5 50% 72. **72**".split(
        " "
    )
)
NO_GOLDS = [
    *(
        "2^10 1\u00a0200 1,00,000 1e5 10:30 3/4/2024 ½ ７２ ٣ 5-3 3-4 1/0 x=18 5! 18cm"
    ).split(" "),
    "18 seats",
    "5 million",
    "3 or 4",
    "3, 4",
    "Step 3",
    "40 - 22 = 18",
    "\\boxed{18}",
    "10^{5}",
    "18\nThat is all.",
    "",
    "nan",
]


def test_gold_answers(tmp_path):
    """What is in the grammar is read, and its own solution is right; anything else
    is refused with its row."""
    rows = [
        {"question": f"{i}?", "answer": f"so\n#### {x}"} for i, x in enumerate(GOLDS)
    ]
    task = gsm8k(write(tmp_path / "rows.jsonl", rows))
    values = ["18", "1200", "-7", "-7", "7", "0.75", "0.5", "1234567.25", "3/4", "7/2"]
    values += ["5", "5", "50", "72", "72"]
    for i, value in enumerate(values):
        query = task.query(i)
        assert task.is_right(f"#### {value}", query), rows[i]
        assert task.is_right(task.solve(query, None), query)
        wrong = ("", "#### 3", f"#### 9{value}", f"#### {value}e5", "\\boxed{}")
        assert not any(task.is_right(text, query) for text in wrong), rows[i]
    for gold in NO_GOLDS:
        bad = {"question": "1?", "answer": f"so\n#### {gold}"}
        with pytest.raises(ValueError, match="row 2 must have an answer that ends"):
            gsm8k(write(tmp_path / "bad.jsonl", [rows[0], bad]))


@pytest.mark.parametrize("right", ["18", "-3", "1234567", "0.75"])
@pytest.mark.parametrize(
    "text",
    [
        "18",
        "18.0",
        "-3",
        "1,234,567",
        "1234567",
        "\\frac{3}{4}",
        "0.75",
        ".75",
        "3/4",
        "0.7500001",
        "0.7500000001",
        "17",
        "3",
        "6/2",
        "36/2",
    ],
)
def test_math_verify_itself_agrees(right, text):
    "On plain numbers its own reader, which we do not use, comes to the same verdict."
    theirs = math_verify.verify(
        math_verify.parse(f"${right}$"), math_verify.parse(f"${text}$")
    )
    assert same_number(right, extract_answer(f"The answer is {text}")) == theirs


HOSTILE = [
    "9**9**9**9",
    "#### 9^9^9^9",
    "\\boxed{9^{9^{9^9}}}",
    "#### 1e999999999",
    "#### " + "9" * 100_000,
    "9" * 200_000,
    "1," * 50_000,
    "#### 9!!!!!!",
    "\\frac{" * 100_000,
    "((" * 100_000,
    "\\boxed{" * 100_000,
    "####" * 100_000,
    "-" * 100_000,
    "1." * 50_000,
    "1/" * 50_000,
    "0/0",
    "#### 1/0",
    "__import__('os').system('true')",
    "\\boxed{factorial(10**9)}",
    "\x00",
    "\ud800",
]


def test_hostile_solutions_are_wrong_in_no_time():
    """Also in a thread, where no alarm can be set: there is none. And nothing of the
    text is compiled."""
    task = task_of_problems()
    compiled = []
    watching = [False]
    sys.addaudithook(
        lambda event, arguments: (
            watching[0] and event == "compile" and compiled.append(arguments)
        )
    )
    verdicts = []

    def judge():
        for text in HOSTILE:
            began = time.perf_counter()
            verdicts.append(
                (task.is_right(text, task.query(0)), time.perf_counter() - began)
            )

    task.is_right("#### 5", task.query(0))
    task.is_right("#### 5.5", task.query(0))
    watching[0] = True
    judge()
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join()
    watching[0] = False
    assert (
        len(verdicts) == 2 * len(HOSTILE)
        and not any(right for right, _ in verdicts)
        and max(seconds for _, seconds in verdicts) < 2
    )
    assert compiled == []


def task_of_problems():
    "The problems as a task, without a file."
    task = task_from_rows(
        "problems", [row | {"prompt": row["question"]} for row in PROBLEMS]
    )
    return types.SimpleNamespace(
        query=task.query,
        is_right=lambda text, query: (
            (n := extract_answer(text)) is not None
            and same_number(extract_answer(query.columns["answer"]), n)
        ),
    )


def test_gsm8k_reads_its_columns(tmp_path):
    path = write(tmp_path / "rows.jsonl", [row | {"source": "us"} for row in PROBLEMS])
    plain, chat = load_task(f"gsm8k:{path}"), load_task(f"gsm8k_chat:{path}")
    for i, row in enumerate(PROBLEMS):
        query = plain.query(i)
        assert (
            query.columns == row | {"source": "us"}
            and row["question"] in query.prompt
            and row["question"] in chat.query(i).prompt[0]["content"]
        )
        assert (
            plain.is_right(row["answer"], query)
            and not plain.is_right(row["answer"] + "1", query)
            and chat.is_right(plain.solve(query, None), chat.query(i))
        )
    held = {
        row["question"]
        for row in PROBLEMS
        if zlib.crc32(row["question"].encode()) % 5 == 0
    }
    for task in (plain, chat):
        assert {
            query.columns["question"] for query in task.queries("heldout", 50)
        } == held
    scores = accuracy_reward(plain)(
        prompts=["?"] * 2,
        completions=["#### 4", "#### 5"],
        completion_ids=[[1]] * 2,
        answer=[PROBLEMS[0]["answer"]] * 2,
    )
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    "row, says",
    [
        ({"prompt": "1", "answer": "#### 1"}, "question"),
        ({"question": "1", "answer": "1"}, "####"),
        ({"question": "1"}, "####"),
        ({"question": " ", "answer": "#### 1"}, "question"),
        ({"question": "1", "answer": "#### one"}, "####"),
        ({"question": 1, "answer": "#### 1"}, "question"),
    ],
)
def test_rows_that_are_not_gsm8k(tmp_path, row, says):
    with pytest.raises(ValueError, match=f"row 2 .*{says}"):
        gsm8k(write(tmp_path / "rows.jsonl", [PROBLEMS[0], row]))


# reasoning-gym ------------------------------------------------------------------------

GYM = [
    "leg_counting",
    "gcd",
    "chain_sum",
    "spell_backward",
    "basic_arithmetic",
    "letter_counting",
    "maze",
    "sudoku",
]


@pytest.mark.parametrize("name", GYM)
def test_gym(name):
    "Right answers get 1, others less; both sides of the split are there, and apart."
    task, chat = load_task(f"gym:{name}"), load_task(f"gym_chat:{name}")
    train, heldout = task.queries("train", 10, seed=1), task.queries("heldout", 4)
    assert task.queries("train", 10, seed=1) == train and not {
        query.text for query in train
    } & {query.text for query in heldout}
    wrong = ["", "no idea", "-1", "9**9**9**9"]
    for query in train + heldout:
        right = task.solve(query, None)
        assert (
            task.is_right(right, query)
            and task.steps(right, query) == [(len(right), 1.0)]
            and not any(task.is_right(text, query) for text in wrong)
        )
        assert chat.is_right(
            f"I think <answer>{right}</answer>", query
        ) and not chat.is_right(right, query)
        assert accuracy_reward(task)(
            [query.prompt],
            [right],
            **{column: [x] for column, x in query.columns.items()},
        ) == [1.0]
    reward = process_reward(task, None)
    assert reward(
        [train[0].prompt],
        [task.solve(train[0], None)],
        [[5, 6]],
        **{column: [x] for column, x in train[0].columns.items()},
    ) == [[(1, 1.0)]]


def executed(cls):
    """Names of what the checker of a class calls, in itself and in all functions of
    reasoning-gym that it reaches; eval and its like."""
    todo, seen, names = [cls.score_answer], set(), set()
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        for call in (
            node.func for node in ast.walk(tree) if isinstance(node, ast.Call)
        ):
            name = (
                call.attr
                if isinstance(call, ast.Attribute)
                else getattr(call, "id", "")
            )
            names.add(name)
            reached = getattr(cls, name, None) or function.__globals__.get(name)
            reached = getattr(reached, "__func__", reached)
            if isinstance(
                reached, types.FunctionType
            ) and reached.__module__.startswith("reasoning_gym"):
                todo.append(reached)
            if isinstance(reached, type) and reached.__module__.startswith(
                "reasoning_gym"
            ):
                todo += [
                    f
                    for f in vars(reached).values()
                    if isinstance(f, types.FunctionType)
                ]
    return names & {
        "eval",
        "exec",
        "compile",
        "__import__",
        "parse_expr",
        "sympify",
        "lambdify",
        "loads_pickle",
    }


@pytest.fixture(scope="module")
def accepted():
    "The tasks of reasoning-gym that `gym` lets through."
    tasks = {}
    for name in reasoning_gym.factory.DATASETS:
        try:
            tasks[name] = gym(name)
        except ValueError as error:
            assert "gym:" in str(error)
    return tasks


def test_no_checker_of_reasoning_gym_executes_what_a_model_writes(accepted):
    """A search through the source. One checker evaluates, and that is the question's
    own expression."""
    assert len(accepted) > 80 and not accepted.keys() & {
        *GYM_UNFIT,
        "countdown",
        "n_queens",
        "string_insertion",
        "spiral_matrix",
        "codeio",
        "composite",
    }
    found = {
        name: words
        for name in accepted
        if (words := executed(reasoning_gym.factory.DATASETS[name][0]))
    }
    assert found == {"bitwise_arithmetic": {"eval"}}


def test_hostile_answers_are_wrong_in_no_time(accepted):
    for name, task in accepted.items():
        query, began = task.query(0), time.perf_counter()
        for text in (
            "",
            "the answer",
            "1e999999999",
            "9" * 5000,
            "[" * 20_000,
            "9**9**9**9",
            "nan",
            "inf",
            "[null]",
            '{"a": 1}',
            "\x00",
            "0x" + "f" * 4000,
        ):
            assert not task.is_right(text, query), (name, text[:20])
        assert time.perf_counter() - began < 2, name


SHOW = """
import json, sys
from grpo_nb.engine.data import gym
print("\\n" + json.dumps({name: [gym(name).query(i).text for i in (0, 1, 7)] for name in json.loads(sys.argv[1])}))
"""


def test_questions_are_the_same_in_every_process(accepted):
    "Whatever Python's salt of `hash`: else a resumed run would ask others."
    names = [
        name for name in accepted if name not in ("acre", "knight_swap")
    ]  # seconds each
    done = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(names)],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [
        name
        for name, texts in json.loads(done.stdout.splitlines()[-1]).items()
        if texts != [accepted[name].query(i).text for i in (0, 1, 7)]
    ] == []
