"""Whole rounds of several clients, by both engines, in three ways, and what they must show.

    still    no record is drawn: noise alone, of many steps for little work
    real     as the config says
    quiet    no noise, at an adapter with random weights and a clip that cuts: the clipped sums themselves

Every run has another seed of noise and sampling. A client's state from earlier rounds is left out, so that each starts
from what the server sends; its ledger is that of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.tail import first_token
from fedpeft.clients import sequence
from fedpeft.clients.local import Local, Request
from fedpeft.clients.store import Store
from fedpeft.clients.train import on_device, per_sample_loss
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.privacy import audit
from fedpeft.privacy.audit import Check, Draws
from fedpeft.privacy.audit_noise import NoiseBlock, check_noise
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.ledger import BudgetExhausted
from fedpeft.privacy.plan import Plan
from fedpeft.run.audit.replies_seen import judge_rounds
from fedpeft.run.audit.watched import Probe, Seen, Step, Watch, Watched, round_of, without_dropout
from fedpeft.run.world import World
from fedpeft.state import AdapterState

CLIENTS, ROUNDS, FEW = 8, 4, (4, 2)  # at most, without records; clients and rounds with records
VALUES, ROWS = 60_000, 48  # of noise, and steps, in each engine with and without records; at least
ROUNDING = {"float32": audit.ROUNDING, "bfloat16": 0.05}  # in bfloat16 the shape of a batch moves every gradient in it


def chosen(counts: dict[str, int]) -> list[str]:
    """The clients to look at: those with the fewest and the most records, and others in between."""
    order = sorted(counts, key=lambda name: (counts[name], name))
    places = np.unique(np.linspace(0, len(order) - 1, min(CLIENTS, len(order))).round().astype(int))
    return [order[place] for place in places]


def rounds_of(config: Config) -> int:
    """Rounds that the audit runs: ROUNDS, or as many as one task (or the budget's plan) has."""
    tasks = config.continual.learned if config.continual.body else 1
    return min(ROUNDS, config.privacy.planned_rounds or config.run.rounds // tasks)


@dataclass(frozen=True)
class Way:
    """How rounds are run: what of the plan is changed, and at which adapter."""

    name: str
    clients: list[str]
    rounds: int
    changed: dict[str, float]
    loud: bool = False


class Rounds:
    """Runs rounds in all ways and judges them."""

    def __init__(self, here: World, clients: list[str], engines: list[str], folder: Path) -> None:
        self.here, self.local, self.config = here, here.local, here.config
        self.clients, self.engines, self.folder = clients, engines, folder
        self.steps = self.config.client.local_steps or 0
        self.told = here.strategy.instructions(here.strategy.before_round(here.start))
        self.plans: dict[str, Plan] = {}
        self.origins: dict[str, np.ndarray] = {}
        for client in clients:
            data = Watched(self.local.train_data[client], client)
            mine = replace(self.local, train_data={client: data}, ready={}).records(client, self.told)
            assert isinstance(mine, Watched)
            self.origins[client] = mine.rows
            plan = self.local.guard.plan(client, lambda count=len(mine): count)  # type: ignore[misc]
            assert plan is not None
            self.plans[client] = plan
        parameters = self.local.model.train_roles(self.told.trains)
        self.sizes = {key: value.numel() for key, value in parameters.items()}
        with self.local.model.competing(sequence.competing_classes(self.told)):
            still = self.local.model.still()
        self.moving = torch.cat(
            [
                ~still[key][:, *[None] * (value.ndim - 1)].expand_as(value).flatten().cpu()
                if key in still
                else torch.ones(value.numel(), dtype=torch.bool)
                for key, value in parameters.items()
            ]
        )

    def checks(self) -> list[Check]:
        """Checks of clipped sums, noise, sampling, coverage and replies, from all ways that rounds are run."""
        some, rounds = self.clients[: FEW[0]], rounds_of(self.config)
        still = Way("still", self.clients, rounds, {"sample_rate": 0.0})
        real = Way("real", some, min(FEW[1], rounds), {})
        quiet = Way(
            "quiet", some, min(FEW[1], rounds), {"noise_multiplier": 0.0, "clip": self._choose_clip()}, loud=True
        )
        blocks, draws, seen, off = [], [], [], 0.0
        for engine in self.engines:
            rows = []
            for way in (real, still):
                runs = [self.run(engine, way, number) for number in range(self._count_runs(way))]
                found = [[[self.noise_of(one, way) for one in line] for line in run] for run in runs]
                blocks.append(
                    NoiseBlock(
                        engine,
                        way is real,
                        torch.stack([torch.stack([torch.stack(line) for line in run]) for run in found]).transpose(
                            1, 2
                        ),
                    )
                )
                rows += runs if way is real else []
                seen += [one for run in runs for line in run for one in line]
            run = self.run(engine, quiet, 0)
            off = max([off, *(self.error_of(one, quiet) for line in run for one in line)])
            rows.append(run)
            seen += [one for line in run for one in line]
            draws += [
                Draws(
                    engine,
                    client,
                    np.stack([[self.drawn(line[place]) for line in run] for run in rows]),
                    self.plans[client].sample_rate,
                )
                for place, client in enumerate(some)
            ]
        return [
            Check(
                "clipped sums",
                off,
                0.0,
                ROUNDING[self.config.model.dtype],
                "distance of a step without noise from the clipped mean computed here, over clip / expected batch "
                "and record; worst step",
            ),
            *check_noise(blocks, self._sizes_kept()),
            *audit.sampler(draws),
            *self.coverage(),
            *judge_rounds(seen, self.plans, self.config),
        ]

    def _sizes_kept(self) -> dict[str, int]:
        kept = self.moving.split(list(self.sizes.values()))
        return {key: int(part.sum()) for key, part in zip(self.sizes, kept, strict=True) if bool(part.any())}

    def _count_runs(self, way: Way) -> int:
        # A small adapter needs more steps to show as many values of noise.
        rows = max(ROWS, -(-VALUES // int(self.moving.sum())))
        return max(1, -(-rows // (len(way.clients) * way.rounds * self.steps)))

    # Running ---------------------------------------------------------------------------------------------------------

    def run(self, engine: str, way: Way, number: int, seed: int | None = None) -> list[list[Seen]]:
        """All rounds of one run, [rounds][clients]; `seed` takes the place of one that no other run has."""
        folder = self.folder / f"{engine}-{way.name}-{number}"
        seed = seeds.derive(self.config.run.seed, "audit", engine, way.name, number) if seed is None else seed
        config = replace(self.config, run=replace(self.config.run, seed=seed))
        data = {client: Watched(self.local.train_data[client], client) for client in way.clients}
        found = []
        with Watch(data) as watch:
            for round_ in range(1, way.rounds + 1):
                local = self.seen_local(config, folder, round_, watch, way.changed)
                requests = self.requests(way, round_)
                found.append(round_of(local, engine, watch, requests))
                # A request that comes again has to get the same answer; once shows it.
                if number == 0 and way.name == "real":
                    again = round_of(local, engine, watch, requests)
                    found[-1] = [replace(one, again=other) for one, other in zip(found[-1], again, strict=True)]
        return found

    def seen_local(self, config: Config, folder: Path, number: int, watch: Watch, changed: dict[str, float]) -> Local:
        """A copy of the clients' side that is watched, with ledger and store of its own in `folder`.

        Args:
            changed: fields of every client's plan that are put in the place of its own.
        """
        guard = Probe(config, folder / "ledger", watch, changed)
        store = Store(folder / f"clients-{number}", history=1)
        return replace(self.local, guard=guard, store=store, train_data=watch.data, ready={}, sequential={})

    def requests(self, way: Way, number: int) -> list[Request]:
        """What the strategy sends each of the way's clients in round `number` of a run in which nothing was learned."""
        server = self.here.strategy.before_round(replace(self.here.start, round=number - 1))
        told = self.here.strategy.instructions(server)
        sent = [self.here.strategy.broadcast(server, client) for client in way.clients]
        return [
            (client, loud(one, told.trains) if way.loud else one, told)
            for client, one in zip(way.clients, sent, strict=True)
        ]

    def _choose_clip(self) -> float:
        """A clip that about half of the records of a loud adapter pass by a factor of two."""
        [(client, received, told)] = self.requests(Way("", self.clients[:1], 1, {}, loud=True), 1)
        start, _ = self.local.compose(client, received, told, before=1)
        mine = self.origins[client][:32]
        rows = self._gradients_at(client, mine, self._flatten_state(start), self.plans[client])
        norm = float(torch.linalg.vector_norm(rows, dim=1).nan_to_num(0.0, 0.0, 0.0).median())
        # Never above the config's own; with no gradient at all there is nothing to cut.
        return min(self.plans[client].clip, norm / 2) or self.plans[client].clip

    # Judging steps ---------------------------------------------------------------------------------------------------

    def noise_of(self, one: Seen, way: Way) -> Tensor:
        """The noise of a round's steps in its standard deviation [steps, values]; of a step that is left out, zeros."""
        plan = self.plans[one.client]
        rows = [
            (self._find_added(one, step) - self._mean(one, step, plan if way.name == "real" else None))
            * (plan.expected_batch / (plan.noise_multiplier * plan.clip))
            for step in one.steps[: self.steps]
        ]
        rows += [torch.zeros(len(self.moving), dtype=torch.float64)] * (self.steps - len(rows))
        return torch.stack(rows)[:, self.moving].float()

    def error_of(self, one: Seen, way: Way) -> float:
        """The worst step's distance from the clipped mean computed here, over clip / expected batch and record.

        NaN passes every number, and a client without steps is infinitely far.
        """
        plan = replace(self.plans[one.client], **way.changed)  # type: ignore[arg-type]
        errors = [
            float((self._find_added(one, step) - self._mean(one, step, plan))[self.moving].norm())
            * plan.expected_batch
            / plan.clip
            / max(1, len(step.drawn))
            for step in one.steps
        ]
        return max(errors, key=lambda error: (math.isnan(error), error), default=math.inf)

    def drawn(self, one: Seen) -> np.ndarray:
        """Times that each step took each record [steps, records]."""
        counts = np.zeros((self.steps, len(self.origins[one.client])))
        for row, step in zip(counts, one.steps, strict=False):
            np.add.at(row, np.searchsorted(self.origins[one.client], step.drawn), 1.0)
        return counts

    def _find_added(self, one: Seen, step: Step) -> Tensor:
        """A step's private gradient: what the optimizer got without the pulls that strategies add to it."""
        # Not the parameters that the audit knows. No check takes NaN for a pass.
        if len(step.released) != len(self.moving):
            return torch.full((len(self.moving),), math.nan, dtype=torch.float64)
        released = step.released.double().cpu()
        trained = self.local.model.form.select(self.told.trains).tensors
        # Penalties, and what halves add, come after the noise and are no part of what it protects.
        if self.local.model.penalty is not None:
            parts = step.before.split(list(self.sizes.values()))
            at = {key: part.view(value.shape) for (key, value), part in zip(trained.items(), parts, strict=True)}
            pulls = self.local.model.penalty.gradients(at, one.visit.start.tensors)
            flat = [pulls.get(key, torch.zeros(value.shape)).flatten() for key, value in trained.items()]
            released = released - torch.cat(flat).double()
        for half in one.halves:
            if mu := half.proximal(one.visit):
                released = released - mu * (step.before - one.steps[0].before).double().cpu()
            if offset := half.gradient_offset(one.visit):
                released = (
                    released
                    - torch.cat([padded(offset[key], value).flatten() for key, value in trained.items()]).double()
                )
        return released

    def _mean(self, one: Seen, step: Step, plan: Plan | None) -> Tensor:
        """The clipped sum of the records taken, over b."""
        total = torch.zeros(len(self.moving), dtype=torch.float64)
        if plan is None or len(step.drawn) == 0 or len(step.before) != len(total):
            return total
        # 64 at a time: a row is as long as all that trains, in double precision.
        for part in np.array_split(step.drawn, -(-len(step.drawn) // 64)):
            rows = self._gradients_at(one.client, part, step.before, plan)
            norms = torch.linalg.vector_norm(rows, dim=1)
            # As the mechanism does: a norm that float32 cannot hold has no weight.
            factors = torch.where(norms < 1e30, (plan.clip / (norms + 1e-6)).clamp(max=1.0), 0.0)
            total += factors @ rows.masked_fill(factors[:, None] == 0, 0.0)
        return total / plan.expected_batch

    def _gradients_at(self, client: str, numbers: np.ndarray, values: Tensor, plan: Plan) -> Tensor:
        """Per-sample gradients [N, P] in float64 at these values [P]."""
        model, data = self.local.model, self.local.train_data[client]
        parameters = model.train_roles(self.told.trains)
        device = next(iter(parameters.values())).device
        with torch.no_grad():
            for parameter, part in zip(parameters.values(), values.split(list(self.sizes.values())), strict=True):
                parameter.copy_(part.view_as(parameter))
        model.training_mode()
        with without_dropout(), first_token(model, data), model.competing(sequence.competing_classes(self.told)):
            rows, _ = per_sample_gradients(
                model.base.modules,
                parameters,
                partial(per_sample_loss, model),
                *on_device(data, numbers, device),
                rows=model.base.objective.rows,
            )
        model.base.backbone.eval()
        return rows.double().cpu()

    def _flatten_state(self, state: AdapterState) -> Tensor:
        form = self.local.model.form.select(self.told.trains).tensors
        return torch.cat([padded(state[key], value).flatten() for key, value in form.items()])

    # Judging a round -------------------------------------------------------------------------------------------------

    def coverage(self) -> list[Check]:
        """What moves in the model around rounds of the first client."""
        client, model = self.clients[0], self.local.model
        way = Way("coverage", [client], 1, {})
        data: dict[str, Encoded] = {client: Watched(self.local.train_data[client], client)}
        with Watch(data) as watch:  # type: ignore[arg-type]
            local = self.seen_local(self.config, self.folder / "coverage", 1, watch, {})
            requests = self.requests(way, 1)
            model.write(local.compose(*requests[0], before=1)[0])
            before = self._tensors()
            [one] = round_of(local, "alone", watch, requests)
        after = self._tensors()
        trains = {name for name, value in self._named_parameters() if value.requires_grad}
        return audit.coverage(before, after, trains, min((len(step.released) for step in one.steps), default=0))

    def _named_parameters(self) -> Iterable[tuple[str, Tensor]]:
        for index, module in enumerate(self.local.model.base.modules):
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                yield f"{index}.{name}", value

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._named_parameters()}


def loud(sent: AdapterState, trains: tuple[str, ...]) -> AdapterState:
    """What was sent with random changes of all that trains."""
    generator = seeds.torch_generator(0, "audit", "loud")
    chosen = {key: value for key, value in sent.select(trains).tensors.items() if ":" not in key}
    return sent.replace(
        {key: value + 0.1 * torch.randn(value.shape, generator=generator).to(value) for key, value in chosen.items()}
    )


def padded(value: Tensor, like: Tensor) -> Tensor:
    """The value in the leading corner of zeros of the shape of `like`, on the CPU."""
    full = torch.zeros(like.shape)
    full[tuple(map(slice, value.shape))] = value.cpu()
    return full


def steps_over_budget(here: World, client: str, folder: Path) -> int:
    """Steps that a client takes whose ledger in this folder is full."""
    rounds = Rounds(here, [client], ["alone"], folder)
    data = {client: Watched(here.local.train_data[client], client)}
    with Watch(data) as watch:
        guard = Probe(here.config, folder, watch, {})
        local = replace(here.local, guard=guard, store=Store(folder / "clients", 1), train_data=data, ready={})
        with suppress(BudgetExhausted):
            local.train(*rounds.requests(Way("budget", [client], 1, {}), 1)[0])
    return len(watch.steps.get(client, []))
