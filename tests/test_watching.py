"Watching a run: trackers, the function that gets every line, and the live plot."

import os
import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Literal

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, on_main_process
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as validated_dataclass
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import grpo_nb.evidence.plots
from grpo_nb.run import trackers, training
from grpo_nb.algorithm import STEPS, ppo_step
from grpo_nb.run.options import CONFIGS, Config, PPOConfig, make_config
from grpo_nb.evidence.plots import LivePlot, comparison_table, plot_comparison, plot_run
from grpo_nb.evidence.plots import GroupView, trained_parameters
from grpo_nb.policy import load_policy
from grpo_nb.engine.data import load_task
from grpo_nb.run.command_line import parse_arguments
from grpo_nb.run.training import Run, train
from grpo_nb.task import Query
from grpo_nb.value import ValueModel
from helpers import ROOT, python, read_metrics, short_config


def events(directory):
    """What TensorBoard shows of a run: {(step, name): value}; nothing may be there
    twice."""
    reader = EventAccumulator(
        str(directory / "tensorboard/grpo_nb"), size_guidance={"scalars": 0}
    )
    reader.Reload()
    shown = [
        ((event.step, name), event.value)
        for name in reader.Tags()["scalars"]
        for event in reader.Scalars(name)
    ]
    assert len(shown) == len(dict(shown))
    return dict(shown)


def written(directory):
    "The same of metrics.jsonl, rounded as TensorBoard keeps it."
    return {
        (line["step"], name): float(np.float32(x))
        for line in read_metrics(directory)
        for name, x in line.items()
        if x is not None and name != "step"
    }


def half(completions, **kwargs):
    "Judges nothing in the first step, so that there are metrics without a value."
    half.calls += 1
    return [None if half.calls == 1 else float(len(c)) for c in completions]


@pytest.mark.filterwarnings(
    "ignore:Detected call of"
)  # a step without a score moves nothing
def test_tensorboard_shows_what_is_written(tmp_path):
    half.calls = 0
    run = train(
        short_config(
            output_dir=str(tmp_path / "run"),
            max_steps=3,
            eval_steps=2,
            report_to=["tensorboard"],
        ),
        reward_funcs=[half],
        progress=False,
    )
    assert events(run.directory) == written(run.directory)
    assert read_metrics(run.directory)[0]["reward"] is None and (
        1,
        "reward",
    ) not in events(run.directory)
    assert {path.name for path in tmp_path.rglob("*") if "tfevents" in path.name} and {
        path.name for path in tmp_path.iterdir()
    } == {"run"}


@pytest.mark.parametrize("save_steps", [2, 0])
def test_a_resumed_run_shows_no_step_twice(tmp_path, save_steps):
    """Stopped after the third step was shown: from the checkpoint of the second, or
    from the start, it is done again, and shown once."""

    def stop(line):
        if line["step"] == 3:
            raise ConnectionError("the power is gone")

    options = dict(
        output_dir=str(tmp_path / "run"),
        max_steps=4,
        save_steps=save_steps,
        report_to="tensorboard",
    )
    with pytest.raises(ConnectionError):
        train(short_config(**options), progress=False, on_step=stop)
    before = events(tmp_path / "run")
    assert {step for step, _ in before} == {1, 2, 3}
    time.sleep(
        1.1
        # TensorBoard reads files in the order of their names, and those begin with the
        # second
    )
    heard = []
    train(short_config(**options, resume=True), progress=False, on_step=heard.append)
    after = events(tmp_path / "run")
    assert after == written(tmp_path / "run") and [
        line["step"] for line in heard
    ] == list(range(save_steps + 1, 5))
    assert after[3, "step_time"] != before[3, "step_time"] and (
        after[1, "step_time"] == before[1, "step_time"]
    ) == bool(save_steps)


