"""A network small enough to train thousands of federations: one frozen ReLU layer with a LoRA, and a frozen head.

    logits = V relu((W + s B A) x),   labels = argmax of the standardised logits of the same net with W + D

The scale s is 1. The student starts at W and has to learn D through B A. Clients are trained in batches: a row is one
client of one run, and runs of several learning rates and seeds go through the same matrix products. The server side is
the shipped code: the registered strategies with their own `initial`, `before_round`, `broadcast` and `aggregate`.

Batches are Poisson samples of expected size b (rate q = min(1, b / n_k)) whether or not the run is private, and a step
divides by q n_k. A private step is DP-SGD on sample level: with g_i the gradient of sample i in all trained factors,

    step = -lr (sum_i g_i min(1, C / ||g_i||) + N(0, sigma^2 C^2 I)) / (q n_k)

Norms are exact and no per-sample gradient is stored: ||g_i,B|| = ||d_i|| ||A x_i||, ||g_i,A|| = ||B^T d_i|| ||x_i||,
with d_i the gradient at the pre-activation. sigma is fixed per client for all rounds x steps, as if it took part in
every round; that bound holds whichever rounds it is chosen for.

Client arithmetic is in float32 unless asked otherwise; the strategies aggregate in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedpeft import registry, seeds
from fedpeft.errors import InputError
from fedpeft.simulations.benchmarks.accounting import sigma
from fedpeft.state import AdaptedLayer, AdapterState, Rules, ServerState, Update
from fedpeft.strategies.base import FederatedStrategy, choose_clients

SITE = "hidden"
VALIDATION_SHARE = 1 / 6


@dataclass(frozen=True)
class Protocol:
    """Sizes of the net, the data and the federation.

    Attributes:
        subspace: dimension of the subspace that holds inputs and D (plus 0.05 isotropic noise on inputs); None is all.
        shift: Frobenius norm of D relative to that of W restricted to the subspace.
        gain: standard deviation of the head's entries times sqrt(hidden).
        steps: local steps a round.
        evaluate_every: rounds between evaluations; the last round is always evaluated.
    """

    inputs: int
    hidden: int
    classes: int
    train: int
    test: int
    subspace: int | None
    shift: float
    clients: int
    per_round: int
    alpha: float
    min_examples: int
    rank: int
    rounds: int
    steps: int
    batch: int
    gain: float = 1.0
    evaluate_every: int = 1
    clip: float = 2.0
    delta: float = 1e-5


@dataclass(frozen=True)
class World:
    """One seed's net, records and split over clients. Accuracy is measured on `held_x`, `held_y`."""

    seed: int
    W: Tensor
    V: Tensor
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class Method:
    """A row of a table: a strategy, and a factor on the adapter's first A."""

    name: str
    make: Callable[[], FederatedStrategy]
    scale_A: float = 1.0


@dataclass
class Run:
    """One federation: `curve` holds (round, accuracy); `failed` is the round that had too few finite updates."""

    method: str
    lr: float
    seed: int
    server: ServerState
    curve: list[tuple[int, float]] = field(default_factory=list)
    participation: dict[str, int] = field(default_factory=dict)
    failed: int | None = None

    @property
    def final(self) -> float:
        """Accuracy at the last evaluation."""
        return self.curve[-1][1]

    @property
    def average(self) -> float:
        """Mean accuracy over all evaluations."""
        return sum(accuracy for _, accuracy in self.curve) / len(self.curve)


