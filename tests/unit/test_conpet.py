"""ConPET: what replay draws, what a task costs, experts that stay as they are, and a cache that knows whose it is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft.continual import stream as streams
from fedpeft.continual.model import low_rank
from fedpeft.data.encode import Encoded
from support import continual_parts as parts

# chi-squared, 0.999 quantile, by degrees of freedom
CHI2 = {2: 13.82, 3: 16.27}


def known(made) -> dict[bytes, tuple[int, int]]:
    """Each training record's bytes -> its task and class."""
    return {
        row.numpy().tobytes(): (index, int(label))
        for index, task in enumerate(made.stream.tasks)
        for row, label in zip(task.train.inputs["pixel_values"], task.train.labels, strict=True)
    }


def uneven() -> streams.Stream:
    """Four tasks of 8, 16, 40 and 24 records."""
    whole = parts.stream(tasks=4, rows=20)
    sizes = [8, 16, 40, 24]
    tasks = tuple(
        dataclasses.replace(task, train=task.train.view(np.arange(size)))
        for task, size in zip(whole.tasks, sizes, strict=True)
    )
    return dataclasses.replace(whole, tasks=tasks)


def draws(made, task: int, steps: int) -> list[list[tuple[int, int, bytes]]]:
    """(task, class, bytes) of every row of every batch of a task, without training."""
    owner, found = known(made), []
    for index in range(task):
        parts.begin(made, index)
        parts.end(made.body)
    parts.begin(made, task)
    for step in range(steps):
        inputs, labels = made.body.batch(step)
        keys = [row.numpy().tobytes() for row in inputs["pixel_values"]]
        assert [owner[key][1] for key in keys] == labels.tolist(), "labels go with their records"
        found.append([(*owner[key], key) for key in keys])
    return found


@pytest.mark.parametrize("task", [1, 2, 3])
def test_a_batch_is_half_new_and_half_old(task):
    for batch in draws(parts.learner("conpet_static", tasks=4), task, 30):
        assert len(batch) == 8
        assert all(owner == task for owner, _, _ in batch[:4])
        assert all(owner < task for owner, _, _ in batch[4:])
        assert len({key for _, _, key in batch[:4]}) == 4, "new records are drawn without replacement"


