"""Sequential fine-tuning: the same parameters go on from task to task, with nothing done against forgetting.

    dW (full weights of the adapted layers) or s B A (LoRA) is trained on every task in turn

The lower reference of every table. `full` trains dW [out, in] from zero; `lora` a pair B = 0, A Kaiming-uniform.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config import LEARNER, option
from fedpeft.continual.parts.forms import FormBody, FormConfig


class Sequential(FormBody):
    """Plain fine-tuning, task after task."""

    stays_central = ""

    @dataclass
    class Config(FormConfig):
        form: str = option(
            "full", "what trains: the layers' full weights, or a LoRA", choices=("full", "lora"), only=LEARNER
        )
