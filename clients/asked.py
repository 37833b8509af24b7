"""A client accepts a request only if its own strategy would say and send the same; it checks before it reads a record.

From its config a client makes the strategy that the server runs, and so knows which roles a round trains, and the names
and shapes of what it is sent. Anything else is refused by name. What is refused here depends on the request and the
config alone, so the reason may be told.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

from torch import Tensor

from fedpeft.clients.policy import Refused
from fedpeft.config import Config
from fedpeft.foreign import shown
from fedpeft.state import AdaptedLayer, AdapterState, ServerState
from fedpeft.strategies.build import build
from fedpeft.strategies.instructions import ROLES, Instructions
from fedpeft.strategies.sequence.base import NEW, PAST

LARGEST = 1e9  # of a value that a server may send: no training that works comes near it
SUMS = ("head", NEW, PAST)
RESIDUAL = ("residual_B", "residual_A")


Same = tuple[AdapterState, Instructions, int, list[Tensor]]  # received, told, rounds done, tensors of the form


class Own:
    """The client's own reading of its config.

    Args:
        initial: the strategy's round-0 adapter.
        classes: of the data, where the config has a sequence of tasks.
    """

    def __init__(self, config: Config, initial: AdapterState, classes: int | None) -> None:
        self.initial, self.name = initial, config.strategy.name
        self.strategy = build(config, classes)
        self.seed = config.run.seed
        self.accepted: tuple[Same, AdapterState] | None = None

    @cached_property
    def start(self) -> ServerState:
        """The server's state before round 1 as this config makes it; a server that has the same config has the same."""
        return self.strategy.initial(self.initial, self.seed)

    def trained(self, rounds: int) -> list[tuple[str, ...]]:
        """The sets of roles that rounds may train, once each."""
        return sorted({self.strategy.trained(replace(self.start, round=done)) for done in range(rounds)})

    def accept(self, client: str, received: AdapterState, told: Instructions, done: int) -> AdapterState:
        """What was received for training or evaluation, checked, with the sites that the client itself knows.

        Args:
            done: rounds that the server has behind it.

        Raises:
            Refused: names the key or the tensor, what was seen and what is allowed.
        """
        server = replace(self.start, round=done)
        form = self.strategy.broadcast(server, client)
        # All clients of a round that are sent the very same are checked once; a form is of the client's own tensors.
        same = (received, told, done, form.payload)
        if self.accepted is None or not _is_same(self.accepted[0], same):
            self._require_roles(told, self.strategy.instructions(server))
            self.accepted = same, self._tensors(received, form)
        return self.accepted[1]

    def accept_sums(self, received: AdapterState, told: Instructions) -> AdapterState:
        """The same for a request of sums over records."""
        if told.sums not in SUMS:
            raise Refused(f"task.sums={_show_value(told.sums)}: allowed are {', '.join(SUMS)}.")
        if told.view is None:
            raise Refused("task.view is missing: sums are asked for at a view of the adapter.")
        _require_absent(told, (*ROLES, "static"), "a request of sums")
        whole = self.start.adapter  # a view has it all, or what clients cannot draw from the seed
        return self._tensors(received, whole, set(whole.tensors) & set(self.strategy.broadcast(self.start, "").tensors))

    def _require_roles(self, told: Instructions, own: Instructions) -> None:
        strategy = self.strategy
        allowed = {"trains": set(strategy.trains), "uploads": set(told.trains), "keeps": set(strategy.keeps)}
        for key in ROLES:
            roles = getattr(told, key)
            if not roles and key != "keeps":
                raise Refused(f"task.{key}=[]: it may not be empty.")
            staying = sorted({*roles} & {*strategy.keeps}) if key == "uploads" else []
            if staying:
                raise Refused(f"{', '.join(staying)} stays with the site under {self.name}.")
            if {*roles} - allowed[key] or len(set(roles)) != len(roles):
                raise Refused(
                    f"task.{key}={_show_value(list(roles))}: under strategy {self.name} it may have "
                    f"{', '.join(sorted({*getattr(own, key)})) or 'none'}, each once"
                    f"{', of those that it trains' if key == 'uploads' else ''}."
                )
        _require_absent(told, ("sums", "view", *(("static",) if own.static is None else ())), "a round")
        if told.static is not None and own.static is not None and told.static.roles != own.static.roles:
            raise Refused(
                f"task.static={_show_value(list(told.static.roles))}: strategy {self.name} gives the roles "
                f"{', '.join(own.static.roles)}."
            )

    def _tensors(self, received: AdapterState, form: AdapterState, needed: set[str] | None = None) -> AdapterState:
        """The tensors, if they are those of the form and, where the strategy changes the base, of a residual.

        Args:
            needed: tensors that may not be missing; None is all of the form.
        """
        sites = self.initial.sites
        own = replace(received, sites=sites)
        self._require_extra(own, form if needed is None else replace(form, extra={}))
        for key, value in own.tensors.items():
            if key not in form and not (
                self.strategy.changes_base
                and own.role(key) in RESIDUAL
                and key.rpartition("/")[0] in self.initial.lora_sites()
            ):
                raise Refused(f"{shown(key, 200)}: strategy {self.name} sends no such tensor.")
            _require_values(key, value, form.tensors.get(key))
        missing = next((key for key in form.tensors if key not in own and (needed is None or key in needed)), None)
        if missing is not None:
            raise Refused(f"{missing} is missing: strategy {self.name} sends it.")
        for site in self.initial.lora_sites():
            _require_residual(own, site, sites[site])
        return own

    def _require_extra(self, received: AdapterState, form: AdapterState) -> None:
        """What travels beside the adapter is what this strategy sends there."""
        for name, value in received.extra.items():
            if name not in form.extra:
                raise Refused(f"{shown(name, 200)}: strategy {self.name} sends no such tensor beside the adapter.")
            _require_values(name, value, form.extra[name])
        missing = next((name for name in form.extra if name not in received.extra), None)
        if missing is not None:
            raise Refused(f"{missing} is missing: strategy {self.name} sends it beside the adapter.")


