"""A message to a site, and its answer as far as that has come: what `post.Post` keeps of each."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from flwr.app import Message

from fedpeft.deploy import flower

ROOM, TIMES = 256 * 2**20, 4  # bytes of one answer: so many, and so many times those of the message


@dataclass
class Letter:
    """A message to a site without its content, and its answer as far as that has come.

    Attributes:
        came: where in `file`, which has no name, objects of the answer begin, and their bytes.
        missing: objects of the answer that have not come, as keys in their order.
        shown: the site has shown that it has the message.
        foreign: its node runs apps, and answers nothing that is of none.
    """

    message: Message
    request: Any
    objects: dict[str, bytes]
    until: float
    reply: Any = None
    tree: Any = None
    file: IO[bytes] | None = None
    came: dict[str, tuple[int, int]] = field(default_factory=dict)
    room: int = ROOM
    missing: dict[str, None] = field(default_factory=dict)
    shown: bool = False
    foreign: bool = False

    @property
    def node(self) -> int:
        """Whom it is to."""
        return int(self.message.metadata.dst_node_id)

    def begin(self, reply: Any, tree: Any) -> None:
        """Take the answer without its objects, in place of one that did not come whole."""
        self.reply, self.tree, self.file, self.came = reply, tree, None, {}
        self.missing = dict.fromkeys(flower.object_ids(tree))

    def size(self) -> int:
        """Bytes of the answer that have come."""
        return sum(next(reversed(self.came.values()), (0, 0)))

    def put(self, name: str, content: bytes, folder: Path) -> None:
        """Take an object of the answer to the disk.

        Raises:
            OSError: there is no room; another time there may be.
        """
        if self.file is None:
            self.file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115 - as long as the letter is there
        start = self.size()  # where the last one ended that came whole
        self.file.seek(start)
        if self.file.write(content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
        self.came[name] = start, len(content)
        del self.missing[name]

    def objects_of_answer(self) -> dict[str, bytes]:
        """The answer's objects, by their ids."""
        if self.file is None:
            return {}
        self.file.seek(0)
        return {name: self.file.read(size) for name, (_, size) in self.came.items()}

    def answered(self) -> bool:
        """Whether all of the answer is there."""
        return self.tree is not None and not self.missing
