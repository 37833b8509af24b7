"""One process runs the rounds of its clients, from request to update, one client at a time or many together.

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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients import inputs, scoring, sequence, test_time
from fedpeft.clients.asked import Own
from fedpeft.clients.cohort.engine import Done, Job, train_cohort, why_not_cohort
from fedpeft.clients.guard import Guard, hash_request, name_release
from fedpeft.clients.opened import Answer, Opened, why_unlike
from fedpeft.clients.policy import Refused
from fedpeft.clients.rates import Clock
from fedpeft.clients.spending import Spending, hide_spending
from fedpeft.clients.store import MOMENTS, Store, moments_of
from fedpeft.clients.train import Private, train
from fedpeft.config import Config
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError, RunError
from fedpeft.state import AdapterState
from fedpeft.strategies.client import ClientHalf, Visit, client_halves
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.sequence.sequence import TaskSequence, find_sequence

T = TypeVar("T")
log = logging.getLogger("fedpeft")
Request = tuple[str, AdapterState, Instructions]  # client, what it received and was told
VERIFIED = 32  # tokens of the texts that gradients are verified on, if the model takes as many


@dataclass
class Local:
    """The base model once, and the data of the clients that this process runs.

    Attributes:
        initial: the strategy's round-0 adapter, drawn from the public seed.
        train_data, holdout: by client name.
        verified: role sets whose per-sample gradients have been checked.
        ready: by client and round, what `prepare` has trained ahead of the message.
        sequential: by trained roles, why clients cannot be trained as a cohort; `said` are the reasons in the log.
        looks: under DP, which records the model can take.
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
    looks: inputs.Looks = field(default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        test_time.require(self.config, self.model)

    @cached_property
    def own(self) -> Own:
        """This process's own reading of its config: what a server may ask."""
        tasks = self.config.continual.body is not None
        return Own(self.config, self.initial, self.model.base.classes if tasks else None)

    @cached_property
    def halves(self) -> list[ClientHalf]:
        """What the methods of this process's own config do at a client beside training."""
        return client_halves(self.own.strategy)

    @property
    def sequence(self) -> TaskSequence | None:
        """The sequence of tasks of this process's own config."""
        return find_sequence(self.own.strategy)

    # A client's round ------------------------------------------------------------------------------------------------

    def train(self, client: str, received: AdapterState, told: Instructions) -> Answer:
        """One round at one client.

        Under sample-level DP the request is checked and the policy asked before records are touched, the noisy steps
        are in the ledger before the update leaves, and the same request again gets the same update, which costs
        nothing more. What the client sends is a function of request, config, policy and ledger, and of noised sums
        that are in the ledger: a failure after records were touched is one sentence, and counted as if it were them.

        Raises:
            Refused, BudgetExhausted: the client takes no part in this round.
        """
        # Taken out: the same request again goes the long way, where store and ledger decide what it gets.
        found = self.ready.pop((client, told.round), None)
        if isinstance(found, Exception):
            raise found
        if found is not None:
            return found
        return self._finish_visit(self._open(client, received, told))

    def prepare(self, requests: list[Request]) -> None:
        """Train these requests of one round together, ahead of their messages; `train` then has the answers ready.

        Clients that have answered before are trained with the others, and what they get is thrown away: who trains
        beside a client decides how its sums are rounded, so a run that was killed in mid-round must not have others.
        """
        opened = [_attempt_early(self._open, *request) for request in requests]
        good = [one for one in opened if isinstance(one, Opened)]
        known = all(one.answered is not None for one in good)
        done = None if known else _attempt_early(self._together, good)
        each = iter(done if isinstance(done, list) else [done] * len(good))
        # Answers that nobody came for would pile up.
        self.ready = {}
        for (client, _, told), given in zip(requests, opened, strict=True):
            answer = _attempt_early(self._finish_visit, given, next(each)) if isinstance(given, Opened) else given
            self.ready[client, told.round] = answer

    def _open(self, client: str, received: AdapterState, told: Instructions) -> Opened:
        number = told.round
        # The policy speaks before anything of the client's is read, its kept state included.
        self.guard.admit(client, number)
        received = self.own.accept(client, received, told, max(number - 1, 0))
        sequence.require_own_task(self.sequence, told)
        start, kept = self.compose(client, received, told, before=number)
        spending = Spending(client, client, number, sequence.account_of_task(client, told))
        private, answered = None, None
        if self.guard.private:
            spending.request = hash_request(received, told)
            # The same request gets the same bits: new noise on the same records would be a second release.
            if found := self.store.reply(client, number, spending.request):
                answered = replace(found[0], sites=received.sites), found[1]  # the store keeps no sites
            # The plan may count records, so from here on a failure could tell something of them.
            with self._hide_spending(spending):
                plan = spending.plan = self.guard.plan(client, lambda: len(self.records(client, told)))
                assert plan is not None
                if answered is None:
                    # Before training: what cannot be paid for cannot be sent, and need not be computed.
                    self.guard.afford(spending.account, number, spending.request, plan)
                # An empty answer is a failure that the store remembers; the ledger counts it once.
                elif not answered[0].payload:
                    spending.fail(self.guard)
            # A new source a request: seeded draws begin anew, so a repeated round takes the same batches and noise.
            private = Private(plan, self.guard.source(client, number))
        with self._hide_spending(spending):
            data = self.records(client, told)
        if private is not None:
            with self._hide_spending(Spending(client, client, number, client)):  # costs nothing: it is about no record
                self._require_apart(data, told.trains)
        with self._hide_spending(spending):  # replay and the halves see records
            visit, job = self._plan_visit(client, received, told, start, kept, data, private)
        return Opened(visit, told, spending, job, len(data), answered)

    def _plan_visit(
        self,
        client: str,
        received: AdapterState,
        told: Instructions,
        start: AdapterState,
        kept: dict[str, Tensor],
        data: Encoded,
        private: Private | None,
    ) -> tuple[Visit, Job]:
        """The visit that client halves see, and the job that they have made of the round."""
        # Derived from names, not drawn from a generator: who else runs in this process, and when, changes nothing.
        seed = seeds.derive(self.config.run.seed, "round", told.round, "client", client)
        mixed = sequence.mix_replay(self.train_data[client], told, self.config.client, seed)
        shown = inputs.draw_anew(self.config, data if mixed is None else mixed, seed)
        clock = Clock(max(told.round, 1), self.config.run.rounds)
        visit = Visit(client, self.config.client, self.model, received, start, kept, shown, seed, clock=clock)
        offset: dict[str, Tensor] = {}
        for half in self.halves:
            for key, value in half.gradient_offset(visit).items():
                offset[key] = offset[key] + value if key in offset else value
        # Without residuals: `write` adds those to the base weights, where nothing trains.
        tensors = {key: value for key, value in start.tensors.items() if key in self.model.parameters}
        return visit, Job(
            tensors,
            shown,
            seed,
            sum(half.proximal(visit) for half in self.halves),
            offset or None,
            private,
            in_order=mixed is not None,
            clock=clock,
            moments=moments_of(kept) if self.config.client.keep_optimizer else None,
            thin=self.model.thinning(start, seed),
        )

    def _finish_visit(self, opened: Opened, done: Done | Exception | None = None) -> Answer:
        """Train, unless it has been done in a cohort, and close. What was answered before is answered again."""
        with self._hide_spending(opened.spending):
            if opened.answered is not None:
                return self._leave_answer(opened, *opened.answered)
            if isinstance(done, Exception):
                raise done
            return self._close(opened, done or self._train_alone(opened))

    def _train_alone(self, opened: Opened) -> Done:
        start, job, trains = opened.visit.start, opened.job, opened.told.trains
        self.model.write(start)
        with self.model.competing(sequence.competing_classes(opened.told)):
            moments = None if job.moments is None else {**job.moments}
            config = self.config.client
            steps, loss = train(self.model, job.data, trains, config, job.seed, moments=moments, **job.settings)
        return Done(self.model.read(start.select(trains)).tensors, steps, loss, moments)

    def _together(self, cohort: list[Opened]) -> list[Done] | None:
        """Train a cohort; None where clients have to be trained one after another, which is said once."""
        tokens = self.config.run.cohort_tokens
        if len(cohort) < 2 or tokens == 0:
            return None
        trains = cohort[0].told.trains
        reason = self.sequential.get(trains) or why_not_cohort(self.model, trains) or why_unlike(cohort)
        if reason is None:
            try:
                self.model.write(cohort[0].visit.start)  # what a strategy adds to the base weights is the same for all
                with self.model.competing(sequence.competing_classes(cohort[0].told)):
                    return train_cohort(
                        self.model, [opened.job for opened in cohort], trains, self.config.client, tokens
                    )
            # A layer that mixes the samples of clients is found out in its first pass only.
            except InputError as error:
                reason = self.sequential[trains] = str(error)
            for opened in cohort:  # each alone takes the draws from their beginning, as if nothing had been tried
                if opened.job.private is not None:
                    source = self.guard.source(opened.visit.client, opened.spending.number)
                    opened.job.private = replace(opened.job.private, source=source)
        if reason not in self.said:
            self.said.add(reason)
            log.warning("clients are trained one after another, not as a cohort: %s", reason)
        return None

    def _close(self, opened: Opened, done: Done) -> Answer:
        visit, told, private = opened.visit, opened.told, opened.job.private
        trained = AdapterState(done.after, visit.start.sites)
        still = all(torch.equal(value, visit.start[key]) for key, value in trained.tensors.items())
        # A client with one class of a task has nothing to learn; whether a private one has is nobody's business.
        if still and told.learn is None and private is None:
            raise RunError(
                f"no trained tensor moved in {done.steps} steps; check client.lr, its schedule and the adapter."
            )
        visit.steps = done.steps
        update, keep = trained.select(told.uploads), trained.select(told.keeps).tensors
        for half in self.halves:
            sent, kept = half.finish(visit, trained)
            update, keep = update.beside(sent), {**keep, **kept}
        marks, missed = sequence.mark_task(visit.kept, told, visit.client)
        keep = {**keep, **marks, **{f"{MOMENTS}{name}": value for name, value in (done.moments or {}).items()}}
        # Before the answer: a kill in between has the round done again from the older state. The other way round the
        # answer would stand, be given again, and what belongs to it would never be written.
        # NaN would be what every later round begins with, so that the client never came back.
        if not all(bool(torch.isfinite(value).all()) for value in keep.values()):
            log.warning("%s: round %d left NaN or inf, so nothing of it is kept", visit.client, opened.spending.number)
        elif keep:  # what this round did not touch (the inactive factor's control) stays
            name = "" if private is None else name_release(opened.spending.request, update)
            counted = partial(self.guard.counted, visit.client)
            self.store.save(visit.client, opened.spending.number, {**visit.kept, **keep}, name, counted)
        # NaN would be refused by the server, and so tell it that no record was drawn.
        loss = 0.0 if private is not None and math.isnan(done.loss) else done.loss  # it drew no record
        metrics = {"num-examples": float(opened.count), "train_loss": loss}
        if told.learn is not None:
            metrics["missed_tasks"] = float(missed)
        metrics = self.guard.allowed(visit.client, metrics)
        if private is not None:
            self.store.save_reply(visit.client, opened.spending.number, opened.spending.request, update, metrics)
        return self._leave_answer(opened, update, metrics)

    def _leave_answer(self, opened: Opened, update: AdapterState, metrics: dict[str, float]) -> Answer:
        """An answer, under DP once it is in the ledger.

        It is on the disk before it is counted, so that a process that is killed in between releases the very same
        one later, and it is counted before it leaves. Its number in the ledger is a hash of what it says: another
        answer to the same request (a lost file, other noise) is another release.
        """
        if opened.job.private is not None:
            spending = opened.spending
            self.guard.spend(
                spending.account, spending.number, name_release(spending.request, update), opened.job.private.plan
            )
        # Asked again: an answer that was kept may be older than what the policy says now.
        return update, self.guard.allowed(opened.visit.client, metrics)

    # Parts -----------------------------------------------------------------------------------------------------------

    def compose(
        self, client: str, received: AdapterState, told: Instructions, before: int
    ) -> tuple[AdapterState, dict[str, Tensor]]:
        """The adapter a client starts from: round-0 values, what was sent, what it kept. And its kept tensors.

        Raises:
            RunError: what it drew from the seed is not what the server has.
        """
        static = told.static
        if static is not None and self.initial.select(static.roles).sha256() != static.sha256:
            raise RunError(
                f"roles {', '.join(static.roles)} drawn from run.seed={self.config.run.seed} differ from the "
                "server's (another torch, transformers or peft?). Set strategy.transport=dense, if it has that."
            )
        # Private: only what the ledger has counted. A round that was never counted must not be part of what is sent.
        kept = self.store.load(client, before, partial(self.guard.counted, client))
        # The store has more than adapter tensors: control variates, marks of tasks.
        personal = {key: value for key, value in kept.items() if key in self.initial}
        # Last wins: what stays with the client comes before what was sent.
        start = self.initial.replace({**received.tensors, **personal})
        for half in self.halves:
            start = half.start(start)
        return start, kept

    def evaluate(self, client: str, received: AdapterState, told: Instructions) -> dict[str, float]:
        """Metrics of what was sent, on the client's own records; its policy may refuse them (Refused)."""
        number = told.round
        self.guard.admit(client, number)
        self.guard.admit_evaluation(client)
        received = self.own.accept(client, received, told, number)
        sequence.require_own_task(self.sequence, told)
        # After the round, not before it: with what the client kept in this very round.
        start, _ = self.compose(client, received, told, before=number + 1)
        return scoring.answer(self, client, received, start, told)

    def sums(self, client: str, received: AdapterState, told: Instructions) -> tuple[AdapterState, dict[str, float]]:
        """Sums over the client's records of a task that a head or a body of the server asks for (`clients.sequence`).

        Raises:
            Refused, BudgetExhausted: nothing leaves.
        """
        self.guard.admit(client, told.round)
        received = self.own.accept_sums(received, told)
        sequence.require_own_task(self.sequence, told)
        return sequence.answer_sums(self, client, received, told)

    def data(self, table: Mapping[str, Encoded], client: str) -> Encoded:
        """A client's records in one of the tables; none is a RunError."""
        found = table.get(client)
        if found is None or len(found) == 0:
            raise RunError(f"{client} has no records here.")
        return found

    def records(self, client: str, told: Instructions) -> Encoded:
        """The client's records of the round's task; under DP those that the model can take, which may be none."""
        if not self.guard.private:
            return sequence.records_of_task(self.data(self.train_data, client), told, client)
        # Having none is no error here: an error would tell that there are none.
        return self.usable(sequence.select_task(self.train_data[client], told))

    def usable(self, data: Encoded) -> Encoded:
        """The records that the model can take; without DP all, as one that it cannot take is then an error."""
        return inputs.find_usable(self.model, data, self.looks) if self.guard.private else data

    def _require_apart(self, like: Encoded, trains: tuple[str, ...]) -> None:
        try:
            self.require_apart(like, trains)
        except InputError as error:
            raise Refused(str(error)) from error

    def require_apart(self, like: Encoded, *trains: tuple[str, ...]) -> None:
        """Compare per-sample gradients with autograd, once for each set of trained roles, on drawn inputs.

        Values are those of round 0, so that nothing here depends on a request's values or on a record.

        Args:
            like: records to take the form of the inputs from.
            trains: sets of roles; none is all that a round of the config may train.

        Raises:
            InputError: they differ; names the parameter.
        """
        for roles in trains or self.own.trained(self.config.run.rounds):
            if roles in self.verified:
                continue
            self.model.write(self.initial)
            inputs.verify_gradients(self.model, like, roles, min(self.config.model.max_length, VERIFIED))
            self.verified.add(roles)

    def _hide_spending(self, spending: Spending) -> AbstractContextManager[None]:
        return hide_spending(self.guard, self.store, spending)


def _attempt_early(function: Callable[..., T], *arguments: Any) -> T | Exception:
    """What it returns, or the exception, which is raised again when the client's message comes."""
    try:
        return function(*arguments)
    except Exception as error:
        return error
