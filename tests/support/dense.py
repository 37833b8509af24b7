"""Slow, obvious references: every matrix dense, numpy float64, from the papers' equations. And made-up federations.

A client's LoRA at one site is a triple (B [m, r], A [r, n], s) that means s B A. `p` are weights that sum to one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpeft import registry
from fedpeft.state import AdaptedLayer, AdapterState, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy

SHAPES = {"u": (7, 9), "v": (6, 5)}

# Rules ---------------------------------------------------------------------------------------------------------------


def fractions(weights):
    weights = np.asarray(weights, dtype=float)
    return weights / weights.sum()


def mean(values, p):
    return sum(weight * np.asarray(value) for weight, value in zip(p, values, strict=True))


def mean_product(clients, p):
    """sum_k p_k s_k B_k A_k."""
    return mean([s * B @ A for B, A, s in clients], p)


def fedit(clients, p, s):
    """s mean(B) mean(A), with another scaling s_k folded into B_k first."""
    return s * mean([s_k / s * B for B, _, s_k in clients], p) @ mean([A for _, A, _ in clients], p)


def lora_fair(clients, p, s, lambda_):
    """Factors of LoRA-FAIR's L2 form, by least squares on its objective ||W - (B + D) A||^2 + lambda ||D||^2."""
    B, A = mean([s_k / s * B for B, _, s_k in clients], p), mean([A for _, A, _ in clients], p)
    wanted = mean_product(clients, p) / s - B @ A
    r = A.shape[0]
    left = np.hstack([A, np.sqrt(lambda_) * np.eye(r)])  # D [A, sqrt(lambda) I] = [R, 0]
    right = np.hstack([wanted, np.zeros((wanted.shape[0], r))])
    D = np.linalg.lstsq(left.T, right.T, rcond=None)[0].T
    return B + D, A


def best_of_rank(product, rank):
    U, S, Vt = np.linalg.svd(product)
    return (U[:, :rank] * S[:rank]) @ Vt[:rank]


def hetlora(clients, p, s, rank):
    """Factors of HetLoRA: zero-padded, weighted by the norms of the clients' products (by p where all are zero)."""
    norms = np.array([np.linalg.norm(s_k * B @ A) for B, A, s_k in clients])
    w = norms / norms.sum() if norms.sum() > 0 else p
    B = mean([np.pad(s_k / s * B, ((0, 0), (0, rank - B.shape[1]))) for B, _, s_k in clients], w)
    A = mean([np.pad(A, ((0, rank - A.shape[0]), (0, 0))) for _, A, _ in clients], w)
    return B, A


def trimmed_mean(values, fraction):
    stacked = np.sort(np.stack(values), axis=0)
    cut = int(fraction * len(values))
    return stacked[cut : len(values) - cut].mean(axis=0)


def krum_scores(vectors, byzantine):
    """Sum of squared distances to the n - f - 2 nearest others."""
    scores = []
    for i, one in enumerate(vectors):
        distances = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        scores.append(sum(distances[: len(vectors) - byzantine - 2]))
    return scores


def row_projector(A):
    """The orthogonal projector onto the row space of A."""
    return np.linalg.pinv(A) @ A


def cosine(left, right):
    return float((left * right).sum() / (np.linalg.norm(left) * np.linalg.norm(right)))


# Adapters ------------------------------------------------------------------------------------------------------------


def array(value):
    return value.double().numpy()


def triple(adapter, site):
    """(B, A, s) of a site; a core R is put into B."""
    B = array(adapter[f"{site}/B"])
    if f"{site}/R" in adapter:
        B = B @ array(adapter[f"{site}/R"])
    return B, array(adapter[f"{site}/A"]), adapter.sites[site].scaling


def product(adapter, site):
    """s B A (s B R A) as a dense matrix."""
    B, A, s = triple(adapter, site)
    return s * B @ A


def base(adapter, site):
    """What the strategy has added to the frozen weight."""
    if f"{site}/residual_B" not in adapter:
        return np.zeros(adapter.sites[site].shape)
    return array(adapter[f"{site}/residual_B"]) @ array(adapter[f"{site}/residual_A"])


def effective(adapter, site):
    """Change of the site's function: what it has beside W0."""
    return base(adapter, site) + product(adapter, site)