def make_world(protocol: Protocol, seed: int, held_out: str = "test") -> World:
    """Draw all that methods share. `held_out="validation"` holds training records out and never draws the test set."""
    p = protocol

    def normal(shape: tuple[int, ...], *purpose: str) -> Tensor:
        return torch.randn(shape, generator=seeds.torch_generator(seed, "toy", *purpose), dtype=torch.float64)

    W = normal((p.hidden, p.inputs), "W") / math.sqrt(p.inputs)
    V = normal((p.classes, p.hidden), "V") * p.gain / math.sqrt(p.hidden)
    basis = torch.eye(p.inputs, dtype=torch.float64)
    if p.subspace is not None:
        basis = torch.linalg.qr(normal((p.inputs, p.subspace), "basis"))[0].T
    D = normal((p.hidden, basis.shape[0]), "shift") @ basis
    teacher = W + D * (p.shift * (W @ basis.T).norm() / D.norm())

    def draw(count: int, name: str) -> Tensor:
        scale = math.sqrt(p.inputs / basis.shape[0])
        noise = 0.0 if p.subspace is None else 0.05 * normal((count, p.inputs), name, "noise")
        return normal((count, basis.shape[0]), name) @ basis * scale + noise

    x = draw(p.train, "train")
    logits = (x @ teacher.T).relu() @ V.T
    mean, deviation = logits.mean(0), logits.std(0)

    def label(records: Tensor) -> Tensor:
        labels: Tensor = (((records @ teacher.T).relu() @ V.T - mean) / deviation).argmax(1)
        return labels

    if held_out == "test":
        held_x = draw(p.test, "test")
    elif held_out == "validation":
        count = round(p.train * VALIDATION_SHARE)
        x, held_x = x[:-count], x[-count:]
    else:
        raise InputError(f"held_out={held_out!r}: allowed are test and validation.")
    y = label(x)
    split = registry.load("partitioners", "dirichlet")(alpha=p.alpha, min_examples=p.min_examples).split(
        y.numpy(), {}, p.clients, seed
    )
    parts = {f"client-{number}": torch.from_numpy(part) for number, part in enumerate(split)}
    return World(seed, W, V, x, y, held_x, label(held_x), parts)


def first_adapter(protocol: Protocol, seed: int, scale_A: float, dtype: torch.dtype) -> AdapterState:
    """peft's start: A [r, n] uniform in +-1 / sqrt(n), B [m, r] zero; alpha / r = 1."""
    generator = seeds.torch_generator(seed, "toy", "adapter")
    A = (torch.rand(protocol.rank, protocol.inputs, generator=generator, dtype=torch.float64) * 2 - 1) * scale_A
    tensors = {
        f"{SITE}/A": (A / math.sqrt(protocol.inputs)).to(dtype),
        f"{SITE}/B": torch.zeros(protocol.hidden, protocol.rank, dtype=dtype),
    }
    return AdapterState(tensors, {SITE: AdaptedLayer("lora", (protocol.hidden, protocol.inputs))})


@dataclass(frozen=True)
class Row:
    """One client of one run in one round: where its records are, and what it received."""

    run: Run
    home: int
    world: World
    client: str
    sent: AdapterState


def simulate(
    protocol: Protocol,
    worlds: Sequence[World],
    method: Method,
    lrs: Sequence[float],
    epsilon: float | None = None,
    dtype: torch.dtype = torch.float32,
    after_round: Callable[[list[Run]], None] = lambda runs: None,
) -> list[Run]:
    """Run `method` at every learning rate in every world, all together.

    Runs of one seed share clients, batches and noise, over learning rates and over calls: methods are paired by seed.

    Args:
        epsilon: target of sample-level DP for every client; None trains without clipping and noise.
        after_round: sees all runs after each round.
    """
    strategy = method.make()
    net = Net.of(worlds, dtype)
    jobs = []
    for lr in lrs:
        for home, world in enumerate(worlds):
            adapter = first_adapter(protocol, world.seed, method.scale_A, dtype)
            jobs.append((Run(method.name, lr, world.seed, strategy.initial(adapter, world.seed)), home, world))
    for number in range(1, protocol.rounds + 1):
        rows = []
        for run, home, world in jobs:
            if run.failed is None:
                run.server = strategy.before_round(run.server)
                rules = Rules(protocol.rounds, seed=run.seed, clients_per_round=protocol.per_round)
                rows += [
                    Row(run, home, world, client, strategy.broadcast(run.server, client))
                    for client in choose_clients(sorted(world.parts), rules, number)
                ]
        if rows:
            _round(protocol, strategy, net, rows, number, epsilon)
        if number % protocol.evaluate_every == 0 or number == protocol.rounds:
            for run, home, _ in jobs:
                run.curve.append((number, net.accuracy(home, run.server.adapter)))
        after_round([run for run, _, _ in jobs])
    return [run for run, _, _ in jobs]


