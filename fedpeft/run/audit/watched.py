"""Rounds of clients as they really run, watched: what every optimizer step gets, which records it took, what
leaves, and what is in the ledger by then.

`Local` does the work, one client after another or a cohort at once. Only its edges are replaced: records that note who
takes them, a guard that notes whose round begins, and a hook of torch's optimizers. A guard may change the
plan that a client trains by (no noise, say); the ledger then gets the plan as it was.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fedpeft.clients.cohort import engine as cohort
from fedpeft.clients.cohort.chunk import Chunk, Done
from fedpeft.clients.guard import Guard, hash_request, name_release
from fedpeft.clients.local import Local, Request
from fedpeft.clients.rates import Clock
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.privacy.ledger import Entry, accounts_of, client_of
from fedpeft.privacy.noise import Randomness
from fedpeft.privacy.plan import Plan
from fedpeft.state import AdapterState
from fedpeft.strategies.client import ClientHalf, Visit
from fedpeft.strategies.instructions import Instructions

ENGINES = ("alone", "cohort")


class Watched(Encoded):
    """A client's records that note which of them are taken, and the seed that dropout's masks would then be drawn from.

    Attributes:
        outside: torch's seed where nothing trains; what is looked at then is not drawn.
    """

    def __init__(self, data: Encoded, client: str) -> None:
        super().__init__(data.inputs, data.labels, end=data.end)
        self.client, self.outside = client, torch.initial_seed()
        self.taken: list[np.ndarray] = []
        self.masks: list[int] = []

    @property
    def inputs(self) -> dict[str, Tensor]:
        seed = torch.initial_seed()
        if self._rows is not None and len(self) and seed != self.outside:
            self.taken.append(self.rows)
            self.masks.append(seed)
        return super().inputs

    def forget(self) -> tuple[np.ndarray, int | None]:
        """What was taken since the last call: numbers of records, in order, and the seed of their masks."""
        numbers = np.sort(np.concatenate([np.empty(0, dtype=np.int64), *self.taken]))
        mask = self.masks[-1] if self.masks else None
        self.taken.clear()
        self.masks.clear()
        return numbers, mask


@dataclass(frozen=True)
class Step:
    """Values [P] that an optimizer step starts from, the gradient [P] that it gets, and the records taken for it."""

    before: Tensor
    released: Tensor
    drawn: np.ndarray
    mask: int | None


class Watch:
    """Inside of it all optimizer steps of clients are noted, and dropout is off.

    Attributes:
        data: records by client.
        current: the client that steps belong to which are not a cohort's.
        steps: by client.
    """

    def __init__(self, data: Mapping[str, Watched]) -> None:
        self.data, self.current = data, ""
        self.steps: dict[str, list[Step]] = defaultdict(list)
        self.rows: list[str] = []

    def __enter__(self) -> Watch:
        watch = self

        # An optimizer has a matrix and no names; the order of a chunk's jobs is that of its rows.
        class NamedPart(cohort.Chunk):  # type: ignore[misc, name-defined]  # whatever stands there now
            def run(self: Chunk) -> list[Done]:
                watch.rows = [getattr(job.data, "client", "") for job in self.jobs]
                try:
                    return super().run()  # type: ignore[misc, no-any-return]
                finally:
                    watch.rows = []

        self.open = ExitStack()
        self.open.enter_context(mock.patch.object(cohort, "Chunk", NamedPart))
        self.open.enter_context(without_dropout())
        self.open.callback(register_optimizer_step_pre_hook(self._note_step).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self.open.close()

    def take(self) -> dict[str, list[Step]]:
        """The steps since the last call."""
        found, self.steps = dict(self.steps), defaultdict(list)
        return found

    def _note_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        slopes = [torch.zeros_like(value) if value.grad is None else value.grad for value in parameters]
        if self.rows:
            for client, before, slope in zip(self.rows, parameters[0].detach(), slopes[0], strict=False):
                self._add_step(client, before, slope)
        else:
            self._add_step(
                self.current,
                *(torch.cat([value.detach().flatten() for value in values]) for values in (parameters, slopes)),
            )

    def _add_step(self, client: str, before: Tensor, released: Tensor) -> None:
        drawn, mask = self.data[client].forget() if client in self.data else (np.empty(0, dtype=np.int64), None)
        # Copies, as the step that comes next writes into both.
        self.steps[client].append(Step(before.clone(), released.clone(), drawn, mask))


@contextmanager
def without_dropout() -> Iterator[None]:
    """Dropout lets everything through: it is random, and differs between a batch and its samples."""
    attention = functional.scaled_dot_product_attention

    # Named as torch has it: models give the rate by place or by keyword.
    def whole(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        return attention(query, key, value, attn_mask=attn_mask, dropout_p=0.0, **kwargs)

    with (
        mock.patch.object(functional, "dropout", lambda input, *_, **__: input),
        mock.patch.object(functional, "scaled_dot_product_attention", whole),
    ):
        yield


class Probe(Guard):
    """A guard that tells a watch whose round begins.

    Args:
        changed: fields of the plan that the client trains by; the ledger gets them as they were.
    """

    def __init__(self, config: Config, folder: Path, watch: Watch, changed: dict[str, float]) -> None:
        super().__init__(config, folder, "audit")
        self.watch, self.changed = watch, changed
        self.originals: dict[str, dict[str, float]] = {}

    def plan(self, client: str, count: Callable[[], int]) -> Plan | None:
        found = super().plan(client, count)
        if found is None:
            return None
        self.originals[client] = {name: getattr(found, name) for name in self.changed}
        return replace(found, **self.changed)  # type: ignore[arg-type]

    def source(self, client: str, number: int, *purpose: str) -> Randomness:
        self.watch.current = client
        return super().source(client, number, *purpose)

    def afford(self, account: str, number: int, request: str, plan: Plan, sums: float | None = None) -> None:
        super().afford(account, number, request, self._original_of(account, plan), sums)

    def spend(self, account: str, number: int, release: str, plan: Plan, sums: float | None = None) -> None:
        super().spend(account, number, release, self._original_of(account, plan), sums)

    def _original_of(self, account: str, plan: Plan) -> Plan:
        return replace(plan, **self.originals[client_of(account)])  # type: ignore[arg-type]


def entries(folder: Path, client: str, number: int) -> list[Entry]:
    """What stands in a client's ledgers, as they are on the disk, for one round."""
    return [entry for ledger in accounts_of(folder, client) for entry in ledger.entries() if entry.round == number]


