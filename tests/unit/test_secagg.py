"""Secure aggregation: its arithmetic, and rounds with and without dropouts."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpeft.errors import RunError
from fedpeft.state import AdapterState, RoundFailed, Rules, ServerState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.secagg.stages import NAMES, RECORD, neighbour_circle
from fedpeft.strategies.secagg.terms import Terms, make_exchange, masking
from fedpeft.strategies.wire import PACKED
from support.masked import SIZE, START, Watched, changes, config, exchanged, play, updates

pytestmark = pytest.mark.usefixtures("flower_run")

# Arithmetic ----------------------------------------------------------------------------------------------------------


def test_fixed_point_by_hand():
    """8 bits: 127 stands for the clip of 2."""
    words, clipped = masking.quantise(np.array([2.0, -2.0, 0.0, 1.0, 5.0, -2.0001]), clip=2.0, bits=8)
    assert words.tolist() == [127, 2**32 - 127, 0, 64, 127, 2**32 - 127]  # 63.5 goes to the even neighbour
    assert clipped == 2
    mean = masking.dequantise(words + words, clients=2, clip=2.0, bits=8)
    np.testing.assert_allclose(mean, [2.0, -2.0, 0.0, 128 / 127, 2.0, -2.0], rtol=1e-15)


@given(st.lists(st.lists(st.floats(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6), st.integers(8, 24))
@settings(deadline=None, max_examples=60)
def test_the_mean_is_off_by_at_most_half_a_step_beside_clipping(rows, bits):
    values, clip = np.array(rows), 1.5
    total = np.sum([masking.quantise(row, clip, bits)[0] for row in values], axis=0, dtype=masking.WORD)
    off = masking.dequantise(total, len(rows), clip, bits) - np.clip(values, -clip, clip).mean(axis=0)
    assert np.abs(off).max() <= clip / masking.levels(bits) / 2 * (1 + 1e-9)


@pytest.mark.parametrize("clients", [3, 4, 5, 100, 1024, 1025])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_bit_budget_is_exact(clients, sign):
    """At the largest allowed bits all clients at the clip add up; with one more bit the same sum overflows."""

    def mean(bits):
        word, _ = masking.quantise(np.array([sign * 0.7]), 0.7, bits)
        total = np.full(clients, word[0], masking.WORD).sum(dtype=masking.WORD, keepdims=True)
        return masking.dequantise(total, clients, 0.7, bits)

    most = masking.max_bits(clients)
    assert mean(most) == pytest.approx(sign * 0.7, rel=1e-12)
    try:
        assert mean(most + 1) != pytest.approx(sign * 0.7, rel=1e-3)
    except ValueError as error:
        assert "outside" in str(error)


def test_a_sum_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"1 of 2 sums are outside of \+-381"):
        masking.dequantise(np.array([381, 382], masking.WORD), clients=3, clip=1.0, bits=8)


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not():
    secret = bytes([0, *range(1, 32)])  # a leading zero must survive
    shares = masking.split(secret, threshold=3, holders=5)
    assert all(masking.combine(list(chosen), 3) == secret for chosen in combinations(shares, 3))
    assert masking.combine(shares[::-1], 3) == secret
    with pytest.raises(ValueError, match="2 of the 3"):
        masking.combine([shares[0], shares[1], shares[1]], 3)
    with pytest.raises(ValueError, match="not of one secret"):  # what two shares alone interpolate to
        masking.combine(shares[:2], 2)
    with pytest.raises(ValueError, match="not of one secret"):
        masking.combine([*shares[:2], masking.split(secret, 3, 5)[2]], 3)
    assert shares != masking.split(secret, 3, 5)


def test_two_clients_agree_on_keys_that_depend_on_the_purpose():
    (one, its), (two, other) = masking.keypair(), masking.keypair()
    assert masking.agree(one, other, "mask") == masking.agree(two, its, "mask") != masking.agree(one, other, "box")
    sealed = masking.seal(masking.agree(one, other, "box"), b"share", "a to b")
    assert masking.unseal(masking.agree(two, its, "box"), sealed, "a to b") == b"share"
    for key, label in ((masking.agree(two, its, "box"), "b to a"), (bytes(32), "a to b")):
        with pytest.raises(ValueError, match="does not open"):
            masking.unseal(key, sealed, label)
    assert (masking.stream(bytes(32), 8) != masking.stream(bytes(31) + b"1", 8)).all()


@given(st.integers(3, 12), st.integers(1, 6))
def test_the_graph_is_mutual_and_regular(clients, half):
    names = [f"c{index}" for index in range(clients)]
    graph = neighbour_circle(names, 2 * half)
    assert set(graph) == set(names)
    for name, others in graph.items():
        assert name not in others and len(set(others)) == len(others) == min(2 * half, clients - 1)
        assert all(name in graph[other] for other in others)
    assert any(neighbour_circle(names, 2) != neighbour_circle(names, 2) for _ in range(40)) or clients == 3


# A round -------------------------------------------------------------------------------------------------------------


def expect(result, after, who, own):
    """The update is START plus the mean change of `who`, to half a step."""
    (update,), bad, traffic = result
    plan = Terms.of(own)
    wanted = torch.stack([changes(after[client]).clamp(-plan.clip, plan.clip) for client in who]).mean(dim=0)
    assert (changes(update.adapter) - wanted).abs().max() <= plan.clip / masking.levels(plan.bits) / 2 * (1 + 1e-6)
    assert (update.client, update.weight, update.count, update.metrics) == ("secure sum", 1.0, len(who), {})
    assert sorted(bad) == sorted(set(after) - set(who)) and traffic["secagg"]["uploaded"] == len(who)


@pytest.mark.parametrize("own", [config(), config(7, neighbours=4), config(3), config(clip=0.2, bits=29)])
def test_a_round_gives_the_mean_of_the_clipped_changes(own):
    after = updates(own.data.clients)
    result, _ = exchanged(own, after)
    expect(result, after, list(after), own)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("how", ["dies", "late"])
@pytest.mark.parametrize("own", [config(), config(7, neighbours=4)])
def test_a_client_that_drops_out_takes_only_its_own_change_along(stage, how, own):
    after, gone = updates(own.data.clients), "client-001"
    result, _ = exchanged(own, after, **{how: {gone: stage}})
    expect(result, after, [client for client in after if client != gone or stage == 3], own)
    _, bad, traffic = result
    assert traffic["secagg"]["dropped"] == {NAMES[stage]: [gone]}
    if stage < 3:
        assert f"stage {stage} ({NAMES[stage]}): client error" in bad[gone]


def each(change):
    """A content in which every value of every config record is changed."""

    def changed(content):
        records = {
            name: ConfigRecord({key: change(value) for key, value in record.items()})
            for name, record in content.config_records.items()
        }
        return RecordDict({**content, **records})

    return changed


def without(content, kind):
    return RecordDict({name: record for name, record in content.items() if not isinstance(record, kind)})


SPOILED = {
    "no content": lambda content: RecordDict({}),
    "no key": lambda content: RecordDict({**without(content, ConfigRecord), RECORD: ConfigRecord({"other": b"x"})}),
    "a text": each(lambda value: "x" * 32),
    "a number": each(lambda value: 7),
    "nothing": each(lambda value: b""),
    "a list too long": each(lambda value: [*(value if isinstance(value, list) else [value]), b"x"]),
    "a list too short": each(lambda value: value[:-1] if isinstance(value, list) else [value]),
    "texts in a list": each(lambda value: ["x"] * len(value) if isinstance(value, list) else ["x"]),
}
UPLOADS = {
    "no array": lambda content: without(content, ArrayRecord),
    "another name": lambda content: uploading(content, "other", Array(np.zeros(SIZE, masking.WORD))),
    "floats": lambda content: uploading(content, "adapter", Array(np.zeros(SIZE))),
    "too many": lambda content: uploading(content, "adapter", Array(np.zeros(SIZE + 1, masking.WORD))),
    "no bytes": lambda content: uploading(content, "adapter", Array("uint32", (SIZE,), "numpy.ndarray", b"")),
    "a dtype that is none": lambda content: uploading(content, "adapter", Array("evil", (9,), "numpy.ndarray", b"x")),
}


def uploading(content, name, array):
    return RecordDict({**without(content, ArrayRecord), "arrays": ArrayRecord({name: array})})


@pytest.mark.parametrize(
    ("stage", "how"), [*((stage, how) for stage in (0, 1, 3) for how in SPOILED), *((2, how) for how in UPLOADS)]
)
def test_a_reply_of_another_form_loses_its_client_and_no_other(stage, how):
    own = config()
    after, gone = updates(own.data.clients), "client-001"
    change = (UPLOADS if stage == 2 else SPOILED)[how]
    result, _ = exchanged(own, after, spoiled={gone: (stage, change)})
    expect(result, after, [client for client in after if client != gone or stage == 3], own)
    assert result[2]["secagg"]["dropped"] == {NAMES[stage]: [gone]}
    _, bad, _ = result
    assert "Traceback" not in bad.get(gone, "") and bool(bad.get(gone)) == (stage != 3)


@given(st.dictionaries(st.sampled_from(list(updates(5))), st.integers(0, 3), max_size=3), st.booleans())
@settings(deadline=None, max_examples=25)
def test_whoever_drops_out_the_sum_is_right_or_the_round_fails(gone, late):
    own, after = config(), updates(5)
    try:
        result, _ = exchanged(own, after, **{"late" if late else "dies": gone})
    except RoundFailed as error:
        assert len(gone) == 3 and "secure aggregation, stage" in str(error)
    else:
        expect(result, after, [client for client in after if gone.get(client, 3) == 3], own)


@pytest.mark.parametrize("stage", range(4))
def test_too_many_dropouts_fail_and_say_where_and_who(stage):
    gone = {f"client-00{index}": stage for index in range(3)}
    with pytest.raises(RoundFailed) as caught:
        exchanged(config(), updates(5), 1, dies=gone)
    text = str(caught.value)
    assert f"round 1: secure aggregation, stage {stage} ({NAMES[stage]}): 2 of 5 clients are left" in text
    assert "secagg.threshold needs 3" in text and all(client in text for client in gone) and "client-003" not in text


def test_rounds_follow_each_other_and_an_unfinished_one_leaves_nothing_behind():
    own, after = config(), updates(5)
    grid = Watched(own, after, late={"client-002": 2})
    expect(play(grid, own, 1), after, [client for client in after if client != "client-002"], own)
    states = {client: RECORD in grid.nodes[node].state for client, node in grid.roster.items()}
    assert states == {client: client == "client-002" for client in after}  # it was not asked to unmask
    grid.late = {}
    expect(play(grid, own, 2), after, list(after), own)
    assert not any(RECORD in node.state for node in grid.nodes.values())


def test_traffic_is_what_was_moved():
    """4 bytes a coordinate each way, two keys, and two shares of 68 bytes for each of four neighbours, sealed once."""
    (_, _, traffic), _ = exchanged(config(), updates(5))
    box = 2 * masking.SHARE_BYTES + masking.NONCE_BYTES + 16
    keys, shares = 64, 4 * box
    assert traffic["bytes_down"] == 5 * (4 * SIZE + 4 * keys + shares)
    assert traffic["bytes_up"] == 5 * (4 * SIZE + keys + shares + 5 * masking.SHARE_BYTES)


def test_controls_are_changes_already():
    """What SCAFFOLD sends beside the adapter is not measured from what was sent."""
    control = {f"control:{key}": value + 0.5 for key, value in START.tensors.items()}
    after = {
        name: update.beside({key: value + 0.1 for key, value in control.items()}) for name, update in updates(5).items()
    }
    own, strategy = config(), FedIT()
    strategy.uploads = lambda server: ("A", "B")
    strategy.broadcast = lambda server, client: START.beside(control)
    strategy.instructions = lambda server: Instructions(1, ("A", "B"), ("A", "B"))
    grid = Watched(own, after)
    server, sent, contents = strategy.plan(ServerState(START), grid.roster, Rules(rounds=1), PACKED)
    (update,), _, _ = make_exchange(own)(grid, grid.roster, strategy, server, sent, contents, Rules(rounds=1))
    wanted = control["control:q/B"].double() + 0.1
    torch.testing.assert_close(update.adapter.extra["control:q/B"], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors | {"q/B": tensors["q/B"] * float("nan")},
        lambda tensors: tensors | {"q/B": tensors["q/B"][:-1]},
    ],
)
def test_an_update_that_no_server_could_check_is_not_sent(change):
    own, after = config(), updates(5)
    spoiled = after | {"client-004": AdapterState(change(after["client-004"].tensors), START.sites)}
    result, _ = exchanged(own, spoiled)
    expect(result, after, list(after)[:-1], own)


def test_a_damaged_upload_is_noticed_in_the_sum():
    class Damaging(Watched):
        def finish(self, name, outcome):
            reply = super().finish(name, outcome)
            if "arrays" in reply.content and reply.metadata.src_node_id == 2:
                words = reply.content.array_records["arrays"]["adapter"].numpy()
                reply.content["arrays"]["adapter"] = Array(words * np.uint32(3))
            return reply

    with pytest.raises(RoundFailed, match=r"stage 3 .*: an upload was damaged .*: 1\d+ of 1600 sums are outside"):
        play(Damaging(config(), updates(5)), config())


def test_an_upload_of_another_length_or_type_is_left_out():
    class Damaging(Watched):
        def finish(self, name, outcome):
            reply = super().finish(name, outcome)
            if "arrays" in reply.content and reply.metadata.src_node_id in (2, 3):
                words = reply.content.array_records["arrays"]["adapter"].numpy()
                damaged = words[:-1] if reply.metadata.src_node_id == 2 else words.astype(np.float32)
                reply.content["arrays"]["adapter"] = Array(damaged)
            return reply

    after = updates(5)
    result = play(Damaging(config(), after), config())
    expect(result, after, list(after)[2:], config())
    assert "uint32 [1599], expected uint32 [1600]" in result[1]["client-000"]
    assert "float32 [1600]" in result[1]["client-001"]


def test_clients_that_are_sent_different_values_have_no_common_start():
    strategy, own = FedIT(), config()
    strategy.broadcast = lambda server, client: START.map(lambda value: value + (client == "client-003"))
    grid = Watched(own, updates(5))
    server, sent, contents = strategy.plan(ServerState(START), grid.roster, Rules(rounds=1), PACKED)
    with pytest.raises(RunError, match="client-003 is sent other values than client-000"):
        make_exchange(own)(grid, grid.roster, strategy, server, sent, contents, Rules(rounds=1))
    with pytest.raises(RunError, match="planned for 4 clients a round, not 5"):
        make_exchange(config(4))(grid, grid.roster, strategy, server, sent, contents, Rules(rounds=1))
