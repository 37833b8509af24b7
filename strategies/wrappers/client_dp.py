"""Client-level differential privacy by noise at a trusted server: DP-FedAvg. McMahan et al. 2018, arXiv 1710.06963.

    S = sum_k min(1, C / ||d_k||) d_k + N(0, (z C)^2 I),   d_k all that client k changed, A, B and head together
    the strategy inside gets one update, theta + S / m;   m = run.clients_per_round or data.clients, a constant

Every client counts alike and m does not follow who replied, so one client moves S by at most C. What the strategy
inside makes of the one update is post-processing. A round without replies is noise alone, and counts like any other.

Adaptive clipping (Andrew et al. 2021, arXiv 1905.03871) releases also which share of the norms is at most C:

    b = 1/2 + (sum_k (1[||d_k|| <= C] - 1/2) + N(0, s^2)) / m,   C <- C exp(-clip_lr (b - clip_quantile))

One client moves S / (z' C) by at most 1 / z' and the shifted count / s by at most 1 / (2 s), so both together are one
Gaussian release of multiplier z if z^-2 = z'^-2 + (2 s)^-2: the sum gets z' = (z^-2 - (2 s)^-2)^(-1/2). Without the
shift by 1/2 a client would move the count by 1. A client that does not reply counts as one half.

What a round costs, with neighbours by adding or removing all data of one client:

    fixed     the whole z, sample rate 1: whose turn it is follows from public names and numbers, so nothing is
              amplified. The client that is removed leaves its turn empty; nobody takes it.
    poisson   each client joins with probability q = m / data.clients, independently; holds for who does not see who
              joined, so the record of the run must stay with the server

Seeded noise is a function of (run.seed, "client_dp", round): reproducible, not private.

A round that is done again after a kill costs nothing if it releases the very same bits. Seeded noise on the same
updates does; on other updates it is another release and counts as one. Noise of the operating system cannot be drawn
again, and must not be put on other updates: the difference would lay them open. So the noised sum itself is kept beside
the ledger before it is counted and used, and a round that starts from the same state takes it from there, whoever
answers now.

Deviations: norms, sum and noise in float64; the low bits of floating-point noise are covered by no accountant.

    >>> round(sum_multiplier(1.0, 1.0), 4)
    1.1547
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.config import Config, PrivacyConfig, RunConfig
from fedpeft.errors import InputError
from fedpeft.privacy import accounting, checks
from fedpeft.privacy.ledger import Budget, BudgetExhausted, Entry, Ledger
from fedpeft.privacy.mechanism import add_noise, clipped_sum
from fedpeft.privacy.noise import OperatingSystem, Randomness, Seeded
from fedpeft.state import AdapterState, Needs, RoundFailed, Rules, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, same_scale
from fedpeft.strategies.build import build
from fedpeft.strategies.parts import releases
from fedpeft.strategies.wrappers.wrapper import Wrapper, innermost_rule, name_of

log = logging.getLogger("fedpeft")
CLIP = "client_dp/clip"  # in ServerState.numbers
COUNT = 0.5  # a client moves the shifted count by this


class ClientDP(Wrapper):
    """The outermost wrapper: whatever is inside sees one noised update a round.

    Without `context.ledger` it keeps no account beyond the round number.
    """

    paper = "McMahan et al. 2018, arXiv 1710.06963"
    needs = Needs.INDIVIDUAL

    def __init__(self, inner: FederatedStrategy, privacy: PrivacyConfig, run: RunConfig) -> None:
        super().__init__(inner)
        _require_sum(inner)
        self.privacy, self.run_config, self._warned = privacy, run, False

    @property
    def cohort(self) -> int:
        """m, the clients that a round is planned for."""
        if self.context.population is None:
            raise InputError("client_dp: the strategy's population (number of all clients, data.clients) is not set.")
        return self.run_config.clients_per_round or self.context.population

    @property
    def sample_rate(self) -> float:
        """The sample rate that is accounted for."""
        if self.privacy.client_sampling == "fixed":
            return 1.0
        return self.cohort / (self.context.population or self.cohort)

    @property
    def rounds(self) -> int:
        """Rounds that the budget is planned for."""
        return self.privacy.planned_rounds or self.run_config.rounds

    @property
    def noise_multiplier(self) -> float:
        """z, as given or as the budget and the planned rounds have it."""
        privacy = self.privacy
        if privacy.noise_multiplier is not None:
            return privacy.noise_multiplier
        if privacy.epsilon is None:
            raise InputError("privacy.epsilon=null and privacy.noise_multiplier=null: give exactly one.")
        return accounting.noise_multiplier(
            self.sample_rate, privacy.epsilon, self.rounds, privacy.delta, privacy.accountant
        )

    @property
    def count_noise(self) -> float:
        """s, the standard deviation of the noise on the count of unclipped updates."""
        return self.privacy.clip_count_noise or self.cohort / 20

    def clip(self, server: ServerState) -> float:
        """C of the round about to be aggregated."""
        return float(server.numbers.get(CLIP, self.privacy.clip))

    def randomness(self, purpose: str, number: int) -> Randomness:
        """A source for one purpose ("choose" or "noise") in one round."""
        if self.privacy.randomness == "os":
            return OperatingSystem()
        return Seeded(self.run_config.seed, "client_dp", number, purpose)

    def choose(self, names: list[str], rules: Rules, number: int) -> list[str]:
        if self.privacy.client_sampling == "fixed":
            return super().choose(names, rules, number)
        # A source of its own: choosing must not move what the noise of the round is.
        draws = self.randomness("choose", number).uniform(len(names))
        return [name for name, draw in zip(sorted(names), draws, strict=True) if draw < self.sample_rate]

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        start = server.adapter.select(self.uploads(server))
        total, unclipped = self._release(server, start, updates)
        merged = Update(
            "all clients", 1.0, _move_start(start, total / self.cohort), count=sum(one.count for one in updates)
        )
        after = self.inner.aggregate(server, [merged])
        if unclipped is None:
            return after
        share = 0.5 + unclipped / self.cohort
        clip = self.clip(server) * math.exp(-self.privacy.clip_lr * (share - self.privacy.clip_quantile))
        return replace(after, numbers={**after.numbers, CLIP: clip})

    def _release(self, server: ServerState, start: AdapterState, updates: list[Update]) -> tuple[Tensor, float | None]:
        """The noised sum, and the noised count where the clip adapts: in the ledger before anything is made of them."""
        number, kept = server.round + 1, self._kept_path(server.round + 1)
        found = None if kept is None else releases.read(kept, server.adapter)
        if found is None:
            found = self._noise_update(start, server, updates)
            if kept is not None:
                # Kept before it is counted: after a kill in between the very same bits are taken up and counted.
                releases.write(kept, server.adapter, *found, history=2 * self.run_config.checkpoint_every + 1)
        else:
            log.warning(
                "round %d was released before the process ended: that release stands, and what clients sent "
                "now is not used",
                number,
            )
        # Also one that was taken up: the kill may have come before the ledger, which counts a name once.
        self._reserve_release(number, self.noise_multiplier, releases.name(*found))
        return found

    def _kept_path(self, number: int) -> Path | None:
        """Where a release that nobody could make again is kept."""
        if self.context.ledger is None or self.privacy.randomness != "os":
            return None
        return self.context.ledger.parent / f"release-{number:06d}.safetensors"

    def _noise_update(
        self, start: AdapterState, server: ServerState, updates: list[Update]
    ) -> tuple[Tensor, float | None]:
        clip, z, adaptive = self.clip(server), self.noise_multiplier, self.privacy.adaptive_clip
        total, unclipped = sum_changes(start, same_scale(server, updates), clip)
        source = self.randomness("noise", server.round + 1)
        noised = add_noise(total, sum_multiplier(z, self.count_noise) if adaptive else z, clip, source)
        if not adaptive:
            return noised, None
        count = torch.tensor([unclipped], dtype=torch.float64)
        # One client moves the shifted count by 1/2, so twice s gives a deviation of s.
        return noised, float(add_noise(count, 2 * self.count_noise, COUNT, source))

    def _reserve_release(self, number: int, z: float, name: str) -> None:
        """Count the release of round `number` as made, durably if there is a ledger; the very same one only once.

        Raises:
            RoundFailed: the budget does not allow it.
        """
        privacy = self.privacy
        path = self.context.ledger
        if path is None:
            if not self._warned:
                log.warning(
                    "client-level privacy without a ledger: releases of repeated or restarted rounds are not "
                    "counted. Give the strategy's context a `ledger`, a file."
                )
                self._warned = True
            if privacy.epsilon is not None and number > self.rounds:
                raise RoundFailed(
                    f"round {number}: budget exhausted: privacy.epsilon={privacy.epsilon:g} is for "
                    f"{self.rounds} rounds."
                )
            return
        budget = Budget(privacy.epsilon or math.inf, privacy.delta, privacy.accountant)
        plan = None if privacy.epsilon is None else (self.sample_rate, z, self.rounds)
        entry = Entry("server", number, name, self.sample_rate, z, 1)  # the whole file is one run's
        try:
            Ledger(path).reserve(entry, budget, plan, once=True)
        except BudgetExhausted as error:
            raise RoundFailed(f"round {number}: {error} Spent so far: {self.spent_in_all(path):.6g}.") from error

    def spent(self, rounds: int) -> float:
        """Epsilon of this many rounds; by the ledger, if there is one, of all that was released in them."""
        privacy = self.privacy
        releases = [(self.sample_rate, self.noise_multiplier, rounds)] if rounds else []
        if self.context.ledger is not None:
            releases = [entry.release for entry in Ledger(self.context.ledger).entries() if entry.round <= rounds]
        return accounting.compose_epsilon(tuple(releases), privacy.delta, privacy.accountant)

    def spent_in_all(self, ledger: Path) -> float:
        """Epsilon of all that the ledger holds."""
        return Ledger(ledger).spent(self.privacy.delta, self.privacy.accountant)

    def conclude(
        self,
        server: ServerState,
        updates: list[Update],
        bad: dict[str, str],
        rules: Rules,
        record: Callable[[dict[str, Any]], None],
    ) -> tuple[ServerState, dict[str, Any]]:
        """The round as always; the clients' metrics stay out of its event, what was spent goes in."""
        if not self.privacy.release_metrics:
            updates = [replace(update, metrics={}) for update in updates]
        after, event = super().conclude(server, updates, bad, rules, record)
        # The clip of the state before: the one that this round used.
        return after, {
            **event,
            "epsilon_max": self.spent(after.round),
            "clip": self.clip(server),
            "noise_multiplier": self.noise_multiplier,
        }

    def facts(self, server: ServerState, sent: dict[str, AdapterState], updates: list[Update]) -> dict[str, Any]:
        """Nothing: the server sees single updates, and the guarantee does not cover what it says of them."""
        return {}

    def offline(self, server: ServerState, updates: list[Update]) -> tuple[AdapterState, list[str]]:
        raise InputError(
            "client_dp accounts for the rounds of a run; finished adapters have no rounds. "
            f"Aggregate them with {name_of(innermost_rule(self))}, without privacy."
        )


