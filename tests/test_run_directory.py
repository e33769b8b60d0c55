"""The directory of a run: one run at a time, the next free number, completions in
parts, and where `make run` puts it."""

import json
import os
import random
import signal
import sys
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pyarrow.parquet as pq
import pytest
from papermill import cli as papermill_cli

from grpo_nb.run import command_line, run_directory, training
from grpo_nb.run.options import make_config
from grpo_nb.run.run_directory import make_directory, prepare_directory
from grpo_nb.run.run_directory import read_completions
from grpo_nb.run.training import train
from helpers import PROCESSES, ROOT, run, short_config, start_process

sys.path.append(str(ROOT / "tools"))
import run as make_run  # noqa: E402  tools/run.py


def train_at_once(barrier, options):
    config = make_config(**options)
    barrier.wait()
    try:
        print("done", train(config, progress=False).directory)
    except ValueError as error:
        print("refused", error)


def two_at_once(tmp_path, **options):
    """Two processes that call `train` at the same moment: what each has printed, and
    its id."""
    options |= {"num_prompts": 4, "num_generations": 4, "eval_size": 5, "device": "cpu"}
    barrier, logs = PROCESSES.Barrier(2, timeout=60), [tmp_path / "a", tmp_path / "b"]
    both = [
        start_process(train_at_once, barrier, options, cwd=tmp_path, log=log)
        for log in logs
    ]
    for one in both:
        one.join(timeout=200)
    return [(log.read_text(), one.pid) for log, one in zip(logs, both)]


# One at a time ------------------------------------------------------------------------


def test_two_runs_in_one_directory(tmp_path):
    """Exactly one trains; the other is told which process has it. Nothing of the
    lock is left."""
    directory = tmp_path / "run"
    said = sorted(two_at_once(tmp_path, output_dir=str(directory), max_steps=40))
    (done, winner), (refused, _) = said
    assert done.split()[-2:] == ["done", str(directory)], said
    assert f"'{directory}' is in use by process {winner} on " in refused, said
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 41))
    assert not (directory / ".lock").exists()


