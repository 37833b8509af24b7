"""A strategy that learns a sequence of tasks: the body's half around any other strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fedpeft import registry
from fedpeft.continual.curriculum import Curriculum
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.client import list_layers
from fedpeft.strategies.instructions import Instructions, Lesson
from fedpeft.strategies.sequence.base import KEEP, Place, ServerBody, Tensors
from fedpeft.strategies.wrappers.wrapper import Wrapper, innermost_rule, name_of

TASK = f"{KEEP}task"  # the last task that has begun


class TaskSequence(Wrapper):
    """Tells clients which classes to train, and calls the body where a task begins and after every round.

    Args:
        compete: "local", where the task's own classes compete in the loss, or "seen", all so far.
    """

    def __init__(
        self, inner: FederatedStrategy, body: ServerBody, curriculum: Curriculum, compete: str, name: str
    ) -> None:
        super().__init__(inner)
        self.body, self.curriculum, self.compete = body, curriculum, compete
        self.changes_base = self.inner.changes_base or body.folds
        self._require_body(name)

    def begun(self, server: ServerState) -> int:
        """The task that began last; -1 before the first."""
        return int(server.numbers.get(TASK, -1))

    def begin(self, server: ServerState, task: int, sketches: dict[str, Tensors]) -> ServerState:
        """The state before the first round of a task; the strategy starts anew where the body drew a new A."""
        moved = self.body.begin(server, self.place(server.round + 1), self.context.seed, sketches)
        if self.body.changes_A:
            fresh = self.inner.initial(moved.adapter, self.context.seed)
            # The strategy's own memory anew, the body's as it is: what fits old factors means nothing in new ones. That
            # goes for moments of a server optimizer too, which are made in its first round and so are not in `fresh`.
            bodys = {key: value for key, value in moved.memory.items() if key.startswith(KEEP)}
            moved = replace(
                moved,
                adapter=fresh.adapter,
                memory={**bodys, **fresh.memory},
                numbers={**moved.numbers, **fresh.numbers},  # in which client-level privacy, outside, has its clip
            )
        return replace(moved, numbers={**moved.numbers, TASK: task})

    def place(self, number: int) -> Place:
        """Where round `number` is."""
        return Place(self.curriculum.task(number), self.curriculum.place(number), self.curriculum.rounds)

    def initial(self, adapter: AdapterState, seed: int) -> ServerState:
        self.body.require(adapter, len(self.curriculum.groups))
        return self.inner.initial(adapter, seed)

    def trained(self, server: ServerState) -> tuple[str, ...]:
        return self.body.trained(self.inner.trained(server), self.place(server.round + 1))

    def uploads(self, server: ServerState) -> tuple[str, ...]:
        # Without trained roles that the body fixes in this round; what is sent though it does not train stays.
        trained, kept_back = self.trained(server), set(self.inner.trained(server))
        return tuple(role for role in self.inner.uploads(server) if role in trained or role not in kept_back)

    def make_lesson(self, task: int) -> Lesson:
        """What clients are told of a task. They make the same from their own config, and refuse another."""
        seen, classes = self.curriculum.seen(task), self.curriculum.classes(task)
        # With replay old records are in every batch, and their classes have to compete too.
        compete = seen if self.compete == "seen" or self.body.replays else classes
        return Lesson(
            task,
            tuple(classes),
            tuple(seen),
            tuple(compete),
            self.body.replays,
            tuple(tuple(group) for group in self.curriculum.groups[: task + 1]),
        )

    def instructions(self, server: ServerState) -> Instructions:
        begun = self.begun(server)  # also after its last round, when clients evaluate
        begun = begun if begun >= 0 else self.curriculum.task(server.round + 1)
        return replace(
            self.inner.instructions(server),
            trains=self.trained(server),
            uploads=self.uploads(server),
            learn=self.make_lesson(begun),
        )

    def aggregate(self, server: ServerState, updates: list[Update]) -> ServerState:
        """The strategy's rule, and what the body does after it. Factors that nobody trained stay as they were."""
        # Of the strategy inside, not of the round: the rule wants all roles that it knows.
        uploads = self.inner.uploads(server)
        fixed = server.adapter.select([role for role in uploads if role not in self.trained(server)])
        if fixed.tensors:  # the rule sees them from every client as they were sent
            updates = [replace(update, adapter=fixed.replace(update.adapter)) for update in updates]
        after = self.inner.aggregate(server, updates)
        return self.body.after(after.with_tensors(fixed.tensors), self.place(server.round + 1))

    def _require_body(self, name: str) -> None:
        lacking = [role for role in self.body.needs if role not in self.trains]
        inside = innermost_rule(self.inner)
        if lacking:
            raise InputError(
                f"continual.body={name}: it needs clients that train {', '.join(lacking)}; strategy "
                f"{name_of(inside)} trains {', '.join(self.trains)}. {self.body.without_needs}".rstrip()
            )
        if self.body.fixes_factor and not inside.takes_fixed_factor:
            raise InputError(
                f"continual.body={name}: one factor stays as it is for a task, which the rule of strategy "
                f"{name_of(inside)} cannot do. Strategies that can: "
                f"{self._find_able(lambda cls: cls.takes_fixed_factor)}."
            )
        if self.body.needs_still_base and self.inner.changes_base:
            raise InputError(
                f"continual.body={name}: what a task trains must stay in the factors, but strategy "
                f"{name_of(inside)} moves it into the base in every round. Strategies that do not: "
                f"{self._find_able(lambda cls: not cls.changes_base)}."
            )
        if self.body.averages and (self.inner.changes_base or not self.fixed_basis):
            raise InputError(
                f"continual.body={name}: it averages the factors over rounds, but strategy "
                f"{name_of(inside)} gives them new coordinates, or another base, in every round. "
                f"Strategies that do not: {self._find_able(lambda cls: cls.fixed_basis and not cls.changes_base)}."
            )
        self._require_lasting_gradients(name)
        if self.keeps:
            raise InputError(
                f"continual.body={name}: strategy {name_of(inside)} leaves {', '.join(self.keeps)} with "
                "each client, so there is no one model whose tasks could be counted."
            )
        transport = getattr(inside.config, "transport", "dense")
        if self.body.changes_A and transport != "dense":
            raise InputError(
                f"strategy.transport={transport}: continual.body={name} chooses new factors for "
                "every task, which clients cannot draw from the run's seed. Set strategy.transport=dense."
            )

    def _require_lasting_gradients(self, name: str) -> None:
        """Refuse a wrapper that offsets gradients by those of earlier rounds where a task has factors of its own."""
        if self.plain_sgd and self.body.changes_A:  # those that clients keep are of the last task's coordinates
            needing = next(layer for layer in list_layers(self.inner) if type(layer).plain_sgd)
            raise InputError(
                f"continual.body={name}: every task has new factors, in which the "
                f"{needing.client_half.sends} of {name_of(needing)} from the last task mean nothing. Take "
                f"{name_of(needing)} out of strategy.wrap."
            )

    def _find_able(self, fits: Callable[[type[FederatedStrategy]], bool]) -> str:
        """Names of strategies that fit and, like this one, leave nothing with clients and work on its adapter."""
        found = [(name, registry.load("strategies", name)) for name in registry.names("strategies")]
        return ", ".join(
            name for name, cls in found if fits(cls) and cls.adapter == self.adapter and not (cls.keeps or cls.wraps)
        )


def find_sequence(strategy: FederatedStrategy) -> TaskSequence | None:
    """The `TaskSequence` among a strategy's wrappers."""
    while isinstance(strategy, Wrapper):
        if isinstance(strategy, TaskSequence):
            return strategy
        strategy = strategy.inner
    return None