def _round(
    protocol: Protocol, strategy: FederatedStrategy, net: Net, rows: list[Row], number: int, epsilon: float | None
) -> None:
    """Train all rows and let each run's server aggregate.

    As in the real round, updates that are not finite are left out, and a run with less than half of them left stops.
    """
    roles = strategy.trained(rows[0].run.server)
    A, B = train(protocol, net, rows, number, "A" in roles, "B" in roles, epsilon)
    finite = A.flatten(1).isfinite().all(1) & B.flatten(1).isfinite().all(1)
    updates: dict[int, list[Update]] = {id(row.run): [] for row in rows}
    for index, row in enumerate(rows):
        row.run.participation[row.client] = row.run.participation.get(row.client, 0) + 1
        if finite[index]:
            adapter = row.sent.replace({f"{SITE}/A": A[index], f"{SITE}/B": B[index]})
            uploads = adapter.select(strategy.uploads(row.run.server))
            updates[id(row.run)].append(Update(row.client, float(len(row.world.parts[row.client])), uploads))
    for run in {id(row.run): row.run for row in rows}.values():
        if 2 * len(updates[id(run)]) < protocol.per_round:
            run.failed = number
        else:
            run.server = replace(strategy.aggregate(run.server, updates[id(run)]), round=number)


@dataclass(frozen=True)
class Net:
    """The frozen nets and records of all worlds, stacked: W [S, h, n], V [S, c, h], x [S, N, n], y [S, N]."""

    W: Tensor
    V: Tensor
    x: Tensor
    y: Tensor
    held: list[tuple[Tensor, Tensor]]

    @staticmethod
    def of(worlds: Sequence[World], dtype: torch.dtype) -> Net:
        """The worlds stacked in a dtype; all must have the same sizes."""
        W, V, x, y = (torch.stack([getattr(world, name) for world in worlds]) for name in "WVxy")
        held = [(world.held_x.to(dtype), world.held_y) for world in worlds]
        return Net(W.to(dtype), V.to(dtype), x.to(dtype), y, held)

    def base(self, home: int, adapter: AdapterState) -> Tensor:
        """The frozen weight [h, n], with the residual that FedEx and FLoRA add to it."""
        if f"{SITE}/residual_B" not in adapter:
            return self.W[home]
        return self.W[home] + adapter[f"{SITE}/residual_B"] @ adapter[f"{SITE}/residual_A"]

    def accuracy(self, home: int, adapter: AdapterState) -> float:
        """Accuracy of an adapter on the held-out records of world number `home`."""
        x, y = self.held[home]
        weight = self.base(home, adapter) + adapter[f"{SITE}/B"] @ adapter[f"{SITE}/A"]
        return float((((x @ weight.T).relu() @ self.V[home].T).argmax(1) == y).double().mean())


