"""The few checks that need a GPU: everything else is the same code on another device.

Where there is none, `tests/test_standin.py` runs them on a stand-in."""

import math

import pytest
import torch

from grpo_nb.engine import packing
from grpo_nb.engine.packing import token_logprobs
from grpo_nb.loading import resolve_device
from grpo_nb.policy import load_policy, model_inputs
from grpo_nb.engine.adapters import reference_logprobs
from grpo_nb.engine.decoding import sample
from grpo_nb.engine.data import load_task
from grpo_nb.engine.judging import RewardModel
from grpo_nb.engine.micro_batch import micro_batches
from grpo_nb.run.build import build_models
from grpo_nb.run.training import train
from helpers import read_metrics, short_config

pytestmark = [
    pytest.mark.gpu,
    # what falls back to rows of their own would pass, and test nothing
    pytest.mark.filterwarnings("error:.*does not compute a group in one row"),
    pytest.mark.filterwarnings("error:.*does not read a padded prompt"),
]
DEVICE = resolve_device("auto").type


def test_auto_finds_the_gpu():
    assert DEVICE == torch.accelerator.current_accelerator().type != "cpu"


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 3}], ids=str)
def test_sampler_and_trainer_agree(options):
    """Bug 16 on the GPU: rho = 1 to 1e-4 in float32, with TF32 off as it is by
    default; prompts of different lengths."""
    policy, tokenizer = load_policy("tiny", DEVICE)
    queries = load_task("add").queries("train", 8) + load_task("add", digits=3).queries(
        "train", 8
    )
    rollout = sample(
        policy,
        tokenizer,
        queries,
        8,
        12,
        generator=torch.Generator(DEVICE).manual_seed(0),
        **options,
    )
    with torch.no_grad():
        rho = (
            token_logprobs(policy, rollout, options.get("temperature", 1.0))
            - rollout.logprobs
        ).exp()
    assert rollout.completion_ids.device.type == DEVICE and (rho - 1).abs().max() < 1e-4


