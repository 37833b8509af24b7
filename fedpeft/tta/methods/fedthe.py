"""FedTHE: each test sample mixes the global and the client's personal head, with weights found without its label.

With the features h of one body, z_g and z_p the logits of the two heads, the mean features h_g of all clients' training
records and h_p of the client's own, and s = softmax(e) the weights of one sample:

    z(s) = s_g z_g + s_p z_p,    H its entropy,    c = cosine(softmax z_g, softmax z_p)
    history_i = a h_i + (1 - a) history_(i-1),  starting at h_1;    h~ = b h + (1 - b) history
    L(e) = c H(z(s)) + (1 - c) (s_g |h~ - h_g| + s_p |h~ - h_p|)

From e = 1 take `steps` steps of Adam; the answer is softmax z(s). So where the heads agree the more certain mixture
counts, and where they do not, whose training records the recent samples are like. A sample depends on those before it
through the history alone: how the stream is cut into batches changes nothing. FedTHE+ (`memo_steps` 3) then takes, for
each sample, steps along the marginal entropy of its views through the weights s and both heads, and forgets them.

Jiang and Lin, arXiv 2205.10920. a = 0.1, b = 0.3, 20 steps, lr 0.1; FedTHE+ 16 views, lr 5e-4. In a federation the
server averages the clients' mean features (`strategy.wrap=[fedthe]`) and `receive` takes the result; with `prepare`
alone h_g is h_p, and entropy decides. Either trains the personal head, from the global one, on labelled records: it is
made anew on the features that it will be used with, and never leaves the client.

Deviations: the authors train the global head with a balanced softmax loss, here it is as the rounds train it; their
personal head starts at random, has no bias and goes on from round to round; they send h_p of the model that a client
has trained, here it is measured again on the averaged one that is evaluated, while h_g is a round old in both. h_g is
the mean by the strategy's weighting, theirs weighs clients equally. In their code h~ after step k is history +
b^k (h - history), so that after two steps it is the history to 9 %; the first sample of every batch but the first
enters no history and has the one that was there before it; the history starts anew with every test set; and all samples
of a batch stop when the norm of its whole gradient is below 1e-5.

    >>> heads = torch.tensor([[[4.0, 0.0], [0.5, 0.0]]])                    # both say class 0, the global head for sure
    >>> near = torch.tensor([[1.0, 1.0]])
    >>> [round(value, 2) for value in mixing_weights(heads, near, 20, 0.1)[0].tolist()]
    [0.96, 0.04]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.data.encode import Encoded
from fedpeft.errors import InputError
from fedpeft.tta.deployed import Batch, Deployed, batch_size, join_batches, take_rows
from fedpeft.tta.method import MethodConfig, Outputs, TTAMethod, source_batches
from fedpeft.tta.parts import optim, scores
from fedpeft.tta.parts.augment import KINDS, augment_batch

Layer = dict[str, Tensor]  # weight [K, D] and bias [K]


@dataclass
class FedTHEConfig(MethodConfig):
    """Options of `fedthe`; FedTHE+ is FedTHE with `memo_steps` above 0."""

    order: str = option(
        "before", "a sample's own feature is in its answer, so there is no other order", choices=("before",)
    )
    steps: int = option(20, "steps on the weights of a sample", low=0)
    lr: float = option(0.1, "learning rate of the weights (Adam)", low=0)
    rate: float = option(0.1, "a, share of a new sample in the history", low=0, high=1)
    share: float = option(0.3, "b, share of the sample's own feature beside the history", low=0, high=1)
    head_epochs: int = option(10, "passes of the personal head over the client's records", low=0)
    head_lr: float = option(0.01, "learning rate of the personal head (Adam)", low=0)
    head_batch: int = option(32, "records in a batch of the personal head", low=1)
    memo_steps: int = option(0, "FedTHE+: steps on the views of a sample; 0 is FedTHE", low=0)
    views: int = option(16, "FedTHE+: views of a sample", low=1)
    memo_lr: float = option(5e-4, "FedTHE+: learning rate (SGD), also of the personal head", low=0)
    adapt: Any = option(
        "all", "FedTHE+: what moves beside the personal head: norm_affine, lora, head, all, or a list of name patterns"
    )
    augment: str = option("image", "FedTHE+: kind of views", choices=KINDS)


class TestTimeFedTHE(TTAMethod):
    """Test-time ensemble of the global and the client's personal head, weighted sample by sample."""

    Config: ClassVar[Any] = FedTHEConfig
    paper = "Jiang and Lin 2022, arXiv 2205.10920"
    needs_source: str = "labels"
    pairs_with = "fedthe"

    def __init__(self, model: Any, seed: int = 0, **options: Any) -> None:
        super().__init__(model, seed, **options)
        self.model.require_head()
        if self.config.memo_steps:
            self.model.select(self.config.adapt)  # refuse an empty set now

    def receive(self, source: Encoded, everyone: Tensor) -> None:
        """Prepare on the client's own labelled records, with the mean feature [D] of all clients.

        Raises:
            InputError: the mean feature has another width than the model's features, or is not finite.
        """
        width = self.model.require_head().in_features
        if everyone.shape != (width,) or not bool(everyone.isfinite().all()):
            raise InputError(
                f"everyone: the mean feature has shape {list(everyone.shape)}; it must be [{width}], and finite."
            )
        self.prepare(source)
        self.prepared["everyone"] = everyone.to(self.prepared["own"])

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        config = self.config
        features = torch.cat([_detach_features(self.forward(batch)) for batch, _ in source_batches(source)])
        weight, bias = self.model.head_parameters()
        head = {"weight": weight.detach().clone(), "bias": bias.detach().clone()}
        labels, moments = source.labels.to(features.device), optim.fresh()
        for epoch in range(config.head_epochs):
            order = torch.randperm(len(features), generator=seeds.torch_generator(self.seed, "tta", "head", epoch))
            for rows in order.to(features.device).split(config.head_batch):
                gradients = head_gradients(head, features[rows], labels[rows])
                head = optim.step("adam", head, gradients, moments, config.head_lr)
        own = features.mean(0)
        return {"head": head, "own": own, "everyone": own}

    def _fresh(self) -> dict[str, Any]:
        return {"seen": 0}  # and the history, from the first sample on

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        config, prepared = self.config, self.prepared
        plain = self.forward(batch)
        features = _detach_features(plain)
        history = moving_history(features, self.memory.get("history"), config.rate)
        blended = torch.lerp(history, features, config.share)
        # Smoothed over the stream: a single sample says little of whose distribution it is from.
        far = torch.stack([(blended - prepared[name]).norm(dim=1) for name in ("everyone", "own")], 1)
        heads = torch.stack([plain.logits, _logits_of(features, prepared["head"])], 1)
        weights = mixing_weights(heads, far, config.steps, config.lr)
        if config.memo_steps:
            heads = torch.stack(
                [
                    self._tune_one(take_rows(batch, torch.tensor([row])), row, weights[row])
                    for row in range(batch_size(batch))
                ]
            )
        logits = (weights[:, :, None] * heads).sum(1)
        return Outputs(logits, features, None, {"history": history, "weights": weights})

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        last = outputs.extra["history"][-1]
        if not bool(last.isfinite().all()):
            return "the features are not finite"
        self.memory = {"seen": self.memory["seen"] + len(outputs.logits), "history": last.clone()}
        return None

    def _tune_one(self, sample: Batch, row: int, weights: Tensor) -> Tensor:
        """Logits [2, K] of both heads for one sample after the steps on its views; the last finite ones."""
        config = self.config
        draws = seeds.torch_generator(self.seed, "tta", "views", self.memory["seen"] + row)
        body = self.model.tensors(self.model.select(config.adapt))
        moved = {**body, **{f"personal/{name}": value for name, value in self.prepared["head"].items()}}
        for _ in range(config.memo_steps):
            views = join_batches([augment_batch(config.augment, sample, draws) for _ in range(config.views)])
            leaves: dict[str, Tensor] = {name: torch.nn.Parameter(value) for name, value in moved.items()}
            with torch.enable_grad():
                heads = self._both_logits(views, leaves, graph=True)
                loss = scores.marginal_entropy((weights[:, None] * heads).sum(1))
            gradients = self.gradients(loss, leaves)
            if not all(bool(value.isfinite().all()) for value in gradients.values()):
                break
            moved = optim.step("sgd", moved, gradients, optim.fresh(), config.memo_lr)
        return self._both_logits(sample, moved)[0]

    def _both_logits(self, batch: Batch, tensors: dict[str, Tensor], graph: bool = False) -> Tensor:
        """Logits [N, 2, K] of the global and the personal head, all tensors being these."""
        body = {name: value for name, value in tensors.items() if not name.startswith("personal/")}
        outputs = self.forward(batch, body, graph=graph)
        assert outputs.features is not None  # there is a head
        personal = {name: tensors[f"personal/{name}"] for name in ("weight", "bias")}
        return torch.stack([outputs.logits, _logits_of(outputs.features, personal)], 1)


