"""DP-SGD of one client, planned before its first step: who is sampled, what is clipped, how much noise, how many steps.

One step (Abadi et al. 2016, arXiv 1607.00133), with g_i the gradient of record i in all trained tensors together:

    every record joins with probability q, independently
    g = (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I)) / b

q and b are public constants: b is the expected batch, not the size drawn, and an empty draw is a step of pure noise.
Two data sets that differ by one record give sums at most C apart, so `steps` such steps cost what the accountant says
for (q, sigma, steps), whoever sees each of them. A record whose gradient or loss is not finite counts as zero, so that
training does not fail by a record.

The trainer gets its batches from here, never from a loader of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fedpeft.config import ClientConfig, PrivacyConfig
from fedpeft.errors import InputError
from fedpeft.privacy import mechanism
from fedpeft.privacy.accounting import Release, compose_epsilon, noise_multiplier
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.noise import Randomness

RELATION = "add or remove one record"


@dataclass(frozen=True)
class Plan:
    """All public numbers of one client's private training.

    Attributes:
        sample_rate: q.
        expected_batch: b, the divisor.
        clip: C.
        noise_multiplier: sigma.
        steps: noisy steps planned over all rounds.
        budget: what they may cost.
    """

    sample_rate: float
    expected_batch: float
    clip: float
    noise_multiplier: float
    steps: int
    budget: Budget

    @property
    def release(self) -> Release:
        """All planned steps as the accountant takes them: sample rate, noise multiplier, steps."""
        return self.sample_rate, self.noise_multiplier, self.steps

    def sample(self, count: int, source: Randomness) -> np.ndarray:
        """Indices of the records that join a step."""
        # Each by itself: shuffled batches of fixed size are not the sampling that the accountant charges for.
        return np.flatnonzero(source.uniform(count) < self.sample_rate)

    def clipped_sum(self, gradients: Tensor, losses: Tensor | None = None) -> Tensor:
        """The sum [P] over the batch of per-sample gradients [N, P], each clipped to norm C (`privacy.mechanism`).

        Args:
            losses: [N]; a record whose loss is not finite has no part in the sum.
        """
        return mechanism.clipped_sum(gradients, self.clip, losses)

    def noised_mean(self, total: Tensor, source: Randomness) -> Tensor:
        """The step's gradient [P] from the clipped sum: noise once, division once."""
        # By the expected batch: the size that was drawn depends on whether a record is there.
        return mechanism.add_noise(total, self.noise_multiplier, self.clip, source) / self.expected_batch


def make_plan(
    privacy: PrivacyConfig, client: ClientConfig, rounds: int, records: int, beside: tuple[Release, ...] = ()
) -> Plan:
    """The plan of a client with this public number of records.

    Args:
        rounds: rounds that the run may ask it for; `privacy.planned_rounds` overrides.
        beside: what else the budget pays for: the sums that a head is fitted on.

    Raises:
        InputError: as `require`.
    """
    require(privacy, client, records, records, "a client")
    steps = (client.local_steps or 0) * (privacy.planned_rounds or rounds)
    rate, sigma, epsilon = client.batch_size / records, privacy.noise_multiplier, privacy.epsilon
    if sigma is None and epsilon is not None:
        sigma = noise_multiplier(rate, epsilon, steps, privacy.delta, privacy.accountant, beside)
    if sigma is None:
        raise InputError("privacy.epsilon and privacy.noise_multiplier are both null; give one.")
    if epsilon is None:
        epsilon = compose_epsilon(((rate, sigma, steps), *beside), privacy.delta, privacy.accountant)
    budget = Budget(epsilon, privacy.delta, privacy.accountant)
    return Plan(rate, float(client.batch_size), privacy.clip, sigma, steps, budget)


def require(privacy: PrivacyConfig, client: ClientConfig, records: int, count: int, who: str) -> None:
    """Raise InputError if a step would take more records than there are, or delta would protect nobody.

    Args:
        records: public number of records.
        count: the true one.
    """
    if client.batch_size > records:
        raise InputError(
            f"client.batch_size={client.batch_size} is the expected number of records a step, but {who} has only "
            f"{records}. Lower it, or give clients more records."
        )
    # The larger of the two, as neither may leave a record unprotected.
    if privacy.delta >= 1 / max(records, count):
        raise InputError(
            f"privacy.delta={privacy.delta:g} is not below 1 / {max(records, count)}, one over the records of {who}: "
            "it would allow one of them to be published whole."
        )
