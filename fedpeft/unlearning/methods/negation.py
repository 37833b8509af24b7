"""Task negation: the change that more training on the forgotten records makes is subtracted.

Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089. Over the run's model theta, a fresh LoRA (and
the head, where the run trained one) is trained on the records to be forgotten, by the run's own client section:

    tau = theta_tuned - theta,   theta' = theta - lambda tau,   tau = s B A at each adapted layer

lambda is the largest of .05, .1, ..., 1 that leaves at least `keep` of the accuracy on records to keep, as the paper
has it (there on held-out records of a control task; here on at most `records` of the run's own training records that
stay, so that no test record is looked at). Where the clients concerned hold records out (data.holdout), it is the
smallest that already leaves the forgotten records no better known than those; `strength` sets it.

tau starts at the run's own model, not at the base: what is subtracted is then nothing that other records taught.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from fedpeft import progress
from fedpeft.clients.train import evaluate, train
from fedpeft.config import option
from fedpeft.errors import RunError
from fedpeft.merging.arithmetic import combine
from fedpeft.seeds import derive
from fedpeft.state import AdapterState
from fedpeft.unlearning.method import Case, Outcome, UnlearningMethod
from fedpeft.unlearning.methods.loku import draw_some

GRID = tuple(round(0.05 * step, 2) for step in range(1, 21))


@dataclass
class NegationConfig:
    """Options of `negation`."""

    epochs: int = option(10, "passes over what is to be forgotten", low=1)
    strength: float | None = option(None, "lambda; null is chosen by what is kept", above=0)
    keep: float = option(0.95, "share of the accuracy on records to keep that must be left", above=0, high=1)
    records: int = option(1000, "records to keep, at most, that lambda is chosen by", low=1)


class Negation(UnlearningMethod):
    """Subtracts what more training on the forgotten records would add."""

    Config: ClassVar[Any] = NegationConfig
    paper = "Ilharco et al. 2022, arXiv 2212.04089"

    def unlearn(self, case: Case, folder: Path) -> Outcome:
        start = case.started({})
        case.write(case.adapter, start)
        client = replace(case.config.client, local_epochs=self.config.epochs, local_steps=None, keep_optimizer=False)
        seed = derive(case.config.run.seed, "unlearn", "negation")
        steps, _ = train(case.model, case.forget, tuple({start.role(key) for key in start.tensors}), client, seed)
        tuned = case.model.read(start)
        strength = self.config.strength or self.choose(case, start, tuned)
        note = f"lambda is {strength:g}"
        passes = self.config.epochs * len(case.forget)
        return Outcome(negate_task(case.adapter, start, tuned, strength), steps, passes, (note,))

    def choose(self, case: Case, start: AdapterState, tuned: AdapterState) -> float:
        """The strength, by records that were trained on or held out.

        Raises:
            RunError: the weakest is too strong.
        """
        control = draw_some(case.retain, self.config.records, case.config.run.seed, "control")
        tokens = case.config.run.evaluate_tokens
        case.write(case.adapter)
        least, found = self.config.keep * evaluate(case.model, control, tokens=tokens)["accuracy"], None
        for number, strength in enumerate(GRID):
            progress.step("rounds", number, len(GRID))
            case.write(negate_task(case.adapter, start, tuned, strength))
            # Accuracy need not fall evenly: a larger one may still be allowed.
            if evaluate(case.model, control, tokens=tokens)["accuracy"] < least:
                continue
            found = strength
            if case.is_forgotten():
                break
        if found is None:
            raise RunError(
                f"strength=null: even {GRID[0]:g} leaves less than keep={self.config.keep:g} of the accuracy on "
                "records to keep. Lower keep or epochs, or give strength."
            )
        return found


def negate_task(run: AdapterState, start: AdapterState, tuned: AdapterState, strength: float) -> AdapterState:
    """run - strength (tuned - start), exact in the products; the rank is that of both."""
    return combine([(1.0, run), (-strength, tuned), (strength, start)])