@dataclass(frozen=True)
class Seen:
    """One client's round.

    Attributes:
        received, told: the request.
        start: the adapter that it must start from.
        entries: of the round in the ledger when the update was handed out.
        name: what the update is called there.
        kept: the reply that the client would send if it was asked again.
        run: what tells runs apart.
        visit, halves: what its config's methods do at the client beside training.
        again: the same request, asked a second time.
    """

    engine: str
    client: str
    number: int
    received: AdapterState
    told: Instructions
    start: AdapterState
    steps: list[Step]
    entries: list[Entry]
    name: str
    update: AdapterState
    metrics: dict[str, float]
    kept: AdapterState | None
    run: str
    visit: Visit
    halves: list[ClientHalf]
    again: Seen | None = None


def round_of(local: Local, engine: str, watch: Watch, requests: list[Request]) -> list[Seen]:
    """One round of these clients by a `Local` whose guard is a `Probe`."""
    starts = [local.compose(client, received, told, before=told.round)[0] for client, received, told in requests]
    if engine == "cohort":
        local.prepare(requests)
    seen = []
    for (client, received, told), start in zip(requests, starts, strict=True):
        watch.current, number, request = client, told.round, hash_request(received, told)
        update, metrics = local.train(client, received, told)
        found, kept = entries(local.guard.folder, client, number), local.store.reply(client, number, request)
        seen.append(
            Seen(
                engine,
                client,
                number,
                received,
                told,
                start,
                [],
                found,
                name_release(request, update),
                update,
                metrics,
                None if kept is None else kept[0],
                str(local.guard.folder),
                Visit(
                    client,
                    local.config.client,
                    local.model,
                    received,
                    start,
                    {},
                    local.train_data[client],
                    seed=0,
                    clock=Clock(number, local.config.run.rounds),
                ),
                local.halves,
            )
        )
    steps = watch.take()
    return [replace(one, steps=steps.get(one.client, [])) for one in seen]
