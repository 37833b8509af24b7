"""A federation of one client that has all records is one learner: the same body, the same answers.

One round a task, one batch of all records a step, Adam at both: what is left between the two is rounding.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpeft import config as configs
from fedpeft.adapters.adapted import Adapted
from fedpeft.clients.train import train
from fedpeft.config import AdapterConfig, ClientConfig, ContinualConfig
from fedpeft.continual.body import make_leaf
from fedpeft.continual.curriculum import Curriculum
from fedpeft.state import AdapterState, ServerState, Update
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.sequence.base import PAST, ServerBody
from fedpeft.strategies.sequence.build import make_body
from fedpeft.strategies.sequence.general import GeneralServerBody
from fedpeft.strategies.sequence.sequence import TaskSequence
from support import continual_parts as parts
from support.classified import ONE_CLIENT_IS_ONE_LEARNER, REPLAYS_AT_CLIENTS

R, ALPHA, LR, STEPS, TASKS = 3, 6.0, 0.02, 6, 3
PAIR = {"r": R, "alpha": ALPHA}
# Body, its options in both, and those that only one learner has.
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "frozen": ("frozen", {}, {}),
    "sequential": ("sequential", {}, {**PAIR, "form": "lora"}),
    "fsa": ("fsa", {}, {**PAIR, "form": "lora"}),
    "inflora": ("inflora", {"threshold": 0.7}, PAIR),
    "merging": ("merging", {}, PAIR),
    "merging-opcm": ("merging", {"method": "opcm"}, PAIR),
    "merging-orthogonal": ("merging", {"method": "orthogonal_adaptation", "start": "orthogonal"}, PAIR),
}


def adapted() -> Adapted:
    """The small base with a LoRA in its layers."""
    base, config = parts.base(2 * TASKS), AdapterConfig(r=R, alpha=ALPHA, target_modules=parts.LAYERS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Adapted(base, configs.method("adapters", "lora", {}, "adapter").inject(base, config, 0), True)
    base.backbone.to(torch.get_default_dtype())
    return model


def half(body: str, options: dict[str, Any]) -> ServerBody:
    return make_body(ContinualConfig(body=body, options=options))


def deal(rows: int, shares: int) -> list[np.ndarray]:
    """Unequal shares of records: one, all of them; three, one record, up to a third, and the others."""
    return np.split(np.arange(rows), [1, rows // 3] if shares == 3 else [])


def play(server_body: ServerBody, shares: int = 1) -> tuple[list[Tensor], list[ServerState], Adapted]:
    """Logits of the test records and the state after each task.

    Args:
        shares: clients that the records are dealt to for sketches, one or three; one trains on them all.
    """
    stream, model = parts.stream(tasks=TASKS), adapted()
    plan = Curriculum(tuple(task.classes for task in stream.tasks), 1)
    strategy = TaskSequence(FedIT(), server_body, plan, "local", "body")
    server, logits, states = strategy.initial(model.state(), 0), [], []
    settings = ClientConfig(lr=LR, batch_size=10**6, local_steps=STEPS, local_epochs=None)
    for number, task in enumerate(stream.tasks):
        sketches = {}
        for what in server_body.sketches if number else [what for what in server_body.sketches if what != PAST]:
            data = stream.tasks[number - 1].train if what == PAST else task.train
            model.write(server.adapter)
            parcels = [data.view(rows) for rows in deal(len(data), shares)]
            dealt = [server_body.make_sketch(model, parcel) for parcel in parcels]
            assert {key: tuple(value.shape) for key, value in dealt[0].items()} == server_body.describe_sketch(
                server.adapter
            )
            sketches[what] = server_body.merge_sketches(dealt, [float(len(parcel)) for parcel in parcels])
            pooled = {key: value.double() for key, value in server_body.make_sketch(model, data).items()}
            torch.testing.assert_close(sketches[what], pooled, rtol=1e-12, atol=0)
        server = strategy.begin(server, number, sketches)
        model.write(server.adapter)
        with model.competing(list(task.classes)):
            train(model, task.train, list(strategy.trained(server)), settings, 0)
        sent = model.read(server.adapter.select(strategy.uploads(server)))
        server = replace(strategy.aggregate(server, [Update("client", 1.0, sent)]), round=number + 1)
        (view,) = server_body.views(server).values()
        model.write(view)
        logits.append(torch.cat([found for _, found, _ in model.features(parts.clusters(2 * TASKS, 8, 0, "test"))]))
        states.append(server)
    return logits, states, model


@cache
def last_logits(case: str) -> Tensor:
    """The test records' logits after the last task of a case in SAME; asked for in float64 only."""
    body, options, _ = SAME[case]
    return play(half(body, options))[0][-1]


