"""A stand-in coordinator: Flower's Fleet API over gRPC and HTTP on one state in memory, which fails where it is told.

As Flower's: a pull hands a message out once; a reply is taken once; its objects are asked for until they are there.
What Flower lacks: a pull whose answer was lost is answered again, until the node says that it has the message.
"""

from __future__ import annotations

import datetime
import json
import threading
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.fleet_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature

from fedpeft.deploy import flower
from fedpeft.flower import identify

METHODS = (
    "ActivateNode",
    "SendNodeHeartbeat",
    "PullMessages",
    "PullObject",
    "PushMessages",
    "PushObject",
    "ConfirmMessageReceived",
)
NODE, RUN = 7, 5


class Fault(Exception):
    """What a call is answered with instead: a gRPC status or an HTTP status, and what is said with it."""

    def __init__(self, status, said=""):
        super().__init__(status, said)
        self.status, self.said = status, said


class State:
    """Messages, objects, replies. Calls meet faults `before` or `after` they are done: method -> of its next calls."""

    def __init__(self, keys=()):
        self.keys, self.lock = list(keys), threading.Condition()
        self.waiting, self.handed, self.objects = [], None, {}
        self.replies, self.pending, self.confirmed = {}, {}, []
        self.before, self.after, self.calls = {}, {}, []
        self.session, self.ended, self.name, self.wait_s = 0, False, None, 0.0
        self.along = False  # small objects travel in the calls that name them, as to and from a run of ours

    def send(self, text, ttl=3600.0):
        """A message with this text for the node; its id."""
        identify(RUN, 1, 0)
        message = Message(RecordDict({"config": ConfigRecord({"text": text})}), NODE, "train", ttl=ttl)
        request, contents = flower.deflated(message)
        tree = request.message_object_trees[0]
        with self.lock:
            self.objects |= {name: contents(name) for name in flower.object_ids(tree)}
            self.waiting.append((request.messages_list[0], tree))
            self.lock.notify_all()
        return tree.object_id

    def text(self, message_id):
        """What the one reply to a message says."""
        root, tree = self.replies[message_id]
        if root.HasField("error"):
            return f"error: {root.error.reason}"
        reply = flower.PullMessagesResponse(messages_list=[root], message_object_trees=[tree])
        contents = {name: self.objects[name] for name in flower.object_ids(tree)}
        return flower.inflated(reply, contents).content["config"]["text"]

    def done(self):
        """Messages that were answered whole and confirmed."""
        return [name for name in self.confirmed if name in self.replies and not self.missing(self.replies[name][1])]

    def missing(self, tree):
        return [name for name in dict.fromkeys(flower.object_ids(tree)) if name not in self.objects]

    def act(self, method, request, key):
        """The answer to one call."""
        with self.lock:
            self.calls.append(method)
            for fault in (self.before.get(method) or [])[:1]:
                self.before[method].pop(0)
                raise fault
            answer = getattr(self, method)(request, key)
            for fault in (self.after.get(method) or [])[:1]:
                self.after[method].pop(0)
                raise fault
            return answer

    def ActivateNode(self, request, key):
        assert request.public_key == key
        if key not in self.keys:
            raise Fault(grpc.StatusCode.FAILED_PRECONDITION, json.dumps({"code": 2004, "detail": "unknown"}))
        return flower.answer_type("ActivateNode")(node_id=NODE)

    def RegisterNode(self, request, key):
        raise Fault(grpc.StatusCode.PERMISSION_DENIED, json.dumps({"code": 2001, "detail": "disabled"}))

    def DeactivateNode(self, request, key):
        return flower.answer_type("DeactivateNode")()

    def SendNodeHeartbeat(self, request, key):
        return flower.answer_type("SendNodeHeartbeat")(success=request.node.node_id == NODE)

    def PullMessages(self, request, key):
        if self.handed and self.handed[0].metadata.message_id in request.message_ids:
            self.handed = None
        if not self.handed and not self.waiting and self.wait_s:
            self.lock.wait(self.wait_s)
        if not self.handed and self.waiting:
            self.handed = self.waiting.pop(0)
        message, tree = self.handed or (None, None)
        found = {"messages_list": [message], "message_object_trees": [tree]} if message else {}
        answer = flower.answer_type("PullMessages")(**found)
        if message and self.along:
            flower.send_along(answer.messages_list[0], {name: self.objects[name] for name in flower.object_ids(tree)})
        return answer

    def running(self):
        if self.ended:
            raise Fault(grpc.StatusCode.PERMISSION_DENIED, json.dumps({"code": 2007, "detail": "ended"}))

    def PullObject(self, request, key):
        self.running()
        content = self.objects.get(request.object_id)
        there = content is not None
        return flower.answer_type("PullObject")(
            object_found=there, object_available=bool(content), object_content=content or b""
        )

    def PushMessages(self, request, key):
        self.running()
        (reply,), (tree,) = request.messages_list, request.message_object_trees
        assert self.along or not reply.content.items  # Flower's server would read nothing of it
        self.objects |= flower.take_along(reply)
        first = self.replies.setdefault(reply.metadata.reply_to_message_id, (reply, tree))
        if first[1].object_id != tree.object_id:
            raise AssertionError("another reply to the same message")
        self.session += 1
        answer = flower.answer_type("PushMessages")
        return answer(objects_to_push=self.missing(tree), session_id=str(self.session))

    def PushObject(self, request, key):
        self.running()
        stored = request.session_id == str(self.session)
        if stored:
            self.objects[request.object_id] = request.object_content
        return flower.answer_type("PushObject")(stored=stored)

    def ConfirmMessageReceived(self, request, key):
        self.running()
        self.confirmed.append(request.message_object_id)
        self.lock.notify_all()
        return flower.answer_type("ConfirmMessageReceived")()


