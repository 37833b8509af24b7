"""What differential privacy says of what is to be forgotten, in sentences: it may be bounded already."""

from __future__ import annotations

import math
from typing import Any

from fedpeft.config import Config
from fedpeft.record.words import number
from fedpeft.unlearning.asked import CLIENT, Asked

UNITS = {"sample": "one record", "client": "all records of one client"}


def sentences(config: Config, summary: dict[str, Any], asked: Asked, reruns: bool) -> list[str]:
    """What the run's guarantee covers of this, and what the method does to the guarantee; nothing without privacy.

    Args:
        summary: of the run.
        reruns: the method trains by the run's own config.
    """
    section, epsilon = config.privacy, summary.get("epsilon_max")
    if section.unit == "none":
        return []
    if epsilon is None:
        spent = "an epsilon that its ledgers have"
    else:
        spent = f"epsilon {number(epsilon)} at delta {section.delta:g}"
    seeded = " (as if the noise were secret: privacy.randomness is seeded)" if section.randomness == "seeded" else ""
    said = []
    covered = section.unit == "client" if asked.kind == CLIENT else section.unit == "sample"
    if covered and epsilon is not None:
        # exp is beyond a float from 710 on, and tells nothing long before.
        factor = number(math.exp(epsilon)) if epsilon < math.log(1e6) else "over a million"
        whose = "this client's" if asked.kind == CLIENT else "each of these records'"
        said.append(
            f"The run was private for {UNITS[section.unit]}, with {spent}{seeded}: {whose} influence is bounded "
            f"already, as any outcome is at most {factor} times as likely (up to delta) with it as without it, and for "
            "that bound nothing need be done. What was asked is done all the same."
        )
        if asked.kind != CLIENT and len(asked.numbers) > 1:
            many = len(asked.numbers)
            said.append(
                f"Of all {many} records together the bound is epsilon {number(many * epsilon)}, with a larger delta."
            )
    else:
        said.append(
            f"The run was private for {UNITS[section.unit]}, with {spent}{seeded}, and {asked.words} is another unit: "
            "that is no bound of its influence to speak of."
        )
    if reruns:
        said.append(
            "Retraining is a second release of all records that stay: beside the first run's, each has spent the "
            "epsilon of this one."
        )
    else:
        said.append("The method reads records without noise, so what it makes has no guarantee, for any record.")
    return said
