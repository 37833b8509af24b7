"""The neighbours: penalties that vanish where they should, a fair reservoir, and heads against their textbook form."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.continual.learner import Learner
from support import continual_parts as parts

LAYER = "blocks.0.fc2"
LAYERS = (LAYER, "blocks.1.fc2")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(made: Learner) -> list[float]:
    """Per task, how far the features of the test inputs moved."""
    found, before = [], [parts.seen_by(made)[0]]

    def after(task: int, tasks: int) -> None:
        now = parts.seen_by(made)[0]
        found.append(float((now - before[-1]).norm()))
        before.append(now)

    made.run(on_task=after)
    return found


def same_as_plain(body: str, options: dict[str, Any]) -> bool:
    """Whether a body's features are those of plain fine-tuning in either form."""
    mine = parts.seen_by(parts.run(body, options=options))[0]
    plain = [parts.seen_by(parts.run("sequential", options={"form": form}))[0] for form in ("full", "lora")]
    return any(torch.allclose(mine, one, atol=1e-6) for one in plain)


# Penalties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["ewc", "lwf"])
def test_a_penalty_of_no_weight_is_plain_fine_tuning(body):
    weight = "lam"
    assert same_as_plain(body, {weight: 1e-30})
    assert not same_as_plain(body, {weight: 10.0})


def test_a_huge_ewc_weight_holds_the_body_where_the_first_task_left_it():
    """Adam divides by the gradient's size, so what stays is a step or two to and fro."""
    free, held = (
        moved(parts.learner("ewc", options={"lam": 1e-30}, epochs=6, lr=1e-3)),
        moved(parts.learner("ewc", options={"lam": 1e6}, epochs=6, lr=1e-3)),
    )
    assert free[0] == pytest.approx(held[0], rel=1e-5)
    assert held[1] < 0.35 * free[1] and held[2] < 0.35 * free[2]


def test_ewc_is_monotone_in_its_weight_over_usable_sizes():
    """Normalised importance: the same weights mean the same on any model, and act between 1 and 1000."""
    steps = [moved(parts.learner("ewc", options={"lam": lam}, epochs=6, lr=1e-3))[2] for lam in (1e-3, 1e2, 1e5)]
    assert steps[0] > 1.1 * steps[1] > 1.2 * steps[2]


def test_ewc_importance_is_normalised_and_knows_what_matters():
    made = parts.run("ewc", tasks=2)  # importance of two tasks, each of mean 1
    fisher = {key: value for key, value in made.body.memory["statistics"].items() if key.endswith("/F")}
    assert fisher.keys() == {f"{key}/F" for key in made.body.parameters}
    assert all((value >= 0).all() and value.isfinite().all() for value in fisher.values())
    whole = torch.cat([value.flatten() for value in fisher.values()])
    assert whole.std() > 0.1 * whole.mean()
    assert float(whole.mean()) == pytest.approx(2.0, rel=1e-3)


def test_ewc_pays_nothing_at_its_anchor_and_the_square_away_from_it():
    made = parts.run("ewc", tasks=2, options={"lam": 2.0})
    body = made.body
    inputs, labels = body.batch(0)
    features = made.model.features(inputs, body.change())
    for key, value in body.parameters.items():
        value.data = body.memory["adapters"][f"{key}/anchor"].clone()
    assert body.penalty(inputs, labels, features, made.classifier).item() == 0
    expected = 0.0
    for key, value in body.parameters.items():
        shift = draw(*value.shape, seed=1)
        value.data = value.data + shift
        expected += float((body.memory["statistics"][f"{key}/F"] * shift**2).sum())
    found = body.penalty(inputs, labels, features, made.classifier).item()
    assert found == pytest.approx(expected, rel=1e-4)  # lam / 2 = 1


def test_lwf_keeps_the_old_answers_on_new_records():
    """How far the first task's logits on the second task's records drift while it is learned."""

    def drift(lam: float) -> float:
        made = parts.learner("lwf", options={"lam": lam}, epochs=8, tasks=2, lr=1e-2)
        inputs = made.stream.tasks[1].train.inputs
        seen = []

        def answers(task: int, tasks: int) -> None:
            with torch.no_grad():
                features = made.model.features(inputs, made.body.views()["online"])
                seen.append(made.classifier(features)[:, [0, 1]].softmax(-1))

        made.run(on_task=answers)
        return float((seen[1] - seen[0]).abs().mean())

    assert drift(10.0) < 0.5 * drift(1e-30)


