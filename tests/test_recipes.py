"""The recipes: what each changes, against the papers and against the table of
chapter 20."""

import json
import re
import warnings

import pytest

from grpo_nb.run.options import RECIPES, make_config
from helpers import ROOT

NO_KL = {"beta": 0.0}
DEEPSEEKMATH = {"beta": 0.04, "num_generations": 64}  # 2402.03300, sec. 4.2
CHANGED = {  # by each recipe, from the defaults of its algorithm: all of it
    "ppo": {},
    "deepseekmath": DEEPSEEKMATH,
    "deepseekmath_process": DEEPSEEKMATH | {"reward_funcs": ["process"]},
    "iterative": DEEPSEEKMATH
    | {"reward_funcs": ["learned"], "ref_model_sync_steps": 10},
    "dr_grpo": NO_KL | {"scale_rewards": "none", "loss_type": "dr_grpo"},
    "dapo": NO_KL
    | {"epsilon_high": 0.28, "loss_type": "dapo", "dynamic_sampling": 4}
    | {"reward_funcs": ["accuracy", "overlong"]},
    "gspo": NO_KL
    | {"importance_sampling_level": "sequence"}
    | {"epsilon": 0.0003, "epsilon_high": 0.0004},
    "cispo": NO_KL | {"objective": "cispo", "loss_type": "dapo", "epsilon_high": 4.0},
    "sapo": NO_KL | {"objective": "sapo"},
    "reinforce_pp_baseline": {"scale_rewards": "batch_centred"},
    "rloo": {"baseline": "leave_one_out", "scale_rewards": "none"}
    | {"num_generations": 4},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_changes_what_it_says_and_nothing_else(recipe):
    "Every option, the number of generations too, against the papers written down here."
    config = make_config(recipe=recipe)
    default = make_config(algorithm=config.algorithm)
    changed = {
        name: value
        for name, value in vars(config).items()
        if name != "recipe" and value != getattr(default, name)
    }
    assert changed == CHANGED[recipe]


STATED = {  # what the table of recipes in chapter 20 says, and the options that it is
    r"β = ([\d.]+)": "beta",
    r"G = (\d+)": "num_generations",
    r"clip-higher \(([\d.]+)\)": "epsilon_high",
    r"up to (\d+) refills": "dynamic_sampling",
    r"\(([\de-]+) below": "epsilon",
    r"([\de-]+) above\)": "epsilon_high",
    r"every (\d+) steps": "ref_model_sync_steps",
    r"temperature ([\d.]+) for good": "sapo_temperature_pos",
    r"([\d.]+) for others": "sapo_temperature_neg",
}


def test_recipes_are_what_the_chapter_says():
    "Each number in the table of recipes is that of the config."
    cells = json.loads((ROOT / "nbs/2_run/20_options.ipynb").read_text())["cells"]
    (page,) = (
        text
        for text in ("".join(cell["source"]) for cell in cells)
        if text.startswith("## Recipes")
    )
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)", page, re.MULTILINE))
    assert list(rows) == list(RECIPES)
    found = set()
    for recipe, row in rows.items():
        config = make_config(recipe=recipe)
        for pattern, option in STATED.items():
            for number in re.findall(pattern, row):
                found.add(pattern)
                assert float(number) == getattr(config, option), (recipe, option)
        assert ("no KL" in row) == (config.beta == 0), recipe
        if "the same β and G" in row:
            first = make_config(recipe="deepseekmath")
            assert config.beta == first.beta
            assert config.num_generations == first.num_generations
        for cap in re.findall(r"\(cap (\d+)\)", row):
            assert float(cap) == 1 + config.epsilon_high
    assert found == set(STATED)


def test_only_a_cut_off_distribution_is_warned_of():
    "top_p = 1 and top_k = 0 cut nothing off, and nothing is said."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(top_p=1.0, top_k=0)
    for cut in ({"top_p": 0.99}, {"top_k": 1}):
        with pytest.warns(UserWarning, match="top_p"):
            make_config(**cut)
