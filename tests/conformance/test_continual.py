"""Every registered body and head holds these, whatever its method."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fedpeft import config, registry
from fedpeft.continual.body import KINDS
from fedpeft.continual.learner import Learner
from fedpeft.errors import InputError
from support import continual_parts as parts
from support.classified import CONSTANT, GROWS
from support.continual_parts import heads_of
from support.sample import sampled

BODIES, HEADS, MERGERS = (registry.names(table) for table in ("bodies", "heads", "mergers"))
SEEN = tuple(name for name in HEADS if registry.load("heads", name).loss == "seen")


def everything(body: str, **given: Any) -> Learner:
    return parts.learner(body, heads_of(body), **given)


@pytest.fixture(scope="module", params=BODIES)
def whole(request: pytest.FixtureRequest) -> tuple[str, Learner, dict[tuple[int, int], bytes], Any, Any]:
    """A body, run with all its heads: states by (task, step); before and after each task, views and classifier."""
    made = everything(request.param)
    before = parts.fingerprint(made.model.base)
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    states: dict[tuple[int, int], bytes] = {}
    views = [[made.model.features(parts.rows(made.stream))]]
    weights = [made.classifier.weight.detach().clone()]
    made.model.passes = 0

    def keep(path: object) -> None:
        states[made.task, made.step_number] = parts.saved(made)

    def after(task: int, tasks: int) -> None:
        views.append(parts.seen_by(made))
        weights.append(made.classifier.weight.detach().clone())

    made.save = keep  # type: ignore[method-assign]
    made.run(checkpoint="memory", every=1, on_task=after)  # type: ignore[arg-type]
    assert parts.fingerprint(made.model.base) == before, "the base changed"
    assert torch.equal(torch.get_rng_state(), generator), "the global generator was used"
    return request.param, made, states, views, weights


def test_two_runs_are_the_same_bit_for_bit(whole):
    name, made, _, _, _ = whole
    torch.manual_seed(2)
    np.random.seed(2)
    again = everything(name).run()
    assert not parts.difference(made.state(), again.state())


def test_resume_is_exact_at_every_boundary_and_within_tasks(whole):
    name, made, states, _, _ = whole
    tasks = len(made.stream.tasks)
    steps = {task: max(step for index, step in states if index == task) for task in range(tasks)}
    points = [(task, 0) for task in range(1, tasks + 1)]
    points += [(task, step) for task in range(tasks) for step in {1, steps[task] // 2, steps[task]} if step]
    for point in points:
        resumed = parts.loaded(everything(name), states[point]).run()
        found = parts.difference(made.state(), resumed.state())
        assert not found, f"resumed at task {point[0]}, step {point[1]}: {found}"


def test_a_run_that_was_stopped_at_any_step_goes_on_as_if_it_had_not_been(whole):
    name, made, _, _, _ = whole
    going = everything(name)
    while going.task < len(going.stream.tasks):
        going.run(stop=1)
    assert not parts.difference(made.state(), going.state())


def test_a_loaded_state_predicts_at_once(whole):
    name, made, states, _, _ = whole
    inputs = parts.rows(made.stream)
    again = parts.loaded(everything(name), states[len(made.stream.tasks), 0])
    for head in made.heads:
        assert torch.equal(again.scores(head, inputs), made.scores(head, inputs)), head


def test_what_is_saved_shares_no_memory_with_what_trains(whole):
    name, _, states, _, _ = whole
    made = parts.loaded(everything(name), states[1, 1])
    state = made.state()
    before = parts.saved(made)
    made.run()
    fresh = everything(name)
    fresh.load(state)
    assert not parts.difference(fresh.state(), parts.loaded(everything(name), before).state())


def test_a_row_is_predicted_the_same_with_any_batch_mates(whole):
    _, made, _, _, _ = whole
    inputs = parts.rows(made.stream)["pixel_values"]
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(inputs)))
    for head in made.heads:
        together = made.scores(head, {"pixel_values": inputs})
        finite = together.isfinite()
        size = float(together[finite].abs().max().clamp(min=1))
        for rows in (1, 7):
            split = torch.cat([made.scores(head, {"pixel_values": part}) for part in inputs.split(rows)])
            assert torch.equal(split.isfinite(), finite)
            assert (split - together)[finite].abs().max() <= 1e-5 * size, (head, rows)
            assert torch.equal(split.argmax(-1), together.argmax(-1)), (head, rows)
        mixed = torch.empty_like(together)
        mixed[order] = made.scores(head, {"pixel_values": inputs[order]})
        assert (mixed - together)[finite].abs().max() <= 1e-5 * size, head
        assert torch.equal(mixed.argmax(-1), together.argmax(-1)), head


def test_classes_not_seen_yet_are_never_predicted(whole):
    name, made, states, _, _ = whole
    inputs = parts.rows(made.stream)
    early = parts.loaded(everything(name), states[2, 0])
    seen = made.stream.seen(1)
    for head in early.heads:
        scores = early.scores(head, inputs)
        assert scores.shape == (len(inputs["pixel_values"]), made.stream.classes)
        unseen = [label for label in range(made.stream.classes) if label not in seen]
        assert torch.isneginf(scores[:, unseen]).all()
        assert scores[:, seen].isfinite().all()


def test_local_cross_entropy_leaves_other_tasks_rows_of_the_classifier_alone(whole):
    name, made, _, _, weights = whole
    if made.loss != "local":
        assert made.body.loss == "seen"
        return
    if name == "lwf":  # distillation is on the old rows; those of classes to come must wait
        assert not torch.equal(weights[1][:2], weights[2][:2]) and torch.equal(weights[0][4:], weights[2][4:])
        return
    for task, (before, after) in zip(made.stream.tasks, pairwise(weights), strict=True):
        others = [label for label in range(made.stream.classes) if label not in task.classes]
        assert torch.equal(before[others], after[others]), task.name


def test_something_moves_in_every_task(whole):
    name, _, _, views, _ = whole
    moved = [not torch.equal(one[0], two[0]) for one, two in pairwise(views)]
    expected = {"frozen": [False] * 3, "fsa": [True, False, False]}
    assert moved == expected.get(name, [True] * 3)
    assert not any(view.isnan().any() for row in views for view in row)


def test_the_ledger_adds_up(whole):
    name, made, _, _, _ = whole
    stored = [row["stored_bytes"] for row in made.ledger]
    assert len(stored) == len(made.stream.tasks)
    for row in made.ledger:
        assert set(row["stored_bytes"]) == set(KINDS)
        assert all(value >= 0 for value in row["stored_bytes"].values())
        assert row["passes_per_prediction"] >= 1 and row["train_cpu_s"] >= 0
    assert made.body.stored() == stored[-1]
    assert any(row["raw"] for row in stored) == ("raw" in made.body.needs), "records are kept just where declared"
    if name in GROWS:
        kept = [row[GROWS[name]] for row in stored]
        assert all(one < two for one, two in pairwise(kept)), kept
    else:
        assert name in CONSTANT
        later = [sum(row.values()) - row["numbers"] for row in stored[1:]]
        assert later[0] == later[1], later


def test_memory_is_plain_data_of_the_declared_kinds(whole):
    _, made, _, _, _ = whole
    assert set(made.body.memory) == set(KINDS)
    assert all(value.is_leaf for value in made.body.parameters.values())
    assert all(key.count("/") >= 1 for key in made.body.parameters)


def test_everything_is_learned_that_two_classes_allow(whole):
    """Far from chance on the task just trained: nothing here is a constant."""
    _, made, _, _, _ = whole
    for head, right in made.right.items():
        assert right[0][0] >= 12, f"{head}: {right[0][0]} of 16 right on the first task after it"


def test_no_body_is_another_in_disguise():
    found = {name: parts.seen_by(parts.run(name, seed=3))[-1] for name in BODIES}
    for number, one in enumerate(BODIES):
        for two in BODIES[number + 1 :]:
            assert found[one].shape != found[two].shape or not torch.equal(found[one], found[two]), (one, two)


@pytest.mark.parametrize("name", BODIES)
def test_seeds_matter_and_only_seeds(name):
    if name != "frozen":
        one, two = (parts.seen_by(parts.run(name, seed=seed, tasks=2)) for seed in (0, 1))
        assert not all(map(torch.equal, one, two))


@pytest.mark.parametrize("name", BODIES)
def test_boundaries_are_asked_for_or_not_needed(name):
    if "boundaries" in registry.load("bodies", name).needs:
        with pytest.raises(InputError, match=f"body {name}"):
            parts.learner(name, heads_of(name)[:1], scenario="free")
    else:
        made = parts.run(name, heads_of(name)[:1], scenario="free", tasks=2, epochs=1)
        assert len(made.right[heads_of(name)[0]]) == 2


@pytest.mark.parametrize("name, scenario", sampled(BODIES, ["task", "domain", "blurry"]))
def test_every_other_scenario_runs(name, scenario):
    """Where records of old classes come back, all seen classes compete."""
    made = parts.run(name, heads_of(name)[:1], scenario=scenario, tasks=2, epochs=1)
    scores = made.scores(heads_of(name)[0], parts.rows(made.stream))
    assert scores.isfinite().all()
    assert made.loss == ("local" if scenario == "task" and made.body.loss != "seen" else "seen")


@pytest.mark.parametrize("name", [name for name in BODIES if registry.load("bodies", name).heads is None])
def test_every_body_trains_with_all_seen_classes_too(name):
    made = parts.run(name, SEEN, tasks=2, epochs=1)
    assert made.loss == "seen"
    assert all(made.scores(head, parts.rows(made.stream)).isfinite().all() for head in SEEN)


@pytest.mark.parametrize("table, name", [("bodies", name) for name in BODIES] + [("heads", name) for name in HEADS])
def test_wrong_options_are_refused_with_their_key(table, name):
    key = "body" if table == "bodies" else f"head.{name}"
    given: Any = {"learning_rat": 1}

    def make(options: dict[str, Any]) -> None:
        if table == "bodies":
            parts.learner(name, heads_of(name)[:1], options)
        else:
            Learner(parts.stream(), parts.model(), "frozen", {name: options}, parts.TrainConfig(), 0)

    with pytest.raises(InputError, match=rf"{key}.*learning_rat"):
        make(given)
    for option, item in config.options_of(registry.load(table, name)).items():
        wrong = "nothing-like-it" if item.metadata.get("choices") else [["list"]]
        with pytest.raises(InputError, match=option):
            make({option: wrong})


def test_unknown_names_are_refused_with_their_key():
    with pytest.raises(InputError, match=r"body.*sequentiel.*sequential"):
        parts.learner("sequentiel")
    with pytest.raises(InputError, match=r"head.*lad.*lda"):
        parts.learner("frozen", ("lad",))
    with pytest.raises(InputError, match="different training losses"):
        parts.learner("frozen", ("linear", "masked"))


@pytest.mark.parametrize("name", BODIES)
def test_every_choice_of_every_option_runs_or_says_why_not(name):
    """A choice that this base cannot have (a prefix without attention) is refused with its key."""
    for option, item in config.options_of(registry.load("bodies", name)).items():
        choices = (True, False) if isinstance(config.default_of(item), bool) else item.metadata.get("choices", ())
        for choice in choices:
            try:
                made = parts.run(name, heads_of(name)[:1], {option: choice}, tasks=2, epochs=1)
            except InputError as error:
                assert option in str(error) or str(choice) in str(error), (option, choice)
                continue
            assert not any(value.isnan().any() for value in parts.seen_by(made)), (option, choice)


@pytest.mark.parametrize("name", MERGERS)
def test_every_merger_merges_and_resumes(name):
    """The body with each of them: bit for bit at a boundary and within a task, through a file's bytes."""
    start = "orthogonal" if name == "orthogonal_adaptation" else "same"
    own = {"by": "step"} if name == "metrics_weighted" else {}  # no loss is known here

    def made() -> Learner:
        return parts.learner("merging", options={"method": name, "method_options": own, "start": start, "r": 2})

    whole = made().run()
    assert not any(view.isnan().any() for view in parts.seen_by(whole))
    for stop in (6, 9, 12):
        again = parts.loaded(made(), parts.saved(made().run(stop=stop))).run()
        assert not parts.difference(whole.state(), again.state()), stop