@pytest.mark.parametrize("body", ["olora", "owlora"])
def test_an_orthogonality_penalty_is_zero_just_where_rows_are_orthogonal(body):
    made = parts.run(body, tasks=2)
    given = made.body
    inputs, labels = given.batch(0)
    features = made.model.features(inputs, given.change()).detach()

    def penalty() -> float:
        found = given.penalty(inputs, labels, features, made.classifier)
        return 0.0 if found is None else float(found.detach())

    # Two tasks are over: the past holds what was current, or the first only while the second is still current.
    past = {
        layer: [
            value
            for key, value in given.memory["adapters"].items()
            if key.startswith("past/") and key.endswith(f"/{layer}/A")
        ]
        for layer in LAYERS
    }
    assert all(past.values())
    assert penalty() > 0
    for layer, own in ((layer, given.parameters[f"{layer}/A"]) for layer in LAYERS):
        basis = torch.linalg.qr(torch.cat(past[layer]).T)[0]
        if basis.shape[1] < parts.HIDDEN:
            clean = draw(*own.shape) - draw(*own.shape) @ basis @ basis.T
            own.data = clean.to(own.dtype)
        else:
            own.data = torch.zeros_like(own)
    rest = penalty()
    assert rest == pytest.approx(0.0, abs=1e-4)
    for layer in LAYERS:
        given.parameters[f"{layer}/A"].data = past[layer][0][: given.parameters[f"{layer}/A"].shape[0]].clone()
    assert penalty() > 100 * max(rest, 1e-6)


# Subspaces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", ["olora", "owlora", "sdlora", "inflora"])
def test_the_adapters_of_old_tasks_stay_bit_for_bit(body):
    kept: list[dict[str, Tensor]] = []
    made = parts.learner(body)
    made.run(
        on_task=lambda task, tasks: kept.append(
            {
                key: value.clone()
                for key, value in made.body.memory["adapters"].items()
                if key.startswith("past/") and key.endswith(("/A", "/B"))
            }
        )
    )
    assert kept[-1]
    for old, new in ((kept[0], kept[1]), (kept[1], kept[2])):
        assert len(new) > len(old)
        assert all(torch.equal(value, new[key]) for key, value in old.items())


def test_inflora_trains_outside_the_inputs_of_old_tasks(float64):
    """A of a new task is orthogonal to the basis of old inputs, and stays fixed; so dW x = 0 for x in it."""
    checked = []
    starts: dict[str, Tensor] = {}

    def begun(body):
        for layer in LAYERS:
            M = body.memory["bases"].get(f"{layer}/M")
            A = body.parameters.get(f"{layer}/A")
            A = starts[layer] = (body.memory["adapters"].get(f"{layer}/A") if A is None else A).detach().clone()
            if M is not None and 0 < M.shape[1] < parts.HIDDEN:
                assert M.shape[0] == parts.HIDDEN
                assert (M.T @ M - torch.eye(M.shape[1])).abs().max() < 1e-8
                assert (A @ M).norm() <= 1e-8 * max(float(A.norm()), 1e-12)
                checked.append(layer)

    def trained(body):
        for layer in LAYERS:
            A = body.parameters.get(f"{layer}/A", body.memory["adapters"].get(f"{layer}/A"))
            assert torch.equal(A.detach(), starts[layer]), "A is fixed within a task"

    parts.watch(parts.learner("inflora", options={"r": 2}, tasks=3), begun, trained=trained).run()
    assert len(checked) >= 2