@pytest.mark.parametrize("name", ["tensorbored", "wandb", "none"])
def test_a_tracker_that_is_not_there(tmp_path, name, monkeypatch):
    "Refused, with what there is, before anything is loaded or written."
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.setattr(training, "build_models", None)
    with pytest.raises(
        ValueError, match=rf"report_to = \['{name}'\] cannot be used; .*: tensorboard$"
    ):
        train(
            short_config(
                output_dir=str(tmp_path / "run"), report_to=["tensorboard", name]
            )
        )
    assert not any(tmp_path.iterdir())


def test_report_to_is_a_name_or_several():
    "As TRL has it; on the command line, by papermill, and in code."
    for given in (
        ["--report_to", "tensorboard"],
        ["--report_to", "tensorboard", "wandb"],
        [],
    ):
        assert parse_arguments(given).report_to == given[1:]
    assert (
        make_config(report_to="tensorboard").report_to == ["tensorboard"]
        and make_config().report_to == []
    )
    with pytest.raises(ValueError, match="report_to"):
        make_config(report_to=[3])


@pytest.fixture
def memory(monkeypatch):
    "A tracker of one's own, registered as Accelerate has it."

    class Memory(GeneralTracker):
        name, requires_logging_directory, told = "memory", False, []

        def __init__(self, run_name):
            self.told.append(("begin", run_name))

        tracker = None

        @on_main_process
        def store_init_configuration(self, values):
            self.told.append(("config", values))

        @on_main_process
        def log(self, values, step=None):
            self.told.append((step, values))

        @on_main_process
        def finish(self):
            self.told.append(("end",))

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "memory", Memory)
    return Memory


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_a_tracker_of_ones_own(tmp_path, memory):
    """The config first, then every line without its None, and an end, also where the
    run breaks."""

    def stop(line):
        if line["step"] == 2:
            raise KeyError("enough")

    half.calls = 0
    config = short_config(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        report_to=["memory", "tensorboard"],
    )
    with pytest.raises(KeyError):
        train(config, reward_funcs=[half], progress=False, on_step=stop)
    begin, (_, config), *lines, end = memory.told
    assert (
        begin == ("begin", "grpo_nb")
        and end == ("end",)
        and config["max_steps"] == 3
        and config["reward_funcs"] == "['accuracy']"
    )
    assert lines == [
        (line.pop("step"), {name: x for name, x in line.items() if x is not None})
        for line in read_metrics(tmp_path / "run")
    ]
    assert {step for step, _ in events(tmp_path / "run")} == {1, 2}


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_main_process_has_trackers(tmp_path, memory, monkeypatch, rank):
    monkeypatch.setattr(trackers, "get_rank", lambda: rank)
    with trackers.open_trackers(
        short_config(report_to=["memory"]), tmp_path, 0
    ) as track:
        track({"step": 1, "reward": 1.0})
    assert (
        bool(memory.told) == (rank == 0) and len(list(tmp_path.iterdir())) <= 1 - rank
    )


def test_on_step_gets_each_line_after_it_is_written(tmp_path):
    heard = []

    def hear(line):
        assert read_metrics(tmp_path / "run")[-1] == line
        heard.append(dict(line))
        line.clear()  # it is the listener's own

    run = train(
        short_config(output_dir=str(tmp_path / "run"), max_steps=3),
        progress=False,
        on_step=hear,
    )
    assert heard == read_metrics(run.directory) and len(heard) == 3


LINES = [
    {"step": step, "reward": step / 100, "kl": None if step == 1 else 0.1}
    | ({"eval/initial_accuracy": 0.5} if step == 1 else {})
    | ({"eval/accuracy": 0.75} if step % 25 == 0 else {})
    for step in range(1, 51)
]