def learned(body: str, options: dict[str, Any]) -> list[Tensor]:
    """The same of one learner, which begins with the same classifier, and the same pairs where it draws none."""
    start = adapted().state()
    made = parts.learner(body, options=options, tasks=TASKS, epochs=STEPS, batch_size=10**6, lr=LR, head_lr=LR)
    made.classifier.weight, made.classifier.bias = (
        make_leaf(start["classifier/weight"]),
        make_leaf(start["classifier/bias"]),
    )
    if not made.body.renews and made.body.moves_in(0):
        made.body.parameters = {key: make_leaf(value) for key, value in start.select(("A", "B")).tensors.items()}
    rows, logits = parts.clusters(2 * TASKS, 8, 0, "test"), []

    def look(task: int, tasks: int) -> None:
        inputs, _ = rows.batch(np.arange(len(rows)))
        with torch.no_grad():
            logits.append(made.classifier(made.model.features(inputs, made.body.views()["online"])))

    made.run(on_task=look)
    return logits


@pytest.mark.parametrize("case", SAME)
def test_one_client_is_one_learner(case, float64):
    body, options, alone = SAME[case]
    for one, two in zip(play(half(body, options))[0], learned(body, {**options, **alone}), strict=True):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=0)


def test_no_two_bodies_are_one_in_disguise(float64):
    """What the test above compares is far apart from body to body."""
    apart = {
        (one, two): float((last_logits(one) - last_logits(two)).abs().max())
        for one, two in combinations(SAME, 2)
        if SAME[one][0] != SAME[two][0]
    }
    assert len(apart) >= 10 and min(apart.values()) > 1e-1, apart


def test_inflora_takes_the_sums_of_all_clients_and_no_client_alone(float64):
    """A_t spans the leading inputs of the pooled records outside of M; so who has which record does not count."""
    one, three = (play(half("inflora", {}), shares) for shares in (1, 3))
    for first, second in zip(one[0], three[0], strict=True):
        torch.testing.assert_close(first, second, atol=1e-10, rtol=0)


def test_inflora_leaves_the_function_alone_where_earlier_inputs_are(float64):
    """W_t x = W_{t-1} x for x in the span of what is protected, and A_t is orthogonal to it."""
    body = half("inflora", {"threshold": 0.8})
    _, states, _ = play(body)
    for before, after in pairwise(states):
        for site in after.adapter.lora_sites():
            M = after.memory[f"continual:bases/{site}/M"].double()
            grown = M.shape[1] - before.memory[f"continual:bases/{site}/M"].shape[1]
            A = after.adapter[f"{site}/A"].double()
            assert grown > 0 and float((A @ M).norm()) < 1e-6 < float(A.norm())
            moved = change(after, site) - change(before, site)
            assert float((moved @ M).norm()) < 1e-6 * float(moved.norm()) and float(moved.norm()) > 1e-3


def moved_by(adapter: AdapterState, draw: torch.Generator) -> AdapterState:
    """The adapter after a random step."""
    return adapter.map(lambda value: value + torch.randn(value.shape, generator=draw))


def change(server: ServerState, site: str) -> Tensor:
    """What the state adds to a layer's weight."""
    adapter = server.adapter
    pair = adapter.sites[site].scaling * adapter[f"{site}/B"].double() @ adapter[f"{site}/A"].double()
    if f"{site}/residual_B" not in adapter:
        return pair
    return pair + adapter[f"{site}/residual_B"].double() @ adapter[f"{site}/residual_A"].double()


