"""The table of objectives is the one place: whatever names objectives reads it."""

from __future__ import annotations

import inspect
import re
from typing import get_args, get_type_hints

import pytest
import torch

from dde_ds import build_objective, config
from dde_ds.objective.links import LINKS, Link
from dde_ds.objective.losses import logistic_weight
from dde_ds.objective.profile import credit_profile
from dde_ds.objective.specs import OBJECTIVES, ObjectiveSpec
from tests.conftest import ROOT
from tests.objective.test_objective import T, predictions


def test_the_readme_lists_the_table_row_by_row():
    text = (ROOT / "dde_ds/objective/README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    found = [(name, symbol.strip(), corrected.strip(), source.strip()) for name, symbol, corrected, source in rows]
    assert found == [
        (name, spec.symbol, {True: "yes", False: "no"}[spec.corrected] if spec.needs_reference else "", spec.source)
        for name, spec in OBJECTIVES.items()
    ]


def test_the_readme_lists_the_links_row_by_row():
    text = (ROOT / "dde_ds/objective/README.md").read_text(encoding="utf-8")
    table = text.partition("| link | loss | source |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
    assert table.splitlines() == [f"| `{name}` | {link.formula} | {link.source} |" for name, link in LINKS.items()]


def test_the_configuration_takes_the_links_of_the_table():
    assert get_args(get_type_hints(config.ObjectiveConfig)["link"]) == tuple(LINKS)


@pytest.mark.parametrize("name", LINKS)
def test_guides_name_every_link(name):
    for text in (inspect.getsource(config.ObjectiveConfig), (ROOT / "launchers/recipes/sdxl_dde.yaml").read_text(encoding="utf-8")):
        assert re.search(rf"\b{name}\b", text)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_commented_recipe_names_every_objective(name):
    assert re.search(rf"\b{name}\b", (ROOT / "launchers/recipes/sdxl_dde.yaml").read_text(encoding="utf-8"))


def test_a_row_is_all_that_a_new_objective_needs(schedule, monkeypatch):
    """A gain of its own and a squared hinge for a link: loss, gradient weight and credit profile follow."""

    def ramp(schedule, discount):
        return torch.linspace(1, 2, schedule.num_train_timesteps, dtype=torch.float64)

    link = Link(lambda z, p, beta: (1 - z).clamp(min=0) ** 2, lambda z, p, beta: 2 * (1 - z).clamp(min=0), "relu(1-z)²", "here")
    monkeypatch.setitem(OBJECTIVES, "ramp", ObjectiveSpec(ramp, "1 + t/T", "here"))
    monkeypatch.setitem(LINKS, "squared", link)
    policy, reference, noise = predictions()
    objective = build_objective("ramp", schedule, beta=50.0, link="squared")
    out = objective(policy, reference, noise, T)
    out.loss.backward()

    exact = policy.detach().clone().requires_grad_()
    errors = ((exact - noise.repeat(2, 1, 1, 1)) ** 2).mean((1, 2, 3)) - ((reference - noise.repeat(2, 1, 1, 1)) ** 2).mean(
        (1, 2, 3)
    )
    z = -25.0 * ramp(schedule, 1.0)[T] * (errors[:3] - errors[3:])
    expected = (torch.relu(1 - z) ** 2).mean()
    expected.backward()
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(policy.grad, exact.grad)

    margins = torch.full((1000,), -1e-3, dtype=torch.float64)
    found = credit_profile(objective, margins)
    z = 25.0 * 1e-3 * ramp(schedule, 1.0)
    torch.testing.assert_close(found.credit, 25.0 * ramp(schedule, 1.0) * 2 * (1 - z))
    torch.testing.assert_close(found.push, 2 * (1 - z))
    assert not torch.allclose(found.push, logistic_weight(z))
