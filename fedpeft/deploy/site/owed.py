"""What a site owes stays on its disk until it is confirmed: a folder for each message that was pulled.

owed/<id of the message>/   pulled    the message without its content, as it was pulled; with it the debt begins
                            begun     a byte for each time that work on it began: some messages kill who answers
                            objects   an archive of its content, for the worker; fetched anew after a kill
                            reply     an archive of the answer: the request that pushes it, and its objects
"""

from __future__ import annotations

import errno
import io
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from fedpeft.deploy import flower
from fedpeft.deploy.flower import Message, PullMessagesResponse, PushMessagesRequest
from fedpeft.files import explain_error, write_bytes

log = logging.getLogger("fedpeft")
HASH = re.compile(r"[0-9a-f]{64}")
REQUEST = "request"  # no hash
ROOM = 32 * 2**20  # bytes of the disk that stay free


class Owed:
    """One message and its reply."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pulled = PullMessagesResponse.FromString((path / "pulled").read_bytes())
        self.names = names_in(self.pulled)
        self.along = flower.take_along(self.pulled.messages_list[0])

    @classmethod
    def take(cls, folder: Path, pulled: PullMessagesResponse) -> Owed:
        """Begin to owe the answer to what was pulled."""
        name = pulled.messages_list[0].metadata.message_id
        names_in(pulled)  # before anything is on the disk
        write_bytes(folder / name / "pulled", pulled.SerializeToString())
        return cls(folder / name)

    def put_objects(self, contents: Iterable[bytes]) -> None:
        """Keep the message's objects for the worker, in the order of `names`.

        Raises:
            OSError: it cannot be written, or would leave no room for an answer of the same size.
        """
        total = 0
        with ZipFile(self.path / "objects", "w") as archive:
            for name, content in zip(self.names, contents, strict=True):
                total += len(content)
                if shutil.disk_usage(self.path).free < ROOM + len(content) + total:  # to be written, and to be answered
                    raise OSError(errno.ENOSPC, "too little room for an answer", str(self.path))
                archive.writestr(name, content)

    def inflated(self) -> Message:
        """The message with its content."""
        with ZipFile(self.path / "objects") as archive:
            return flower.inflated(self.pulled, {name: archive.read(name) for name in self.names})

    def put_reply(self, reply: Message) -> None:
        """Keep the answer, whole or not at all; it is on the disk on return."""
        request, objects = flower.deflated(reply)
        whole = io.BytesIO()
        with ZipFile(whole, "w") as archive:
            archive.writestr(REQUEST, request.SerializeToString())
            for name in dict.fromkeys(flower.object_ids(request.message_object_trees[0])):
                archive.writestr(name, objects(name))
        write_bytes(self.path / "reply", whole.getvalue())

    def answered(self) -> bool:
        """Whether the answer is there, and whole."""
        try:
            with ZipFile(self.path / "reply") as archive:
                return archive.testzip() is None
        except (FileNotFoundError, BadZipFile):
            return False

    def begin(self) -> int:
        """Note that work on it begins; how often it has begun, now included."""
        with (self.path / "begun").open("ab") as file:
            file.write(b".")
            return file.tell()

    def forget_beginnings(self) -> None:
        """Let the next beginning be the first."""
        (self.path / "begun").unlink(missing_ok=True)

    def reply(self) -> tuple[PushMessagesRequest, flower.Objects]:
        """The request that pushes the answer, and what gives its objects by their ids."""
        archive = ZipFile(self.path / "reply")
        return PushMessagesRequest.FromString(archive.read(REQUEST)), archive.read

    def settle(self) -> None:
        """Owe it no more."""
        (self.path / "pulled").unlink()  # first: without it the rest is left-over, whatever is killed meanwhile
        shutil.rmtree(self.path, ignore_errors=True)


def names_in(pulled: PullMessagesResponse) -> list[str]:
    """Ids of a message's objects, each once.

    Raises:
        ValueError: one of them, or the message's own, is no hash: they become names of files.
    """
    names = list(dict.fromkeys(flower.object_ids(pulled.message_object_trees[0])))
    if not all(HASH.fullmatch(name) for name in [pulled.messages_list[0].metadata.message_id, *names]):
        raise ValueError("an id in it is no hash")
    return names


def read_owed(folder: Path) -> list[Owed]:
    """What an earlier process owed, oldest first; whatever else it left in the folder is removed."""
    found = []
    for path in sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime):
        try:
            found.append(Owed(path))
        except (FileNotFoundError, NotADirectoryError, ValueError, IndexError, flower.DecodeError):
            log.info("%s: left over, removed.", path)
            shutil.rmtree(path, ignore_errors=True)
        except OSError as error:  # perhaps a finished answer: it stays for the next start
            log.error("what is owed cannot be read: %s", explain_error(error))
    return found