def sum_changes(start: AdapterState, updates: list[Update], clip: float) -> tuple[Tensor, float]:
    """Sum of the clipped changes, one float64 vector, and sum_k (1[norm <= clip] - 1/2).

    A change whose norm is not a finite number adds nothing: no upload whatever moves the sum by more than `clip`.
    """
    total, unclipped = torch.zeros(start.parameters, dtype=torch.float64), 0.0
    for update in updates:
        change = torch.cat(
            [(update.adapter[key].double() - value.double()).flatten() for key, value in start.tensors.items()]
        )
        # Float64 needs no room for rounding.
        total += clipped_sum(change[None], clip, slack=0.0)
        # NaN is not <= clip, and so counts as clipped.
        unclipped += COUNT if float(change.norm()) <= clip else -COUNT
    return total, unclipped


def _move_start(start: AdapterState, change: Tensor) -> AdapterState:
    """`start` in float64, moved by one flat vector."""
    parts = change.split([value.numel() for value in start.tensors.values()])
    tensors = {
        key: value.double() + part.reshape(value.shape)
        for (key, value), part in zip(start.tensors.items(), parts, strict=True)
    }
    return AdapterState(tensors, start.sites)


def sum_multiplier(z: float, count_noise: float) -> float:
    """Noise multiplier of the sum, when the count is released with `count_noise` and both together cost z.

    Raises:
        InputError: the noise on the count alone costs more than z.
    """
    rest = z**-2 - (2 * count_noise) ** -2
    if rest <= 0:
        raise InputError(
            f"privacy.clip_count_noise={count_noise:g} is too small for the noise multiplier {z:.6g}: it "
            f"must be above {z / 2:.6g}. Set it (its default is clients a round / 20), take more clients "
            "a round, or set privacy.adaptive_clip=false."
        )
    return float(rest**-0.5)


