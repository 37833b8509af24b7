"""Keys of other tools are refused with ours: the table names keys that both sides have."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import transformers

from fedpeft import registry
from fedpeft.clients.optimizers.adamw import AdamW
from fedpeft.config import Config, load, options_of
from fedpeft.errors import InputError
from fedpeft.objectives.preference import Preference
from fedpeft.other_names import FLOWER, HF, OTHERS, PEFT, VALUES


def known_keys():
    """Every key of ours, and `client.optimizer_options` with those of the default optimizer, `model.task_options` with
    those of preferences; "" is none."""
    yield ""
    for section in dataclasses.fields(Config):
        yield section.name
        for item in dataclasses.fields(section.default_factory):
            yield f"{section.name}.{item.name}"
    yield from (f"client.optimizer_options.{name}" for name in options_of(AdamW))
    yield from (f"model.task_options.{name}" for name in options_of(Preference))


def test_every_one_of_ours_is_a_key():
    assert {ours for _, ours, _ in OTHERS.values()} <= {*known_keys()}


@pytest.mark.parametrize(("whose", "cls"), [(HF, transformers.TrainingArguments), (PEFT, peft.LoraConfig)])
def test_theirs_are_theirs(whose, cls):
    theirs = {name for name, (of, *_) in OTHERS.items() if of == whose}
    assert len(theirs) > 7 and theirs <= {item.name for item in dataclasses.fields(cls)}


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("client.per_device_train_batch_size", "client.batch_size"),
        ("client.learning_rate", "client.lr"),
        ("learning_rate", "client.lr"),
        ("client.num_train_epochs", "client.local_epochs"),
        ("client.gradient_accumulation_steps", "client.micro_batch"),
        ("client.warmup_ratio", "client.warmup_rounds"),
        ("client.lr_scheduler_type", "client.schedule"),
        ("adapter.lora_alpha", "adapter.alpha"),
        ("adapter.task_type", "model.task"),
        ("strategy.fraction-fit", "run.clients_per_round"),
        ("client.optimizer_options.adam_beta1", "client.optimizer_options.beta1"),
    ],
)
def test_a_key_of_another_tool_is_refused_with_ours(key, ours):
    with pytest.raises(InputError) as error:
        load({}, {key: 1})
    assert f"config key {key}: That is " in str(error.value) and f"here it is {ours}" in str(error.value)


@pytest.mark.parametrize(
    ("key", "whose", "ours"),
    [
        ("model.max_seq_length", "TRL", "model.max_length"),
        ("adapter.lora_r", "TRL", "adapter.r"),
        ("model.model_name_or_path", "TRL", "model.name"),
        ("data.dataset_name", "TRL", "data.source"),
        ("run.num-server-rounds", "FlowerTune", "run.rounds"),
        ("num_server_rounds", "FlowerTune", "run.rounds"),
        ("train.learning-rate-max", "FlowerTune", "client (a section)"),
        ("model.lora.peft-lora-r", "FlowerTune", "adapter (a section)"),
        ("run.sample_clients", "OpenFedLLM", "run.clients_per_round"),
        ("run.num_clients", "OpenFedLLM", "data.clients"),
        ("strategy.prox_mu", "OpenFedLLM", "strategy.wrap ([{name: fedprox, mu: 0.01}])"),
    ],
)
def test_keys_of_tools_that_are_not_installed(key, whose, ours):
    with pytest.raises(InputError) as error:
        load({}, {key: 1})
    assert f"That is {whose}'s name; here it is {ours}" in str(error.value)


def test_a_key_that_nothing_stands_for_says_what_to_do():
    with pytest.raises(InputError, match=r"config key run.output_dir: .* no key here: the run folder is what --out"):
        load({}, {"run.output_dir": "x"})


def test_wrappers_in_the_notes_are_read():
    for key in ("prox_mu", "fedopt_eta", "fedopt_tau", "fedopt_beta1", "fedopt_beta2"):
        assert load({}, [f"strategy.wrap={OTHERS[key][2]}", "strategy.name=fedit"]).strategy.wrap


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("strategy.name", "FedAvg", "Flower's name; here it is fedit"),
        ("client.optimizer", "paged_adamw_8bit", "transformers' name; here it is adamw"),
        ("client.schedule", "cosine_with_min_lr", "transformers' name; here it is cosine"),
        ("model.task", "CAUSAL_LM", "peft's name; here it is causal-lm"),
        ("model.dtype", "bf16", "transformers' name; here it is bfloat16"),
        ("data.truncate", "keep_start", "TRL's name; here it is end"),
    ],
)
def test_a_value_of_another_tool_is_refused_with_ours(key, theirs, ours):
    with pytest.raises(InputError, match=f"^{key}: '{theirs}' is not known. That is {ours}"):
        load({}, {key: theirs})


def test_a_value_is_suggested_only_where_it_is_allowed():
    with pytest.raises(InputError) as error:
        load({}, {"strategy.name": "bf16"})
    assert "bfloat16" not in str(error.value) and "fedavg" in VALUES


def test_what_is_ours_is_no_foreign_key():
    assert load({}, {"client.weight_decay": 0.1, "client.max_grad_norm": 1.0, "adapter.r": 2}).adapter.r == 2
    assert sum(of == FLOWER for of, *_ in OTHERS.values()) > 4


def test_of_very_many_names_the_first_are_listed_and_the_others_counted():
    clients = [f"client-{number:03d}" for number in range(5000)]
    said = registry.unknown("--client", "client-4321x", clients)
    assert "Did you mean 'client-4321'?" in said
    assert said.endswith("client-098, client-099 and 4,900 more.") and len(said) < 1500