def test_the_first_task_is_read_as_usual():
    made = parts.learner("conpet_static", tasks=4)
    rows = [key for batch in draws(made, 0, made.stream.tasks[0].train.labels.numel() // 8) for _, _, key in batch]
    assert len(rows) == len(set(rows)) == 24


def test_old_tasks_are_drawn_evenly_whatever_their_size():
    """Tasks of 8, 16 and 40 records; then the records of each task evenly."""
    made = parts.learner("conpet_static", given=uneven(), tasks=4)
    old = [row for batch in draws(made, 3, 600) for row in batch[4:]]
    counts = Counter(owner for owner, _, _ in old)
    expected = len(old) / 3
    assert sum((counts[owner] - expected) ** 2 / expected for owner in range(3)) < CHI2[2], counts
    for owner, size in enumerate((8, 16, 40)):
        each = Counter(key for task, _, key in old if task == owner)
        assert len(each) == size
        mean = counts[owner] / size
        spread = sum((count - mean) ** 2 / mean for count in each.values())
        assert spread < size - 1 + 4 * (2 * (size - 1)) ** 0.5, owner


def test_later_tasks_cost_the_same_steps_however_many_records():
    made = parts.learner("conpet_static", given=uneven(), tasks=4, options={"batches": 5})
    steps = []
    parts.watch(made, trained=lambda body: steps.append(body.steps())).run()
    assert steps[1] == steps[2] == steps[3] == 5 * made.train.epochs


def test_all_records_are_kept_and_said_to_be():
    made = parts.run("conpet_static", tasks=3)
    for index, task in enumerate(made.stream.tasks):
        kept = made.body.memory["raw"][str(index)]
        assert torch.equal(kept["inputs"]["pixel_values"], task.train.inputs["pixel_values"])
        assert torch.equal(kept["labels"], task.train.labels)
    assert "raw" in made.body.needs


def test_replay_is_what_keeps_the_old_tasks():
    """The same LoRA trained in turn forgets; with half of each batch old it does not."""
    kept = sum(parts.run("conpet_static", epochs=10, lr=1e-2).right["linear"][-1][:2])
    plain = parts.run("sequential", ("masked",), options={"form": "lora"}, epochs=10, lr=1e-2)
    lost = sum(plain.right["masked"][-1][:2])
    assert kept >= lost + 8


# Dynamic --------------------------------------------------------------------------------------------------------------


def experts(body) -> dict[str, Tensor]:
    return {key: value for key, value in body.memory["adapters"].items() if key.startswith("expert/")}


@pytest.mark.parametrize("top", [1, 2])
def test_old_experts_never_change_and_every_task_adds_one(top):
    made = parts.learner("conpet", options={"top": top})
    kept: list[dict[str, Tensor]] = []
    made.run(on_task=lambda task, tasks: kept.append({k: v.clone() for k, v in experts(made.body).items()}))
    for count, (old, new) in enumerate(pairwise(kept), 1):
        assert {key.split("/")[1] for key in old} == {str(index) for index in range(count)}
        assert all(torch.equal(value, new[key]) for key, value in old.items())


@pytest.mark.parametrize("top", [1, 2])
def test_a_prediction_costs_the_selector_and_the_chosen_experts(top):
    made = parts.run("conpet", options={"top": top})
    assert made.ledger[-1]["passes_per_prediction"] <= 1 + 3
    assert made.ledger[-1]["passes_per_prediction"] == pytest.approx(1 + top)


def test_the_prediction_is_one_of_the_selected_experts_classes():
    made = parts.run("conpet", options={"top": 1}, epochs=8)
    scores = made.scores("linear", parts.rows(made.stream))
    usable = scores > scores.amax(-1, keepdim=True) - 50
    for row in usable:
        assert {int(label) // 2 for label in row.nonzero()} == {int(row.nonzero()[0]) // 2}


def expert_logits(made, expert: int, inputs: dict[str, Tensor]) -> Tensor:
    """What an expert says of records, from what is kept of it."""
    body, kept = made.body, made.body.memory["adapters"]
    scale = body.config.alpha / body.config.r
    change = {
        layer: low_rank(kept[f"expert/{expert}/{layer}/B"], kept[f"expert/{expert}/{layer}/A"], scale)
        for layer in made.model.layers
    }
    return made.model.features(inputs, change) @ kept[f"expert/{expert}/weight"].T + kept[f"expert/{expert}/bias"]


def test_cached_logits_are_fresh_ones_under_the_hash_of_their_weights():
    """Three tasks: experts 0 and 1 on the records of tasks 0 to 2; no others, and no other seed's keys."""
    made = parts.run("conpet", options={"top": 2})
    kept = made.body.memory["statistics"]
    names: dict[str, set[str]] = {}
    for key in kept:
        _, name, task = key.split("/")
        names.setdefault(name, set()).add(task)
    assert list(names.values()) == [{"0", "1", "2"}] * 2
    found = set()
    for name in names:
        for expert in (0, 1):
            fresh = [expert_logits(made, expert, task.train.inputs) for task in made.stream.tasks]
            if all(torch.allclose(kept[f"logits/{name}/{task}"], value, atol=1e-4) for task, value in enumerate(fresh)):
                found.add(expert)
    assert found == {0, 1}
    other = parts.run("conpet", options={"top": 2}, seed=1).body.memory["statistics"]
    assert not set(kept) & set(other)


def test_changed_weights_are_not_read_from_the_cache():
    """The repository keys by name and must be wiped by hand; here another expert is another key."""
    made = parts.learner("conpet", options={"top": 2})
    made.run(on_task=lambda task, tasks: made.body.memory["adapters"]["expert/0/bias"].add_(1.0) if task == 2 else None)
    before = {key.split("/")[1] for key in made.body.memory["statistics"]}
    assert len(before) == 3  # expert 0 in task 1, expert 0 as changed, expert 1


def test_a_score_is_the_experts_own_where_it_was_asked(float64):
    made = parts.run("conpet", options={"top": 2})
    inputs = parts.rows(made.stream)
    scores = made.scores("linear", inputs)
    for task in range(3):
        own, mine = expert_logits(made, task, inputs), scores[:, list(made.stream.tasks[task].classes)]
        answered = mine[:, 0] > -99
        assert torch.allclose(mine[answered], own[answered], atol=1e-9)
    assert ((scores > -99).sum(1) == 4).all(), "two experts of two classes each"


def test_everything_kept_is_counted():
    """k (LoRA + head), one selector, the cache N |C_j| for every old expert, all records."""
    made = parts.run("conpet", options={"top": 2})
    stored, r, width = made.body.stored(), made.body.config.r, parts.WIDTH
    lora = 2 * r * (parts.WIDTH + parts.HIDDEN)
    assert stored["adapters"] == 4 * (3 * (lora + 2 * (width + 1)) + lora + 3 * (width + 1))
    assert stored["statistics"] == 4 * 2 * 72 * 2
    assert stored["raw"] == 72 * (4 * parts.INPUTS + 8)


def test_with_one_choice_and_forcing_an_expert_is_trained_on_its_own_task_only():
    """The only selected expert of an old record is its own, which is frozen: replay gives the new expert no gradient,
    so other records in task 0 change expert 0 and no other."""
    plain = parts.stream()
    records = plain.tasks[0].train
    moved = Encoded({"pixel_values": records.inputs["pixel_values"] + 1.0}, records.labels)
    first = dataclasses.replace(plain.tasks[0], train=moved)
    changed = dataclasses.replace(plain, tasks=(first, *plain.tasks[1:]))
    one, two = (experts(parts.run("conpet", options={"top": 1}, given=given).body) for given in (plain, changed))
    assert one.keys() == two.keys()
    assert any(not torch.equal(one[key], two[key]) for key in one if key.startswith("expert/0/"))
    assert all(torch.equal(one[key], two[key]) for key in one if not key.startswith("expert/0/"))


def test_experts_know_their_task():
    """All experts asked and the task told, each answers its own classes nearly always."""
    made = parts.run("conpet", options={"top": 3, "batches": 6}, scenario="task", epochs=12)
    assert min(made.right["linear"][-1]) >= 13  # of 16
