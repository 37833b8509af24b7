"""Bodies with a LoRA for each task: their equations against hand-sized numbers, and what every LoRA body must keep."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fedpeft.continual import stream as streams
from fedpeft.continual.bodies import inflora, sdlora
from fedpeft.continual.body import TrainConfig
from fedpeft.continual.learner import Learner
from fedpeft.continual.parts import lora
from fedpeft.errors import InputError
from support.lora_parts import TOY, TRAIN, VIT, begun, digits_stream, learner, move, same, stepped, vit, without_times

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture(scope="module")
def digits() -> streams.Stream:
    return digits_stream()


def any_learner(case: str, digits: streams.Stream) -> Learner:
    if case in TOY:
        return learner(case)
    return Learner(digits, vit(), "lae", {"linear": {}, "lda": {}}, TRAIN, 3, VIT[case])


# What every body keeps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*TOY, *VIT])
def test_resumed_in_mid_task_it_is_the_same_run(case, digits):
    whole = any_learner(case, digits)
    weights = {key: value.clone() for key, value in whole.model.base.backbone.state_dict().items()}
    whole.run()
    assert same(weights, dict(whole.model.base.backbone.state_dict())), "the base was written to"
    rows = [sum(row) for row in whole.right["linear"]]
    assert max(rows) > 0
    for stop in (3, 10, 17, 21) if case in TOY else (9,):
        part = any_learner(case, digits).run(stop=stop)
        buffer = io.BytesIO()
        torch.save(part.state(), buffer)
        buffer.seek(0)
        resumed = any_learner(case, digits)
        resumed.load(torch.load(buffer, weights_only=True))
        resumed.run()
        assert same(without_times(resumed.state()), without_times(whole.state())), stop


@pytest.mark.parametrize("case", [*TOY, *VIT])
def test_a_prediction_does_not_depend_on_batch_mates(case, digits):
    one = any_learner(case, digits).run()
    data = one.stream.tasks[0].test
    whole = one.scores("linear", data.inputs)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    for size in (1, 7):
        for rows in order.split(size):
            found = one.scores("linear", {name: value[rows] for name, value in data.inputs.items()})
            assert torch.allclose(found, whole[rows], atol=1e-4), size
            assert torch.equal(found.argmax(1), whole[rows].argmax(1))


@pytest.mark.parametrize("case", [*TOY, *VIT])
def test_it_moves_and_learns(case, digits):
    """No body is the frozen base: the features move, and the last task is learned."""
    one = any_learner(case, digits).run()
    inputs = one.stream.tasks[-1].test.inputs
    moved = one.model.features(inputs, one.body.views()["online"]) - one.model.features(inputs)
    assert float(moved.detach().norm()) > 1e-2
    assert one.body.stored()["adapters"] > 0


# O-LoRA and OWLoRA ----------------------------------------------------------------------------------------------------


def test_overlap_is_the_sum_of_absolute_products():
    A = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
    old = [(torch.zeros(1, 1), torch.tensor([[1.0, -3.0, 0.0]])), (torch.zeros(1, 1), torch.tensor([[0.0, 0.0, 1.0]]))]
    assert lora.sum_overlap(A, old).item() == 1 + 3 + 2
    assert lora.sum_overlap(A, old, torch.tensor([0.5, 2.0])).item() == 0.5 * 4 + 2.0 * 2


@pytest.mark.parametrize("name", ["olora", "owlora"])
def test_penalty_is_lam_times_the_overlap_over_layers(name):
    body = stepped(learner(name, {"r": 2, "lam": 3.0}), tasks=2, steps=1).body
    expected = 0.0
    for layer in ("0", "2"):
        for task in (0, 1):
            old = body.memory["adapters"][f"past/{task}/{layer}/A"]
            expected += (body.parameters[f"{layer}/A"] @ old.T).abs().sum()
    found = body.penalty({}, torch.zeros(0), torch.zeros(0), body.classifier)
    assert found.item() == pytest.approx(3.0 * expected.item(), rel=1e-6) and found.item() > 0.1


def test_olora_norm_penalty():
    body = stepped(learner("olora", {"r": 2, "lam": 0.0, "lam2": 2.0}), tasks=0, steps=1).body
    norms = sum(value.detach().norm().item() for value in body.parameters.values())
    assert body.penalty({}, None, None, None).item() == pytest.approx(2 * norms)
    body = stepped(learner("olora", {"r": 2, "lam": 0.0}), tasks=1, steps=1).body
    assert body.penalty({}, None, None, None) is None


@pytest.mark.parametrize("name", ["olora", "owlora"])
def test_a_strong_penalty_makes_the_new_rows_orthogonal(name):
    train = TrainConfig(epochs=16, batch_size=8, lr=0.01)
    left = {}
    for lam in (0.0, 5.0):
        body = stepped(learner(name, {"r": 1, "lam": lam}, train), tasks=1, steps=48).body
        now = {layer: body.parameters[f"{layer}/A"].detach() for layer in ("0", "2")}
        left[lam] = max(float(lora.sum_overlap(A, lora.past(body, layer)) / A.norm()) for layer, A in now.items())
    assert left[5.0] < 0.1 * left[0.0]


def test_olora_adds_all_pairs_and_freezes_the_old_ones():
    one = stepped(learner("olora", {"r": 2, "alpha": 1.0}), tasks=1)
    first = {key: value.detach().clone() for key, value in one.body.parameters.items()}
    stepped(one, tasks=1, steps=3)
    kept = one.body.memory["adapters"]
    assert all(torch.equal(kept[f"past/0/{key}"], value) for key, value in first.items())
    x, y = torch.randn(4, 6), torch.randn(4, 7)
    new = one.body.parameters
    dense = 0.5 * (first["0/B"] @ first["0/A"] + new["0/B"] @ new["0/A"])
    assert float(new["0/B"].detach().norm()) > 0 and float(first["0/B"].norm()) > 0
    assert torch.allclose(one.body.change()["0"](x, y), y + x @ dense.T, atol=1e-6)


@pytest.mark.parametrize("name", ["olora", "inflora"])
@pytest.mark.parametrize(("r", "dense"), [(1, False), (2, True)])
def test_what_was_put_by_is_one_matrix_where_that_is_less_work(name, r, dense):
    body = stepped(learner(name, {"r": r, "alpha": 3.0}), tasks=2, steps=2).body
    x, y = torch.randn(4, 6), torch.randn(4, 7)
    added = body.change()["0"](x, y) - y
    assert isinstance(body.joined["0"][1], torch.Tensor) == dense  # pairs of 2 x 2 x (6 + 7) numbers, or 7 x 6
    pairs = [*lora.past(body, "0"), (body.parameters["0/B"], body.parameters["0/A"])]
    expected = 3.0 / r * sum(x @ A.T @ B.T for B, A in pairs)
    assert len(pairs) == 3 and float(expected.detach().norm()) > 1e-3
    assert torch.allclose(added, expected, atol=1e-5)


def test_owlora_weights_start_at_one_and_train():
    one = stepped(learner("owlora"), tasks=2)
    begun(one)
    before = one.body.parameters["0/weights"].detach().clone()
    assert before.shape == (2,) and before[1] == 1.0 and before[0] != 1.0
    one._step(0)
    after = one.body.parameters["0/weights"].detach()
    assert not torch.equal(before, after)
    x, y, kept, new = torch.randn(4, 6), torch.randn(4, 7), one.body.memory["adapters"], one.body.parameters
    old = sum(w * kept[f"past/{k}/0/B"] @ kept[f"past/{k}/0/A"] for k, w in enumerate(after))
    dense = new["0/B"] @ new["0/A"] + old
    assert torch.allclose(one.body.change()["0"](x, y), y + (4.0 * x) @ dense.T, atol=1e-5)  # alpha / r = 8 / 2


# SD-LoRA --------------------------------------------------------------------------------------------------------------


def test_direction_has_norm_one():
    B, A = torch.randn(4, 2), torch.randn(2, 3)
    unit, magnitude = sdlora.direction(B, A, 0.5)
    assert (unit @ A).norm().item() == pytest.approx(1, rel=1e-5)
    assert torch.allclose(magnitude * unit @ A, 0.5 * B @ A, atol=1e-5)
    zero, none = sdlora.direction(torch.zeros(4, 2), A, 0.5)
    assert not zero.any() and none == 0


def test_sdlora_freezes_directions_and_trains_magnitudes():
    one = stepped(learner("sdlora"), tasks=1)
    inputs = one.stream.tasks[0].test.inputs
    before = one.model.features(inputs, one.body.change()).detach()
    begun(one)
    assert torch.allclose(one.model.features(inputs, one.body.change()).detach(), before, atol=1e-5), "a jump"
    kept = {key: value.clone() for key, value in one.body.memory["adapters"].items()}
    magnitude = one.body.parameters["0/magnitudes"].detach().clone()
    assert (kept["past/0/0/B"] @ kept["past/0/0/A"]).norm().item() == pytest.approx(1, rel=1e-5)
    move(one, 4)
    assert same(kept, one.body.memory["adapters"])
    assert one.body.parameters["0/magnitudes"].shape == (1,) and one.body.parameters["0/magnitudes"] != magnitude
    stepped(one, tasks=2, steps=1)
    assert one.body.parameters["0/magnitudes"].shape == (2,)


# InfLoRA --------------------------------------------------------------------------------------------------------------


def test_rows_are_the_best_directions_outside_the_old_space():
    gram = torch.diag(torch.tensor([9.0, 4.0, 2.0, 0.0])).double()
    assert inflora.rows(gram, torch.zeros(4, 0), 2).abs().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]
    M = torch.eye(4)[:, [1]]
    assert inflora.rows(gram, M, 3).abs().round(decimals=6).tolist() == [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    full = inflora.rows(gram, torch.eye(4)[:, :3], 2)
    assert not full.any(), "nothing is left but the null space"


def test_the_space_grows_by_the_fewest_directions():
    gram = torch.diag(torch.tensor([5.0, 3.0, 1.0, 1.0])).double()
    shapes = [inflora.grown(gram, torch.zeros(4, 0), threshold).shape[1] for threshold in (0.5, 0.51, 0.8, 0.9, 1.0)]
    assert shapes == [1, 2, 2, 3, 4]
    M = torch.eye(4)[:, [2]]  # has 0.1 of the energy; with the first direction 0.6
    assert [inflora.grown(gram, M, threshold).shape[1] for threshold in (0.1, 0.6, 0.7)] == [1, 2, 3]
    skew = inflora.grown(gram + 0.1, M, 0.9)
    assert torch.allclose(skew.T @ skew, torch.eye(skew.shape[1]), atol=1e-6)


def test_inflora_leaves_what_old_inputs_see():
    """Inputs of the first layer span two dimensions a task: with all energy kept, task 1 changes nothing there."""
    one = stepped(learner("inflora", {"r": 2, "threshold": 1.0}, rank=2), tasks=1)
    old = one.stream.tasks[0].test.inputs["x"]
    M = one.body.memory["bases"]["0/M"]
    assert M.shape == (6, 2) and torch.allclose(old @ M @ M.T, old, atol=1e-4)
    begun(one)
    A = one.body.parameters["0/A"].detach().clone()
    assert torch.allclose(A @ A.T, torch.eye(2), atol=1e-5) and float((A @ M).abs().max()) < 1e-5
    new = one.stream.tasks[1].test.inputs["x"]
    outside = new - new @ M @ M.T
    assert torch.allclose(outside @ A.T @ A, outside, atol=1e-3), "A spans what is new in the new inputs"
    before = {name: one.body.change()["0"](x, torch.zeros(20, 7)).detach() for name, x in (("old", old), ("new", new))}
    move(one, 5)
    assert torch.equal(one.body.parameters["0/A"], A)
    after = {name: one.body.change()["0"](x, torch.zeros(20, 7)).detach() for name, x in (("old", old), ("new", new))}
    assert (
        float((after["old"] - before["old"]).abs().max())
        < 1e-5
        < 1e-2
        < float((after["new"] - before["new"]).abs().max())
    )


def test_inflora_gram_is_additive_and_under_the_trained_adapters():
    one = stepped(learner("inflora"), tasks=1, steps=3)
    data = one.stream.tasks[1].train
    whole = one.body.statistics(data)
    parts = [one.body.statistics(data.view(rows)) for rows in (np.arange(8), np.arange(8, 20))]
    assert all(torch.allclose(whole[key], parts[0][key] + parts[1][key], rtol=1e-5) for key in whole)
    x = data.inputs["x"]
    weights = dict(one.model.base.backbone.named_parameters())
    hidden = F.gelu(one.body.change()["0"](x, F.linear(x, weights["0.weight"], weights["0.bias"]))).double().detach()
    assert torch.allclose(whole["2/G"], hidden.T @ hidden, rtol=1e-4)
    assert torch.allclose(whole["0/G"], (x.double().T @ x.double()), rtol=1e-5)


def test_inflora_warns_when_it_is_full(caplog):
    with caplog.at_level(logging.WARNING, "fedpeft"):
        one = learner("inflora", {"r": 2, "threshold": 1.0}).run()
    assert one.body.saturation()["0"] == 1.0 and "fill over 90 %" in caplog.text
    assert not one.body.parameters["0/A"].any()


# Merging --------------------------------------------------------------------------------------------------------------


def trained_pairs(one: Learner) -> list[dict[str, torch.Tensor]]:
    """The pairs of each task, noted as it ended."""
    pairs = []
    one.run(on_task=lambda task, tasks: pairs.append({k: v.detach().clone() for k, v in one.body.parameters.items()}))
    return pairs


def test_merged_prediction_is_the_mean_of_the_tasks_products():
    one = learner("merging", {"r": 2, "alpha": 1.0, "method": "running_average"})
    pairs = trained_pairs(one)
    mean = sum(pair["0/B"] @ pair["0/A"] for pair in pairs) / 3
    assert float(mean.norm()) > 0 and not torch.equal(pairs[0]["0/A"], pairs[1]["0/A"])
    x, y = torch.randn(4, 6), torch.randn(4, 7)
    assert torch.allclose(one.body.views()["online"]["0"](x, y), y + 0.5 * x @ mean.T, atol=1e-5)
    last = pairs[-1]["0/B"] @ pairs[-1]["0/A"]
    assert torch.allclose(one.body.change()["0"](x, y), y + 0.5 * x @ last.T, atol=1e-6)


def test_every_task_starts_from_the_same_pair():
    one = learner("merging", {"r": 2})
    starts = []
    for task in range(3):
        stepped(one, tasks=task)
        begun(one)
        starts.append(one.body.parameters["0/A"].detach().clone())
        assert not one.body.parameters["0/B"].any()
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


def test_orthogonal_slots_are_frozen_and_sum_up():
    one = learner("merging", {"r": 2, "alpha": 2.0, "method": "orthogonal_adaptation", "start": "orthogonal"})
    one.model.layers = ("0",)
    pairs = trained_pairs(one)
    rows = torch.cat([pair["0/A"] for pair in pairs])
    assert torch.allclose(rows @ rows.T, torch.eye(6), atol=1e-5), "trained, or not orthogonal"
    x, y = torch.randn(4, 6), torch.zeros(4, 7)
    total = sum(pair["0/B"] @ pair["0/A"] for pair in pairs)
    assert torch.allclose(one.body.views()["online"]["0"](x, y), x @ total.T, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "opmc"}, "body.method: 'opmc' is not known. Did you mean 'opcm'"),
        ({"method": "opcm", "method_options": {"alpha": 7.0}}, "body.method_options.alpha"),
        ({"method": "orthogonal_adaptation", "r": 2}, "overlaps an earlier one's"),
        ({"method": "metrics_weighted"}, "by=loss needs the loss"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_training(options, message):
    with pytest.raises(InputError, match=message):
        learner("merging", options)
