"""Bodies on the server in float64: what each promises of a task, checked on products.

The federation is made up (`dense.py`): clients move by random steps, so a guarantee cannot hold by luck of training.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpeft.config import ContinualConfig
from fedpeft.continual.curriculum import Curriculum
from fedpeft.continual.parts.subspace import sketch
from fedpeft.errors import InputError
from fedpeft.state import RunContext, Update
from fedpeft.strategies.sequence.base import NEW
from fedpeft.strategies.sequence.build import make_body
from fedpeft.strategies.sequence.sequence import TaskSequence
from support import dense

SHAPES = {"u": (12, 14), "v": (13, 12)}
WEIGHTS = [10.0, 30.0, 20.0, 5.0, 15.0]
TASKS, ROUNDS, RANK = 3, 3, 3
EXACT = 1e-10
DENSE = {"fedsvd": {"transport": "dense"}, "ffa_lora": {"transport": "dense"}}


def learning(body, rule="ffa_lora", rounds=ROUNDS, compete="local", wrap=None, **options):
    """A body around a strategy, with TASKS tasks of one class."""
    inner = dense.make(rule, context=RunContext(population=len(WEIGHTS)), **DENSE.get(rule, {}))
    inner = inner if wrap is None else dense.make(wrap, inner=inner)
    made = make_body(ContinualConfig(body=body, options=options))
    return TaskSequence(inner, made, Curriculum(tuple((task,) for task in range(TASKS)), rounds), compete, body)


def sequence(strategy, start, sketches=None, tasks=TASKS):
    """Of each task: the state before it began, the state in which it began, its rounds."""
    server = strategy.initial(start, 0)
    for task in range(tasks):
        ended = server
        began = server = strategy.begin(ended, task, {} if sketches is None else {NEW: sketches(task)})
        played = []
        for _ in range(strategy.curriculum.rounds):
            played.append(dense.play(strategy, server, began.adapter, WEIGHTS))
            server = played[-1].server
        yield ended, began, played


def kept(server, what):
    """What a body keeps, by site."""
    ending = f"|{what}"
    return {
        key.removeprefix("continual:").removesuffix(ending): dense_array(value)
        for key, value in server.memory.items()
        if key.endswith(ending)
    }


def dense_array(value):
    return value.double().numpy()


def span(*parts):
    """Orthonormal columns that span all columns of the parts."""
    U, S, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
    return U[:, S / S[0] > 1e-9]


def share(projected, whole):
    return np.linalg.norm(projected) / np.linalg.norm(whole)


# factor_coso ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["fedsvd", "ffa_lora", "fedit"])
@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_factor_coso_leaves_what_earlier_tasks_rely_on(rule, side):
    """The protected spaces are recomputed here from the factors that each task ended with, not read from the body."""
    strategy = learning("factor_coso", rule, side=side, **({} if side == "in" else {"energy": 1.0}))
    rows = {site: np.zeros((n, 0)) for site, (_, n) in SHAPES.items()}
    columns = {site: np.zeros((m, 0)) for site, (m, _) in SHAPES.items()}
    for _, began, played in sequence(strategy, dense.fresh(RANK, shapes=SHAPES)):
        for site in SHAPES:
            before = dense.effective(began.adapter, site)
            for done in played:
                change = dense.effective(done.server.adapter, site) - before
                assert np.linalg.norm(change) > 0.1
                if side != "out":
                    assert share(change @ rows[site], change) <= EXACT
                    A = dense.array(done.sent.adapter[f"{site}/A"])
                    np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-12)
                if side != "in":
                    assert share(columns[site].T @ change, change) <= EXACT
            last = played[-1].server.adapter
            rows[site] = span(rows[site], dense.array(last[f"{site}/A"]).T)
            columns[site] = span(columns[site], dense.array(last[f"{site}/B"]))
    widest = rows if side != "out" else columns
    assert all(widest[site].shape[1] == TASKS * RANK for site in SHAPES)


@pytest.mark.parametrize("rule", ["fedsvd", "ffa_lora"])
def test_plain_training_would_not(rule):
    """The same federation, updates and checks with nothing done against forgetting."""
    first, second, _ = sequence(learning("sequential", rule), dense.fresh(RANK, shapes=SHAPES))
    for site in SHAPES:
        old = first[2][-1].server.adapter
        change = dense.effective(second[2][-1].server.adapter, site) - dense.effective(old, site)
        assert share(change @ span(dense.array(old[f"{site}/A"]).T), change) > 0.9
        assert share(span(dense.array(old[f"{site}/B"])).T @ change, change) > 0.2


@pytest.mark.parametrize(
    "body, rule, options",
    [
        ("factor_coso", "fedsvd", {"side": "in"}),
        ("factor_coso", "fedsvd", {"side": "both"}),
        ("factor_coso", "ffa_lora", {"side": "out"}),
        ("coso", "fedit", {"basis": "random", "side": "out"}),
    ],
)
def test_beginning_a_task_changes_no_function(body, rule, options):
    """What was learned moves into the base; B A starts at zero; later tasks add to the same base."""
    strategy = learning(body, rule, **options)
    for task, (ended, began, played) in enumerate(sequence(strategy, dense.fresh(RANK, shapes=SHAPES))):
        for site in SHAPES:
            assert np.linalg.norm(dense.product(began.adapter, site)) == 0
            if task > 0:
                assert dense.relative(dense.base(began.adapter, site), dense.effective(ended.adapter, site)) < 1e-13
            for before, done in zip([began, *(one.server for one in played)], played, strict=False):
                again = dense.effective(done.sent.adapter, site)  # FedSVD has refactored
                assert np.linalg.norm(again - dense.effective(before.adapter, site)) < 1e-12


@pytest.mark.parametrize(
    ("body", "wrap", "options"),
    [
        ("factor_coso", "fedadam", {"side": "in"}),
        ("merging", "fedyogi", {}),
        ("coso", "fedadagrad", {"basis": "random", "side": "in"}),
    ],
)
def test_a_server_optimizer_begins_anew_where_the_factors_do(body, wrap, options):
    """Moments of the last task's factors would push the new ones along directions that mean something else in them."""
    strategy = learning(body, "fedit", wrap=wrap, **options)
    for task, (ended, began, (first, *_)) in enumerate(sequence(strategy, dense.fresh(RANK, shapes=SHAPES))):
        assert any(key.startswith(f"{wrap}/") for key in ended.memory) == (task > 0)
        bodys = {key: value for key, value in began.memory.items() if key.startswith("continual:")}
        alone = dense.play(strategy, replace(began, memory=bodys), began.adapter, WEIGHTS).server.adapter
        assert all(torch.equal(first.server.adapter[key], value) for key, value in alone.tensors.items())


