"""FEDPEFT_ROUNDS and FEDPEFT_SEEDS: environment variables that shorten what a command starts, to see that it runs.

What was left out is said, and `resolved.yaml` or `results.json` hold the numbers that were run with.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from fedpeft import config as configs
from fedpeft.errors import InputError

log = logging.getLogger("fedpeft")
ROUNDS, SEEDS = "FEDPEFT_ROUNDS", "FEDPEFT_SEEDS"


def rounds(source: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """The overrides of a new run, with `run.rounds` at most FEDPEFT_ROUNDS.

    Tasks that follow each other have equally many rounds, so that every one keeps at least one.

    Raises:
        InputError: the config or the variable cannot be used.
    """
    most = _most_allowed(ROUNDS)
    if most is None:
        return given
    config = configs.load(source, given)
    tasks = config.continual.learned if config.continual.body is not None else 1
    kept = max(tasks, most - most % tasks)
    if kept >= config.run.rounds:
        return given
    log.warning("%s=%d: run.rounds is %d instead of %d.", ROUNDS, most, kept, config.run.rounds)
    return {**given, "run.rounds": kept}


def seeds(asked: int, least: int = 1) -> int:
    """Runs of each cell of a benchmark: those asked for, at most FEDPEFT_SEEDS, but what the benchmark needs (`least`).

    Raises:
        InputError: the variable cannot be used.
    """
    most = _most_allowed(SEEDS)
    if most is None or max(most, least) >= asked:
        return asked
    log.warning("%s=%d: --seeds is %d instead of %d.", SEEDS, most, max(most, least), asked)
    return max(most, least)


def _most_allowed(name: str) -> int | None:
    text = os.environ.get(name, "")
    if not text:
        return None
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise InputError(f"{name}={text!r}: a whole number from 1 on, in the environment. Unset it to run everything.")
    return int(text)
