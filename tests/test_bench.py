"""benchmarks/vs_trl.py: what it computes from times, that both sides do the same
work, and the file that it writes. No time is judged."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

from grpo_nb.policy import encode_prompts, eos_token_ids

PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "vs_trl.py"
spec = importlib.util.spec_from_file_location("vs_trl", PATH)
vs_trl = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vs_trl)
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


@pytest.mark.parametrize("name", ["tiny_1024", "qwen"])
def test_eos_is_beyond_the_vocabulary(name, tmp_path, monkeypatch):
    "After saving and loading, too; and every id that can be drawn can be decoded."
    small = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 500,
    }
    shape = vs_trl.transformers.Qwen2Config
    monkeypatch.setattr(
        vs_trl.transformers, "Qwen2Config", lambda **options: shape(**options | small)
    )
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
