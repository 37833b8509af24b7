"""A linear classifier trained after every task on Gaussian samples of all classes seen: no class is newer than another.

Zhang et al., SLCA, arXiv 2303.05118:

    mu_c, S_c = mean and covariance of the features of class c, kept; no feature is
    f ~ N(mu_c, S_c),   l = W f + b over the seen classes
    loss = CE(l / (tau ||l||_2), c),   tau = 0.1

Statistics are sums (n_c, sum f, sum f f^T for each class), so they add up over owners. Deviations: training starts from
the class means (w_c = mu_c - mean scaled to length 1, b = 0), not from the classifier that was trained beside the body,
so that the head is a function of the sums and the seed; every class has its own noise, whatever else was seen; the norm
is over all seen logits (the authors' code averages norms of each task's); Adam with a decaying rate in place of SGD;
S_c gets a ridge in units of the mean of its diagonal, as a class may have fewer records than features. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fedpeft import seeds
from fedpeft.config import option
from fedpeft.continual.body import Classifier, make_leaf, only_classes
from fedpeft.continual.head import Head

BATCH = 256


class Aligned(Head):
    """Classifier alignment on Gaussian class statistics."""

    paper = "Zhang et al. 2023, SLCA, arXiv 2303.05118"

    @dataclass
    class Config:
        samples: int = option(128, "Gaussian samples a class", low=1)
        epochs: int = option(10, "passes over them", low=1)
        lr: float = option(1e-2, "learning rate of Adam at the start", above=0)
        tau: float = option(0.1, "logits are divided by tau times their norm", above=0)
        ridge: float = option(1e-2, "added to the diagonal of a covariance, in units of its mean", above=0)

    def statistics(self, features: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = features.double()
        one_hot = F.one_hot(labels, self.classes).double()
        gram = torch.zeros(self.classes, self.width, self.width, dtype=torch.float64)
        for label in labels.unique().tolist():
            rows = features[labels == label]
            gram[label] = rows.T @ rows
        return {"count": one_hot.sum(0), "sum": one_hot.T @ features, "gram": gram}

    def gaussian(self, label: int) -> tuple[Tensor, Tensor]:
        """Mean [D] and covariance [D, D] (ridge included) of a class."""
        count = self.sums["count"][label]
        mean = self.sums["sum"][label] / count
        covariance = self.sums["gram"][label] / count - torch.outer(mean, mean)
        # One record has no spread, and a relative ridge of nothing leaves Cholesky nothing.
        scale = covariance.diagonal().mean().clamp(min=1e-12)
        return mean, covariance + self.config.ridge * scale * torch.eye(self.width, dtype=torch.float64)

    def samples(self, label: int) -> Tensor:
        """Gaussian samples [samples, D] of a class: the same ones while its sums are."""
        mean, covariance = self.gaussian(label)
        draw = seeds.torch_generator(self.seed, "aligned", label)
        noise = torch.randn(self.config.samples, self.width, generator=draw, dtype=torch.float64)
        found: Tensor = mean + noise @ torch.linalg.cholesky(covariance).T
        return found

    def solve(self) -> None:
        self.weight = torch.zeros(self.classes, self.width, dtype=torch.float64)
        self.bias = torch.zeros(self.classes, dtype=torch.float64)
        self.known = known = [label for label in self.seen if self.sums["count"][label] > 0]
        means = self.sums["sum"][known] / self.sums["count"][known, None]
        start = F.normalize(means - means.mean(0), dim=1)
        weight, bias = make_leaf(start), make_leaf(torch.zeros(len(known), dtype=torch.float64))
        features = torch.cat([self.samples(label) for label in known])
        labels = torch.arange(len(known)).repeat_interleave(self.config.samples)
        optimizer = torch.optim.Adam([weight, bias], lr=self.config.lr)
        steps = self.config.epochs * -(-len(labels) // BATCH)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 1.0 / steps, steps)
        for epoch in range(self.config.epochs):
            draw = seeds.torch_generator(self.seed, "aligned", "order", epoch)
            for chosen in torch.randperm(len(labels), generator=draw).split(BATCH):
                with torch.enable_grad():
                    logits = features[chosen] @ weight.T + bias
                    norm = logits.norm(dim=1, keepdim=True).clamp(min=1e-7)
                    loss = F.cross_entropy(logits / (self.config.tau * norm), labels[chosen])
                    weight.grad, bias.grad = torch.autograd.grad(loss, [weight, bias])
                optimizer.step()
                schedule.step()
        self.weight[known], self.bias[known] = weight.detach(), bias.detach()

    def scores(self, features: Tensor, classifier: Classifier | None) -> Tensor:
        return only_classes(features.double() @ self.weight.T + self.bias, self.known)
