"""What is said of adapters is what was measured and what the checks answer: formulas of uploads, what goes together."""

from __future__ import annotations

from fractions import Fraction

import pytest

from fedpeft import config as configs
from fedpeft import registry, simulate
from fedpeft.adapters.averages import read_own
from fedpeft.adapters.peft_types import allowed_types, read_measured
from fedpeft.cli import adapter_facts, catalogue
from fedpeft.config.short_names import SHORT
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks import adapter_sizes as sizes
from fedpeft.simulations.benchmarks import own_adapters

TINY = {
    "data.limit": 60,
    "data.clients": 3,
    "client.local_steps": 1,
    "client.local_epochs": None,
    "run.baselines": False,
    "run.rounds": 1,
}
SHAPES = [{"i": i, "o": o, "r": r, "n": n} for i, o, r, n in ((8, 6, 2, 3), (6, 8, 4, 3), (12, 8, 4, 5), (9, 9, 3, 7))]
SHAPES += [{"i": 16, "o": 24, "r": 5, "n": 2}, {"i": 24, "o": 16, "r": 6, "n": 4}]


# Formulas -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (lambda i, o, r, n: r * (i + o), "r (i + o)"),
        (lambda i, o, r, n: r * i + Fraction(r * o, n), "r (o / n + i)"),
        (lambda i, o, r, n: n * r * r, "r^2 n"),
        (lambda i, o, r, n: Fraction(r * (r - 1), 2), "1/2 r (r - 1)"),
        (lambda i, o, r, n: min(i, o) + r, "r + min(i, o)"),
        (lambda i, o, r, n: -(-min(i, o) // r) * (r + min(i, o)), "ceil(min(i, o) / r) (r + min(i, o))"),
        (lambda i, o, r, n: 3, "3"),
        (lambda i, o, r, n: i * i * o, None),
        (lambda i, o, r, n: (i * 7919 + o * 31) % 97, None),
    ],
)
def test_the_shortest_sum_that_gives_all_counts_is_found_or_none_is(count, wanted):
    found = sizes.fit(["r", "n"], [(at, count(**at)) for at in SHAPES])
    assert (None if found is None else sizes.write_formula(found)) == wanted
    if found is not None:
        other = {"i": 40, "o": 30, "r": 10, "n": 6}
        assert sizes.evaluate(found, other) == count(**other)


@pytest.mark.parametrize(
    ("name", "options", "by_hand"),
    [
        ("lora", {}, lambda i, o, r: r * (i + o)),
        ("paca", {}, lambda i, o, r: r * o),
        ("sorsa", {}, lambda i, o, r: r * (i + o + 1)),
        ("nlora", {"train": "core"}, lambda i, o, r: r * r),
    ],
)
def test_what_is_written_of_ours_is_what_a_layer_sends(name, options, by_hand):
    said = next(row["upload"] for row in read_own() if (row["name"], row["options"]) == (name, options))
    formula = sizes.formula_of_own(name, options, own_adapters.find_roles(name))
    counts = [({"i": i, "o": o, "r": r}, by_hand(i, o, r)) for i, o, r in ((8, 6, 2), (6, 8, 3), (12, 8, 4), (9, 9, 3))]
    assert said == formula == sizes.write_formula(sizes.fit(["r"], counts))


@pytest.mark.parametrize(
    ("name", "wanted"), [("IA3", "o"), ("LN_TUNING", "2 i"), ("UNILORA", "theta_d_length for all layers together")]
)
def test_what_is_written_of_a_type_is_what_a_layer_sends(name, wanted):
    assert sizes.formula_of_type(name, {}) == wanted
    assert next(row["upload"] for row in read_measured() if row["type"] == name) == wanted


def test_a_formula_that_fails_at_other_shapes_is_none(monkeypatch):
    """Counts that are r (i + o) at the shapes of the fit, and elsewhere not."""
    count = sizes._count_values

    def wrong(make, roles, options, shape, layers):
        values, number = count(make, roles, options, shape, layers)
        return values + (shape in sizes.OTHERS), number

    assert sizes.formula_of_own("lora", {}, ("A", "B")) == "r (i + o)"
    monkeypatch.setattr(sizes, "_count_values", wrong)
    assert sizes.formula_of_own("lora", {}, ("A", "B")) is None


# What goes together ---------------------------------------------------------------------------------------------------


def test_settings_refuse_nothing_that_lora_can_have():
    """So what an adapter is refused, it is refused for its own sake."""
    found = adapter_facts.find_companions({"name": "lora"})
    names = registry.names("strategies")
    wraps = {name for name in names if registry.load("strategies", name).wraps}
    own = {name for name in names if registry.load("strategies", name).adapter == "lora_sb"}
    assert set(found["strategies"]) == {*names} - wraps - own and set(found["wrappers"]) == wraps
    assert found["privacy"] == ["sample", "client"] and {"fedit", "fedsvd"} <= {*found["secure aggregation"]}
    assert {"coso", "sequential"} <= {*found["sequences of tasks"]}


def test_what_is_said_to_go_together_is_what_the_checks_answer():
    paca = catalogue.describe("adapters/paca")["works_with"]
    assert paca == adapter_facts.find_companions({"name": "paca"})
    assert paca["strategies"] == ["fedit", "flower"] and paca["sequences of tasks"] == []
    with pytest.raises(InputError):
        configs.load({"adapter": "paca", "strategy": "fedsvd"})
    assert "sample" in catalogue.describe("tuners/ia3")["works_with"]["privacy"]
    assert catalogue.describe("tuners/pvera")["works_with"]["privacy"] == ["client"]  # it draws noise in its forward


@pytest.mark.parametrize(("adapter", "wrapper"), [("paca", "krum"), ("svfit", "fedadam"), ("ia3", "median")])
def test_a_pair_that_is_said_to_go_together_runs(adapter, wrapper, tmp_path):
    found = catalogue.describe(adapter)["works_with"]
    assert wrapper in found["wrappers"]
    done = simulate(
        {"adapter": adapter, "strategy": {"name": found["strategies"][0], "wrap": [wrapper]}},
        {**TINY, "data.clients": 8, "data.limit": 160, "data.partition": {"name": "iid"}},
        out=tmp_path / "run",
    )
    assert done["rounds"] == 1


# What is shown --------------------------------------------------------------------------------------------------------


def test_every_type_and_short_name_is_a_tuner_and_every_adapter_says_what_was_measured():
    assert {*adapter_facts.tuner_names()} == {name.lower() for name in allowed_types()} | {*SHORT}
    about = catalogue.describe("dora")
    assert about["notes"] == [
        "adapter=dora is adapter.name=peft adapter.type=LORA adapter.options.use_dora=true"
    ] and about["measured"] == [row for row in read_measured() if row["options"] == {"use_dora": True}]
    for name in set(registry.names("adapters")) - {"peft"}:
        assert catalogue.describe(f"adapters/{name}")["measured"], name
