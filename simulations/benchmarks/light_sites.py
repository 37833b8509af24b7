"""Light sites of `fedpeft bench sites`: many of them in one process, each with a key and a connection of its own.

    python -m fedpeft.simulations.benchmarks.light_sites ROOT FIRST LAST LATE SECONDS

They speak the Fleet protocol over gRPC and TLS as a site's node does. In place of a worker they send back what they
got, moved by a little noise, or their part of secure aggregation. Every LATEth of them answers SECONDS late.
"""

from __future__ import annotations

import asyncio
import random
import sys
from pathlib import Path
from typing import Any

import grpc
import torch
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft import config as configs
from fedpeft.clients import secagg
from fedpeft.clients.store import Store
from fedpeft.config import Config
from fedpeft.deploy import flower, parcel, settings
from fedpeft.deploy.envelope import RECORD
from fedpeft.state import AdapterState
from fedpeft.strategies.instructions import Instructions
from fedpeft.strategies.wire import PACKED

MOVED = 1e-3
AGAIN_S = 1.0
CHANNEL = [("grpc.use_local_subchannel_pool", 1)]  # or all sites of a process would share one connection


class LightSite:
    """One site.

    Args:
        late_s: seconds that it sleeps before it answers a request to train.
    """

    def __init__(self, root: Path, name: str, server: settings.Server, late_s: float) -> None:
        self.name, self.late_s = name, late_s
        self.key = load_ssh_private_key((root / "keys" / name / "site.key").read_bytes(), None)
        self.trusted = grpc.ssl_channel_credentials((server.path / "ca.crt").read_bytes())
        self.place = f"{server.settings.host}:{server.settings.port}"
        self.node, self.last = flower.Node(), [""]
        self.config: Config | None = None
        self.store = Store(root / "state" / name, history=2)
        self.contexts: dict[int, Context] = {}
        self.app = self.made_app()

    def made_app(self) -> ClientApp:
        """What answers messages, as a client app does."""
        app = ClientApp()

        def request(message: Message) -> tuple[AdapterState, Instructions]:
            return PACKED.open(message.content)

        def moved(received: AdapterState, told: Instructions) -> AdapterState:
            sent = received.select(told.uploads)
            return sent.map(lambda value: value + MOVED * torch.randn_like(value))

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            received, told = request(message)
            metrics = {"num-examples": 8.0, "train_loss": 1.0}
            return Message(PACKED.reply(moved(received, told), metrics, told.round), reply_to=message)

        def update(context: Context, received: AdapterState, told: Instructions) -> AdapterState:
            return moved(received, told)

        secagg.register(
            app, lambda: self.config or Config(), lambda context: self.name, request, update, lambda: self.store, []
        )
        return app

    async def call(self, method: str, **fields: Any) -> Any:
        """The answer to a call, which is made again until there is one."""
        while True:
            try:
                ask = self.channel.unary_unary(flower.grpc_path_of(method))
                request = flower.request(method, self.node, **fields).SerializeToString()
                answer = await ask(request, metadata=flower.identity(self.key), timeout=60)
                return flower.answer_type(method).FromString(answer)
            except grpc.aio.AioRpcError as error:
                if flower.error_number(str(error.details())) == flower.RUN_ENDED:
                    raise
                await asyncio.sleep(AGAIN_S * random.uniform(0.5, 1.5))

    async def run(self) -> None:
        """Take part until the process is ended."""
        self.channel = grpc.aio.secure_channel(self.place, self.trusted, CHANNEL)
        public = flower.public_bytes(self.key)
        answer = await self.call("ActivateNode", public_key=public, heartbeat_interval=flower.HEARTBEAT_S)
        self.node = flower.Node(node_id=answer.node_id)
        beats = asyncio.create_task(self.beat())
        while not beats.done():
            pulled = await self.call("PullMessages", message_ids=self.last)
            if pulled.messages_list:
                self.last = [pulled.messages_list[0].metadata.message_id]
                try:
                    await self.answer(pulled)
                except grpc.aio.AioRpcError:
                    continue  # the run has ended

    async def beat(self) -> None:
        """Say now and then that it is there."""
        while True:
            await asyncio.sleep(flower.HEARTBEAT_S * random.uniform(0.5, 0.7))
            await self.call("SendNodeHeartbeat", heartbeat_interval=flower.HEARTBEAT_S)

    async def answer(self, pulled: Any) -> None:
        """Fetch a message, answer it, and bring the answer back."""
        run = pulled.messages_list[0].metadata.run_id
        contents, names = flower.take_along(pulled.messages_list[0]), flower.object_ids(pulled.message_object_trees[0])
        along = bool(contents)
        for name in set(names) - set(contents):
            contents[name] = (await self.call("PullObject", run_id=run, object_id=name)).object_content
        message = flower.inflated(pulled, contents)
        if self.late_s and message.metadata.message_type.startswith("train"):
            await asyncio.sleep(self.late_s)
        request, objects = flower.deflated(self.reply(message, flower.context_of(pulled)))
        reply, tree = request.messages_list[0], request.message_object_trees[0]
        if along:
            flower.send_along(reply, {name: objects(name) for name in flower.object_ids(tree)})
        taken = await self.call("PushMessages", messages_list=[reply], message_object_trees=[tree])
        for name in taken.objects_to_push:
            fields = {"run_id": run, "object_id": name, "object_content": objects(name)}
            await self.call("PushObject", session_id=taken.session_id, **fields)
        await self.call("ConfirmMessageReceived", run_id=run, message_object_id=self.last[0])

    def reply(self, message: Message, context: Context) -> Message:
        """The reply to a message, in a parcel."""
        message.content = parcel.unpack_content(message.content)
        if self.config is None:
            self.config = configs.from_yaml(str(message.content[RECORD]["config"]))
        kept = self.contexts.setdefault(context.run_id, context)
        reply = self.app(message, kept)
        reply.content = parcel.pack_content(reply.content)
        return reply


async def main(root: Path, first: int, last: int, late: int, late_s: float) -> None:
    """Run sites from number `first` up to `last`."""
    torch.set_num_threads(1)
    server = settings.server(root / "coordinator")
    sites = [
        LightSite(root, f"site-{index:04d}", server, late_s if late and index % late == 0 else 0.0)
        for index in range(first, last)
    ]
    await asyncio.gather(*(site.run() for site in sites))


if __name__ == "__main__":
    begin, end, every = map(int, sys.argv[2:5])
    asyncio.run(main(Path(sys.argv[1]), begin, end, every, float(sys.argv[5])))
