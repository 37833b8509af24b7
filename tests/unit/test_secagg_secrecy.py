"""The server of secure aggregation sees sums only, a client gives no more away, and unsafe configs are refused."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict
from scipy.stats import chisquare

from fedpeft import config as configs
from fedpeft.clients.app import client_app
from fedpeft.config import Config
from fedpeft.errors import InputError
from fedpeft.state import ServerState
from fedpeft.strategies.asking import ask_nodes
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.secagg.stages import KINDS, RECORD
from fedpeft.strategies.secagg.terms import Terms, check, describe, masking
from fedpeft.strategies.wire import PACKED
from support.masked import SIZE, START, Watched, changes, config, exchanged, play, updates

pytestmark = pytest.mark.usefixtures("flower_run")

# The server's view ---------------------------------------------------------------------------------------------------


def uploads(grid: Watched) -> dict[str, np.ndarray]:
    return {
        client: reply.content.array_records["arrays"]["adapter"].numpy() for client, reply in grid.replies(2).items()
    }


def hides(words: np.ndarray, change: np.ndarray, own: Config) -> bool:
    """Whether a vector looks uniform and tells nothing of the change: false with a chance of about 1 in 10 000."""
    octets = words.astype(masking.WORD).view(np.uint8).reshape(-1, 4)
    uniform = all(chisquare(np.bincount(octets[:, place], minlength=256)).pvalue > 1e-5 for place in range(4))
    signed = words.astype(masking.WORD).view("<i4").astype(float)
    related = abs(np.corrcoef(signed, change)[0, 1]) > 4 / np.sqrt(len(change))
    read = signed * own.secagg.clip / masking.levels(own.secagg.bits)
    return uniform and not related and np.abs(read - change).mean() > 10


def shared_secrets(grid: Watched, own: Config) -> dict[str, dict[str, bytes]]:
    """The seeds and mask keys that the server can put together from the shares that it was given."""
    given: dict[str, dict[str, list[bytes]]] = {"uploaded": {}, "silent": {}}
    for stage, _, request, reply in grid.seen:
        if stage == 3 and not reply.has_error():
            asked = request.content[RECORD]
            owners = [(name, kind) for kind in ("uploaded", "silent") for name in asked[kind]]
            for (name, kind), share in zip(owners, reply.content[RECORD]["shares"], strict=True):
                given[kind].setdefault(name, []).append(share)
    return {
        kind: {name: masking.combine(shares, Terms.of(own).threshold) for name, shares in owners.items()}
        for kind, owners in given.items()
    }


def test_no_message_to_the_server_holds_an_update():
    own, after = config(), updates(5)
    _, grid = exchanged(own, after)
    assert [len(grid.replies(stage)) for stage in range(4)] == [5, 5, 5, 5]
    for client, words in uploads(grid).items():
        assert hides(words, changes(after[client]).numpy(), own)
    for stage, client, _, reply in grid.seen:
        records = reply.content
        assert not records.metric_records and set(records) == ({"arrays", RECORD} if stage == 2 else {RECORD})
        sizes = {key: value for key, value in records[RECORD].items() if not isinstance(value, list)}
        assert {len(value) for value in sizes.values()} <= {masking.KEY_BYTES}, (stage, client)


def test_the_check_has_power(monkeypatch):
    """With masks of zero the sum is as right as ever, and the vectors tell everything."""
    own, after = config(), updates(5)
    monkeypatch.setattr(masking, "stream", lambda key, size: np.zeros(size, masking.WORD))
    ((update,), _, _), grid = exchanged(own, after)
    mean = sum(changes(one) for one in after.values()) / 5
    assert (changes(update.adapter) - mean.clamp(-1, 1)).abs().max() < 0.1
    assert not any(hides(words, changes(after[client]).numpy(), own) for client, words in uploads(grid).items())


def test_what_unmasking_reveals_does_not_unmask_one_client():
    """The server learns the seeds of all that uploaded; the pairwise masks still hide each of them."""
    own, after = config(), updates(5)
    _, grid = exchanged(own, after)
    seeds = shared_secrets(grid, own)["uploaded"]
    assert set(seeds) == set(after)
    rest = {client: words - masking.stream(seeds[client], SIZE) for client, words in uploads(grid).items()}
    for client, words in rest.items():
        assert (words != uploads(grid)[client]).any() and hides(words, changes(after[client]).numpy(), own)
    total = masking.dequantise(sum(rest.values(), np.zeros(SIZE, masking.WORD)), 5, own.secagg.clip, own.secagg.bits)
    assert not hides(masking.quantise(total, 1.0, 22)[0], total, own)  # together they are the sum


def test_an_upload_that_comes_too_late_stays_hidden():
    """Its mask key was given away, so its pairwise masks can be removed; its own mask cannot."""
    own, after, slow = config(), updates(5), "client-001"
    _, grid = exchanged(own, after, late={slow: 2})
    secrets = shared_secrets(grid, own)
    assert set(secrets["silent"]) == {slow} and slow not in secrets["uploaded"]
    publics = {client: reply.content[RECORD]["mask"] for client, reply in grid.replies(0).items()}
    assert masking.public_of(secrets["silent"][slow]) == publics[slow]
    words = uploads(grid)[slow]
    for other, public in publics.items():
        if other != slow:
            mask = masking.stream(masking.agree(secrets["silent"][slow], public, "mask"), SIZE)
            words = words - mask if slow < other else words + mask
    assert hides(words, changes(after[slow]).numpy(), own)


def test_two_runs_send_different_vectors_of_the_same_sum():
    own, after = config(), updates(5)
    runs = [exchanged(own, after) for _ in range(2)]
    sums = [result[0][0].adapter for result, _ in runs]
    assert sums[0].sha256() == sums[1].sha256()
    one, two = (uploads(grid) for _, grid in runs)
    assert all((one[client] == two[client]).mean() < 0.01 for client in after)
    keys = [reply.content[RECORD]["mask"] for _, grid in runs for reply in grid.replies(0).values()]
    assert len(set(keys)) == 10


# A client's refusals -------------------------------------------------------------------------------------------------


class Halted(Exception):
    pass


@pytest.fixture
def waiting(monkeypatch):
    """A grid of five clients that have all uploaded and were not asked to unmask yet."""
    grid, own = Watched(config(), updates(5)), config()
    push = grid.push_messages

    def until_unmask(messages):
        if messages[0].metadata.message_type == KINDS[3]:
            raise Halted
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", until_unmask)
    with pytest.raises(Halted):
        play(grid, own)
    monkeypatch.setattr(grid, "push_messages", push)
    return grid


def told(grid: Watched, stage: int, client: str = "client-000", number: int = 1, **fields):
    """The answer of one client to this question: its record, or the reason of its refusal."""
    content = RecordDict({RECORD: ConfigRecord({**fields, "round": number})})
    if stage == 2:
        told = FedIT().instructions(ServerState(START, round=number - 1))
        content = RecordDict({**PACKED.content(START, told), **content})
    (reply,) = ask_nodes(grid, KINDS[stage], {grid.roster[client]: content}, None, lambda _, reply: reply).values()
    return reply.error.reason if reply.has_error() else reply.content[RECORD]


ALL = [f"client-00{index}" for index in range(5)]


def test_a_client_never_gives_both_secrets_of_one_client(waiting):
    assert "asked for both secrets of client-003" in told(waiting, 3, uploaded=ALL, silent=["client-003"])
    assert len(told(waiting, 3, uploaded=ALL[:3], silent=ALL[3:])["shares"]) == 5
    # Nothing is left to ask for in a second message.
    for again in ({"uploaded": ALL, "silent": []}, {"uploaded": ALL[:3], "silent": ALL[3:]}):
        assert "stage 3 (unmask): not due here" in told(waiting, 3, **again)


def test_a_client_gives_nothing_unless_enough_have_uploaded(waiting):
    assert "2 of this client and its neighbours have uploaded; secagg.threshold needs 3" in told(
        waiting, 3, uploaded=ALL[:2], silent=ALL[2:]
    )
    assert "needs 3" in told(waiting, 3, uploaded=[ALL[0]] * 5, silent=[])  # one name five times
    assert "its own upload is not in the sum" in told(waiting, 3, uploaded=ALL[1:], silent=[ALL[0]])
    assert "shares of stranger, which are not held" in told(waiting, 3, uploaded=[*ALL[:-1], "stranger"], silent=[])
    assert "not due here" in told(waiting, 3, number=2, uploaded=ALL, silent=[])


def test_one_mask_is_used_once(waiting):
    """A second upload under the same masks would give away the difference of the two."""
    asked = {"names": ALL[1:], "sealed": [b""] * 4}
    assert "stage 2 (masked upload): not due here" in told(waiting, 2, **asked)
    assert "stage 1 (key shares): not due here" in told(waiting, 1, names=[], masks=[], boxes=[])


def test_keys_that_a_client_does_not_take():
    grid = Watched(config(), updates(5))
    told(grid, 0)
    keys = {name: (masking.keypair()[1], masking.keypair()[1]) for name in [*ALL[1:], "extra"]}

    def asked(names, **changed):
        fields = {
            "names": list(names),
            "masks": [keys[name][0] for name in names],
            "boxes": [keys[name][1] for name in names],
        }
        return told(grid, 1, **{**fields, **changed})

    assert "2 of this client and its neighbours have keys; secagg.threshold needs 3" in asked(ALL[1:2])
    assert "5 neighbours, but secagg.neighbours allows 4" in asked(keys)
    assert "same name or public key" in asked(ALL[1:], masks=[keys[ALL[1]][0]] * 4)
    assert "same name or public key" in asked([ALL[1]] * 4)
    assert len(asked(ALL[1:])["sealed"]) == 4
    assert "needs 3" in told(grid, 2, names=[], sealed=[])
    assert "the shares from client-001: it does not open" in told(grid, 2, names=ALL[1:], sealed=[b"0" * 200] * 4)
    assert "shares of stranger, which is no neighbour" in told(grid, 2, names=["stranger", *ALL[2:]], sealed=[b""] * 4)


def test_a_client_that_masks_sends_nothing_in_the_clear_and_the_other_way_round():
    grid = Watched(config(), updates(5))
    content = PACKED.content(START, FedIT().instructions(ServerState(START)))
    (reply,) = ask_nodes(grid, "train", {grid.roster["client-000"]: content}, None, lambda _, reply: reply).values()
    assert reply.has_error() and "sends no update in the clear" in reply.error.reason
    assert "secagg.enabled=false" in told(Watched(Config(), updates(5)), 0)
    assert callable(client_app(lambda: None, lambda context: "a"))  # and is made without a look at the config


# Configs -------------------------------------------------------------------------------------------------------------

ON = {"secagg.enabled": True, "strategy.weighting": "uniform"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"strategy": "flora"},
            r"strategy\.name=flora must see each .*Strategies that need sums only: fedit, .*fed_sb\.",
        ),
        ({"strategy.wrap": ["fedprox", "median"]}, r"strategy\.wrap: median must see .*Wrappers .*: fedprox, scaffold"),
        ({"strategy.wrap": ["fedprox"], "strategy": "krum"}, "krum must see"),
        ({"strategy.weighting": "examples"}, r"Set strategy\.weighting=uniform"),
        ({"run.max_update_norm": 3}, r"run\.max_update_norm=3: .*Set run\.max_update_norm=null"),
        ({"strategy": "fedit", "adapter.client_ranks": [2, 4]}, r"adapter\.client_ranks=\[2, 4\]"),
        ({"data.clients": 2}, "with 2 clients a round: with fewer than 3"),
        ({"run.clients_per_round": 2}, "with 2 clients a round"),
        ({"privacy.unit": "client", "privacy.noise_multiplier": 1.0}, r"privacy\.unit=client"),
        ({"secagg.threshold": 0.5}, r"secagg\.threshold=0\.5 .* 9 neighbours is 5; at least 6"),
        ({"data.clients": 3, "secagg.threshold": 0.1}, r"is 1; at least 2 must be needed"),
        ({"secagg.neighbours": 10}, r"secagg\.neighbours=10: must be even and at most 9"),
        ({"secagg.neighbours": 3}, r"secagg\.neighbours=3: must be even"),
        ({"secagg.bits": 29}, r"secagg\.bits=29: the sum of 10 clients .* at most 28; set secagg\.bits=28"),
        ({"data.clients": 2000}, r"secagg\.bits=22: the sum of 2000 clients .* at most 21"),
    ],
)
def test_what_cannot_be_summed_in_secret_is_refused(changed, message):
    with pytest.raises(InputError, match=message):
        configs.load({}, {**ON, **changed})
    if "strategy.wrap" not in changed and "adapter.client_ranks" not in changed and "privacy.unit" not in changed:
        configs.load({}, {**changed, "secagg.enabled": False})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"strategy": "fedsvd"},
        {"strategy": "ffa_lora"},
        {"strategy": "rolora"},
        {"strategy.wrap": ["fedadam"]},
        {"secagg.bits": 28},
        {"secagg.neighbours": 4},
        {"secagg.neighbours": 9},
        {"data.clients": 3},
        {"data.clients": 1024},
        {"data.clients": 5000, "run.clients_per_round": 1000},
    ],
)
def test_what_can_be_summed_passes(changed):
    check(configs.load({}, {**ON, **changed}))


def test_thresholds_count_the_client_itself():
    assert Terms.of(configs.load({}, ON)).threshold == 6
    assert Terms.of(configs.load({}, {**ON, "data.clients": 100, "secagg.threshold": 0.55})).threshold == 55
    assert Terms.of(configs.load({}, {**ON, "secagg.neighbours": 4})).threshold == 3


def test_the_description_says_who_sees_what():
    text = describe(configs.load({}, ON))
    assert "only sums of at least 6" in text and "collude" in text and "not signed" in text and "psilon" not in text
    private = config()
    private.privacy.unit, private.data.holdout = "sample", 0.2
    assert "does not make it smaller" in describe(private) and "one by one" in describe(private)
