"""Nothing that comes from a model or a file is executed, and nothing is written
outside of the run's directory."""

import re
import ast
import json
import shutil
import warnings
from dataclasses import replace

import nbformat
import pytest
import torch

from grpo_nb.engine.judging import RewardModel
from grpo_nb.loading import TINY
from grpo_nb.policy import load_policy
from grpo_nb.engine.data import load_task
from grpo_nb.task import Query, evaluate_expression
from grpo_nb.run.run_directory import write_atomically
from grpo_nb.run.training import open_run, train
from helpers import ROOT, short_config

SOURCES = [
    path
    for folder in ("grpo_nb", "tools", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
NOTEBOOKS = sorted((ROOT / "nbs").rglob("*.ipynb"))
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
MODULES = {
    "pickle",
    "cloudpickle",
    "dill",
    "marshal",
    "shelve",
    "joblib",
    "runpy",
    "code",
}
HIDDEN = {
    ("torch", "load"),
    ("os", "system"),
    ("os", "popen"),
    ("yaml", "load"),
    ("pandas", "read_pickle"),
    ("subprocess", "getoutput"),
}  # imported by name they would not be seen below


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def found_in(source):
    "What of the forbidden a source does, as text."
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a stray backslash is the matter of another test
        tree = ast.parse(source)
    found = [
        f"{node.func.id}()"
        for node in calls(tree)
        if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN
    ]
    found += [
        f"import {name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for name in node.names
        if name.name.split(".")[0] in MODULES
    ]
    found += [
        f"from {node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").split(".")[0] in MODULES
    ]
    found += [
        f"from {node.module} import {name.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if (node.module, name.name) in HIDDEN
    ]
    for node in calls(tree):
        given = {
            keyword.arg: getattr(keyword.value, "value", None)
            for keyword in node.keywords
        }
        name = ast.unparse(node.func)
        if name == "torch.load" and given.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if given.get("shell", False) is not False or name in (
            "os.system",
            "os.popen",
            "subprocess.getoutput",
            "subprocess.getstatusoutput",
        ):
            found.append("a shell")
        if name in (
            "yaml.load",
            "yaml.load_all",
            "yaml.unsafe_load",
            "yaml.full_load",
        ) and "Safe" not in ast.unparse(node):
            found.append("yaml that makes objects")
        if given.get("trust_remote_code") not in (None, False):
            found.append("trust_remote_code")
        if (
            name.endswith((".read_pickle", ".to_pickle"))
            or given.get("allow_pickle", False) is not False
        ):
            found.append("pickle")
        if (
            name.endswith(".from_pretrained")
            and name.startswith("Auto")
            and given.get("trust_remote_code", "missing") is not False
        ):
            found.append(f"{name} without trust_remote_code=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_executed(path):
    assert [
        x
        for x in found_in(path.read_text())
        if not (path.parent.name != "grpo_nb" and x.startswith("Auto"))
    ] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nothing_that_a_notebook_reads_is_executed(path):
    "Cell by cell; lines for IPython (%, !) are left out, and `!` is not used at all."
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "code" or "text that we wrote ourselves" in cell.source:
            continue  # chapter 1 compares its parser with eval
        lines = cell.source.splitlines()
        shell = [
            line for line in lines if re.match(r"\s*!(?!=)", line)
        ]  # `!=` may begin a line
        assert not shell, cell.source
        assert [
            x
            for x in found_in(
                "\n".join(line for line in lines if not line.startswith("%"))
            )
            if not x.startswith("Auto")
        ] == [], cell.source


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(text)",
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=yes)",
        "pd.read_pickle(path)",
        "import joblib",
        "from joblib import load",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "from torch import load",
        "from os import system as s",
        "subprocess.run(text, shell=yes)",
        "subprocess.getoutput(text)",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=yes)",
    ],
)
def test_the_search_finds(source):
    "The test above would see it."
    assert found_in(source)


@pytest.fixture
def trap(tmp_path):
    "A model that brings code along; the code leaves a file behind when it runs."
    path, mark = tmp_path / "trap", tmp_path / "was_here"
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text()) | {
        "model_type": "trap",
        "architectures": ["Trap"],
        "auto_map": {
            "AutoConfig": "trap.TrapConfig",
            "AutoModelForCausalLM": "trap.Trap",
            "AutoModelForSequenceClassification": "trap.Trap",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "trap.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as "
        "TrapConfig, LlamaForCausalLM as Trap\n"
    )
    return path, mark


@pytest.mark.parametrize(
    "load", [load_policy, RewardModel.from_pretrained], ids=["policy", "reward model"]
)
def test_code_that_comes_with_a_model_is_not_run(trap, load):
    path, mark = trap
    with pytest.raises(ValueError, match="trap"):
        load(str(path), "cpu")
    assert not mark.exists()


def test_a_pickle_that_comes_with_a_model_is_not_unpickled(tmp_path):
    "Weights in the old format that would run code: refused, and the code is not run."
    path, mark = tmp_path / "old", tmp_path / "was_here"

    class Trap:
        def __reduce__(self):
            return open, (str(mark), "w")

    shutil.copytree(TINY, path)
    (path / "model.safetensors").unlink()
    torch.save({"x": Trap()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="old"):
        load_policy(str(path), "cpu")
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "1+1;2",
        "9**9**9**9",
        "(" * 100,
        "1e999",
        "0x10",
        "１+１",
        "1 +1",
        "lambda:0",
        "1+\n1",
        "9" * 65,
    ],
)
def test_an_expression_is_arithmetic_or_nothing(text):
    assert evaluate_expression(text) is None


