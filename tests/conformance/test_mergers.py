"""Every merger of the registry: what it must tell, and what holds for any of them."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.errors import InputError
from fedpeft.merging.base import make, merge
from fedpeft.state import AdaptedLayer, AdapterState, StateMismatch
from support.methods import MADE, NUMBERS, adapter

NAMES = registry.names("mergers")


def number(name, index):
    return NUMBERS[name][index] if name in NUMBERS else None


def change(state, site):
    return state.sites[site].scaling * state[f"{site}/B"].double() @ state[f"{site}/A"].double()


@pytest.mark.parametrize("name", NAMES)
def test_a_merger_documents_itself_and_knows_no_other(name):
    cls = registry.load("mergers", name)
    assert len((inspect.getdoc(cls) or "").splitlines()[0]) > 10 and "arXiv" in cls.paper
    assert ">>>" in (inspect.getmodule(cls).__doc__ or "")
    for option, item in configs.options_of(cls).items():
        assert item.metadata.get("help"), f"{name}.{option} has no meaning"
    text = Path(inspect.getfile(cls)).read_text()
    assert text.count("fedpeft.merging.") == text.count("fedpeft.merging.base"), "imports another method"
    with pytest.raises(InputError, match="no_such_option"):
        make(name, {"no_such_option": 1})


@pytest.mark.parametrize("name", NAMES)
def test_over_time_it_is_the_same_as_at_once_also_when_saved_between(name):
    """The state goes through JSON and safetensors after every adapter, and neither it nor the adapter is changed."""
    merger = make(name)
    state, hashes = merger.start(), [one.sha256() for one in MADE]
    for index, one in enumerate(MADE):
        numbers, tensors = json.dumps(state["numbers"]), save(state["tensors"])
        before = copy.deepcopy(state)
        merger.add(state, one, number(name, index))
        assert json.dumps(state["numbers"]) == json.dumps(before["numbers"])
        assert set(state["tensors"]) == set(before["tensors"])
        assert all(torch.equal(value, before["tensors"][key]) for key, value in state["tensors"].items())
        restored = {"numbers": json.loads(numbers), "tensors": load(tensors)}
        state = make(name).add(restored, one, number(name, index))
        merger.result(state)
    assert [one.sha256() for one in MADE] == hashes
    once = merge(name, MADE, None, NUMBERS.get(name))
    assert merger.result(state).sha256() == once.sha256() == merge(name, MADE, None, NUMBERS.get(name)).sha256()
    assert state["numbers"]["count"] == 3
    assert isinstance(merger.notes(state), list)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_a_plain_finite_adapter_like_the_first(name, dtype):
    result = merge(name, [adapter(slot, dtype) for slot in range(3)], None, NUMBERS.get(name))
    assert set(result.tensors) == set(MADE[0].tensors)
    assert result.sites == MADE[0].sites
    for value in result.tensors.values():
        assert value.dtype == dtype and bool(torch.isfinite(value).all())
    for site in ("a.q", "a.v"):
        assert result[f"{site}/B"].shape == (MADE[0].sites[site].shape[0], result.rank(site))
        assert change(result, site).norm() > 0.1
        for one in MADE:  # none is forgotten, none is all
            assert float((change(result, site) * change(one, site)).sum()) > 0.01
            assert not torch.allclose(change(result, site), change(one, site), rtol=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_only_products_times_scaling_count(name):
    """Another scaling with B divided by the same is the same adapter; and a core is part of B."""

    def rescaled(one):
        sites = {key: AdaptedLayer(site.kind, site.shape, 4 * site.scaling) for key, site in one.sites.items()}
        return AdapterState(
            {key: value / 4 if key.endswith("/B") else value for key, value in one.tensors.items()}, sites
        )

    cored = MADE[2].replace(
        {"a.q/R": torch.diag(torch.tensor([0.5, 2.0])), "a.q/B": MADE[2]["a.q/B"] * torch.tensor([2.0, 0.5])}
    )
    wanted = merge(name, MADE, None, NUMBERS.get(name))
    result = merge(name, [MADE[0], rescaled(MADE[1]), cored], None, NUMBERS.get(name))
    for site in ("a.q", "a.v"):
        torch.testing.assert_close(change(result, site), change(wanted, site), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_one_adapter_is_itself_and_zeros_stay_zero(name):
    options = {"task_arithmetic": {"lambda": 1.0}}.get(name)
    merger = make(name, options)
    result = merger.result(merger.add(merger.start(), MADE[0], number(name, 0)))
    zeros = [one.replace({key: torch.zeros_like(one[key]) for key in ("a.q/B", "a.v/B")}) for one in MADE]
    nothing = merge(name, zeros, options, NUMBERS.get(name))
    for site in ("a.q", "a.v"):
        torch.testing.assert_close(change(result, site), change(MADE[0], site), atol=1e-5, rtol=1e-5)
        assert not change(nothing, site).any() and nothing.rank(site) >= 1
    assert torch.equal(result["head/bias"], MADE[0]["head/bias"])


@pytest.mark.parametrize("name", NAMES)
def test_what_every_merger_refuses(name):
    merger = make(name)
    with pytest.raises(InputError, match="no adapter was added"):
        merger.result(merger.start())
    with pytest.raises(InputError, match="at least"):
        merger.merge([])
    with pytest.raises(InputError, match="2 numbers for 3 adapters"):
        merger.merge(MADE, [1.0, 2.0])
    state = merger.add(merger.start(), MADE[0], number(name, 0))
    with pytest.raises(InputError, match=r"a\.q/B has values that are not finite"):
        merger.add(state, MADE[1].replace({"a.q/B": torch.full((5, 2), torch.nan)}), number(name, 1))
    fewer = AdapterState(
        {key: value for key, value in MADE[1].tensors.items() if not key.startswith("a.v")},
        {key: site for key, site in MADE[1].sites.items() if key != "a.v"},
    )
    with pytest.raises(StateMismatch, match=r"missing a\.v/A, a\.v/B"):
        merger.add(state, fewer, number(name, 1))
    with pytest.raises(StateMismatch, match=r"a\.q/A has shape \[2, 9\], expected \[2, 6\]"):
        merger.add(state, MADE[1].replace({"a.q/A": torch.ones(2, 9)}), number(name, 1))
    dead = AdapterState(MADE[1].tensors, {**MADE[1].sites, "a.q": AdaptedLayer("lora", (5, 6), 0.0)})
    with pytest.raises(InputError, match=r"a\.q has the scaling 0"):
        merger.add(state, dead, number(name, 1))
    with pytest.raises(InputError, match="must be finite" if merger.number else "takes no number"):
        merger.add(state, MADE[1], float("nan"))


def test_there_is_a_merger_for_each_name_only():
    with pytest.raises(InputError, match="Did you mean 'opcm'"):
        merge("opmc", MADE)