def test_inflora_leaves_the_responses_of_the_layer_to_old_inputs(float64):
    """Old inputs of rank three are all in the basis: what the layer adds to them is bit-near the same after a task."""
    made = parts.learner("inflora", options={"r": 2}, tasks=2)
    flat = draw(3, parts.INPUTS)
    body = made.body
    seen = {}

    def begun(given):
        if given.index == 1:
            for layer in LAYERS:
                M = given.memory["bases"][f"{layer}/M"]
                x = draw(5, M.shape[1], seed=2) @ M.T
                seen[layer] = (x, given.change()[layer](x, torch.zeros(5, parts.WIDTH)).detach())

    def trained(given):
        if given.index == 1:
            for layer, (x, before) in seen.items():
                after = given.change()[layer](x, torch.zeros(5, parts.WIDTH)).detach()
                assert (after - before).norm() <= 1e-8 * max(1.0, float(before.norm()))
                other = draw(5, parts.HIDDEN, seed=3)
                assert given.change()[layer](other, torch.zeros(5, parts.WIDTH)).norm() > 1e-4

    parts.watch(made, begun, trained=trained).run()
    assert len(seen) == 2 and flat.shape[0] == 3 and body.index == 1


def test_sdlora_with_all_weight_on_one_direction_is_that_tasks_adapter(float64):
    """Magnitudes one-hot, the current pair zero: the layer adds what one old direction, of unit norm, gives."""
    body = parts.run("sdlora", tasks=3).body
    x = draw(4, parts.HIDDEN).double()
    for layer in LAYERS:
        body.parameters[f"{layer}/B"].data.zero_()
        magnitudes = body.parameters[f"{layer}/magnitudes"]
        assert magnitudes.shape == (2,) and (magnitudes != 0).all()
        for task in range(2):
            magnitudes.data = torch.eye(2)[task] * 3.0
            B, A = (body.memory["adapters"][f"past/{task}/{layer}/{role}"].double() for role in "BA")
            assert float((B @ A).norm()) == pytest.approx(1.0)
            found = body.change()[layer](x, torch.zeros(4, parts.WIDTH))
            assert torch.allclose(found, 3 * x @ (B @ A).T, atol=1e-9)


def test_sdlora_starts_a_task_where_the_last_one_ended(float64):
    """The magnitude of what was just learned is its norm, so that making it a direction changes nothing."""
    made, seen = parts.learner("sdlora"), []
    parts.watch(
        made, lambda body: seen.append(parts.seen_by(made)[0]), trained=lambda body: seen.append(parts.seen_by(made)[0])
    ).run()
    for ended, started in ((1, 2), (3, 4)):
        assert torch.allclose(seen[ended], seen[started], atol=1e-8)


# Replay --------------------------------------------------------------------------------------------------------------


def held(body) -> list[bytes]:
    """The bytes of every kept record."""
    found: list[bytes] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            if "pixel_values" in value:
                found.extend(row.numpy().tobytes() for row in value["pixel_values"])
            else:
                for item in value.values():
                    collect(item)

    collect(body.memory["raw"])
    return found


def test_the_reservoir_keeps_each_record_of_the_past_with_the_same_chance():
    given = parts.stream(tasks=3, rows=10)
    options = registry.load("bodies", "er").Config.__dataclass_fields__
    capacity = next(name for name in ("capacity", "size", "memory", "buffer") if name in options)
    counts: Counter[bytes] = Counter()
    runs, kept = 400, 12
    for seed in range(runs):
        made = parts.learner("er", given=given, options={capacity: kept}, seed=seed)
        for index in range(len(given.tasks)):
            parts.begin(made, index)
            parts.end(made.body)
        rows = held(made.body)
        assert len(rows) == len(set(rows)) == kept
        counts.update(rows)
    everyone = [row.numpy().tobytes() for task in given.tasks for row in task.train.inputs["pixel_values"]]
    assert set(counts) <= set(everyone) and len(everyone) == 60
    expected = runs * kept / 60
    spread = sum((counts[row] - expected) ** 2 for row in everyone) / (expected * (1 - kept / 60))
    assert spread < 98.3, "chi-squared, 59 degrees of freedom, 0.999"
    assert spread > 29.6, "0.001: evener than chance can be"


def test_replay_keeps_old_tasks_and_joint_training_more():
    """Right answers of 32 on the first two tasks after the third."""
    found = {
        body: sum(parts.run(body, heads, epochs=10, lr=1e-2).right[heads[0]][-1][:2])
        for body, heads in (("er", ("linear",)), ("joint", ("linear",)), ("sequential", ("masked",)))
    }
    assert found["er"] >= found["sequential"] + 8
    assert found["joint"] >= max(found["er"] - 2, 28)