@pytest.mark.parametrize("rule", ["fedsvd", "ffa_lora", "fedit"])
def test_factor_coso_uploads_B_and_the_head_alone(rule):
    """The docstring: A is frozen within a task, and uploads are B (and the head)."""
    for _, began, played in sequence(learning("factor_coso", rule), dense.fresh(RANK, shapes=SHAPES)):
        for done in played:
            for update in done.updates:
                assert {update.adapter.role(key) for key in update.adapter.tensors} == {"B", "head"}
        assert {began.adapter.role(key) for key in began.adapter.tensors} >= {"A", "B", "head"}


def test_factor_coso_protects_the_leading_columns_of_B():
    """sigma^2 of B: 16, 4, 1 of 21. A share of 0.98 keeps two (20 / 21 = 0.952), one of 0.9 keeps one (0.762)."""
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 3)))[0]
    for energy, width in [(0.98, 2), (0.9, 1), (1.0, 3)]:
        strategy = learning("factor_coso", side="out", energy=energy)
        start = dense.fresh(RANK, shapes={"u": (12, 14)})
        server = strategy.begin(strategy.initial(start, 0), 0, {})
        moved = server.adapter.replace({"u/B": torch.tensor(U * [4.0, 2.0, 1.0])})
        M = kept(strategy.begin(replace(server, adapter=moved, round=ROUNDS), 1, {}), "M")["u"]
        np.testing.assert_allclose(M @ M.T, U[:, :width] @ U[:, :width].T, atol=1e-12)


