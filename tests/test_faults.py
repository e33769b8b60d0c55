"""What goes wrong while training: killed processes, damaged checkpoints, full disks,
failing rewards, gradients that are no numbers, signals, memory."""

import errno
import json
import math
import os
import random
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from safetensors.torch import load_file, save_file

from grpo_nb import update
from grpo_nb.algorithm import STEPS
from grpo_nb.run import checkpoint, command_line, run_directory, trackers, training
from grpo_nb.reward import accuracy_reward
from grpo_nb.engine.data import load_task
from grpo_nb.run.checkpoint import checkpoints, is_whole
from helpers import read_metrics, same_run, short_config, start_process
from helpers import run as run_with

OPTIONS = {
    "num_prompts": 4,
    "num_generations": 4,
    "max_steps": 6,
    "eval_steps": 3,
    "eval_size": 4,
    "save_steps": 1,
    "max_completion_length": 6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "num_iterations": 2,
    "learning_rate": 1e-3,
}
KILLS = int(os.environ.get("GRPO_NB_KILLS", 3))


def run(directory, functions=None, **options):
    return run_with(directory, functions, **OPTIONS | options)


def judged(at=None, do=None):
    """The accuracy of `add`; the call number `at` (from 1) does something else
    first, or returns what `do` returns."""
    judge, calls = accuracy_reward(load_task("add")), []

    def accuracy(prompts, completions, **columns):
        calls.append(1)
        found = do(prompts, completions) if len(calls) == at else None
        return judge(prompts, completions, **columns) if found is None else found

    return accuracy


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The run that nothing happens to."
    return run(tmp_path_factory.mktemp("straight") / "run").directory


@pytest.fixture
def stopped(tmp_path):
    "A run that was interrupted after step 4, by Ctrl-C in step 5 and again."

    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", [judged(5, twice)])
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3, 4]
    return tmp_path / "run"


# Killed -------------------------------------------------------------------------------


def train_or_resume(directory, damage=None):
    "The same run, resumed where it has begun; `damage` is done first."
    if damage is not None:
        damage()
    resume = (directory / "config.json").exists()
    run(directory, resume=resume)


def half_a_checkpoint():
    "Dies with half of the third checkpoint's tensors on the disk."
    save = checkpoint.save_file

    def half(tensors, path):
        save(tensors, path)
        if "checkpoint-3" in str(path):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save_file = half


def no_rename():
    "Dies with all of the third checkpoint on the disk, and not its name."
    rename = checkpoint.replace_directory

    def replace(scratch, target):
        if "checkpoint-3" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(scratch, target)

    checkpoint.replace_directory = replace


def stamp(path):
    "When a file was last written; 0 if it is not there."
    return path.stat().st_mtime_ns if path.exists() else 0


def test_killed_at_random_moments_it_goes_on_bit_for_bit(tmp_path, straight):
    """Killed again and again, each time some moment after it had begun to write;
    what is left in the end is the run that nothing happened to."""
    rng, kills, runs = random.Random(int(os.environ.get("GRPO_NB_SEED", 0))), 0, 0
    while kills < KILLS and runs <= KILLS:
        directory, runs = tmp_path / f"run-{runs}", runs + 1
        while kills < KILLS and not (directory / "model").exists():
            written = stamp(directory / "metrics.jsonl")
            process = start_process(train_or_resume, directory, log=tmp_path / "log")
            deadline = time.monotonic() + 60
            while (
                process.is_alive()
                and time.monotonic() < deadline
                and stamp(directory / "metrics.jsonl") == written
            ):
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.4))
            process.kill()
            process.join()
            said = (tmp_path / "log").read_text()
            assert process.exitcode in (0, -signal.SIGKILL) and "Error" not in said, (
                said
            )
            kills += process.exitcode == -signal.SIGKILL
        run(directory, resume=True)
        same_run(directory, straight)
        assert not list(directory.glob(".*.tmp"))
    assert kills == KILLS


@pytest.mark.parametrize("damage", [half_a_checkpoint, no_rename])
def test_killed_in_the_middle_of_a_checkpoint(tmp_path, straight, damage):
    """Half of a checkpoint's tensors are on the disk, or all of it and not its name:
    the one before is used."""
    process = start_process(train_or_resume, tmp_path / "run", damage)
    process.join(timeout=120)
    assert process.exitcode == -signal.SIGKILL
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [1, 2] and list(
        (tmp_path / "run").glob(".checkpoint-3.tmp")
    )
    run(tmp_path / "run", resume=True)
    same_run(tmp_path / "run", straight)