def checked(key, stamp, signature):
    """The public key of who signed the time, as Flower checks it."""
    age_s = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(stamp)).total_seconds()
    if abs(age_s) > 5:
        raise Fault(grpc.StatusCode.UNAUTHENTICATED, f"the timestamp of the signature is {age_s:.0f} s old")
    assert verify_signature(bytes_to_public_key(key), stamp.encode(), signature)
    return key


class GrpcStandIn(FleetServicer):
    """The state over gRPC, on loopback and without TLS; `port`."""

    def __init__(self, state, port=0, credentials=None, host="127.0.0.1"):
        self.state = state
        self.server = grpc.server(ThreadPoolExecutor(16))
        add_FleetServicer_to_server(self, self.server)
        place = f"{host}:{port}"
        self.port = (
            self.server.add_secure_port(place, credentials) if credentials else self.server.add_insecure_port(place)
        )
        self.server.start()

    def close(self):
        self.server.stop(0).wait()


def _handler(method):
    def handle(self, request, context):
        told = dict(context.invocation_metadata())
        try:
            key = checked(told["flwr-public-key-bin"], told["flwr-timestamp"], told["flwr-signature-bin"])
            return self.state.act(method, request, key)
        except Fault as fault:
            context.abort(fault.status, fault.said)

    return handle


for _method in flower.METHODS:
    setattr(GrpcStandIn, _method, _handler(_method))


class HttpStandIn:
    """The state over HTTP, on loopback and without TLS; `port`. A fault may be a status, or `cut` for half a body."""

    def __init__(self, state):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                stamp = self.headers["flwr-timestamp"]
                key, signature = (b64decode(self.headers[name]) for name in ("flwr-public-key", "flwr-signature"))
                method = "".join(part.title() for part in self.path.removeprefix("/v1/fleet/").split("-"))
                kind = flower.METHODS[method].input_type._concrete_class
                try:
                    answer = state.act(method, kind.FromString(body), checked(key, stamp, signature))
                    self.reply(200, answer.SerializeToString())
                except Fault as fault:
                    if fault.status == "cut":
                        self.reply(200, b"x" * 10, length=1000)
                        self.close_connection = True
                    else:
                        code = grpc.StatusCode
                        known = {code.FAILED_PRECONDITION: 412, code.PERMISSION_DENIED: 403, code.UNAUTHENTICATED: 401}
                        self.reply(known.get(fault.status, fault.status), fault.said.encode())

            def reply(self, status, body, length=None):
                self.send_response(status)
                self.send_header("content-length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def replied(owed):
    """A worker's part in this process: the text backwards."""
    flower.context_of(owed.pulled)
    text = owed.inflated().content["config"]["text"]
    asked = owed.inflated()
    owed.put_reply(Message(RecordDict({"config": ConfigRecord({"text": text[::-1]})}), reply_to=asked))
