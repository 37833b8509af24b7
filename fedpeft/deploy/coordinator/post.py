"""The messages of a run at work, in the process that works on it.

Who sends a message has it in memory anyway, and what it waits for is of no use without it: a run that was killed asks
anew from its last checkpoint. So a run's process keeps its own messages and answers the calls of sites that are of
them; the face hands these on over a connection (`Counter` there, `Clerk` here) on loopback. What Flower's SuperLink
would do for each object, with its database, takes a hundred times as long.

A frame is its length, the number of a call, a number of what it is (a node, or a status), a method, and a body.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any

from flwr.app import Error, Message

from fedpeft.deploy import flower
from fedpeft.deploy.coordinator.flower import Refusal, error_reply, read_request
from fedpeft.deploy.coordinator.letter import TIMES, Letter
from fedpeft.flower import ErrorCode, OwnGrid, Run, identify
from fedpeft.foreign import shown

log = logging.getLogger("fedpeft")
FRAME = struct.Struct(">IIQB")  # bytes that follow, call, node or status, method
BELL = 0  # no call: a node has a message
METHODS = ("PullMessages", "PullObject", "PushMessages", "PushObject", "GetRun")
PLACE = "post"  # a file in the coordinator's folder: the port of the face's counter
SERVER = 1  # Flower's number of the node that messages to sites are from
AGAIN_S = 0.1
WAIT_S = 1.0  # for an answer, at a time
AWAY_S = 5.0  # between looks for sites that went away
FOREIGN = "its node is Flower's own, and asks for an app, which a run of fedpeft has not"
OBJECTS, ENVELOPE = 10_000, 2**16  # objects of one answer; bytes of what an answer is without its content


class Post(OwnGrid):
    """Flower's Grid for one run, whose sites' calls it answers itself.

    Args:
        nodes: the nodes that Flower counts as connected.
        folder: the run's; answers lie there until they are read, in files that nobody else sees.
    """

    def __init__(self, run: Run, nodes: Callable[[], Iterable[Any]], folder: Path) -> None:
        super().__init__(run)
        self.nodes, self.folder = nodes, folder
        identify(run.run_id, SERVER, 0)
        self.letters: dict[str, Letter] = {}
        self.of: dict[int, dict[str, Letter]] = defaultdict(dict)  # the same by nodes
        self.boxes: dict[int, list[str]] = defaultdict(list)  # ids of messages that were not handed out, by nodes
        self.changed = threading.Condition()
        self.looked, self.away = time.monotonic(), set[int]()
        self.ring: Callable[[int], None] = lambda node: None

    def get_nodes(self) -> Iterable[Any]:
        return self.nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Ids of the messages, which sites can pull from now on."""
        names = []
        for message in messages:
            request, contents = flower.deflated(message)
            tree = request.message_object_trees[0]
            objects = {name: contents(name) for name in flower.object_ids(tree)}
            with self.changed:
                for name in objects:  # the same for many sites: once
                    objects[name] = next(
                        (one.objects[name] for one in self.newest() if name in one.objects), objects[name]
                    )
                until = time.monotonic() + message.metadata.ttl
                letter = Letter(flower.remove_content_from_message(message), request, objects, until)
                letter.room += TIMES * sum(map(len, objects.values()))
                self.letters[tree.object_id] = self.of[letter.node][tree.object_id] = letter
                self.boxes[letter.node].append(tree.object_id)
            self.ring(letter.node)
            names.append(str(tree.object_id))
        return names

    def newest(self) -> list[Letter]:
        """The letter that was written last; the same content is sent to one site after the other."""
        return list(self.letters.values())[-1:]

    def wait(self, message_ids: Iterable[str]) -> None:
        """Return as soon as one of these messages was answered, or after a while."""
        wanted = list(message_ids)
        with self.changed:
            self.changed.wait_for(lambda: any(self.is_answered(name) for name in wanted), WAIT_S)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterator[Message]:
        """Answers to these messages, of those that are there, and errors in place of those that will not come.

        One after the other: each is in memory as long as its reader keeps it.
        """
        wanted = set(message_ids)
        with self.changed:
            there = [name for name in wanted if self.is_answered(name)]
        for name in there:
            with self.changed:
                letter = self.letters[name]
                self.forget(name)
            yield whole(name, letter)
        if not there:
            yield from self.unanswerable(wanted)

    def is_answered(self, name: str) -> bool:
        """Whether all of the answer to a message is there."""
        return name in self.letters and self.letters[name].answered()

    def unanswerable(self, wanted: set[str]) -> list[Message]:
        """Errors in the place of answers that do not come: the message has expired, or its site is not connected."""
        if time.monotonic() - self.looked < AWAY_S:
            return []
        self.looked, online, errors = time.monotonic(), set(self.get_node_ids()), []
        # Twice in a row: one that is started again leaves before it comes.
        before, self.away = self.away, {letter.node for letter in self.letters.values()} - online
        with self.changed:
            for name, letter in list(self.letters.items()):
                expired = self.looked > letter.until
                gone = name in wanted and letter.node in self.away & before
                if letter.answered() or not (expired or gone or letter.foreign):
                    continue
                message = self.forget(name)
                if name in wanted:
                    code = ErrorCode.MESSAGE_UNAVAILABLE if expired else ErrorCode.NODE_UNAVAILABLE
                    away = FOREIGN if letter.foreign else "the site is not connected any more"
                    reason = "the message has expired" if expired else away
                    errors.append(Message(Error(code, reason), reply_to=message))
        return errors

    def forget(self, name: str) -> Message:
        """Drop a message, whether it was handed out or not."""
        letter = self.letters.pop(name)
        del self.of[letter.node][name]
        if name in self.boxes[letter.node]:
            self.boxes[letter.node].remove(name)
        return letter.message

    def offer_again(self) -> list[int]:
        """Hand out anew what may have been lost with a connection: what was handed out, and its site has not shown. The
        nodes for which there is something.
        """
        with self.changed:
            for name, letter in self.letters.items():
                if not letter.shown and name not in self.boxes[letter.node]:
                    self.boxes[letter.node].append(name)
            return [node for node, box in self.boxes.items() if box]

    def note_shown(self, letter: Letter, name: str) -> None:
        """The site has the message, and needs it no more."""
        letter.shown = True
        if name in self.boxes[letter.node]:
            self.boxes[letter.node].remove(name)

    def answer(self, method: str, node: int, body: bytes) -> bytes:
        """The answer to the call of a node.

        Raises:
            Refusal: it is of no message to this node, or not as it should be.
        """
        with self.changed:
            try:
                made = getattr(self, method)(node, read_request(method, body))
            except IndexError as error:
                raise Refusal(HTTPStatus.BAD_REQUEST, f"no request of {method}.") from error
            except OSError as error:
                said = f"the coordinator's disk: {error.strerror}."
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, said) from error
            return bytes(made.SerializeToString())

    def PullMessages(self, node: int, asked: Any) -> Any:
        """A message that this node has not got yet."""
        for name in asked.message_ids[:1]:
            if name in self.of[node]:
                self.note_shown(self.of[node][name], name)
        made = flower.answer_type("PullMessages")()
        if box := self.boxes[node]:
            letter = self.letters[box.pop(0)]
            made.messages_list.append(letter.request.messages_list[0])
            flower.send_along(made.messages_list[0], letter.objects)
            made.message_object_trees.append(letter.request.message_object_trees[0])
        return made

    def PullObject(self, node: int, asked: Any) -> Any:
        """A part of a message to this node."""
        # By its own object alone: the others may be of an older message with the same content, from before a restart.
        if (mine := self.of[node].get(asked.object_id)) is not None:
            self.note_shown(mine, asked.object_id)
        found = next((one for one in self.of[node].values() if asked.object_id in one.objects), None)
        content = found.objects[asked.object_id] if found else b""
        there = found is not None
        kind = flower.answer_type("PullObject")
        return kind(object_found=there, object_available=there, object_content=content)

    def PushMessages(self, node: int, asked: Any) -> Any:
        """What is still missing of an answer; nothing of one that nobody waits for."""
        reply, tree = asked.messages_list[0], asked.message_object_trees[0]
        along = flower.take_along(reply)
        letter = self.letters.get(reply.metadata.reply_to_message_id)
        kind = flower.answer_type("PushMessages")
        if letter is None or letter.node != node or reply.metadata.src_node_id != node:
            return kind()
        if next(islice(flower.object_ids(tree), OBJECTS, None), None) is not None:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer in more than {OBJECTS} objects.")
        if reply.ByteSize() > ENVELOPE:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {ENVELOPE} bytes beside the objects.")
        self.note_shown(letter, reply.metadata.reply_to_message_id)
        if not letter.answered() and (letter.tree is None or letter.tree.object_id != tree.object_id):
            letter.begin(reply, tree)
        known = letter.tree.object_id == tree.object_id
        for name in [name for name in along if known and name in letter.missing]:
            self.take_object(letter, name, along[name])
        return kind(
            objects_to_push=list(letter.missing) if known else [], session_id=reply.metadata.reply_to_message_id
        )

    def PushObject(self, node: int, asked: Any) -> Any:
        """Whether a part of an answer was taken."""
        letter = self.letters.get(asked.session_id)
        kind = flower.answer_type("PushObject")
        if letter is None or letter.node != node:
            return kind(stored=True)  # nobody waits for it
        if asked.object_id not in letter.missing:
            return kind(stored=asked.object_id in letter.came)
        content = bytes(asked.object_content)
        if hashlib.sha256(content).hexdigest() != asked.object_id:
            raise Refusal(HTTPStatus.BAD_REQUEST, "an object is not what its id says.")
        self.take_object(letter, asked.object_id, content)
        return kind(stored=True)

    def GetRun(self, node: int, asked: Any) -> Any:
        """Nothing, as there is no app: who asks for one has got a message, and cannot answer it."""
        for letter in self.of[node].values():
            letter.foreign = True
        raise Refusal.numbered(HTTPStatus.FORBIDDEN, flower.NO_RUN, "a run of fedpeft has no app.")

    def take_object(self, letter: Letter, name: str, content: bytes) -> None:
        """Take a part of an answer, unless that becomes too large; tell who waits when all of it is there."""
        if letter.size() + len(content) > letter.room:
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an answer of more than {letter.room} bytes.")
        letter.put(name, content, self.folder)
        if letter.answered():
            self.changed.notify_all()


