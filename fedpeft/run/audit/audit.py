"""`fedpeft audit`: the checks of `fedpeft.privacy.audit` on a config's own model, data, sampling, noise and ledger.

What is tested is what a client runs. `rounds_seen` has whole rounds from request to reply, by `Local`,
alone and in a cohort, with records, without, and without noise. Single steps of both engines are asked for sensitivity:
at the adapter that clients start from and at one with random, large weights (a server may send any), at the config's
clip and a thousandth of it, where every record is clipped. Dropout is off there: its masks are drawn for a batch as a
whole, so neighbours would differ by them and not by the record. That costs nothing as long as the masks are secret,
drawn as the noise is; masks made from the run's seed are not (`public_seed`).

What is released is judged by its own numbers: the clipped mean by a sum computed here, the noise by what is left of a
step without it, epsilon by a second accountant, the update by the optimizer's steps over again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft import progress
from fedpeft.clients import train as training
from fedpeft.clients.cohort.engine import Job, train_cohort, why_not_cohort
from fedpeft.clients.guard import Guard
from fedpeft.clients.sequence import account_of_task
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError, RunError
from fedpeft.privacy import accounting, audit, second
from fedpeft.privacy.audit import Check
from fedpeft.privacy.ledger import Entry
from fedpeft.privacy.noise import Randomness, Seeded
from fedpeft.privacy.plan import Plan
from fedpeft.privacy.tails import ALARM
from fedpeft.run.audit import rounds_seen, streams
from fedpeft.run.audit.neighbours import gradients, neighbours
from fedpeft.run.audit.rounds_seen import ROUNDING
from fedpeft.run.audit.watched import Watch, Watched
from fedpeft.run.dtype import settle_dtype
from fedpeft.run.world import World, load_world, settle_clients
from fedpeft.seeds import torch_generator
from fedpeft.state import AdapterState

log = logging.getLogger("fedpeft")
PARTS = ("claims", "sensitivity", "public_seed", "rounds", "empty", "streams", "budget", "canaries")
EMPTY = 120  # steps of each engine on so few records that many are empty
SAME = 0.02  # of epsilon, that two accountants may be apart


def run(source: str | Path | dict[str, Any], overrides: Sequence[str] | dict[str, Any] = ()) -> dict[str, Any]:
    """Audit a config.

    Returns:
        config, passed, claim, measured_epsilon, false_alarm, seen, limits, and of every check: name, measured (None if
        not finite), allowed [low, high] (None where nothing bounds it), passed, what.

    Raises:
        InputError: the config is bad, or not one of sample-level privacy.
    """
    config = configs.load(source, overrides)
    if config.privacy.unit != "sample":
        raise InputError(
            f"privacy.unit={config.privacy.unit}: the audit tests DP-SGD at the clients. Set privacy.unit="
            "sample, with privacy.epsilon or privacy.noise_multiplier."
        )
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        run.mkdir()
        settle_clients(config, run)
        settle_dtype(config)
        subject = Audit(load_world(config, run), run)
        return {"config": configs.to_tree(config), **report(subject)}


def report(subject: Audit) -> dict[str, Any]:
    """All checks, and the claim that they are about."""
    plan, checks = subject.plan, [check for part in progress.each("parts", PARTS) for check in subject.part(part)]
    return {
        "passed": all(check.passed for check in checks),
        "claim": {
            "sample_rate": plan.sample_rate,
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
            "epsilon": subject.claim,
            "asked": subject.here.config.privacy.epsilon,
            "delta": plan.budget.delta,
        },
        "measured_epsilon": _finite_or_none(checks[-1].measured),
        "false_alarm": ALARM,
        "seen": subject.seen(),
        "checks": [
            {
                "name": check.name,
                "measured": _finite_or_none(check.measured),
                "allowed": [_finite_or_none(check.low), _finite_or_none(check.high)],
                "passed": check.passed,
                "what": check.what,
            }
            for check in checks
        ],
        "limits": list(audit.LIMITS),
    }


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


class Audit:
    """The checks on one world. Single steps are those of the client with the fewest records.

    Args:
        folder: for ledgers and client state; each check has its own, so that none meets another's budget.
    """

    def __init__(self, here: World, folder: Path) -> None:
        self.here, self.folder, self.local, self.config = here, folder / "audit", here.local, here.config
        self.clients = rounds_seen.chosen({name: len(data) for name, data in self.local.train_data.items()})
        self.client = self.clients[0]
        server = here.strategy.before_round(here.start)
        self.told = here.strategy.instructions(server)
        self.data = self.local.records(self.client, self.told)
        self.plan = self.plan_of(self.client)
        self.claim = self.cost(self.plan)
        self.start, _ = self.local.compose(self.client, here.strategy.broadcast(server, self.client), self.told, 1)
        self.engines = ["alone"]
        if not (
            why_not_cohort(self.local.model, self.told.trains)
            or self.config.run.cohort_tokens == 0
            or len(self.clients) < 2
        ):
            self.engines.append("cohort")

    def seen(self) -> dict[str, Any]:
        """What was run."""
        return {
            "clients": self.clients,
            "of": len(self.local.train_data),
            "engines": self.engines,
            "rounds": list(range(1, rounds_seen.rounds_of(self.config) + 1)),
        }

    def part(self, name: str) -> list[Check]:
        """The checks of one part; a part in which a client fails, or refuses what is in its budget, has not passed."""
        try:
            found: list[Check] = getattr(self, name)()
            return found
        except RunError as error:
            log.exception("the audit's part %s", name)
            self.local.model.write(self.start)
            return [Check(name, math.nan, 0.0, 0.0, f"stopped: {error}")]

    def plan_of(self, client: str) -> Plan:
        """A client's plan, from its records of the first task."""
        plan = self.local.guard.plan(client, lambda: len(self.local.records(client, self.told)))
        assert plan is not None  # the config is private
        return plan

    # Numbers ---------------------------------------------------------------------------------------------------------

    def releases(self, plan: Plan) -> tuple[accounting.Release, ...]:
        """All noisy releases of an account: steps, and the sums that a task's head is fitted on."""
        sums = self.config.continual.statistics_noise
        if sums is None:
            return (plan.release,)
        assert self.local.sequence is not None
        return plan.release, (1.0, sums, self.local.sequence.body.most_views)

    def cost(self, plan: Plan) -> float:
        """Epsilon of all releases of an account at the plan's delta, by the plan's accountant."""
        return accounting.compose_epsilon(self.releases(plan), plan.budget.delta, plan.budget.accountant)

    def claims(self) -> list[Check]:
        """The plans of all clients that are seen, against the config; epsilon, against a second accountant."""
        privacy, client = self.config.privacy, self.config.client
        costs: dict[str, float] = {}
        off: dict[str, float] = {}
        for name in self.clients:
            plan = self.plan_of(name)
            count = self.local.guard.records(name) or len(self.local.records(name, self.told))
            costs[name] = self.cost(plan)
            given = {
                "sample_rate": client.batch_size / count,
                "expected_batch": client.batch_size,
                "clip": privacy.clip,
                "noise_multiplier": privacy.noise_multiplier or plan.noise_multiplier,
                "steps": (client.local_steps or 0) * (privacy.planned_rounds or self.local.guard.rounds),
            }
            off |= {f"{key} of {name}": abs(getattr(plan, key) / value - 1) for key, value in given.items()}
        most, wrong = max(costs, key=lambda name: costs[name]), max(off, key=lambda key: off[key])
        again = second.epsilon(*self.plan.release, self.plan.budget.delta)
        one = accounting.compose_epsilon((self.plan.release,), self.plan.budget.delta, self.plan.budget.accountant)
        return [
            Check(
                "claim",
                costs[most],
                0.0,
                math.inf if privacy.epsilon is None else privacy.epsilon * (1 + 1e-9),
                f"epsilon that is claimed for {most}, the most of all; allowed: privacy.epsilon",
            ),
            Check(
                "plan",
                off[wrong],
                0.0,
                1e-9,
                "batch_size / records, batch_size, clip, noise, steps x rounds: how "
                f"far a plan is from the config; farthest: {wrong}",
            ),
            Check(
                "accountant",
                one / again,
                1 - SAME,
                math.inf,
                f"epsilon of the steps over that of a second accountant ({again:.4g}); rdp is above it",
            ),
        ]

    # Single steps ----------------------------------------------------------------------------------------------------

    def source(self, client: str, number: int) -> Randomness:
        """What this client's sampling and noise of this round are drawn from."""
        return Guard(self.config, self.folder / "source", "audit").source(client, number)

    def steps(
        self, engine: str, plan: Plan, sets: list[Encoded], start: AdapterState, source: Randomness
    ) -> list[Tensor]:
        """What a step releases [P] of each of these sets of records, by one engine; zeros for one that is left out."""
        model, trains = self.local.model, self.told.trains
        client = replace(self.config.client, local_steps=1)
        data = {str(index): Watched(some, str(index)) for index, some in enumerate(sets)}
        jobs = {
            name: Job(start.tensors, some, 0, private=training.Private(plan, source)) for name, some in data.items()
        }
        with Watch(data) as watch:
            if engine == "cohort":
                model.write(start)
                filled = [job for job in jobs.values() if len(job.data)]  # a client without records is in no cohort
                train_cohort(model, filled, trains, client, tokens=1 << 14)
            else:
                for watch.current, job in jobs.items():
                    model.write(start)
                    training.train(model, job.data, trains, client, 0, private=job.private)
        model.write(self.start)
        silent = torch.zeros(sum(value.numel() for value in model.form.select(trains).tensors.values()))
        return [watch.steps[name][0].released.cpu() if watch.steps[name] else silent for name in data]

    def sensitivity(self) -> list[Check]:
        """How far one record moves a clipped sum, over the clip: a check of each engine, one of the clipping alone."""
        source, rounding = self.source(self.client, 1), ROUNDING[self.config.model.dtype]

        def bare(plan: Plan, sets: list[Tensor]) -> list[Tensor]:
            return [plan.noised_mean(plan.clipped_sum(values), source) for values in sets]

        worst = []
        starts = (self.start, self._enlarge_weights())
        cases = [self._find_cases(start) for start in starts]
        for engine in self.engines:
            found = [
                audit.sensitivity(
                    "sensitivity" if engine == "alone" else "sensitivity in a cohort",
                    self._make_stepper(engine, start, source),
                    replace(self.plan, clip=scale * self.plan.clip),
                    some,
                    rounding,
                )
                for start, some in zip(starts, cases, strict=True)
                for scale in (1.0, 1e-3)
            ]
            worst.append(max(found, key=lambda check: (math.isnan(check.measured), check.measured)))
        return [*worst, audit.sensitivity("sensitivity of clipping", bare, self.plan, gradients(self.plan.clip))]

    def _make_stepper(
        self, engine: str, start: AdapterState, source: Randomness
    ) -> Callable[[Plan, list[Encoded]], list[Tensor]]:
        return lambda plan, sets: self.steps(engine, plan, sets, start, source)

    def _find_cases(self, start: AdapterState) -> list[tuple[Encoded, list[Encoded]]]:
        self.local.model.write(start)
        self.local.model.base.backbone.eval()
        found = list(neighbours(self.local.model, self.data, 2 * self.config.client.batch_size + 1))
        self.local.model.write(self.start)
        return found

    def _enlarge_weights(self) -> AdapterState:
        """Random adapter weights (no factor is zero), and a head so sure of itself that right answers weigh nothing."""
        generator = torch_generator(0, "audit", "weights")
        new = {}
        for key, value in self.start.select(self.told.trains).tensors.items():
            new[key] = value + 0.1 * torch.randn(value.shape, generator=generator)
            if self.start.role(key) == "head":
                new[key] = 20.0 * new[key]
        return self.start.replace(new)

    def public_seed(self) -> list[Check]:
        """Two rounds that differ in the seed of the run only, over how far they move."""
        model, client, trains = self.local.model, replace(self.config.client, local_steps=2), self.told.trains
        plan = replace(self.plan, sample_rate=1.0, noise_multiplier=0.0)
        data = self.data.view(np.arange(min(len(self.data), client.batch_size)))
        changes = []
        for engine in self.engines:
            ends = []
            for seed in (0, 1):
                model.write(self.start)
                private = training.Private(plan, Seeded(0))
                if engine == "cohort":
                    job = Job(self.start.tensors, data, seed, private=private)
                    ends.append(AdapterState(train_cohort(model, [job], trains, client, 1 << 14)[0].after))
                else:
                    training.train(model, data, trains, client, seed, private=private)
                    ends.append(model.read(self.start.select(trains)))
            changes.append(ends[0].distance(ends[1]) / max(ends[0].distance(self.start), 1e-30))
        model.write(self.start)
        return [
            Check(
                "public seed",
                max(changes),
                0.0,
                audit.ROUNDING,
                "change by another run.seed; whoever knows dropout's masks sees them differ between neighbours",
            )
        ]

    def empty(self) -> list[Check]:
        """Both engines on so few records that a batch has one on average."""
        few = min(len(self.data), max(1, round(1 / self.plan.sample_rate)))
        data, source = self.data.view(np.arange(few)), self.source(self.client, 1)
        sizes = []
        for engine in self.engines:
            some = Watched(data, "0")
            with Watch({"0": some}) as watch:
                watch.current = "0"
                self._train(engine, some, replace(self.config.client, local_steps=EMPTY), source)
            mine = [len(step.drawn) for step in watch.steps["0"]]
            sizes += mine + [-1] * (EMPTY - len(mine))  # steps that are left out are not empty ones
        return [audit.empty(np.array(sizes), few, self.plan.sample_rate)]

    def _train(self, engine: str, data: Encoded, client: ClientConfig, source: Randomness) -> None:
        model, trains, private = self.local.model, self.told.trains, training.Private(self.plan, source)
        model.write(self.start)
        if engine == "cohort":
            train_cohort(model, [Job(self.start.tensors, data, 0, private=private)], trains, client, 1 << 14)
        else:
            training.train(model, data, trains, client, 0, private=private)
        model.write(self.start)

    # Whole rounds ----------------------------------------------------------------------------------------------------

    def rounds(self) -> list[Check]:
        """Noise, sampling, ledger and replies of whole rounds, by both engines."""
        return rounds_seen.Rounds(self.here, self.clients, self.engines, self.folder / "rounds").checks()

    def streams(self) -> list[Check]:
        """Noise, masks and samples of the operating system's randomness, in this process twice and in two others."""
        return streams.checks(self.here, self.clients[:2], self.engines, self.folder / "streams")

    def budget(self) -> list[Check]:
        """A client whose ledger holds all planned steps takes no more."""
        folder, [client, *_] = self.folder / "budget", self.clients
        rounds = self.plan.steps // (self.config.client.local_steps or 1)
        guard = Guard(self.config, folder, "audit")
        ledger = guard.ledger(account_of_task(client, self.told))
        for number in range(1, rounds + 1):
            ledger.reserve(
                Entry(
                    "audit",
                    number,
                    f"spent {number}",
                    self.plan.sample_rate,
                    self.plan.noise_multiplier,
                    self.config.client.local_steps or 0,
                ),
                self.plan.budget,
                self.plan.release,
            )
        taken = rounds_seen.steps_over_budget(self.here, client, folder)
        return [Check("budget", float(taken), 0.0, 0.0, "steps of a client whose planned steps are all spent")]

    def canaries(self) -> list[Check]:
        """A lower bound of epsilon (95 %) from one run with canaries, which must not pass what is claimed."""
        measured, delta = audit.one_run(self.plan, self.source(self.client, 1)), self.plan.budget.delta
        most = audit.lower_bound(audit.CANARIES, audit.GUESSES, audit.GUESSES, delta)
        return [
            Check(
                "canaries",
                measured,
                0.0,
                self.claim,
                f"lower bound of epsilon (95 %) from one run; {audit.CANARIES} canaries can show at most {most:.2f}",
            )
        ]