def relative(got, expected):
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-300)


def fresh(rank=3, scaling=2.0, dtype=torch.float64, shapes=SHAPES, seed=0, kind="lora", head=True) -> AdapterState:
    """A new adapter as peft makes it: A uniform in +-1/sqrt(n), B zero (LoRA-SB: B, A orthonormal, R zero)."""
    random = np.random.default_rng(seed)
    tensors, sites = {}, {}
    for site, (m, n) in shapes.items():
        A = random.uniform(-1, 1, (rank, n)) / np.sqrt(n)
        B = np.zeros((m, rank))
        if kind == "lora_sb":
            A, B = np.linalg.qr(A.T)[0].T, np.linalg.qr(random.standard_normal((m, rank)))[0]
            tensors[f"{site}/R"] = torch.zeros(rank, rank, dtype=dtype)
        tensors[f"{site}/A"] = torch.tensor(np.ascontiguousarray(A), dtype=dtype)
        tensors[f"{site}/B"] = torch.tensor(np.ascontiguousarray(B), dtype=dtype)
        sites[site] = AdaptedLayer(kind, (m, n), scaling)
    if head:
        tensors["out/weight"] = torch.tensor(random.standard_normal((2, 4)), dtype=dtype)
        sites["out"] = AdaptedLayer("head", (2, 4))
    return AdapterState(tensors, sites)


def drift(adapter, roles, seed, size=0.3) -> AdapterState:
    """A client's local training: every tensor of these roles moves at random."""
    random = np.random.default_rng(seed)
    moved = {
        key: value + size * torch.tensor(random.standard_normal(tuple(value.shape)), dtype=value.dtype)
        for key, value in adapter.select(roles).tensors.items()
    }
    return adapter.replace(moved)


# Federations ---------------------------------------------------------------------------------------------------------


def make(name, **options) -> FederatedStrategy:
    """A strategy by its registered name."""
    return registry.load("strategies", name)(**options)


def received(strategy, server, origin, client) -> AdapterState:
    """What a client holds after a message: frozen factors that are not sent are the round-0 ones, A = M A_0 by core."""
    sent = strategy.broadcast(server, client)
    tensors = {key: value for key, value in sent.tensors.items() if sent.role(key) != "M"}
    for key, value in sent.tensors.items():
        if sent.role(key) == "M":
            A0 = origin[f"{key[:-2]}/A"]
            tensors[f"{key[:-2]}/A"] = (value.double() @ A0.double()).to(A0.dtype)
    return AdapterState({**origin.without(("residual_A", "residual_B")).tensors, **tensors}, sent.sites)


@dataclass
class Round:
    """One round: the state broadcast, each client's model after training, the uploads, and the state after it."""

    sent: ServerState
    models: dict[str, AdapterState]
    updates: list[Update]
    server: ServerState


def play(strategy, server, origin, weights, seeds=None, train=drift) -> Round:
    """One round with clients c0, c1, ...; client k trains by `train(model, roles, seeds[k])`."""
    server = strategy.before_round(server)
    roles, uploads = strategy.trained(server), strategy.uploads(server)
    seeds = seeds or [1000 * server.round + index for index in range(len(weights))]
    models, updates = {}, []
    for index, (weight, seed) in enumerate(zip(weights, seeds, strict=True)):
        name = f"c{index}"
        models[name] = train(received(strategy, server, origin, name), roles, seed)
        sent = strategy.broadcast(server, name)
        random = np.random.default_rng(seed + 1)
        extra = {
            key: value + 0.3 * torch.tensor(random.standard_normal(tuple(value.shape)), dtype=value.dtype)
            for key, value in sent.extra.items()
        }
        updates.append(Update(name, weight, models[name].select(uploads).beside(extra), {}))
    after = replace(strategy.aggregate(server, updates), round=server.round + 1)
    return Round(server, models, updates, after)


def rounds(strategy, start, weights, count, seed=0, **options) -> list[Round]:
    """Several rounds from a fresh adapter."""
    server = strategy.initial(start, seed)
    origin, played = server.adapter, []
    for _ in range(count):
        played.append(play(strategy, server, origin, weights, **options))
        server = played[-1].server
    return played


def triples(done: Round, site):
    return [triple(model, site) for model in done.models.values()]
