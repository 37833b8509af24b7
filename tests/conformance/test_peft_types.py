"""Every type of the installed peft: it can be had and does all that an adapter must, or stands in the one list of those
that cannot, and does not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftType

from fedpeft.adapters import peft_types
from fedpeft.adapters.adapted import build
from fedpeft.adapters.peft_types import CANNOT, EXACT, MEANINGLESS
from fedpeft.clients.inputs import verify_gradients
from fedpeft.config import AdapterConfig, ModelConfig
from fedpeft.errors import InputError
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.record import checkpoint
from fedpeft.simulations import run as runs
from fedpeft.simulations.benchmarks import peft_types as measuring
from support import per_sample
from support import small_models as small
from support.peft_types import FITTING, ROLES, SWITCHES, adapted, require_had
from support.sample import few

TYPES = peft_types.allowed_types()
SAMPLE = ("LORA", "IA3", "VERA", "FOURIERFT", "SHIRA")
OPTIONS = [(name, FITTING.get(name, {})) for name in TYPES] + [("LORA", options) for options in SWITCHES]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return small.save("bert", tmp_path_factory.mktemp("models") / "bert")


def sampled(cases, names=SAMPLE):
    """A few types with the options that they need, and two of LoRA's switches."""
    always = [(name, FITTING.get(name, {})) for name in names] + [("LORA", SWITCHES[0]), ("LORA", SWITCHES[1])]
    return few(cases, [case for case in always if case in cases])


def test_every_type_of_peft_is_allowed_or_in_the_list_of_those_that_cannot_be_had():
    assert {*CANNOT} | {*TYPES} == {kind.value for kind in PeftType} and not {*CANNOT} & {*TYPES}


@pytest.mark.parametrize(("name", "options"), sampled(OPTIONS))
def test_a_type_does_all_that_an_adapter_must(name, options, path, tmp_path):
    require_had(path, tmp_path / "adapter", name, options)


@pytest.mark.parametrize("name", few(CANNOT, ["PROMPT_TUNING", "ADALORA", "ADAPTION_PROMPT", "LILY", "OFT", "VBLORA"]))
def test_a_type_in_the_list_does_not(name, path, tmp_path, monkeypatch):
    monkeypatch.setattr(peft_types, "CANNOT", {})
    with pytest.raises(AssertionError):
        require_had(path, tmp_path / "adapter", name, FITTING.get(name, {}))


@pytest.mark.parametrize(("name", "options"), sampled(OPTIONS))
def test_the_gradient_of_each_record_is_that_of_autograd_on_it_alone(name, options, path):
    model = adapted(path, name, options)
    parameters, data = model.train_roles(ROLES), small.texts(4)
    with torch.no_grad():
        for value in parameters.values():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    model.training_mode()
    per_sample.without_dropout(model)
    loss = per_sample.loss_of(model)
    if name == "PVERA":  # it draws noise in its forward
        with pytest.raises(InputError, match=r"privacy\.unit=sample: the per-sample gradient"):
            verify_gradients(model, data, ROLES, 8)
        return
    verify_gradients(model, data, ROLES, 8)
    model.training_mode()
    fast, losses = per_sample_gradients(model.base.modules, parameters, loss, *per_sample.batch(data))
    slow, expected = per_sample.one_by_one(parameters, loss, data)
    assert float(slow.abs().amax(1).min()) > 1e-3 and fast.shape == slow.shape
    torch.testing.assert_close(fast, slow, atol=1e-5 * float(slow.abs().max()), rtol=0)
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", few([name for name in TYPES if name != "TRAINABLE_TOKENS"], ["VERA"]))
def test_a_run_of_a_type_moves_only_what_trains_and_goes_on_bit_for_bit(name, tiny, interrupted, tmp_path):
    adapter = {"name": "peft", "type": name, "options": measuring.NEEDED.get(name, {})}
    config: dict[str, Any] = {"adapter": adapter, "run.rounds": 2}
    tiny("whole", config)

    interrupted("broken", config)
    runs.resume(tmp_path / "broken")
    ends = [checkpoint.latest(tmp_path / run / "checkpoints").adapter for run in ("whole", "broken")]
    assert ends[0].sha256() == ends[1].sha256()
    section = AdapterConfig(name="peft", options={"type": name, "options": adapter["options"]})
    start = build(ModelConfig(), section, 10, 0).state()
    frozen = [key for key in start.tensors if key.endswith("/frozen")]
    trained = [key for key in start.tensors if key.endswith("/peft")]
    assert all(torch.equal(start[key], ends[0][key]) for key in frozen)
    assert any(not torch.equal(start[key], ends[0][key]) for key in trained)
    files = [(tmp_path / run / "adapter" / "adapter_model.safetensors").read_bytes() for run in ("whole", "broken")]
    assert files[0] == files[1]


# What is said of averages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), sampled(measuring.cases(), ("LORA", "IA3", "VERA")))
def test_what_is_said_of_a_type_is_what_is_measured(name, options):
    said = next(row for row in peft_types.read_measured() if (row["type"], row["options"]) == (name, options))
    got = measuring.measure(name, options)
    for key, small_is_zero in (("average", EXACT), ("start", 1e-5)):
        if max(said[key], got[key]) >= small_is_zero:
            assert got[key] == pytest.approx(said[key], rel=0.2), key
    same = ("values", "upload", "per_sample", "cohort", "merges")
    assert {key: got[key] for key in same} == {key: said[key] for key in same}


def test_every_type_has_been_measured_and_none_is_meaningless():
    rows = peft_types.read_measured()
    assert [(row["type"], row["options"]) for row in rows] == measuring.cases()
    assert max(row["average"] for row in rows) < MEANINGLESS


def test_the_measure_of_lora_is_that_of_its_products(path):
    """By hand: weights s (mean B)(mean A) against mean s B_k A_k, at the inputs of the layers."""
    from fedpeft.adapters import peft_measure
    from fedpeft.models.base import catch_inputs

    model = adapted(path, "LORA", {})
    inputs, start = small.inputs("bert"), model.state()
    states = [peft_measure.move_randomly(start, ("peft",), client) for client in range(3)]
    off = whole = 0.0
    for site in ("query", "value"):
        for layer in (0, 1):
            name = f"bert.encoder.layer.{layer}.attention.self.{site}"
            with catch_inputs(model.base.backbone.get_submodule(name)) as caught:
                model.logits(inputs)
            A, B = ([s[f"model.{name}.lora_{f}.weight/peft"].double() for s in states] for f in "AB")
            exact = sum(b @ a for a, b in zip(A, B, strict=True)) / 3
            error = (sum(B) / 3) @ (sum(A) / 3) - exact
            x = caught[-1].double()
            off += float((x @ error.T).square().sum())
            whole += float((x @ exact.T).square().sum())
    got = peft_measure.measure_average(model, inputs, ("peft",))
    assert got == pytest.approx((off / whole) ** 0.5, rel=1e-4) and got > 0.05
    assert model.state().sha256() == start.sha256()
