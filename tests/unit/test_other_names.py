"""Keys of other tools are refused with ours: the table names keys that both sides have."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import transformers

from fedpeft.clients.optimizers.adamw import AdamW
from fedpeft.config import Config, load, options_of
from fedpeft.config.other_names import FLOWER, HF, OTHERS, PEFT
from fedpeft.errors import InputError


def known_keys():
    """Every key of ours, and `client.optimizer_options` with those of the default optimizer."""
    for section in dataclasses.fields(Config):
        yield section.name
        for item in dataclasses.fields(section.default_factory):
            yield f"{section.name}.{item.name}"
    yield from (f"client.optimizer_options.{name}" for name in options_of(AdamW))


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


def test_what_is_ours_is_no_foreign_key():
    assert load({}, {"client.weight_decay": 0.1, "client.max_grad_norm": 1.0, "adapter.r": 2}).adapter.r == 2
    assert sum(of == FLOWER for of, *_ in OTHERS.values()) > 4
