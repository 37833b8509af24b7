"""The client of a stock Flower app, made right: it starts from what was sent, and trains what the round trains.

A strategy says in each message which roles clients train (`trains`): FedSVD and FFA-LoRA leave A alone, RoLoRA takes
the factors in turn. The server refuses the update of a client that trains more, so that a client has to know.

    >>> _role_of("base_model.model.vit.q_proj.lora_A.default.weight"), _role_of("base_model.model.classifier.bias")
    ('A', 'head')
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from flwr.app import Message

from fedpeft.errors import InputError
from fedpeft.strategies.flower_api import named_site

if TYPE_CHECKING:
    from torch.nn import Module, Parameter


def prepare_client(model: Module, message: Message) -> list[Parameter]:
    """Load what a strategy of fedpeft has sent into a peft model, freeze what this round does not train, and return
    what it does: the parameters for an optimizer.

    Every round anew, as what trains may change from one to the next. The reply holds
    `ArrayRecord(get_peft_model_state_dict(model))` and, as a metric, `num-examples`.

    Raises:
        InputError: the message is of no strategy of ours, an array is none of the model's, or the model trains what
            nobody sends.
    """
    arrays, config = message.content.array_records.get("arrays"), message.content.config_records.get("config")
    told = None if config is None else config.get("trains")
    if arrays is None or not isinstance(told, list):
        raise InputError(
            "prepare_client: the message has no `arrays` with a config `trains`, as fedpeft's strategies send."
        )
    sent = {named_site(name): (name, array) for name, array in arrays.items()}
    trained: list[Parameter] = []
    for name, parameter in model.named_parameters():
        found = sent.pop(named_site(name), None)
        if found is None:
            if parameter.requires_grad:
                raise InputError(
                    f"prepare_client: the model trains {name}, which is not sent. Freeze it, or start with it."
                )
            continue
        values = torch.from_numpy(found[1].numpy().copy())
        if values.shape != parameter.shape:
            raise InputError(
                f"prepare_client: {found[0]} is {list(values.shape)}, of the model {list(parameter.shape)}."
            )
        with torch.no_grad():
            parameter.copy_(values)
        parameter.requires_grad_(_role_of(name) in told)
        if parameter.requires_grad:
            trained.append(parameter)
    if sent:
        missing = ", ".join(name for name, _ in list(sent.values())[:3])
        raise InputError(f"prepare_client: the model has no {missing}. Build it as the server does.")
    return trained


def _role_of(name: str) -> str:
    """A or B of a LoRA factor; all else that is sent is head."""
    role = named_site(name)[1]
    return role if role in ("A", "B") else "head"