def test_factor_coso_refuses_tasks_that_have_no_room_before_the_first():
    """Seven inputs and rank 3 hold two tasks, not three; nine hold three; outputs have no such bound."""
    cases = [((9, 7), "in", False), ((9, 7), "both", False), ((9, 9), "in", True), ((9, 7), "out", True)]
    for shape, side, fits in cases:
        strategy = learning("factor_coso", side=side)
        adapter = dense.fresh(RANK, shapes={"u": shape})
        if fits:
            strategy.initial(adapter, 0)
            continue
        with pytest.raises(InputError, match=r"3 tasks of rank 3 need 9 orthogonal rows, but u has 7 inputs\. Lower"):
            strategy.initial(adapter, 0)


# coso -----------------------------------------------------------------------------------------------------------------


def sketches_of(side, columns=5, spread=0.3):
    """Made-up sketches by task, singular values falling by `spread`."""

    def give(task):
        random = np.random.default_rng(70 + task)
        sizes = {site: shape[0 if side == "out" else 1] for site, shape in SHAPES.items()}
        return {
            site: torch.tensor(np.linalg.qr(random.standard_normal((size, columns)))[0] * spread ** np.arange(columns))
            for site, size in sizes.items()
        }

    return give


@pytest.mark.parametrize("side, rule", [("in", "fedit"), ("in", "ffa_lora"), ("in", "fedsvd"), ("out", "fedit")])
def test_coso_learns_coefficients_in_a_protected_subspace(side, rule):
    strategy = learning("coso", rule, side=side, eps_th=0.999)
    given, M = (
        sketches_of(side),
        {site: np.zeros((shape[0 if side == "out" else 1], 0)) for site, shape in SHAPES.items()},
    )
    for task, (_, began, played) in enumerate(sequence(strategy, dense.fresh(RANK, shapes=SHAPES), given)):
        for site in SHAPES:
            if task > 0:  # M is orthonormal, holds the old M and what leads in the last task's sketch outside of it
                S = dense.array(given(task - 1)[site])
                U, sigma, _ = np.linalg.svd(S - M[site] @ (M[site].T @ S), full_matrices=False)
                wide = kept(began, "M")[site]
                np.testing.assert_allclose(wide.T @ wide, np.eye(wide.shape[1]), atol=1e-12)
                keep = np.cumsum(sigma**2) <= 0.999 * np.sum(sigma**2)
                wanted = span(M[site], U[:, keep])
                np.testing.assert_allclose(wide @ wide.T, wanted @ wanted.T, atol=1e-10)
                M[site] = wide
            B, A = dense.array(began.adapter[f"{site}/B"]), dense.array(began.adapter[f"{site}/A"])
            P = B if side == "out" else A.T
            np.testing.assert_allclose(P.T @ P, np.eye(RANK), atol=1e-12)
            assert np.linalg.norm(M[site].T @ P) < 1e-12
            left = dense.array(given(task)[site])
            U = np.linalg.svd(left - M[site] @ (M[site].T @ left))[0][:, :RANK]
            np.testing.assert_allclose(P @ P.T, U @ U.T, atol=1e-9)
            before = dense.effective(began.adapter, site)
            for done in played:
                after = dense.effective(done.server.adapter, site)
                change = after - before
                assert share(M[site].T @ change if side == "out" else change @ M[site], change) <= EXACT
                whole = dense.mean(
                    [dense.effective(model, site) for model in done.models.values()], dense.fractions(WEIGHTS)
                )
                assert dense.relative(after, whole) < 1e-12
    assert all(M[site].shape[1] > RANK for site in SHAPES)