def check(config: Config) -> None:
    """Refuse what client-level privacy cannot cover, before anything is loaded."""
    privacy, data = config.privacy, config.data
    if privacy.unit != "client":
        return
    checks.require_covered(config)
    if data.clients is not None and privacy.delta >= 1 / data.clients:
        raise InputError(
            f"privacy.delta={privacy.delta:g} must be below 1 / data.clients = {1 / data.clients:g}: at "
            "that delta a whole client may be published."
        )
    strategy = build(config)
    if privacy.adaptive_clip and isinstance(strategy, ClientDP):
        sum_multiplier(strategy.noise_multiplier, strategy.count_noise)


def _require_sum(inner: FederatedStrategy) -> None:
    """Raise InputError unless the strategy and each wrapper can work on one noised sum."""
    layers = [inner]
    while isinstance(layers[-1], Wrapper):
        layers.append(layers[-1].inner)
    for layer in layers:
        problem = _find_problem(type(layer))
        if problem:
            fits = [
                name
                for name in registry.names("strategies")
                if (cls := registry.load("strategies", name)).wraps == type(layer).wraps and not _find_problem(cls)
            ]
            key = "strategy.wrap" if type(layer).wraps else "strategy.name"
            raise InputError(
                f"{key}: {name_of(layer)} {problem}, so privacy.unit=client cannot protect it. Allowed: "
                f"{', '.join(fits)}."
            )