def whole(name: str, letter: Letter) -> Message:
    """An answer with its content; where that is none, an error that says so."""
    about = letter.reply.metadata
    try:
        made = flower.put_together(letter.tree.object_id, letter.objects_of_answer())
        if (made.metadata.reply_to_message_id, made.metadata.src_node_id) != (name, about.src_node_id):
            raise ValueError("it says to be of another site, or to another message, than it was sent as")
    except Exception as error:  # of objects that somebody else made, whatever is wrong with them
        return error_reply(
            flower.message_from_proto(letter.reply).metadata,
            Error(ErrorCode.UNKNOWN, shown(f"unreadable reply: {error!r}")),
        )
    return made


class Clerk:
    """A run's end of the connection to the face, which is made anew as often as it breaks.

    Args:
        folder: the coordinator's, with the face's port and the secret by which a process of it is known.
    """

    def __init__(self, folder: Path, post: Post) -> None:
        self.folder, self.post, self.lock = folder, post, threading.Lock()
        self.line: socket.socket | None = None
        self.ended = threading.Event()
        post.ring = self.ring
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        """Answer calls until this is closed."""
        while not self.ended.is_set():
            try:
                port = int((self.folder / PLACE).read_text())
                with socket.create_connection(("127.0.0.1", port)) as line:
                    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    line.sendall(hello((self.folder / "secret").read_bytes(), self.post.run.run_id))
                    self.line = line
                    for node in self.post.offer_again():
                        self.ring(node)
                    self.work(line)
            except (OSError, ValueError) as error:
                log.debug("no face: %r", error)
            self.line = None
            self.ended.wait(AGAIN_S)

    def close(self) -> None:
        """End the connection for good."""
        self.ended.set()
        if (line := self.line) is not None:
            line.shutdown(socket.SHUT_RDWR)

    def work(self, line: socket.socket) -> None:
        """Answer the calls of one connection."""
        while True:
            size, call, node, method = FRAME.unpack(received(line, FRAME.size))
            body = received(line, size)
            status: int = HTTPStatus.OK
            try:
                made = self.post.answer(METHODS[method], node, body)
            except Refusal as refusal:
                status, made = refusal.status, refusal.said.encode()
            except Exception as error:  # of a call that somebody made to end this thread, and with it the run
                log.error("a call of node %d cannot be answered: %s", node, shown(repr(error)))
                status, made = HTTPStatus.INTERNAL_SERVER_ERROR, b"the coordinator cannot answer this call."
            self.send(line, FRAME.pack(len(made), call, status, method) + made)

    def ring(self, node: int) -> None:
        """Say that a node has a message; if nobody is there to hear it, it is said again."""
        if (line := self.line) is not None:
            try:
                self.send(line, FRAME.pack(0, BELL, node, 0))
            except OSError as error:
                log.debug("no face: %r", error)

    def send(self, line: socket.socket, data: bytes) -> None:
        """Send a frame whole, whichever threads send."""
        with self.lock:
            line.sendall(data)


def hello(secret: bytes, run: int) -> bytes:
    """What a run says first: which it is, and that it is this coordinator's."""
    return struct.pack(">Q", run) + hashlib.sha256(secret + struct.pack(">Q", run)).digest()


def received(line: socket.socket, size: int) -> bytes:
    """So many bytes from a connection.

    Raises:
        ConnectionError: it ended before.
    """
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = line.recv_into(view)
        if not count:
            raise ConnectionError("the face has ended")
        view = view[count:]
    return bytes(data)
