"""Files as people have them: every format, packed, in folders, with the marks that
editors and other systems leave in them.

The files are written here by json, csv and pandas, which are also the truth."""

import csv
import gzip
import io
import json
import os
import tempfile

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest

from grpo_nb.engine.data import load_task
from grpo_nb.engine.files import FORMATS, choose_sides, read_rows

ROWS = [
    {"prompt": "1+1=", "answer": "2", "note": 'a "quoted", one'},
    {"prompt": "2+2=", "answer": "4", "note": "two\nlines"},
    {"prompt": "3+4=", "answer": "007", "note": "NA"},
    {"prompt": "题=", "answer": "null", "note": ""},
]


def written(suffix, rows):
    "Rows as the bytes of a file."
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False).encode()
    if suffix == ".parquet":
        sink = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        return sink.getvalue()
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], delimiter="\t" if suffix == ".tsv" else ",")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_rows_that_were_written(tmp_path, suffix, packed):
    "Also with a name of capitals, blanks and signs that are patterns elsewhere."
    data = written(suffix, ROWS)
    end = suffix.upper() + (".GZ" if packed else "")
    path = tmp_path / f"my [rows]*{{1}} 题::x{end}"
    path.write_bytes(gzip.compress(data) if packed else data)
    rows, heldout = read_rows(str(path))
    assert list(rows) == ROWS and heldout is None and len(rows) == 4
    assert [rows[i] for i in (3, 0, -1)] == [ROWS[3], ROWS[0], ROWS[3]]
    with pytest.raises(IndexError):
        rows[4]
    assert load_task(str(path)).size == 4


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_marks_of_editors_are_no_data(tmp_path, suffix):
    "A byte order mark, line ends of Windows, blank lines."
    rows = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]
    text = written(suffix, rows).decode().replace("\r\n", "\n")
    text = "\ufeff" + text.replace("\n", "\r\n\r\n") + "\r\n"
    (tmp_path / f"rows{suffix}").write_bytes(text.encode())
    assert list(read_rows(str(tmp_path / f"rows{suffix}"))[0]) == rows


def test_json_keeps_what_is_written(tmp_path):
    "Mixed types, nested values, gaps, keys that are missing, dates, long integers."
    rows = [
        {"prompt": "1", "answer": 6, "more": {"a": [1, {"b": None}]}},
        {"prompt": "2", "answer": "six", "more": "text", "date": "2024-03-04"},
        {"prompt": "3", "answer": [6, "six"], "more": None, "big": 2**70},
        {"prompt": "4", "answer": 6.5, "line": "\u2028\x85\x0b"},
    ]
    for suffix in (".jsonl", ".json"):
        path = tmp_path / f"rows{suffix}"
        path.write_text(
            json.dumps(rows)
            if suffix == ".json"
            else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        )
        table = read_rows(str(path))[0]
        assert list(table) == rows and table[2] == rows[2]
        task = load_task(str(path))
        assert task.is_right("six", task.query(2)) and task.is_right(
            "6.5", task.query(3)
        )


@pytest.mark.parametrize(
    "text, rows",
    [
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('{"data": [{"a": 1}, {"a": 2}], "version": 3}', [{"a": 1}, {"a": 2}]),
        ('{\n "rows": [\n  {"a": 1}\n ]\n}', [{"a": 1}]),
        ('{"prompt": "1"}', [{"prompt": "1"}]),
        (
            '{"messages": [{"role": "user", "content": "1"}]}',
            [{"messages": [{"role": "user", "content": "1"}]}],
        ),
        (" \n [ ] ", []),
        ("", []),
        ('[{"a": "[1, 2], {"}, {"a": "\\"]"}]', [{"a": "[1, 2], {"}, {"a": '"]'}]),
    ],
)
def test_what_a_json_file_may_hold(tmp_path, text, rows):
    (tmp_path / "rows.json").write_text(text)
    assert list(read_rows(str(tmp_path / "rows.json"))[0]) == rows


def test_splits_in_one_json_file(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    rows, heldout = read_rows(str(path))
    assert list(rows) == ROWS and list(heldout) == ROWS[:1]


def test_an_array_may_call_itself_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf\n" + written(".json", ROWS))
    assert list(read_rows(str(tmp_path / "rows.jsonl"))[0]) == ROWS


@pytest.mark.parametrize(
    "text, rows",
    [
        ('prompt;answer\n1+1=;"2;5"\n', [{"prompt": "1+1=", "answer": "2;5"}]),
        ("prompt;answer\n1+1=;2,5\n", [{"prompt": "1+1=", "answer": "2,5"}]),
        ("prompt,answer\na;b,c;d\n", [{"prompt": "a;b", "answer": "c;d"}]),
        ("prompt\n1;2\n", [{"prompt": "1;2"}]),
        ('"a;b",prompt\n1,2\n', [{"a;b": "1", "prompt": "2"}]),
    ],
)
def test_semicolons_of_a_spreadsheet(tmp_path, text, rows):
    (tmp_path / "rows.csv").write_text(text)
    assert list(read_rows(str(tmp_path / "rows.csv"))[0]) == rows


@pytest.mark.parametrize(
    "text, says",
    [
        ('[{"a": 1}, {"a": ]', "item 2 is not JSON"),
        ('[{"a": 1}, 7]', "item 2 must be an object, got int"),
        ('[{"a": 1}', "item 2 is not JSON"),
        ("[" * 100_000, "item 1 is not JSON"),
        ("{", "rows.json"),
    ],
)
def test_a_broken_array_names_its_item(tmp_path, text, says):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_task(str(tmp_path / "rows.json"))


@pytest.mark.parametrize("suffix", FORMATS)
def test_cells_of_any_length(tmp_path, suffix):
    "Also longer than what is read at a time."
    rows = [{"prompt": "1", "note": "x" * 3_000_000}, {"prompt": "2", "note": "y"}]
    (tmp_path / f"rows{suffix}").write_bytes(written(suffix, rows))
    assert list(read_rows(str(tmp_path / f"rows{suffix}"))[0]) == rows


def test_many_rows_of_each_format(tmp_path):
    "More than are read at a time: the last one, too."
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(2345)]
    for suffix in FORMATS:
        (tmp_path / f"rows{suffix}").write_bytes(written(suffix, rows))
        table = read_rows(str(tmp_path / f"rows{suffix}"))[0]
        assert list(table) == rows and table[2344] == rows[2344]


