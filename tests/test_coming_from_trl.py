"""Reward functions as people write them for TRL's GRPOTrainer: the same scores from
TRL's own trainer and from `judge`, and the same things handed to them while
training."""

import asyncio
import functools
import gc
import math
import shutil
import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("trl")

from trl import GRPOConfig, GRPOTrainer
from trl.rewards import (
    accuracy_reward,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    reasoning_accuracy_reward,
    think_format_reward,
)

from grpo_nb.evidence.trl_oracles import silence
from grpo_nb.policy import as_rollout
from grpo_nb.engine.judging import judge, name_of, score
from grpo_nb.task import Query
from grpo_nb.run.training import train
from helpers import character_tokenizer, read_metrics, short_config


# What follows is written in TRL's conventions; `text` makes it work for plain and chat
# completions.
def text(completion):
    return completion if isinstance(completion, str) else completion[0]["content"]


def length(completions, **kwargs):
    return [float(len(text(c))) for c in completions]


def tokens(prompts, completions, completion_ids, **kwargs):
    return [len(ids) / 10 + sum(ids) for ids in completion_ids]


def of_the_prompt(prompts, completions, **kwargs):
    return [0.5 * (text(p)[0] in text(c)) for p, c in zip(prompts, completions)]


def columns(completions, solution, difficulty, **kwargs):
    return [d * (s in text(c)) for c, s, d in zip(completions, solution, difficulty)]


def sometimes(completions, solution, **kwargs):
    return [1.0 if s in text(c) else None for c, s in zip(completions, solution)]


def never(completions, **kwargs):
    return [None] * len(completions)


def booleans(completions, **kwargs):
    return [text(c).isdigit() for c in completions]


def integers(completions, **kwargs):
    return tuple(len(text(c)) for c in completions)


def array(completions, **kwargs):
    return np.array([len(text(c)) / 3 for c in completions], dtype=np.float32)


def tensor(completions, **kwargs):
    return torch.tensor([len(text(c)) / 7 for c in completions])


def scalars(completions, **kwargs):
    return [torch.tensor(len(text(c)) / 7) for c in completions]


def weighted(completions, weight, **kwargs):
    return [weight * len(text(c)) for c in completions]


def by_name(completions, log_extra=None, log_metric=None, trainer_state=None, **kwargs):
    return [0.25] * len(completions)


async def distant(completions, solution, **kwargs):
    await asyncio.sleep(0.01)
    return [float(s == text(c)) for c, s in zip(completions, solution)]


async def silent(completions, **kwargs):
    await asyncio.sleep(0)
    return [None, *[1.0] * (len(completions) - 1)]


class Judge:
    def __call__(self, completions, **kwargs):
        return [-1.0 * len(text(c)) for c in completions]


class DistantJudge:
    __name__ = "remote_judge"

    async def __call__(self, prompts, completions, solution, **kwargs):
        return [
            float(text(p) + s == text(p) + text(c))
            for p, c, s in zip(prompts, completions, solution)
        ]


OWN = [
    length,
    tokens,
    of_the_prompt,
    columns,
    sometimes,
    never,
    booleans,
    integers,
    array,
    tensor,
    scalars,
    functools.partial(weighted, weight=0.5),
    by_name,
    distant,
    silent,
    functools.partial(distant),
    Judge(),
    DistantJudge(),
    lambda completions, **kwargs: [2.0] * len(completions),
]
SHIPPED = [
    think_format_reward,
    accuracy_reward,
    reasoning_accuracy_reward,
    get_cosine_scaled_reward(max_len=40),
    get_soft_overlong_punishment(30, 20),
    get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0),
]

PLAIN = (
    [
        Query("12+34=", {"solution": "46", "difficulty": 0.5}),
        Query("7+5=", {"solution": "12", "difficulty": 2.0}),
    ],
    ["46", "47", "12", "777"],
)
CHAT = (
    [
        Query(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "12+34=?"},
            ],
            {"solution": r"$\frac{1}{3}$", "difficulty": 0.5},
        ),
        Query(
            [{"role": "user", "content": "7+5=?"}],
            {"solution": "no number", "difficulty": 1.0},
        ),
    ],
    [
        r"<think>a third</think>\boxed{\frac{1}{3}}",
        r"<think> so it is</think>\boxed{\frac{1}{2}}",
        "46 46 46 46",
        "",
    ],
)


@pytest.fixture(scope="module")
def tokenizer():
    "One token a character; a chat is its messages, one after the other."
    tokenizer = character_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def trl_rewards(tmp_path_factory, tiny):
    """What TRL's trainer makes of these functions: [N, F], and the names that it
    logs them by."""
    from datasets import Dataset

    directory = tmp_path_factory.mktemp("trl")

    def rewards(functions, queries, completions, ids):
        with silence():
            for part in tiny:
                part.save_pretrained(directory)
            args = GRPOConfig(
                output_dir=str(directory),
                num_generations=2,
                per_device_train_batch_size=4,
                use_cpu=True,
                bf16=False,
                report_to="none",
            )
            trainer = GRPOTrainer(
                str(directory),
                functions,
                args,
                Dataset.from_list(
                    [{"prompt": query.prompt, **query.columns} for query in queries]
                ),
            )
            inputs = [
                {"prompt": query.prompt, **query.columns}
                for query in queries
                for _ in range(2)
            ]
            return trainer._calculate_rewards(
                inputs, [row["prompt"] for row in inputs], completions, ids
            ), trainer.reward_func_names

    return rewards


