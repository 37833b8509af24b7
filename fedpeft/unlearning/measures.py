"""What a model still knows of what it should have forgotten, and how near it is to one that never saw it.

The attack is the plain one of the loss (Yeom et al., arXiv 1709.01604): records to be forgotten are told from test
records by their lower loss. Test records count by class as the forgotten ones do, so that a client's own mix of classes
tells nothing. AUC .5, and an advantage (largest difference of the rates of right and false alarms) of 0, is not to be
told apart; below .5 the forgotten records stand out by a higher loss. An advantage over few records is above 0 by
chance: the retrained model's, on the same records, is what to compare with.

The audit of DP (`fedpeft.privacy.audit`) bounds epsilon by canaries that a fair coin puts in, which these records are
not: they were all in. So it says nothing here, and is not used.

    >>> membership_attack(np.array([0.1, 0.3]), np.array([0.2, 0.4]), np.ones(2))
    (0.75, 0.5)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedpeft import lowrank
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import on_device
from fedpeft.data.encode import Encoded
from fedpeft.data.ragged import cut_runs
from fedpeft.merging.arithmetic import combine
from fedpeft.objectives.base import IGNORE
from fedpeft.objectives.measures import Tally
from fedpeft.state import AdapterState
from fedpeft.unlearning.method import Case

RECORDS = 256  # of a pass


@dataclass(frozen=True)
class Seen:
    """A model's answers to records: what is measured of them, losses [N], and the classes it names, [targets]."""

    measured: dict[str, float]
    losses: np.ndarray
    answers: np.ndarray

    def numbers(self) -> dict[str, float]:
        """Accuracy, where there is one, and mean loss."""
        return {key: self.measured[key] for key in ("accuracy", "loss") if key in self.measured}


@dataclass(frozen=True)
class Knowledge:
    """A model looked at: its adapter, and its answers to each kind of records."""

    adapter: AdapterState
    forget: Seen
    retain: Seen
    test: Seen
    others: Seen


@torch.no_grad()
def look(model: Adapted, data: Encoded, tokens: int) -> Seen:
    """Answers to all records that have something to predict."""
    device = next(iter(model.parameters.values())).device
    objective, teaching = model.base.objective, data.teaching()
    tally, losses, answers = Tally(objective), [], []
    model.base.backbone.eval()
    order = list(cut_runs(data.lengths[teaching], RECORDS, tokens))
    for places in order:
        inputs, labels = on_device(data, teaching[places], device)
        scores, targets = objective.pair(model.logits(inputs).float(), labels)
        tally.add(scores, targets)
        losses.append(objective.losses(scores, targets).double().cpu())
        if not targets.is_floating_point() and scores.ndim == targets.ndim + 1:
            answers.append(scores.argmax(-1)[targets != IGNORE].cpu())
    # A text without a token to predict has no loss, and takes no part in the attack.
    found = np.full(len(data), np.nan)
    found[teaching[np.concatenate(order)]] = torch.cat(losses).numpy()
    return Seen(tally.metrics(), found, torch.cat(answers).numpy() if answers else np.empty(0))


def know(case: Case, adapter: AdapterState) -> Knowledge:
    """Look at a model; all classes compete, a forgotten task's too."""
    case.write(adapter)
    tokens = case.config.run.evaluate_tokens
    kinds = (case.forget, case.retain, case.test, case.world.test_encoded)
    return Knowledge(adapter, *(look(case.model, data, tokens) for data in kinds))


def describe(case: Case, known: Knowledge, retrained: Knowledge | None) -> dict[str, float | None]:
    """A row of the table: forget quality, what is kept, and how near the retrained model is."""
    auc, advantage = membership_attack(known.forget.losses, known.others.losses, weights_of_test(case))
    row: dict[str, float | None] = {"attack_auc": auc, "attack_advantage": advantage}
    for kind in ("forget", "retain", "test"):
        row |= {f"{kind}_{key}": value for key, value in getattr(known, kind).numbers().items()}
    row |= {"distance": None, "head_distance": None, "agreement": None}
    if retrained is not None:
        one, other = known.test.answers, retrained.test.answers
        row["distance"] = distance_of(known.adapter, retrained.adapter)
        row["head_distance"] = head_distance(known.adapter, retrained.adapter)
        row["agreement"] = float((one == other).mean()) if len(one) else None
    return row


def weights_of_test(case: Case) -> np.ndarray:
    """What each test record counts for, so that their classes are mixed as those to be forgotten."""
    world, many = case.world, len(case.world.train.label_names)
    mine = np.bincount(world.train.labels[case.forget.rows], minlength=many)
    theirs = np.bincount(world.test.labels, minlength=many)
    each = mine / np.maximum(theirs, 1)
    return np.asarray(each[world.test.labels])


def membership_attack(members: np.ndarray, others: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """AUC and advantage of telling members from others by a lower loss; NaN where there is nobody to tell from.

    Args:
        weights: what each of the others counts for.
    """
    # A test record of a class that none to be forgotten has would be told apart by its class.
    known = ~np.isnan(others) & (weights > 0)
    others, weights, members = others[known], weights[known], np.sort(members[~np.isnan(members)])
    if not len(others) or not len(members):
        return np.nan, np.nan
    weights = weights / weights.sum()
    lower, upto = (np.searchsorted(members, others, side=side) / len(members) for side in ("left", "right"))
    auc = float((weights * (lower + upto) / 2).sum())
    cuts = np.unique(np.concatenate([members, others]))
    order = np.argsort(others, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(weights[order])])
    false = below[np.searchsorted(others[order], cuts, side="right")]
    true = np.searchsorted(members, cuts, side="right") / len(members)
    return auc, float(max(0.0, (true - false).max()))


def distance_of(one: AdapterState, other: AdapterState) -> float:
    """||change of one - change of the other|| / ||change of the other||, over all adapted weights together."""
    apart, size = combine([(1.0, one), (-1.0, other)]), 0.0
    far = 0.0
    for site in other.lora_sites():
        far += _squared_norm(apart, site)
        size += _squared_norm(other, site)
    return (far / size) ** 0.5 if size else float("inf") if far else 0.0


def head_distance(one: AdapterState, other: AdapterState) -> float | None:
    """The same of the trained heads; None where there is none."""
    heads = [key for key in other.tensors if other.role(key) == "head"]
    size = sum(float(other[key].double().square().sum()) for key in heads)
    far = sum(float((one[key].double() - other[key].double()).square().sum()) for key in heads)
    return (far / size) ** 0.5 if size else None


def _squared_norm(adapter: AdapterState, site: str) -> float:
    _, values, _ = lowrank.svd(adapter[f"{site}/B"], adapter[f"{site}/A"])
    return float(values.square().sum()) * adapter.sites[site].scaling ** 2
