"""The interactive pictures of the chapters: what their specifications compute is
what the library computes, at several slider positions."""

import copy
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from grpo_nb.figure import draw_chart, draw_figure
from grpo_nb.gae import gae
from grpo_nb.group import group_advantages
from grpo_nb.objective import policy_loss
from grpo_nb.reference import kl
from helpers import ROOT

vl_convert = pytest.importorskip(
    "vl_convert", reason='vl-convert-python is missing (in the extra "notebooks")'
)

VEGALITE = "application/vnd.vegalite.v5+json"
VERSIONS = ["5.8", "6.4"]  # near those of JupyterLab 4 (5.6) and of the site (6.4)


def specification(chapter):
    """The one interactive picture of a chapter, as saved; static ones for where
    nothing can move are beside it."""
    cells = json.loads((ROOT / f"nbs/1_figure/{chapter}.ipynb").read_text())["cells"]
    (data,) = [
        output["data"]
        for cell in cells
        for output in cell.get("outputs", [])
        if VEGALITE in output.get("data", {})
    ]
    assert (
        "".join(data["image/svg+xml"]).startswith("<svg")
        and data[VEGALITE]["description"]
    )
    return data[VEGALITE]


def marks(chapter, version, **sliders):
    """Draw it with the sliders at these positions; the data of each mark, as a
    screen reader is told them."""
    spec = copy.deepcopy(specification(chapter))
    params = {param["name"]: param for param in spec["params"]}
    for name, value in sliders.items():
        assert params[name]["bind"]["min"] <= value <= params[name]["bind"]["max"]
        params[name]["value"] = value
    labels = re.findall(
        r'aria-label="([^"]*)"', vl_convert.vegalite_to_svg(spec, vl_version=version)
    )
    return [
        dict(part.split(": ", 1) for part in label.split("; ") if ": " in part)
        for label in labels
    ]


def column(rows, key):
    """The numbers of a key. Each is there twice, for the bar and for what is written
    on it."""
    values = [float(row[key].replace("−", "-")) for row in rows if key in row]
    bars, written = values[: len(values) // 2], values[len(values) // 2 :]
    assert bars == written and bars
    return torch.tensor(bars, dtype=torch.float64)


def close(a, b):
    return torch.allclose(a, b.to(a.dtype), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "rewards, V",
    [
        ((1, 0, 0, 1, 0, 0), 0.5),
        ((0.7,) * 6, 0.2),
        ((0.05, 0, 0, 0, 0, 0), 0),
        ((0.3, 0.9, 0.15, 1, 0.55, 0.4), 0.35),
    ],
)
def test_group(rewards, V, version):
    rows = marks(
        "09_group", version, V=V, **{f"r{i}": r for i, r in enumerate(rewards, 1)}
    )
    r = torch.tensor(rewards, dtype=torch.float64)
    assert close(column(rows, "reward"), r)
    assert close(column(rows, "grpo"), group_advantages(r, 6))
    assert close(column(rows, "dr_grpo"), group_advantages(r, 6, scale_rewards="none"))
    assert close(
        column(rows, "rloo"),
        group_advantages(r, 6, scale_rewards="none", baseline="leave_one_out"),
    )
    of_one_token = gae(
        r[:, None],
        torch.full((6, 1), V, dtype=torch.float64),
        torch.ones(6, 1, dtype=torch.bool),
    )[0]
    assert close(column(rows, "ppo"), of_one_token[:, 0])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "gamma, lam, reward",
    [(1, 0.95, 1), (1, 0, 1), (1, 1, 0), (0.9, 0.5, 1), (0, 0.7, 0.4)],
)
def test_gae(gamma, lam, reward, version):
    rows = marks("08_gae", version, gamma=gamma, reward=reward, **{"lambda": lam})
    values = torch.tensor(
        [[float(row["V"]) for row in rows if "V" in row]], dtype=torch.float64
    )
    assert values.shape == (1, 8)
    rewards = torch.tensor([[0.0] * 7 + [reward]], dtype=torch.float64)
    everything = torch.ones(1, 8, dtype=torch.bool)
    A, R = gae(rewards, values, everything, gamma, lam)
    assert close(column(rows, "A"), A[0]) and close(column(rows, "R"), R[0])
    assert close(
        column(rows, "delta"), gae(rewards, values, everything, gamma, 0)[0][0]
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    "ratio, epsilon",
    [(1.5, 0.2), (0.5, 0.2), (1, 0.2), (1.25, 0.3), (2.5, 0.01), (0.01, 0.6)],
)
def test_objective(ratio, epsilon, version):
    rows = marks("10_objective", version, ratio=ratio, epsilon=epsilon)
    shown = [
        float(row["value"].replace("−", "-"))
        for row in rows
        if "value" in row and float(row.get("rho", 0)) == ratio
    ]  # not the line, from 0 on
    expected = []
    for A in (1.0, -1.0):
        log_rho = torch.tensor([[ratio]], dtype=torch.float64).log().requires_grad_()
        loss, _ = policy_loss(
            log_rho,
            torch.zeros_like(log_rho),
            torch.tensor([A]).double(),
            torch.ones(1, 1, dtype=torch.bool),
            epsilon,
        )
        loss.sum().backward()
        expected.append((-loss.item(), -log_rho.grad.item() / ratio))
    (good, good_gradient), (bad, bad_gradient) = expected
    in_order = [
        x for x in (good, bad, good_gradient, bad_gradient) for _ in range(2)
    ]  # the mark, and what is written on it
    assert close(
        torch.tensor(shown, dtype=torch.float64),
        torch.tensor(in_order, dtype=torch.float64),
    )


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("moved", [0, 0.1, 0.5, 1, 1.6])
def test_kl(moved, version):
    data = specification("05_reference")
    (tokens,) = (
        [rows for rows in data["datasets"].values()]
        if "datasets" in data
        else [data["data"]["values"]]
    )
    p, q = (
        torch.tensor([token[key] for token in tokens], dtype=torch.float64)
        for key in "pq"
    )
    policy = (q + moved * (p - q)).log_softmax(0)
    rows = marks("05_reference", version, moved=moved)
    shown = {
        of: torch.tensor(
            [float(row["probability"]) for row in rows if row.get("of") == of],
            dtype=torch.float64,
        )
        for of in ("policy", "reference")
    }
    assert close(shown["policy"], policy.exp()) and close(shown["reference"], q.exp())
    exact = (policy.exp() * (policy - q)).sum()
    assert all(
        abs(float(row["exact"]) - exact) < 1e-9 for row in rows if "exact" in row
    )
    for k in ("k1", "k2", "k3"):
        mean = (policy.exp() * kl(policy, q, k)).sum()
        std = (policy.exp() * (kl(policy, q, k) - mean).square()).sum().sqrt()
        row = next(row for row in rows if row.get("estimator") == k and "high" in row)
        low, high = (float(row[key].replace("−", "-")) for key in ("nats", "high"))
        assert (
            abs((low + high) / 2 - mean) < 1e-9 and abs((high - low) / 2 - std) < 1e-9
        )