def test_types_of_parquet(tmp_path):
    "Messages as lists of structs, categories, times, and what pandas adds."
    frame = pd.DataFrame(
        {
            "prompt": [[{"role": "user", "content": "1+1="}]] * 2,
            "answer": pd.Categorical(["2", "3"]),
            "when": pd.to_datetime(["2024-03-04"] * 2),
        },
        index=[5, 6],
    )
    frame.to_parquet(tmp_path / "rows.parquet")
    task = load_task(str(tmp_path / "rows.parquet"))
    assert task.query(0).prompt == [{"role": "user", "content": "1+1="}]
    assert [task.query(i).columns["answer"] for i in (0, 1)] == ["2", "3"]


def test_a_link_is_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_bytes(written(".parquet", ROWS))
    (tmp_path / "rows.parquet").symlink_to("blob")
    assert list(read_rows(str(tmp_path / "rows.parquet"))[0]) == ROWS


def test_a_changed_file_is_read_anew_and_nothing_is_left(tmp_path, monkeypatch):
    "Same name, size and time; no cache in its folder, at home or in a temporary one."
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    path = tmp_path / "rows.csv"
    for answer in ("2", "3"):
        path.write_text(f"prompt,answer\n1+1=,{answer}\n")
        os.utime(path, (1, 1))
        rows = read_rows(str(path))[0]
        assert rows[0]["answer"] == answer
    assert sorted(os.listdir(tmp_path)) == ["rows.csv", "tmp"]
    assert os.listdir(tmp_path / "tmp") == []
    assert rows[0]["answer"] == "3"  # still there


# Folders and splits -------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, train, heldout",
    [
        ({"train.jsonl": 3, "test.jsonl": 1}, 3, 1),
        ({"train.csv": 3, "validation.csv": 1, "test.csv": 2}, 3, 2),
        (
            {"data/train-00000-of-00002.parquet": 3, "data/train-1-of-2.parquet": 1},
            4,
            None,
        ),
        ({"train-00000-of-00001-0123ab.parquet": 2, "test-0-of-1.parquet": 1}, 2, 1),
        (
            {
                "data/train_sft-00000-of-00001.parquet": 2,
                "data/test_sft-00000-of-00001.parquet": 1,
                "data/train_gen-00000-of-00001.parquet": 4,
                "data/test_gen-00000-of-00001.parquet": 3,
            },
            4,
            3,
        ),
        ({"train/a.json": 2, "train/b.json": 1, "dev/a.json": 1}, 3, 1),
        ({"gsm8k_train.jsonl.gz": 2, "gsm8k_test.jsonl.gz": 1}, 2, 1),
        ({"Train.CSV": 2, "TEST.CSV": 1}, 2, 1),
        ({"rows.tsv": 3}, 3, None),
        ({"a.jsonl": 3, "b.jsonl": 2}, 5, None),
        ({"train.parquet": 3, "train.json": 1}, 3, None),
    ],
)
def test_a_folder(tmp_path, files, train, heldout):
    "With a README, a description and hidden files beside the data."
    for name, n in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        suffix = path.name.lower().removesuffix(".gz")
        data = written(os.path.splitext(suffix)[1], (ROWS * 2)[:n])
        path.write_bytes(gzip.compress(data) if ".gz" in name else data)
    (tmp_path / "README.md").write_text("---\nconfigs: []\n---\n# Rows")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache/old.parquet").write_text("nothing")
    (tmp_path / "load.py").write_text("raise SystemExit('was executed')")
    rows, others = read_rows(str(tmp_path))
    assert len(rows) == train and len(list(rows)) == train
    assert others is None if heldout is None else len(others) == heldout
    assert rows[train - 1] == list(rows)[-1]


def test_a_folder_with_several_data_sets(tmp_path):
    for name in ("main", "socratic"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            path = tmp_path / f"{name}/{split}-00000-of-00001.parquet"
            path.write_bytes(written(".parquet", ROWS))
    with pytest.raises(ValueError, match="several data sets.*main, .*socratic"):
        read_rows(str(tmp_path))
    assert len(read_rows(str(tmp_path / "main"))[1]) == 4


@pytest.mark.parametrize(
    "names, sides",
    [
        ("train test", ("train", "test")),
        ("test train validation", ("train", "test")),
        ("validation train", ("train", "validation")),
        ("train_sft test_sft train_gen test_gen", ("train_sft", "test_sft")),
        ("test_gen train_gen test_sft train_sft", ("train_gen", "test_gen")),
        ("train train_extra test", ("train", "test")),
        ("training evaluation", ("training", "evaluation")),
        ("only", ("only", None)),
        ("train other", ("train", None)),
    ],
)
def test_sides(names, sides):
    assert choose_sides(dict.fromkeys(names.split(), [])) == sides