def train(
    protocol: Protocol, net: Net, rows: list[Row], number: int, trains_A: bool, trains_B: bool, epsilon: float | None
) -> tuple[Tensor, Tensor]:
    """Local SGD of all rows at once, from what each received. Returns A [rows, r, n] and B [rows, h, r]."""
    A, B = (torch.stack([row.sent[f"{SITE}/{role}"] for row in rows]) for role in "AB")
    W = torch.stack([net.base(row.home, row.sent) for row in rows])
    homes = torch.tensor([row.home for row in rows])
    V = net.V[homes]
    lr = torch.tensor([row.run.lr for row in rows], dtype=A.dtype)[:, None, None]
    sizes = [len(row.world.parts[row.client]) for row in rows]
    expected = torch.tensor([min(protocol.batch, size) for size in sizes], dtype=A.dtype)[:, None, None]
    drawn: dict[tuple[int, str], int] = {}
    batches: list[Tensor] = []
    noise: list[tuple[Tensor, Tensor]] = []
    for row, size in zip(rows, sizes, strict=True):
        if (row.home, row.client) in drawn:
            continue
        drawn[row.home, row.client] = len(batches)
        path = ("toy", "round", number, row.client)
        generator = seeds.torch_generator(row.world.seed, *path, "batches")
        batches.append(poisson(protocol, row.world.parts[row.client], generator))
        if epsilon is not None:
            generator = seeds.torch_generator(row.world.seed, *path, "noise")
            deviation = noise_deviation(protocol, size, epsilon)
            noise_A = torch.randn((protocol.steps, *A.shape[1:]), generator=generator) * deviation
            noise_B = torch.randn((protocol.steps, *B.shape[1:]), generator=generator) * deviation
            noise.append((noise_A.to(A.dtype), noise_B.to(B.dtype)))
    width = max(value.shape[1] for value in batches)
    records = torch.stack([torch.nn.functional.pad(value, (0, width - value.shape[1]), value=-1) for value in batches])
    source = torch.tensor([drawn[row.home, row.client] for row in rows])
    noises = [torch.stack(values) for values in zip(*noise, strict=True)]
    clip = math.inf if epsilon is None else protocol.clip
    for step in range(protocol.steps):
        taken = records[source, step]
        present, taken = taken >= 0, taken.clamp(min=0)
        x, y = net.x[homes[:, None], taken], net.y[homes[:, None], taken]
        GA, GB = gradients(A, B, W, V, x, y, present, trains_A, trains_B, clip)
        if noises:
            GA, GB = GA + noises[0][source, step], GB + noises[1][source, step]
        A = A - lr * GA / expected if trains_A else A
        B = B - lr * GB / expected if trains_B else B
    return A, B


def noise_deviation(protocol: Protocol, records: int, epsilon: float) -> float:
    """Standard deviation sigma C of the noise on a client's sum of clipped gradients, for all rounds x steps."""
    steps = protocol.rounds * protocol.steps
    return sigma(records, protocol.batch, steps, epsilon, protocol.delta) * protocol.clip


def gradients(
    A: Tensor,
    B: Tensor,
    W: Tensor,
    V: Tensor,
    x: Tensor,
    y: Tensor,
    present: Tensor,
    trains_A: bool,
    trains_B: bool,
    clip: float,
) -> tuple[Tensor, Tensor]:
    """Sums over each row's batch of per-sample gradients of the cross-entropy, each scaled to norm `clip` at most.

    The norm is over the trained factors together; the gradient of the other factor is returned but not counted.

    Args:
        A: [rows, r, n]; B: [rows, h, r]; W: [rows, h, n]; V: [rows, c, h].
        x: [rows, b, n], y: [rows, b]; present: bool [rows, b], false for padding.
    """
    Ax = x @ A.mT
    z = x @ W.mT + Ax @ B.mT
    error = (z.relu() @ V.mT).softmax(-1) - torch.nn.functional.one_hot(y, V.shape[1])
    d = (error @ V) * (z > 0) * present[..., None]
    Btd = d @ B
    if math.isfinite(clip):
        square = torch.zeros_like(d[..., :1])
        if trains_B:
            square = square + d.square().sum(-1, keepdim=True) * Ax.square().sum(-1, keepdim=True)
        if trains_A:
            square = square + Btd.square().sum(-1, keepdim=True) * x.square().sum(-1, keepdim=True)
        factor = (clip / square.sqrt()).clamp(max=1.0)
        d, Btd = d * factor, Btd * factor
    return Btd.mT @ x, d.mT @ Ax


def poisson(protocol: Protocol, part: Tensor, generator: torch.Generator) -> Tensor:
    """Record indices [steps, largest batch] of Poisson samples at rate min(1, b / n_k); -1 is padding."""
    taken = torch.rand(protocol.steps, len(part), generator=generator) < protocol.batch / len(part)
    count = taken.sum(1)
    records = torch.full((protocol.steps, int(count.max())), -1)
    step, position = taken.nonzero(as_tuple=True)
    records[step, taken.cumsum(1)[taken] - 1] = part[position]
    return records
