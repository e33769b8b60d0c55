"""A sweep: every cell once, what is done stays, what fails is said, what is wrong is
refused before anything runs."""

import json
from pathlib import Path

import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat.v4 import new_code_cell, new_notebook

from grpo_nb.evidence.sweep import cell_name, grid, sweep

PARAMETERS = "x = 1\nhow = None\noutput_dir = None"
WORK = """
import json, os, pathlib
if how == "raise": raise RuntimeError("the model\\nburnt")
if how == "die": os._exit(3)
folder = pathlib.Path(output_dir)
(folder / "result.json").write_text(json.dumps({"twice": 2 * x, "threads": os.environ["OMP_NUM_THREADS"], "how": how}))
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    cells = [
        new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        new_code_cell(WORK),
    ]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    path = tmp_path_factory.mktemp("notebook") / "work.ipynb"
    nbformat.write(
        new_notebook(
            cells=cells,
            metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
        ),
        path,
    )
    return path


def result(row):
    return json.loads((Path(row["directory"]) / "result.json").read_text())


@given(
    st.dictionaries(
        st.sampled_from("abcd"),
        st.lists(st.integers(), min_size=1, max_size=3, unique=True),
    )
)
def test_grid_has_every_combination_once(axes):
    cells, expected = grid(**axes), 1
    for values in axes.values():
        expected *= len(values)
    assert len(cells) == expected == len({tuple(cell.items()) for cell in cells})
    assert all(
        list(cell) == list(axes) and all(cell[name] in axes[name] for name in cell)
        for cell in cells
    )


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["x", "how"]),
            st.integers() | st.text(max_size=200) | st.floats() | st.none(),
        ),
        unique_by=str,
    )
)
def test_names_of_cells_are_folder_names_and_differ(cells):
    names = [cell_name(cell) for cell in cells]
    assert len(set(names)) == len(names)
    assert all(
        0 < len(name) <= 100 and Path(name).name == name and name.isprintable()
        for name in names
    )


def test_a_sweep_runs_every_cell_with_its_parameters_and_goes_on_where_it_was(
    notebook, tmp_path
):
    cells = [{"x": 1, "how": "a"}, {"x": 2, "how": None}]
    table = sweep(notebook, cells, tmp_path, jobs=2, threads=1, progress=False)
    assert table["error"].isna().all() and [
        result(row) for _, row in table.iterrows()
    ] == [
        {"twice": 2, "threads": "1", "how": "a"},
        {"twice": 4, "threads": "1", "how": None},
    ]
    stamps = {
        path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()
    }
    (
        Path(table["directory"][1]) / "cell.json"
    ).unlink()  # as if it had been killed on the way
    again = sweep(notebook, cells, tmp_path, progress=False)
    assert again["error"].isna().all() and len(again) == 2
    assert result(again.loc[1])["twice"] == 4
    changed = {
        path.parent.name
        for path, stamp in stamps.items()
        if path.stat().st_mtime_ns != stamp
    }
    assert changed == {cell_name(cells[1])}  # the first was not touched


def test_a_cell_that_fails_is_said_and_the_others_go_on(notebook, tmp_path, capsys):
    cells = grid(how=["raise", "die", "a"])
    table = sweep(notebook, cells, tmp_path, progress=False)
    raised, died, _ = table["error"]
    assert raised == "RuntimeError: the model" and "DeadKernelError" in died
    assert (
        table["error"].isna().tolist() == [False, False, True]
        and result(table.loc[2])["how"] == "a"
    )
    assert [(Path(d) / "cell.json").exists() for d in table["directory"]] == [
        False,
        False,
        True,
    ]
    assert "burnt" in (Path(table["directory"][0]) / "log.txt").read_text()
    assert "how=raise" in capsys.readouterr().out


RESUMABLE = """
import json, pathlib
folder = pathlib.Path(output_dir)
begun = (folder / "config.json").exists()
if begun and not resume: raise ValueError("already holds a run")
(folder / "config.json").write_text("{}")
if not begun: raise RuntimeError("killed")
(folder / "result.json").write_text(json.dumps({"x": x, "resume": resume}))
"""


def test_the_same_sweep_goes_on_with_a_run_that_was_killed(notebook, tmp_path):
    resumable = nbformat.read(notebook, 4)
    resumable.cells[0].source = "x = 1\nresume = None\noutput_dir = None"
    resumable.cells[1].source = RESUMABLE
    path = tmp_path / "resumable.ipynb"
    nbformat.write(resumable, path)
    for cells in ([{"x": 2}], [{"x": 2, "resume": False}]):
        place = tmp_path / str(len(cells[0]))
        begun = sweep(path, cells, place, progress=False)
        assert begun["error"][0] == "RuntimeError: killed"
        later = sweep(path, cells, place, progress=False)
        assert later["directory"].equals(begun["directory"])
        if "resume" in cells[0]:  # what the cell says stays
            assert later["error"][0] == "ValueError: already holds a run"
        else:
            assert later["error"][0] is None
            assert result(later.loc[0]) == {"x": 2, "resume": True}


def test_a_notebook_that_cannot_resume_is_not_asked_to(notebook, tmp_path):
    folder = tmp_path / cell_name({"x": 1})
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    table = sweep(notebook, [{"x": 1}], tmp_path, progress=False)
    assert table["error"][0] is None
    assert "resume" not in (folder / "notebook.ipynb").read_text()


@pytest.mark.parametrize(
    "wrong, says",
    [
        (
            dict(cells=[{"y": 1}]),
            "'y' is not a parameter of work.ipynb.*allowed: how, x",
        ),
        (dict(cells=[{"output_dir": "elsewhere"}]), "'output_dir' is not a parameter"),
        (dict(cells=[{"x": 1}, {"x": 1}]), "stands twice"),
        (dict(jobs=0), "jobs=0"),
        (dict(notebook="none.ipynb"), "'none.ipynb' is not a file"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_runs(notebook, tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        sweep(
            **{"notebook": notebook, "cells": [{"x": 1}], "directory": tmp_path / "new"}
            | wrong
        )
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_cell_is_not_taken_for_done(notebook, tmp_path):
    folder = tmp_path / cell_name({"x": 1})
    folder.mkdir()
    (folder / "cell.json").write_text(
        json.dumps({"notebook": "other.ipynb", "parameters": {"x": 1}, "seconds": 1})
    )
    with pytest.raises(ValueError, match="holds another cell"):
        sweep(notebook, [{"x": 1}], tmp_path)