@pytest.fixture
def notebook(monkeypatch):
    "As if in a notebook, with a clock that is set by hand: what is shown, each time."
    import IPython.display

    shown, clock = [], SimpleNamespace(now=100.0)

    def display(picture, display_id):
        shown.append(("new", picture))
        return SimpleNamespace(update=lambda picture: shown.append(("same", picture)))

    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(grpo_nb.evidence.plots, "_in_a_notebook", lambda: True)
    monkeypatch.setattr(grpo_nb.evidence.plots, "_is_watched", lambda: True)
    monkeypatch.setattr(
        grpo_nb.evidence.plots, "time", SimpleNamespace(monotonic=lambda: clock.now)
    )
    return shown, clock


def test_the_live_plot_is_one_picture_drawn_now_and_then(notebook):
    "50 steps of 0.3 s are four pictures in place of one, and one at the end."
    shown, clock = notebook
    with LivePlot(seconds=4.0) as plot:
        for line in LINES:
            plot(line)
            clock.now += 0.3
    assert [how for how, _ in shown] == ["new"] + ["same"] * 4
    assert (
        all(picture.data.startswith(b"\x89PNG") for _, picture in shown)
        and shown[-1][1].data != shown[-2][1].data
    )


def test_the_live_plot_draws_what_it_was_told(notebook):
    """Curves of the lines so far; accuracy begins before training; a metric that
    nobody measured has no panel; a broken run is drawn to its end."""
    shown, _ = notebook
    with (
        pytest.raises(KeyboardInterrupt),
        LivePlot(("eval/accuracy", "kl", "beta", "reward"), seconds=1e9) as plot,
    ):
        for line in LINES:
            plot(line)
        raise KeyboardInterrupt
    accuracy, kl, reward = plot.figure().axes
    assert accuracy.lines[0].get_xydata().tolist() == [[0, 0.5], [25, 0.75], [50, 0.75]]
    assert kl.lines[0].get_xdata()[0] == 2 and reward.lines[0].get_ydata().tolist() == [
        step / 100 for step in range(1, 51)
    ]
    assert (
        abs(reward.lines[1].get_ydata()[-1] - np.mean([0.46, 0.47, 0.48, 0.49, 0.5]))
        < 1e-9
    )
    assert len(shown) == 2
    for seconds in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="seconds must be positive"):
            LivePlot(seconds=seconds)


def test_the_live_plot_of_what_is_not_measured_yet(notebook):
    "Nothing to draw is no reason to stop a run."
    with LivePlot(("eval/accuracy", "nothing")) as plot:
        plot({"step": 51, "reward": 1.0})
    assert plot.figure().axes == [] and notebook[0]
    for metrics in ((), "reward"):
        with pytest.raises(ValueError, match="metrics must hold names"):
            LivePlot(metrics)


def test_the_live_plot_of_a_run_without_a_step(notebook):
    with LivePlot():
        pass
    assert not notebook[0]


class Kernel(SimpleNamespace):
    "A notebook's kernel, as IPython has one."


@pytest.mark.parametrize("takes_input", [True, False])
def test_who_looks_on(monkeypatch, takes_input):
    "JupyterLab can answer the kernel; papermill and nbconvert say that they cannot."
    import IPython

    kernel = Kernel(kernel=SimpleNamespace(_allow_stdin=takes_input))
    monkeypatch.setattr(IPython, "get_ipython", lambda: kernel)
    assert grpo_nb.evidence.plots._is_watched() is takes_input
    monkeypatch.setattr(IPython, "get_ipython", lambda: None)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: takes_input))
    assert grpo_nb.evidence.plots._is_watched() is takes_input


def test_where_nobody_looks_on_the_end_is_shown(notebook, monkeypatch):
    "One picture and one group, however long the run."
    shown, clock = notebook
    monkeypatch.setattr(grpo_nb.evidence.plots, "_is_watched", lambda: False)
    with LivePlot(seconds=0.1) as plot:
        for line in LINES:
            plot(line)
            clock.now += 1
    assert [how for how, _ in shown] == ["new"]