def test_joint_training_sees_every_record_so_far():
    made = parts.learner("joint")
    seen: set[bytes] = set()
    body = made.body

    def begun(given):
        seen.clear()
        for step in range(given.steps()):
            seen.update(row.numpy().tobytes() for row in given.batch(step)[0]["pixel_values"])

    parts.watch(made, begun).run()
    everyone = {row.numpy().tobytes() for task in made.stream.tasks for row in task.train.inputs["pixel_values"]}
    assert body.index == 2 and seen == everyone


# CLASSP --------------------------------------------------------------------------------------------------------------


def test_classp_with_power_two_and_no_threshold_is_adagrad(float64):
    """w -= lr g / sqrt(a + eps), a the running sum of squares; it goes on over tasks."""
    body = parts.begun("classp", {"threshold": 0.0, "power": 2, "eps": 1e-12}, lr=0.05)
    key = next(iter(body.parameters))
    start = body.parameters[key].detach().clone()
    value = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adagrad([value], lr=0.05, eps=0)
    for step in range(10):
        if step == 5:
            parts.end(body)
            parts.begin(body, 1, parts.stream())
        G = draw(*value.shape, seed=step).double()
        parts.drive(body, {key: G}, step)
        value.grad = G
        optimizer.step()
    assert torch.allclose(body.parameters[key], value, atol=1e-9)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 2.0])
def test_classp_touches_the_weights_above_its_threshold_and_no_other(threshold, power, float64):
    body = parts.begun("classp", {"threshold": threshold, "power": power}, lr=0.05)
    for step in range(4):
        before = {key: value.detach().clone() for key, value in body.parameters.items()}
        gradients = {key: draw(*value.shape, seed=step).double() for key, value in body.parameters.items()}
        parts.drive(body, gradients, step)
        for key, value in body.parameters.items():
            assert torch.equal(value != before[key], gradients[key] ** 2 > threshold)


def test_classp_steps_are_those_of_its_equation(float64):
    """a += |g|^p; w -= lr g / (a + eps)^(1/p), p = 1."""
    body = parts.begun("classp", {"threshold": 0.5, "power": 1, "eps": 1e-5}, lr=0.2)
    key = next(iter(body.parameters))
    w, a = body.parameters[key].detach().clone(), torch.zeros_like(body.parameters[key])
    for step in range(5):
        G = draw(*w.shape, seed=step).double()
        parts.drive(body, {key: G}, step)
        on = G**2 > 0.5
        a = torch.where(on, a + G.abs(), a)
        w = torch.where(on, w - 0.2 * G / (a + 1e-5), w)
    assert torch.allclose(body.parameters[key], w, atol=1e-9)


# First session -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["full", "lora", "film"])
def test_fsa_adapts_in_the_first_task_only(form):
    found = moved(parts.learner("fsa", ("lda",), {"form": form}))
    assert found[0] > 1e-3 and found[1:] == [0.0, 0.0]


def test_fsa_with_a_recursive_head_does_not_know_the_order_of_later_sessions():
    """Sessions 1 and 2 swapped: the same scores; and those of one fit on everything."""
    given = parts.stream()
    swapped = dataclasses.replace(given, tasks=(given.tasks[0], given.tasks[2], given.tasks[1]))
    one, two = (parts.run("fsa", ("lda",), given=stream) for stream in (given, swapped))
    inputs = parts.rows(given)
    a, b = one.scores("lda", inputs), two.scores("lda", inputs)
    assert torch.allclose(a, b, rtol=1e-6, atol=1e-6 * float(a.abs().max()))
    batch = one._head("lda", {})
    features = torch.cat([one.model.features(task.train.inputs, one.body.views()["online"]) for task in given.tasks])
    labels = torch.cat([task.train.labels for task in given.tasks])
    batch.update(batch.statistics(features, labels), list(range(6)))
    c = batch.scores(one.model.features(inputs, one.body.views()["online"]), one.classifier)
    assert torch.allclose(a, c, rtol=1e-6, atol=1e-6 * float(a.abs().max()))
