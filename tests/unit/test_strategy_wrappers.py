"""Wrappers and offline aggregation on hand-sized numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft.errors import InputError
from fedpeft.state import AdaptedLayer, AdapterState, Needs, ServerState, Update
from fedpeft.strategies import offline
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.wrappers.scaffold import Scaffold
from support.handmade import (
    ADAPTERS,
    SITES,
    WEIGHTS,
    WRAPPERS,
    N,
    R,
    change,
    close,
    exact_mean,
    make,
    random_adapter,
    updates_of,
    uploaded,
)

# Wrappers ------------------------------------------------------------------------------------------------------------


def scalar(value: float, role: str = "B") -> AdapterState:
    tensors = {"q/A": torch.ones(1, 1).double(), "q/B": torch.ones(1, 1).double()}
    return AdapterState(
        {**tensors, f"q/{role}": torch.full((1, 1), value).double()}, {"q": AdaptedLayer("lora", (1, 1))}
    )


def aggregate_scalars(strategy: FederatedStrategy, values: list[float], start: float = 0.0) -> float:
    updates = updates_of([scalar(value) for value in values], [1.0] * len(values))
    return float(strategy.aggregate(ServerState(scalar(start)), updates).adapter["q/B"])


def test_robust_statistics_ignore_an_outlier() -> None:
    values = [1.0, 2.0, 3.0, 5.0, 1e6]
    assert aggregate_scalars(make("fedit", "median"), values) == 3.0
    assert aggregate_scalars(make("fedit", "median"), values[:4]) == 2.5
    assert aggregate_scalars(make("fedit", "trimmed_mean", fraction=0.2), values) == pytest.approx(10 / 3)
    assert aggregate_scalars(make("fedit", "krum"), values) == 2.0
    assert aggregate_scalars(make("fedit", "krum", keep=3), values) == 2.0
    assert aggregate_scalars(make("fedit", "krum", keep=4), values) == 2.75


def test_norm_clip_bounds_every_move() -> None:
    assert aggregate_scalars(
        make("fedit", "norm_clip", bound=2.0), [1.0, 3.0, 90.0, -90.0], start=1.0
    ) == pytest.approx((1 + 3 + 3 - 1) / 4)
    assert aggregate_scalars(make("fedit", "norm_clip"), [1.0, 2.0, 90.0]) == pytest.approx((1 + 2 + 2) / 3)


def test_norm_clip_measures_all_tensors_against_what_each_client_got() -> None:
    strategy = make("hetlora", "norm_clip", ranks={"c0": 1}, bound=1e-3)
    assert strategy.inner.context.client_ranks == {"c0": 1}
    server = ServerState(random_adapter(0))
    moved = strategy.transform(server, updates_of([random_adapter(1, rank=1), random_adapter(2)], [1.0, 1.0]))
    assert [update.adapter.distance(strategy.broadcast(server, update.client)) for update in moved] == pytest.approx(
        [1e-3, 1e-3]
    )


@pytest.mark.parametrize("wrap", ["median", "trimmed_mean", "krum"])
def test_statistics_by_coordinate_refuse_unequal_shapes(wrap: str) -> None:
    adapters = [random_adapter(1, rank=1), *(random_adapter(seed) for seed in range(2, 6))]
    with pytest.raises(InputError, match=r"q/A is \[1, 9\] from c0 and \[3, 9\] from c1"):
        make("hetlora", wrap).aggregate(ServerState(random_adapter(0)), updates_of(adapters, [1.0] * 5))


def test_krum_refuses_too_few_updates() -> None:
    with pytest.raises(InputError, match="at least 5 updates"):
        aggregate_scalars(make("fedit", "krum", byzantine=2), [1.0, 2.0, 3.0, 4.0])
    with pytest.raises(InputError, match=r"fraction=0\.5"):
        type(make("fedit", "trimmed_mean"))(fraction=0.5)


def test_server_optimizers_first_and_second_step_by_hand() -> None:
    def two(name: str) -> list[float]:
        strategy, server, seen = make("fedit", name, lr=0.5, tau=0.1), ServerState(scalar(0.0)), []
        for value in (2.0, 3.0):
            server = strategy.aggregate(server, updates_of([scalar(value), scalar(value)], [1.0, 3.0]))
            seen.append(float(server.adapter["q/B"]))
        return seen

    # First step: Delta = 2; Adam and Yogi m = .2, v = .04; Adagrad m = 2, v = 4.
    x = 0.5 * 0.2 / (0.2 + 0.1)
    delta = 3 - x
    m = 0.9 * 0.2 + 0.1 * delta
    adam = 0.99 * 0.04 + 0.01 * delta**2
    yogi = 0.04 + 0.01 * delta**2
    assert two("fedadam") == pytest.approx([x, x + 0.5 * m / (adam**0.5 + 0.1)])
    assert two("fedyogi") == pytest.approx([x, x + 0.5 * m / (yogi**0.5 + 0.1)])
    y = 0.5 * 2 / (2 + 0.1)
    assert two("fedadagrad") == pytest.approx([y, y + 0.5 * (3 - y) / ((4 + (3 - y) ** 2) ** 0.5 + 0.1)])


@pytest.mark.parametrize("wrap", ["fedadam", "fedyogi", "fedadagrad"])
def test_server_optimizers_move_only_the_active_factor(wrap: str) -> None:
    strategy, server = make("rolora", wrap), ServerState(random_adapter(0))
    for number in range(2):
        server = replace(server, round=number)
        after = strategy.aggregate(server, uploaded(strategy, server, ADAPTERS, WEIGHTS))
        still = "A" if number == 0 else "B"
        assert torch.equal(after.adapter[f"q/{still}"], server.adapter[f"q/{still}"])
        server = after


@pytest.mark.parametrize("wrap", ["scaffold", "fedadam", "fedyogi", "fedadagrad"])
@pytest.mark.parametrize("name", ["fedsvd", "flexlora", "flora", "fedex"])
def test_state_per_coordinate_needs_a_fixed_basis(wrap: str, name: str) -> None:
    with pytest.raises(InputError, match=rf"{wrap}.*{name}.*fedit"):
        make(name, wrap)
    with pytest.raises(InputError, match=name):
        make(name, "median", wrap)


def scaffold_update(
    strategy: FederatedStrategy, server: ServerState, values: dict[str, float], moved: dict[str, float]
) -> list[Update]:
    states = {
        name: scalar(value).beside(
            {"control:q/A": torch.zeros(1, 1).double(), "control:q/B": torch.full((1, 1), moved[name]).double()}
        )
        for name, value in values.items()
    }
    return [Update(name, 1.0, state) for name, state in states.items()]


def test_scaffold_server_step() -> None:
    strategy, server = make("fedit", "scaffold", server_lr=0.5), ServerState(scalar(1.0))
    sent = strategy.broadcast(server, "c0")
    assert sent.extra["control:q/B"].item() == 0.0 and "control:q/B" not in sent
    assert strategy.instructions(server).uploads == ("A", "B", "head")
    assert set(sent.extra) == {"control:q/A", "control:q/B"}
    after = strategy.aggregate(
        server, scaffold_update(strategy, server, {"c0": 3.0, "c1": 5.0}, {"c0": 2.0, "c1": 4.0})
    )
    assert float(after.adapter["q/B"]) == 1 + 0.5 * (4 - 1)
    assert float(strategy.broadcast(after, "c0").extra["control:q/B"]) == pytest.approx(2 / 10 * 3)
    assert "control:q/B" not in after.adapter
    robust = make("fedit", "scaffold", "median")
    merged = robust.aggregate(server, scaffold_update(robust, server, {"c0": 3.0, "c1": 5.0}, {"c0": 2.0, "c1": 4.0}))
    assert float(robust.broadcast(merged, "c0").extra["control:q/B"]) == pytest.approx(2 / 10 * 3)
    with pytest.raises(InputError, match="population"):
        Scaffold().aggregate(server, [])
    with pytest.raises(InputError, match=r"scaffold.*fedsa leaves B, head"):
        make("fedsa", "scaffold")


def test_fedprox_tells_clients_mu_and_leaves_the_rule_alone() -> None:
    strategy, server = make("lora_fair", "fedprox", mu=0.3), ServerState(random_adapter(0))
    assert strategy.client_half(strategy).proximal(None) == 0.3
    own = make("lora_fair").aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter
    assert strategy.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter.sha256() == own.sha256()


def test_wrappers_delegate_and_declare() -> None:
    strategy = make("fedsvd", "fedprox", "median")
    assert strategy.context is strategy.inner.inner.context and strategy.context.population == 10
    assert strategy.trains == ("B", "head") and not strategy.fixed_basis and strategy.needs is Needs.INDIVIDUAL
    assert make("ffa_lora", "fedprox").needs is Needs.SUM and make("flexlora", "fedprox").needs is Needs.INDIVIDUAL
    assert make("hetlora", "fedprox").unequal_ranks and make("flora", "norm_clip").changes_base


# Offline -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora", "fedex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_offline_exact_rules(name: str, dtype: torch.dtype) -> None:
    adapters = [random_adapter(1, dtype=dtype), random_adapter(2, dtype=dtype, scaling=0.5)]
    result, _ = offline.aggregate(make(name), adapters, [1.0, 3.0])
    assert close(change(result), exact_mean(adapters, [1.0, 3.0]), 1e-6 if dtype == torch.float32 else 1e-12)
    assert (
        result.rank("q") == 2 * R
        and set(result.tensors) == {"q/A", "q/B", "head/weight"}
        and result["q/A"].dtype == dtype
    )


def test_offline_fixed_A() -> None:
    shared = [random_adapter(0).replace({"q/B": adapter["q/B"]}) for adapter in ADAPTERS]
    for strategy in (make("ffa_lora"), make("fedsvd", every=7), make("rolora"), make("fedit", "norm_clip", bound=1e9)):
        start = shared[0] if strategy.needs_start else None
        result, _ = offline.aggregate(strategy, shared, WEIGHTS, start)
        assert close(change(result), exact_mean(shared, WEIGHTS))
    A = offline.aggregate(make("fedsvd", every=7), shared, WEIGHTS)[0]["q/A"]
    assert close(A @ A.T, torch.eye(R))
    for name in ("ffa_lora", "fedsvd", "fed_sb"):
        with pytest.raises(InputError, match=f"{name} freezes A.* at q"):
            offline.aggregate(make(name), ADAPTERS)
        with pytest.raises(InputError, match="different A"):
            offline.aggregate(make(name), shared, start=ADAPTERS[1])


def test_offline_rolora_takes_either_common_factor() -> None:
    shared_B = [random_adapter(0).replace({"q/A": adapter["q/A"]}) for adapter in ADAPTERS]
    result, notes = offline.aggregate(make("rolora"), shared_B, WEIGHTS)
    assert close(change(result), exact_mean(shared_B, WEIGHTS)) and "same B" in notes[0]
    with pytest.raises(InputError, match="rolora needs adapters that share one factor"):
        offline.aggregate(make("rolora"), ADAPTERS)


def test_offline_unequal_ranks() -> None:
    adapters = [random_adapter(1, rank=1), random_adapter(2), random_adapter(3, rank=2)]
    for name in ("flora", "flexlora", "hetlora"):
        result, _ = offline.aggregate(make(name), adapters, WEIGHTS)
        assert result.rank("q") == (6 if name == "flora" else R)
    with pytest.raises(InputError, match=r"ranks \[1, 3, 2\].*flora, flexlora, hetlora"):
        offline.aggregate(make("fedit"), adapters)


def test_offline_folds_residuals_and_keeps_what_is_personal_out_of_the_promise() -> None:
    made = make("fedex").aggregate(ServerState(ADAPTERS[0]), updates_of(ADAPTERS, WEIGHTS)).adapter
    result, _ = offline.aggregate(make("flora"), [made, made])
    assert close(change(result), exact_mean(ADAPTERS, WEIGHTS))
    result, notes = offline.aggregate(make("fedsa"), ADAPTERS, WEIGHTS)
    assert "only A is shared" in notes[0] and close(
        result["q/B"], sum(a["q/B"] * w for a, w in zip(ADAPTERS, WEIGHTS, strict=True)) / 8
    )


@pytest.mark.parametrize("name", [*WRAPPERS, "flower"])
def test_offline_rules_that_measure_moves_ask_for_the_start(name: str) -> None:
    strategy = make("flower", rule="FedAdam") if name == "flower" else make("fedit", name)
    adapters = [random_adapter(seed) for seed in range(5)]
    if name == "scaffold":
        with pytest.raises(InputError, match="control variates"):
            offline.aggregate(strategy, adapters)
        return
    if strategy.needs_start:
        with pytest.raises(InputError, match="start"):
            offline.aggregate(strategy, adapters)
    result, _ = offline.aggregate(strategy, adapters, None, adapters[0])
    plain, _ = offline.aggregate(make("fedit"), adapters)
    assert (result.distance(plain) < 1e-12) == (name in ("fedprox", "atp", "fedthe"))


def test_offline_refuses_bad_input() -> None:
    other = AdapterState(
        {key.replace("q", "k"): value for key, value in ADAPTERS[0].tensors.items()},
        {"k": SITES["q"], "head": SITES["head"]},
    )
    wide = AdapterState({**ADAPTERS[0].tensors, "q/A": torch.ones(R, N + 1)}, SITES)
    for adapters, weights, message in (
        ([], None, "no adapters"),
        (ADAPTERS, [1.0, 2.0], "3 positive numbers"),
        (ADAPTERS, [1.0, 0.0, 1.0], "positive"),
        ([ADAPTERS[0], other], None, "missing q/A"),
        ([ADAPTERS[0], wide], None, r"q/A has shape \[3, 10\], expected \[3, 9\]"),
    ):
        with pytest.raises(InputError, match=message):
            offline.aggregate(make("fedit"), adapters, weights)
