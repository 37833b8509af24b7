"""The local step loop: what a client does with an adapter, its data and its task.

    for each step:  g = gradient of the mean per-sample loss  [+ mu (theta - theta_0)]  [+ c - c_k]
                    optimizer step (a new optimizer every round)

FedProx (Li et al., arXiv 1812.06127) adds the proximal term, SCAFFOLD (Karimireddy et al., arXiv 1910.06378) the
control variates, whose new value is its option II: c_k+ = c_k - c + (theta_0 - theta) / (steps lr).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded

CONTROL = "control:"


def train(model: Adapted, data: Encoded, trains: list[str], config: ClientConfig, seed: int, *, prox_mu: float = 0.0,
          control: dict[str, Tensor] | None = None) -> tuple[int, float]:
    """Train the parameters of these roles in place.

    Args:
        seed: of the batches and of dropout; two calls with one seed do the same.
        prox_mu: weight of the proximal term around the values at the start.
        control: c - c_k by parameter name, added to every gradient.

    Returns:
        Steps taken and mean loss.
    """
    parameters = model.train_roles(trains)
    device = next(iter(parameters.values())).device
    start = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = make_optimizer(list(parameters.values()), config)
    losses = []
    model.training_mode()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "dropout"))
        for index in batches(len(data), config, seeds.numpy_generator(seed, "batches")):
            loss = per_sample_loss(model, data, index, device)[0].mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for key, parameter in parameters.items():
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                if prox_mu:
                    gradient = gradient + prox_mu * (parameter.detach() - start[key])
                if control is not None:
                    gradient = gradient + _padded(control[key], parameter)
                parameter.grad = gradient
            if config.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
    model.base.backbone.eval()
    return len(losses), float(torch.stack(losses).mean())


def batches(count: int, config: ClientConfig, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Index batches of shuffled passes over `count` examples: `local_epochs` of them, or what `local_steps` need."""
    size = min(config.batch_size, count)
    per_epoch = -(-count // size)
    steps = config.local_steps or per_epoch * (config.local_epochs or 1)
    while steps > 0:
        order = rng.permutation(count)
        for start in range(0, count, size):
            if steps == 0:
                return
            yield order[start : start + size]
            steps -= 1


def make_optimizer(parameters: list[nn.Parameter], config: ClientConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def per_sample_loss(
    model: Adapted, data: Encoded, index: np.ndarray, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], correct predictions [N] and predictions made [N] of each sample.

    A text's loss is the mean over its own tokens: a mean over the batch's tokens would couple the samples.
    """
    inputs, labels = data.batch(index)
    logits = model.logits({key: value.to(device) for key, value in inputs.items()}).float()
    labels = labels.to(device)
    if model.base.task == "causal-lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
        count = (labels != -100).sum(1)
        return losses.sum(1) / count.clamp(min=1), ((logits.argmax(-1) == labels) & (labels != -100)).sum(1), count
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses, logits.argmax(-1) == labels, torch.ones_like(labels)


@torch.no_grad()
def evaluate(model: Adapted, data: Encoded, batch_size: int = 256) -> dict[str, float]:
    """Accuracy and mean loss; for causal-lm the accuracy is that of the next token."""
    device = next(iter(model.parameters.values())).device
    model.base.backbone.eval()
    loss, correct, count = 0.0, 0, 0
    for start in range(0, len(data), batch_size):
        index = np.arange(start, min(start + batch_size, len(data)))
        losses, right, made = per_sample_loss(model, data, index, device)
        loss, correct, count = loss + float(losses.double().sum()), correct + int(right.sum()), count + int(made.sum())
    return {"accuracy": correct / max(count, 1), "loss": loss / len(data), "num-examples": len(data)}


def _padded(value: Tensor, like: Tensor) -> Tensor:
    if value.shape == like.shape:
        return value.to(like.device)
    full = torch.zeros_like(like)
    full[tuple(map(slice, value.shape))] = value.to(like.device)
    return full


def new_control(
    old: dict[str, Tensor],
    server: dict[str, Tensor],
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    steps: int,
    lr: float,
) -> dict[str, Any]:
    """SCAFFOLD's option II: c_k - c + (theta_0 - theta) / (steps lr)."""
    return {key: old[key] - server[key] + (before[key] - after[key]) / (steps * lr) for key in server}
