"""A method's client half is in the method's own file, and what it sends is no part of the adapter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.record import checkpoint
from fedpeft.simulations import run as runs
from fedpeft.state import AdaptedLayer, AdapterState, Rules, ServerState, Update
from fedpeft.strategies import asking, client
from fedpeft.strategies.client import ClientHalf, client_halves
from fedpeft.strategies.wire import read_update, sort_answers
from fedpeft.strategies.wrappers import atp, fedthe, krum, median, norm_clip, scaffold, wrapper

HERE = "toy_strategy_of_a_test"


class CountingClient(ClientHalf):
    """Adds 0.01 to every gradient, counts its rounds on its disk, and sends the sum of its labels."""

    sends = "sums of labels"
    alone = False

    def gradient_offset(self, visit):
        return {key: torch.full_like(value, 0.01) for key, value in visit.start.tensors.items()}

    def finish(self, visit, trained):
        rounds = visit.kept.get("toy rounds", torch.zeros(1)) + 1
        return {"toy": visit.received.extra["toy"] * 0 + float(visit.data.labels.sum())}, {"toy rounds": rounds}


class Counting(wrapper.Wrapper):
    client_half = CountingClient

    def __init__(self, inner=None):
        super().__init__(inner)

    def extra(self, server):
        return {"toy": torch.zeros(1)}

    def aggregate(self, server, updates):
        after = self.inner.aggregate(server, updates)
        seen = server.memory.get("toy", torch.zeros(1)) + sum(update.adapter.extra["toy"] for update in updates)
        return replace(after, memory={**after.memory, "toy": seen})


@pytest.fixture
def toy(monkeypatch):
    import sys
    import types

    module = types.ModuleType(HERE)
    module.Counting, Counting.__module__ = Counting, HERE
    monkeypatch.setitem(sys.modules, HERE, module)
    monkeypatch.setitem(registry.TABLES["strategies"], "counting", f"{HERE}:Counting")
    registry.table.cache_clear()
    yield
    registry.table.cache_clear()


def test_a_method_of_another_package_brings_both_halves_and_nothing_else_is_changed(toy, tiny, interrupted, tmp_path):
    tiny("whole", {"strategy.wrap": ["counting"]})
    tiny("plain", {"strategy": "fedit"})
    whole, without = (checkpoint.latest(tmp_path / name / "checkpoints") for name in ("whole", "plain"))
    assert whole.adapter.sha256() != without.adapter.sha256(), "the offset of the gradients does nothing"
    assert whole.round == 3 and float(whole.memory["toy"]) > 0

    interrupted("broken", {"strategy.wrap": ["counting"]})
    runs.resume(tmp_path / "broken")
    resumed = checkpoint.latest(tmp_path / "broken" / "checkpoints")
    assert resumed.adapter.sha256() == whole.adapter.sha256()
    assert torch.equal(resumed.memory["toy"], whole.memory["toy"])


def test_it_is_refused_under_privacy_that_does_not_cover_it(toy):
    private = {
        "privacy.noise_multiplier": 1.0,
        "strategy.weighting": "uniform",
        "strategy.wrap": ["counting"],
        "data.clients": 4,
        "client.local_steps": 2,
        "client.local_epochs": None,
    }
    for unit in ("sample", "client"):
        with pytest.raises(InputError, match="counting has clients send sums of labels"):
            configs.load({}, {**private, "privacy.unit": unit})
    configs.load({}, {**private, "privacy.unit": "sample", "strategy.wrap": ["fedprox"]})


# What travels beside an adapter is not measured, clipped or averaged as a part of it --------------------------------


def update(name, value, extra):
    adapter = AdapterState(
        {"q/A": torch.zeros(1, 1), "q/B": torch.tensor([[value]])}, {"q": AdaptedLayer("lora", (1, 1))}
    )
    return Update(name, 1.0, adapter.beside({key: torch.tensor([number]) for key, number in extra.items()}))


START = ServerState(update("start", 0.0, {}).adapter)


def test_rates_are_no_part_of_an_updates_norm_and_controls_are():
    """An adapter change of 0.5 is within a bound of 1, whatever the rate is; with a control of 3 its norm is 3.04."""
    rate = update("a", 0.5, {"rates:q/A": 3.0, "rates:q/B": 3.0, "rates:head": 3.0})
    (clipped,) = norm_clip.NormClip(atp.ATP(), bound=1.0).transform(START, [rate])
    assert float(clipped.adapter["q/B"]) == 0.5 and float(clipped.adapter.extra["rates:q/B"]) == 3.0
    control = update("a", 0.5, {"control:q/A": 0.0, "control:q/B": 3.0})
    (clipped,) = norm_clip.NormClip(scaffold.Scaffold(), bound=1.0).transform(START, [control])
    length = (0.5**2 + 3.0**2) ** 0.5
    assert float(clipped.adapter["q/B"]) == pytest.approx(0.5 / length)
    assert float(clipped.adapter.extra["control:q/B"]) == pytest.approx(3.0 / length)


@pytest.mark.parametrize(("length", "rate", "within"), [(0.5, 50.0, True), (2.0, 0.0, False)])
def test_the_bound_on_updates_does_not_see_what_travels_beside(length, rate, within):
    given = update("a", length, {"rates:q/A": rate, "rates:q/B": rate}).adapter

    class Codec:
        def read(self, *arguments):
            return given, {"num-examples": 1.0}

    rules = Rules(rounds=1, max_update_norm=1.0)

    def read(client, reply):
        return read_update(atp.ATP(), START, {"a": START.adapter}, client, reply, rules, Codec())

    answer = asking.read_or_refuse(read, "a", None)
    updates, bad = sort_answers({"a": answer})
    assert (len(updates), list(bad)) == ((1, []) if within else (0, ["a"]))
    assert within or "update norm 2 is over run.max_update_norm=1" in bad["a"]
    assert within is False or updates[0].adapter.extra == given.extra


def test_finished_adapters_have_nothing_beside_and_robust_rules_take_them_as_they_are():
    """What is inside then says why it cannot be, in its own words."""
    five = [update(name, 1.0, {}) for name in "abcde"]
    for outer in (krum.Krum(scaffold.Scaffold(), byzantine=1), norm_clip.NormClip(scaffold.Scaffold(), bound=1.0)):
        with pytest.raises(InputError, match="finished adapters have no control variates"):
            outer.offline(START, five)


def test_a_median_takes_each_of_both_by_itself():
    three = [
        update(name, value, {"rates:q/A": 0.0, "rates:q/B": rate})
        for name, value, rate in (("a", 1.0, 5.0), ("b", 2.0, -1.0), ("c", 90.0, 1.0))
    ]
    (merged,) = median.Median(atp.ATP()).transform(START, three)
    assert float(merged.adapter["q/B"]) == 2.0 and float(merged.adapter.extra["rates:q/B"]) == 1.0
    assert merged.client == "median"  # what a layer inside says of it names the statistic, not a tensor beside it


def test_krum_measures_adapters_and_what_adds_up_like_them():
    five = [
        update(name, 0.1 * index, {"control:q/A": 0.0, "control:q/B": 50.0 * (name == "e")})
        for index, name in enumerate("abcde")
    ]
    chosen = krum.Krum(scaffold.Scaffold(), byzantine=1, keep=4).transform(START, five)
    assert [one.client for one in chosen] == ["a", "b", "c", "d"]
    odd = [update(name, 9.0 * (name == "a"), {"mean:features": 50.0 * (name == "e")}) for name in "abcde"]
    chosen = krum.Krum(fedthe.FedTHE(), byzantine=1, keep=4).transform(START, odd)
    assert [one.client for one in chosen] == ["b", "c", "d", "e"]


def test_combinations_are_taken_in_either_order(tiny, tmp_path):
    config = {"data.holdout": 0.3, "run.rounds": 1}
    for name, wrap in (("atp", ["atp", "norm_clip"]), ("fedthe", ["fedthe", "median"]), ("both", ["fedthe", "atp"])):
        tiny(name, {**config, "strategy.wrap": wrap, "run.max_update_norm": 1e6})
        memory = checkpoint.latest(tmp_path / name / "checkpoints").memory
        assert any(key.startswith(("rates:", "mean:")) and value.any() for key, value in memory.items())


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_what_a_half_says_of_itself_is_so(name):
    """Whoever sends something has it in `extra`, and whoever does not, has nothing there."""
    cls = registry.load("strategies", name)
    half = client_halves(cls())[-1]
    head = AdapterState(
        {"q/A": torch.ones(1, 2), "q/B": torch.ones(3, 1), "head/weight": torch.ones(2, 3)},
        {"q": AdaptedLayer("lora", (3, 2)), "head": AdaptedLayer("head", (2, 3))},
    )
    assert bool(half.sends) == bool(cls().extra(ServerState(head)))
    assert half.sends or not (half.covered_by_dp or half.adds_up)
    own = set(cls().extra(ServerState(head)))
    assert client.names_that_add_up(cls(), ServerState(head)) == (own if half.adds_up else set())