def test_the_live_plot_has_the_latest_group(tmp_path, notebook):
    "Beside the curves, in its place; of a large one only the beginning."
    shown, _ = notebook
    told = []

    class Listener(LivePlot):
        def on_groups(self, groups):
            told.append(groups.step)
            super().on_groups(groups)

    with Listener(seconds=1e-9) as plot:
        options = {"max_steps": 2, "num_generations": 12, "num_prompts": 2}
        config = short_config(output_dir=str(tmp_path / "run"), **options)
        run = train(config, progress=False, on_step=plot)
    assert told == [1, 2] and len(shown) % 2 == 0
    views = [content for _, content in shown if isinstance(content, GroupView)]
    assert [how for how, _ in shown].count("new") == 2 and len(views) == len(shown) / 2
    first = run.groups(2).select(0).rollout
    assert views[-1].text.splitlines()[0] == first.queries[0].text
    assert "and 4 more" in views[-1].html and len(views[-1].text.splitlines()) == 2 + 8
    assert views[-1].html.count("<span") == first.completion_mask[:8].sum()


def test_the_live_plot_in_a_terminal(tmp_path, monkeypatch, capsys):
    "Text, now and then; nothing where it goes into a file, or moves the cursor."
    monkeypatch.setattr(grpo_nb.evidence.plots, "_in_a_notebook", lambda: False)
    for name, watched in (("terminal", True), ("file", False)):
        monkeypatch.setattr(grpo_nb.evidence.plots, "_is_watched", lambda: watched)
        with LivePlot(seconds=1e-9) as plot:
            config = short_config(output_dir=str(tmp_path / name), max_steps=2)
            train(config, progress=False, on_step=plot)
        lines = capsys.readouterr().out.splitlines()
        steps = [line.split(",")[0] for line in lines if line.startswith("step ")]
        assert steps == (["step 1", "step 2", "step 2"] if watched else [])
    escapes = SimpleNamespace(decode=lambda ids, **_: "\x1b[2J" * len(ids))
    plot.groups.tokenizer = escapes
    plot.groups.rollout.queries[0] = Query("1+1=\x1b[31m")
    assert "\x1b" not in plot.text() and "reward" in plot.text()


def synthetic(config, metrics, name="mine"):
    "A run that was never trained: what the plots read of one."
    table = pd.DataFrame(metrics).set_index("step")
    policy, task = torch.nn.Linear(2, 3), replace(load_task("add"), name=name)
    return Run(None, config, table, policy, None, task, [])


REWARDED = [
    {"step": step, "reward": step / 10, "kl": 0.1, "step_time": 1.0}
    | {"num_completions": 16 * step, "peak_memory": 100.0}
    | ({"eval/initial_reward": 0.25} if step == 1 else {})
    | ({"eval/reward": 0.75} if step == 4 else {})
    for step in range(1, 5)
]


def test_curves_of_a_task_without_a_rule():
    """Held-out reward in the place of the accuracy, from before training on; the
    figure is closed, so that a notebook shows it once."""
    run = synthetic(short_config(), REWARDED)
    fig = plot_run(run)
    panels = {ax.get_title(loc="left"): ax for ax in fig.axes}
    held_out = panels["held-out reward"].lines[0].get_xydata().tolist()
    assert held_out == [[0, 0.25], [4, 0.75]] and "held-out accuracy" not in panels
    compared = plot_comparison({"a": [run]})
    assert "held-out reward" in {ax.get_title(loc="left") for ax in compared.axes}
    assert plt.get_fignums() == []
    live = LivePlot()
    live.lines = REWARDED
    titles = [ax.get_title(loc="left") for ax in live.figure().axes]
    assert titles == ["reward", "held-out reward", "KL (nats a token)"]
    row = comparison_table({"a": [run]}).loc["a"]
    assert (row["held-out reward before"], row["held-out reward after"]) == (0.25, 0.75)