def test_merging_is_the_merger_over_the_tasks_own_adapters(float64):
    """The mean of products by hand, from pairs that are put in; and it is not the last task's."""
    body = half("merging", {"method": "running_average"})
    plan = Curriculum(tuple((task,) for task in range(TASKS)), 2)
    strategy = TaskSequence(FedIT(), body, plan, "local", "merging")
    start, products = adapted().state(), []
    server = strategy.initial(start, 0)
    draw = torch.Generator().manual_seed(5)
    for task in range(TASKS):
        server = strategy.begin(server, task, {})
        assert not any(server.adapter.role(key).startswith("residual") for key in server.adapter.tensors)
        assert all(not server.adapter[f"{site}/B"].any() for site in start.lora_sites())
        for _ in range(2):
            moved = moved_by(server.adapter.select(("A", "B", "head")), draw)
            server = replace(strategy.aggregate(server, [Update("client", 1.0, moved)]), round=server.round + 1)
            if server.round % 2:
                view = body.views(server)["online"]
                if task:  # in mid-task what was merged answers, and not the pair in training
                    assert not any(view[f"{site}/B"].any() for site in start.lora_sites())
        products.append(
            {site: start.sites[site].scaling * moved[f"{site}/B"] @ moved[f"{site}/A"] for site in start.lora_sites()}
        )
        for site in start.lora_sites():
            mean = torch.stack([product[site] for product in products]).mean(0)
            torch.testing.assert_close(
                change(replace(server, adapter=body.views(server)["online"]), site), mean, atol=1e-10, rtol=0
            )
            torch.testing.assert_close(change(server, site), mean, atol=1e-10, rtol=0)


def test_a_task_whose_last_round_is_dropped_is_merged_too(float64):
    """`end` after the rounds: the same as after the last one that was aggregated, and only once."""
    body, ends = half("merging", {}), []
    for dropped in (False, True):
        strategy = TaskSequence(FedIT(), body, Curriculum(((0, 1), (2, 3)), 2 if dropped else 1), "local", "merging")
        server = strategy.begin(strategy.initial(adapted().state(), 0), 0, {})
        moved = moved_by(server.adapter.select(("A", "B", "head")), torch.Generator().manual_seed(3))
        server = strategy.aggregate(server, [Update("client", 1.0, moved)])
        assert ("continual:ended" in server.numbers) != dropped
        ends.append(body.end(server, 0))
        assert body.end(ends[-1], 0) is ends[-1]
    assert ends[0].adapter.sha256() == ends[1].adapter.sha256() and ends[0].numbers == ends[1].numbers


@pytest.mark.parametrize("case", sorted(set(SAME) - {"inflora"}))  # which asks clients; it is resumed in a whole run
def test_a_general_half_keeps_nothing_outside_of_the_state(case, float64):
    """Two halves take turns: what one has done the other goes on from, bit for bit."""
    body, options, _ = SAME[case]
    both = [half(body, options) for _ in range(2)]
    states = []
    for halves in (both[:1], both):
        server = ServerState(adapted().state())
        plan = Curriculum(tuple((task,) for task in range(TASKS)), 1)
        draw = torch.Generator().manual_seed(1)
        for task in range(TASKS):
            strategy = TaskSequence(FedIT(), halves[task % len(halves)], plan, "local", body)
            server = strategy.begin(server, task, {})
            moved = moved_by(server.adapter.select(strategy.uploads(server)), draw)
            server = replace(strategy.aggregate(server, [Update("client", 1.0, moved)]), round=task + 1)
        states.append(server)
    assert states[0].adapter.sha256() == states[1].adapter.sha256() and states[0].numbers == states[1].numbers
    one, other = (state.memory for state in states)
    assert one.keys() == other.keys() and bool(one) == (body == "merging")
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_the_general_half_runs_what_has_no_half_of_its_own():
    general = ONE_CLIENT_IS_ONE_LEARNER + REPLAYS_AT_CLIENTS
    assert {type(half(name, {})) for name in general} == {GeneralServerBody}
    assert {body for body, _, _ in SAME.values()} == set(ONE_CLIENT_IS_ONE_LEARNER), "test a new one here"
