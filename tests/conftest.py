"""What every test shares. One thread, no network, no progress bars: the same numbers
on every machine.

With GRPO_NB_DEVICE=standin the tests for a GPU run on the stand-in of tests/standin:
`tests/test_standin.py` starts such a process."""

import os
import sys
from pathlib import Path

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
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

STANDIN = Path(__file__).with_name("standin")
sys.path.append(str(STANDIN))
collect_ignore = []
if os.environ.get("GRPO_NB_DEVICE") == "standin":
    import standin  # noqa: F401  registers the device, before anything asks for one
else:
    collect_ignore.append(str(STANDIN))

from grpo_nb.loading import resolve_device
from grpo_nb.policy import load_policy
from helpers import character_tokenizer, random_model, random_rollout

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
settings.register_profile(
    "quick", derandomize=True, deadline=None, max_examples=40, database=None
)
settings.load_profile("quick")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs an accelerator, or the stand-in")


def pytest_collection_modifyitems(items):
    if resolve_device("auto").type != "cpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


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


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    "A random model that reads any text: its tokens are bytes. It has a chat template."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(
        models.BPE({"<eos>": 0} | {byte: i for i, byte in enumerate(alphabet, 1)}, [])
    )
    core.pre_tokenizer, core.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<eos>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=2048,
            eos_token_id=0,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    path = tmp_path_factory.mktemp("reader")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
