"""What one process does for the clients that it runs: a client's round from request to update, one or many at a time.

    open    the policy, the adapter to start from, and under DP the plan and the budget: all that comes before a step
    train   one client over the model, or a cohort of them at once (`clients.cohort`)
    close   under DP the ledger; then what the client keeps, and what goes back
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.clients import asked, inputs, rates, scoring, sequence, test_time
from fedpeft.clients.asked import Own
from fedpeft.clients.cohort.engine import Done, Job, cannot, train_cohort
from fedpeft.clients.guard import Guard, fingerprint, release
from fedpeft.clients.policy import Refused
from fedpeft.clients.spending import Spending, discreet
from fedpeft.clients.store import Store
from fedpeft.clients.train import CONTROL, Private, new_control, on_device, per_sample_loss, train
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError, RunError
from fedpeft.models.adapted import Adapted
from fedpeft.models.tail import first_token
from fedpeft.privacy.gradients import verify
from fedpeft.state import AdapterState
from fedpeft.strategies.sequence.sequence import Learning, learning_of
from fedpeft.strategies.wrappers.fedthe import FEATURES
from fedpeft.tta.deployed import deploy
from fedpeft.tta.methods.fedthe import mean_feature

T = TypeVar("T")
log = logging.getLogger("fedpeft")
Request = tuple[str, AdapterState, dict[str, Any]]  # client, what it received, its task
Answer = tuple[AdapterState, dict[str, float]]  # update, metrics
VERIFIED = 32  # tokens of the texts that gradients are verified on, if the model takes as many
COHORT_TOKENS = {"cpu": 2048}  # of one pass; other devices take 16384


@dataclass
class Visit:
    """A client's round that has been opened: what it starts from, what it kept, the job to train, how many records of
    its own are in it, and what it answered before, if this very request has come before.
    """

    client: str
    received: AdapterState
    task: dict[str, Any]
    start: AdapterState
    kept: dict[str, Tensor]
    spending: Spending
    job: Job
    count: int
    answered: Answer | None = None


@dataclass
class Local:
    """The base model once, and the data of the clients that this process runs.

    Attributes:
        initial: the strategy's round-0 adapter, drawn from the public seed.
        train_data, holdout: by client name.
        verified: role sets whose per-sample gradients have been checked.
        ready: by client and round, what `prepare` has trained ahead of the message.
        sequential: by trained roles, why clients cannot be trained as a cohort; `said` are the reasons in the log.
    """

    config: Config
    model: Adapted
    initial: AdapterState
    train_data: Mapping[str, Encoded]
    holdout: Mapping[str, Encoded]
    store: Store
    guard: Guard
    verified: set[tuple[str, ...]] = field(default_factory=set)
    ready: dict[tuple[str, int], Answer | Exception] = field(default_factory=dict)
    sequential: dict[tuple[str, ...], str] = field(default_factory=dict)
    said: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        test_time.require(self.config, self.model)

    @cached_property
    def own(self) -> Own:
        """This process's own reading of its config: what a server may ask."""
        tasks = self.config.continual.body is not None
        return Own(self.config, self.initial, inputs.classes_of(self.model) if tasks else None)

    @property
    def sequence(self) -> Learning | None:
        """The sequence of tasks of this process's own config."""
        return learning_of(self.own.strategy)

    # A client's round ------------------------------------------------------------------------------------------------

    def train(self, client: str, received: AdapterState, task: dict[str, Any]) -> Answer:
        """One round at one client.

        Under sample-level DP the request is checked and the policy asked before records are touched, the noisy steps
        are in the ledger before the update leaves, and the same request again gets the same update, which costs
        nothing more. What the client sends is a function of request, config, policy and ledger, and of noised sums
        that are in the ledger: a failure after records were touched is one sentence, and counted as if it were them.

        Raises:
            Refused, BudgetExhausted: the client takes no part in this round.
        """
        found = self.ready.pop((client, asked.number(task)), None)
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        return self._finish(self._open(client, received, task))

    def prepare(self, requests: list[Request]) -> None:
        """Train these requests of one round together, ahead of their messages; `train` then has the answers ready.

        Clients that have answered before are trained with the others, and what they get is thrown away: who trains
        beside a client decides how its sums are rounded, so a run that was killed in mid-round must not have others.
        """
        opened = [_attempt(self._open, *request) for request in requests]
        visits = [visit for visit in opened if isinstance(visit, Visit)]
        known = all(visit.answered is not None for visit in visits)
        done = None if known else _attempt(self._together, visits)
        each = iter(done if isinstance(done, list) else [done] * len(visits))
        self.ready = {}
        for (client, _, task), given in zip(requests, opened, strict=True):
            answer = _attempt(self._finish, given, next(each)) if isinstance(given, Visit) else given
            self.ready[client, asked.number(task)] = answer

    def _open(self, client: str, received: AdapterState, task: dict[str, Any]) -> Visit:
        number = asked.number(task)
        self.guard.admit(client, number)
        received = self.own.accept(client, received, task, max(number - 1, 0))
        task = sequence.own(self.sequence, task)
        start, kept = self.compose(client, received, task, before=number)
        spending, private, answered = Spending(client, client, number, sequence.account(client, task)), None, None
        if self.guard.private:
            spending.request = fingerprint(received, task)
            if found := self.store.reply(client, number, spending.request):
                answered = AdapterState(found[0], received.sites), found[1]
            with self._discreet(spending):
                plan = spending.plan = self.guard.plan(client, lambda: len(self.records(client, task)))
                assert plan is not None
                if answered is None:
                    self.guard.afford(spending.account, number, spending.request, plan)
                elif not answered[0].tensors:
                    spending.fail(self.guard)
            private = Private(plan, self.guard.source(client, number))
        with self._discreet(spending):
            data = self.records(client, task)
        if private is not None:
            with self._discreet(Spending(client, client, number, client)):  # costs nothing: it is about no record
                self._require_apart(data, task["trains"])
        corrections = None
        if control := received.select(("control",)).tensors:
            own = _own_control(control, kept)
            corrections = {key.removeprefix(CONTROL): value - own[key] for key, value in control.items()}
        tensors = {key: value for key, value in start.tensors.items() if key in self.model.parameters}
        seed = seeds.derive(self.config.run.seed, "round", number, "client", client)
        mixed = sequence.replayed(self.train_data[client], task, self.config.client, seed)
        job = Job(tensors, data if mixed is None else mixed, seed, float(task.get("prox_mu", 0.0)), corrections,
                  private, in_order=mixed is not None)
        return Visit(client, received, task, start, kept, spending, job, len(data), answered)

    def _finish(self, visit: Visit, done: Done | Exception | None = None) -> Answer:
        """Train, unless it has been done in a cohort, and close. What was answered before is answered again."""
        with self._discreet(visit.spending):
            if visit.answered is not None:
                return self._leave(visit, *visit.answered)
            if isinstance(done, Exception):
                raise done
            return self._close(visit, done or self._alone(visit))

    def _alone(self, visit: Visit) -> Done:
        self.model.write(visit.start)
        job, trains = visit.job, visit.task["trains"]
        with self.model.competing(sequence.compete(visit.task)):
            steps, loss = train(self.model, job.data, trains, self.config.client, job.seed, prox_mu=job.prox_mu,
                                control=job.control, private=job.private, in_order=job.in_order)
        return Done(self.model.read(visit.start.select(trains)).tensors, steps, loss)

    def _together(self, visits: list[Visit]) -> list[Done] | None:
        """Train a cohort; None where clients have to be trained one after another, which is said once."""
        tokens = self.config.run.cohort_tokens
        if tokens is None:
            tokens = COHORT_TOKENS.get(next(iter(self.model.parameters.values())).device.type, 16384)
        if len(visits) < 2 or tokens == 0:
            return None
        trains = tuple(visits[0].task["trains"])
        reason = self.sequential.get(trains) or cannot(self.model, list(trains)) or _unlike(visits)
        if reason is None:
            try:
                self.model.write(visits[0].start)  # what a strategy adds to the base weights is the same for all
                with self.model.competing(sequence.compete(visits[0].task)):
                    return train_cohort(self.model, [visit.job for visit in visits], list(trains), self.config.client,
                                        tokens)
            except InputError as error:
                reason = self.sequential[trains] = str(error)
            for visit in visits:  # each alone takes the draws from their beginning, as if nothing had been tried
                if visit.job.private is not None:
                    source = self.guard.source(visit.client, visit.spending.number)
                    visit.job.private = replace(visit.job.private, source=source)
        if reason not in self.said:
            self.said.add(reason)
            log.warning("clients are trained one after another, not as a cohort: %s", reason)
        return None

    def _close(self, visit: Visit, done: Done) -> Answer:
        client, task, start = visit.client, visit.task, visit.start
        after = AdapterState(done.after, start.sites)
        still = all(torch.equal(value, start[key]) for key, value in after.tensors.items())
        # A client with one class of a task has nothing to learn; whether a private one has is nobody's business.
        if still and "learn" not in task and visit.job.private is None:
            raise RunError(f"no trained tensor moved in {done.steps} steps; check client.lr and the adapter.")
        update = after.select(task["uploads"])
        keep = after.select(task["keeps"]).tensors
        if control := visit.received.select(("control",)).tensors:
            own = _own_control(control, visit.kept)
            before = {f"{CONTROL}{key}": value for key, value in start.tensors.items()}
            ended = {f"{CONTROL}{key}": value for key, value in after.tensors.items()}
            new = new_control(own, control, before, ended, done.steps, self.config.client.lr)
            update = update.replace({key: new[key] - own[key] for key in new})
            keep = {**keep, **new}
        number = visit.spending.number
        if visit.job.private is None and (sent := visit.received.select(("rates",)).tensors):
            self.model.write(start)
            update = update.replace(rates.learned(self.model, sent, visit.job.data, task["atp"], visit.job.seed))
            self.model.write(start.replace(after))
        if FEATURES in visit.received and visit.job.private is None:  # else nothing would cover it
            self.model.write(start.replace(after))
            update = update.replace({FEATURES: mean_feature(deploy(self.model), visit.job.data).cpu()})
        marks, missed = sequence.joined(visit.kept, task, client)
        keep = {**keep, **marks}
        if keep:  # what this round did not touch (the inactive factor's control) stays
            self.store.save(client, number, {**visit.kept, **keep})
        loss = 0.0 if visit.job.private is not None and math.isnan(done.loss) else done.loss  # it drew no record
        metrics = {"num-examples": float(visit.count), "train_loss": loss}
        if "learn" in task:
            metrics["missed_tasks"] = float(missed)
        metrics = self.guard.allowed(client, metrics)
        if visit.job.private is not None:
            self.store.save_reply(client, number, visit.spending.request, update.tensors, metrics)
        return self._leave(visit, update, metrics)

    def _leave(self, visit: Visit, update: AdapterState, metrics: dict[str, float]) -> Answer:
        """An answer, under DP once it is in the ledger.

        It is on the disk before it is counted, so that a process that is killed in between releases the very same
        one later, and it is counted before it leaves. Its number in the ledger is a hash of what it says: another
        answer to the same request (a lost file, other noise) is another release.
        """
        if visit.job.private is not None:
            spending = visit.spending
            self.guard.spend(spending.account, spending.number, release(spending.request, update),
                             visit.job.private.plan)
        return update, self.guard.allowed(visit.client, metrics)

    # Parts -----------------------------------------------------------------------------------------------------------

    def compose(
        self, client: str, received: AdapterState, task: dict[str, Any], before: int
    ) -> tuple[AdapterState, dict[str, Tensor]]:
        """The adapter a client starts from: round-0 values, what was sent, what it kept. And its kept tensors.

        Raises:
            RunError: what it drew from the seed is not what the server has.
        """
        static = task.get("static")
        if static and self.initial.select(static["roles"]).sha256() != static["sha256"]:
            raise RunError(
                f"roles {', '.join(static['roles'])} drawn from run.seed={self.config.run.seed} differ from the "
                "server's (another torch or transformers version?). Set strategy.transport=dense."
            )
        kept = self.store.load(client, before)
        tensors = {
            key: value for key, value in received.tensors.items() if ":" not in key and received.role(key) != "M"
        }
        for key, core in received.select(("M",)).tensors.items():
            A = f"{key.removesuffix('/M')}/A"
            tensors[A] = (core.double() @ self.initial[A].double()).to(self.initial[A].dtype)
        tensors |= {key: value for key, value in kept.items() if ":" not in key}
        return self.initial.replace(tensors), kept

    def evaluate(self, client: str, received: AdapterState, task: dict[str, Any]) -> dict[str, float]:
        number = asked.number(task)
        self.guard.admit(client, number)
        self.guard.admit_evaluation(client)
        received = self.own.accept(client, received, task, number)
        task = sequence.own(self.sequence, task)
        start, _ = self.compose(client, received, task, before=number + 1)
        return scoring.answer(self, client, received, start, task)

    def sums(self, client: str, received: AdapterState, task: dict[str, Any]) -> tuple[AdapterState, dict[str, float]]:
        """Sums over the client's records of a task that a head or a body of the server asks for (`clients.sequence`).

        Raises:
            Refused, BudgetExhausted: nothing leaves.
        """
        self.guard.admit(client, asked.number(task))
        received = self.own.accept_sums(received, task)
        return sequence.answer(self, client, received, sequence.own(self.sequence, task))

    def data(self, table: Mapping[str, Encoded], client: str) -> Encoded:
        found = table.get(client)
        if found is None or len(found) == 0:
            raise RunError(f"{client} has no records here.")
        return found

    def records(self, client: str, task: dict[str, Any]) -> Encoded:
        """The client's records of the round's task; under DP those that the model can take, which may be none."""
        if not self.guard.private:
            return sequence.records(self.data(self.train_data, client), task, client)
        return self.usable(sequence.of_task(self.train_data[client], task))

    def usable(self, data: Encoded) -> Encoded:
        return inputs.usable(self.model, data) if self.guard.private else data

    def _require_apart(self, like: Encoded, trains: list[str]) -> None:
        try:
            self.require_apart(like, trains)
        except InputError as error:
            raise Refused(str(error)) from error

    def require_apart(self, like: Encoded, *trains: list[str]) -> None:
        """Compare per-sample gradients with autograd, once for each set of trained roles, on drawn inputs.

        Values are those of round 0, so that nothing here depends on a request's values or on a record.

        Args:
            like: records to take the form of the inputs from.
            trains: sets of roles; none is all that a round of the config may train.

        Raises:
            InputError: they differ; names the parameter.
        """
        for roles in trains or self.own.trained(self.config.run.rounds):
            if tuple(roles) in self.verified:
                continue
            self.model.write(self.initial)
            parameters = self.model.train_roles(roles)
            device = next(iter(parameters.values())).device
            made = inputs.drawn(self.model, like, min(self.config.model.max_length, VERIFIED))
            batch, labels = on_device(made, np.arange(len(made)), device)
            self.model.training_mode()
            with first_token(self.model, made):
                verify(self.model.modules, parameters, partial(per_sample_loss, self.model), batch, labels)
            self.model.base.backbone.eval()
            self.verified.add(tuple(roles))

    def _discreet(self, spending: Spending) -> AbstractContextManager[None]:
        return discreet(self.guard, self.store, spending)


def _attempt(function: Callable[..., T], *arguments: Any) -> T | Exception:
    """What it returns, or the exception, which is raised again when the client's message comes."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _own_control(control: dict[str, Tensor], kept: dict[str, Tensor]) -> dict[str, Tensor]:
    """SCAFFOLD's c_k, zero before its first round."""
    return {key: kept.get(key, torch.zeros_like(value)) for key, value in control.items()}


def _unlike(visits: list[Visit]) -> str | None:
    """Why these visits cannot share one pass over the model; None if they can."""
    roles = ("residual_A", "residual_B")
    if any(visit.task["trains"] != visits[0].task["trains"] for visit in visits):
        return "they train different roles"
    if len({visit.start.select(roles).sha256() for visit in visits}) > 1:
        return "their base weights differ"
    return None