# Damaged ------------------------------------------------------------------------------


def flip(path):
    "Another bit in the middle of a file."
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: flip(c / "state.safetensors"),
        lambda c: os.truncate(c / "state.safetensors", 1000),
        lambda c: (c / "state.safetensors").unlink(),
        lambda c: (c / "trainer.json").write_text("{"),
        lambda c: (c / "trainer.json").write_text("[]"),
    ],
    ids=["a bit", "truncated", "missing", "not JSON", "other JSON"],
)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    stopped, straight, damage
):
    damage(stopped / "checkpoint-4")
    assert not is_whole(stopped / "checkpoint-4") and is_whole(stopped / "checkpoint-3")
    with pytest.warns(
        UserWarning, match="checkpoint-4 is damaged; the run goes on from checkpoint-3"
    ):
        run(stopped, resume=True)
    same_run(stopped, straight)


def test_without_a_whole_checkpoint_the_run_starts_over(stopped, straight):
    for step in (3, 4):
        flip(stopped / f"checkpoint-{step}" / "state.safetensors")
    with pytest.warns(
        UserWarning, match="checkpoint-3 is damaged; the run goes on from the start"
    ):
        run(stopped, resume=True)
    same_run(stopped, straight)


def test_only_what_is_its_own_is_removed(tmp_path, straight):
    """What a killed process left half written goes; a file of the user's with such a
    name stays, in a fresh run and in a resumed one."""
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / ".notes.tmp").write_text("mine")

    def breaks(*_):
        raise OSError("no judge")

    with pytest.raises(RuntimeError, match="no judge"):
        run(directory, [judged(3, breaks)])
    (directory / ".config.json.tmp").write_text("half a li")
    run(directory, [judged()], resume=True)
    same_run(directory, straight)
    assert [path.name for path in directory.glob(".*.tmp")] == [".notes.tmp"] and (
        directory / ".notes.tmp"
    ).read_text() == "mine"


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, straight, monkeypatch):
    save = checkpoint.save_file

    def full(tensors, path):
        save(tensors, path)
        if "checkpoint-3" in str(path):
            os.truncate(path, 100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (
        monkeypatch.context() as patched,
        pytest.raises(
            OSError,
            match="checkpoint-3 could not be written.*No space left.*that are whole: "
            "checkpoint-1, checkpoint-2",
        ),
    ):
        patched.setattr(checkpoint, "save_file", full)
        run(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*.tmp")) and all(
        is_whole(path) for _, path in checkpoints(tmp_path / "run")
    )
    run(tmp_path / "run", resume=True)
    same_run(tmp_path / "run", straight)


# An error that comes after another ----------------------------------------------------


def breaks(*_, **__):
    raise RuntimeError("CUDA error: device-side assert triggered")


def test_random_numbers_of_another_kind_of_device_are_refused(tmp_path):
    "A GPU's generator has a state of another size than a CPU's."
    run_with(tmp_path / "run", max_steps=2, save_steps=1)
    newest = checkpoints(tmp_path / "run")[-1][1]
    tensors = load_file(newest / "state.safetensors")
    tensors["generator"] = torch.zeros(16, dtype=torch.uint8)  # a seed and an offset
    save_file(tensors, newest / "state.safetensors")
    rest = json.loads((newest / "trainer.json").read_text())
    rest.pop("sha256")
    rest["sha256"] = checkpoint._digest(newest / "state.safetensors", rest)
    (newest / "trainer.json").write_text(json.dumps(rest))
    shutil.rmtree(tmp_path / "run/model")
    with pytest.raises(ValueError, match="device = 'cpu' cannot go on with the random"):
        run_with(tmp_path / "run", max_steps=2, save_steps=1, resume=True)


@pytest.mark.parametrize("name", ["save_checkpoint", "_write_rows", "finish"])
def test_an_error_does_not_hide_the_one_before(tmp_path, monkeypatch, name):
    """A reward fails, and then the checkpoint, the completions or a tracker: the
    reward's error, with the other as its note."""

    ending = breaks if name == "finish" else lambda self: None

    class Tracker(GeneralTracker):
        name, requires_logging_directory, tracker = "mine", False, None

        def __init__(self, run_name):
            super().__init__()

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None):
            pass

        finish = ending

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", Tracker)
    if name != "finish":
        monkeypatch.setattr(
            run_directory if name == "_write_rows" else checkpoint, name, breaks
        )
    with pytest.raises(RuntimeError, match="'accuracy' raised ZeroDivision") as error:
        run(
            tmp_path / "run",
            [judged(2, lambda *_: 1 / 0)],
            save_steps=0,
            report_to="mine",
        )
    notes = "\n".join(error.value.__notes__)
    assert "RuntimeError: CUDA error: device-side assert" in notes
    assert not (tmp_path / "run/.lock").exists()


