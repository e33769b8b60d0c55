"""What every test shares. One thread, no network, no progress bars: the same numbers
on every machine."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

import pytest
import torch
import transformers
from hypothesis import settings

from grpo_nb.policy import load_policy
from helpers import character_tokenizer, random_model, random_rollout

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
settings.register_profile(
    "quick", derandomize=True, deadline=None, max_examples=40, database=None
)
settings.load_profile("quick")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


@pytest.fixture(scope="session")
def tiny():
    "The embedded policy and its tokenizer; not to be trained."
    return load_policy("tiny", "cpu")


@pytest.fixture(scope="session")
def tokenizer():
    return character_tokenizer()


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """Random weights, float64, dropout 0.1: once with rotary and once with learned
    absolute positions."""
    return random_model(request.param)


@pytest.fixture
def llama():
    return random_model("llama")


@pytest.fixture
def rollout(llama, tokenizer):
    "Three groups of three, every field filled, on the Llama of the same test."
    return random_rollout(llama, tokenizer)