def _find_problem(cls: type[FederatedStrategy]) -> str | None:
    if cls.needs is Needs.INDIVIDUAL:
        return "looks at single updates, before they are clipped and noised"
    if cls.changes_base:
        return "changes the base weights beside the update"
    if cls.client_half.sends:
        return f"has clients send {cls.client_half.sends}, a second release of their data"
    return None


def describe(strategy: ClientDP) -> str:
    """What the planned rounds guarantee, what the ledger says was spent, to whom, and what is left out."""
    privacy, q = strategy.privacy, strategy.sample_rate
    z = strategy.noise_multiplier
    epsilon = accounting.compose_epsilon(((q, z, strategy.rounds),), privacy.delta, privacy.accountant)
    sampling = (
        f"each client joins a round with probability {q:g}; who joined must stay with the server"
        if privacy.client_sampling == "poisson"
        else "a fixed number of clients a round, no amplification"
    )
    ledger = strategy.context.ledger
    spent = f"; spent so far {strategy.spent_in_all(ledger):.4g}" if ledger is not None else ""
    private = privacy.randomness == "os"
    return "\n".join(
        [
            f"client-level differential privacy: epsilon={epsilon:.4g} at delta={privacy.delta:g} after "
            f"{strategy.rounds} rounds ({privacy.accountant}){spent}",
            "protects: all data of one client, added or removed (a removed client's turn stays empty)",
            "from whom: everyone who sees the released models only; the server is trusted and sees every update",
            f"mechanism: updates clipped to {privacy.clip:g}{' at first' if privacy.adaptive_clip else ''}, noise "
            f"multiplier {z:.4g} on their sum, divided by {strategy.cohort}; {sampling}",
            "not covered: who took part, failures and logs of the server"
            + (", metrics that clients send" if privacy.release_metrics else "")
            + (", what stays with each client" if strategy.keeps else ""),
            "noise: from the operating system" if private else "noise: seeded, so reproducible, not private",
        ]
    )