@pytest.mark.parametrize(
    "functions, texts",
    [(OWN, PLAIN), (OWN, CHAT), (SHIPPED, CHAT)],
    ids=["own, plain", "own, chat", "shipped, chat"],
)
def test_the_same_scores(functions, texts, trl_rewards, tiny, tokenizer):
    """Each function, for each completion, to float32; None and NaN where TRL has
    NaN; and the same names."""
    queries, completions = texts
    rollout = as_rollout(tokenizer, queries, completions)
    ids = [
        row[mask].tolist()
        for row, mask in zip(rollout.completion_ids, rollout.completion_mask)
    ]
    messages = (
        completions
        if isinstance(queries[0].prompt, str)
        else [[{"role": "assistant", "content": c}] for c in completions]
    )
    theirs, names = trl_rewards(list(functions), queries, messages, ids)
    ours = torch.tensor(
        [
            [math.nan if x is None else x for x in column]
            for column in judge(functions, rollout)
        ]
    ).T
    torch.testing.assert_close(ours, theirs.cpu(), rtol=0, atol=0, equal_nan=True)
    assert list(map(name_of, functions)) == names
    assert (
        len(set(theirs.nan_to_num(-99).flatten().tolist())) > 5
    )  # they do not agree about nothing


def test_a_function_that_does_not_take_what_it_is_given(tokenizer):
    """Without **kwargs TRL cannot call it either; the error says which function, and
    which argument."""

    def narrow(completions):
        return [0.0] * len(completions)

    with pytest.raises(
        RuntimeError, match="'narrow' raised TypeError: .*unexpected keyword argument"
    ):
        judge([narrow], as_rollout(tokenizer, *PLAIN))


def test_async_functions_wait_together_and_after_the_others(tokenizer):
    """Two that wait for each other come to an end; the plain one has been called
    before either begins."""
    order, barrier = [], asyncio.Barrier(2)

    async def one(completions, **kwargs):
        order.append("async")
        await asyncio.wait_for(barrier.wait(), 10)
        return [1.0] * len(completions)

    def plain(completions, **kwargs):
        order.append("plain")
        return [0.0] * len(completions)

    assert judge([one, plain, one], as_rollout(tokenizer, *PLAIN)) == [
        [1.0] * 4,
        [0.0] * 4,
        [1.0] * 4,
    ]
    assert order == ["plain", "async", "async"]


def test_async_functions_where_a_loop_is_running(tokenizer):
    """As in a notebook's cell: the thread that calls has a loop of its own, which
    cannot be entered again."""

    async def cell():
        return judge([distant], as_rollout(tokenizer, *PLAIN))

    assert asyncio.run(cell()) == [[1.0, 0.0, 1.0, 0.0]]


def test_async_functions_have_one_loop_for_all_steps(tokenizer):
    "A client that was opened in the first step can be used in the second."
    loops, queue = [], asyncio.Queue()

    async def client(completions, **kwargs):
        loops.append(asyncio.get_running_loop())
        asyncio.get_running_loop().call_soon(queue.put_nowait, 1.0)
        return [await asyncio.wait_for(queue.get(), 10)] * len(completions)

    for _ in range(2):
        assert judge([client], as_rollout(tokenizer, *PLAIN)) == [[1.0] * 4]
    assert loops[0] is loops[1]


async def lost(completions, solution, **kwargs):
    await asyncio.sleep(0)
    if "12" in solution:
        raise ConnectionError("no route to the judge")
    return [0.5] * len(completions)


async def wrong(completions, **kwargs):
    return [math.nan] * len(completions)


def test_errors_of_async_functions(tokenizer):
    """Named like those of others; `drop` leaves out the group; nothing is left
    without being waited for."""
    rollout = as_rollout(tokenizer, *PLAIN)
    with pytest.raises(
        RuntimeError, match="'lost' raised ConnectionError: no route to the judge"
    ):
        score(rollout, [length, lost])
    with pytest.raises(ValueError, match="'wrong' returned nan for completion 0"):
        score(rollout, [wrong])
    score(rollout, [lost], on_error="drop")
    assert rollout.scored.tolist() == [True, True, False, False] and rollout.rewards[
        :2
    ].tolist() == [0.5, 0.5]

    def broken(completions, **kwargs):
        raise KeyError("answer")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="'broken'"):
            judge([distant, broken], rollout)
        gc.collect()


