"""LoKU: an inverted hinge loss, and a LoRA that starts from what the forgotten records weigh most (FILA).

Cha, Cho, Hwang and Lee, "Towards Robust and Parameter-Efficient Knowledge Unlearning for LLMs", arXiv 2408.06621.
Over the run's model, with its adapter merged into W:

    F = mean over records of (d loss / d W)^2, of records to forget and of others to keep
    ratio = F_forget / (F_retain + 1e-5),   d_i = sqrt(sum_j ratio_ij)            one number for each output
    U S V^T = diag(d) W, the largest r,     B = diag(1 / (d + 1e-5)) U sqrt(S / s),   A = sqrt(S / s) V^T
    train A, B (and the head, where the run trained one) over the frozen W - s B A on
    mean of [1 + p(right) - max over others of p]_+  of a batch to forget  +  weight x mean loss of a batch to keep

Gradient ascent has no end, and spreads over all wrong answers; this loss is at most 2, and raises the one that is next.
Of a text the loss is the mean over its tokens. With records that the clients concerned have held out (data.holdout),
training ends as soon as the mean loss on what is to be forgotten is no lower than theirs, which is looked at four times
a pass: the paper ends likewise, by its measures of memorisation. Without any, and of a task, it takes all passes.

Deviations: F is of single records' gradients, where the authors' code squares those of batches; it is taken of at most
`fisher_records` of each kind, in evaluation mode. The result is the change of W over the run's base, of three times
the rank: run - start + end, which stock peft loads; theirs is a changed base beside a LoRA.

    >>> import torch
    >>> scores = torch.tensor([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    >>> [round(loss, 2) for loss in inverted_hinge(scores, torch.tensor([0, 0])).tolist()]
    [1.95, 0.05]
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedpeft import progress
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.optimizers.base import make_layout, make_optimizer, settle
from fedpeft.clients.train import index_batches, on_device, per_sample_loss, set_gradients
from fedpeft.config import ClientConfig, option
from fedpeft.data.encode import Encoded
from fedpeft.merging.arithmetic import combine
from fedpeft.models.base import orient
from fedpeft.objectives.base import IGNORE
from fedpeft.seeds import derive, numpy_generator
from fedpeft.state import AdapterState
from fedpeft.unlearning.method import Case, Outcome, UnlearningMethod

SMALL = 1e-5  # added to what divides, as in the authors' code
GENTLE = 10  # the run's rate is for factors that start at zero, and FILA's are as large as the weights
LOOKS = 4  # a pass, at whether enough is forgotten


@dataclass
class LoKUConfig:
    """Options of `loku`."""

    epochs: int = option(20, "passes over what is to be forgotten, at most", low=1)
    lr: float | None = option(None, "learning rate; null is a tenth of the run's client.lr", above=0)
    batch_size: int | None = option(None, "records of each kind in a step; null is the run's client.batch_size", low=1)
    retain_weight: float = option(1.0, "weight of the loss on records to keep", low=0)
    fila: bool = option(True, "start the LoRA from the Fisher ratios; else from a fresh draw")
    fisher_records: int = option(256, "records of each kind, at most, that the Fisher information is taken of", low=1)


class LoKU(UnlearningMethod):
    """A LoRA that starts where the forgotten records weigh most, on an inverted hinge loss."""

    Config: ClassVar[Any] = LoKUConfig
    paper = "Cha et al. 2024, arXiv 2408.06621"
    needs_classes = True

    def unlearn(self, case: Case, folder: Path) -> Outcome:
        case.write(case.adapter)
        fisher = 0
        start = case.started({})
        if self.config.fila:
            kinds = [
                draw_some(data, self.config.fisher_records, case.config.run.seed, name)
                for name, data in (("forget", case.forget), ("retain", case.retain))
            ]
            fisher = sum(map(len, kinds))
            start = self.find_start(case, *(fisher_information(case.model, data) for data in kinds))
        case.write(case.adapter, start)
        steps, passes, early = self.train(case, start)
        end = case.model.read(start)
        why = "as what is to be forgotten is no better known than what the clients concerned held out"
        notes = (f"training ended after {steps} steps, {why}",) if early else ()
        adapter = combine([(1.0, case.adapter), (-1.0, start), (1.0, end)])
        return Outcome(adapter, steps, passes + fisher, notes)

    def find_start(self, case: Case, forget: dict[str, Tensor], retain: dict[str, Tensor]) -> AdapterState:
        """The factors of every layer by `fila`, of the model's weights as they are."""
        model = case.model
        factors: dict[str, Tensor] = {}
        for site, value in forget.items():
            B, A = split_fila(
                model.base.weight(site).cpu(),
                value,
                retain[site],
                model.parameters[f"{site}/A"].shape[0],
                model.sites[site].scaling,
            )
            factors |= {f"{site}/A": A.float(), f"{site}/B": B.float()}
        return case.started(factors)

    def train(self, case: Case, start: AdapterState) -> tuple[int, int, bool]:
        """Steps, records that were passed, and whether it ended early."""
        model, client = case.model, self._client(case.config.client)
        parameters = model.train_roles({start.role(key) for key in start.tensors})
        device = next(iter(parameters.values())).device
        optimizer = make_optimizer(list(parameters.values()), client, make_layout(model, parameters, model.parameters))
        begun = {key: value.detach().clone() for key, value in parameters.items()}
        rng = numpy_generator(case.config.run.seed, "unlearn", "batches")
        keep = endless(len(case.retain), rng)
        pieces = list(
            index_batches(len(case.forget), replace(client, local_steps=None, local_epochs=self.config.epochs), rng)
        )
        looks = max(1, len(pieces) // (LOOKS * self.config.epochs))
        passes = 0
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(derive(case.config.run.seed, "unlearn", "dropout"))
            for number, mine in enumerate(pieces, 1):
                # At each step: the look at what is forgotten leaves the model evaluating.
                model.training_mode()
                loss = hinge_of(model, *on_device(case.forget, mine, device)).mean()
                passes += len(mine)
                if self.config.retain_weight:
                    others = np.array([next(keep) for _ in mine])
                    kept = per_sample_loss(model, *on_device(case.retain, others, device)).mean()
                    loss, passes = loss + self.config.retain_weight * kept, passes + len(others)
                values = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True, allow_unused=True)
                set_gradients(parameters, dict(zip(parameters, values, strict=True)), begun, client, 0.0, None)
                optimizer.step()
                progress.step("rounds", number, len(pieces))
                if number % looks == 0 and case.is_forgotten():
                    break
            settle(optimizer)
        model.base.backbone.eval()
        return number, passes, number < len(pieces)

    def _client(self, client: ClientConfig) -> ClientConfig:
        size = self.config.batch_size or client.batch_size
        return replace(client, lr=self.config.lr or client.lr / GENTLE, batch_size=size)


