"""The local step loop: what a client does with an adapter, its data and its task.

    for each step:  g = gradient of the mean per-sample loss, or of DP-SGD (fedpeft.privacy.plan)
                    g += R'(theta),  where the adapter has a penalty R
                    g += mu (theta - theta_0) + offset,  where the method's client half has them
                    optimizer step at its rate (`rates`; a new optimizer every round, its state too unless it is kept)

What is added to a private gradient afterwards depends on noised or public values only, so it costs no privacy.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedpeft import seeds
from fedpeft.adapters.adapted import Adapted, Thinning
from fedpeft.adapters.penalties.base import Penalised
from fedpeft.adapters.tail import first_token
from fedpeft.clients.cohort.passes import token_counts
from fedpeft.clients.optimizers.base import make_layout, make_optimizer, read_state, set_rate, settle, write_state
from fedpeft.clients.rates import ONE_ROUND, Clock
from fedpeft.config import ClientConfig
from fedpeft.data.encode import Encoded
from fedpeft.data.ragged import cut_runs
from fedpeft.errors import RunError
from fedpeft.models.agreement import rows_of
from fedpeft.objectives import measures
from fedpeft.objectives.base import IGNORE
from fedpeft.privacy.gradients import per_sample_gradients
from fedpeft.privacy.noise import Randomness
from fedpeft.privacy.plan import Plan

log = logging.getLogger("fedpeft")
EVALUATED = 2**15  # tokens of a pass
SCORES = 2**26  # numbers that a pass of a language model gives out: 256 MB, and twice as much again in its loss

Gradients = tuple[dict[str, Tensor], list[Tensor]]  # by parameter name, and the losses seen


@dataclass(frozen=True)
class Private:
    """DP-SGD: the plan, and where its sampling and noise come from."""

    plan: Plan
    source: Randomness

    def secret_seed(self) -> int:
        """For dropout: if the server knew the masks, one more record would shift everybody's, and so move every
        clipped gradient. Masks that nobody else knows are the same for the others with and without it.
        """
        return int(self.source.uniform(1)[0] * 2**53)


def train(
    model: Adapted,
    data: Encoded,
    trains: Sequence[str],
    config: ClientConfig,
    seed: int,
    *,
    proximal: float = 0.0,
    offset: dict[str, Tensor] | None = None,
    private: Private | None = None,
    in_order: bool = False,
    clock: Clock = ONE_ROUND,
    moments: dict[str, Tensor] | None = None,
    thin: Thinning | None = None,
) -> tuple[int, float]:
    """Train the parameters of these roles in place.

    Args:
        seed: of the batches and of dropout, where it is not private; two calls with one seed do the same.
        proximal: weight of the proximal term around the values at the start.
        offset: by parameter name, what is added to every gradient.
        private: train by DP-SGD.
        in_order: take the records as they stand, not shuffled.
        clock: the round, which a schedule of rates goes by.
        moments: state of the optimizer to begin with, as `optimizers.base.read_state` has it; replaced by that at the
            end. None begins with none and keeps none.
        thin: what the adapter multiplies values by in each step.

    Returns:
        Steps taken and mean loss (of private steps: of the records that were drawn and whose loss is finite; it is not
        private). NaN where there are none.

    Raises:
        RunError: no record has something to predict.
    """
    data = find_taught(data, private)
    parameters = model.train_roles(trains)
    device = next(iter(parameters.values())).device
    start = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = make_optimizer(list(parameters.values()), config, make_layout(model, parameters, model.parameters))
    if moments:
        write_state(optimizer, parameters, moments)
    rates = clock.rates(config, steps_of(len(data), config, in_order))
    losses, steps = [], 0
    model.training_mode()
    # Dropout draws from torch's global generator; forked, what runs before and after draws as if nothing had been.
    with first_token(model, data), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seeds.derive(seed, "dropout") if private is None else private.secret_seed())
        gradients_of_steps = steps_to_take(model, data, parameters, config, seed, private, in_order, thin)
        # Rates first: past the last one no noise is drawn. A private round of fewer steps is for the audit to judge.
        for rate, (gradients, loss) in zip(rates, gradients_of_steps, strict=private is None):
            set_gradients(parameters, gradients, start, config, proximal, offset)
            set_rate(optimizer, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses += loss
            steps += 1
        settle(optimizer)
    model.base.backbone.eval()
    if moments is not None:
        moments.update(read_state(optimizer, parameters))
    return steps, mean_loss(losses, private)


def steps_to_take(
    model: Adapted,
    data: Encoded,
    parameters: dict[str, nn.Parameter],
    config: ClientConfig,
    seed: int,
    private: Private | None,
    in_order: bool,
    thin: Thinning | None,
) -> Iterator[Gradients]:
    """The gradients of a round's steps, private or plain, with the adapter's penalty; arguments as of `train`."""
    device = next(iter(parameters.values())).device
    if private is not None:
        steps = private_steps(model, data, parameters, config, private, device)
    else:
        rng = None if in_order else seeds.numpy_generator(seed, "batches")
        steps = plain_steps(model, data, parameters, config, rng, device)
    if thin is not None:
        steps = thin_steps(steps, parameters, thin)
    return steps if model.penalty is None else penalise_steps(steps, parameters, model.penalty, model.parameters)


def thin_steps(steps: Iterator[Gradients], parameters: dict[str, nn.Parameter], thin: Thinning) -> Iterator[Gradients]:
    """The gradients of f(m theta), which are m f'(m theta); after the noise too, which falls on every entry."""
    for number in itertools.count():
        shares = {key: share.to(parameters[key]) for key, share in thin(number).items() if key in parameters}
        whole = {key: parameters[key].detach().clone() for key in shares}
        try:
            with torch.no_grad():
                for key, share in shares.items():
                    parameters[key].mul_(share)
            gradients, losses = next(steps)
        except StopIteration:
            return
        finally:
            with torch.no_grad():
                for key, value in whole.items():
                    parameters[key].copy_(value)
        yield {key: value * shares[key] if key in shares else value for key, value in gradients.items()}, losses