@pytest.mark.parametrize("table, name", [("bodies", name) for name in BODIES] + [("heads", name) for name in HEADS])
def test_each_says_what_it_is(table, name):
    cls = registry.load(table, name)
    assert cls.__doc__ and cls.__module__.rpartition(".")[2] == name
    assert set(getattr(cls, "needs", ())) <= {"boundaries", "raw", "statistics"}
    assert all(item.metadata["help"] for item in config.options_of(cls).values())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_parts_is_the_head_of_the_whole(name):
    """Sums of two owners are those of all their records, whoever had which, in whatever order."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 6
    features = 2 * torch.randn(6, 12, generator=rng)[labels] + torch.randn(60, 12, generator=rng)
    made = parts.learner("frozen", (name,))
    classifier = made.classifier

    def fitted(groups: list[torch.Tensor]) -> torch.Tensor:
        head = made._head(name, parts.HEADS.get(name, {}))
        for group in groups:
            head.update(head.statistics(features[group], labels[group]), list(range(6)))
        return head.scores(features, classifier)

    together = fitted([torch.arange(60)])
    by_task = fitted([(labels // 2 == task).nonzero().flatten() for task in range(3)])
    backwards = fitted([(labels // 2 == task).nonzero().flatten() for task in (2, 1, 0)])
    owners = fitted(list(torch.randperm(60, generator=rng).split(20)))
    size = together.abs().max()
    for other in (by_task, backwards, owners):
        assert (other - together).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("name", [name for name in HEADS if name not in ("linear", "masked")])
def test_a_fitted_head_knows_separable_classes(name):
    rng = torch.Generator().manual_seed(1)
    centres = 4 * torch.randn(6, 12, generator=rng)
    labels = torch.arange(120) % 6
    features = centres[labels] + torch.randn(120, 12, generator=rng)
    made = parts.learner("frozen", (name,))
    head = made.heads[name]["online"]
    head.update(head.statistics(features[:60], labels[:60]), list(range(6)))
    right = (head.scores(features[60:], made.classifier).argmax(-1) == labels[60:]).float().mean()
    assert right >= 0.95
