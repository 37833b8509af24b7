"""Methods on top of another one, whose predictions they work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.tta.deployed import Batch, Deployed
from fedpeft.tta.method import NEEDS, MethodConfig, Outputs, TTAMethod, make


@dataclass
class WrapperConfig(MethodConfig):
    """Options of methods on top of another one."""

    base: str = option("source", "registered method whose predictions this one works on")
    base_options: dict[str, Any] = option({}, "options of the base method", options_of=("tta", "base"))


class WrappedMethod(TTAMethod):
    """A method on top of another one: the base gives logits and features, and learns first."""

    Config: ClassVar[Any] = WrapperConfig

    def __init__(self, model: Deployed, seed: int = 0, **options: Any) -> None:
        options = dict(options)
        config = self.Config(**options)
        # Before the rest, which asks it what it needs. Another seed, or both would draw the same views.
        self.base = make(config.base, model, config.base_options, seeds.derive(seed, "base"), key="base")
        super().__init__(model, seed, **options)

    def holds(self) -> list[str]:
        """What the base holds."""
        return self.base.holds()

    def _needs(self) -> str:
        return max(super()._needs(), self.base.needs_source, key=NEEDS.index)

    def _learn_base(self, batch: Batch, outputs: Outputs) -> str | None:
        """Let the base learn from its own outputs; its reason."""
        self.base._learn(batch, outputs)
        return self.base.reason

    def prepare(self, source: Encoded) -> None:
        if self.base.needs_source != "none":
            self.base.prepare(source)
        super().prepare(source)

    def _restart(self) -> None:
        self.base._restart()
        super()._restart()

    def reset(self) -> None:
        self.base.reset()
        super().reset()

    def state(self) -> dict[str, Any]:
        return {**super().state(), "base": self.base.state()}

    def load(self, state: dict[str, Any]) -> None:
        super().load({key: value for key, value in state.items() if key != "base"})
        self.base.load(state["base"])

    def spent(self) -> dict[str, int]:
        below = self.base.spent()
        return {key: value + below[key] for key, value in self.cost.items()}

    def held(self) -> int:
        return super().held() + self.base.held()
