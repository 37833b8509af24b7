"""The ledger holds every release before it is made: an append-only file on the disk, one JSON object a line.

    {"run", "round", "request", "sample_rate", "noise_multiplier", "steps", "time"}

`reserve` adds a line and forces it to the disk, or refuses it, before the release may leave. A process killed
afterwards has spent what it reserved, whether or not anything left: the ledger never counts fewer releases than there
were. Nor does it count one twice: `request` names a release by a hash over every bit of it, and `once` knows it again.
A round that is done again with other updates, other noise or other rounding is another release.

Reserving holds a lock on the file, so two processes cannot both take the last of a budget. A client that learns tasks
has a file for each (`client+task-N.jsonl`). The lock does not reach across them: one process at a time must serve it.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from collections import defaultdict
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from fedpeft.errors import InputError, RunError
from fedpeft.files import blame_file, sync_folder
from fedpeft.privacy.accounting import Release, compose_epsilon, require_release
from fedpeft.uncollected import uncollected

TASK = "+task-"  # between a client and a task in the name of an account
SUFFIX = ".jsonl"


class BudgetExhausted(RunError):
    """The release would pass the budget, and was not made."""


@dataclass(frozen=True)
class Entry:
    """`steps` releases with one sample rate and one noise multiplier, in one round of a run; `request` names them."""

    run: str
    round: int
    request: str
    sample_rate: float
    noise_multiplier: float
    steps: int

    @property
    def release(self) -> Release:
        """The entry as the accountant takes it: sample rate, noise multiplier, steps."""
        return self.sample_rate, self.noise_multiplier, self.steps


NAMES = tuple(item.name for item in fields(Entry))


@dataclass(frozen=True)
class Budget:
    """The largest epsilon at this delta, and the accountant that decides."""

    epsilon: float
    delta: float
    accountant: str = "pld"


class Ledger:
    """The releases of one party's data, over all its runs.

    Args:
        file: need not be there yet.
    """

    def __init__(self, file: str | Path) -> None:
        self.file = str(file)  # no Path: to make one takes as long as to read the file, and a run may have 100,000

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.file)

    @property
    def account(self) -> str:
        """Its name: a client, or a client and a task."""
        return os.path.splitext(os.path.basename(self.file))[0]

    def entries(self) -> list[Entry]:
        """All reservations, oldest first.

        Raises:
            InputError: a line in the middle of the file is damaged: what was spent is no longer known.
        """
        try:
            file = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)  # a third of what Python's `open` takes
        except FileNotFoundError:
            return []
        try:
            content = b"".join(iter(lambda: os.read(file, 1 << 16), b""))
        finally:
            os.close(file)
        return self._read(content)

    def spent(self, delta: float, accountant: str = "pld") -> float:
        """Epsilon of everything reserved so far."""
        return compose_epsilon(tuple(entry.release for entry in self.entries()), delta, accountant)

    def reserve(
        self,
        entry: Entry,
        budget: Budget,
        plan: Release | None = None,
        lifetime: Budget | None = None,
        beside: Sequence[Entry] = (),
        *,
        once: bool = False,
    ) -> None:
        """Write the entry durably, if everything with it stays within the budgets.

        Args:
            budget: of the entry's run.
            plan: a release known to cost at most `budget` when it is all that the run made; saves its computation.
            lifetime: of all runs together.
            beside: entries of the other accounts of the same records' owner; those of other runs count for `lifetime`.
            once: the entry names its release; if it is here already, nothing is written.

        Raises:
            BudgetExhausted: it would pass a budget; nothing is written.
        """
        with self._lock_file():
            # Read under the lock: two processes with one release must not both find it missing.
            known = self.entries()
            if once and entry in known:
                return
            _require_budgets(known, entry, budget, plan, lifetime, beside)
            self._append(entry)

    def require(
        self,
        entry: Entry,
        budget: Budget,
        plan: Release | None = None,
        lifetime: Budget | None = None,
        beside: Sequence[Entry] = (),
    ) -> None:
        """Raise BudgetExhausted if `reserve` would; writes nothing."""
        _require_budgets(self.entries(), entry, budget, plan, lifetime, beside)

    @contextmanager
    def _lock_file(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # The lock goes with the process, however that ends; a lock file would stay.
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _append(self, entry: Entry) -> None:
        line = line_of(entry)
        with blame_file(self.path), self.path.open("r+b") as file:
            content = file.read()
            file.seek(content.rfind(b"\n") + 1)  # a torn last line was never acted upon
            file.truncate()
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        # The first line makes the file, whose name has to be on the disk as well.
        sync_folder(self.path.parent)

    def _read(self, content: bytes) -> list[Entry]:
        entries = []
        # After the last newline: nothing, or a torn line.
        for number, line in enumerate(content.split(b"\n")[:-1], start=1):
            try:
                entries.append(_read_line(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.file}: line {number} is damaged, so what was spent is not known: {error!r}."
                ) from error
        return entries


@lru_cache(maxsize=2**14)  # a client's ledger is read several times a round, and but for the last line it is as it was
def _read_line(line: bytes) -> Entry:
    values: dict[str, Any] = json.loads(line.decode())
    entry = Entry(*[values[name] for name in NAMES])
    require_release(*entry.release)
    return entry


def line_of(entry: Entry) -> str:
    """The entry as a line of the file, with the time of now."""
    return json.dumps({**vars(entry), "time": round(time.time(), 3)}) + "\n"


def client_of(account: str) -> str:
    """Whose account it is."""
    return account.partition(TASK)[0]


def accounts_of(folder: Path, client: str) -> list[Ledger]:
    """All accounts of a client: its own, and one for each task."""
    tasks = sorted(folder.glob(f"{glob.escape(client + TASK)}*{SUFFIX}"))
    return [Ledger(folder / f"{client}{SUFFIX}"), *map(Ledger, tasks)]


def accounts_in(folder: Path, clients: Container[str] | None = None) -> dict[str, list[Ledger]]:
    """`accounts_of` every client that has one, or of these. The folder, which may have very many files, is looked
    through once.
    """
    found: dict[str, list[Ledger]] = defaultdict(list)
    for name in sorted(os.listdir(folder)) if folder.is_dir() else ():
        client = client_of(name.removesuffix(SUFFIX))
        if name.endswith(SUFFIX) and (clients is None or client in clients):
            found[client].append(Ledger(f"{folder}/{name}"))
    return found


def list_exposures(accounts: list[list[Entry]]) -> list[list[Entry]]:
    """All that a record of one client may have been part of, for every account that it may be in; at least one.

    A run over tasks has an account for each, and a record is in one of them. In which one it was in another run, that
    may have cut its tasks elsewhere, nobody has written down, so all releases of the other runs count.
    """
    if len(accounts) == 1:  # as most have
        return accounts
    runs = [{entry.run for entry in entries} for entries in accounts]
    run = max(set().union(*runs), key=lambda name: (sum(name in found for found in runs), name), default="")
    others = [entry for entries in accounts for entry in entries if entry.run != run]
    own = [[entry for entry in entries if entry.run == run] for entries in accounts]
    return [[*entries, *others] for entries in own if entries] or [others]


@uncollected()
def read_account(path: Path, delta: float, accountant: str = "pld") -> dict[str, Any]:
    """What one ledger, or each of a run folder's, holds and costs; JSON-ready.

    `epsilon_max` is of one record over all accounts of its client, those beside a single file too.

    Raises:
        InputError: there is no ledger.
    """
    whole = path.is_dir()
    folder = path / "ledger" if whole else path.parent
    client = client_of(path.stem)
    if whole:
        accounts = accounts_in(folder)
    elif path.is_file():
        beside = [ledger for ledger in accounts_of(folder, client) if ledger.path != path]
        accounts = {client: [Ledger(path), *beside]}
    else:
        accounts = {}
    if not accounts:
        raise InputError(f"{path}: neither a ledger file nor a run folder with ledger/*.jsonl.")
    table: dict[str, Any] = {}
    largest = 0.0
    for ledgers in accounts.values():
        read = [ledger.entries() for ledger in ledgers]
        for ledger, entries in zip(ledgers, read, strict=True):
            if whole or ledger.path == path:
                table[ledger.account] = _describe_entries(entries, delta, accountant)
        largest = max(largest, *(_cost_of(found, delta, accountant) for found in list_exposures(read)))
    return {"delta": delta, "accountant": accountant, "ledgers": dict(sorted(table.items())), "epsilon_max": largest}


def _describe_entries(entries: list[Entry], delta: float, accountant: str) -> dict[str, Any]:
    return {
        "epsilon": _cost_of(entries, delta, accountant),
        "releases": len(entries),
        "steps": sum(entry.steps for entry in entries),
        "runs": len({entry.run for entry in entries}),
    }


def _cost_of(entries: list[Entry], delta: float, accountant: str) -> float:
    return _composed_once(tuple(entry.release for entry in entries), delta, accountant)


_composed_once = lru_cache(maxsize=1024)(compose_epsilon)  # very many clients spend alike


def _require_budgets(
    known: list[Entry],
    entry: Entry,
    budget: Budget,
    plan: Release | None,
    lifetime: Budget | None,
    beside: Sequence[Entry],
) -> None:
    """Raise BudgetExhausted if the entry, after those that are known, would pass a budget (`Ledger.reserve`)."""
    entries = [*known, entry]
    own = [item for item in entries if item.run == entry.run]
    # The budget was planned for these very steps, so its costly computation would say yes.
    if not (plan is not None and _is_within(own, plan)):
        _require_within(own, budget, "this run")
    if lifetime is not None:
        elsewhere = [item for item in beside if item.run != entry.run]
        _require_within([*elsewhere, *entries], lifetime, "all runs together")


def _require_within(entries: list[Entry], budget: Budget, what: str) -> None:
    if compose_epsilon(tuple(entry.release for entry in entries), budget.delta, budget.accountant) > budget.epsilon:
        raise BudgetExhausted(
            f"budget exhausted: {entries[-1].steps} more steps would pass epsilon={budget.epsilon:g} at delta="
            f"{budget.delta:g} for {what}."
        )


def _is_within(entries: list[Entry], plan: Release) -> bool:
    """Whether all entries are of the plan's kind and together have no more steps."""
    kinds = {entry.release[:2] for entry in entries}
    return kinds == {plan[:2]} and sum(entry.steps for entry in entries) <= plan[2]
