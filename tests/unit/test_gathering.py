"""Answers of a round are on the disk while it lasts: memory does not grow with the sites, and no bit changes."""

from __future__ import annotations

import ctypes
import errno
import gc
import multiprocessing
import os
import sys
import weakref
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import Message

from fedpeft import registry
from fedpeft.config import Config, DataConfig, StrategyConfig
from fedpeft.deploy import flower, parcel
from fedpeft.deploy.coordinator import post
from fedpeft.deploy.coordinator.flower import Refusal
from fedpeft.deploy.coordinator.roster import SiteGrid
from fedpeft.deploy.coordinator.run import say_what_is_kept
from fedpeft.flower import empty_run, identify
from fedpeft.state import AdaptedLayer, AdapterState, Rules, ServerState
from fedpeft.state_file import StateFile
from fedpeft.strategies.build import build
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.rules.fedit import FedIT
from fedpeft.strategies.sequence import exchange
from fedpeft.strategies.sequence.base import add_tensors
from fedpeft.strategies.wire import PACKED

RUN, WIDE = 5, 2**17  # values of a factor: an answer has 1 MiB
MB = 2**20


def made(seed: int) -> AdapterState:
    values = torch.Generator().manual_seed(seed)
    tensors = {f"layer/{role}": torch.randn(4, WIDE // 4, generator=values) for role in "AB"}
    return AdapterState(tensors, {"layer": AdaptedLayer("lora", (WIDE // 4, WIDE // 4), 1.0)})


class Sites(SiteGrid):
    """A post with sites that answer one after the other, in the order that they are given; memory is looked at."""

    def __init__(self, folder: Path, nodes: list[int]) -> None:
        self.box = post.Post(empty_run(RUN), lambda: [SimpleNamespace(node_id=node) for node in nodes], folder)
        super().__init__(self.box, SimpleNamespace(put=lambda message, name: None), None, lambda event: None, self.play)
        self.waiting, self.most = list(nodes), 0

    def play(self, names: list[str]) -> None:
        gc.collect()  # what Flower makes of a message refers to itself
        self.most = max(self.most, anonymous())
        for _ in range(3):  # so that answers lie there together
            if self.waiting:
                self.answer(self.waiting.pop(0))

    def call(self, method: str, node: int, **fields):
        request = flower.request(method, flower.Node(node_id=node), **fields)
        return flower.answer_type(method).FromString(self.box.answer(method, node, request.SerializeToString()))

    def answer(self, node: int) -> None:
        pulled = self.call("PullMessages", node)
        objects = {
            name: self.call("PullObject", node, object_id=name).object_content
            for name in flower.object_ids(pulled.message_object_trees[0])
        }
        message = flower.inflated(pulled, objects)
        _, told = PACKED.open(parcel.unpack_content(message.content))
        identify(RUN, node, 0)
        content = PACKED.reply(made(node), {"num-examples": float(node)}, told.round)
        request, contents = flower.deflated(Message(parcel.pack_content(content), reply_to=message))
        tree = request.message_object_trees[0]
        taken = self.call("PushMessages", node, messages_list=request.messages_list, message_object_trees=[tree])
        for name in taken.objects_to_push:
            fields = {"object_id": name, "object_content": contents(name), "session_id": taken.session_id}
            assert self.call("PushObject", node, **fields).stored


def anonymous() -> int:
    """Bytes of this process that no file has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def play(folder: Path, nodes: list[int], name: str = "fedit", kept: Path | None = None):
    """The adapter after a round of these sites, and the most memory that it took."""
    grid = Sites(folder, nodes)
    strategy = registry.load("strategies", name)()
    identify(RUN, 1, 0)
    rules = Rules(rounds=1, folder=kept)
    codec = SimpleNamespace(
        roster=lambda grid, expected: {f"site-{node}": node for node in nodes},
        content=PACKED.content,
        read=PACKED.read,
    )
    after = strategy.run(grid, strategy.initial(made(0), 0), rules, codec=codec)
    return after.adapter, grid.most


class Live:
    """How many of the answers that were read are still there, by their tensors: the most at any time."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def watch(self, values) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        weakref.finalize(next(iter(values)), self.forget)

    def forget(self) -> None:
        self.now -= 1


@pytest.mark.parametrize("sites", [5, 60])
def test_no_more_answers_of_a_round_are_held_than_one_is_read(tmp_path, monkeypatch, sites):
    live, read = Live(), PACKED.read

    def watch(*given):
        state, metrics = read(*given)
        live.watch(state.tensors.values())
        return state, metrics

    monkeypatch.setattr(sys.modules[__name__], "WIDE", 64)
    monkeypatch.setattr(type(PACKED), "read", lambda codec, *given: watch(*given))
    nodes = list(range(1, sites + 1))
    play(tmp_path, nodes, kept=tmp_path)
    assert live.most <= 2 and live.now == 0
    play(tmp_path, nodes)
    assert live.most == sites


@pytest.mark.parametrize("sites", [5, 60])
def test_no_more_sums_of_a_task_are_held_than_one_is_read(tmp_path, monkeypatch, sites):
    """And they are added one after the other."""
    live, form = Live(), {"x": (4,)}
    nodes = {f"site-{number:02d}": number for number in range(1, sites + 1)}
    read = exchange.read_sums

    def watch(*given):
        state, weight = read(*given)
        live.watch(state.extra.values())
        return state, weight

    monkeypatch.setattr(exchange, "read_sums", watch)
    sequence = SimpleNamespace(
        curriculum=SimpleNamespace(task=lambda number: 0), make_lesson=lambda task: Instructions(1).learn
    )
    codec = SimpleNamespace(roster=lambda grid, expected: nodes, content=PACKED.content)
    identify(RUN, 1, 0)

    def ask(folder):
        rules = Rules(rounds=1, folder=folder)
        return exchange.ask_for_sums(
            Summing(), codec, sequence, rules, lambda event: None, 1, "head", "online", made(0), form
        )

    contents, packed = codec.content, []
    codec.content = lambda adapter, told: packed.append(told) or contents(adapter, told)
    held = add_tensors(tensors for tensors, _ in ask(tmp_path))
    assert len(packed) == 1  # the question too is in memory once
    assert live.most <= 2 and live.now == 0 and os.listdir(tmp_path) == []
    assert torch.equal(held["x"], torch.full((4,), sum(nodes.values()), dtype=torch.float64))
    answers = ask(None)
    assert live.most == sites and torch.equal(add_tensors(tensors for tensors, _ in answers)["x"], held["x"])
    assert torch.equal(answers[0][0]["x"], torch.ones(4))  # what is added to is none of the answers


class Summing:
    """Sites that answer with their number, one after the other."""

    def __init__(self) -> None:
        self.messages: dict[str, Message] = {}

    def push_messages(self, messages):
        for message in messages:
            name = f"message-{len(self.messages)}"
            message.metadata.__dict__["_message_id"] = name
            self.messages[name] = message
            yield name

    def pull_messages(self, names):
        for name in names:
            message = self.messages.pop(name)
            sums = AdapterState({}, extra={"x": torch.full((4,), float(message.metadata.dst_node_id))})
            yield Message(PACKED.reply(sums, {"num-examples": 1.0}, 1), reply_to=message)


def measure_memory(folder: Path) -> tuple[int, int, int]:
    """Most memory of a round of 6 sites, of 36, and of 36 whose answers stay in memory; in a process of its own, where
    nothing that others have given back is there to be taken.
    """
    # The C library gives back every large block as soon as it is free, or its habits would be measured.
    ctypes.CDLL(None).mallopt(-3, MB // 4)
    few = max(play(folder, list(range(1, 7)), kept=folder)[1] for _ in range(2))  # the first loads things
    many, without = (play(folder, list(range(1, 37)), kept=kept)[1] for kept in (folder, None))
    return few, many, without


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="memory is measured with Linux's /proc and glibc's mallopt",
)
def test_memory_of_a_round_does_not_grow_with_its_sites(tmp_path):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        few, many, without = pool.submit(measure_memory, tmp_path).result()
    assert many - few < 12 * MB  # 30 more answers, of 1 MB each
    assert without - many > 18 * MB
    assert os.listdir(tmp_path) == []


def test_the_order_of_arrival_and_the_disk_change_no_bit(tmp_path):
    undisturbed = play(tmp_path, [1, 2, 3, 4, 5])[0].sha256()
    for order in ([1, 2, 3, 4, 5], [5, 3, 1, 4, 2]):
        assert play(tmp_path, order, kept=tmp_path)[0].sha256() == undisturbed
    assert play(tmp_path, [1, 2, 3, 4], kept=tmp_path)[0].sha256() != undisturbed


def test_a_state_file_gives_back_every_bit_and_keeps_what_is_written_elsewhere_apart(tmp_path):
    mixed = {"layer/A": torch.randn(3, 5), "layer/B": torch.randn(5, 2).bfloat16(), "layer/n": torch.tensor(7)}
    states = [
        AdapterState({}),
        AdapterState(mixed, {"layer": AdaptedLayer("lora", (5, 5), 2.0)}, {"mask": torch.tensor([True, False])}),
        AdapterState({"layer/A": torch.empty(0, 4).double(), "layer/B": torch.randn(4, 4).T}),
    ]
    file = StateFile(tmp_path)
    forms = [file.put(state) for state in states]
    assert all(value.is_meta for form in forms for value in form.payload)
    read = [file.get(form) for form in forms]
    assert [state.sha256() for state in read] == [state.sha256() for state in states]
    assert [state.sites for state in read] == [state.sites for state in states]
    read[1]["layer/A"].zero_()
    assert os.listdir(tmp_path) == [] and not read[1]["layer/A"].any()
    nothing = StateFile(tmp_path)
    assert nothing.get(nothing.put(AdapterState({}))).payload == []


def test_a_full_disk_is_told_to_the_site_and_its_answer_is_taken_when_there_is_room(tmp_path, monkeypatch):
    grid, full = Sites(tmp_path, [1]), True
    put = post.Letter.put

    def limited(letter, name, content, folder):
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put(letter, name, content, folder)

    monkeypatch.setattr(post.Letter, "put", limited)
    identify(RUN, 1, 0)
    list(grid.push_messages([Message(PACKED.content(made(0), FedIT().instructions(ServerState(made(0)))), 1, "train")]))
    with pytest.raises(Refusal, match="503: the coordinator's disk: No space left on device"):
        grid.answer(1)
    letter = next(iter(grid.box.letters.values()))
    assert letter.missing and not letter.answered()
    full = False
    grid.box.boxes[1] = list(grid.box.letters)
    grid.answer(1)
    assert letter.answered()


def test_a_round_for_which_there_is_no_room_says_so_and_does_not_blame_a_site(tmp_path, monkeypatch):
    def full(file, state):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StateFile, "put", full)
    with pytest.raises(OSError, match="No space left"):
        play(tmp_path, [1, 2], kept=tmp_path)


@pytest.mark.parametrize(("wrap", "words"), [([], ""), (["median"], "all 40 sites in memory at once, in float64 40 x")])
def test_a_strategy_that_looks_at_single_updates_says_how_much_it_may_keep(wrap, words):
    config = Config(strategy=StrategyConfig(wrap=wrap), data=DataConfig(clients=40))
    start = ServerState(made(1))
    said = say_what_is_kept(SimpleNamespace(strategy=build(config), config=config, start=start))
    assert words in said and bool(said) == bool(wrap)
    assert not wrap or said.endswith(f"= {40 * 2 * start.adapter.nbytes / 1e6:.3g} MB.")
