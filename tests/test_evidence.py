"""Evidence: the statistics against enumeration, the probe against counting, and
results that are kept and not made twice."""

import json
import math
from dataclasses import replace
from itertools import combinations, product
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_nb.evidence import statistics
from grpo_nb.evidence.statistics import (
    Claim,
    Comparison,
    Finding,
    decide,
    difference,
    interval,
    iqm,
    paired_difference,
    pass_at_k,
    plot_pairs,
    plot_summary,
    probe,
    read_metrics,
    summarise,
    verdicts,
)
from grpo_nb.engine.data import load_task

GAIN = Finding("y", "gain", 0.1, 0.05, 0.2, at_least=0.02)
numbers = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12)


@given(numbers)
def test_the_interquartile_mean_is_the_mean_of_the_middle(x):
    cut = len(x) // 4
    assert np.isclose(iqm(x), np.mean(sorted(x)[cut : len(x) - cut]), atol=1e-9)
    assert np.allclose(iqm(np.stack([x, x])), iqm(x)) and np.allclose(
        iqm(np.stack([x, x], 1), axis=0), iqm(x)
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_an_interval_is_that_of_all_resamples(x):
    """Four numbers have 256 resamples with replacement: the quantiles of all of
    them, no draw at random."""
    every = np.sort([iqm(resample) for resample in product(x, repeat=4)])
    low, high = interval(x)
    assert (
        every[2] - 1e-9 <= low <= every[11] + 1e-9
        and every[-12] - 1e-9 <= high <= every[-3] + 1e-9
    )  # 2.5 % of 256 is the 6th or 7th
    assert (low, high) == interval(x)


def test_an_interval_redraws_each_sample_on_its_own():
    """The gap of two constants is certain; the mean of both together would not be,
    if they were drawn as one."""
    assert difference([3.0] * 5, [1.0] * 4) == (2.0, 2.0, 2.0)
    both = lambda a, b, axis=-1: (a.mean(axis) + b.mean(axis)) / 2
    assert interval([0.0] * 3, [1.0] * 3, statistic=both) == (0.5, 0.5)


def test_one_run_has_no_interval():
    assert all(map(np.isnan, interval([0.5]))) and np.isnan(
        difference([1.0], [0.0, 0.0])[1]
    )


def pairs(min_size=2, max_size=9):
    "Two settings of as many seeds."
    pair = st.tuples(st.floats(-9, 9), st.floats(-9, 9))
    return st.lists(pair, min_size=min_size, max_size=max_size)


# Two-sided 95 % quantiles of Student's t as tables print them, by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 4: 2.776, 7: 2.365, 15: 2.131, 30: 2.042}


@pytest.mark.parametrize("freedom, quantile", STUDENT.items())
def test_a_paired_interval_is_students(freedom, quantile):
    n = freedom + 1
    first = [math.sin(i) for i in range(n)]
    second = [math.cos(3 * i) for i in range(n)]
    differences = [a - b for a, b in zip(first, second)]
    half = quantile * stdev(differences) / math.sqrt(n)
    found = paired_difference(first, second)
    assert found.effect == pytest.approx(fmean(differences))
    assert found.sd == pytest.approx(stdev(differences)) and found.n == n
    assert found.high - found.effect == pytest.approx(half, rel=3e-4)
    assert found.effect - found.low == pytest.approx(half, rel=3e-4)


@settings(max_examples=50, deadline=None)
@given(pairs(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_a_paired_interval_is_scipys(both, level):
    from scipy.stats import ttest_rel

    first, second = np.array(both).T
    found = paired_difference(first, second, level)
    if found.sd > 1e-6:
        expected = ttest_rel(first, second).confidence_interval(level)
        assert np.allclose([found.low, found.high], expected)
    else:
        assert np.allclose([found.low, found.high], found.effect, atol=1e-4)


def test_three_pairs_have_a_bootstrap_interval_from_the_lowest_to_the_highest():
    "One resample of 27 is three times the lowest: more than 2.5 %."
    found = paired_difference([1.0, 5.0, 9.0], [1.0, 3.0, 2.0])
    assert (found.boot_low, found.boot_high) == (0.0, 7.0)


@settings(max_examples=20, deadline=None)
@given(pairs(4, 4))
def test_a_paired_bootstrap_is_that_of_all_resamples(both):
    "The pairs are redrawn, not the two settings: of four pairs there are 256 ways."
    first, second = np.array(both).T
    every = np.sort([np.mean(x) for x in product(first - second, repeat=4)])
    found = paired_difference(first, second)
    assert every[2] - 1e-9 <= found.boot_low <= every[11] + 1e-9
    assert every[-12] - 1e-9 <= found.boot_high <= every[-3] + 1e-9


def test_differences_alone_are_pairs_with_nothing():
    first, second = np.array([0.3, 0.5, 0.9]), np.array([0.1, 0.6, 0.2])
    assert paired_difference(first - second) == paired_difference(first, second)
    with pytest.raises(ValueError, match="must be finite"):
        paired_difference([0.1, float("nan")])


def test_what_both_settings_share_cancels():
    "A seed's own effect is in both, however large it is."
    first, second = np.array([0.1, 0.3, 0.2]), np.array([0.2, 0.2, 0.2])
    shared = np.array([1.0, -2.0, 4.0])
    plain = paired_difference(first, second)
    moved = paired_difference(first + shared, second + shared)
    assert np.allclose(ends(plain), ends(moved))


def ends(found):
    "The four ends, in order."
    return [found.low, found.high, found.boot_low, found.boot_high]


@settings(max_examples=30, deadline=None)
@given(pairs())
def test_the_settings_the_other_way_round_turn_the_sign(both):
    first, second = np.array(both).T
    found = ends(paired_difference(first, second))
    other = ends(paired_difference(second, first))
    turned = [-other[1], -other[0], -other[3], -other[2]]
    # quantiles between two resamples: the bootstrap may round to the other one
    assert np.allclose(found, turned, atol=1e-6)


def test_how_often_the_intervals_of_three_pairs_are_right():
    """For normal numbers Student's is right in 95 % of all cases. The bootstrap's ends
    are the lowest and the highest of three: wrong where all lie on one side of the
    truth, in 2 of 8 cases."""
    rng, experiments = np.random.default_rng(0), 400
    right = np.zeros(2)
    for _ in range(experiments):
        found = paired_difference(rng.normal(size=3), np.zeros(3))
        right += [found.low <= 0 <= found.high, found.boot_low <= 0 <= found.boot_high]
    for counted, share in zip(right / experiments, (0.95, 0.75)):
        error = math.sqrt(share * (1 - share) / experiments)
        assert abs(counted - share) < 4 * error


def compared(low, high):
    "A comparison with these ends."
    middle = (low + high) / 2
    return Comparison(middle, low, high, low, high, sd=1.0, n=5, level=0.95)


@pytest.mark.parametrize(
    "low, high, margin, expected",
    [
        (0.03, 0.05, 0.02, "higher"),
        (-0.05, -0.03, 0.02, "lower"),
        (-0.01, 0.02, 0.02, "equal within the margin"),
        (0.001, 0.019, 0.02, "equal within the margin"),
        (0.01, 0.03, 0.02, "undecided"),
        (-0.03, -0.01, 0.02, "undecided"),
        (-0.1, 0.1, 0.02, "undecided"),
        (0.02, 0.03, 0.02, "undecided"),
        (0.001, 0.01, 0, "higher"),
        (-0.01, -0.001, 0, "lower"),
        (-0.01, 0.01, 0, "undecided"),
        (0.0, 0.0, 0, "equal within the margin"),
    ],
)
def test_a_decision_is_the_part_that_holds_the_interval(low, high, margin, expected):
    assert compared(low, high).decide(margin) == expected


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_decision_holds_for_every_number_of_the_interval(low, width, margin):
    found = compared(low, low + width)
    where = {
        "higher"
        if x > margin
        else "lower"
        if x < -margin
        else "equal within the margin"
        for x in (found.low, found.effect, found.high)
    }
    (only,) = where if len(where) == 1 else ["undecided"]
    assert found.decide(margin) == only


def test_one_pair_has_an_effect_and_decides_nothing():
    found = paired_difference([0.5], [0.25])
    assert found.effect == 0.25 and all(map(math.isnan, [found.sd, *ends(found)]))
    assert found.decide(0) == found.decide(1) == "undecided"


@pytest.mark.parametrize(
    "first, second, message",
    [
        ([], [], "first and second.*one number per seed"),
        ([1.0], [1.0, 2.0], r"first and second.*\(1,\) and \(2,\)"),
        ([1.0, 2.0, 3.0], [1.0], r"first and second.*\(3,\) and \(1,\)"),
        (1.0, 2.0, "first and second"),
        ([[1.0]], [[2.0]], "first and second"),
        ([1.0, math.nan], [1.0, 2.0], "first and second.*nan and 2.0 as pair 1"),
        ([1.0, 2.0], [math.inf, 2.0], "first and second.*1.0 and inf as pair 0"),
    ],
)
def test_what_is_no_pair_is_refused(first, second, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(first, second)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, math.nan])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="level"):
        paired_difference([1.0, 2.0], [0.0, 0.0], level)


@pytest.mark.parametrize("margin", [-0.01, math.nan, math.inf])
def test_a_margin_is_a_width(margin):
    with pytest.raises(ValueError, match="margin"):
        compared(0, 1).decide(margin)


def test_pairs_are_formed_by_position():
    "The index of a table's column is of no account, as it says nothing of seeds."
    first = pd.Series([3.0, 4.0], index=[0, 1])
    second = pd.Series([1.0, 1.0], index=[1, 2])
    assert paired_difference(first, second).effect == 2.5
    assert (
        str(paired_difference(first, second)) == "+2.5 [-3.85, +8.85] (t, 95 %, n = 2)"
    )


def test_a_picture_of_pairs_shows_every_seed():
    import matplotlib.pyplot as plt

    axes = plt.subplots(1, 2)[1]
    first = pd.Series([3.0, 5.0, 4.0], index=[4, 5, 6])
    found = plot_pairs(axes, first, [2.0, 2.0, 2.0], ("a", "b"), margin=0.5)
    assert [list(line.get_ydata()) for line in axes[0].lines] == [
        [3, 2],
        [5, 2],
        [4, 2],
    ]
    drawn = [list(line.get_xdata()) for line in axes[1].lines]
    assert [1.0, 3.0, 2.0] in drawn and [found.low, found.high] in drawn
    assert [found.boot_low, found.boot_high] in drawn
    assert found == paired_difference(first, [2.0, 2.0, 2.0])
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["a", "b"]
    plt.close("all")


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))
    )
)
def test_pass_at_k_is_that_of_all_draws(sizes):
    n, c, k = sizes
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert np.isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("n, c, k", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_pass_at_k_refuses_what_cannot_be(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


def test_summarise_groups_by_one_column_or_several():
    table = pd.DataFrame(
        {"a": ["x", "x", "y", "y"], "b": [1, 1, 2, 2], "value": [0.0, 1.0, 5.0, 5.0]}
    )
    found = summarise(table, ["a", "b"], "value")
    assert found.loc[("y", 2)].tolist() == [2, 5.0, 5.0, 5.0] and found.loc[
        ("x", 1), ["low", "iqm", "high"]
    ].tolist() == [0.0, 0.5, 1.0]


def test_a_picture_shows_every_configuration():
    import matplotlib.pyplot as plt

    table = pd.DataFrame(
        {
            "step": [0, 10] * 4,
            "name": ["p", "p", "p", "p", "g", "g", "g", "g"],
            "value": [0.0, 1, 0.2, 0.9, 0.1, 0.5, 0.1, 0.7],
        }
    )
    lines, points = plt.subplots(1, 2)[1]
    plot_summary(lines, table, "step", "value", by="name")
    plot_summary(points, table, "name", "value")
    assert [line.get_ydata().round(2).tolist() for line in lines.lines] == [
        [0.1, 0.95],
        [0.1, 0.6],
    ]
    assert (
        len(
            {
                (line.get_color(), line.get_marker(), line.get_linestyle())
                for line in lines.lines
            }
        )
        == 2
    )
    assert [label.get_text() for label in points.get_xticklabels()] == ["p", "g"]
    plt.close("all")


def test_the_probe_counts(monkeypatch):
    "Four answers to each of two numbers: what they are, is written down here."
    task = load_task("target")
    queries = task.queries("heldout", 2)
    a, b = (int(query.columns["answer"]) for query in queries)
    answers = [
        f"{a - 1}+1",
        f"{a - 2}+2",
        f"{a - 1}+1",
        "1+",
        f"{b}",
        "1+",
        "1+",
        "1+",
    ]  # three right ones, two of them alike; none
    monkeypatch.setattr(
        statistics, "sample", lambda *_, **__: SimpleNamespace(completions=answers)
    )
    policy = SimpleNamespace(device="cpu")
    assert probe(policy, None, task, n=2, k=4) == {
        "accuracy": 3 / 8,
        "pass_at_4": 0.5,
        "pass_at_k": 0.5,
        "distinct_right": 1.0,
        "distinct": 2.5,
    }


def test_the_metrics_of_a_sweep(tmp_path):
    """Step 0 from the accuracy before training, each second step and the last; a
    failed run is left out."""
    lines = [
        {
            "step": s,
            "num_completions": 8 * s,
            "eval/accuracy": s / 10 if s == 3 else None,
        }
        | ({"eval/initial_accuracy": 0.05} if s == 1 else {})
        for s in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    runs = pd.DataFrame(
        [
            {
                "beta": 0.1,
                "seed": 7,
                "directory": str(tmp_path),
                "seconds": 2.5,
                "error": None,
            },
            {
                "beta": 0.2,
                "seed": 7,
                "directory": str(tmp_path),
                "seconds": 1.0,
                "error": "it burnt",
            },
        ]
    )
    table = read_metrics(runs, ["num_completions", "eval/accuracy"], every=2)
    assert table.columns.tolist() == [
        "run",
        "beta",
        "seed",
        "seconds",
        "step",
        "num_completions",
        "eval/accuracy",
    ]
    assert (
        table["step"].tolist() == [0, 2, 3]
        and table["num_completions"].tolist() == [0, 16, 24]
        and set(table["beta"]) == {0.1}
    )
    assert np.allclose(table["eval/accuracy"][::2], [0.05, 0.3]) and np.isnan(
        table["eval/accuracy"][1]
    )
    assert str(tmp_path) not in table.to_csv()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    "A folder that looks like a checkout."
    (tmp_path / "benchmarks/claims").mkdir(parents=True)
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    return tmp_path


def test_a_table_is_made_once_and_read_as_it_was_kept(checkout):
    made = []

    def make():
        made.append(1)
        return pd.DataFrame({"run": [0, 1], "seconds": [1.0, 2.0], "x": [1 / 3, None]})

    with pytest.raises(
        ValueError, match=r"benchmarks/claims/01_x_runs\.csv is not there yet.*rerun"
    ):
        Claim("01_x", "x").table("runs", make)
    first = Claim("01_x", "x", rerun=True).table("runs", make)
    assert Claim("01_x", "x").table("runs", make).equals(first) and len(made) == 1
    assert first["x"].tolist()[0] == 0.333333
    found = verdicts(checkout / "benchmarks/claims")
    assert found.loc["01_x", ["runs", "seconds", "verdict"]].tolist() == [2, 3, None]


def test_a_table_says_what_it_was_made_with(checkout):
    "Versions, and the threads of the process: other threads, other last digits."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Claim("01_x", "x", rerun=True).table("runs", lambda: pd.DataFrame({"a": [1]}))
    finally:
        torch.set_num_threads(threads)
    noted = json.loads((checkout / "benchmarks/claims/01_x.json").read_text())
    facts = noted["tables"]["runs"]
    assert facts["threads"] == 1 and facts["torch"] == torch.__version__
    assert {"transformers", "grpo_nb", "python"} <= set(facts)


def test_a_table_of_many_runs_goes_on_where_it_was(checkout):
    """A run whose rows are kept is not made again, in a later table either; what
    fails leaves nothing behind."""
    claim, made = Claim("00_x", "x", rerun=True), []

    def rows(seed):
        made.append(seed)
        if made == [0, 1]:
            raise KeyboardInterrupt
        return pd.DataFrame({"step": [1, 2], "right": [seed, 0.1 + 0.2]})

    def runs():
        return pd.concat(
            [
                claim.kept(f"seed={seed}", lambda: rows(seed)).assign(run=seed)
                for seed in (0, 1, 2)
            ]
        )

    with pytest.raises(KeyboardInterrupt):
        claim.table("runs", runs)
    table = claim.table("runs", runs)
    assert (
        made == [0, 1, 1, 2]
        and table["right"].tolist() == [0, 0.3, 1, 0.3, 2, 0.3]
        and {"run", "seconds"} <= set(table)
    )
    assert sorted(path.name for path in claim.directory.iterdir()) == [
        "seed=0.csv",
        "seed=1.csv",
        "seed=2.csv",
    ]


def test_a_smoke_run_keeps_nothing(checkout):
    Claim("01_x", "x", rerun=True).conclude([GAIN], "because", "do")
    before = {
        path: path.read_bytes()
        for path in (checkout / "benchmarks").rglob("*")
        if path.is_file()
    }
    small = Claim("01_x", "x", smoke=True)
    small.table("runs", lambda: pd.DataFrame({"x": [1]}))
    small.conclude([replace(GAIN, at_least=0.3)], "since", "leave")
    assert {
        path: path.read_bytes()
        for path in (checkout / "benchmarks").rglob("*")
        if path.is_file()
    } == before


def test_an_unchanged_verdict_does_not_touch_its_file(checkout, capsys):
    claim = Claim("01_x", "x", rerun=True)
    findings = [GAIN, replace(GAIN, condition="z", at_least=0.3)]
    claim.conclude(findings, "because", "do")
    path = checkout / "benchmarks/claims/01_x.json"
    stamp = path.stat().st_mtime_ns
    Claim("01_x", "x").conclude(findings, "because", "do")
    assert path.stat().st_mtime_ns == stamp
    assert capsys.readouterr().out.startswith(
        "Verdict: holds when y; does not hold when z\n\n"
        "y: gain 0.1 [0.05, 0.2], claimed ≥ 0.02 — holds\n"
    )
    with pytest.raises(ValueError, match="findings=\\[\\] decides nothing"):
        claim.conclude([], "", "")


def test_the_rule_of_verdicts():
    """Inside of what is claimed, wholly outside, across an edge; both edges count, and
    what is not known decides nothing."""

    def verdict(low, high, **region):
        return Finding("", "", (low + high) / 2, low, high, **region).verdict

    for low, high, word in (
        (0.021, 0.4, "holds"),
        (0.02, 0.4, "holds"),
        (-0.02, 0.002, "does not hold"),
        (-0.4, 0.0199, "does not hold"),
        (0.0199, 0.4, "undecided"),
        (-0.4, 0.4, "undecided"),
        (float("nan"), float("nan"), "undecided"),
    ):
        assert verdict(low, high, at_least=0.02) == word
        assert verdict(-high, -low, at_most=-0.02) == word  # its mirror image
    band = {"at_least": 0.45, "at_most": 0.55}
    assert verdict(0.46, 0.54, **band) == "holds"
    assert verdict(0.44, 0.54, **band) == verdict(0.46, 0.56, **band) == "undecided"
    assert verdict(0.56, 0.9, **band) == verdict(0, 0.4, **band) == "does not hold"
    with pytest.raises(ValueError, match="at_least or at_most"):
        verdict(0, 1)
    with pytest.raises(ValueError, match="low=1 is above high=0"):
        verdict(1, 0, at_least=0)


@given(
    st.floats(allow_infinity=True),
    st.floats(allow_infinity=True),
    st.none() | st.floats(-9, 9),
    st.none() | st.floats(-9, 9),
)
def test_a_verdict_is_one_of_three_and_needs_its_side(low, high, at_least, at_most):
    "Whatever the interval; a wider one never decides what a narrower one left open."
    region = {"at_least": at_least, "at_most": at_most}
    if at_least is at_most is None or low > high:
        with pytest.raises(ValueError, match="at_least or at_most|is above"):
            Finding("", "", low, low, high, **region)
        return
    found = Finding("x", "", low, low, high, **region)
    assert found.verdict in ("holds", "does not hold", "undecided")
    assert decide([found]) == found.verdict and str(found)
    wider = Finding("x", "", low, low - 1, high + 1, **region)
    assert wider.verdict in (found.verdict, "undecided")
    if found.verdict == "does not hold":
        below = at_least is not None and high < at_least
        assert below or (at_most is not None and low > at_most)


def test_a_verdict_names_its_conditions():
    "One condition needs all of its findings; several that agree need no name."
    yes, no = GAIN, replace(GAIN, at_least=0.3)
    open_ = replace(GAIN, at_least=0.07)
    z = {"condition": "z"}
    assert decide([yes]) == decide([yes, replace(yes, **z)]) == "holds"
    assert decide([yes, open_]) == "undecided"
    assert decide([yes, open_, no]) == decide([no, replace(no, **z)]) == "does not hold"
    assert decide([replace(open_, **z), yes]) == "holds when y; undecided when z"
    w = replace(no, condition="w")
    assert decide([replace(yes, **z), yes, w]) == (
        "holds when z or y; does not hold when w"
    )


def test_of_several_effects_the_one_nearest_to_the_edge_is_shown(checkout):
    "In any order: a line for each condition, and in brief one for each verdict."
    near = replace(GAIN, what="less", effect=0.04, low=0.03)
    band = Finding("z", "share", 0.5, 0.4, 0.6, at_least=0.3, at_most=0.61)
    apart = [replace(band, what="rest", at_most=None), band]
    missed = Finding("w", "lost", -0.0912345, -0.2, -0.05, at_least=-0.02)
    further = replace(missed, what="lost more", high=-0.06)
    for order in (1, -1):
        findings = [GAIN, near, *apart, further, missed][::order]
        Claim("01_x", "x", rerun=True).conclude(findings, "because", "do")
        found = verdicts(checkout / "benchmarks/claims").loc["01_x"]
        assert sorted(found["headlines"]) == [
            "**does not hold** when w: lost -0.0912 [-0.2, -0.05], claimed ≥ -0.02",
            "**holds** when y: less 0.04 [0.03, 0.2], claimed ≥ 0.02 (and 1 more)",
            "**holds** when z: share 0.5 [0.4, 0.6], claimed ≥ 0.3 and ≤ 0.61 "
            "(and 1 more)",
        ]
        parts = [
            "y: 0.04 [0.03, 0.2], ≥ 0.02 (and 1 more)",
            "z: 0.5 [0.4, 0.6], ≥ 0.3 and ≤ 0.61 (and 1 more)",
        ]
        assert found["in_brief"] == [
            f"**holds** when {'; '.join(parts[::order])}",
            "**does not hold** when w: -0.0912 [-0.2, -0.05], ≥ -0.02",
        ]


def test_nothing_known_is_no_reason_to_fail(checkout):
    "An effect that is not known is undecided, and shown as it is."
    unknown = Finding("y", "gain", *[float("nan")] * 3, at_least=0.02)
    Claim("01_x", "x", rerun=True).conclude([unknown, GAIN], "because", "do")
    found = verdicts(checkout / "benchmarks/claims").loc["01_x"]
    assert found["in_brief"] == ["**undecided** when y: nan [nan, nan], ≥ 0.02"]


def test_a_verdict_that_its_findings_do_not_give_is_damage(checkout):
    Claim("01_x", "x", rerun=True).conclude([GAIN], "because", "do")
    path = checkout / "benchmarks/claims/01_x.json"
    noted = json.loads(path.read_text())
    assert verdicts(path.parent).loc["01_x", "findings"] == [GAIN]
    path.write_text(json.dumps(noted | {"verdict": "does not hold"}))
    with pytest.raises(ValueError, match="01_x.json is damaged.*decide: holds"):
        verdicts(path.parent)


def test_a_failed_cell_is_fatal_in_a_smoke_run_only(checkout, monkeypatch):
    monkeypatch.setattr(
        statistics,
        "sweep",
        lambda *_: pd.DataFrame(
            {
                "directory": ["a", "b"],
                "seconds": [1, 1],
                "error": [None, "ValueError: no"],
            }
        ),
    )
    assert len(Claim("01_x", "x", rerun=True).sweep([{}])) == 2
    with pytest.raises(RuntimeError, match="01_x: ValueError: no"):
        Claim("01_x", "x", smoke=True).sweep([{}])


def test_outside_a_checkout_there_is_nowhere_to_keep_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any((folder / "benchmarks/claims").exists() for folder in tmp_path.parents):
        pytest.skip("the temporary folder lies in a checkout")
    with pytest.raises(ValueError, match="no benchmarks/claims"):
        Claim("01_x", "x")
