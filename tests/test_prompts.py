"""Prompts that are looked at before a run: which are too long, and what happens to
them. The truth is the number of tokens of each."""

import pytest

from grpo_nb.engine.data import as_task, load_task
from grpo_nb.engine.prompts import fit_prompts
from grpo_nb.models import Models
from grpo_nb.policy import encode_prompts, load_policy
from grpo_nb.run.options import make_config
from grpo_nb.run.training import train
from helpers import read_metrics, short_config

SUMS = [
    {"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(9) for b in range(9)
]
LONG = {"prompt": "1+" * 1000 + "1=", "answer": "1001"}


def models_of(path):
    policy, tokenizer = load_policy(path, "cpu")
    return Models(policy, tokenizer, None, [])


def test_dropped_are_those_that_are_too_long(reader):
    "Plain and as a chat, around the limit, with letters of one and of three bytes."
    models = models_of(reader)
    room = models.policy.config.max_position_embeddings - 16
    rows = []
    for n in (1, room // 3 - 30, room // 3, room - 30, room - 16, room, room + 1):
        for letter in "a题":
            rows.append({"prompt": f"{letter * n}{len(rows)}"})
            rows.append({"prompt": [{"role": "user", "content": letter * n}]})
    task = as_task([*rows, {"prompt": [{"role": "system", "content": "b" * room}]}])
    queries = list(map(task.query, range(task.size)))
    lengths = encode_prompts(models.tokenizer, queries)[1].sum(1).tolist()
    fitting = fit_prompts(task, models, make_config(overlong_prompts="drop"), list)
    kept = {*fitting.sides["train"], *fitting.sides["heldout"]}
    assert kept == {i for i, length in enumerate(lengths) if length <= room}
    assert 5 < len(kept) < task.size - 5


def test_a_run_drops_them_and_says_how_many(tmp_path, capsys):
    task = as_task([LONG, *SUMS, LONG | {"prompt": LONG["prompt"] + "1="}])
    options = {"model": "tiny", "max_steps": 2, "eval_size": 3}
    config = short_config(output_dir=str(tmp_path / "a"), **options)
    with pytest.raises(
        ValueError, match='row 1 is too long.*overlong_prompts = "drop"'
    ):
        train(config, task=task, progress=False)
    assert not (tmp_path / "a").exists()
    options |= {"overlong_prompts": "drop"}
    run = train(
        short_config(output_dir=str(tmp_path / "b"), **options),
        task=task,
        progress=False,
    )
    assert "2 of 83 prompts are too long" in capsys.readouterr().out
    assert len(read_metrics(run.directory)) == 2
    with pytest.raises(ValueError, match="prompts are too long for the model"):
        short = short_config(output_dir=str(tmp_path / "c"), **options)
        train(short, task=[LONG] * 3, progress=False)


def test_tasks_without_rows_can_drop_too():
    "All sums of one digit are four tokens: all fit, or none."
    models, task = models_of("tiny"), load_task("add", digits=1)
    queries = list(map(task.query, range(task.size)))
    (length,) = encode_prompts(models.tokenizer, queries)[1].sum(1).unique().tolist()
    models.policy.config.max_position_embeddings = 20
    options = {"overlong_prompts": "drop"}
    fitting = make_config(max_completion_length=20 - length, **options)
    assert fit_prompts(task, models, fitting, list) is task
    longer = make_config(max_completion_length=21 - length, **options)
    with pytest.raises(ValueError, match="all train prompts are too long"):
        fit_prompts(task, models, longer, list)


def test_a_character_that_comes_late_is_found(tiny):
    "In the last of 4,000 rows, of which few are encoded."
    models = Models(*tiny, None, [])
    rows = [{"prompt": f"{i}+1="} for i in range(4000)]
    assert fit_prompts(as_task(rows), models, make_config(), list).size == 4000
    rows[3999] = {"prompt": "3999 + ü"}
    with pytest.raises(ValueError, match="cannot read '3999 . ü'.*row 4000"):
        fit_prompts(as_task(rows), models, make_config(), list)