def test_a_table_of_an_algorithm_of_ones_own():
    "With a config that has no value model, with one that has, and beside GRPO."

    @validated_dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
    class Plain(Config):
        algorithm: Literal["plain"] = "plain"

    @validated_dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
    class Critic(PPOConfig):
        algorithm: Literal["critic"] = "critic"

    runs = {
        name: [synthetic(config, REWARDED)]
        for name, config in {"plain": Plain(), "grpo": short_config()}.items()
    }
    table = comparison_table(runs)
    assert table["trained parameters"].tolist() == [9, 9]
    assert table.loc["plain", "completions sampled"] == 64
    policy = load_policy("tiny", "cpu")[0]
    count = sum(p.numel() for p in policy.parameters())
    run = replace(synthetic(Critic(), REWARDED), policy=policy)
    assert trained_parameters(run) == count + sum(
        p.numel() for p in ValueModel(policy).parameters()
    )


def test_an_algorithm_of_ones_own_runs(tmp_path, monkeypatch):
    """Registered in CONFIGS and STEPS: trained, compared, and with the value model
    that its config has."""

    @validated_dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
    class Critic(PPOConfig):
        algorithm: Literal["critic"] = "critic"

    monkeypatch.setitem(CONFIGS, "critic", Critic)
    monkeypatch.setitem(STEPS, "critic", ppo_step)
    config = short_config(algorithm="critic", output_dir=str(tmp_path / "run"))
    found = train(config, progress=False)
    table = comparison_table({"mine": [found]})
    own = sum(p.numel() for p in ValueModel(found.policy).parameters())
    policy = sum(p.numel() for p in found.policy.parameters())
    assert table.loc["mine", "trained parameters"] == policy + own > policy
    assert "value_loss" in found.metrics


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The cells of a notebook that papermill has run: plots, the live plot, and its
    figure drawn again."""
    folder = tmp_path_factory.mktemp("executed")
    setup = """
from grpo_nb.evidence.plots import LivePlot, plot_comparison, plot_run
from IPython.display import Image
from helpers import short_config
from test_watching import LINES, REWARDED, synthetic
import io
run = synthetic(short_config(), REWARDED)"""
    sources = [setup, "plot_run(run)", "plot_comparison({'a': [run]})"]
    sources.append("fig = plot_run(run)\nfig")
    sources.append("""
with LivePlot(seconds=1e-9) as plot:
    for line in LINES[:8]: plot(line)
png = io.BytesIO(); plot.figure().savefig(png)
Image(png.getvalue())""")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "in.ipynb")
    with pytest.MonkeyPatch.context() as patched:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        patched.setenv("PYTHONPATH", paths)
        patched.delenv("MPLBACKEND", raising=False)
        done = papermill.execute_notebook(
            folder / "in.ipynb",
            folder / "out.ipynb",
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
        )
    return [
        [
            output["data"]["image/png"]
            for output in cell.outputs
            if "image/png" in output.get("data", {})
        ]
        for cell in done.cells
    ]


def test_a_cell_that_ends_in_a_plot_shows_one_picture(executed):
    assert [len(pictures) for pictures in executed[:4]] == [0, 1, 1, 1]


def test_the_live_plot_under_papermill(executed):
    "The executed notebook holds one picture, the last."
    pictures = executed[4]
    assert len(pictures) == 2 and pictures[0] == pictures[1]


def test_the_live_plot_elsewhere(tmp_path):
    "In a script nothing is drawn, printed or imported."
    script = (
        "import sys; from grpo_nb.evidence.plots import LivePlot\nwith "
        f"LivePlot(seconds=1e-9) as plot:\n    for line in {LINES}: "
        "plot(line)\nprint(plot._handles, 'IPython' in sys.modules, len(plot.lines))"
    )
    done = python("-c", script, cwd=tmp_path, path=ROOT)
    assert done.returncode == 0 and done.stdout.split() == ["{}", "False", "50"], (
        done.stderr
    )
