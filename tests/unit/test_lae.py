"""LAE: the offline expert is the average that it claims to be, and the ensemble is their maximum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedpeft.continual.learner import Learner
from fedpeft.continual.parts.prefix import attend_calibrated
from fedpeft.errors import InputError
from support import continual_parts as parts

FORMS = ["lora", "adapter", "prefix"]
OFFLINE = "offline/"


def made_of(form: str, **options: Any) -> Learner:
    """LoRA on the small base; what needs attention on the vision transformer."""
    small = {} if form == "lora" else {"given": parts.images(), "plastic": parts.vit()}
    return parts.learner("lae", options={"form": form, "length": 2, **options}, **small)


def offline(body) -> dict[str, Tensor]:
    kept = body.memory["adapters"]
    return {key.removeprefix(OFFLINE): value for key, value in kept.items() if key.startswith(OFFLINE)}


def online(body) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in body.parameters.items()}


class Diary:
    """What both experts were when each task began, and after each step."""

    def __init__(self, form: str = "lora", **options: Any) -> None:
        self.starts: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self.steps: list[list[tuple[dict[str, Tensor], dict[str, Tensor]]]] = []
        self.made = made_of(form, **options)
        parts.watch(self.made, self.begun, self.stepped)
        self.made.run()

    def begun(self, body) -> None:
        self.starts.append((online(body), {key: value.clone() for key, value in offline(body).items()}))
        self.steps.append([])

    def stepped(self, body, step: int) -> None:
        self.steps[-1].append((online(body), {key: value.clone() for key, value in offline(body).items()}))


@pytest.mark.parametrize("form", FORMS)
def test_the_offline_expert_is_the_closed_form_average(form):
    """bar_S = a^S bar_0 + (1 - a) sum_s a^(S - s) theta_s, with a = rho^(1/S), frozen steps included."""
    rho, diary = 0.6, Diary(form, retention=0.6, frozen_epochs=1)
    for task in (1, 2):
        steps = diary.steps[task]
        a, S = rho ** (1 / len(steps)), len(steps)
        assert S == 6
        for key, value in steps[-1][1].items():
            expected = a**S * diary.starts[task][1][key]
            for s, (theta, _) in enumerate(steps, 1):
                expected = expected + (1 - a) * a ** (S - s) * theta[key]
            assert torch.allclose(value, expected, atol=1e-6), (task, key)
            if key.endswith(("/B", "/K")):
                assert not torch.allclose(value, steps[-1][0][key], atol=1e-4), "online and offline are one"


def test_the_retention_of_a_task_is_what_was_asked_for_however_many_steps(float64):
    """With a frozen expert at t and an average that starts elsewhere, rho of the distance is left after a task."""
    for epochs in (1, 3):
        made = parts.learner("lae", options={"retention": 0.25, "frozen_epochs": 0}, epochs=epochs)
        parts.begin(made, 0)
        parts.begin(made, 1)
        body = made.body
        theta = online(body)
        for value in offline(body).values():
            value.zero_()
        for step in range(body.steps()):
            body.after_step(step)
        for key, value in offline(body).items():
            assert torch.allclose(value, 0.75 * theta[key], atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_task_has_one_expert_and_the_second_starts_from_its_copy(form):
    diary = Diary(form)
    assert diary.starts[0][1] == {} and diary.steps[0][-1][1] == {}
    for key, value in diary.starts[1][1].items():
        assert torch.equal(value, diary.steps[0][-1][0][key])
    assert set(diary.starts[1][1]) == set(diary.starts[1][0])
    for key, value in diary.starts[2][1].items():
        assert torch.equal(value, diary.steps[1][-1][1][key]), "the average goes on from task to task"


def test_views_appear_with_the_experts():
    made = parts.learner("lae")
    sizes = []
    parts.watch(made, lambda body: sizes.append(set(body.views()))).run()
    assert sizes == [{"online"}, {"online", "offline"}, {"online", "offline"}]
    assert [row["passes_per_prediction"] for row in made.ledger] == [1, 2, 2]


@pytest.mark.parametrize("form", FORMS)
def test_the_online_expert_rests_in_the_frozen_epochs_of_later_tasks_only(form):
    diary = Diary(form, frozen_epochs=1)
    per_epoch = len(diary.steps[0]) // 2
    assert any(not torch.equal(value, diary.starts[0][0][key]) for key, value in diary.steps[0][0][0].items())
    for task in (1, 2):
        for theta, _ in diary.steps[task][:per_epoch]:
            assert all(torch.equal(value, diary.starts[task][0][key]) for key, value in theta.items())
        first = diary.steps[task][per_epoch][0]
        assert any(not torch.equal(value, diary.starts[task][0][key]) for key, value in first.items())
    # In task 2 the average starts behind, so it moves while the online expert rests.
    early = diary.steps[2][0][1]
    assert any(not torch.equal(value, diary.starts[2][1][key]) for key, value in early.items())


def test_the_classifier_trains_while_the_expert_rests():
    made = parts.learner("lae", options={"frozen_epochs": 1})
    weights = []
    parts.watch(
        made,
        lambda body: weights.append(made.classifier.weight.detach().clone()),
        lambda body, step: weights.append(made.classifier.weight.detach().clone()),
    )
    made.run()
    assert not torch.equal(weights[7], weights[8])  # task 1: begun, first frozen step


def test_without_retention_both_experts_are_one(float64):
    diary = Diary(retention=0.0, frozen_epochs=0)
    theta, average = diary.steps[2][-1]
    for key, value in average.items():
        assert torch.allclose(value, theta[key], atol=1e-9)
    body, classifier = diary.made.body, diary.made.classifier
    views = {
        name: classifier(diary.made.model.features(parts.rows(diary.made.stream), change))
        for name, change in body.views().items()
    }
    assert torch.allclose(views["online"], views["offline"], atol=1e-8)
    assert torch.allclose(body.combine(views), views["online"].softmax(-1), atol=1e-8)


def test_with_full_retention_the_offline_expert_stays_that_of_the_first_task():
    diary = Diary(retention=1.0, frozen_epochs=0)
    for key, value in diary.steps[2][-1][1].items():
        assert torch.equal(value, diary.steps[0][-1][0][key])


def test_the_ensemble_is_the_elementwise_maximum_of_probabilities():
    made = parts.run("lae")
    inf = float("inf")
    scores = {
        "online": torch.tensor([[2.0, 0.0, 1.0, -inf], [0.0, 0.0, 0.0, -inf]]),
        "offline": torch.tensor([[0.0, 3.0, 0.0, -inf], [1.0, -1.0, 0.0, -inf]]),
    }
    found = made.body.combine(scores)
    each = [value.softmax(-1) for value in scores.values()]
    assert torch.allclose(found[:, :3], torch.maximum(*each)[:, :3], atol=1e-6)
    assert torch.equal(found[:, :3].argmax(-1), torch.tensor([1, 0]))
    assert (found[:, :3].sum(-1) > 1).all(), "a maximum of two distributions is none"
    assert (found[:, 3] <= 0).all()


def test_what_is_stored_does_not_grow_with_tasks():
    ledger = parts.run("lae", tasks=4).ledger
    sizes = [row["stored_bytes"]["adapters"] for row in ledger]
    assert sizes[1] == sizes[2] == sizes[3] == 2 * sizes[0]


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_an_untrained_expert_is_the_base(form):
    """The up-projection starts at zero, s at one."""
    made = made_of(form)
    parts.begin(made, 0)
    body, inputs = made.body, parts.rows(made.stream)
    assert torch.equal(made.model.features(inputs, body.change()), made.model.features(inputs))
    for key, value in body.parameters.items():
        if key.endswith("/B"):
            assert not value.any()
        if key.endswith("/s"):
            assert value.detach().reshape(-1).tolist() == [1.0]
    assert {key.rpartition("/")[2] for key in body.parameters} == {"A", "B", "s"}


@pytest.mark.parametrize("form", ["lora", "adapter"])
def test_s_scales_what_an_expert_adds(form):
    made = made_of(form)
    parts.begin(made, 0)
    body = made.body
    place = next(iter(body.change()))
    width = body.parameters[f"{place}/A"].shape[1]
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(3, body.parameters[f"{place}/B"].shape[0])
    with torch.no_grad():
        body.parameters[f"{place}/B"].normal_(generator=torch.Generator().manual_seed(1))
        added = []
        for s in (0.0, 1.0, 2.5):
            body.parameters[f"{place}/s"].fill_(s)
            added.append(body.change()[place](x, y))
    A, B = body.parameters[f"{place}/A"], body.parameters[f"{place}/B"]
    down = x @ A.T
    assert not added[0].any()
    assert torch.allclose(added[1], (torch.nn.functional.gelu(down) if form == "adapter" else down) @ B.T, atol=1e-5)
    assert torch.allclose(added[2], 2.5 * added[1], atol=1e-4)


def test_a_calibrated_prefix_has_mass_one_and_leaves_the_tokens_theirs():
    """Rows sum to 2 - l, with l the prefix's share before: values of ones show the mass."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=draw).double() for _ in range(3))
    K, V = (torch.randn(1, 3, 2, 4, generator=draw).double() for _ in range(2))
    scores = torch.cat([q @ k.mT, q @ K.mT], -1) * 0.5
    weights = scores.softmax(-1)
    share = weights[..., 5:].sum(-1, keepdim=True)
    ones = attend_calibrated(q, k, torch.ones_like(v), K, torch.ones_like(V), None, 0.5)
    assert torch.allclose(ones, (2 - share).expand_as(ones), atol=1e-6)
    prefix = attend_calibrated(q, k, torch.zeros_like(v), K, torch.ones_like(V), None, 0.5)
    assert torch.allclose(prefix, torch.ones_like(prefix), atol=1e-6)
    expected = weights[..., :5] @ v + weights[..., 5:] / share @ V
    assert torch.allclose(attend_calibrated(q, k, v, K, V, None, 0.5), expected, atol=1e-6)


