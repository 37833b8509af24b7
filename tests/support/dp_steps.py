"""Steps of DP-SGD for tests: who is drawn is chosen, the noise is noted, and records try to have too much influence."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from fedpeft.clients.train import Private, private_steps
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE, load_objective
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.ledger import Budget
from fedpeft.privacy.plan import Plan
from support import small_models as small
from support.per_sample import loss_of, records

CPU = torch.device("cpu")
ROLES = ["A", "B", "head"]
CLIP, BATCH = 0.7, 3.0
SGD = ClientConfig(optimizer="sgd", lr=0.1, local_steps=1, local_epochs=None, batch_size=2)  # pieces of 4 records


def plan(rate=1.0, sigma=0.0, clip=CLIP, batch=BATCH, steps=1):
    return Plan(rate, batch, clip, sigma, steps, Budget(1.0, 1e-5))


class Fixed:
    """Draws that the test chose: all records join unless `uniforms` says otherwise; the noise is kept in `asked`."""

    def __init__(self, uniforms=(), seed=0):
        self.uniforms, self.rng = list(uniforms), np.random.default_rng(seed)
        self.asked = []

    def uniform(self, count):
        return self.uniforms.pop(0) if self.uniforms and len(self.uniforms[0]) == count else np.zeros(count)

    def normal(self, count):
        self.asked.append(self.rng.standard_normal(count))
        return self.asked[-1]


def joined(data, other, place):
    """`data` with the records of `other` put in at `place`."""

    def put(one, two):
        return torch.cat([one[:place], two.to(one.dtype), one[place:]])

    return Encoded(
        {key: put(value, other.inputs[key]) for key, value in data.inputs.items()}, put(data.labels, other.labels)
    )


def adversaries(kind):
    """Single records that try to have more influence than they may; by name."""
    plain = records(kind, 1, seed=9)
    found = {"plain": plain, "relabelled": Encoded(plain.inputs, (plain.labels + 1) % small.LABELS)}
    if kind == "vit":
        image = plain.inputs["pixel_values"]
        spoilt = {
            "nan": image * torch.nan,
            "inf": image * torch.inf,
            "one inf": image.masked_fill(image == image.max(), torch.inf),
        }
        for name, value in {"black": 0 * image, "huge": 1e6 * image, "beyond": 1e200 * image, **spoilt}.items():
            found[name] = Encoded({"pixel_values": value}, plain.labels)
    else:
        causal = plain.labels.ndim == 2
        for name, length in {"longest": 7, "shortest": 2, "one token": 1}.items():
            mask = (torch.arange(7)[None] < length).long()
            ids = torch.full((1, 7), 200) * mask
            labels = ids.masked_fill(mask == 0, IGNORE) if causal else torch.tensor([2])
            found[name] = Encoded({"input_ids": ids, "attention_mask": mask}, labels)
    for name in {"plain", "longest"} & set(found):
        found[f"{name}, no loss"] = Encoded(found[name].inputs, torch.full_like(found[name].labels, IGNORE))
    return found


@dataclass(frozen=True)
class Setup:
    """What a step is taken on."""

    model: object
    parameters: dict

    def rows(self, data):
        """Per-sample gradients of all records, [N, P]."""
        loss = loss_of(self.model)
        return per_sample_gradients(self.model.base.modules, self.parameters, loss, *data.batch(range(len(data))))[0]

    def sizes(self):
        return [value.numel() for value in self.parameters.values()]


def setup(model, roles=ROLES):
    return Setup(model, model.train_roles(roles))


def shipped(at, data, plan, source, config=SGD):
    """The gradient [P] that the optimizer of a client gets."""
    gradients, _ = next(private_steps(at.model, data, at.parameters, config, Private(plan, source), CPU))
    return torch.cat([gradients[key].flatten() for key in at.parameters])


def shrunk(rows, clip):
    norms = rows.norm(dim=-1, keepdim=True)
    return rows * (clip / (norms + 1e-6)).clamp(max=1)


class Line(nn.Module):
    """A model cheap enough for hundreds of steps; to a step it looks like an adapted one."""

    def __init__(self, width=600):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(width, small.LABELS)
        self.base = SimpleNamespace(objective=load_objective(small.IMAGE), backbone=self, modules=[self.layer])
        self.parameters_ = {f"layer/{name}": value for name, value in self.layer.named_parameters()}
        self.over_scores = None

    def logits(self, inputs):
        return self.layer(inputs["pixel_values"])

    def still(self):
        return {}


def blanks(count=20, width=600):
    """Records without any gradient."""
    return Encoded({"pixel_values": torch.zeros(count, width)}, torch.full((count,), IGNORE))