def test_coso_fills_up_where_the_sketch_has_too_few_directions():
    """One real direction of a zero-padded sketch: it is in P, the others are drawn, and all stay orthonormal."""
    strategy = learning("coso", "fedit", side="in")
    one = {site: torch.eye(n, 1, dtype=torch.float64) for site, (_, n) in SHAPES.items()}
    given = {site: torch.cat([value, value.new_zeros(len(value), 4)], dim=1) for site, value in one.items()}
    server = strategy.initial(dense.fresh(RANK, shapes=SHAPES), 0)
    made = [strategy.begin(server, 0, {NEW: given}) for _ in range(2)]
    for site in SHAPES:
        A = dense.array(made[0].adapter[f"{site}/A"])
        np.testing.assert_allclose(A @ A.T, np.eye(RANK), atol=1e-12)
        np.testing.assert_allclose(np.abs(A[0, 0]), 1.0, atol=1e-12)
        assert torch.equal(made[0].adapter[f"{site}/A"], made[1].adapter[f"{site}/A"])


@pytest.mark.parametrize("side", ["in", "out"])
def test_coso_with_a_random_basis_needs_no_sketch_and_protects_earlier_ones(side):
    strategy = learning("coso", "fedit", side=side, basis="random")
    assert not strategy.body.sketches and learning("coso", "fedit").body.sketches
    seen = {site: [] for site in SHAPES}
    for _, began, played in sequence(strategy, dense.fresh(RANK, shapes=SHAPES)):
        for site in SHAPES:
            B, A = dense.array(began.adapter[f"{site}/B"]), dense.array(began.adapter[f"{site}/A"])
            P = B if side == "out" else A.T
            assert all(np.linalg.norm(P.T @ other) < 1e-12 for other in seen[site])
            seen[site].append(P)
            frozen = "B" if side == "out" else "A"
            assert all(
                torch.equal(done.server.adapter[f"{site}/{frozen}"], began.adapter[f"{site}/{frozen}"])
                for done in played
            )


def test_a_merged_sketch_obeys_the_summed_bound():
    """0 <= C - S S^T <= sum_k p_k (deltas of k + what k's truncation to r2 columns dropped) + delta of the merge."""
    random, r2, sketches, C, bound = np.random.default_rng(3), 4, [], np.zeros((11, 11)), 0.0
    p = np.array(WEIGHTS) / sum(WEIGHTS)
    for weight in p:
        S = torch.zeros(11, r2, dtype=torch.float64)
        for _ in range(6):
            G = random.standard_normal((11, 9)) * 0.6 ** np.arange(9)
            U, sigma, _ = np.linalg.svd(G, full_matrices=False)
            C, bound = C + weight * G @ G.T, bound + weight * sigma[r2] ** 2
            S, delta = sketch(S, torch.tensor(U[:, :r2] * sigma[:r2]))
            bound += weight * delta
        sketches.append(S)
    S = make_body(ContinualConfig(body="coso")).merge_sketches([{"u": one} for one in sketches], WEIGHTS)["u"]
    assert S.shape == (11, r2)
    stacked = np.hstack([np.sqrt(weight) * one.numpy() for weight, one in zip(p, sketches, strict=True)])
    bound += np.linalg.svd(stacked, compute_uv=False)[r2] ** 2
    left = np.linalg.eigvalsh(C - (S @ S.T).numpy())
    assert left[0] >= -1e-9 * left[-1] and left[-1] <= bound * (1 + 1e-12)
    assert left[-1] < 0.9 * np.linalg.eigvalsh(C)[-1], "a sketch of nothing would obey it too"


# lae ------------------------------------------------------------------------------------------------------------------


def test_lae_averages_over_rounds_in_closed_form():
    """theta' = a^S theta_start + sum_s a^(S-s) (1 - a) theta_s, a^rounds = retention; none in task 0."""
    strategy, past, apart = learning("lae", "fedit", retention=0.5, frozen_rounds=1), [], 0.0
    first, a = None, 0.5 ** (1 / ROUNDS)
    for task, (ended, _, played) in enumerate(sequence(strategy, dense.fresh(RANK, shapes=SHAPES))):
        for done in played:
            views = strategy.body.views(done.server)
            assert views["online"] is done.server.adapter and set(views) == {"online", *(["offline"] * (task > 0))}
            if task == 0:
                continue
            first = first or ended.adapter
            past.append(done.server.adapter)
            for key in ("u/A", "u/B", "v/A", "v/B"):
                expected = a ** len(past) * first[key] + sum(
                    a ** (len(past) - s) * (1 - a) * value[key] for s, value in enumerate(past, start=1)
                )
                torch.testing.assert_close(views["offline"][key], expected, atol=1e-12, rtol=0)
                apart = float((views["offline"][key] - views["online"][key]).norm())
            assert torch.equal(views["offline"]["out/weight"], views["online"]["out/weight"])
    assert len(past) == 2 * ROUNDS and apart > 0.01