def penalise_steps(
    steps: Iterator[Gradients], parameters: dict[str, nn.Parameter], penalty: Penalised, others: dict[str, nn.Parameter]
) -> Iterator[Gradients]:
    """The gradients with the penalty's at the values of each step; after noise and clipping, as it reads no record."""
    for gradients, losses in steps:
        pulls = penalty.gradients(parameters, others)
        yield {key: value + pulls[key] if key in pulls else value for key, value in gradients.items()}, losses


def mean_loss(losses: list[Tensor], private: Private | None) -> float:
    """Of what was drawn, and of private steps is finite; NaN of nothing."""
    seen = torch.stack(losses) if losses else torch.zeros(0)
    return float((seen if private is None else seen[torch.isfinite(seen)]).mean())


def set_gradients(
    parameters: dict[str, nn.Parameter],
    gradients: dict[str, Tensor],
    start: dict[str, Tensor],
    config: ClientConfig,
    proximal: float,
    offset: dict[str, Tensor] | None,
) -> None:
    """Give every parameter its gradient, with the terms that the method's client half adds; all of them clipped."""
    for key, parameter in parameters.items():
        gradient = gradients[key]
        if proximal:
            gradient = gradient + proximal * (parameter.detach() - start[key])
        if offset is not None:
            gradient = gradient + _pad_rows(offset[key], parameter)
        parameter.grad = gradient
    if config.max_grad_norm is not None:
        nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)


def find_taught(data: Encoded, private: Private | None) -> Encoded:
    """The records of which a plain step takes the mean: those with something to predict; it says what it leaves out.

    A private step keeps them all: they count zero there, and the divisor is public.

    Raises:
        RunError: nothing is left.
    """
    if private is not None or len(teaching := data.teaching()) == len(data):
        return data
    if not len(teaching):
        raise RunError(f"none of {len(data)} texts has a token to predict, so there is nothing to train on.")
    log.warning("%d of %d texts have nothing to predict and are left out", len(data) - len(teaching), len(data))
    return data.view(teaching)


def plain_steps(
    model: Adapted,
    data: Encoded,
    parameters: dict[str, nn.Parameter],
    config: ClientConfig,
    rng: np.random.Generator | None,
    device: torch.device,
) -> Iterator[Gradients]:
    """The gradient of the mean loss of each batch; each is taken at the parameters as they then are."""
    by_token = config.loss_weighting == "token"
    for index in index_batches(len(data), config, rng):
        losses = []
        total = count_targets(model, data.view(index).labels).sum().to(device) if by_token else None
        size = config.micro_batch or len(index)
        for start in range(0, len(index), size):
            inputs, labels = on_device(data, index[start : start + size], device)
            each = per_sample_loss(model, inputs, labels)
            # Of pieces, shares of the whole batch's mean, which add up.
            if total is not None:
                loss = (each * count_targets(model, labels)).sum() / total
            else:
                loss = each.mean() if len(each) == len(index) else each.sum() / len(index)
            loss.backward()
            losses.append(loss.detach())
        yield (
            {
                key: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for key, parameter in parameters.items()
            },
            [torch.stack(losses).sum()],
        )


