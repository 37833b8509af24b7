"""A network in between that cuts each connection after a while, as a web proxy does."""

from __future__ import annotations

import contextlib
import random
import socket
import threading


class Cutting:
    """Takes connections for another port of this machine, and ends each after a random time.

    Args:
        port: where they lead.
        lasting_s: the shortest and the longest life of a connection.
    """

    def __init__(self, port, lasting_s=(0.2, 1.0), seed=0):
        self.there, self.lasting_s, self.random = port, lasting_s, random.Random(seed)
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port, self.cuts = self.listening.getsockname()[1], 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                here = self.listening.accept()[0]
                there = socket.create_connection(("127.0.0.1", self.there))
            except OSError:
                if self.listening.fileno() < 0:
                    return
                here.close()
                continue
            threading.Timer(self.random.uniform(*self.lasting_s), self.cut, (here, there)).start()
            for one, other in ((here, there), (there, here)):
                threading.Thread(target=self.pump, args=(one, other), daemon=True).start()

    def pump(self, one, other):
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        self.end(one, other)

    def cut(self, *both):
        self.cuts += 1
        self.end(*both)

    @staticmethod
    def end(*both):
        for one in both:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def close(self):
        self.listening.close()