@pytest.mark.parametrize("rule", ["fedit", "ffa_lora", "lora_fair", "rolora"])
def test_lae_trains_the_head_alone_in_frozen_rounds(rule):
    strategy = learning("lae", rule, frozen_rounds=1)
    for task, (_, began, played) in enumerate(sequence(strategy, dense.fresh(RANK, shapes=SHAPES))):
        before = began.adapter
        for number, done in enumerate(played):
            frozen = task > 0 and number == 0
            assert (strategy.trained(done.sent) == ("head",)) == frozen
            roles = {update.adapter.role(key) for update in done.updates for key in update.adapter.tensors}
            assert (roles == {"head"}) == frozen
            moved = {key for key, value in before.tensors.items() if not torch.equal(value, done.server.adapter[key])}
            assert "out/weight" in moved and (moved == {"out/weight"}) == frozen
            mean = dense.mean([model["out/weight"] for model in done.models.values()], dense.fractions(WEIGHTS))
            np.testing.assert_allclose(dense.array(done.server.adapter["out/weight"]), mean, atol=1e-12)
            before = done.server.adapter


def test_what_travels_beside_reaches_the_strategy_inside_in_frozen_rounds_too():
    strategy, frozen = learning("lae", "fedit", wrap="atp", frozen_rounds=1), 0
    for _, _, played in sequence(strategy, dense.fresh(RANK, shapes=SHAPES)):
        for done in played:
            frozen += strategy.trained(done.sent) == ("head",)
            for key in ("rates:u/A", "rates:out/weight"):
                mean = dense.mean([update.adapter.extra[key] for update in done.updates], dense.fractions(WEIGHTS))
                np.testing.assert_allclose(dense.array(done.server.memory[key]), mean, atol=1e-12)
    assert frozen


@pytest.mark.parametrize("wrap", ["median", "trimmed_mean"])
def test_a_wrapper_counts_in_frozen_rounds_too(wrap):
    """A robust rule must hold off one hostile head, and what rides beside an update must not become the adapter."""
    strategy = learning("lae", "fedit", wrap=wrap, frozen_rounds=1)
    start = dense.fresh(RANK, shapes=SHAPES)
    server = replace(strategy.initial(start, 0), round=ROUNDS)
    server = strategy.before_round(strategy.begin(server, 1, {}))
    done = dense.play(strategy, server, server.adapter, WEIGHTS)
    assert strategy.trained(server) == ("head",)
    assert set(done.server.adapter.tensors) == set(start.tensors)
    hostile = [*done.updates[:-1], Update("c4", 15.0, done.updates[-1].adapter.map(lambda value: value + 1e6))]
    after = strategy.aggregate(done.sent, hostile).adapter["out/weight"]
    assert float((after - start["out/weight"]).abs().max()) < 10


def test_lae_needs_coordinates_that_mean_the_same_in_every_round():
    """An average of factors over rounds is none of products where every round turns the factors, or moves the base."""
    for rule in ("fedsvd", "flora", "fedex"):
        with pytest.raises(InputError, match=rf"lae.*{rule}|{rule}.*lae"):
            learning("lae", rule)


def test_lae_takes_the_larger_probability():
    body = make_body(ContinualConfig(body="lae"))
    one, two = torch.tensor([[2.0, 0.0, -torch.inf]]), torch.tensor([[0.0, 1.0, -torch.inf]])
    p, q = np.exp([2, 0]) / (np.exp(2) + 1), np.exp([0, 1]) / (1 + np.e)
    np.testing.assert_allclose(body.combine({"online": one, "offline": two})[0], [*np.maximum(p, q), 0], atol=1e-6)
    assert float(body.combine({"online": one, "offline": two}).sum()) > 1.3