def _is_same(known: Same, other: Same) -> bool:
    """Whether two requests are the very same objects, and not only equal."""
    if known[0] is not other[0] or known[1] is not other[1] or known[2] != other[2] or len(known[3]) != len(other[3]):
        return False
    return all(mine is theirs for mine, theirs in zip(known[3], other[3], strict=True))


def _require_values(key: str, value: Tensor, like: Tensor | None) -> None:
    if not value.dtype.is_floating_point or value.dtype.itemsize < 4:
        raise Refused(f"{key} has dtype {value.dtype}; allowed are float32 and float64.")
    if like is not None and value.shape != like.shape:
        raise Refused(f"{key} has shape {list(value.shape)}, expected {list(like.shape)}.")
    if not bool((value.abs() <= LARGEST).all()):
        raise Refused(f"{key} has a value that is not a number or above {LARGEST:g}.")


def _require_residual(state: AdapterState, site: str, place: AdaptedLayer) -> None:
    keys = [f"{site}/{role}" for role in RESIDUAL]
    found = [key for key in keys if key in state]
    if not found:
        return
    shapes = [list(state[key].shape) for key in found]
    out, width = place.shape[0], place.shape[-1]
    rank = state[found[0]].shape[-1] if state[found[0]].ndim else 0
    if len(found) < 2 or not 0 < rank <= min(out, width) or shapes != [[out, rank], [rank, width]]:
        raise Refused(
            f"{', '.join(found)}: shapes {shapes}; a residual of this site is [{out}, q] and [q, {width}], "
            f"1 <= q <= {min(out, width)}, both or neither."
        )


def _require_absent(told: Instructions, keys: tuple[str, ...], what: str) -> None:
    found = next((key for key in keys if getattr(told, key)), None)
    if found is not None:
        raise Refused(f"task.{found}={_show_value(getattr(told, found))}: {what} has none under this client's config.")


def _show_value(value: Any) -> str:
    return shown(repr(value), 200)
