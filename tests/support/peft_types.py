"""What of peft's tuners every test asks: options at which each fits a model of width 16, and whether one can be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

from fedpeft.adapters import folder, peft_types
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.adapters.peft_measure import measure_average
from fedpeft.models.loading import fingerprint, load
from fedpeft.run.trained import open_trained
from fedpeft.simulations.benchmarks import peft_types as measuring
from fedpeft.state import ServerState, Update
from fedpeft.strategies import wire
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.rules.fedit import FedIT
from support import small_models as small

ROLES = ("peft", "head")
# Options at which a type fits a model of width 16; what is not here takes peft's defaults.
FITTING: dict[str, dict[str, Any]] = {
    "TRAINABLE_TOKENS": {"token_indices": [70, 71, 72, 5]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "C3A": {"block_size": 8},
    "OFT": {"oft_block_size": 4},
    "FOURIERFT": {"n_frequency": 20},
    "WAVEFT": {"n_frequency": 20},
    "UNILORA": {"theta_d_length": 64},
    "RANDLORA": {"r": 4},
    "VERA": {"r": 8},
    "PVERA": {"r": 8},
    "SHIRA": {"r": 2},
    "MISS": {"r": 4},
    "ROAD": {"group_size": 8},
    "PSOFT": {"r": 4},
    "ADALORA": {"total_step": 10},
}
# LoRA's own switches.
SWITCHES: list[dict[str, Any]] = [
    {"use_dora": True},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "pissa_niter_4"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "orthogonal"},
    {"init_lora_weights": "mica"},
    {"init_lora_weights": "gaussian"},
    {"rank_pattern": {"query": 2}, "alpha_pattern": {"value": 1}},
    {"layers_to_transform": [1]},
    {"exclude_modules": ".*layer.0.*"},
    {"target_modules": ".*attention.*(query|key)"},
    {"modules_to_save": ["attention.output.LayerNorm"]},
    {"bias": "all"},
]
# Starts of these types are drawn, not zero.
NOT_ZERO = ("FOURIERFT", "C3A", "UNILORA")
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


def adapted(path: Path | str, name: str, options: dict[str, Any], kind: str = "bert"):
    return small.adapted(path, kind, method="peft", options={"type": name, "options": options})


def moved(model, seed=1, scale=0.1):
    """The state with all that trains moved at random."""
    generator, state = torch.Generator().manual_seed(seed), model.state()
    draws = {
        key: value + scale * torch.randn(value.shape, generator=generator)
        for key, value in state.select(ROLES).tensors.items()
    }
    return state.replace(draws)


def require_had(path: Path, out: Path, name: str, options: dict[str, Any]) -> None:
    """All that a type of peft's must do to be had.

    Raises:
        AssertionError: it does not.
    """
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(name))
    assert tuner is not None and issubclass(tuner, BaseTuner), "no tuner of layers"
    assert tuner.forward is BaseTuner.forward, "computes beside the layers"
    peft_types.require_options(name, options)
    model = adapted(path, name, options)
    require_exact_start(model, path, name)
    require_only_declared_move(model)
    state = moved(model)
    model.write(state)
    model.write(state)  # twice is once
    assert model.state().sha256() == state.sha256()
    require_samples_apart(model)
    require_message_and_average(model, state)
    require_stock_peft(model, state, path, out)
    wide = measuring.make(name, measuring.NEEDED.get(name, {}))
    assert measure_average(wide, measuring.inputs(), ("peft",)) < peft_types.MEANINGLESS


def require_exact_start(model, path, name):
    bare = load(small.ModelConfig(name=str(path), task=small.TEXT), small.LABELS, 0)
    # As a run compares it with what it was: before anything is written.
    assert fingerprint(model.base, heads=False) == fingerprint(bare, heads=False), "the base is another"
    model.write(model.state())
    inputs = small.inputs("bert")
    off = (model.logits(inputs) - bare.forward(inputs)).abs().max()
    assert off > 1e-6 if name in NOT_ZERO else off < 1e-4


def require_only_declared_move(model):
    model.write(moved(model, seed=5))  # where no factor is zero, so that all have gradients
    parameters = model.train_roles(ROLES)
    own = {id(value) for value in parameters.values()}
    tensors = model.base.backbone.state_dict(keep_vars=True).values()
    before = [(value, value.detach().clone()) for value in tensors]
    started = {key: value.detach().clone() for key, value in parameters.items()}
    loss = model.logits(small.inputs("bert")).square().sum()
    slopes = torch.autograd.grad(loss, list(parameters.values()))
    with torch.no_grad():
        for value, slope in zip(parameters.values(), slopes, strict=True):
            value -= 0.1 * slope
    model.logits(small.inputs("bert"))
    # GLORA scales biases too, and those of a new model are zero.
    moving = [key for key, slope in zip(parameters, slopes, strict=True) if slope.any()]
    assert moving == [key for key, value in parameters.items() if not torch.equal(value, started[key])]
    assert len(moving) > 0.8 * len(parameters)
    assert all(torch.equal(value, old) for value, old in before if id(value) not in own)


def require_samples_apart(model):
    model.base.backbone.eval()  # PVeRA draws noise in training
    inputs = small.inputs("bert")
    whole = model.logits(inputs)
    for index in range(len(whole)):
        alone = model.logits({key: value[index : index + 1] for key, value in inputs.items()})
        torch.testing.assert_close(alone, whole[index : index + 1], atol=1e-5, rtol=1e-4)


def require_message_and_average(model, state):
    strategy = FedIT(context=small_context())
    assert strategy.trains == ROLES and strategy.adapter == "peft"
    server = ServerState(state)
    sent = strategy.broadcast(server, "a")
    assert not any(key.endswith("/frozen") for key in sent.tensors)
    received, told = wire.Packed.open(wire.PACKED.content(sent, strategy.instructions(server)))
    assert received.sha256() == sent.sha256() and (told.static is None) == (sent.tensors.keys() == state.tensors.keys())
    both = [moved(model, seed=seed).select(ROLES) for seed in (2, 3)]
    updates = [Update(name, weight, one) for name, weight, one in zip("ab", (1.0, 3.0), both, strict=True)]
    after = strategy.aggregate(server, updates).adapter
    for key in state.tensors:
        mean = (both[0][key].double() + 3 * both[1][key].double()) / 4 if key in both[0] else state[key]
        assert torch.equal(after[key], mean.to(after[key].dtype)), key
    assert Instructions.from_json(told.to_json()) == told


def small_context():
    from fedpeft.adapters.peft import Peft
    from fedpeft.state import RunContext

    return RunContext(adapter="peft", averages=Peft.averages)


def require_stock_peft(model, state, path, out):
    """The folder loads in stock peft over the plain base, computes the same, and has every bit of the state."""
    folder.save(flatten_adapter(state), out, base=str(path), task=small.TEXT, settings=model.folder)
    bare = small.transformers.AutoModelForSequenceClassification.from_pretrained(path).eval()
    torch.manual_seed(9)  # what stock peft draws must not matter
    stock = PeftModel.from_pretrained(bare, out).eval()
    model.base.backbone.eval()
    inputs = small.inputs("bert")
    torch.testing.assert_close(stock(**inputs).logits, model.logits(inputs), **CLOSE)
    names = ",".join(str(place) for place in range(small.LABELS))
    opened = open_trained(out, [f"model.task={small.TEXT}", f"data.labels=[{names}]"])
    torch.testing.assert_close(opened.base.forward(inputs), stock(**inputs).logits, **CLOSE)
    saved = load_file(out / folder.WEIGHTS)
    for key, value in flatten_adapter(state).tensors.items():
        site, _, role = key.rpartition("/")
        name = f"base_model.{site}" if role in ("peft", "frozen") else f"{folder.PREFIX}{site}.{role}"
        assert torch.equal(saved.pop(name), value), key
    assert not saved
    json.loads((out / "adapter_config.json").read_text())
