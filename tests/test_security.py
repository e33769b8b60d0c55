"Nothing that comes from a model or a file is executed, and nothing is written outside of the run's directory."
import ast
import json
import shutil

import pytest
import torch

from grpo_nb.policy import TINY, load_policy
from grpo_nb.reward import RewardModel
from grpo_nb.task import evaluate_expression
from grpo_nb.training import train
from helpers import ROOT, short_config

SOURCES = sorted((ROOT / "grpo_nb").glob("*.py")) + sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "benchmarks").glob("*.py"))
FORBIDDEN = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}


def calls(tree): return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def found_in(source):
    "What of the forbidden a source does, as text."
    tree = ast.parse(source)
    found = [f"{node.func.id}()" for node in calls(tree) if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN]
    found += [f"import {name.name}" for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names if name.name.split(".")[0] in MODULES]
    found += [f"from {node.module}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES]
    for node in calls(tree):
        given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
        name = ast.unparse(node.func)
        if name == "torch.load" and given.get("weights_only") is not True: found.append("torch.load without weights_only=True")
        if given.get("shell") is True or name in ("os.system", "os.popen"): found.append("a shell")
        if given.get("trust_remote_code") not in (None, False): found.append("trust_remote_code")
        if name.endswith((".read_pickle", ".to_pickle")) or given.get("allow_pickle"): found.append("pickle")
        if name.endswith(".from_pretrained") and name.startswith("Auto") and given.get("trust_remote_code", "missing") is not False: found.append(f"{name} without trust_remote_code=False")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_executed(path):
    assert [x for x in found_in(path.read_text()) if not (path.parent.name != "grpo_nb" and x.startswith("Auto"))] == []


@pytest.mark.parametrize("source", ["eval(text)", "exec(text)", "import pickle", "from pickle import loads", "torch.load(path)", "torch.load(path, weights_only=False)",
                                    "subprocess.run(text, shell=True)", "os.system(text)", "AutoModel.from_pretrained(path)", "AutoModel.from_pretrained(path, trust_remote_code=True)",
                                    "np.load(path, allow_pickle=True)", "pd.read_pickle(path)"])
def test_the_search_finds(source):
    "The test above would see it."
    assert found_in(source)


@pytest.fixture
def trap(tmp_path):
    "A model that brings code along; the code leaves a file behind when it runs."
    path, mark = tmp_path / "trap", tmp_path / "was_here"
    shutil.copytree(TINY, path)
    config = json.loads((path / "config.json").read_text()) | {"model_type": "trap", "architectures": ["Trap"], "auto_map": {
        "AutoConfig": "trap.TrapConfig", "AutoModelForCausalLM": "trap.Trap", "AutoModelForSequenceClassification": "trap.Trap"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "trap.py").write_text(f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig as TrapConfig, LlamaForCausalLM as Trap\n")
    return path, mark


@pytest.mark.parametrize("load", [load_policy, RewardModel.from_pretrained], ids=["policy", "reward model"])
def test_code_that_comes_with_a_model_is_not_run(trap, load):
    path, mark = trap
    with pytest.raises(ValueError, match="trap"): load(str(path), "cpu")
    assert not mark.exists()


def test_a_pickle_that_comes_with_a_model_is_not_unpickled(tmp_path):
    "Weights in the old format that would run code: refused, and the code is not run."
    path, mark = tmp_path / "old", tmp_path / "was_here"
    class Trap:
        def __reduce__(self): return open, (str(mark), "w")
    shutil.copytree(TINY, path)
    (path / "model.safetensors").unlink()
    torch.save({"x": Trap()}, path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="old"): load_policy(str(path), "cpu")
    assert not mark.exists()


@pytest.mark.parametrize("text", ["__import__('os')", "1+1;2", "9**9**9**9", "(" * 100, "1e999", "0x10", "１+１", "1 +1", "lambda:0", "1+\n1", "9" * 65])
def test_an_expression_is_arithmetic_or_nothing(text):
    assert evaluate_expression(text) is None


def test_a_run_writes_into_its_directory_only(tmp_path, monkeypatch):
    "Everything that a run leaves is below output_dir, also where the working directory is another."
    monkeypatch.chdir(tmp_path)
    train(short_config(output_dir="a/b/run", save_steps=1), progress=False)
    assert {path.parts[:3] for path in (p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())} == {("a", "b", "run")}
