"""benchmarks/vs_trl.py and gpu.py: what they compute from times, that both sides do the
same work, and the files that they write. No time is judged."""

import json
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from grpo_nb.policy import encode_prompts, eos_token_ids
from helpers import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import gpu
import vs_trl

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    "The benchmark sets the threads of torch; other tests have one."
    yield
    torch.set_num_threads(1)


def record(seconds, tokens=30, completion=10):
    return {
        "seconds": seconds,
        "split": {
            "sampling": seconds / 2,
            "scoring": seconds / 4,
            "update": seconds / 4,
        },
        "tokens": dict.fromkeys(vs_trl.PHASES, tokens),
        "completion": completion,
        "prompt": 5,
        "distinct": completion,
    }


def test_summary_of_made_up_steps():
    "Medians over pairs, not a quotient of sums; FLOPs by hand."
    ours, theirs = (
        [record(1.0), record(2.0), record(4.0)],
        [record(3.0, 90), record(4.0, 90), record(40.0, 90)],
    )
    found = vs_trl.summary(ours, theirs, size=(100, 10), rate=1e4, rows=4)
    assert found["speedup"] == 3.0 and found["pairs"] == [
        [1.0, 3.0],
        [2.0, 4.0],
        [4.0, 40.0],
    ]
    assert (found["seconds_ours"], found["seconds_trl"]) == (2.0, 4.0) and (
        found["tokens_ours"],
        found["tokens_trl"],
    ) == (90, 270)
    assert found["completion_tokens_per_second_ours"] == 5.0 and found["split_trl"] == {
        "sampling": 2.0,
        "scoring": 1.0,
        "update": 1.0,
    }
    assert found["update_share_of_matmul_rate"] == pytest.approx(
        6 * (100 * 30 + 10 * 10) / 0.5 / 1e4
    )
    assert found["floor_tokens"] == 3 * (5 + 10 - 4) and found[
        "floor_seconds"
    ] == pytest.approx(10 * (100 * 11 + 10 * 10) / 1e4)


def test_a_model_that_is_not_seen_is_an_error():
    with pytest.raises(
        RuntimeError, match="ours: 3 tokens were seen while 10 were sampled"
    ):
        vs_trl.summary([record(1.0, tokens=3)], [record(1.0)], (1, 1), 1.0, 4)


def test_the_best_of_two_dtypes():
    "Each side may choose its own."
    settings = {
        "c": {"seconds_ours": 1.0, "seconds_trl": 5.0},
        "c_bf16": {"seconds_ours": 2.0, "seconds_trl": 3.0},
        "a": {},
    }
    assert vs_trl.best_of(settings) == {
        "c": {
            "dtype_ours": "float32",
            "seconds_ours": 1.0,
            "dtype_trl": "bfloat16",
            "seconds_trl": 3.0,
            "speedup": 3.0,
        }
    }
    assert vs_trl.best_of({"c": settings["c"]}) == {}


@pytest.mark.parametrize("name", ["tiny_1024", "qwen_small"])
def test_eos_is_beyond_the_vocabulary(name, tmp_path):
    "After saving and loading, too; and every id that can be drawn can be decoded."
    model, tokenizer = vs_trl.load_policy(
        str(vs_trl.save_model(name, tmp_path, CPU)), "cpu"
    )
    (ids,) = eos_token_ids(model, tokenizer)
    assert (
        ids >= model.config.vocab_size == model.get_output_embeddings().weight.shape[0]
    )
    assert (
        len(
            tokenizer.batch_decode(
                [[i] for i in range(model.config.vocab_size)], skip_special_tokens=True
            )
        )
        == model.config.vocab_size
    )
    setting = vs_trl.replace(vs_trl.SETTINGS["b"], model=name, prompt_length=40)
    assert (
        encode_prompts(tokenizer, vs_trl.make_queries(setting, 3, seed=0))[1]
        .sum(1)
        .tolist()
        == [40] * 3
    )


