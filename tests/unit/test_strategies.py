"""Each strategy on hand-sized numbers or against a dense float64 reference; what tells it apart from FedAvg."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedpeft import registry
from fedpeft.adapters.flat import flatten_adapter
from fedpeft.config import default_of, options_of
from fedpeft.errors import InputError
from fedpeft.state import AdaptedLayer, AdapterState, Needs, ServerState
from fedpeft.strategies import offline
from fedpeft.strategies.base import FederatedStrategy
from fedpeft.strategies.build import make_named
from fedpeft.strategies.instructions import Drawn
from support.handmade import (
    ADAPTERS,
    RULES,
    SITES,
    WEIGHTS,
    WRAPPERS,
    M,
    N,
    R,
    S,
    change,
    close,
    exact_mean,
    make,
    random_adapter,
    updates_of,
    uploaded,
)


@pytest.mark.parametrize("name", registry.names("strategies"))
def test_registered_classes_declare_what_they_are(name: str) -> None:
    cls = registry.load("strategies", name)
    assert cls.paper and isinstance(cls.needs, Needs) and cls.__doc__
    assert cls.wraps == (name in WRAPPERS)
    strategy = make_named(name, {}, "strategy")
    for option, item in options_of(cls).items():
        assert getattr(strategy.config, item.name) == default_of(item), option
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
    adapter = AdapterState({"q/A": A, "q/B": B}, {"q": AdaptedLayer("lora", (2, 2))})
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
    assert strategy.instructions(server).static == Drawn(("A",), drawn.sha256())
    assert "q/A" not in strategy.broadcast(server, "c0")
    assert close(drawn["q/A"].double() @ drawn["q/A"].double().T, torch.eye(R), 1e-6)
    dense = make(name, transport="dense")
    server = dense.initial(fresh, seed=0)
    assert torch.equal(dense.broadcast(server, "c0")["q/A"], fresh["q/A"]) and dense.instructions(server).static is None


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
            strategy.instructions(server).static
            == strategy.instructions(strategy.initial(random_adapter(0, dtype=torch.float32), 0)).static
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
    strategy = make("flexlora", ranks={"c0": 1, "c1": 2})
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
    sites = {"q": AdaptedLayer("lora", (2, 2))}
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
        {**SITES, "q": AdaptedLayer("lora_sb", (M, N), S)},
    )
    strategy = make("fed_sb")
    server = strategy.initial(start, seed=0)
    assert strategy.uploads(server) == ("R", "head") and "q/B" not in strategy.broadcast(server, "c0")
    assert strategy.instructions(server).static.roles == ("A", "B")
    trained = [start.replace({"q/R": core}) for core in cores]
    after = flatten_adapter(strategy.aggregate(server, uploaded(strategy, server, trained, WEIGHTS)).adapter)
    assert after.sites["q"].kind == "lora" and close(
        change(after), exact_mean([flatten_adapter(adapter) for adapter in trained], WEIGHTS)
    )
    merged, notes = offline.aggregate(strategy, trained, WEIGHTS)
    assert close(change(merged), change(after)) and not notes
    assert offline.aggregate(strategy, [start.replace({"q/B": ADAPTERS[k]["q/B"], "q/R": cores[k]}) for k in range(3)])[
        1
    ]


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("fedsa", "rolora", "ffa_lora", "fedsvd")])
def test_other_scalings_are_folded(name: str) -> None:
    other = [adapter.replace({"q/B": adapter["q/B"] / 4}) for adapter in ADAPTERS]
    other = [AdapterState(adapter.tensors, {**SITES, "q": AdaptedLayer("lora", (M, N), 4 * S)}) for adapter in other]
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
