"""The steps of some clients that train together: their batches, gradients and updates. See `engine`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted, Thinning
from fedpeft.adapters.grouped import Pass
from fedpeft.adapters.penalties.base import Penalised
from fedpeft.clients.cohort.passes import Piece, assemble_batch, cut_passes, token_counts
from fedpeft.clients.cohort.rows import flatten_rows, frozen_parameter, shrink_optimizer
from fedpeft.clients.optimizers.base import STEP, count_of, kinds_of, make_layout, make_optimizer, set_rate, settle
from fedpeft.clients.rates import ONE_ROUND, Clock
from fedpeft.clients.train import Private, count_targets, index_batches, per_sample_loss, steps_of
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.privacy.mechanism import add_clipped
from fedpeft.privacy.noise import Ahead


@dataclass
class Job:
    """One client's round.

    Attributes:
        start: adapter tensors to start from, by parameter name; ranks may be below the model's. What is not named
            keeps the model's value.
        seed, proximal, offset, private, in_order, clock, moments, thin: as of `clients.train.train`, but moments stay
            what they are.
    """

    start: dict[str, Tensor]
    data: Encoded
    seed: int
    proximal: float = 0.0
    offset: dict[str, Tensor] | None = None
    private: Private | None = None
    in_order: bool = False
    clock: Clock = ONE_ROUND
    moments: dict[str, Tensor] | None = None
    thin: Thinning | None = None

    def steps(self, config: ClientConfig) -> int:
        """Steps that it takes."""
        return steps_of(len(self.data), config, self.in_order)

    @property
    def settings(self) -> dict[str, Any]:
        """What `train` takes beside model, data, roles, config, seed and moments."""
        return {key: getattr(self, key) for key in ("proximal", "offset", "private", "in_order", "clock", "thin")}


@dataclass
class Done:
    """The trained tensors, cut to the shapes of the start, on the CPU; steps taken, mean loss and the optimizer's state
    at the end (if it is kept), as of `train`.
    """

    after: dict[str, Tensor]
    steps: int
    loss: float
    moments: dict[str, Tensor] | None = None


class Chunk:
    """The matrix of some clients' values, and their steps. Clients are sorted by their number of steps, so those that
    go on are the first rows.
    """

    def __init__(
        self, model: Adapted, jobs: list[Job], trains: Sequence[str], config: ClientConfig, tokens: int, now: Pass
    ) -> None:
        self.model, self.jobs, self.config, self.tokens, self.now = model, jobs, config, tokens, now
        own = {key: value.detach() for key, value in model.parameters.items()}
        trained = {key: own[key] for key in model.form.select(trains).tensors}
        self.device = next(iter(own.values())).device
        starts = [{**own, **job.start} for job in jobs]
        self.values = flatten_rows(starts, trained)
        self.frozen = {
            key: frozen_parameter([start[key] for start in starts], own[key]) for key in own if key not in trained
        }
        shared = {key: value for key, (value, of_each) in self.frozen.items() if not of_each}
        self.layout = make_layout(model, trained, shared)
        self.shapes = self.layout.shapes
        self.lengths = [token_counts(model, job.data) for job in jobs]
        self.steps = [job.steps(config) for job in jobs]
        self.draws = [self._draw_records(job) for job in jobs]
        self.mu = self.values.new_tensor([job.proximal for job in jobs])[:, None]
        self.start = self.values.clone() if any(job.proximal for job in jobs) else None
        none = {key: torch.zeros(0, *shape[1:]) for key, shape in self.shapes.items()}
        offsets = [none if job.offset is None else job.offset for job in jobs]
        self.offset = None if all(offset is none for offset in offsets) else flatten_rows(offsets, trained)
        still = model.still()
        masks = {key: torch.zeros(shape, dtype=torch.bool, device=self.device) for key, shape in self.shapes.items()}
        for key, mask in still.items():
            if key in masks:
                masks[key][mask] = True
        self.still = torch.cat([mask.flatten() for mask in masks.values()]) if still else None
        # Noise is drawn on the CPU while a device computes; on the CPU itself threads would take turns.
        self.threads = None if self.device.type == "cpu" else ThreadPoolExecutor()
        self.losses, self.seen = self.values.new_zeros(len(jobs)), self.values.new_zeros(len(jobs))

    def run(self) -> list[Done]:
        """Train all clients of the chunk, step by step together; one result for each job, in their order.

        The mean loss of a client without steps is NaN.
        """
        weights = nn.Parameter(self.values)
        optimizer = make_optimizer([weights], self.config, self.layout)
        self._write_state(optimizer, weights)
        rates = self.jobs[0].clock.rates(self.config, self.steps[0])  # those of all
        # Before the first batch, as in `train`: a source then gives both engines the same batches and noise.
        masks = [
            seeds.derive(job.seed, "dropout") if job.private is None else job.private.secret_seed() for job in self.jobs
        ]
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            # A client alone gets the masks that `train` would draw.
            torch.manual_seed(masks[0] if len(masks) == 1 else seeds.derive(*masks))
            for step in range(max(self.steps)):
                active = sum(steps > step for steps in self.steps)
                shrink_optimizer(optimizer, weights, active)
                weights.grad = self._find_gradient(weights.detach(), step)
                set_rate(optimizer, rates[step])
                optimizer.step()
                if step == 0:  # with all rows; those that leave stay in these tensors as they were
                    state = {**optimizer.state[weights]}
            if any(self.steps):
                self._settle(optimizer, weights, state)
        values, losses = self.values.cpu(), (self.losses.cpu() / self.seen.cpu().double()).tolist()
        return [
            Done(self._values_after(job, values[k]), steps, loss if steps else math.nan, self._read_state(k, state))
            for k, (job, steps, loss) in enumerate(zip(self.jobs, self.steps, losses, strict=True))
        ]

    def _settle(self, optimizer: torch.optim.Optimizer, weights: nn.Parameter, state: dict[str, Tensor]) -> None:
        """Leave what is sent in the rows of all clients that took steps, those that have left among them."""
        weights.data, weights.grad = self.values[: sum(steps > 0 for steps in self.steps)], None
        optimizer.state[weights] = state
        settle(optimizer)

    def _write_state(self, optimizer: torch.optim.Optimizer, weights: nn.Parameter) -> None:
        """Let the optimizer go on from what clients kept; whoever kept nothing begins at zero, as a new one does."""
        kept = [job.moments or {} for job in self.jobs]
        kinds = set[str]().union(*map(kinds_of, kept))
        if not kinds:
            return
        form = {key: torch.zeros(shape, dtype=weights.dtype) for key, shape in self.shapes.items()}
        state: dict[str, Tensor] = {}
        for what in kinds:
            each = [{key: one.get(f"{what}:{key}", form[key]) for key in self.shapes} for one in kept]
            state[what] = flatten_rows(each, form).to(self.device)
        if count := count_of(kept[0]):  # the same of all
            state[STEP] = torch.tensor(float(count))
        optimizer.state[weights] = state

    def _read_state(self, k: int, state: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """The state of client k at its end."""
        job = self.jobs[k]
        if job.moments is None:
            return None
        sizes = [shape.numel() for shape in self.shapes.values()]
        found = {
            f"{what}:{key}": part.view(shape).cpu().clone()
            for what, value in state.items()
            if what != STEP and torch.is_tensor(value)
            for (key, shape), part in zip(self.shapes.items(), value[k].split(sizes), strict=True)
        }
        return found | ({STEP: torch.tensor(float(count_of(job.moments) + self.steps[k]))} if STEP in state else {})

    def _draw_records(self, job: Job) -> Iterator[np.ndarray]:
        """The records of each step. Drawn step by step, as sampling and noise may share a source."""
        if job.private is None:
            rng = None if job.in_order else seeds.numpy_generator(job.seed, "batches")
            yield from index_batches(len(job.data), self.config, rng)
        else:
            for _ in range(self.config.local_steps or 0):
                yield job.private.plan.sample(len(job.data), job.private.source)

    def _values_after(self, job: Job, row: Tensor) -> dict[str, Tensor]:
        parts = row.split([shape.numel() for shape in self.shapes.values()])
        # Copies: a view would keep the matrix of the whole chunk alive.
        return {
            key: part.view(shape)[tuple(map(slice, job.start[key].shape if key in job.start else shape))].clone()
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def _find_gradient(self, values: Tensor, step: int) -> Tensor:
        """What the optimizer gets: the gradient of every row's loss, or of its DP-SGD, and what is added to it."""
        active, shares = len(values), self._shares_of(step, len(values))
        if shares is None:
            total = self._sum_slopes(values)
        else:  # after the noise too, which falls on every entry
            total = shares * self._sum_slopes(shares * values)
        if self.model.penalty is not None:
            self._add_penalty(self.model.penalty, total, values)
        if self.start is not None:
            total += self.mu[:active] * (values - self.start[:active])
        if self.offset is not None:
            total += self.offset[:active]
        if self.config.max_grad_norm is not None:
            # With the 1e-6 of torch's `clip_grad_norm_`, which `train` calls.
            norms = torch.linalg.vector_norm(total, dim=1, keepdim=True)
            total *= (self.config.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
        return total

    def _shares_of(self, step: int, active: int) -> Tensor | None:
        """What the adapter multiplies every row's values by in this step; None is 1."""
        if self.jobs[0].thin is None:
            return None
        rows = self.values.new_ones(active, self.values.shape[1])
        for row, job in zip(rows, self.jobs, strict=False):
            shares = {} if job.thin is None else job.thin(step)
            parts = row.split([shape.numel() for shape in self.shapes.values()])
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True):
                if key in shares:
                    part.view(shape).mul_(shares[key].to(part))
        return rows

    def _sum_slopes(self, values: Tensor) -> Tensor:
        """The gradient of every row's loss, or of its DP-SGD with its noise."""
        active = len(values)
        drawn = [next(draw) for draw in self.draws[:active]]
        counts = np.array([self._weight_of(job, index) for job, index in zip(self.jobs, drawn, strict=False)])
        total = torch.zeros_like(values)
        private = [job.private for job in self.jobs[:active] if job.private is not None]
        sources = [
            own.source if self.threads is None else Ahead(own.source, total.shape[1], self.threads) for own in private
        ]
        for piece in self._cut_passes(drawn):
            # DP-SGD clips record by record, so each sample needs factors of its own.
            groups = piece.clients if private else piece.groups()
            # Weighed by the whole batch, so that the pieces it is cut into add up to its mean.
            losses, slopes = self._slopes(values, piece, groups, None if private else 1 / counts)
            clients = self._to_index(piece.clients)
            if private:
                add_clipped(total, slopes, losses, clients, values.new_tensor([own.plan.clip for own in private]))
            else:
                total.index_add_(0, self._to_index(groups), torch.cat([slope.flatten(1) for slope in slopes], dim=1))
            # A record without a finite loss adds nothing to a private sum, so it is not in the mean loss either.
            good = torch.isfinite(losses) if private else torch.ones_like(losses, dtype=torch.bool)
            self.losses.index_add_(0, clients, losses.where(good, 0.0))
            if private:
                self.seen.index_add_(0, clients, good.to(self.seen))
        if not private:
            # The weighed losses of a step are its mean already.
            self.seen[:active] += 1
        else:
            # Every row, also one whose draw was empty: a step without noise would tell that nothing was drawn.
            total = torch.stack(
                [own.plan.noised_mean(row, source) for own, row, source in zip(private, total, sources, strict=True)]
            )
            if self.still is not None:
                # After the noise, which falls on every entry.
                total[:, self.still] = 0
        return total

    def _add_penalty(self, penalty: Penalised, total: Tensor, values: Tensor) -> None:
        """Add the penalty's gradient at each row's values to its row, in place."""
        fixed = {key: value[: len(values)] if own else value for key, (value, own) in self.frozen.items()}
        sizes = [shape.numel() for shape in self.shapes.values()]
        views = {
            key: part.unflatten(1, shape)
            for (key, shape), part in zip(self.shapes.items(), values.split(sizes, dim=1), strict=True)
        }
        places = dict(zip(self.shapes, total.split(sizes, dim=1), strict=True))
        for key, pull in penalty.gradients(views, fixed).items():
            places[key] += pull.flatten(1)

    def _weight_of(self, job: Job, index: np.ndarray) -> int:
        """What a client's summed losses of a step are divided by: its records, or their tokens."""
        if self.config.loss_weighting == "record" or job.private is not None:
            return len(index)
        return int(count_targets(self.model, job.data.view(index).labels).sum())

    def _cut_passes(self, drawn: list[np.ndarray]) -> Iterator[Piece]:
        """What is drawn, in passes; in each at most `micro_batch` records of a client."""
        longest = max(map(len, drawn))
        size = self.config.micro_batch or max(1, longest)
        for start in range(0, longest, size):
            yield from cut_passes(
                self.lengths[: len(drawn)], [index[start : start + size] for index in drawn], self.tokens
            )

    def _slopes(
        self, values: Tensor, piece: Piece, groups: np.ndarray, shares: np.ndarray | None
    ) -> tuple[Tensor, list[Tensor]]:
        """Weighted losses of the samples, and the gradient of their sum in each parameter of each group [G, ...].

        Args:
            shares: weight of a sample of each client; None is 1.
        """
        # A slice is a view; an index would copy the values of all clients.
        chosen = slice(len(values)) if np.array_equal(groups, np.arange(len(values))) else self._to_index(groups)
        parts = values[chosen].split([shape.numel() for shape in self.shapes.values()], dim=1)
        leaves = {
            key: part.unflatten(1, shape).requires_grad_()
            for (key, shape), part in zip(self.shapes.items(), parts, strict=True)
        }
        fixed = {key: value[chosen] if own else value for key, (value, own) in self.frozen.items()}
        self.now.rows = len(piece.clients) * self.model.base.objective.rows
        self.now.groups, self.now.values = len(groups), {**fixed, **leaves}
        inputs, labels = assemble_batch(self.model, [job.data for job in self.jobs], piece)
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        labels = labels.to(self.device, non_blocking=True)
        losses = per_sample_loss(self.model, inputs, labels)
        if shares is not None:
            losses = losses * torch.from_numpy(shares[piece.clients]).to(losses)
            if self.config.loss_weighting == "token":
                losses = losses * count_targets(self.model, labels)
        # The sum: no sample reads another group's factors, so one pass gives each group its own gradient.
        slopes = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        self.now.values = {}
        return losses.detach(), [
            torch.zeros_like(leaf) if slope is None else slope
            for leaf, slope in zip(leaves.values(), slopes, strict=True)
        ]

    def _to_index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.device, non_blocking=True)
