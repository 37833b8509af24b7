"""`fedpeft audit`: the checks of `fedpeft.privacy.audit` on a config's own model, data, sampling, noise and ledger.

What is tested is what a client runs: `private_steps` with one client's records for a single step, `Local.train` for
whole rounds. Sensitivity is tested at the adapter that clients start from and at one with random, large weights (a
server may send any), and at the config's clip and a thousandth of it, where every record is clipped. Dropout is off
there: its masks are drawn for a batch as a whole, so neighbours would differ by them and not by the record. That costs
nothing as long as the masks are secret, drawn as the noise is; masks made from the run's seed are not (`public_seed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients import train as training
from fedpeft.clients.cohort import Job, cannot, train_cohort
from fedpeft.clients.learning import account, records
from fedpeft.clients.private import Guard
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.data.encode import IGNORE, Encoded
from fedpeft.errors import InputError
from fedpeft.privacy import accounting, audit
from fedpeft.privacy.audit import Check
from fedpeft.privacy.noise import Randomness, Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.seeds import torch_generator
from fedpeft.simulations.world import World, world
from fedpeft.state import AdapterState

VALUES, STEPS, ROUNDS = 100_000, 300, 2
ROUNDING = {"float32": audit.ROUNDING, "bfloat16": 0.05}  # in bfloat16 the shape of a batch moves every gradient in it


def run(source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = ()) -> dict[str, Any]:
    """Audit a config.

    Returns:
        config, passed, claim, measured_epsilon, and of every check: name, measured (None if not finite), allowed
        [low, high], passed, what.

    Raises:
        InputError: the config is bad, or not one of sample-level privacy.
    """
    config = configs.load(source, overrides)
    if config.privacy.unit != "sample":
        raise InputError(f"privacy.unit={config.privacy.unit}: the audit tests DP-SGD at the clients. Set privacy.unit="
                         "sample, with privacy.epsilon or privacy.noise_multiplier.")
    with TemporaryDirectory() as folder:
        here = world(configs.to_yaml(config), Path(folder))
        try:
            return {"config": configs.to_tree(config), **report(Audit(here, Path(folder)))}
        finally:
            world.cache_clear()  # its folder is gone


def report(subject: Audit) -> dict[str, Any]:
    """All checks, and the claim that they are about."""
    plan, [canaries] = subject.plan, subject.canaries()
    checks = [*subject.sensitivity(), *subject.public_seed(), *subject.noise(), *subject.sampling(), *subject.rounds(),
              *subject.cohort(), canaries]
    return {
        "passed": all(check.passed for check in checks),
        "claim": {"sample_rate": plan.sample_rate, "noise_multiplier": plan.noise_multiplier, "steps": plan.steps,
                  "epsilon": subject.claim, "delta": plan.budget.delta},
        "measured_epsilon": canaries.measured,
        "checks": [{"name": check.name, "measured": check.measured if math.isfinite(check.measured) else None,
                    "allowed": [check.low, check.high], "passed": check.passed, "what": check.what}
                   for check in checks],
        "limits": audit.LIMITS,
    }


class Audit:
    """The checks on one world. The client with the fewest records is the one tested.

    Args:
        folder: for ledgers and client state; each check has its own, so that none meets another's budget.
    """

    def __init__(self, here: World, folder: Path) -> None:
        self.here, self.folder, self.local = here, folder, here.local
        self.client = min(self.local.train_data, key=lambda name: len(self.local.train_data[name]))
        server = here.strategy.before_round(here.start)
        self.task = here.strategy.task(server)
        self.data = records(self.local.train_data[self.client], self.task, self.client)
        plan = self.local.guard.plan(self.client, lambda: len(self.data))
        assert plan is not None  # the config is private
        self.plan = plan
        self.claim = accounting.composed((self.plan.release,), self.plan.budget.delta, self.plan.budget.accountant)
        self.start, _ = self.local.compose(self.client, here.strategy.broadcast(server, self.client), self.task, 1)
        self.ledgers = 0

    def source(self, client: str, number: int) -> Randomness:
        """What this client's sampling and noise of this round are drawn from."""
        self.ledgers += 1
        guard = Guard(self.here.config, self.folder / "audit" / str(self.ledgers), "audit")
        return guard.source(client, number)

    def steps(self, plan: Plan, data: Encoded, source: Randomness, count: int = 1) -> Iterator[dict[str, Tensor]]:
        """What `count` steps release of these records, at the model's weights as they are."""
        parameters = self.local.model.train_roles(self.task["trains"])
        client = replace(self.here.config.client, local_steps=count)
        device = next(iter(parameters.values())).device
        private = training.Private(plan, source)
        for released, _ in training.private_steps(self.local.model, data, parameters, client, private, device):
            yield released

    def silent(self) -> dict[str, Tensor]:
        """What a step releases that is left out."""
        parameters = self.local.model.train_roles(self.task["trains"])
        return {key: torch.zeros_like(parameter) for key, parameter in parameters.items()}

    # Sensitivity -----------------------------------------------------------------------------------------------------

    def sensitivity(self) -> list[Check]:
        source, rounding = self.source(self.client, 1), ROUNDING[self.here.config.model.dtype]

        def step(plan: Plan, data: Encoded) -> Tensor:
            released = next(self.steps(plan, data, source), self.silent())
            return torch.cat([value.flatten() for value in released.values()])

        def bare(plan: Plan, values: Tensor) -> Tensor:
            return plan.noised_mean(plan.clipped_sum(values), source)

        found = []
        self.local.model.base.backbone.eval()
        for large in (False, True):
            self.local.model.write(self.start)
            if large:
                self._enlarge()
            cases = list(neighbours(self.local.model, self.data, 2 * self.here.config.client.batch_size + 1))
            found += [audit.sensitivity("sensitivity", step, replace(self.plan, clip=scale * self.plan.clip), cases,
                                        rounding) for scale in (1.0, 1e-3)]
        self.local.model.write(self.start)
        worst = max(found, key=lambda check: (math.isnan(check.measured), check.measured))
        return [worst, audit.sensitivity("sensitivity of clipping", bare, self.plan, gradients(self.plan.clip))]

    @torch.no_grad()
    def _enlarge(self) -> None:
        """Random adapter weights (no factor is zero), and a head so sure of itself that right answers weigh nothing."""
        generator = torch_generator(0, "audit", "weights")
        for key, parameter in self.local.model.train_roles(self.task["trains"]).items():
            parameter.add_((0.1 * torch.randn(parameter.shape, generator=generator)).to(parameter))
            if self.start.role(key) == "head":
                parameter.mul_(20.0)

    def public_seed(self) -> list[Check]:
        """Two rounds that differ in the seed of the run only, over how far they move."""
        model, client = self.local.model, replace(self.here.config.client, local_steps=2)
        plan = replace(self.plan, sample_rate=1.0, noise_multiplier=0.0)
        data = self.data.subset(np.arange(min(len(self.data), client.batch_size)))
        ends = []
        for seed in (0, 1):
            model.write(self.start)
            training.train(model, data, self.task["trains"], client, seed, private=training.Private(plan, Seeded(0)))
            ends.append(model.read(self.start.select(self.task["trains"])))
        model.write(self.start)
        change = ends[0].distance(ends[1]) / max(ends[0].distance(self.start), 1e-30)
        return [Check("public seed", change, 0.0, audit.ROUNDING,
                      "change by another run.seed; whoever knows dropout's masks sees them differ between neighbours")]

    # Noise, sampling -------------------------------------------------------------------------------------------------

    def noise(self) -> list[Check]:
        """Steps that draw no record: of two rounds, and of two clients where there are."""
        plan, silent = replace(self.plan, sample_rate=0.0), self.silent()
        count = max(4, -(-VALUES // sum(value.numel() for value in silent.values())))
        others = [name for name in self.local.train_data if name != self.client][:1]
        streams = []
        for client, number in [(self.client, 1), (self.client, 2), *((other, 1) for other in others)]:
            taken = list(self.steps(plan, self.data, self.source(client, number), count))
            streams.append(taken + [silent] * (count - len(taken)))
        return audit.noise(streams, plan)

    def sampling(self) -> list[Check]:
        few = min(len(self.data), max(1, round(1 / self.plan.sample_rate)))
        rate = self.plan.sample_rate
        return [*audit.sampler(self._draws(self.data), len(self.data), rate),
                audit.empty(self._draws(self.data.subset(np.arange(few))), STEPS, few, rate)]

    def _draws(self, data: Encoded) -> list[np.ndarray]:
        """Which records each step took."""
        watched, draws = Watched(data.inputs, data.labels), []
        for _ in self.steps(self.plan, watched, self.source(self.client, 1), STEPS):
            draws.append(np.concatenate([np.empty(0, dtype=np.int64), *watched.seen]))
            watched.seen.clear()
        return draws

    # Whole rounds ----------------------------------------------------------------------------------------------------

    def rounds(self) -> list[Check]:
        """Coverage and ledger of whole rounds of one client, as its ClientApp runs them."""
        guard = Counting(self.here.config, self.folder / "audit" / "rounds", "audit")
        rounds = min(ROUNDS, self.here.config.privacy.planned_rounds or self.here.config.run.rounds)
        local = replace(self.local, guard=guard, store=Store(self.folder / "audit" / "clients", history=1))
        covered = []
        for number in range(1, rounds + 1):
            server = self.here.strategy.before_round(replace(self.here.start, round=number - 1))
            task = {**self.here.strategy.task(server), "round": number}
            sent = self.here.strategy.broadcast(server, self.client)
            local.model.write(local.compose(self.client, sent, task, before=number)[0])
            before, seen = self._tensors(), len(guard.sizes)
            local.train(self.client, sent, task)
            trains = {name for name, value in self._named() if value.requires_grad}
            covered.append(audit.coverage(before, self._tensors(), trains, min(guard.sizes[seen:], default=0)))
        self.local.model.write(self.start)
        reserved = sum(entry.steps for entry in guard.ledger(account(self.client, self.task)).entries())
        worst = [max(same, key=lambda check: abs(check.measured)) for same in zip(*covered, strict=True)]
        return [*worst, audit.ledger(reserved, len(guard.sizes))]

    def cohort(self) -> list[Check]:
        """Where simulated clients train together: how far two of them end from where each ends alone."""
        model, trains, config = self.local.model, self.task["trains"], self.here.config
        if cannot(model, trains) or config.run.cohort_tokens == 0:
            return []
        client, start = replace(config.client, local_steps=2), self.start.tensors
        jobs = [Job(start, self.data, 0, private=training.Private(self.plan, Seeded(number))) for number in (0, 1)]
        model.write(self.start)
        together = train_cohort(model, jobs, trains, client, tokens=1 << 20)
        worst = 0.0
        for number, done in enumerate(together):
            model.write(self.start)
            training.train(model, self.data, trains, client, 0, private=training.Private(self.plan, Seeded(number)))
            alone = model.read(self.start.select(trains))
            worst = max(worst, alone.distance(AdapterState(done.after, alone.sites)) / alone.distance(self.start))
        model.write(self.start)
        return [Check("cohort", worst, 0.0, 10 * ROUNDING[config.model.dtype],
                      "distance from clients trained alone over what they moved; dropout differs")]

    def canaries(self) -> list[Check]:
        measured, delta = audit.one_run(self.plan, self.source(self.client, 1)), self.plan.budget.delta
        most = audit.lower_bound(audit.CANARIES, audit.GUESSES, audit.GUESSES, delta)
        return [Check("canaries", measured, 0.0, self.claim, "lower bound of epsilon (95 %) from one run; "
                      f"{audit.CANARIES} canaries can show at most {most:.2f}")]

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for index, module in enumerate(self.local.model.modules):
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                yield f"{index}.{name}", value

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self._named()}


@dataclass(frozen=True)
class Watched(Encoded):
    """Records that note which of them a step takes, and hand out one: what matters is who was drawn."""

    seen: list[np.ndarray] = field(default_factory=list)

    def batch(self, indices: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
        self.seen.append(indices)
        return super().batch(indices[:1])


class Counted:
    """A source that notes how many values each call for noise took: a call is a noisy step."""

    def __init__(self, source: Randomness, sizes: list[int]) -> None:
        self.source, self.sizes = source, sizes

    def uniform(self, count: int) -> np.ndarray:
        return self.source.uniform(count)

    def normal(self, count: int) -> np.ndarray:
        self.sizes.append(count)
        return self.source.normal(count)


class Counting(Guard):
    """A guard whose sources count noisy steps."""

    def __init__(self, config: Config, folder: Path, run: str) -> None:
        super().__init__(config, folder, run)
        self.sizes: list[int] = []

    def source(self, client: str, number: int, *purpose: str) -> Randomness:
        return Counted(super().source(client, number, *purpose), self.sizes)


# Neighbours ----------------------------------------------------------------------------------------------------------


def neighbours(model: Adapted, data: Encoded, count: int) -> Iterator[tuple[Encoded, list[Encoded]]]:
    """Sets of records, and each set with one record more: an ordinary one, or an adversary's.

    The sets: none; one or `count` records labelled with what the model answers, whose gradients are small, and near
    zero where it is sure; `count` as they are. The adversary's records: one of the set with the runner-up as its label,
    which pulls against it; the least likely label; inputs out of all proportion, or not numbers; texts of full length,
    or of one token; no label, and so no gradient.
    """
    first, last = data.subset(np.arange(1)), data.subset(np.array([len(data) - 1]))
    many = data.subset(np.arange(min(count, len(data) - 1)))
    sets = [data.subset(np.arange(0)), labelled(model, first, best), labelled(model, many, best), many]
    more = [last, labelled(model, first, second), labelled(model, last, worst), unlabelled(last),
            *(labelled(model, record, worst) for record in extreme(last))]
    for some in sets:
        yield some, [joined(some, record) for record in more]


def gradients(clip: float, width: int = 64) -> list[tuple[Tensor, list[Tensor]]]:
    """Cases as per-sample gradients [N, P]: aligned ones of several norms, and an adversary's against them."""
    axis, corner = torch.eye(1, width) * clip, torch.full((1, width), -clip)
    adversary = [-1e6 * axis, -axis, corner, 1e-3 * axis, math.nan * axis, math.inf * corner, 0.0 * axis]
    alike = [(size * axis).repeat(count, 1) for size in (1e-2, 1.0, 1e3) for count in (0, 1, 20)]
    return [(some, [torch.cat([some, one]) for one in adversary]) for some in alike]


def best(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def second(logits: Tensor) -> Tensor:
    return logits.topk(2).indices[..., 1]


def worst(logits: Tensor) -> Tensor:
    return logits.argmin(-1)


@torch.no_grad()
def labelled(model: Adapted, data: Encoded, choose: Callable[[Tensor], Tensor]) -> Encoded:
    """The records with labels chosen from the model's own logits; for causal-lm, token by token."""
    device, labels = next(iter(model.parameters.values())).device, data.labels.clone()
    for index in range(len(data)):
        inputs, _ = training.on_device(data, np.array([index]), device)
        answer = choose(model.logits(inputs))[0].cpu()
        if labels.ndim == 1:
            labels[index] = answer
        else:
            labels[index, 1 : len(answer)] = answer[:-1]
    return Encoded(data.inputs, labels)


def unlabelled(data: Encoded) -> Encoded:
    return Encoded(data.inputs, torch.full_like(data.labels, IGNORE))


def extreme(record: Encoded) -> list[Encoded]:
    """A record with inputs that no honest client has."""
    if "attention_mask" in record.inputs:
        mask = record.inputs["attention_mask"]
        first = torch.zeros_like(mask)
        first[:, 0] = 1
        return [Encoded({**record.inputs, "attention_mask": value}, record.labels)
                for value in (torch.ones_like(mask), first)]
    return [Encoded({name: factor * value for name, value in record.inputs.items()}, record.labels)
            for factor in (1e3, -1e3, math.nan)]


def joined(some: Encoded, record: Encoded) -> Encoded:
    return Encoded({name: torch.cat([value, record.inputs[name]]) for name, value in some.inputs.items()},
                   torch.cat([some.labels, record.labels]))
