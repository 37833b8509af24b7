"""`client.memory_mb`: each client has the largest rank of a LoRA that its memory has room for, found once, ahead of the
first round, and written down as `adapter.client_ranks`.

    bytes(r) = W + 4 c (r sum (i + o) + h) + n (k + 4 r L)

    W       the frozen base
    L, i, o the adapted layers, their inputs and outputs;  h  the values of the head, where it trains
    c       copies of what trains: values, where the round began, gradients, and what the optimizer keeps of each value,
            which is counted on a step of it
    n       tokens (or image patches) of a step: client.batch_size, or micro_batch, of the longest record of all
    k       what a pass keeps of each token beside the r products A x of each layer (`clients.cohort.room`)

It is what torch holds in a step of a client that trains alone; Python and the libraries come on top. Tests compare it
with measured peaks at several ranks, batches and optimizers. Steps of a simulation run at the largest rank whatever a
client's is, so it is the memory of a client's own machine that this keeps, not the simulation's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedpeft.adapters.adapted import Adapted, build
from fedpeft.adapters.tail import first_token
from fedpeft.clients.cohort.passes import token_counts
from fedpeft.clients.cohort.room import count_kept
from fedpeft.clients.optimizers.base import make_layout, make_optimizer
from fedpeft.config import ClientConfig, Config
from fedpeft.data.encode import Encoded, encode
from fedpeft.errors import InputError
from fedpeft.run.world import cache_of, data_key, find_device, load_records
from fedpeft.strategies.build import build as build_strategy

log = logging.getLogger("fedpeft")
MB, FLOAT = 10**6, 4
TRAINED = 3  # copies: values, where the round began, gradients


@dataclass(frozen=True)
class Need:
    """Bytes of a client's training, linear in its rank.

    Attributes:
        base: W.
        training: what else does not hang on the rank.
        each: of each rank.
    """

    base: int
    training: int
    each: int

    def at(self, rank: int) -> int:
        """Bytes at this rank."""
        return self.base + self.training + rank * self.each

    def largest(self, memory: float) -> int:
        """The largest rank that fits into so many bytes; 0 or below where none does."""
        return int((memory - self.at(0)) // self.each)


def settle_ranks(config: Config, run: Path) -> str:
    """Where `client.memory_mb` is set, set `adapter.client_ranks` by it, and it to null.

    Args:
        run: the folder of the run, whose cache keeps what is read.

    Returns:
        What was found; empty where nothing was asked.

    Raises:
        InputError: a client has not even room for rank 1, or the need cannot be counted.
    """
    if config.client.memory_mb is None:
        return ""
    if config.model.gradient_checkpointing:
        raise InputError(
            "client.memory_mb: with model.gradient_checkpointing=true what a pass computes anew is not counted, so no "
            "rank can be said to fit. Give adapter.client_ranks by hand, or set model.gradient_checkpointing=false."
        )
    cache = cache_of(config, run)
    train = load_records(data_key(config), cache)[0]
    device = find_device(config.run.device)
    model = build(config.model, config.adapter, len(train.label_names), config.run.seed).to(device)
    data = encode(train, model.base.processor, config.model.task, config.model.max_length, "training texts", cache)
    need = count_need(model, data, build_strategy(config).trains, config.client)
    given = config.client.memory_mb
    ranks = [_fit_rank(need, memory, config) for memory in given]
    # Once and for all: a run that goes on, perhaps on another machine, must keep its ranks.
    config.adapter.client_ranks, config.client.memory_mb = ranks, None
    said = f"client.memory_mb={_write(given)}: ranks {', '.join(map(str, ranks))}. {_describe(need)}"
    log.info("%s", said)
    return said


def _fit_rank(need: Need, memory_mb: float, config: Config) -> int:
    rank = min(config.adapter.r, need.largest(memory_mb * MB))
    if rank < 1:
        raise InputError(
            f"client.memory_mb={_write(config.client.memory_mb or [])}: {memory_mb:g} MB have no room for rank 1. "
            f"{_describe(need)} Lower client.batch_size={config.client.batch_size} (or set client.micro_batch), "
            f"model.max_length={config.model.max_length}, or take a smaller model or model.dtype=bfloat16."
        )
    return rank


def _describe(need: Need) -> str:
    return (
        f"The base takes {need.base / MB:.4g} MB, a step {need.training / MB:.4g} and {need.each / MB:.3g} a rank: "
        f"{need.at(1) / MB:.4g} MB at rank 1."
    )


def _write(given: list[float]) -> str:
    return f"[{', '.join(f'{memory:g}' for memory in given)}]"


def count_need(model: Adapted, data: Encoded, trains: tuple[str, ...], client: ClientConfig) -> Need:
    """What a client's training needs.

    Args:
        model: with a LoRA of any rank.
        data: all clients' records, of which the longest counts.
        trains: roles that train.
    """
    sites = model.form.lora_sites()
    shapes = [model.form[f"{site}/{factor}"].shape for site in sites for factor in "AB"]
    rank = shapes[0][0]
    ends = sum(sum(shape) for shape in shapes) - 2 * rank * len(sites)
    trained = model.train_roles(trains)
    fixed = sum(value.numel() for value in trained.values()) - rank * ends
    longest = int(token_counts(model, data).max())
    tokens = longest * min(client.micro_batch or client.batch_size, len(data))
    model.training_mode()
    try:
        with first_token(model, data):
            kept = count_kept(model, data, trains, longest)
    finally:
        model.base.backbone.eval()
    products = FLOAT * len(sites)
    copies = FLOAT * (TRAINED + count_state(model, trained, client))
    return Need(
        _count_base(model),
        round(copies * fixed + tokens * (kept - rank * products)),
        round(copies * ends + tokens * products),
    )


def _count_base(model: Adapted) -> int:
    """Bytes of what is frozen; what is shared counts once."""
    own = {id(value) for value in model.parameters.values()}
    held = itertools.chain.from_iterable((*root.parameters(), *root.buffers()) for root in model.base.modules)
    found = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in held if id(value) not in own
    }
    return sum(found.values())


def count_state(model: Adapted, trained: Mapping[str, nn.Parameter], client: ClientConfig) -> float:
    """Values that the optimizer keeps for each value that trains, after a step of it."""
    # Copies, since a step with weight decay would move the model's own.
    weights = [nn.Parameter(torch.zeros_like(value)) for value in trained.values()]
    optimizer = make_optimizer(weights, client, make_layout(model, trained, model.parameters))
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    state = [value for each in optimizer.state.values() for value in each.values() if torch.is_tensor(value)]
    return sum(value.numel() for value in state) / sum(weight.numel() for weight in weights)
