"""One set of clients for one start state; rounds that are dropped; and what a sum still lets one client do."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array

from fedpeft.clients.policy import Policy, Refused
from fedpeft.errors import InputError, RunError
from fedpeft.state import DROPPED, RoundDropped, RoundFailed, Rules, ServerState, StillMasked
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.secagg.stages import RECORD
from fedpeft.strategies.secagg.terms import Terms, check, make_exchange
from fedpeft.strategies.wire import PACKED
from support.masked import START, Watched, changes, config, play, updates

pytestmark = pytest.mark.usefixtures("flower_run")
ALL = [f"client-00{index}" for index in range(5)]


def asked(grid: Watched, own, clients, number=1, start=START):
    """One round over these clients only."""
    strategy, roster = FedIT(), {client: grid.roster[client] for client in clients}
    server, sent, contents = strategy.plan(ServerState(start, round=number - 1), roster, Rules(rounds=number), PACKED)
    return make_exchange(own)(grid, roster, strategy, server, sent, contents, Rules(rounds=number))


@pytest.mark.parametrize("second", [ALL[:4], ALL[1:], ALL[:3]])
def test_a_second_try_with_other_clients_is_refused_before_anybody_trains(second):
    own, after = config(), updates(5)
    grid = Watched(own, after)
    asked(grid, own, ALL)
    trained = len(grid.replies(2))
    with pytest.raises(RoundDropped, match=r"shares for a sum from this start state were given before, and client-00"):
        asked(grid, own, second)
    assert len(grid.replies(2)) == trained, "nobody uploaded again"
    assert len([1 for stage, *_ in grid.seen if stage == 3]) == 5


def test_a_client_more_gets_no_shares():
    own, after = config(), updates(5)
    grid = Watched(own, after)
    asked(grid, own, ALL[:4])
    with pytest.raises(RoundDropped, match=r"stage 3.*client-004 would be in one of the two sums only"):
        asked(grid, own, ALL)


def test_the_same_set_again_is_the_same_sum_and_other_rounds_and_states_are_free():
    own, after = config(), updates(5)
    grid = Watched(own, after)
    first, again = (asked(grid, own, ALL)[0][0].adapter for _ in range(2))
    assert first.sha256() == again.sha256()
    asked(grid, own, ALL[:4], number=2)
    asked(grid, own, ALL[:3], start=START.map(lambda value: value + 1))


def test_who_fell_silent_before_the_sum_may_be_left_out_of_it_again():
    """The set is that of the sum, not of those who were asked."""
    own, after = config(), updates(5)
    grid = Watched(own, after, dies={"client-001": 2})
    for _ in range(2):
        (update,), bad, _ = asked(grid, own, ALL)
        assert list(bad) == ["client-001"] and update.count == 4
    grid.dies = {}
    with pytest.raises(RoundDropped, match="client-001 would be in one of the two sums only"):
        asked(grid, own, ALL)


def test_a_client_that_starts_anew_remembers_what_it_gave():
    own, after = config(), updates(5)
    grid = Watched(own, after)
    asked(grid, own, ALL)
    other = Watched(own, after)
    other.local.store = grid.local.store
    with pytest.raises(RoundDropped, match="were given before"):
        asked(other, own, ALL[:4])


@pytest.mark.parametrize("fault", ["dies", "late"])
def test_a_round_that_lost_an_upload_begins_anew_under_other_masks(fault):
    """Of the first try nothing is ever unmasked, so that the sum is the only one of this start state."""
    own, after = config(), updates(5)
    whole = play(Watched(own, after), own)[0][0].adapter
    grid = Watched(own, after, **{fault: {"client-001": 2}})
    ask, uploads = grid.finish, []

    def finish(name, outcome):
        reply = ask(name, outcome)
        stage, client, *_ = grid.seen[-1]
        if stage == 2 and not reply.has_error():
            uploads.append((client, reply.content["arrays"]["adapter"].numpy().tobytes()))
        if stage == 2 and client == ALL[-1]:
            assert len(uploads) >= 4 and not grid.replies(3)
            grid.dies, grid.late = {}, {}
        return reply

    grid.finish = finish
    (update,), bad, _ = play(grid, own, quorum=1.0, again=1)
    assert update.adapter.sha256() == whole.sha256() and not bad
    assert len(uploads) == len(set(uploads)) == 9  # no client's second upload is its first
    assert len([1 for stage, *_ in grid.seen if stage == 3]) == 5


@pytest.mark.parametrize(("stage", "kind"), [(0, RoundFailed), (1, RoundFailed), (2, StillMasked)])
def test_no_mask_is_removed_for_a_sum_that_the_quorum_does_not_count(stage, kind):
    own, after = config(), updates(5)
    grid = Watched(own, after, dies={"client-001": stage})
    with pytest.raises(RoundFailed, match=r"4 of 5 clients are left, but run.quorum=1.0 needs 5") as failed:
        play(grid, own, quorum=1.0, again=1)
    assert type(failed.value) is kind and not grid.replies(3)
    assert len(grid.replies(2)) == (4 if stage == 2 else 0)  # of less than an upload nobody is asked to train
    assert play(Watched(own, after, dies={"client-001": 3}), own, quorum=1.0)[0][0].count == 5


def test_no_shares_leave_before_the_set_is_on_the_disk(monkeypatch):
    own, after = config(), updates(5)
    grid = Watched(own, after)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grid.local.store, "save_sum", full)
    with pytest.raises(OSError, match="No space left"):
        asked(grid, own, ALL)
    assert not grid.replies(3)


# Fewest clients ------------------------------------------------------------------------------------------------------


def test_fewer_than_min_clients_are_not_summed():
    own, after = config(min_clients=5), updates(5)
    with pytest.raises(RoundFailed, match=r"4 of 5 clients are left, but secagg.min_clients needs 5"):
        play(Watched(own, after, dies={"client-001": 0}), own)
    with pytest.raises(RoundDropped, match=r"secagg.min_clients needs 5"):
        play(Watched(own, after, dies={"client-001": 2}), own)
    assert play(Watched(own, after), own)[0][0].count == 5
    assert Terms.of(config(min_clients=2)).fewest == Terms.of(config()).threshold == 3


def test_a_client_keeps_to_its_own_min_clients_whatever_the_server_asks():
    own, after = config(min_clients=5), updates(5)
    grid = Watched(own, after, dies={"client-001": 2})
    lax = make_exchange(config())
    strategy = FedIT()
    server, sent, contents = strategy.plan(ServerState(START), grid.roster, Rules(rounds=1), PACKED)
    with pytest.raises(RoundDropped, match=r"4 of this client and its neighbours have uploaded; secagg.min_cl"):
        lax(grid, grid.roster, strategy, server, sent, contents, Rules(rounds=1))


@pytest.mark.parametrize(("clients", "options"), [(5, {"min_clients": 6}), (9, {"min_clients": 6, "neighbours": 4})])
def test_min_clients_are_no_more_than_a_client_sees(clients, options):
    with pytest.raises(InputError, match=r"secagg.min_clients=6: a client sees itself and its 4 neighbours only"):
        check(config(clients, **options))


def test_a_policy_may_ask_for_sums_of_so_many():
    policy = Policy(unit="none", min_clients=4)
    with pytest.raises(Refused, match=r"in sums of 3 clients or more; min_clients=4 needs"):
        policy.require(config(), 1)
    plain = config()
    plain.secagg.enabled = False
    with pytest.raises(Refused, match=r"in sums of 1 clients or more"):
        policy.require(plain, 1)
    policy.require(config(min_clients=4), 1)


# Dropped rounds ------------------------------------------------------------------------------------------------------


class Noisy(Watched):
    """One client uploads uniform noise in these rounds."""

    def __init__(self, own, after, rounds):
        super().__init__(own, after)
        self.rounds = rounds

    def finish(self, name, outcome):
        number = self.queue[name].content[RECORD]["round"]
        reply = super().finish(name, outcome)
        if (
            not reply.has_error()
            and "arrays" in reply.content
            and reply.metadata.src_node_id == 2
            and number in self.rounds
        ):
            words = reply.content.array_records["arrays"]["adapter"].numpy()
            noise = np.random.default_rng(number).integers(0, 2**32, words.shape, dtype=np.uint32)
            reply.content["arrays"]["adapter"] = Array(noise)
        return reply


def rounds(grid, own, count):
    events, states = [], []
    strategy = FedIT()
    rules = Rules(rounds=count, secagg=make_exchange(own))
    return (
        events,
        states,
        lambda: strategy.run(
            grid, ServerState(START), rules, codec=_Known(grid), record=events.append, after_round=states.append
        ),
    )


class _Known:
    """The packed codec, with a roster that needs no messages."""

    def __init__(self, grid):
        self.grid = grid

    def __getattr__(self, name):
        return getattr(PACKED, name)

    def roster(self, grid, expected):
        return self.grid.roster


def test_noise_drops_its_round_and_the_run_goes_on_under_the_next_number():
    own, after = config(), updates(5)
    events, states, run = rounds(Noisy(own, after, {1, 3}), own, 4)
    end = run()
    assert [(event["event"], event["round"]) for event in events if event["event"] != "quarantine"] == [
        ("round_dropped", 1),
        ("round", 2),
        ("round_dropped", 3),
        ("round", 4),
    ]
    assert "an upload was damaged or made up" in events[0]["reason"] and "outside" in events[0]["reason"]
    assert states[0].adapter.sha256() == START.sha256() and states[0].round == 1
    assert states[1].adapter.sha256() != START.sha256() and DROPPED not in end.numbers
    mean = sum(changes(one).clamp(-1, 1) for one in after.values()) / 5
    assert (changes(states[1].adapter) - mean).abs().max() < 1e-4


def test_three_dropped_rounds_in_a_row_end_the_run_and_say_why():
    own, after = config(), updates(5)
    events, states, run = rounds(Noisy(own, after, {2, 3, 4}), own, 9)
    with pytest.raises(RunError, match=r"outside.*3 rounds in a row were dropped, so the run stops"):
        run()
    assert [state.round for state in states] == [1, 2, 3]
    assert [event["event"] for event in events] == ["round"] + ["round_dropped"] * 3


def test_a_client_can_shift_a_sum_by_what_the_others_leave_and_no_more():
    """What the docs say of a dishonest client: up to (n - 1) clip in a coordinate pass, more drops the round."""
    own = config()
    after = {client: START for client in ALL}  # the others do not move
    levels, shifts = 2 ** (own.secagg.bits - 1) - 1, {}
    for clips in (4, 6):

        class Shifting(Watched):
            def finish(self, name, outcome, clips=clips):
                reply = super().finish(name, outcome)
                if not reply.has_error() and "arrays" in reply.content and reply.metadata.src_node_id == 2:
                    words = reply.content.array_records["arrays"]["adapter"].numpy().copy()
                    words[0] += np.uint32(clips * levels)
                    reply.content["arrays"]["adapter"] = Array(words)
                return reply

        try:
            shifts[clips] = float(changes(play(Shifting(own, after), own)[0][0].adapter)[0]) * 5
        except RoundDropped:
            shifts[clips] = None
    assert shifts[4] == pytest.approx(4 * own.secagg.clip, rel=1e-3) and shifts[6] is None
