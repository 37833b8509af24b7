"""Each strategy on hand-sized numbers or against a dense float64 reference; what tells it apart from FedAvg."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedpeft import registry
from fedpeft.adapters.flat import flat
from fedpeft.config import options_of
from fedpeft.errors import InputError
from fedpeft.state import AdapterState, Site
from fedpeft.strategies import offline
from fedpeft.strategies.base import FederatedStrategy, Needs, ServerState, Update
from fedpeft.strategies.build import named

M, N, R, S = 7, 9, 3, 2.0
SITES = {"q": Site("lora", (M, N), S), "head": Site("head", (2,))}
RULES = (
    "fedit",
    "ffa_lora",
    "fedsvd",
    "lora_fair",
    "flora",
    "flexlora",
    "hetlora",
    "fedex",
    "rolora",
    "fedsa",
    "flower",
)
WRAPPERS = ("fedprox", "scaffold", "fedadam", "fedyogi", "fedadagrad", "norm_clip", "trimmed_mean", "median", "krum")


def make(name: str, *wraps: str, **options: object) -> FederatedStrategy:
    strategy = named(name, {}, "strategy") if wraps else named(name, options, "strategy")
    for index, wrap in enumerate(wraps):
        strategy = named(wrap, options if index == len(wraps) - 1 else {}, "strategy.wrap", inner=strategy)
    strategy.population = 10
    return strategy


def random_adapter(
    seed: int, rank: int = R, dtype: torch.dtype = torch.float64, scaling: float = S, B_zero: bool = False
) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "q/A": torch.randn(rank, N, generator=generator, dtype=torch.float64),
        "q/B": torch.randn(M, rank, generator=generator, dtype=torch.float64) * (not B_zero),
        "head/weight": torch.randn(2, generator=generator, dtype=torch.float64),
    }
    return AdapterState(
        {key: value.to(dtype) for key, value in tensors.items()}, {**SITES, "q": Site("lora", (M, N), scaling)}
    )


def updates_of(adapters: list[AdapterState], weights: list[float]) -> list[Update]:
    return [
        Update(f"c{index}", weight, adapter, {"train_loss": 1.0 + index})
        for index, (adapter, weight) in enumerate(zip(adapters, weights, strict=True))
    ]


def uploaded(
    strategy: FederatedStrategy, server: ServerState, adapters: list[AdapterState], weights: list[float]
) -> list[Update]:
    """What clients that trained to these adapters send: uploaded roles only, frozen ones as they were."""
    return updates_of([adapter.select(strategy.uploads(server)) for adapter in adapters], weights)


def change(adapter: AdapterState) -> Tensor:
    """Dense change of the weight at q, residual included."""
    total = adapter.sites["q"].scaling * adapter["q/B"].double() @ adapter["q/A"].double()
    if "q/residual_B" in adapter:
        total = total + adapter["q/residual_B"].double() @ adapter["q/residual_A"].double()
    return total


def exact_mean(adapters: list[AdapterState], weights: list[float]) -> Tensor:
    return sum(change(adapter) * weight for adapter, weight in zip(adapters, weights, strict=True)) / sum(weights)


def close(given: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((given.double() - wanted.double()).norm() <= tolerance * max(1.0, float(wanted.norm())))


ADAPTERS = [random_adapter(seed) for seed in (1, 2, 3)]
WEIGHTS = [1.0, 2.0, 5.0]


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_registered_classes_declare_what_they_are(name: str) -> None:
    cls = registry.load("strategies", name)
    assert cls.paper and isinstance(cls.needs, Needs) and cls.__doc__
    assert cls.wraps == (name in WRAPPERS)
    strategy = named(name, {}, "strategy")
    for option, item in options_of(cls).items():
        assert getattr(strategy, item.name) is not None or option == "bound"
        assert item.metadata["help"]


# What each rule computes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flora", "fedex"])
def test_exact_rules_keep_the_effective_weight(name: str) -> None:
    strategy = make(name)
    server = strategy.initial(random_adapter(0), seed=5)
    wanted = torch.zeros(M, N, dtype=torch.float64)
    for number in range(3):  # the third round stacks past min(m, n) and is compressed
        adapters = [random_adapter(10 * number + index) for index in range(3)]
        base = wanted
        server = replace(strategy.aggregate(server, uploaded(strategy, server, adapters, WEIGHTS)), round=number + 1)
        residual = change(server.adapter) - S * server.adapter["q/B"] @ server.adapter["q/A"]
        assert close(change(server.adapter), base + exact_mean(adapters, WEIGHTS))
        wanted = residual
        assert server.adapter["q/residual_B"].shape[1] <= min(M, N)
        assert server.adapter.rank("q") == R


def test_flora_starts_every_round_from_a_fresh_seeded_A() -> None:
    strategy = make("flora")

    def after(seed: int, number: int) -> AdapterState:
        server = replace(strategy.initial(random_adapter(0), seed), round=number)
        return strategy.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter

    one = after(5, 0)
    assert not one["q/B"].any() and torch.equal(one["q/A"], after(5, 0)["q/A"])
    assert not torch.equal(one["q/A"], after(6, 0)["q/A"]) and not torch.equal(one["q/A"], after(5, 1)["q/A"])
    assert one["q/A"].abs().max() <= N**-0.5


def test_flora_scales_one_factor_only() -> None:
    B, A = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[2.0, 0.0]]).double()
    adapter = AdapterState({"q/A": A, "q/B": B}, {"q": Site("lora", (2, 2))})
    after = (
        make("flora")
        .aggregate(ServerState(adapter, numbers={"seed": 0}), updates_of([adapter, adapter], [1.0, 1.0]))
        .adapter
    )
    assert (after["q/residual_B"] @ after["q/residual_A"]).tolist() == [[2.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("name", ["ffa_lora", "fedsvd"])
def test_frozen_A_is_exact_and_never_uploaded(name: str) -> None:
    strategy = make(name)
    server = strategy.initial(random_adapter(0), seed=0)
    trained = [
        server.adapter.replace({"q/B": adapter["q/B"], "head/weight": adapter["head/weight"]}) for adapter in ADAPTERS
    ]
    updates = uploaded(strategy, server, trained, WEIGHTS)
    assert "q/A" not in updates[0].adapter
    after = strategy.before_round(replace(strategy.aggregate(server, updates), round=1))
    assert close(change(after.adapter), exact_mean(trained, WEIGHTS))
    assert close(
        after.adapter["head/weight"], sum(a["head/weight"] * w for a, w in zip(ADAPTERS, WEIGHTS, strict=True)) / 8
    )


@pytest.mark.parametrize(("name", "seedlike"), [("ffa_lora", "seed"), ("fedsvd", "core")])
def test_clients_can_check_the_A_they_draw(name: str, seedlike: str) -> None:
    fresh = random_adapter(0, dtype=torch.float32)
    strategy = make(name, init="orthonormal", transport=seedlike)
    server = strategy.initial(fresh, seed=0)
    drawn = strategy.initial(fresh, seed=0).adapter.select(("A",))
    assert strategy.task(server)["static"] == {"roles": ["A"], "sha256": drawn.sha256()}
    assert "q/A" not in strategy.broadcast(server, "c0")
    assert close(drawn["q/A"].double() @ drawn["q/A"].double().T, torch.eye(R), 1e-6)
    dense = make(name, transport="dense")
    server = dense.initial(fresh, seed=0)
    assert torch.equal(dense.broadcast(server, "c0")["q/A"], fresh["q/A"]) and "static" not in dense.task(server)


def test_orthonormal_rows_span_the_draw_and_refuse_a_rank_above_the_inputs() -> None:
    A = random_adapter(0)["q/A"]
    Q = make("ffa_lora", init="orthonormal").initial(random_adapter(0), seed=0).adapter["q/A"]
    assert close(Q @ Q.T, torch.eye(R)) and close(A @ Q.T @ Q, A)
    with pytest.raises(InputError, match="rank 12, but only 9 inputs"):
        make("ffa_lora", init="orthonormal").initial(random_adapter(0, rank=12), seed=0)


def test_fedsvd_core_gives_clients_the_servers_A_bit_for_bit() -> None:
    strategy = make("fedsvd")
    server = strategy.initial(random_adapter(0, dtype=torch.float32), seed=0)
    first = server.adapter["q/A"].clone()
    for number in range(1, 4):
        trained = [
            server.adapter.replace({"q/B": random_adapter(10 * number + k, dtype=torch.float32)["q/B"]})
            for k in range(3)
        ]
        server = replace(strategy.aggregate(server, uploaded(strategy, server, trained, WEIGHTS)), round=number)
        before, server = server, strategy.before_round(server)
        sent = strategy.broadcast(server, "c0")
        assert torch.equal((sent["q/M"].double() @ first.double()).to(first.dtype), server.adapter["q/A"])
        assert sent["q/M"].dtype == torch.float32 and sent.role("q/M") == "M"
        assert close(change(server.adapter), change(before.adapter), 5e-6)
        assert close(server.adapter["q/A"].double() @ server.adapter["q/A"].double().T, torch.eye(R), 1e-6)
        gram = server.adapter["q/B"].double().T @ server.adapter["q/B"].double()
        assert close(gram, gram.diag().diag(), 1e-5) and bool((gram.diag().diff() <= 0).all())
        assert (
            strategy.task(server)["static"]
            == strategy.task(strategy.initial(random_adapter(0, dtype=torch.float32), 0))["static"]
        )


def test_fedsvd_leaves_a_zero_B_alone_and_refactors_only_every_k_rounds() -> None:
    strategy = make("fedsvd", every=2)
    start = strategy.initial(random_adapter(0, B_zero=True), seed=0)
    assert strategy.before_round(start).adapter.sha256() == start.adapter.sha256()
    server = replace(start.with_tensors({"q/B": ADAPTERS[0]["q/B"]}), round=1)
    assert strategy.before_round(server) is server
    assert not torch.equal(strategy.before_round(replace(server, round=2)).adapter["q/A"], server.adapter["q/A"])


@pytest.mark.parametrize("rank", [8, 11])  # above the outputs, above both sizes
def test_fedsvd_keeps_shapes_at_ranks_above_the_layer(rank: int) -> None:
    server = make("fedsvd").initial(random_adapter(0, rank=rank), seed=0)
    after = make("fedsvd").before_round(server)
    A = after.adapter["q/A"]
    server.adapter.require_same_form(after.adapter, "refactored")
    assert close(change(after.adapter), change(server.adapter), 1e-10)
    assert close(A @ A.T, torch.diag((torch.arange(rank) < N).double()), 1e-10)


def test_fedsvd_sqrt_split_shares_the_singular_values() -> None:
    server = make("fedsvd", split="sqrt").before_round(make("fedsvd").initial(ADAPTERS[0], seed=0))
    A, B = server.adapter["q/A"], server.adapter["q/B"]
    assert close(A @ A.T, B.T @ B, 1e-10) and close(change(server.adapter), change(ADAPTERS[0]), 1e-10)


def test_lora_fair_lies_between_the_exact_mean_and_fedit() -> None:
    wanted, server = exact_mean(ADAPTERS, WEIGHTS), ServerState(ADAPTERS[0])

    def error(strategy: FederatedStrategy) -> float:
        return float((change(strategy.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter) - wanted).norm())

    errors = [error(make("lora_fair", **{"lambda": value})) for value in (0.0, 0.1, 10.0, 1e12)]
    assert errors == sorted(errors) and errors[0] < errors[1] < errors[2]
    assert errors[3] == pytest.approx(error(make("fedit")))
    assert error(make("flexlora")) < errors[0]
    A = make("fedit").aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter["q/A"]
    assert errors[0] == pytest.approx(float((wanted @ (torch.eye(N).double() - torch.linalg.pinv(A) @ A)).norm()))


def test_lora_fair_cosine_reaches_the_best_direction_and_stays_put_at_zero() -> None:
    wanted, server = exact_mean(ADAPTERS, WEIGHTS), ServerState(ADAPTERS[0])
    after = (
        make("lora_fair", **{"lambda": 0.0}, solver="cosine", steps=3000, lr=0.3)
        .aggregate(server, updates_of(ADAPTERS, WEIGHTS))
        .adapter
    )
    A = after["q/A"]
    best = float((wanted @ torch.linalg.pinv(A) @ A).norm() / wanted.norm())
    assert float((change(after) * wanted).sum() / change(after).norm() / wanted.norm()) == pytest.approx(best, abs=1e-4)
    zeros = [random_adapter(seed, B_zero=True) for seed in (1, 2)]
    assert not make("lora_fair", solver="cosine").aggregate(server, updates_of(zeros, [1.0, 1.0])).adapter["q/B"].any()


def test_flexlora_is_the_best_approximation_and_its_prefixes_too() -> None:
    adapters = [random_adapter(1, rank=1), random_adapter(2, rank=2), random_adapter(3)]
    strategy = make("flexlora")
    strategy.client_ranks = {"c0": 1, "c1": 2}
    server = strategy.aggregate(ServerState(random_adapter(0)), updates_of(adapters, WEIGHTS))
    U, sigma, Vt = torch.linalg.svd(exact_mean(adapters, WEIGHTS))
    for client, rank in (("c0", 1), ("c1", 2), ("c2", R)):
        sent = strategy.broadcast(server, client)
        assert sent.rank("q") == rank and close(change(sent), (U[:, :rank] * sigma[:rank]) @ Vt[:rank], 1e-10)


@pytest.mark.parametrize(("name", "split"), [("flexlora", "us"), ("flexlora", "sqrt"), ("hetlora", None)])
def test_no_direction_dies_when_only_low_ranks_take_part(name: str, split: str | None) -> None:
    strategy = make(name, **({"split": split} if split else {}))
    start = random_adapter(0)
    after = strategy.aggregate(ServerState(start), updates_of([random_adapter(1, rank=1)], [1.0])).adapter
    assert close(change(after), change(random_adapter(1, rank=1)), 1e-10)
    assert torch.equal(after["q/A"][1:], start["q/A"][1:]) and not after["q/B"][:, 1:].any()


def test_hetlora_weighs_by_norm_and_pads() -> None:
    B1, A1 = torch.tensor([[3.0], [0.0]]).double(), torch.tensor([[1.0, 0.0]]).double()
    B2, A2 = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).double(), torch.tensor([[0.0, 1.0], [5.0, 5.0]]).double()
    sites = {"q": Site("lora", (2, 2))}
    server = ServerState(AdapterState({"q/A": A2, "q/B": B2}, sites))
    updates = updates_of(
        [AdapterState({"q/A": A1, "q/B": B1}, sites), AdapterState({"q/A": A2, "q/B": B2}, sites)], [1.0, 99.0]
    )
    after = (
        make("hetlora").aggregate(server, updates).adapter
    )  # norms 3 and 1, so weights 3/4 and 1/4 whatever the examples
    assert after["q/B"].tolist() == [[2.25, 0.0], [0.25, 0.0]]
    assert after["q/A"].tolist() == [[0.75, 0.25], [1.25, 1.25]]
    zero = updates_of([update.adapter.replace({"q/B": update.adapter["q/B"] * 0}) for update in updates], [1.0, 3.0])
    assert make("hetlora").aggregate(server, zero).adapter["q/A"].tolist() == [[0.25, 0.75], [3.75, 3.75]]


def test_rolora_alternates_and_moves_only_the_active_factor() -> None:
    strategy = make("rolora")
    server = strategy.initial(random_adapter(0), seed=0)
    assert strategy.uploads(server) == ("B", "head") and make("rolora", first="A").uploads(server) == ("A", "head")
    for number, (active, other) in enumerate((("B", "A"), ("A", "B"), ("B", "A"))):
        server = replace(server, round=number)
        trained = [server.adapter.replace(adapter.select((active, "head"))) for adapter in ADAPTERS]
        after = strategy.aggregate(server, uploaded(strategy, server, trained, WEIGHTS))
        assert torch.equal(after.adapter[f"q/{other}"], server.adapter[f"q/{other}"])
        assert close(change(after.adapter), exact_mean(trained, WEIGHTS))
        server = after


def test_fedsa_shares_A_only() -> None:
    strategy = make("fedsa")
    server = ServerState(random_adapter(0))
    assert list(strategy.broadcast(server, "c0").tensors) == ["q/A"] and strategy.uploads(server) == ("A",)
    after = strategy.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter
    assert close(after["q/A"], sum(a["q/A"] * w for a, w in zip(ADAPTERS, WEIGHTS, strict=True)) / 8)
    assert torch.equal(after["q/B"], server.adapter["q/B"])


def test_fed_sb_averages_the_core() -> None:
    cores = [torch.randn(R, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]
    start = AdapterState(
        {**random_adapter(0).tensors, "q/R": torch.zeros(R, R, dtype=torch.float64)},
        {**SITES, "q": Site("lora_sb", (M, N), S)},
    )
    strategy = make("fed_sb")
    server = strategy.initial(start, seed=0)
    assert strategy.uploads(server) == ("R", "head") and "q/B" not in strategy.broadcast(server, "c0")
    assert strategy.task(server)["static"]["roles"] == ["A", "B"]
    trained = [start.replace({"q/R": core}) for core in cores]
    after = flat(strategy.aggregate(server, uploaded(strategy, server, trained, WEIGHTS)).adapter)
    assert after.sites["q"].kind == "lora" and close(
        change(after), exact_mean([flat(adapter) for adapter in trained], WEIGHTS)
    )
    merged, notes = offline.aggregate(strategy, trained, WEIGHTS)
    assert close(change(merged), change(after)) and not notes
    assert offline.aggregate(strategy, [start.replace({"q/B": ADAPTERS[k]["q/B"], "q/R": cores[k]}) for k in range(3)])[
        1
    ]


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("fedsa", "rolora", "ffa_lora", "fedsvd")])
def test_other_scalings_are_folded(name: str) -> None:
    other = [adapter.replace({"q/B": adapter["q/B"] / 4}) for adapter in ADAPTERS]
    other = [AdapterState(adapter.tensors, {**SITES, "q": Site("lora", (M, N), 4 * S)}) for adapter in other]
    strategy = make(name)
    server = strategy.initial(random_adapter(0), seed=0)
    one, two = (strategy.aggregate(server, updates_of(adapters, WEIGHTS)).adapter for adapters in (ADAPTERS, other))
    assert close(change(one), change(two), 1e-6 if name == "flower" else 1e-12)


@pytest.mark.parametrize("name", RULES)
def test_aggregate_is_pure_and_weights_are_relative(name: str) -> None:
    strategy = make(name)
    server = strategy.initial(random_adapter(0), seed=0)
    updates = uploaded(strategy, server, ADAPTERS, WEIGHTS)
    before = [update.adapter.sha256() for update in updates] + [server.adapter.sha256()]
    one = strategy.aggregate(server, updates).adapter
    doubled = strategy.aggregate(server, [replace(update, weight=2 * update.weight) for update in updates]).adapter
    assert one.sha256() == strategy.aggregate(server, updates).adapter.sha256()
    assert before == [update.adapter.sha256() for update in updates] + [server.adapter.sha256()]
    assert close(change(one), change(doubled))


# Stock Flower rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("FedAvg", {}),
        ("FedAvgM", {"server_momentum": 0.9}),
        ("FedAdam", {}),
        ("FedAdagrad", {}),
        ("FedYogi", {}),
        ("FedMedian", {}),
        ("FedTrimmedAvg", {}),
        ("Krum", {}),
        ("MultiKrum", {"num_nodes_to_select": 2}),
        ("Bulyan", {}),
        ("QFedAvg", {"client_learning_rate": 0.1}),
    ],
)
def test_stock_rules_run_and_carry_their_state(rule: str, options: dict[str, object]) -> None:
    strategy = make("flower", rule=rule, rule_options=options)
    server = ServerState(random_adapter(0, dtype=torch.float32))
    states = [server]
    for number in range(1, 3):
        adapters = [random_adapter(10 * number + index, dtype=torch.float32) for index in range(5)]
        server = replace(strategy.aggregate(server, updates_of(adapters, [1.0, 2.0, 3.0, 4.0, 5.0])), round=number)
        states.append(server)
    again = make("flower", rule=rule, rule_options=options).aggregate(
        states[1], updates_of(adapters, [1.0, 2.0, 3.0, 4.0, 5.0])
    )
    assert again.adapter.sha256() == server.adapter.sha256()  # a fresh object goes on from the state alone
    if states[1].memory:
        forgot = strategy.aggregate(replace(states[1], memory={}), updates_of(adapters, [1.0, 2.0, 3.0, 4.0, 5.0]))
        assert forgot.adapter.sha256() != server.adapter.sha256()
    assert bool(states[1].memory) == (rule in ("FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"))


def test_stock_fedavg_and_median_agree_with_ours() -> None:
    server = ServerState(random_adapter(0))
    for rule, ours in (
        ("FedAvg", make("fedit")),
        ("FedMedian", make("fedit", "median")),
        ("FedAdagrad", make("fedit", "fedadagrad")),
        ("FedYogi", make("fedit", "fedyogi")),
    ):
        options = {"eta": 0.1} if rule == "FedYogi" else {}  # Flower's default there is 0.01
        stock = make("flower", rule=rule, rule_options=options).aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter
        own = ours.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter
        assert stock.distance(own) < 1e-9, rule
        assert (
            rule == "FedAvg"
            or stock.distance(make("fedit").aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter) > 0.1
        )


def test_stock_rule_refusals() -> None:
    with pytest.raises(InputError, match="FedProx"):
        make("flower", rule="FedProx")
    with pytest.raises(InputError, match="rule_options"):
        make("flower", rule="FedAvg", rule_options={"momentum": 1})
    with pytest.raises(RuntimeError, match="Bulyan"):
        make("flower", rule="Bulyan", rule_options={"num_malicious_nodes": 1}).aggregate(
            ServerState(ADAPTERS[0]), updates_of(ADAPTERS, WEIGHTS)
        )


# Wrappers ------------------------------------------------------------------------------------------------------------


def scalar(value: float, role: str = "B") -> AdapterState:
    tensors = {"q/A": torch.ones(1, 1).double(), "q/B": torch.ones(1, 1).double()}
    return AdapterState({**tensors, f"q/{role}": torch.full((1, 1), value).double()}, {"q": Site("lora", (1, 1))})


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
    strategy = make("hetlora", "norm_clip", bound=1e-3)
    strategy.client_ranks = {"c0": 1}
    assert strategy.inner.client_ranks == {"c0": 1}
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
        name: scalar(value).replace(
            {"control:q/A": torch.zeros(1, 1).double(), "control:q/B": torch.full((1, 1), moved[name]).double()}
        )
        for name, value in values.items()
    }
    return [Update(name, 1.0, state) for name, state in states.items()]


def test_scaffold_server_step() -> None:
    strategy, server = make("fedit", "scaffold", server_lr=0.5), ServerState(scalar(1.0))
    sent = strategy.broadcast(server, "c0")
    assert sent["control:q/B"].item() == 0.0 and sent.role("control:q/B") == "control"
    assert strategy.task(server)["scaffold"] is True and strategy.task(server)["uploads"] == [
        "A",
        "B",
        "head",
        "control",
    ]
    assert "control:q/A" in sent.select(strategy.uploads(server))
    after = strategy.aggregate(
        server, scaffold_update(strategy, server, {"c0": 3.0, "c1": 5.0}, {"c0": 2.0, "c1": 4.0})
    )
    assert float(after.adapter["q/B"]) == 1 + 0.5 * (4 - 1)
    assert float(strategy.broadcast(after, "c0")["control:q/B"]) == pytest.approx(2 / 10 * 3)
    assert "control:q/B" not in after.adapter
    robust = make("fedit", "scaffold", "median")
    merged = robust.aggregate(server, scaffold_update(robust, server, {"c0": 3.0, "c1": 5.0}, {"c0": 2.0, "c1": 4.0}))
    assert float(robust.broadcast(merged, "c0")["control:q/B"]) == pytest.approx(2 / 10 * 3)
    strategy.population = None
    with pytest.raises(InputError, match="population"):
        strategy.aggregate(server, [])
    with pytest.raises(InputError, match=r"scaffold.*fedsa leaves B, head"):
        make("fedsa", "scaffold")


def test_fedprox_tells_clients_mu_and_leaves_the_rule_alone() -> None:
    strategy, server = make("lora_fair", "fedprox", mu=0.3), ServerState(random_adapter(0))
    assert strategy.task(server)["prox_mu"] == 0.3
    own = make("lora_fair").aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter
    assert strategy.aggregate(server, updates_of(ADAPTERS, WEIGHTS)).adapter.sha256() == own.sha256()


def test_wrappers_delegate_and_declare() -> None:
    strategy = make("fedsvd", "fedprox", "median")
    strategy.transport = "dense"
    assert strategy.inner.inner.transport == "dense" and strategy.population == strategy.inner.inner.population == 10
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
    assert (result.distance(plain) < 1e-12) == (name == "fedprox")


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
