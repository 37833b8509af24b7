"""First-session adaptation: the body learns on the first task and stays as it is; all later learning is the head's.

Panos et al., arXiv 2303.13199. Use it with `lda` (`covariance: total` is theirs): that head is exact over tasks, so
that what is lost after the first task is only what new classes take. `full` adapts the layers' weights, `lora` a
LoRA, `film` gain and shift of the normalisation layers (the paper's FSA-FiLM). Deviations: no drop-out before the
first session's classifier and no steps in the learning rate; epochs, batch and rate are those of every body.

    >>> FSA.needs
    ('boundaries',)
"""

from __future__ import annotations

from fedpeft.continual.parts.forms import FormBody


class FSA(FormBody):
    """Trains in the first task only."""

    paper = "Panos et al. 2023, arXiv 2303.13199"
    needs = ("boundaries",)
    stays_central = ""

    @classmethod
    def moves_in(cls, task: int) -> bool:
        return task == 0