def mixing_weights(heads: Tensor, far: Tensor, steps: int, lr: float) -> Tensor:
    """Weights s [N, 2] of two heads whose logits are [N, 2, K] and whose records are `far` [N, 2]; row by row."""
    log_p = heads.log_softmax(-1)
    agree = F.cosine_similarity(log_p[:, 0].exp(), log_p[:, 1].exp(), dim=-1)[:, None]
    params, moments = {"e": torch.ones_like(far)}, optim.fresh()
    for _ in range(steps):
        weights = params["e"].softmax(-1)
        log_q = (weights[:, :, None] * heads).sum(1).log_softmax(-1)
        slope = -log_q.exp() * (log_q + scores.entropy(log_q)[:, None])  # dH / dz
        by_weight = agree * (slope[:, None] * heads).sum(-1) + (1 - agree) * far
        gradient = weights * (by_weight - (weights * by_weight).sum(-1, keepdim=True))
        params = optim.step("adam", params, {"e": gradient}, moments, lr)
    return params["e"].softmax(-1)


def moving_history(features: Tensor, before: Tensor | None, rate: float) -> Tensor:
    """The history [N, D] at each row of features [N, D]; `before` is that of the row before, None at the start."""
    rows: list[Tensor] = []
    for feature in features:
        before = feature if before is None else torch.lerp(before, feature, rate)
        rows.append(before)
    return torch.stack(rows)


def head_gradients(head: Layer, features: Tensor, labels: Tensor) -> Layer:
    """Gradient of the mean cross entropy of a linear layer."""
    probs = _logits_of(features, head).softmax(-1)
    excess = (probs - F.one_hot(labels, probs.shape[1])) / len(probs)
    return {"weight": excess.T @ features, "bias": excess.sum(0)}


@torch.no_grad()
def mean_feature(model: Deployed, data: Encoded) -> Tensor:
    """h_p: the mean [D] of what enters the last layer, over all records.

    Raises:
        InputError: the model declares no last layer.
    """
    device = model.require_head().weight.device
    total = torch.stack(
        [
            _sum_features(model({name: value.to(device) for name, value in batch.items()})[1])
            for batch, _ in source_batches(data)
            if isinstance(batch, dict)
        ]
    )
    return total.sum(0) / len(data)


def _sum_features(features: Tensor | None) -> Tensor:
    assert features is not None  # there is a head
    return features.sum(0)


def _detach_features(outputs: Outputs) -> Tensor:
    assert outputs.features is not None  # there is a head
    return outputs.features.detach()


def _logits_of(features: Tensor, head: Layer) -> Tensor:
    return features @ head["weight"].T + head["bias"]
