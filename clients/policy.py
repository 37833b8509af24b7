"""A site's policy bounds what any server may ask: a YAML file beside its data, checked before the data are read.

    max_delta: 1.0e-5
    min_noise_multiplier: 0.5
    strategies: [fedsvd, ffa_lora]
    max_epsilon: 3.0            # over all runs that the site's ledger counts
    max_rounds: 100
    unbounded: [records]        # left open on purpose

Of BOUNDS each is either set or named as left open: a file that is empty, or was cut off before them, is no policy. A
file whose last line may be cut in the middle (of a number, say: 1.0e-1 for 1.0e-12) is none either, so the last line
has to end.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft import registry
from fedpeft.config import Config, option
from fedpeft.errors import InputError, RunError
from fedpeft.foreign import YAML_BYTES, read_yaml
from fedpeft.privacy.ledger import Budget

BOUNDS = ("max_epsilon", "max_rounds", "records")
log = logging.getLogger("fedpeft")
INVALID = "the site's policy is not valid now, so nothing is allowed; the site's own log says why."
METRICS = ("train_loss", "loss", "accuracy", "num-examples", "missed_tasks")
MEASURES = "and where unit is none any measure of an objective (f1, auroc, rmse, perplexity, ...)"

UNSET = (
    f"Set {', '.join(BOUNDS[:-1])} and {BOUNDS[-1]}, or name what is left open on purpose, as in unbounded: "
    f"[{BOUNDS[-1]}]."
)


class Refused(RunError):
    """The site's policy does not allow what the server asks; nothing was read."""


@dataclass
class Policy:
    """Bounds that a site sets. What is null is not bounded; of BOUNDS, `unbounded` then says so."""

    unit: str = option(
        "sample",
        "what must be protected: sample, one record against everyone outside; or none",
        choices=("sample", "none"),
    )
    max_epsilon: float | None = option(None, "largest epsilon of one record, over all runs together", above=0)
    max_delta: float = option(1e-5, "largest delta", above=0, high=0.5)
    min_noise_multiplier: float = option(0.0, "smallest noise multiplier of a step, and of a head's sums", low=0)
    max_rounds: int | None = option(None, "most rounds of one run", low=1)
    strategies: list[str] | None = option(None, "strategies that may ask; null is all")
    metrics: list[str] = option([], f"what may leave beside the update: {', '.join(METRICS)}; {MEASURES}")
    records: int | None = option(
        None, "public number of records, for the sampling rate; null takes privacy.records, else the true count", low=1
    )
    min_clients: int | None = option(
        None, "fewest clients whose updates may be summed under secure aggregation; null does not ask for it", low=2
    )
    seeded_noise: bool = option(False, "allow noise that can be reproduced (tests, simulations): no privacy")
    unbounded: list[str] = option([], f"which of {', '.join(BOUNDS)} are left open on purpose")

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
        names = config.strategy.names
        if self.strategies is not None and set(names) - set(self.strategies):
            reasons.append(f"strategy {', '.join(names)} is not among {', '.join(self.strategies)}")
        sent = [metric for metric in METRICS if metric != "missed_tasks" or config.continual.body is not None]
        if privacy.release_metrics and set(sent) - set(self.metrics):
            reasons.append(
                f"privacy.release_metrics sends {', '.join(sent)}; allowed: {', '.join(self.metrics) or 'none'}"
            )
        if privacy.unit == "sample" and self.records is not None and config.continual.body is not None:
            reasons.append(
                f"records={self.records} is of all records, but continual.body={config.continual.body} "
                "samples from those of a task"
            )
        if self.min_clients is not None and (summed := _fewest_in_sum(config)) < self.min_clients:
            reasons.append(
                f"updates are seen in sums of {summed} clients or more; min_clients={self.min_clients} "
                f"needs secagg.enabled=true and secagg.min_clients={self.min_clients}"
            )
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
            raise Refused(
                f"refused by the site's policy: the planned noise multiplier is under {self.min_noise_multiplier:g}."
            )


def _fewest_in_sum(config: Config) -> int:
    """Fewest clients in a sum that this config lets a server see."""
    from fedpeft.strategies.secagg.terms import Terms

    return Terms.of(config).fewest if config.secagg.enabled else 1


