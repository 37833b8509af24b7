"""An in-process Flower Grid: the same ServerApp strategies and ClientApps, without Ray, sockets or serialisation.

With no worker processes messages are handled when their replies are pulled, over one base model in memory: the app is
shown all that wait, so that it can train clients together, then gets them one by one. With workers, each is a process
of its own with one base model: a client that dies or hangs is ended with its process, and the process is replaced.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.clients.app import CohortApp
from fedpeft.flower import ErrorCode, OwnGrid, empty_run, identify
from fedpeft.simulations.workers import Outcome, Pool, Worker, handle_message

SERVER_NODE = 1
RUN_ID = 1


@dataclass(slots=True)
class Node:
    """One client's node: what it was given, and what it has kept between messages."""

    config: dict[str, bool | int | float | str]
    state: RecordDict


class LocalGrid(OwnGrid):
    """Nodes that run one ClientApp here.

    Args:
        make_app: returns the ClientApp; picklable when there are workers (they call it once each).
        nodes: node id -> node config.
        workers: processes; 0 runs clients in this one.
        threads: torch threads of each worker.
        share: most messages that the app, or a worker, is shown at once.
        start: makes a worker; a process of this machine by default.
    """

    def __init__(
        self,
        make_app: Callable[[], ClientApp],
        nodes: dict[int, dict[str, bool | int | float | str]],
        workers: int = 0,
        threads: int = 1,
        share: int = 256,
        start: Callable[[Callable[[], ClientApp], int], Worker] = Worker,
    ) -> None:
        super().__init__(empty_run(RUN_ID))
        identify(RUN_ID, SERVER_NODE, SERVER_NODE)
        self.nothing = RecordDict()  # one for all nodes that keep nothing, as apps get copies
        self.nodes = {node: Node(config, self.nothing) for node, config in nodes.items()}
        self.share, self.shown = share, set[str]()
        self.pool = Pool(lambda: start(make_app, threads), workers, share) if workers else None
        self.app = None if workers else make_app()
        self.ids = itertools.count(1)
        self.queue: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            name = f"message-{next(self.ids)}"
            # Flower's metadata have no setter for it.
            message.metadata.__dict__["_message_id"] = name
            self.queue[name] = message
            sent.append(name)
            if self.pool:
                self.pool.submit(name, message, self.context(message))
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """In this process: handle the first of these messages now. With workers: the replies that have come in."""
        wanted = (name for name in message_ids if name in self.queue)
        if self.pool:
            return [self.finish(name, outcome) for name, outcome in self.pool.finished(list(wanted))]
        first = next(wanted, None)
        if first is None:
            return []
        assert self.app is not None  # there are no workers
        if isinstance(self.app, CohortApp) and first not in self.shown:
            waiting = [first, *itertools.islice(wanted, self.share - 1)]
            # Copies of the contexts: what a client changes while it prepares must not be kept before it has answered.
            self.app.prepare([(self.queue[name], self.context(self.queue[name])) for name in waiting])
            self.shown = set(waiting)
        message = self.queue[first]
        return [self.finish(first, handle_message(self.app, message, self.context(message)))]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        from fedpeft.strategies.asking import collect_replies

        return collect_replies(self, list(self.push_messages(messages)), timeout)

    def cancel(self, message_ids: Iterable[str]) -> None:
        """Give up on messages: end the workers that are busy with them."""
        names = [name for name in message_ids if self.queue.pop(name, None) is not None]
        if self.pool:
            self.pool.cancel(names)

    def close(self) -> None:
        """End the worker processes, if there are any."""
        if self.pool:
            self.pool.close()

    def context(self, message: Message) -> Context:
        """What the node's app is called with; its state is a copy, so an app that fails leaves nothing behind."""
        node = message.metadata.dst_node_id
        entry = self.nodes[node]
        state = RecordDict() if entry.state is self.nothing else copy.deepcopy(entry.state)
        return Context(run_id=RUN_ID, node_id=node, node_config=dict(entry.config), state=state, run_config={})

    def finish(self, name: str, outcome: Outcome) -> Message:
        """The reply; the client's state is kept only if it answered without an error."""
        request = self.queue.pop(name)
        if isinstance(outcome, str):
            reply, state = Message(Error(ErrorCode.CLIENT_APP_CRASHED, outcome), reply_to=request), None
        else:
            reply, state = outcome
        if state is not None:
            self.nodes[request.metadata.dst_node_id].state = state if len(state) else self.nothing
        reply.metadata.__dict__["_message_id"] = f"reply-{name}"
        return reply
