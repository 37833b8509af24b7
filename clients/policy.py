"""What a site allows, whatever a server asks: a YAML file beside its data, checked before the data is read.

    max_epsilon: 3.0            # over all runs that the site's ledger counts
    max_delta: 1.0e-5
    min_noise_multiplier: 0.5
    max_rounds: 100
    strategies: [fedsvd, ffa_lora]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedpeft import config as configs
from fedpeft.config import Config, option
from fedpeft.errors import InputError, RunError
from fedpeft.privacy.ledger import Budget

METRICS = ("train_loss", "loss", "accuracy", "num-examples", "missed_tasks")


class Refused(RunError):
    """The site's policy does not allow what the server asks; nothing was read."""


@dataclass
class Policy:
    """Bounds that a site sets. What is null is not bounded."""

    unit: str = option("sample", "what must be protected: sample, one record against everyone outside; or none",
                       choices=("sample", "none"))
    max_epsilon: float | None = option(None, "largest epsilon of one record, over all runs together", above=0)
    max_delta: float = option(1e-5, "largest delta", above=0, high=0.5)
    min_noise_multiplier: float = option(0.0, "smallest noise multiplier of a step, and of a head's sums", low=0)
    max_rounds: int | None = option(None, "most rounds of one run", low=1)
    strategies: list[str] | None = option(None, "strategies that may ask; null is all")
    metrics: list[str] = option([], f"what may leave beside the update: {', '.join(METRICS)}")
    records: int | None = option(None, "public number of records, for the sampling rate; null takes privacy.records, "
                                 "else the true count", low=1)
    seeded_noise: bool = option(False, "allow noise that can be reproduced (tests, simulations): no privacy")

    def lifetime(self, config: Config) -> Budget | None:
        """What all runs together may cost."""
        if self.max_epsilon is None:
            return None
        return Budget(self.max_epsilon, config.privacy.delta, config.privacy.accountant)

    def require(self, config: Config, number: int) -> None:
        """Raise Refused, with every reason, unless round `number` of this config is within the bounds."""
        privacy, reasons = config.privacy, []
        if self.unit == "sample" and privacy.unit != "sample":
            reasons.append(f"privacy.unit={privacy.unit} does not protect records from the server; it must be sample")
        if self.max_epsilon is not None and privacy.epsilon is not None and privacy.epsilon > self.max_epsilon:
            reasons.append(f"privacy.epsilon={privacy.epsilon:g} is over max_epsilon={self.max_epsilon:g}")
        if privacy.unit == "sample" and privacy.delta > self.max_delta:
            reasons.append(f"privacy.delta={privacy.delta:g} is over max_delta={self.max_delta:g}")
        sigma = privacy.noise_multiplier
        if sigma is not None and sigma < self.min_noise_multiplier:
            reasons.append(f"privacy.noise_multiplier={sigma:g} is under {self.min_noise_multiplier:g}")
        sums = config.continual.statistics_noise
        if sums is not None and sums < self.min_noise_multiplier:
            reasons.append(f"continual.statistics_noise={sums:g} is under {self.min_noise_multiplier:g}")
        rounds = max(number, config.run.rounds)
        if self.max_rounds is not None and rounds > self.max_rounds:
            reasons.append(f"{rounds} rounds are over max_rounds={self.max_rounds}")
        names = [config.strategy.name, *(entry if isinstance(entry, str) else entry["name"]
                                         for entry in config.strategy.wrap)]
        if self.strategies is not None and set(names) - set(self.strategies):
            reasons.append(f"strategy {', '.join(names)} is not among {', '.join(self.strategies)}")
        sent = [metric for metric in METRICS if metric != "missed_tasks" or config.continual.body is not None]
        if privacy.release_metrics and set(sent) - set(self.metrics):
            reasons.append(f"privacy.release_metrics sends {', '.join(sent)}; allowed: "
                           f"{', '.join(self.metrics) or 'none'}")
        if privacy.unit == "sample" and self.records is not None and config.continual.body is not None:
            reasons.append(f"records={self.records} is of all records, but continual.body={config.continual.body} "
                           "samples from those of a task")
        if privacy.unit == "sample" and privacy.randomness != "os" and not self.seeded_noise:
            reasons.append("privacy.randomness=seeded is reproducible; it must be os")
        if reasons:
            raise Refused(f"refused by the site's policy: {'; '.join(reasons)}.")

    def require_rounds(self, count: int) -> None:
        """Raise Refused if this many rounds of one run are too many, however the server numbers them."""
        if self.max_rounds is not None and count > self.max_rounds:
            raise Refused(f"refused by the site's policy: {count} rounds are over max_rounds={self.max_rounds}.")

    def require_noise(self, sigma: float) -> None:
        """Raise Refused if a planned noise multiplier is below the bound."""
        if sigma < self.min_noise_multiplier:
            raise Refused(f"refused by the site's policy: the planned noise multiplier is under "
                          f"{self.min_noise_multiplier:g}.")


def load(path: Path) -> Policy:
    """Read a policy file.

    Raises:
        InputError: no such file, an unknown key or a value out of its bounds.
    """
    if not path.is_file():
        raise InputError(f"privacy.policy: no file {path}.")
    policy: Policy = configs.build(Policy, configs.read_yaml(path), "policy")
    unknown = set(policy.metrics) - set(METRICS)
    if unknown:
        raise InputError(f"policy.metrics: {', '.join(sorted(unknown))} not known. Allowed: {', '.join(METRICS)}.")
    return policy


def of_client(place: str | None, client: str) -> Policy | None:
    """The policy of a client: the one file of all, or <client>.yaml in a folder of them; None if none is set."""
    if place is None:
        return None
    path = Path(place)
    return load(path / f"{client}.yaml" if path.is_dir() else path)