def load(path: Path) -> Policy:
    """Read a policy file, which a site may have from elsewhere: at most 64 kB, no aliases, no tags.

    Raises:
        InputError: no such file, an unknown key, a value out of its bounds, a bound neither set nor left open by name;
            names the file.
    """
    if not path.is_file():
        raise InputError(f"privacy.policy: no file {path}.")
    try:
        with path.open("rb") as file:
            text = file.read(YAML_BYTES + 1).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as YAML: {error}") from error
    if not read_yaml(text, str(path)):
        raise InputError(f"{path}: it is empty, and an empty policy bounds nothing. {UNSET}")
    try:
        policy: Policy = configs.build(Policy, configs.read_yaml(path), "policy")  # typed by its fields, not by YAML
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    if text.rstrip(" ")[-1:] not in ("\n", "]", "}"):
        raise InputError(f"{path}: its last line does not end, so the file may be cut off. End it with a newline.")
    _require_bounds(policy, path)
    return policy


def _require_bounds(policy: Policy, path: Path) -> None:
    further = sorted(set(policy.metrics) - set(METRICS))
    measures = _known_measures() if further else frozenset()
    for key, allowed in (("metrics", [*METRICS, *sorted(measures)]), ("unbounded", BOUNDS)):
        unknown = sorted(set(getattr(policy, key)) - set(allowed))
        if unknown:
            raise InputError(f"{path}: policy.{key}: {', '.join(unknown)} not known. Allowed: {', '.join(allowed)}.")
    if further and policy.unit == "sample":
        raise InputError(
            f"{path}: policy.metrics: {', '.join(further)}: a site whose unit is sample sends no measure but "
            f"{', '.join(METRICS)}, as no accounting covers it. Take it out, or set unit: none."
        )
    if policy.strategies == []:
        raise InputError(f"{path}: policy.strategies: [] allows no run. Name those that may ask; null is all.")
    for key in BOUNDS:
        value = getattr(policy, key)
        if value is None and key not in policy.unbounded:
            raise InputError(f"{path}: policy.{key} is not set. {UNSET}")
        if value is not None and key in policy.unbounded:
            raise InputError(f"{path}: policy.{key} is {value:g}, and named in policy.unbounded too. Take one out.")


def _known_measures() -> frozenset[str]:
    """What objectives, those of other packages too, are measured by beside METRICS."""
    every = [registry.load("objectives", name) for name in registry.names("objectives")]
    return frozenset(measure for objective in every for measure in objective.measures)


def allows(policy: Policy) -> dict[str, Any]:
    """What a policy allows and what it leaves open; JSON-ready."""
    bounds = {key: value for key, value in asdict(policy).items() if key != "unbounded"}
    left = {
        **dict.fromkeys(policy.unbounded),
        **({} if policy.strategies is not None else {"strategies": None}),
        **({} if policy.min_noise_multiplier else {"min_noise_multiplier": None}),
    }
    return {"allows": bounds, "open": list(left)}


def sentences(policy: Policy) -> list[str]:
    """What a policy allows and what it leaves open, a line each, for people."""
    noise, names = policy.min_noise_multiplier, policy.strategies
    lines = [
        "unit: every record is protected by DP-SGD"
        if policy.unit == "sample"
        else "unit: none, SO PLAIN TRAINING IS ALLOWED: no privacy",
        "max_epsilon: "
        + (
            "ANY EPSILON"
            if policy.max_epsilon is None
            else f"{policy.max_epsilon:g} of one record, over all runs that the ledger counts"
        ),
        f"max_delta: {policy.max_delta:g}",
        "min_noise_multiplier: " + (f"{noise:g}" if noise else "any noise that the epsilon allows"),
        "max_rounds: " + ("ANY NUMBER of rounds" if policy.max_rounds is None else f"{policy.max_rounds} of one run"),
        "strategies: " + ("any" if names is None else ", ".join(names) or "none"),
        f"metrics: {', '.join(policy.metrics) or 'none'} may leave beside the update",
        "records: "
        + (
            "what the run says, else the true number counts as public"
            if policy.records is None
            else f"{policy.records}, whatever the true number is"
        ),
    ]
    if policy.min_clients is not None:
        lines.append(f"min_clients: updates leave in sums of at least {policy.min_clients} clients only")
    if policy.seeded_noise:
        lines.append("seeded_noise: NOISE THAT THE COORDINATOR CAN REPRODUCE IS ALLOWED: no privacy")
    return [*lines, f"left open: {', '.join(allows(policy)['open']) or 'nothing'}"]


def record(policy: Policy) -> None:
    """Say in the log which policy is in force."""
    log.info("the policy in force: %s", "; ".join(sentences(policy)))


def place_of(place: str, client: str) -> Path:
    """The file of a client: the one of all, or <client>.yaml in a folder of them."""
    path = Path(place)
    return path / f"{client}.yaml" if path.is_dir() else path


def of_client(place: str | None, client: str) -> Policy | None:
    """The policy of a client; None if none is set."""
    return None if place is None else load(place_of(place, client))