def test_the_command_line_shows_the_note(tmp_path, monkeypatch):
    def fails(*_, **__):
        error = OSError("no space")
        error.add_note("then: ValueError: no light")
        raise error

    monkeypatch.setattr(command_line, "train", fails)
    with pytest.raises(SystemExit, match="error: no space\nthen: ValueError: no light"):
        command_line.main(["train"])


def test_an_end_that_cannot_be_saved(tmp_path, monkeypatch, capsys):
    """Too many bad gradients, or a signal, and then a full disk: still the first is
    said, and that nothing was saved."""
    monkeypatch.setattr(training, "all_gather_object", lambda compute: [compute()])
    monkeypatch.setattr(training, "save", breaks)
    config = short_config(max_steps=9, max_skipped_steps=2)
    state = {"config": config, "directory": tmp_path, "step": 5}
    with pytest.raises(FloatingPointError, match="not finite in 2 steps") as error:
        training._end_if_due(SimpleNamespace(**state, skipped=2), [])
    assert "device-side assert" in error.value.__notes__[0]
    with pytest.raises(SystemExit) as stop:
        training._end_if_due(SimpleNamespace(**state, skipped=0), [signal.SIGTERM])
    said = capsys.readouterr().err
    assert stop.value.code == 143 and "stopped after step 5; then: RuntimeError" in said
    assert "can be resumed" not in said


def test_a_tracker_that_cannot_finish_loses_no_model(tmp_path, monkeypatch):
    "The run is done: a warning, and the model is saved."

    class Tracker:
        def finish(self):
            raise ConnectionError("no network")

    monkeypatch.setattr(trackers, "_tracker", lambda *_: Tracker())
    config = short_config(report_to=["tensorboard"])
    with pytest.warns(UserWarning, match="tracker tensorboard could not finish"):
        with trackers.open_trackers(config, tmp_path, 0):
            pass


# Rewards ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault, says",
    [
        (lambda *_: 1 / 0, "'accuracy' raised ZeroDivisionError"),
        (lambda prompts, _: [math.nan] * len(prompts), "'accuracy' returned nan"),
    ],
    ids=["raises", "NaN"],
)
def test_a_failing_reward_stops_with_a_checkpoint(tmp_path, straight, fault, says):
    """The default: stopped in step 4 with the state of step 3, although no
    checkpoint was due."""
    with pytest.raises((RuntimeError, ValueError), match=says):
        run(tmp_path / "run", [judged(4, fault)], save_steps=0)
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3] and len(
        read_metrics(tmp_path / "run")
    ) == 3
    run(tmp_path / "run", [judged()], resume=True)
    same_run(tmp_path / "run", straight)


def test_a_failing_reward_may_drop_its_group(tmp_path):
    """One group of the second step: not scored, without an advantage, counted; the
    other groups are those of a run without the fault."""

    def nan(prompts, _):
        return [math.nan] * len(prompts)

    dropped = run(
        tmp_path / "dropped", [judged(6, nan)], max_steps=2, on_reward_error="drop"
    )  # four groups a step: the sixth call is the second group of step 2
    whole = run(tmp_path / "whole", [judged()], max_steps=2)
    assert dropped.metrics["unscored_groups"].tolist()[1] == 1 and math.isnan(
        dropped.metrics["unscored_groups"].tolist()[0]
    )
    a, b = (r.completions.query("step == 2").reset_index() for r in (dropped, whole))
    assert (
        a.loc[4:7, "reward"].isna().all()
        and (a.loc[4:7, "advantage"] == 0).all()
        and b["reward"].notna().all()
    )
    others = [0, 1, 2, 3, *range(8, 16)]
    assert a.loc[others, ["completion", "reward", "advantage"]].equals(
        b.loc[others, ["completion", "reward", "advantage"]]
    )