def test_a_run_writes_into_its_directory_only(tmp_path, monkeypatch):
    """Everything that a run leaves is below output_dir, also where the working
    directory is another."""
    monkeypatch.chdir(tmp_path)
    train(short_config(output_dir="a/b/run", save_steps=1), progress=False)
    assert {
        path.parts[:3]
        for path in (
            p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()
        )
    } == {("a", "b", "run")}


# Links: what they point to is neither written nor removed -----------------------------


@pytest.fixture
def treasure(tmp_path):
    "A directory and a file that belong to somebody else."
    (tmp_path / "treasure").mkdir()
    (tmp_path / "treasure/gold").write_text("ours")
    yield tmp_path / "treasure"
    assert [path.name for path in (tmp_path / "treasure").iterdir()] == ["gold"] and (
        tmp_path / "treasure/gold"
    ).read_text() == "ours"


def linked(link, to):
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(to)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".metrics.jsonl.tmp"])
def test_a_file_is_not_written_through_a_link(tmp_path, treasure, name):
    linked(tmp_path / "run" / name, treasure / "gold")
    write_atomically(tmp_path / "run/metrics.jsonl", "theirs")
    assert (tmp_path / "run/metrics.jsonl").read_text() == "theirs" and not (
        tmp_path / "run/metrics.jsonl"
    ).is_symlink()


@pytest.mark.parametrize(
    "name",
    [
        ".model.tmp",
        ".config.json.tmp",
        ".completions.parquet.tmp",
        ".checkpoint-1.tmp",
        "checkpoint-1",
        "model",
        "metrics.jsonl",
    ],
)
def test_a_run_does_not_follow_links(tmp_path, treasure, name):
    "Planted where a run will write or tidy up: it takes the link away, or refuses."
    linked(
        tmp_path / "run" / name,
        treasure / "gold"
        if name.endswith((".json", ".jsonl", ".json.tmp", ".parquet.tmp"))
        else treasure,
    )
    try:
        train(
            short_config(output_dir=str(tmp_path / "run"), save_steps=1), progress=False
        )
    except (OSError, ValueError) as error:
        assert str(tmp_path / "run") in str(error)


def test_resuming_does_not_follow_links(tmp_path, treasure):
    """The leavings of a killed run, an old checkpoint and a damaged one are links:
    the links go, the run goes on."""
    options = {"output_dir": str(tmp_path / "run"), "save_steps": 1, "num_prompts": 2}
    train(short_config(max_steps=2, **options), progress=False)
    shutil.rmtree(tmp_path / "run/model")
    for step in (1, 7):
        shutil.rmtree(tmp_path / f"run/checkpoint-{step}", ignore_errors=True)
        shutil.copytree(tmp_path / "run/checkpoint-2", tmp_path / f"copy-{step}")
        (tmp_path / f"copy-{step}/trainer.json").write_text("{}")
        linked(tmp_path / f"run/checkpoint-{step}", tmp_path / f"copy-{step}")
    linked(tmp_path / "run/.model.tmp", treasure)
    with pytest.warns(UserWarning, match="checkpoint-7 is damaged"):
        train(short_config(max_steps=3, resume=True, **options), progress=False)
    for step in (1, 7):
        assert (
            len(list((tmp_path / f"copy-{step}").iterdir())) == 2
            and not (tmp_path / f"run/checkpoint-{step}").is_symlink()
        )


def test_names_from_data_and_models_are_no_paths(tmp_path, monkeypatch):
    """A task, a reward function, a prompt and a completion that are called like
    paths: everything is still below output_dir."""
    monkeypatch.chdir(tmp_path)
    name = "../../escaped"

    def judge(prompts, completions, **_):
        return [float(len(text)) for text in completions]

    judge.__name__ = name
    task = replace(
        load_task("add"),
        name=name,
        query=lambda i: Query(f"{i}+1=", {"answer": name}, key=name * (i % 2) + str(i)),
    )
    train(short_config(output_dir="a/run", save_steps=1), task, [judge], progress=False)
    assert {
        path.parts[:2]
        for path in (
            p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()
        )
    } == {("a", "run")} and not (tmp_path.parent / "escaped").exists()
    assert open_run("a/run", task=task, reward_funcs=[judge]).task is task