def test_both_sides_do_the_work_of_setting_b():
    """Smaller, but of its kind: full length on both sides, of the same prompts; no
    more tokens here."""
    setting = vs_trl.replace(
        vs_trl.SETTINGS["b"],
        num_prompts=2,
        num_generations=4,
        prompt_length=24,
        max_completion_length=6,
    )
    with vs_trl.tempfile.TemporaryDirectory() as directory:
        ours, theirs, size = vs_trl.alternate(
            setting,
            vs_trl.save_model(setting.model, directory, CPU),
            CPU,
            pairs=2,
            warmup=0,
        )
    found = vs_trl.summary(ours, theirs, size, rate=1e12, rows=8)
    assert found["completion_tokens_ours"] == found["completion_tokens_trl"] == 8 * 6
    assert found["floor_tokens"] <= found["tokens_ours"] <= found["tokens_trl"]
    assert found["tokens_split_trl"] == {
        "sampling": 8 * (24 + 5),
        "scoring": 8 * 30,
        "update": 8 * 30,
    }
    assert sum(size) == sum(
        p.numel() for p in vs_trl.load_policy("tiny", "cpu")[0].parameters()
    )


def numbers(x):
    return (
        [x]
        if isinstance(x, (int, float))
        else [
            n
            for part in (
                x.values() if isinstance(x, dict) else x if isinstance(x, list) else []
            )
            for n in numbers(part)
        ]
    )


def test_a_run_writes_its_file_and_keeps_other_settings(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        vs_trl.SETTINGS,
        "a",
        vs_trl.replace(vs_trl.SETTINGS["a"], num_prompts=2, num_generations=4),
    )
    path = tmp_path / "deep" / "result.json"
    words = [
        "--settings",
        "a",
        "--pairs",
        "2",
        "--warmup",
        "0",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--output",
        str(path),
        "--skip-memory",
    ]
    vs_trl.main(words)
    assert "speedup" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert set(record) == {
        "machine",
        "versions",
        "settings",
        "commit",
        "date",
        "instructions",
        "best",
    } and set(record["machine"]) >= {"cpu", "cores", "threads", "memory_gib"}
    found = record["settings"]["a"]
    assert (
        len(found["pairs"]) == 2
        and all(x > 0 for x in numbers(found))
        and len(numbers(found)) > 25
    )
    assert found["seconds_ours"] == pytest.approx(
        sum(found["split_ours"].values()), rel=0.5
    )
    text = path.read_text()
    assert (
        str(Path.home()) not in text
        and "/tmp" not in text
        and vs_trl.platform.node() not in text
    )

    path.write_text(json.dumps(record | {"settings": {"a": {}, "b": found}}))
    vs_trl.main(words)
    again = json.loads(path.read_text())["settings"]
    assert again["b"] == found and again["a"]["speedup"] > 0

    path.write_text(json.dumps(record | {"machine": {"cpu": "another"}}))
    with pytest.raises(SystemExit, match="was measured with other machine"):
        vs_trl.main(words)
    assert json.loads(path.read_text())["machine"] == {"cpu": "another"}


def test_an_unknown_setting_is_refused(tmp_path):
    with pytest.raises(
        SystemExit, match="settings must be of a, b, c, c_bf16, d, growth; got z"
    ):
        vs_trl.main(
            ["--settings", "z", "--threads", "1", "--output", str(tmp_path / "x.json")]
        )
    assert list(tmp_path.iterdir()) == []


def test_memory_of_one_side():
    """The state of this side is five times its weights (gradients, two moments and
    the reference with them)."""
    setting = vs_trl.replace(vs_trl.SETTINGS["a"], num_prompts=2, num_generations=4)
    found = vs_trl.own_memory("ours", setting, vs_trl.TINY, CPU)
    weights = sum(p.nbytes for p in vs_trl.load_policy("tiny", "cpu")[0].parameters())
    assert found["state"] == 5 * weights and found["peak"] > found["state"]