def test_two_runs_that_take_the_next_number(tmp_path):
    "Beyond 9999 and behind gaps: each has a directory of its own."
    for name in ("0003", "9999", "notes"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    said = two_at_once(tmp_path, max_steps=1)
    assert {text.split()[-1] for text, _ in said} == {"runs/10000", "runs/10001"}, said
    for name in ("10000", "10001"):
        assert (tmp_path / "runs" / name / "model").is_dir()


def test_a_number_that_is_taken_meanwhile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = make_config()
    chosen = prepare_directory(config)
    assert chosen == Path("runs/0001") and not chosen.exists()
    chosen.mkdir(parents=True)
    assert make_directory(config, chosen) == Path("runs/0002")


def hold(directory, locked):
    "Lock a directory, and keep it until killed."
    run_directory._lock(directory)
    locked.set()
    time.sleep(100)


def test_a_lock_is_gone_with_its_process(tmp_path):
    """Killed, it leaves the file and not the lock; a lock that is held names its
    process."""
    locked = PROCESSES.Event()
    holder = start_process(hold, tmp_path, locked)
    assert locked.wait(timeout=60)
    with pytest.raises(ValueError, match=f"in use by process {holder.pid} on "):
        run_directory._lock(tmp_path)
    holder.kill()
    holder.join()
    assert (tmp_path / ".lock").exists()
    with run_directory._locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert not any(tmp_path.iterdir())


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    "It is said, and the run goes on."

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked.*no other run uses it"):
        with run_directory._locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_completion_length": 1000},
        {"reward_weights": [1.0, 2.0]},
        {"model": "/nowhere"},
    ],
    ids=str,
)
def test_a_refusal_leaves_no_directory(tmp_path, monkeypatch, wrong):
    monkeypatch.chdir(tmp_path)
    for place in ({}, {"output_dir": str(tmp_path / "x/y")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            train(short_config(**wrong, **place), progress=False)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_a_file_in_the_way(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"output_dir .*{name}.*is a file"):
        prepare_directory(make_config(output_dir=str(tmp_path / name)))


# Paths --------------------------------------------------------------------------------


def test_paths_and_the_home_directory(tmp_path, monkeypatch):
    """A Path is a path; `~` is written out wherever a path stands, on the command
    line too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data.csv").write_text("prompt,answer\n1+1=,2\n")
    config = make_config(
        algorithm="ppo",
        model=Path("~/m"),
        output_dir="~/x",
        value_model=Path("/a/v"),
        task=Path("~/data.csv"),
        reward_funcs=["accuracy", Path("~/judge")],
    )
    assert (config.model, config.output_dir) == (f"{tmp_path}/m", f"{tmp_path}/x")
    assert (config.value_model, config.task) == ("/a/v", f"{tmp_path}/data.csv")
    assert config.reward_funcs == ["accuracy", f"{tmp_path}/judge"]
    parsed = command_line.parse_arguments(["--output_dir=~/x", "--model", "~/m"])
    assert (parsed.model, parsed.output_dir) == (config.model, config.output_dir)
    assert make_config(reward_funcs="brevity").reward_funcs == ["brevity"]
    assert make_config(model="a~b/c").model == "a~b/c"
    with pytest.raises(ValueError, match=f"'{tmp_path}/r' is not a finished run"):
        training.open_run("~/r")


# Completions --------------------------------------------------------------------------


def rows_of(step, n=256):
    "Synthetic completions of a step; some have no reward."
    rng = random.Random(step)
    return [
        {
            "step": step,
            "query": f"{rng.randrange(100)}+{rng.randrange(100)}=",
            "completion": str(rng.randrange(10**6)),
            "reward": None if i == 7 else rng.random(),
            "advantage": None if step == 3 else rng.random(),
            "tokens": rng.randrange(1, 9),
            "truncated": rng.random() < 0.1,
        }
        for i in range(n)
    ]


def write_run(directory, steps, saves, start=1):
    directory.mkdir(exist_ok=True)
    found = run_directory.Completions(directory)
    for step in range(start, steps + 1):
        found.add(rows_of(step))
        if step % saves == 0:
            found.flush()
    return found


def test_parts_make_one_file_whatever_they_were(tmp_path, monkeypatch):
    """Saved often, seldom, never, or cut and gone on with: the same bytes; and the
    rows are what pandas made of them."""
    monkeypatch.setattr(run_directory, "_ROW_GROUP", 1000)
    files = []
    for name, saves in {"often": 1, "seldom": 7, "never": 10**9}.items():
        found = write_run(tmp_path / name, 20, saves)
        assert len(found.rows) < 1000 + 256
        found.merge()
        files.append(tmp_path / name / "completions.parquet")
        assert os.listdir(tmp_path / name) == ["completions.parquet"]
    cut = tmp_path / "cut"
    write_run(cut, 16, 4).merge()
    run_directory.Completions(cut).check(12)
    run_directory.Completions(cut).cut(12)
    write_run(cut, 15, 4, start=13)  # killed: its rows of 13 to 15 were not saved
    write_run(cut, 18, 5, start=13)  # killed after a part of 13 to 15
    run_directory.Completions(cut).check(12)
    run_directory.Completions(cut).cut(12)
    write_run(cut, 20, 4, start=13).merge()  # no part of these ends at 15
    files.append(cut / "completions.parquet")
    assert len({path.read_bytes() for path in files}) == 1
    plain = pd.DataFrame([row for step in range(1, 21) for row in rows_of(step)])
    plain.to_parquet(tmp_path / "plain.parquet", index=False)
    plain = pd.read_parquet(tmp_path / "plain.parquet")
    shown = pd.read_parquet(files[0], columns=list(plain))
    pd.testing.assert_frame_equal(shown, plain)
    pd.testing.assert_frame_equal(read_completions(tmp_path / "often"), plain)
    assert pq.ParquetFile(files[0]).metadata.num_row_groups == 6  # 5,120 rows


def test_a_run_of_an_older_version_goes_on(tmp_path):
    """completions.parquet alone, in one piece, written by pandas; with rows after
    the checkpoint."""
    directory = tmp_path / "run"
    directory.mkdir()
    rows = [row for step in range(1, 6) for row in rows_of(step)]
    pd.DataFrame(rows).to_parquet(directory / "completions.parquet", index=False)
    run_directory.Completions(directory).check(4)
    run_directory.Completions(directory).cut(4)
    write_run(directory, 8, 2, start=5).merge()
    write_run(tmp_path / "new", 8, 3).merge()
    old, new = (tmp_path / x / "completions.parquet" for x in ("run", "new"))
    assert old.read_bytes() == new.read_bytes()
    with pytest.raises(ValueError, match="completions.parquet is damaged.*up to 9"):
        run_directory.Completions(directory).check(9)


def test_killed_between_two_files(tmp_path):
    "Parts that are merged already, and not yet removed, are not counted twice."
    directory = tmp_path / "run"
    write_run(directory, 6, 2)
    parts = {path: path.read_bytes() for path in directory.iterdir()}
    run_directory.Completions(directory).merge()
    for path, content in parts.items():
        path.write_bytes(content)
    assert read_completions(directory).groupby("step").size().tolist() == [256] * 6
    run_directory.Completions(directory).merge()
    assert os.listdir(directory) == ["completions.parquet"]
    assert read_completions(directory).groupby("step").size().tolist() == [256] * 6


def test_a_save_does_not_grow_with_the_run(tmp_path):
    "Memory of a save after 20 steps and after 200, and what it writes."
    found, peaks, sizes = run_directory.Completions(tmp_path), {}, {}
    for step in range(1, 201):
        found.add(rows_of(step))
        if step % 10 == 0:
            tracemalloc.start()
            found.flush()
            peaks[step] = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            sizes[step] = (tmp_path / f"completions-{step}.parquet").stat().st_size
            assert found.rows == []
    assert peaks[200] < 1.5 * peaks[20] and sizes[200] < 1.1 * sizes[20]


def train_until_killed(directory):
    def stop(line):
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    config = short_config(output_dir=str(directory), max_steps=4, save_steps=1)
    train(config, progress=False, on_step=stop)


def test_an_interrupted_run_opens(tmp_path):
    """Killed after a checkpoint: its completions are there, all together; another
    run is refused."""
    process = start_process(train_until_killed, tmp_path / "run")
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    names = {path.name for path in (tmp_path / "run").glob("completions*")}
    assert names == {"completions-1.parquet", "completions-2.parquet"}
    assert read_completions(tmp_path / "run")["step"].tolist() == [1] * 16 + [2] * 16
    with pytest.raises(ValueError, match="already holds a run.*completions-1.parquet"):
        run(tmp_path / "run", max_steps=4)
    found = run(tmp_path / "run", max_steps=4, save_steps=1, resume=True)
    assert found.completions.groupby("step").size().tolist() == [16] * 4
    assert not list((tmp_path / "run").glob("completions-*"))


# make run -----------------------------------------------------------------------------


@pytest.fixture
def papermill(tmp_path, monkeypatch):
    """A papermill that reads the parameters and trains nothing: what it was asked to
    write."""
    monkeypatch.chdir(tmp_path)
    asked, real = [], make_run.papermill

    def here(command):
        assert command[:3] == [sys.executable, "-m", "papermill"]
        papermill_cli.papermill.main(command[3:], standalone_mode=False)
        return SimpleNamespace(returncode=0)

    def pretend(output, arguments):
        if "--prepare-only" in arguments:
            return real(output, arguments)
        found = make_run.parameters(arguments)
        asked.append(output)
        where = make_run.working_directory(arguments) / found["output_dir"]
        where = Path(os.path.expanduser(where))
        (where / "summary.txt").write_text(f"this is {found['output_dir']}\n")
        return 0

    monkeypatch.setattr(make_run, "subprocess", SimpleNamespace(run=here))
    monkeypatch.setattr(make_run, "papermill", pretend)
    return asked


@pytest.mark.parametrize(
    "arguments, run, shown",
    [
        ([], "runs/0002", "this is runs/0002"),
        (["-p", "output_dir", "X/y"], "X/y", "this is X/y"),
        (["-y", "{output_dir: X, seed: 3}"], "X", "this is X"),
        (["-f", "p.yaml"], "from_file", "this is from_file"),
        (["-r", "output_dir", "07"], "07", "this is 07"),
        (["-p", "output_dir", "~/z"], "z", "this is ~/z"),
    ],
    ids=["default", "-p", "-y", "-f", "-r", "home"],
)
def test_make_run_goes_where_the_parameters_say(
    tmp_path, monkeypatch, papermill, capsys, arguments, run, shown
):
    """By any of papermill's ways: the notebook and the summary are there, and no
    empty numbered directory is left."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs/0001").mkdir(parents=True)
    (tmp_path / "p.yaml").write_text("output_dir: from_file\n")
    make_run.main(arguments)
    assert [Path(x).resolve() for x in papermill] == [tmp_path / run / "train.ipynb"]
    assert shown in capsys.readouterr().out
    left = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert left == ["0001", "0002"] if run == "runs/0002" else left == ["0001"]


def test_make_run_keeps_the_notebook_of_a_run(tmp_path, papermill, capsys):
    """A directory that holds a run is refused before papermill writes there, but for
    resuming."""
    (tmp_path / "X").mkdir()
    (tmp_path / "X/config.json").write_text("{}")
    with pytest.raises(SystemExit, match="'X' already holds a run.*resume True"):
        make_run.main(["-p", "output_dir", "X"])
    assert papermill == []
    make_run.main(["-p", "output_dir", "X", "-p", "resume", "True"])
    assert len(papermill) == 1


def test_make_run_with_a_wrong_option(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        make_run.main(["--nonsense"])
    assert stop.value.code == 2 and not any(tmp_path.iterdir())


def test_the_makefile_calls_it():
    recipe = (ROOT / "Makefile").read_text().partition("\nrun: ")[2]
    assert recipe.splitlines()[1].strip() == "@$(BIN)/python tools/run.py $(ARGS)"