def test_dropping_is_by_group_and_for_every_function(tmp_path):
    "A second function that judges everything does not bring a dropped group back."

    def always(prompts, completions, **columns):
        return [0.5] * len(completions)

    def raises(*_):
        raise TimeoutError("the sandbox does not answer")

    found = run(
        tmp_path / "run",
        [judged(1, raises), always],
        max_steps=1,
        on_reward_error="drop",
    )
    rewards = found.completions["reward"]
    assert rewards[:4].isna().all() and rewards[4:].notna().all()
    assert found.metrics["rewards/always/mean"].iloc[0] == 0.5


# Numbers ------------------------------------------------------------------------------


def broken(monkeypatch, calls):
    "The loss of these calls is multiplied with infinity: its gradient is no number."
    batch_loss, count = update.batch_loss, []

    def inner(*arguments):
        loss, sums = batch_loss(*arguments)
        count.append(1)
        return loss * (math.inf if len(count) in calls else 1.0), sums

    monkeypatch.setattr(update, "batch_loss", inner)


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path, monkeypatch):
    """The first of the two updates of step 2 is skipped and counted, and the run
    goes on with finite weights."""
    broken(monkeypatch, {3})
    found = run(tmp_path / "run", max_steps=3)
    assert found.metrics["skipped_updates"].tolist() == [0, 1, 0]
    assert all(p.isfinite().all() for p in found.policy.parameters())
    moments = torch.cat(
        [
            x.flatten()
            for x in checkpoint.load_file(
                found.directory / "checkpoint-3/state.safetensors"
            ).values()
            if x.is_floating_point()
        ]
    )
    assert moments.isfinite().all()


def test_one_bad_gradient_after_the_other_stops_with_a_checkpoint(
    tmp_path, monkeypatch
):
    broken(monkeypatch, set(range(5, 100)))  # two updates a step: from step 3 on
    with pytest.raises(
        FloatingPointError,
        match="not finite in 2 steps in a row.*max_skipped_steps.*up to step 4",
    ):
        run(tmp_path / "run", save_steps=0, max_skipped_steps=2)
    assert [line["skipped_updates"] for line in read_metrics(tmp_path / "run")] == [
        0,
        0,
        2,
        2,
    ]
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [4]


# Signals and memory -------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_run_after_the_step(
    tmp_path, straight, capsys, number, raised
):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised) as error:
        run(
            tmp_path / "run",
            [judged(3, lambda *_: os.kill(os.getpid(), number))],
            save_steps=0,
        )
    if raised is SystemExit:
        assert error.value.code == 143
    assert (
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
    ) == handlers
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [3] and len(
        read_metrics(tmp_path / "run")
    ) == 3
    assert (
        f"{number.name}: stopping after this step" in (said := capsys.readouterr().err)
        and "stopped after step 3" in said
        and "can be resumed" in said
    )
    run(tmp_path / "run", [judged()], resume=True)
    same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate "
            "memory"
        ),
    ],
    ids=["GPU", "CPU"],
)
def test_a_lack_of_memory_says_what_to_change(tmp_path, straight, monkeypatch, error):
    step, calls = STEPS["grpo"], []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return step(*arguments)

    with (
        monkeypatch.context() as patched,
        pytest.raises(
            MemoryError,
            match=r"out of memory in step 3 with max_tokens_per_micro_batch = 8192: "
            r"try 4096.*, or gradient_checkpointing=True; .*can be resumed",
        ),
    ):
        patched.setattr(training, "step_of", lambda config: full)
        run(tmp_path / "run", save_steps=0)
    run(tmp_path / "run", resume=True)
    same_run(tmp_path / "run", straight)


def test_a_lack_of_memory_does_not_advise_what_is_set(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(training, "step_of", lambda config: full)
    with pytest.raises(MemoryError, match="try 4096") as caught:
        run(tmp_path / "run", gradient_checkpointing=True)
    assert "gradient_checkpointing" not in str(caught.value)