def inverted_hinge(scores: Tensor, targets: Tensor) -> Tensor:
    """[1 + p(target) - the largest other p]_+ of each record [N], of a text the mean over its targets.

    Args:
        scores: [N, K] or [N, T, K].
        targets: [N] or [N, T], IGNORE where there is none.
    """
    chances, known = scores.softmax(-1), targets != IGNORE
    place = targets.clamp(min=0)[..., None]
    right = chances.gather(-1, place)[..., 0]
    next_best = chances.scatter(-1, place, -1.0).amax(-1)
    each = (1 + right - next_best).clamp(min=0) * known
    return each if each.ndim == 1 else each.sum(1) / known.sum(1).clamp(min=1)


def hinge_of(model: Adapted, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The inverted hinge loss [N] of records."""
    return inverted_hinge(*model.base.objective.pair(model.logits(inputs).float(), labels))


def split_fila(weight: Tensor, forget: Tensor, retain: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The factors B [out, r] and A [r, in] that a weight [out, in] is best kept in, where `forget` outweighs `retain`.

    s B A is the best approximation of the weight of this rank, its rows weighted by d. float64.

    Args:
        forget, retain: Fisher information of the weight [out, in].
        scaling: s.
    """
    d = (forget.double() / (retain.double() + SMALL)).sum(1).sqrt()
    U, S, Vt = torch.linalg.svd(d[:, None] * weight.double(), full_matrices=False)
    root = (S[:rank] / scaling).sqrt()
    B, A = U[:, :rank] * root / (d + SMALL)[:, None], root[:, None] * Vt[:rank]
    lacking = rank - len(root)  # a weight with fewer rows, or columns, than the rank
    return torch.cat([B, B.new_zeros(len(B), lacking)], 1), torch.cat([A, A.new_zeros(lacking, A.shape[1])])


def fisher_information(model: Adapted, data: Encoded) -> dict[str, Tensor]:
    """Mean over records of the squared gradient of a record's loss by each adapted weight [out, in], on the CPU."""
    sites = model.form.lora_sites()
    layers = {site: model.base.layer(site) for site in sites}
    weights = [layer.get_parameter("weight") for layer in layers.values()]
    total = {site: torch.zeros(model.base.shape(site), dtype=torch.float64) for site in sites}
    model.base.backbone.eval()
    model.train_roles(())
    for weight in weights:
        weight.requires_grad_(True)
    try:
        for number in range(len(data)):
            loss = per_sample_loss(model, *on_device(data, np.array([number]), weights[0].device)).sum()
            for (site, layer), slope in zip(layers.items(), torch.autograd.grad(loss, weights), strict=True):
                total[site] += orient(layer, slope).double().square().cpu()
            progress.step("records", number + 1, len(data))
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {site: value / len(data) for site, value in total.items()}


def draw_some(data: Encoded, most: int, seed: int, name: str) -> Encoded:
    """At most so many of the records, drawn."""
    if len(data) <= most:
        return data
    return data.view(np.sort(numpy_generator(seed, "unlearn", name).permutation(len(data))[:most]))


def endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    """Numbers below `count` in shuffled passes, without end."""
    while True:
        yield from rng.permutation(count).tolist()
