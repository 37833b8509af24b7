"""Plans, accounts, ledgers, replies and masks that are not what they should be."""

from __future__ import annotations

from dataclasses import replace

from fedpeft.clients import local
from fedpeft.clients.guard import Guard
from fedpeft.clients.local import Local
from fedpeft.clients.store import Store
from fedpeft.clients.train import Private
from fedpeft.privacy import accounting
from fedpeft.privacy import plan as plans
from fedpeft.privacy.ledger import Ledger
from support.audit_faults import FAULTS, fault

# Plan and account -----------------------------------------------------------------------------------------------------


@fault("asked", "claim")
def half_the_planned_noise(put):
    real = plans.noise_multiplier
    put(plans, "noise_multiplier", lambda *given: real(*given) / 2)


@fault("asked", "claim")
def noise_for_one_round(put):
    real = plans.noise_multiplier
    put(plans, "noise_multiplier", lambda rate, epsilon, steps, *rest: real(rate, epsilon, steps // 2, *rest))


@fault("claims", "plan")
def one_round_is_planned(put):
    real = plans.make_plan
    put(plans, "make_plan", lambda privacy, client, rounds, *more: real(privacy, client, 1, *more))


@fault("claims", "plan")
def rate_of_all_records(put):
    real = plans.make_plan
    put(
        plans,
        "make_plan",
        lambda privacy, client, rounds, count, *more: real(privacy, client, rounds, 4 * count, *more),
    )


@fault("claims", "accountant")
def half_of_the_steps_counted(put):
    real = accounting._compose_releases
    put(
        accounting,
        "_compose_releases",
        lambda releases, *rest: real(tuple((rate, sigma, -(-steps // 2)) for rate, sigma, steps in releases), *rest),
    )


@fault("claims", "accountant")
def another_delta(put):
    real = accounting._compose_releases
    put(accounting, "_compose_releases", lambda releases, delta, *rest: real(releases, 10 * delta, *rest))


@fault("budget", "budget")
def no_budget(put):
    put(Ledger, "require", lambda *given: None)


# Ledger and replies ---------------------------------------------------------------------------------------------------


def entered(check: str):
    def note(change):
        real = Guard._release

        def release(guard, *given):
            entry, *rest = real(guard, *given)
            return change(entry), *rest

        FAULTS[change.__name__] = "rounds", check, lambda put: put(Guard, "_release", release)
        return change

    return note


@entered("ledger")
def one_step_entered(entry):
    return replace(entry, steps=1)


@entered("ledger entries")
def more_noise_entered(entry):
    return replace(entry, noise_multiplier=1.1 * entry.noise_multiplier)


@entered("ledger entries")
def lower_rate_entered(entry):
    return replace(entry, sample_rate=0.5 * entry.sample_rate)


@fault("rounds", "ledger")
def nothing_entered(put):
    put(Guard, "spend", lambda *given: None)


@fault("rounds", "ledger")
def one_round_entered(put):
    real = Guard.spend
    put(
        Guard,
        "spend",
        lambda guard, account, number, *rest: real(guard, account, number, *rest) if number == 1 else None,
    )


@fault("rounds", "ledger comes first")
def entered_after_the_reply(put):
    """When the next message comes."""
    spend, admit, waiting = Guard.spend, Guard.admit, []

    def late(guard, client, number):
        while waiting:
            earlier, given = waiting.pop()
            spend(earlier, *given)
        return admit(guard, client, number)

    put(Guard, "spend", lambda guard, *given: waiting.append((guard, given)))
    put(Guard, "admit", late)


@fault("rounds", "ledger comes first")
def entered_by_another_name(put):
    real = Guard.spend
    put(Guard, "spend", lambda guard, account, number, name, *rest: real(guard, account, number, "round", *rest))


@fault("rounds", "rounds")
def another_reply_kept(put):
    """What is sent next time is another release, which the budget does not have."""
    real = Store.save_reply
    put(
        Store,
        "save_reply",
        lambda store, client, number, request, update, *rest: real(
            store, client, number, request, update.map(lambda value: value + 1e-6), *rest
        ),
    )


@fault("rounds", "rounds")
def no_reply_kept(put):
    """A repeated request is trained again, which the budget does not have."""
    put(Store, "save_reply", lambda *given: None)


def closing(put, change):
    real = Local._close

    def close(self, opened, done):
        update, metrics = real(self, opened, done)
        return change(opened, update, metrics)

    put(Local, "_close", close)


@fault("rounds", "replies are kept")
def another_reply_sent(put):
    closing(put, lambda opened, update, metrics: (update.map(lambda value: value + 1e-5), metrics))


def mean_of(opened):
    return next(iter(opened.job.data.inputs.values())).mean(0)


@fault("rounds", "what leaves")
def a_sum_beside_it(put):
    closing(put, lambda opened, update, metrics: (update.beside({"sum": mean_of(opened)}), metrics))


@fault("rounds", "what leaves")
def a_sum_among_its_tensors(put):
    closing(put, lambda opened, update, metrics: (update.replace({"sum:records": mean_of(opened)}), metrics))


@fault("rounds", "what leaves")
def loss_beside_it(put):
    put(Guard, "allowed", lambda guard, client, metrics: {"num-examples": 1.0, **metrics})


@fault("rounds", "what leaves")
def count_beside_it(put):
    put(Guard, "allowed", lambda guard, client, metrics: {"num-examples": 24.0})


@fault("rounds", "update")
def records_in_the_update(put):
    real = Local._close

    def close(self, opened, done):
        mean = float(next(iter(opened.job.data.inputs.values())).mean())
        return real(self, opened, replace(done, after={key: value + 1e-3 * mean for key, value in done.after.items()}))

    put(Local, "_close", close)


@fault("rounds", "ledger")
def one_more_step_without_noise(put):
    real = local.train

    def more(model, data, trains, config, seed, **options):
        result = real(model, data, trains, config, seed, **options)
        real(model, data, trains, replace(config, local_steps=1), seed)
        return result

    put(local, "train", more)


@fault("rounds", "frozen tensors rest")
def frozen_tensor_moves(put):
    real = local.train

    def moving(model, *given, **options):
        result = real(model, *given, **options)
        next(value for value in model.base.backbone.parameters() if not value.requires_grad).data.add_(1e-3)
        return result

    put(local, "train", moving)


# Masks ----------------------------------------------------------------------------------------------------------------


@fault("rounds", "masks are fresh")
def one_mask(put):
    put(Private, "secret_seed", lambda self: 123)


@fault("rounds", "masks are fresh")
def masks_of_the_public_seed(put):
    real = local.train

    def public(model, data, trains, config, seed, **options):
        put(Private, "secret_seed", lambda self: seed)
        return real(model, data, trains, config, seed, **options)

    put(local, "train", public)


@fault("streams", "streams of masks")
def masks_of_the_public_seed_at_sites(put):
    real = local.train

    def public(model, data, trains, config, seed, **options):
        put(Private, "secret_seed", lambda self: seed)
        return real(model, data, trains, config, seed, **options)

    put(local, "train", public)