def private_steps(
    model: Adapted,
    data: Encoded,
    parameters: dict[str, nn.Parameter],
    config: ClientConfig,
    private: Private,
    device: torch.device,
) -> Iterator[Gradients]:
    """The noised gradient of each Poisson sample, also of an empty one. Big samples are taken in pieces."""
    plan, source = private.plan, private.source
    for _ in range(config.local_steps or 0):
        drawn = plan.sample(len(data), source)
        total = torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters.values()])
        losses: list[Tensor] = []
        size = config.micro_batch or 2 * config.batch_size
        for start in range(0, len(drawn), size):
            inputs, labels = on_device(data, drawn[start : start + size], device)
            gradients, each = per_sample_gradients(
                model.base.modules,
                parameters,
                partial(per_sample_loss, model),
                inputs,
                labels,
                model.base.objective.rows,
            )
            total += plan.clipped_sum(gradients, each)
            losses += list(each)
        noised = plan.noised_mean(total, source)
        pieces = noised.split([parameter.numel() for parameter in parameters.values()])
        by_name = {key: piece.view_as(parameters[key]) for key, piece in zip(parameters, pieces, strict=True)}
        # After the noise, which falls on every entry: what must not move does not move by noise either.
        for key, rows in model.still().items():
            if key in by_name:
                by_name[key][rows] = 0
        yield by_name, losses


def steps_of(count: int, config: ClientConfig, in_order: bool) -> int:
    """Steps of a round over `count` records; private ones have `local_steps`, as their config must."""
    if config.local_steps and not in_order:
        return config.local_steps
    return -(-count // config.batch_size) * (1 if in_order else config.local_epochs or 1)


def index_batches(count: int, config: ClientConfig, rng: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Index batches of shuffled passes over `count` examples: `local_epochs` of them, or what `local_steps` need.

    Without a generator the examples are taken once and as they stand: whoever ordered them has planned the steps.
    """
    size = min(config.batch_size, count)
    if rng is None:
        yield from np.split(np.arange(count), range(size, count, size))
        return
    steps = steps_of(count, config, in_order=False)
    while steps > 0:
        order = rng.permutation(count)
        for start in range(0, count, size):
            if steps == 0:
                return
            yield order[start : start + size]
            steps -= 1


def on_device(data: Encoded, index: np.ndarray, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels of these records, on the device."""
    inputs, labels = data.batch(index)
    return {key: value.to(device) for key, value in inputs.items()}, labels.to(device)


def per_sample_loss(model: Adapted, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    """Loss [N] of each sample, as the model's objective has it, with what the adapter's penalty has of its scores."""
    scores, targets = _predict_targets(model, inputs, labels)
    losses = model.base.objective.losses(scores, targets)
    if model.over_scores is None:
        return losses
    before, _ = model.base.objective.pair(model.bare_logits(inputs).to(scores.dtype), labels)
    return losses + model.over_scores.losses(scores, before, targets)


def count_targets(model: Adapted, labels: Tensor) -> Tensor:
    """How much of each record is predicted [N]: tokens of a text, 1 of a class."""
    targets = model.base.objective.targets(labels)
    return (targets != IGNORE).flatten(1).sum(1) if targets.ndim > 1 else torch.ones_like(targets)


def _predict_targets(model: Adapted, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Scores in float32 at least, and the targets that they are for."""
    logits = model.logits(inputs)
    return model.base.objective.pair(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


@torch.no_grad()
def evaluate(
    model: Adapted,
    data: Encoded,
    batch_size: int = 256,
    tokens: int = EVALUATED,
    tally: measures.Tally | None = None,
) -> dict[str, float]:
    """What the model's objective measures of the records that have something to predict; `num-examples` of them.

    Args:
        batch_size: most records of a pass.
        tokens: most tokens of a pass, padding included; of a language model fewer where its scores would be more than
            SCORES numbers. A longer record is a pass by itself.
        tally: of whoever wants to see more of the answers; a new one is the default.
    """
    device = next(iter(model.parameters.values())).device
    model.base.backbone.eval()
    tally = measures.Tally(model.base.objective) if tally is None else tally
    teaching = data.teaching()
    with first_token(model, data):
        for places in cut_runs(token_counts(model, data)[teaching], batch_size, scored_tokens(model, tokens)):
            tally.add(*_predict_targets(model, *on_device(data, teaching[places], device)))
    return tally.metrics()


def scored_tokens(model: Adapted, tokens: int) -> int:
    """Of so many tokens those whose scores are few enough to be had at once: at each one a language model scores all
    words, and a tagger all tags.
    """
    if not model.base.objective.headed:
        each = rows_of(model.base.backbone)
    else:
        each = model.base.classes if model.base.objective.labelled == "tags" else None
    return tokens if each is None else max(1, min(tokens, SCORES // each))


def _pad_rows(value: Tensor, like: Tensor) -> Tensor:
    if value.shape == like.shape:
        return value.to(like.device)
    full = torch.zeros_like(like)
    full[tuple(map(slice, value.shape))] = value.to(like.device)
    return full