def test_the_gpu_agrees_with_the_cpu():
    "The same completions have the same log-probs on both."
    (policy, tokenizer), (copy, _) = (
        load_policy("tiny", DEVICE),
        load_policy("tiny", "cpu"),
    )
    rollout = sample(
        copy,
        tokenizer,
        load_task("add").queries("train", 8),
        4,
        8,
        generator=torch.Generator().manual_seed(0),
    )
    moved = sample(policy, tokenizer, rollout.queries, 4, 8, top_k=1)
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        setattr(moved, name, getattr(rollout, name).to(DEVICE))
    with torch.no_grad():
        torch.testing.assert_close(
            token_logprobs(policy, moved).cpu(), rollout.logprobs, rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_steps(tmp_path, algorithm, dtype):
    """Three steps of each half: finite, rho = 1 on fresh samples, and the policy
    that samples is the one that is trained."""
    config = short_config(
        algorithm=algorithm,
        dtype=dtype,
        device=DEVICE,
        max_steps=3,
        num_prompts=32,
        learning_rate=3e-4,
        output_dir=str(tmp_path / "run"),
    )
    run = train(config, progress=False)
    metrics = read_metrics(run.directory)
    assert all(math.isfinite(x) for line in metrics for x in line.values())
    assert all(
        abs(line["ratio"] - 1) < (1e-4 if dtype == "float32" else 1e-2)
        for line in metrics
    )
    assert metrics[0]["kl"] < 1e-3 < metrics[2]["kl"]
    assert run.policy.device.type == DEVICE and run.policy.dtype == torch.float32


def path_taken(monkeypatch):
    "Note from now on the rows of each layout, and the tokens of each chunk of logits."
    rows, chunks = [], []
    shared_rows, score = packing.shared_rows, packing._score

    def noted_rows(rollout, hidden, device):
        assert hidden is not None  # else rows of their own
        result = shared_rows(rollout, hidden, device)
        rows.append(len(result[0]["input_ids"]))
        return result

    def noted_score(states, ids, **options):
        chunks.append(len(ids))
        return score(states, ids, **options)

    monkeypatch.setattr(packing, "shared_rows", noted_rows)
    monkeypatch.setattr(packing, "_score", noted_score)
    return rows, chunks


@pytest.mark.parametrize("k", [1, 4, 16])
@pytest.mark.parametrize("pieces", [False, True], ids=["whole", "in pieces"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_rows(monkeypatch, k, pieces, dtype):
    """Rows of one completion, of a few and of a whole group, logits whole and in
    pieces: log-probs and gradients of the plain way."""
    if DEVICE == "standin" and dtype == "bfloat16" and k != 4:
        pytest.skip("slow on a CPU, and no other path")
    policy, tokenizer = load_policy("tiny", DEVICE)
    queries = load_task("add").queries("train", 4) + load_task("add", digits=3).queries(
        "train", 4
    )
    rollout = sample(
        policy,
        tokenizer,
        queries,
        16,
        12,
        temperature=2.0,
        generator=torch.Generator(DEVICE).manual_seed(0),
    )
    monkeypatch.setattr(packing, "completions_per_row", lambda *_: k)
    if pieces:
        monkeypatch.setattr(packing, "LOGITS", 50 * policy.config.vocab_size)
    rows, chunks = path_taken(monkeypatch)

    def gradient(f):
        policy.zero_grad()
        with torch.autocast(
            DEVICE, torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False
        ):
            logprobs = f()
            logprobs.float().square().mean().backward()
        return logprobs.detach().float(), torch.cat(
            [p.grad.flatten() for p in policy.parameters()]
        )

    def plain():
        logits = (
            policy(**model_inputs(rollout))
            .logits[:, rollout.prompt_ids.shape[1] - 1 : -1]
            .float()
        )
        return (
            logits.log_softmax(-1)
            .gather(-1, rollout.completion_ids[..., None])
            .squeeze(-1)
            .masked_fill(~rollout.completion_mask, 0)
        )

    (ours, slope), (truth, true_slope) = (
        gradient(lambda: token_logprobs(policy, rollout)),
        gradient(plain),
    )
    assert rows == [len(rollout) // k]  # of k completions each
    assert (len(chunks) > 2 and max(chunks) == 50) if pieces else len(chunks) == 1
    close, share = (1e-4, 1e-4) if dtype == "float32" else (0.3, 0.1)
    assert (ours - truth).abs().max() < close and (
        slope - true_slope
    ).norm() < share * true_slope.norm()


def test_reference_in_pieces():
    "Under inference_mode, a micro-batch at a time, in the order of the rows."
    policy, tokenizer = load_policy("tiny", DEVICE)
    rollout = sample(
        policy,
        tokenizer,
        load_task("add", digits=1).queries("train", 3)
        + load_task("add").queries("train", 5),
        4,
        8,
        generator=torch.Generator(DEVICE).manual_seed(0),
    )
    hidden = packing.sharing_width(policy, rollout)
    assert hidden and len(micro_batches(rollout, 60, hidden)) > 1
    logprobs = reference_logprobs(policy, rollout, max_tokens=60)
    assert (logprobs - rollout.logprobs).abs().max() < 1e-4


def test_reward_models_are_on_the_device(tmp_path):
    "One that is loaded and one that is made: neither may stay on the CPU unnoticed."
    policy, tokenizer = load_policy("tiny", "cpu")
    RewardModel.from_policy(policy, tokenizer).model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    names = [str(tmp_path), "learned"]
    config = short_config(device=DEVICE, reward_funcs=names)
    judges = build_models(config, load_task("add")).rewards
    weights = [p for judge in judges for p in judge.model.parameters()]
    assert len(judges) == 2 and {p.device.type for p in weights} == {DEVICE}


def test_gradient_checkpointing(tmp_path):
    "The same steps; less memory is a matter of the benchmark."
    runs = [
        train(
            short_config(
                device=DEVICE,
                max_steps=2,
                gradient_checkpointing=lean,
                output_dir=str(tmp_path / str(lean)),
            ),
            progress=False,
        )
        for lean in (False, True)
    ]
    a, b = (read_metrics(run.directory) for run in runs)
    assert all(
        x["loss"] == pytest.approx(y["loss"], abs=1e-4)
        and x["kl"] == pytest.approx(y["kl"], abs=1e-4)
        for x, y in zip(a, b)
    )


def by_length(calls_allowed):
    "A reward function that stops the run, as Ctrl-C does, after so many calls."
    calls = []

    def length(completions, **_):
        calls.append(1)
        if len(calls) > calls_allowed:
            raise KeyboardInterrupt
        return [float(len(text)) for text in completions]

    return length


def test_resume(tmp_path):
    "Bug 26: the sampler's generator lives on the GPU, and comes back there."
    options = {
        "device": DEVICE,
        "max_steps": 4,
        "save_steps": 2,
        "output_dir": str(tmp_path / "run"),
    }
    with pytest.raises(KeyboardInterrupt):
        train(short_config(**options), reward_funcs=[by_length(2)], progress=False)
    run = train(
        short_config(**options, resume=True),
        reward_funcs=[by_length(9)],
        progress=False,
    )
    assert [line["step"] for line in read_metrics(run.directory)] == [1, 2, 3, 4]