# ---- gpu.py: its parts run on the stand-in, in tests/standin


def part_of(monkeypatch, program):
    "Let each part be a process of this program, which knows where to write."
    program = textwrap.dedent(program)

    def command(name, arguments, path):
        return [sys.executable, "-c", program, str(path), name]

    monkeypatch.setattr(gpu, "command_of", command)


def on_an_accelerator(monkeypatch):
    "Let this machine have one, as far as the file of results is concerned."
    found = {"cpu": "a processor", "gpu": "an accelerator"}
    monkeypatch.setattr(vs_trl, "machine", lambda device: found)
    monkeypatch.setattr(gpu, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(gpu, "not_here", lambda device: {})
    monkeypatch.setattr(gpu, "BEGAN", time.monotonic())


def test_a_part_that_ends_fails_or_hangs(tmp_path, monkeypatch):
    "What it had reported by then stays, and what it had started ends with it."
    program = """
        import json, subprocess, sys, time
        path, name = sys.argv[1:]
        open(path, "w").write(json.dumps({"tokens_per_second": 7.0}))
        if name == "b":
            raise ValueError("it has no bfloat16")
        if name == "d":
            child = subprocess.Popen(["sleep", "600"])
            open(path, "w").write(json.dumps({"child": child.pid}))
            time.sleep(600)
    """
    part_of(monkeypatch, program)
    ended = gpu.run_part("a", None, 60)
    assert ended.pop("seconds") < 60
    assert ended == {"status": "done", "tokens_per_second": 7.0}
    failed = gpu.run_part("b", None, 60)
    assert failed["status"] == "failed" and failed["tokens_per_second"] == 7.0
    assert failed["reason"] == "ValueError: it has no bfloat16"
    stopped = gpu.run_part("d", None, 2)
    assert stopped["status"] == "out of time" and 2 <= stopped["seconds"] < 20
    assert stopped["reason"] == "stopped after 2 s"
    state = Path(f"/proc/{stopped['child']}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.05)


def test_the_file_of_a_gpu_is_written_part_by_part(tmp_path, monkeypatch, capsys):
    "With its limits; a part for which there is no time is named, not lost."
    on_an_accelerator(monkeypatch)
    path, seen = tmp_path / "deep" / "gpu.json", []

    def run_part(name, arguments, limit):
        written = json.loads(path.read_text())["parts"] if path.exists() else {}
        seen.append((name, list(written), limit))
        monkeypatch.setattr(gpu, "BEGAN", gpu.BEGAN - 100)  # it took so long
        return {"status": "done", "seconds": 100.0}

    monkeypatch.setattr(gpu, "run_part", run_part)
    words = ["--parts", "a,sampler,b,vllm", "--seconds", "210", "--output", str(path)]
    installed = lambda name: None if name == "vllm" else name
    monkeypatch.setattr(gpu.importlib.util, "find_spec", installed)
    gpu.main(words)
    assert [(name, written) for name, written, _ in seen] == [
        ("a", []),
        ("sampler", ["a"]),
    ]
    assert [limit for *_, limit in seen] == [35, 60]
    found = json.loads(path.read_text())
    assert found["parts"] == {
        "a": {"status": "done", "seconds": 100.0},
        "sampler": {"status": "done", "seconds": 100.0},
        "b": {"status": "left out", "reason": "no time was left"},
        "vllm": {"status": "left out", "reason": "vLLM is not installed"},
    }
    assert "b        left out, no time was left" in capsys.readouterr().out

    installed = lambda name: name
    monkeypatch.setattr(gpu.importlib.util, "find_spec", installed)
    gpu.main(["--parts", "a,vllm", "--seconds", "1", "--output", str(path)])
    again = json.loads(path.read_text())["parts"]
    assert again["a"] == found["parts"]["a"]  # an older result is better than none
    assert again["vllm"]["reason"] == "no time was left"


def test_the_limits_of_a_gpu_run():
    "The least that must fit does, in eight minutes; every setting has its sentence."
    assert gpu.SECONDS == 480
    needed = [gpu.PARTS[name] for name in ("tests", "d", "sampler", "b", "a", "c")]
    assert sum(needed) < gpu.SECONDS
    assert set(gpu.WHAT) == set(vs_trl.SETTINGS) == set(gpu.PARTS) & set(gpu.WHAT)


def test_an_unknown_part_and_a_machine_without_accelerator_are_refused(
    tmp_path, capsys
):
    with pytest.raises(SystemExit):
        gpu.main(["--parts", "a,z"])
    assert "--parts must be of tests, d, sampler" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--miniature"])
    assert "--miniature needs an --output" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="error: there is no accelerator here"):
        gpu.main(["--device", "cpu", "--output", str(tmp_path / "gpu.json")])
    assert list(tmp_path.iterdir()) == []


def test_tests_are_counted_as_they_end(tmp_path, monkeypatch):
    "By outcome, those that fail by name; names with spaces, too."
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they are slow to load
    path = tmp_path / "test_made_up.py"
    path.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('x', [1, 2], ids=['in pieces', 'b'])\n"
        "def test_x(x): assert x == 1\n"
        "@pytest.mark.skip\n"
        "def test_y(): pass\n"
    )
    reports = []
    gpu.run_tests(reports.append, str(path))
    assert [sum(r["outcomes"].values()) for r in reports] == [1, 2, 3]
    assert reports[-1]["outcomes"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failed,) = reports[-1]["failed"]
    assert failed.endswith("test_x[b]")
    path.write_text("")
    with pytest.raises(RuntimeError, match="pytest ended with status 5"):
        gpu.run_tests(reports.append, str(path))


