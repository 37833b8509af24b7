"""`adapter.name=peft`: which options it takes, what refuses it, and that plain LoRA through it is plain LoRA."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.adapters import folder, peft_types
from fedpeft.adapters.peft_types import average_error, fits_hint
from fedpeft.clients.cohort.engine import why_not_cohort
from fedpeft.config.short_names import SHORT
from fedpeft.errors import InputError, RunError
from fedpeft.run.world import load_world
from fedpeft.state import RunContext
from fedpeft.strategies.rules.fedit import FedIT
from support import small_models as small
from support.methods import settings
from support.peft_types import adapted

RULES = [name for name in registry.names("strategies") if not registry.load("strategies", name).wraps]


def peft(name="LORA", **options):
    return {"adapter": {"name": "peft", "type": name, "options": options}}


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("IA33", {}, ("adapter.type", "Did you mean 'IA3'?", "VERA")),
        ("PREFIX_TUNING", {}, ("adapter.type=PREFIX_TUNING", "inputs of the model", "IA3")),
        ("OFT", {}, ("adapter.type=OFT", "rotations")),
        ("IA3", {"feedfoward_modules": []}, ("feedfoward_modules", "Did you mean 'feedforward_modules'?")),
        ("IA3", {"r": 4}, ("adapter.options.r", "adapter.type=IA3", "Allowed: target_modules")),
        ("VERA", {"r": "many"}, ("adapter.options.r: 'many' is not a valid int",)),
        ("LORA", {"use_dora": 1}, ("adapter.options.use_dora: 1 is not a valid bool",)),
        ("LORA", {"bias": "some"}, ("adapter.options.bias: 'some'", "'lora_only'")),
        ("LORA", {"megatron_core": "os"}, ("megatron_core", "Allowed:")),
        ("LORA", {"base_model_name_or_path": "/etc"}, ("base_model_name_or_path", "Allowed:")),
        ("LORA", {"kasa_config": {}}, ("kasa_config", "Allowed:")),
        ("LORA", {"init_lora_weights": "eva"}, ("init_lora_weights=eva", "looks at records")),
        ("LORA", {"init_lora_weights": "corda"}, ("init_lora_weights=corda", "looks at records")),
        ("LORA", {"init_lora_weights": "loftq"}, ("init_lora_weights=loftq", "quantized")),
        ("LORA", {"init_lora_weights": "pisa"}, ("init_lora_weights: 'pisa'", "'pissa'")),
        ("LORA", {"init_lora_weights": "pissa", "use_dora": True}, ("moves the base weights", "use_dora")),
    ],
)
def test_what_peft_would_not_take_is_refused_with_what_is_allowed(name, options, said):
    with pytest.raises(InputError) as caught:
        configs.load(peft(name, **options))
    assert all(part in str(caught.value) for part in said), caught.value


def test_options_are_typed_from_the_command_line_and_dropped_with_their_type():
    read = configs.load({}, ["adapter=peft", "adapter.options.r=16", "adapter.options.use_dora=true"])
    assert read.adapter.options == {"type": "LORA", "options": {"r": 16, "use_dora": True}}
    assert configs.from_yaml(configs.to_yaml(read)) == read
    other = configs.load(configs.to_tree(read), ["adapter.type=IA3"])
    assert other.adapter.options == {"type": "IA3", "options": {}}


@pytest.mark.parametrize(
    ("key", "value", "theirs"),
    [("r", 16, "r"), ("alpha", 16.0, "lora_alpha"), ("rslora", True, "use_rslora"), ("dropout", 0.1, "lora_dropout")],
)
def test_keys_of_lora_are_refused_under_the_name_that_peft_has_for_them(key, value, theirs):
    with pytest.raises(InputError, match=rf"adapter\.{key}={value} .* adapter\.options\.{theirs}="):
        configs.load({"adapter": {"name": "peft", key: value}})


@pytest.mark.parametrize("name", SHORT)
def test_a_short_name_is_a_type_of_peft_and_its_options(name):
    kind, options = SHORT[name]
    wanted = {"type": kind, "options": options}
    for read in (
        configs.load({"adapter": name}),
        configs.load({"adapter": {"name": name}}),
        configs.load({}, [f"adapter={name}"]),
        configs.load({"adapter": {"name": "lora", "r": 4}}, [f"adapter.name={name}"]),
    ):
        assert (read.adapter.name, read.adapter.options) == ("peft", wanted)
        assert configs.from_yaml(configs.to_yaml(read)) == read


def test_options_beside_a_short_name_are_those_of_its_type():
    read = configs.load({}, ["adapter=dora", "adapter.options.r=16", "adapter.target_modules=[query]"])
    assert read.adapter.options == {"type": "LORA", "options": {"use_dora": True, "r": 16}}
    read = configs.load({"adapter": {"name": "dora", "options": {"r": 16}}}, ["adapter.options.lora_alpha=32"])
    assert read.adapter.options["options"] == {"use_dora": True, "r": 16, "lora_alpha": 32}
    other = configs.load(configs.to_tree(read), ["adapter=ia3"])
    assert other.adapter.options == {"type": "IA3", "options": {}}
    with pytest.raises(InputError, match=r"adapter\.name"):
        configs.load({"adapter": "ia33"})


def test_targets_are_given_once():
    with pytest.raises(InputError, match="give one of them"):
        configs.load({"adapter": {"name": "peft", "target_modules": ["q"], "options": {"target_modules": ".*q"}}})


@pytest.mark.parametrize(
    ("value", "hint", "wanted"),
    [
        (True, int, False),
        (3, float, True),
        (3.5, int, False),
        (None, int | None, True),
        ("x", int | str, True),
        ([1, "x"], list[int], False),
        ({"q": 2}, dict[str, int], True),
        ({"q": "x"}, dict[str, int], False),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
    ],
)
def test_values_are_of_the_types_that_peft_declares(value, hint, wanted):
    assert fits_hint(value, hint) is wanted


# Who takes it ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_rules_that_need_factors_refuse_by_name(name):
    config = configs.to_tree(configs.load({}, settings(name))) | peft("IA3")
    if registry.load("strategies", name).takes_any_adapter:
        assert configs.load(config).adapter.name == "peft"
        return
    with pytest.raises(InputError, match=rf"strategy\.name={name} works on adapter\.name=lora\w*, not peft"):
        configs.load(config)
    assert name not in ("fedit", "flower")


@pytest.mark.parametrize("name", [name for name in registry.names("strategies") if name not in RULES])
def test_wrappers_go_around_an_average_of_anything(name):
    config = {key: value for key, value in settings(name).items() if key != "strategy"}
    options = {key.removeprefix("strategy."): value for key, value in config.items() if key.startswith("strategy.")}
    others = {key: value for key, value in config.items() if not key.startswith("strategy.")}
    tree = {"strategy": {"name": "fedit", "wrap": [{"name": name, **options}]}, **peft("IA3")}
    if name in ("atp", "fedthe"):
        others["data.holdout"] = 0.2
    assert configs.load(tree, others).strategy.names == ["fedit", name]


def test_sequences_and_optimizers_of_pairs_refuse():
    with pytest.raises(InputError, match=r"adapter\.name=peft: continual\.body=sequential works on LoRA's factors"):
        configs.load({"continual": "sequential", **peft("IA3")})
    with pytest.raises(InputError, match=r"client\.optimizer=lora_pro steps A and B .* over adapter\.name=peft"):
        configs.load({"client": {"optimizer": "lora_pro"}, **peft("IA3")})


def test_an_adapter_that_no_average_takes_is_still_refused():
    assert FedIT(context=RunContext(adapter="lora_sb")).adapter == "lora"
    assert FedIT(context=RunContext(adapter="peft", averages=("peft",))).trains == ("peft", "head")


# What it does ---------------------------------------------------------------------------------------------------------


def test_plain_lora_through_peft_is_plain_lora_in_a_cohort_too(tiny, tmp_path):
    tiny("lora", {"adapter": {"name": "lora", "r": 4, "alpha": 8}})
    tiny("peft", peft(r=4, lora_alpha=8))
    one, other = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("lora", "peft"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())
    assert folder.load(tmp_path / "peft" / "adapter").sha256() == folder.load(tmp_path / "lora" / "adapter").sha256()


@pytest.mark.parametrize(
    ("name", "options", "together"),
    [("LORA", {}, True), ("LORA", {"use_dora": True}, True), ("IA3", {}, True), ("PEANUT", {}, False)],
)
def test_what_has_a_rule_trains_in_a_cohort(name, options, together, tmp_path):
    model = adapted(small.save("bert", tmp_path), name, options)
    reason = why_not_cohort(model, ("peft", "head"))
    assert (reason is None) == together and (together or "has no rule for many clients" in str(reason))


@pytest.mark.parametrize("options", [{"target_modules": ".*classifier"}, {"modules_to_save": ["classifier"]}])
def test_a_layer_of_the_head_is_not_taken(options, tmp_path):
    with pytest.raises(InputError, match="peft would take classifier, a head"):
        adapted(small.save("bert", tmp_path), "LORA", options)


def test_what_pefts_file_would_lack_is_refused(tmp_path, monkeypatch):
    monkeypatch.delitem(__import__("fedpeft.adapters.peft_types", fromlist=["CANNOT"]).CANNOT, "VBLORA")
    options = {"vector_length": 8, "num_vectors": 16, "topk": 2, "save_only_topk_weights": True}
    with pytest.raises(InputError, match=r"peft's file would lack .*vblora_logits"):
        adapted(small.save("bert", tmp_path), "VBLORA", options)


def test_clients_whose_frozen_parts_are_others_say_so(tmp_path):
    world = load_world(configs.load(peft("VERA", r=8), {"data.limit": 60, "data.clients": 2}), tmp_path)
    local, told = world.local, world.strategy.instructions(world.start)
    sent = world.strategy.broadcast(world.start, "client-000")
    assert told.static is not None and told.static.roles == ("frozen",)
    assert local.compose("client-000", sent, told, before=1)[0].sha256() == world.start.adapter.sha256()
    key = next(key for key in local.initial.tensors if key.endswith("/frozen"))
    local.initial = local.initial.replace({key: local.initial[key] + 1e-6})
    with pytest.raises(RunError, match="roles frozen drawn from"):
        local.compose("client-000", sent, told, before=1)


def test_a_start_that_moves_the_base_travels_as_a_residual_and_leaves_as_ranks(tmp_path):
    path = small.save("bert", tmp_path / "model")
    model = adapted(path, "LORA", {"init_lora_weights": "pissa", "r": 3, "lora_alpha": 6})
    site, state = "bert.encoder.layer.0.attention.self.query", model.state()
    A, B = (state[f"model.{site}.lora_{factor}.weight/peft"] for factor in "AB")
    U, S, Vt = torch.linalg.svd(small.make("bert").get_submodule(site).weight.detach().double())
    torch.testing.assert_close(2.0 * (B @ A).double(), (U[:, :3] * S[:3]) @ Vt[:3], atol=1e-5, rtol=1e-4)
    residual = state[f"{site}/residual_B"] @ state[f"{site}/residual_A"]
    torch.testing.assert_close(residual, -2.0 * B @ A, atol=1e-6, rtol=1e-5)
    sent = FedIT(context=RunContext(adapter="peft", averages=("peft",))).broadcast(replace_start(state), "a")
    assert f"{site}/residual_B" in sent
    assert model.folder is not None and (model.folder["r"], model.folder["init_lora_weights"]) == (6, True)


def replace_start(state):
    from fedpeft.state import ServerState

    return replace(ServerState(state), round=0)


def test_a_run_of_a_biased_type_says_by_how_much(tmp_path, caplog):
    path = small.save("bert", tmp_path)
    adapted(path, "VERA", {"r": 8})
    assert "80% off" in caplog.text
    caplog.clear()
    adapted(path, "IA3", {})
    assert "off the average" not in caplog.text
    assert average_error("LORA", {"use_dora": True, "r": 3}) > average_error("LORA", {"r": 3}) > 0.1
    assert average_error("LORA", {"init_lora_weights": "mica"}) < 1e-3


@pytest.mark.parametrize("times", ["999999999", "0", "x", "9" * 5000])
def test_iterations_of_a_start_are_bounded(times):
    start = f"pissa_niter_{times}"
    with pytest.raises(InputError, match=r"init_lora_weights=pissa_niter_.*allowed are 1 to 100|not a valid"):
        peft_types.require_options("LORA", {"init_lora_weights": start})
    peft_types.require_options("LORA", {"init_lora_weights": "pissa_niter_4"})


def test_what_makes_another_base_is_no_option():
    with pytest.raises(InputError, match=r"layer_replication.*is not known"):
        peft_types.require_options("LORA", {"layer_replication": [[0, 2], [1, 2]]})