def test_a_prefix_is_taken_out_again():
    """After a pass with a prefix the base is as it was, module for module."""
    made = made_of("prefix")
    before = parts.fingerprint(made.model.base)
    inputs = parts.rows(made.stream)
    plain = made.model.features(inputs)
    parts.begin(made, 0)
    assert not torch.allclose(made.model.features(inputs, made.body.change()), plain, atol=1e-3)
    assert parts.fingerprint(made.model.base) == before
    assert torch.equal(made.model.features(inputs), plain)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_resumes_exactly_on_a_transformer(form):
    whole = made_of(form).run()
    half = made_of(form).run(stop=9)
    other = parts.loaded(made_of(form), parts.saved(half)).run()
    assert not parts.difference(whole.state(), other.state())
    inputs = parts.rows(whole.stream)["pixel_values"]
    together = whole.scores("linear", {"pixel_values": inputs})
    split = torch.cat([whole.scores("linear", {"pixel_values": part}) for part in inputs.split(7)])
    finite = together.isfinite()
    assert (split - together)[finite].abs().max() <= 1e-5
    assert torch.equal(split.argmax(-1), together.argmax(-1))


@pytest.mark.parametrize("form", ["adapter", "prefix"])
def test_what_needs_attention_says_so(form):
    with pytest.raises(InputError, match=f"form={form}"):
        parts.learner("lae", options={"form": form})