CHAPTERS = ["05_reference", "08_gae", "09_group", "10_objective"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chart_is_drawn_as_png(chapter):
    "Two pixels for one of the SVG, on white, and few bytes."
    chart = draw_chart(specification(chapter))
    data, shown = chart._repr_png_()
    assert f'width="{shown["width"]}" height="{shown["height"]}"' in str(chart)
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (2 * shown["width"], 2 * shown["height"])
    assert len(data) < 40_000
    pixels = np.asarray(picture.convert("RGBA")).reshape(-1, 4)
    assert pixels[:, 3].min() > 250  # no black letters on a dark page
    assert 0.5 < (pixels > 250).all(1).mean() < 0.99


def test_what_is_no_chart_is_refused():
    with pytest.raises(ValueError):
        draw_chart({"mark": "no such mark"})


@pytest.mark.parametrize("algorithm", [None, "ppo", "grpo"])
def test_the_figure_is_drawn_as_png(algorithm):
    """As large as the SVG says, with its colours: the boxes of trained and of frozen
    models are yellow and blue."""
    figure = draw_figure(algorithm)
    data, shown = figure._repr_png_()
    assert data == figure._repr_png_()[0]
    assert f'width="{shown["width"]}" height="{shown["height"]}"' in str(figure)
    picture = Image.open(io.BytesIO(data))
    assert picture.width > 1.4 * shown["width"] and len(data) < 60_000
    pixels = np.asarray(picture.convert("RGBA").convert("RGB"), dtype=int).reshape(
        -1, 3
    )
    for fill in re.findall(
        r'class="(?:trained|frozen)"><rect[^>]*fill="#(\w+)"', str(figure)
    )[:2]:
        colour = [int(fill[i : i + 2], 16) for i in (0, 2, 4)]
        assert (np.abs(pixels - colour).max(1) < 6).mean() > 0.005


def test_the_figure_needs_no_drawer(monkeypatch):
    "Without vl-convert, which only the notebooks need, the SVG is left."
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert draw_figure()._repr_png_() is None
    assert draw_figure()._repr_svg_().startswith("<svg")
