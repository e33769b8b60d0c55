"The same runs on the CPU and on the stand-in: the same numbers, seed by seed."

import pytest
import torch
from grpo_nb.run.training import open_run
from helpers import read_metrics, reproducible, run

LEARNED = {
    "reward_funcs": ["learned"],
    "reward_model_prompts": 32,
    "reward_model_steps": 2,
    "ref_model_sync_steps": 2,
    "temperature": 1.2,
}
CASES = {
    "grpo": {"max_tokens_per_micro_batch": 60, "num_iterations": 2},
    "ppo": {"algorithm": "ppo", "num_prompts": 16, "kl_target": 0.1},
    "value head": {"algorithm": "ppo", "value_model": "head", "whiten_rewards": True},
    "learned": LEARNED,
    "process": {
        "task": "sums",
        "reward_funcs": ["process"],
        "max_completion_length": 24,
    },
    "dynamic sampling": {"dynamic_sampling": 3, "digits": 1},
    "adapters": {"use_peft": True, "learning_rate": 1e-3},
    "gspo": {"recipe": "gspo", "num_generations": 4, "entropy_coef": 0.01},
    "top": {"top_p": 0.9, "top_k": 5, "gradient_checkpointing": True},
    "reference in bfloat16": {"reference_dtype": "bfloat16"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_run(tmp_path, name):
    lines = {}
    for device in ("cpu", "standin"):
        options = {"max_steps": 2, "learning_rate": 3e-4} | CASES[name]
        finished = run(tmp_path / device, device=device, **options)
        assert finished.policy.device.type == device
        lines[device] = map(reproducible, read_metrics(finished.directory))
    for ours, cpu in zip(lines["standin"], lines["cpu"], strict=True):
        assert ours == pytest.approx(cpu, rel=1e-4, abs=1e-6, nan_ok=True)


def test_a_run_is_opened_on_the_device(tmp_path):
    "Its answers are those of the CPU."
    run(tmp_path, device="standin")
    answers = []
    for device in ("cpu", "standin"):
        generator = torch.Generator(device).manual_seed(0)
        opened = open_run(tmp_path, device)
        answers.append(opened.answers("12+34=", 4, generator))
    assert answers[0].equals(answers[1])