@pytest.mark.parametrize("on_reward_error", ["stop", "drop"])
def test_training_where_an_async_judge_fails(tmp_path, on_reward_error):
    """In the second step, once: the run stops and can be resumed, or goes on without
    that group."""
    calls = []

    async def flaky(completions, answer, **kwargs):
        await asyncio.sleep(0)
        calls.append(answer)
        if len(calls) == failing:
            raise ConnectionError("gone")
        return [float(a == c) for a, c in zip(answer, completions)]

    config = dict(
        max_steps=3, output_dir=str(tmp_path / "run"), on_reward_error=on_reward_error
    )
    failing = (
        2 if on_reward_error == "stop" else 4 + 1
    )  # with drop it is asked group by group, four a step
    if on_reward_error == "stop":
        with pytest.raises(RuntimeError, match="'flaky' raised ConnectionError: gone"):
            train(short_config(**config), reward_funcs=[flaky], progress=False)
        assert (
            len(read_metrics(tmp_path / "run")) == 1
            and (tmp_path / "run/checkpoint-1").is_dir()
        )
        config["resume"] = True
    run = train(short_config(**config), reward_funcs=[flaky], progress=False)
    assert (
        run.metrics.index.tolist() == [1, 2, 3]
        and run.metrics["rewards/flaky/mean"].notna().all()
    )
    if on_reward_error == "drop":
        assert run.metrics["unscored_groups"].fillna(0).tolist() == [0, 1, 0]


def schedule(seen):
    "A reward that depends on how far the training is, as TRL's users write it."

    def shaped(completions, trainer_state, log_metric, log_extra, **kwargs):
        seen.append((trainer_state.global_step, trainer_state.max_steps))
        log_metric("price", 1 + trainer_state.global_step)
        log_extra("length", [len(c) for c in completions])
        return [-trainer_state.global_step * len(c) for c in completions]

    return shaped


def test_what_trl_hands_over(tmp_path, tiny):
    """The trainer's state and the metric that is logged, step by step, in TRL and
    here; also after resuming."""
    from datasets import Dataset

    theirs, ours = [], []
    with silence():
        for part in tiny:
            part.save_pretrained(tmp_path / "trl")
        args = GRPOConfig(
            output_dir=str(tmp_path / "trl"),
            max_steps=3,
            num_generations=4,
            per_device_train_batch_size=16,
            max_completion_length=8,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            str(tmp_path / "trl"),
            [schedule(theirs)],
            args,
            Dataset.from_list([{"prompt": f"{n}+{n}="} for n in range(10, 22)]),
        )
        trainer.train()
    logged = [line["price"] for line in trainer.state.log_history if "price" in line]
    config = dict(max_steps=3, output_dir=str(tmp_path / "run"), save_steps=2)
    run = train(short_config(**config), reward_funcs=[schedule(ours)], progress=False)
    assert ours == theirs == [(0, 3), (1, 3), (2, 3)] and run.metrics[
        "price"
    ].tolist() == logged == [1, 2, 3]
    shutil.rmtree(
        run.directory / "model"
    )  # as if it had been stopped in the third step
    again = train(
        short_config(**config, resume=True),
        reward_funcs=[schedule(ours)],
        progress=False,
    )
    assert ours[3:] == [(2, 3)] and again.metrics["price"].tolist() == [1, 2, 3]
    assert all(
        p.equal(q) for p, q in zip(again.policy.parameters(), run.policy.parameters())
    )


def test_what_it_logs_cannot_replace_a_metric(tmp_path):
    """A metric of ours keeps its name; a value that is no number is an error of the
    function."""

    def greedy(completions, log_metric, **kwargs):
        log_metric("reward", 1e6)
        return [1.0] * len(completions)

    assert train(
        short_config(output_dir=str(tmp_path / "a")),
        reward_funcs=[greedy],
        progress=False,
    ).metrics["reward"].tolist() == [1.0]

    def words(completions, log_metric, **kwargs):
        log_metric("mood", "good")
        return [1.0] * len(completions)

    with pytest.raises(RuntimeError, match="'words' raised ValueError"):
        train(
            short_config(output_dir=str(tmp_path / "b")),
            reward_funcs=[words],
            progress=False,
        )


def test_a_function_that_takes_only_its_columns(tmp_path):
    "Without **kwargs it gets the columns and no more, where TRL could not call it."

    def exact(prompts, completions, completion_ids, answer):
        return [float(a == c) for a, c in zip(answer, completions)]

    both = [
        train(
            short_config(output_dir=str(tmp_path / name)),
            reward_funcs=given,
            progress=False,
        )
        .metrics["reward"]
        .tolist()
        for name, given in [("own", [exact]), ("ours", None)]
    ]
    assert both[0] == both[1]


def test_a_function_beside_one_by_name(tmp_path):
    """TRL's list may mix functions with names of models; config.json says which is
    which."""
    run = train(
        short_config(output_dir=str(tmp_path / "run")),
        reward_funcs=["accuracy", functools.partial(weighted, weight=-0.01)],
        progress=False,
    )
    assert {"rewards/accuracy/mean", "rewards/weighted/mean"} <= set(run.metrics)
    assert '"accuracy",\n    "weighted"' in (run.directory / "config.json").read_text()
