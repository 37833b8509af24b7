"""ATP: one unsupervised step a batch, with an adaptation rate for every tensor that was learned on labelled batches.

With the source point theta_0, H the mean entropy of a batch and g_i its gradient by tensor i (for the running mean and
variance of a batch norm: running - batch):

    answer:   theta_i = theta_0,i - a_i g_i,  then predict the same batch with theta
    learning: a_i <- a_i + eta <g_i, dCE/dtheta_i at theta> / (1, sqrt(n_i) or n_i)      ("none", "root", "size")

The learning step is the exact gradient of the labelled loss by a_i (n_i entries in tensor i). Rates start at 0 and may
turn negative. `mode` batch starts every batch at theta_0; online at the mean of theta_0 and the last point, with half
the rates. Variances stay positive. Bao, Wei, Wang and He, arXiv 2310.18816.

In a federation the rates are learned by all clients and averaged by the server (`strategy.wrap=[atp]`), and then
`receive` takes them; elsewhere `prepare` learns them on source data. On a batch of one, batch norms stay as they are.
Rates are as good as the batches that they were learned on are like the stream: learned on clean digits they did not
help on strongly corrupted ones in our tests, and an eta above 1e-3 did harm.

Deviations: the variance of a batch is the biased one, as in the batch norms that use it; the authors' is n / (n - 1)
of it, n values a channel (3 % for 32 samples behind a pooling, 0.05 % for 32 pictures of 8 x 8). A variance is kept at
1e-5 or more; theirs at 0.

    >>> import torch
    >>> from fedpeft.tta.method import make
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    >>> method = make("atp", net)
    >>> method.receive({"1.weight": 0.0})
    >>> bool(torch.equal(method.predict(torch.eye(2)), net(torch.eye(2)).softmax(-1)))
    True
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
from fedpeft.tta.deployed import Batch, of_batch
from fedpeft.tta.method import MethodConfig, Outputs, TTAMethod
from fedpeft.tta.parts import scores

LEAST = 1e-5  # of a variance
SCALES = {"none": 0.0, "root": 0.5, "size": 1.0}  # name -> power of n_i
Point = dict[str, Tensor]


@dataclass
class ATPConfig(MethodConfig):
    """Options of `atp`; those named `learn_` are for `prepare`, where eta is `learn_lr`."""

    adapt: Any = option(
        "all",
        "what prepare learns rates for: norm_affine, lora, head, all, or a list of name "
        "patterns; all and norm_affine have the statistics of batch norms too",
    )
    mode: str = option(
        "batch",
        "where a batch starts: batch, at the source model; online, half way to the last one",
        choices=("batch", "online"),
    )
    learn_lr: float = option(1e-3, "eta of prepare", low=0)
    learn_epochs: int = option(1, "passes of prepare over the source data", low=1)
    learn_batch: int = option(32, "batch of prepare", low=1)
    scale: str = option("root", "eta is divided by n_i to the power 0, 1/2 or 1", choices=tuple(SCALES))


class TestTimeATP(TTAMethod):
    """One entropy step a batch with learned rates, one for each tensor."""

    Config: ClassVar[Any] = ATPConfig
    paper = "Bao et al. 2023, arXiv 2310.18816"
    needs_source: str = "labels"
    pairs_with = "atp"

    def holds(self) -> list[str]:
        """Any, where batches do not all start at the source: rates that are received are of tensors of the server's."""
        return list(self.model.slots) if self.config.mode == "online" else []

    def receive(self, rates: dict[str, float]) -> None:
        """Take rates that were learned elsewhere, by tensor name, and start afresh.

        Raises:
            InputError: the model has no such tensor.
        """
        known = {*self.model.slots, *self._statistics()}
        unknown = [name for name in rates if name not in known]
        if unknown:
            raise InputError(f"rates: the model has no tensor {unknown[0]}.")
        self.prepared, self.ready = {"rates": dict(rates)}, True
        self.reset()

    def learn(
        self, rates: dict[str, float], data: Encoded, lr: float, epochs: int, batch: int, scale: str, seed: int
    ) -> dict[str, float]:
        """New rates of the same tensors from passes over labelled data, the model being the source of each batch."""
        rates, start = dict(rates), self._source(rates)
        device = next(iter(start.values())).device
        for epoch in range(epochs):
            order = torch.randperm(len(data), generator=seeds.torch_generator(seed, "atp", epoch))
            for rows in order.split(batch):
                inputs, labels = data.batch(rows.numpy())
                inputs = {name: value.to(device) for name, value in inputs.items()}
                moves, reason = self._moves(inputs, start)
                if reason is not None:
                    continue
                leaves: Point = {
                    name: torch.nn.Parameter(value) for name, value in moved(start, moves, rates, 1.0).items()
                }
                logits = self._at(inputs, leaves, graph=True).logits
                with torch.enable_grad():
                    loss = F.cross_entropy(logits, labels.to(device))
                for name, gradient in self.gradients(loss, leaves).items():
                    size = gradient.numel() ** SCALES[scale]
                    step = float((gradient * moves.get(name, torch.zeros_like(gradient))).sum()) / size
                    # Plus: theta moves by -a g, so the slope of the loss in a is -<g, dCE/dtheta>.
                    rates[name] += lr * step
        return rates

    def _prepare(self, source: Encoded) -> dict[str, Any]:
        config = self.config
        names = self.model.select(config.adapt)
        names += list(self._statistics()) if config.adapt in ("all", "norm_affine") else []
        return {
            "rates": self.learn(
                dict.fromkeys(names, 0.0),
                source,
                config.learn_lr,
                config.learn_epochs,
                config.learn_batch,
                config.scale,
                self.seed,
            )
        }

    def _fresh(self) -> dict[str, Any]:
        return {"point": self._source(self.prepared["rates"])} if self.config.mode == "online" else {}

    def _statistics(self) -> Point:
        """Running means and variances of batch norms by name."""
        return {
            f"{name}.{which}": getattr(norm, which)
            for name, norm in self.model.norms.items()
            for which in ("running_mean", "running_var")
            if norm.running_mean is not None
        }

    def _source(self, rates: dict[str, float]) -> Point:
        """theta_0: the model's own tensors and statistics that have a rate."""
        statistics = self._statistics()
        return {
            name: statistics[name].clone() if name in statistics else self.model.tensor(name).detach().clone()
            for name in rates
        }

    def _at(self, batch: Batch, point: Point, measured: Point | None = None, graph: bool = False) -> Outputs:
        """A forward pass at a point; running - batch of each batch norm goes into `measured`."""

        def statistics(name: str, module: Any, values: Tensor) -> tuple[Tensor, Tensor]:
            if module.running_mean is None:
                return of_batch(values)
            used = [point.get(f"{name}.{which}", getattr(module, which)) for which in ("running_mean", "running_var")]
            if measured is not None and values.numel() > values.shape[1]:
                for which, now, seen in zip(("mean", "var"), used, of_batch(values.detach()), strict=True):
                    measured[f"{name}.running_{which}"] = now.detach() - seen
            return used[0], used[1]

        overlay = {name: value for name, value in point.items() if name in self.model.slots}
        return self.forward(batch, overlay, statistics, graph=graph)

    def _moves(self, batch: Batch, start: Point) -> tuple[Point, str | None]:
        """g of every tensor at `start`, or why there is none."""
        leaves: Point = {name: torch.nn.Parameter(value) for name, value in start.items() if name in self.model.slots}
        measured: Point = {}
        logits = self._at(batch, {**start, **leaves}, measured, graph=True).logits
        with torch.enable_grad():
            loss = scores.entropy(logits).mean()
        found = self.gradients(loss, leaves) if leaves else {}
        found |= {name: value for name, value in measured.items() if name in start}
        bad = [name for name, value in found.items() if not bool(value.isfinite().all())]
        return found, f"the gradient of {bad[0]} is not finite" if bad else None

    def _outputs(self, batch: Batch, learn: bool) -> Outputs:
        rates, share = self.prepared["rates"], 1.0
        start = self._source(rates)
        if self.config.mode == "online":
            start, share = (
                {name: torch.lerp(value, self.memory["point"][name], 0.5) for name, value in start.items()},
                0.5,
            )
        moves, reason = self._moves(batch, start)
        point = start if reason is not None else moved(start, moves, rates, share)
        outputs = self._at(batch, point)
        if not bool(outputs.logits.isfinite().all()):
            reason, point = "the rates lead to predictions that are not finite", start
            outputs = self._at(batch, point)
        outputs.extra = {"point": point, "reason": reason}
        return outputs

    def _update(self, batch: Batch, outputs: Outputs) -> str | None:
        reason: str | None = outputs.extra["reason"]
        if reason is None and self.config.mode == "online":
            self.memory["point"] = outputs.extra["point"]
        return reason


def moved(start: Point, moves: Point, rates: dict[str, float], share: float) -> Point:
    """theta - share a g of every tensor that moves; no variance falls below 1e-5 that was above."""
    point = dict(start)
    for name, move in moves.items():
        value = start[name] - share * rates[name] * move
        point[name] = value.maximum(start[name].clamp(max=LEAST)) if name.endswith(".running_var") else value
    return point