@pytest.mark.skipif(not gpu.RESULTS.exists(), reason="no GPU has run this yet")
def test_the_words_of_the_results_are_those_of_their_numbers():
    record = json.loads(gpu.RESULTS.read_text())
    assert record["text"] == gpu.text_of(record)


def test_what_a_gpu_has_to_say_in_words():
    memory = {
        "ours": {"state": 2**30, "above_state": 2**30, "peak": 9 * 2**30},
        "trl": {"state": 2**30, "above_state": 7 * 2**30, "peak": 99 * 2**30},
    }
    assert gpu.ratio_of_peaks(memory) == 1 / 4
    d = {"seconds_ours": 2.0, "seconds_trl": 9.0, "speedup": 4.4, "memory": memory}
    a = {"seconds_ours": 0.05, "seconds_trl": 0.1, "speedup": 2.0}
    late = {"status": "out of time", "reason": "stopped after 35 s"}
    record = {
        "machine": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.13.0+cu130", "trl": "1.16.0"},
        "parts": {
            "tests": {"outcomes": {"passed": 21, "failed": 1}, "failed": ["test_x"]},
            "d": d,
            "a": a | late,
            "sampler": {"tokens_per_second": 12345.6},
            "vllm": {"status": "left out", "reason": "vLLM is not installed"},
        },
    }
    assert gpu.text_of(record).split("\n\n") == [
        "On NVIDIA H200, torch 2.13.0, TRL 1.16.0: 21 of 22 tests passed, not test_x.",
        "| setting | grpo_nb | TRL | faster | memory | of TRL |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        f"| {gpu.WHAT['a']} | 0.05 s | 0.1 s | 2.0 × | – | – |\n"
        f"| {gpu.WHAT['d']} | 2 s | 9 s | 4.4 × | 2 GiB | 8 GiB |",
        "Tokens per second, completions of the last setting: 12,346 by the library's "
        "sampler.",
        "Not, or not all, measured: a (stopped after 35 s); vllm (vLLM is not "
        "installed).",
    ]
    bare = record | {"parts": {}}
    assert gpu.text_of(bare) == "On NVIDIA H200, torch 2.13.0, TRL 1.16.0."
