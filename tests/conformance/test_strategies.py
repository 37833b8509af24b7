"""Every registered strategy in a tiny real federation: deterministic, resumable, and moves exactly what it declares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.record import checkpoint, report
from fedpeft.run.world import load_world
from fedpeft.simulations import run as runs
from support.methods import TINY, settings

STRATEGIES = registry.names("strategies")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.fixture(scope="module", params=STRATEGIES)
def whole(request, tmp_path_factory):
    """A strategy, and the folder of its run of three rounds."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write", lambda run: [])
        runs.simulate({}, {**TINY, **settings(request.param)}, folder)
    return request.param, folder


def test_another_seed_gives_another_adapter(whole, tiny, tmp_path):
    name, folder = whole
    tiny("other", {**settings(name), "run.seed": 1})
    assert not same(tensors(folder), tensors(tmp_path / "other"))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(whole, tiny, interrupted, tmp_path):
    """So does, all the more, a second run with the same seed."""
    name, folder = whole

    interrupted("broken", settings(name))
    assert checkpoint.latest(tmp_path / "broken" / "checkpoints").round == 1
    runs.resume(tmp_path / "broken")
    end, resumed = (checkpoint.latest(run / "checkpoints") for run in (folder, tmp_path / "broken"))
    assert end.round == resumed.round == 3
    assert same(end.adapter.tensors, resumed.adapter.tensors)
    assert same(end.memory, resumed.memory)
    assert end.numbers == resumed.numbers
    assert same(tensors(folder), tensors(tmp_path / "broken"))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_client_moves_what_the_strategy_declares_and_nothing_else(name, tmp_path):
    here = load_world(configs.load({}, {**TINY, **settings(name)}), tmp_path / "run")
    local, strategy = here.local, here.strategy
    server = strategy.before_round(here.start)
    client = "client-001"
    task = replace(strategy.instructions(server), round=1)
    start, _ = local.compose(client, strategy.broadcast(server, client), task, before=0)
    local.model.write(start)
    module_names = {id(parameter): key for key, parameter in local.model.parameters.items()}
    frozen = {
        name: value.detach().clone()
        for name, value in local.model.base.backbone.named_parameters()
        if id(value) not in module_names
    }
    local.train(client, strategy.broadcast(server, client), task)
    declared = set(start.select(strategy.trained(server)).tensors)
    for key, value in local.model.state().tensors.items():
        # B starts at zero, so A gets its first gradient in the second step (there are two).
        assert torch.equal(value, start[key]) != (key in declared), key
    for name_, value in local.model.base.backbone.named_parameters():
        if id(value) not in module_names:
            assert torch.equal(value, frozen[name_]), name_


def test_stock_peft_loads_the_adapter_and_computes_the_same(whole):
    _, run = whole
    here = load_world(configs.load(run / "resolved.yaml"), run)
    server = checkpoint.latest(run / "checkpoints")
    folder, adapter = run / "adapter", server.adapter
    if here.strategy.keeps:  # the clients' own adapters are the result
        folder = folder / "clients" / "client-002"
        adapter, _ = here.local.compose(
            "client-002", here.strategy.broadcast(server, "client-002"), here.strategy.instructions(server), before=99
        )
    here.local.model.write(adapter)
    x = here.test_encoded.inputs["pixel_values"][:16]
    with torch.no_grad():
        ours = here.local.model.logits({"pixel_values": x})
        base = AutoModelForImageClassification.from_pretrained(here.local.model.base.source)
        before = base(pixel_values=x).logits
        theirs = PeftModel.from_pretrained(base, folder).eval()(pixel_values=x).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (theirs - before).abs().max() > 1e-2
