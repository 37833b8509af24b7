"""Comparators cost nothing: one answer for every record; in a sequence, the head that answers on a frozen model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedpeft.clients.sequence import scale_to_unit
from fedpeft.continual import matrix
from fedpeft.continual.body import only_classes
from fedpeft.data.encode import Encoded
from fedpeft.objectives.base import IGNORE
from fedpeft.run import sequence
from fedpeft.run.world import World
from fedpeft.strategies.sequence.build import head_needs_sums
from fedpeft.strategies.sequence.sequence import find_sequence


def constant(here: World) -> dict[str, Any]:
    """`largest_class`, the accuracy on the server's test set of always giving its most frequent answer, and the answer;
    where clients hold records out, `clients_largest_class`, of each always giving the most frequent one of its own.

    For a language model an answer is a token. Numbers, and several labels of a record, have no most frequent one.
    """
    if here.test_encoded.labels.is_floating_point():
        return {}
    found: dict[str, Any] = {}
    if len(here.test_encoded):
        values, counts = _targets_of(here, here.test_encoded).unique(return_counts=True)
        best = int(counts.argmax())
        base = here.local.model.base
        found = {
            "largest_class": int(counts[best]) / int(counts.sum()),
            "largest_class_name": base.objective.describe_answer(
                int(values[best]), here.test.label_names, base.processor
            ),
        }
    held, privacy = here.local.holdout, here.config.privacy
    # It is made of the clients' labels, which no guarantee covers.
    covered = privacy.unit == "none" or privacy.release_metrics
    if here.config.data.holdout and held and covered:
        each = [_targets_of(here, held[client]).unique(return_counts=True)[1] for client in held]
        right, total = sum(int(counts.max()) for counts in each), sum(int(counts.sum()) for counts in each)
        found["clients_largest_class"] = right / total
    return found


def _targets_of(here: World, data: Encoded) -> Tensor:
    """What a model should say, one after another."""
    parts = [here.local.model.base.objective.targets(block.labels) for block in data.blocks(4096)]
    return torch.cat([part[part != IGNORE] for part in parts])


def frozen_head(here: World) -> dict[str, Any]:
    """In a sequence, the head of the config on the model before training, fitted on the sums of all clients' records
    without noise (a trained classifier as it is at the start): `frozen_head`, its accuracy on all classes after the
    last task, `frozen_head_by_task` on those seen by each, and `frozen_head_forgetting`. Else nothing.
    """
    tasks = find_sequence(here.strategy)
    if tasks is None:
        return {}
    plan, rows = tasks.curriculum, []
    here.local.model.write(here.start.adapter)
    test = [torch.cat(parts) for parts in zip(*here.local.model.features(here.test_encoded), strict=True)]
    labels = test[2].numpy()
    count = [len(plan.of(labels, task)) for task in range(len(plan.groups))]
    made = sequence.new_head(here) if head_needs_sums(here.config) else None
    for task in range(len(plan.groups)):
        seen = plan.seen(task)
        if made is None:
            scores = only_classes(test[1], seen)
        else:
            # Added task by task, as a run does: the frozen features never change, so no sum has to be made twice.
            made.update(_head_sums(here, plan.of(here.train.labels, task)), seen)
            scores = made.scores(_shape_features(here, test[0]), None)
        right = (scores.argmax(-1) == test[2]).numpy()
        rows.append(
            [int(right[plan.of(labels, other)].sum()) if other <= task else 0 for other in range(len(plan.groups))]
        )
    found = matrix.summary(rows, count)["values"]
    return {
        "frozen_head": found["acc_micro"],
        "frozen_head_forgetting": found["forgetting_chaudhry"],
        "frozen_head_by_task": [float(value) for value in matrix.accuracy_curve(rows, count)],
    }


def _head_sums(here: World, numbers: np.ndarray) -> dict[str, Tensor]:
    """The head's sums over those of these records that clients train on."""
    shares, made = here.local.train_data, sequence.new_head(here)
    # Without what clients hold out: a run's head is not fitted on it either.
    own = np.intersect1d(numbers, np.concatenate([share.rows for share in shares.values()]))
    total: dict[str, Tensor] = {}
    for found, _, labels in here.local.model.features(here.train_encoded.view(own)):
        for key, value in made.statistics(_shape_features(here, found), labels).items():
            total[key] = total[key] + value if key in total else value
    return total


def _shape_features(here: World, found: Tensor) -> Tensor:
    """Features as the config's head gets them."""
    return scale_to_unit(found) if here.config.continual.statistics_noise is not None else found
