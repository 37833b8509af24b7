"""Records and small networks for tests of per-sample gradients, and the reference: autograd on one record at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedpeft import registry
from fedpeft.clients.train import per_sample_loss
from fedpeft.data.encode import Encoded
from fedpeft.privacy.gradients import per_sample_gradients
from support import small_models as small

KINDS, ADAPTERS = list(small.KINDS), registry.names("adapters")
ROLE_SETS = {
    "lora": [("A", "B", "head"), ("B", "head"), ("A",), ("B",), ("A", "head")],
    "lora_sb": [("R", "head"), ("R",)],
    "peft": [("peft", "head"), ("peft",)],
}
EXACT = {"rtol": 0, "atol": 1e-12}


def as_double(adapted):
    for module in adapted.base.modules:
        module.double()
    return adapted


def records(kind, count=5, ragged=True, seed=3):
    """Records of unequal length unless `ragged` is false; images all have one size."""
    if kind == "vit":
        draw = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 1, 8, 8, generator=draw, dtype=torch.float64)
        return Encoded({"pixel_values": images}, torch.arange(count) % small.LABELS)
    data = small.texts(count, causal=small.KINDS[kind][0] == small.LM, seed=seed)
    lengths = data.inputs["attention_mask"].sum(1)
    assert count < 2 or len(set(lengths.tolist())) > 1
    if ragged:
        return data
    ids = data.inputs["input_ids"][:, :2]  # every text has two tokens or more
    labels = ids if data.labels.ndim == 2 else data.labels
    return Encoded({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, labels)


def single(data):
    """In float32, as clients train."""
    return Encoded(
        {key: value.float() if value.is_floating_point() else value for key, value in data.inputs.items()}, data.labels
    )


def roles_of(method, adapted):
    """The role sets that strategies train, and all roles."""
    return [*ROLE_SETS.get(method, []), tuple({adapted.form.role(key) for key in adapted.parameters})]


def batch(data):
    return data.batch(range(len(data)))


def loss_of(adapted):
    return lambda inputs, labels: per_sample_loss(adapted, inputs, labels)


def one_by_one(parameters, loss, data):
    """[N, P] and [N]: every record alone, in a batch of one that is cut to its own length."""
    rows, losses = [], []
    for index in range(len(data)):
        value = loss(*data.batch([index])).sum()
        parts = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(parameter) if part is None else part).flatten()
                    for parameter, part in zip(parameters.values(), parts, strict=True)
                ]
            )
        )
        losses.append(value.detach())
    return torch.stack(rows), torch.stack(losses)


def compare(adapted, parameters, data, least=1e-3):
    """The two ways agree on all records; and the reference is not trivially zero."""
    loss = loss_of(adapted)
    fast, losses = per_sample_gradients(
        adapted.base.modules, parameters, loss, *batch(data), rows=adapted.base.objective.rows
    )
    slow, expected = one_by_one(parameters, loss, data)
    assert fast.dtype == torch.float64 and fast.shape == slow.shape and not fast.requires_grad
    assert slow.abs().amax(1).min() > least
    torch.testing.assert_close(fast, slow, **EXACT)
    torch.testing.assert_close(losses, expected, **EXACT)


def without_dropout(adapted):
    """The backbone with all rates at zero."""
    for module in adapted.base.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if hasattr(module, name) and isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
    return adapted.base.backbone


class Net(nn.Module):
    """Two layers on [N, T, 4]; `middle` is what a test puts between them."""

    def __init__(self, middle=None, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, width), nn.Linear(width, 3)
        self.middle = middle

    def forward(self, x):
        x = torch.tanh(self.one(x))
        if isinstance(self.middle, nn.Module):
            x = self.middle(x)
        elif self.middle is not None:
            x = self.middle(self, x)
        return self.two(x)


def toy(net):
    """Modules, parameters, loss, and a batch of records with five tokens each."""
    net.double()
    draw = torch.Generator().manual_seed(1)
    inputs = {"x": torch.randn(4, 5, 4, generator=draw, dtype=torch.float64)}
    parameters = {key: value for key, value in net.named_parameters() if value.requires_grad}

    def loss(inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        logits = net(inputs["x"]).mean(1)
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return [net], parameters, loss, inputs, torch.tensor([0, 1, 2, 0])
