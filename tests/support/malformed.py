"""Messages that somebody made to break the reader, by family: the same for a client's reply and a server's request."""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedpeft.packing import pack_state
from support.scripted import START

MB = 2**20
FLAT, MANIFEST = pack_state(START)
TASK = {"round": 1, "trains": ["A", "B"], "uploads": ["A", "B"], "keeps": []}


def message(
    arrays: Any = None, metrics: Any = None, records: dict[str, Any] | None = None, **config: Any
) -> RecordDict:
    """A message with the right parts but for those given. `metrics={}` leaves the record out, as in a request."""
    named = ArrayRecord({"adapter": Array(FLAT)}) if arrays is None else arrays
    parts = {"arrays": named, "config": ConfigRecord({"manifest": MANIFEST, "task": '{"round": 1}', **config})}
    if metrics != {}:
        parts["metrics"] = MetricRecord({"num-examples": 10.0}) if metrics is None else MetricRecord(metrics)
    return RecordDict({**parts, **(records or {})})


def npy(header: str, version: tuple[int, int] = (1, 0), body: bytes = bytes(56)) -> bytes:
    """A file of numpy's with this text as its header."""
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header.encode() + body


def coded(
    data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (14,), stype: str = "numpy.ndarray"
) -> ArrayRecord:
    return ArrayRecord({"adapter": Array(dtype, shape, stype, data)})


def objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}] * 14, dtype=object), allow_pickle=True)
    return file.getvalue()


def archive() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, adapter=np.zeros(64 * MB, np.uint8))
    return file.getvalue()


GOOD = Array(FLAT).data
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (%s,), }"
ARRAYS: dict[str, Callable[[], ArrayRecord]] = {
    "no bytes": lambda: coded(b""),
    "junk": lambda: coded(b"junk" * 20),
    "a header alone": lambda: coded(GOOD[:128]),
    "one byte short": lambda: coded(GOOD[:-1]),
    "one byte long": lambda: coded(GOOD + b"\0"),
    "64 MB behind the array": lambda: coded(GOOD + bytes(64 * MB)),
    "a header of 10^13 elements": lambda: coded(npy(HEADER % 10**13)),
    "a header of 2^70 elements": lambda: coded(npy(HEADER % 2**70)),
    "a header of -1 elements": lambda: coded(npy(HEADER % -1)),
    "a header of many brackets": lambda: coded(npy("(" * 3000 + ")" * 3000)),
    "a header that calls": lambda: coded(npy("__import__('os').getcwd()")),
    "a header of version 9": lambda: coded(npy(HEADER % 14, (9, 9))),
    "a header of other doubles": lambda: coded(npy(HEADER.replace("<f4", ">f4") % 14)),
    "a header of objects": lambda: coded(npy(HEADER.replace("<f4", "|O") % 14)),
    "objects in pickles": lambda: coded(objects()),
    "a pickle": lambda: coded(pickle.dumps([1.0] * 14)),
    "a pickle that says so": lambda: coded(pickle.dumps([1.0] * 14), stype="pickle"),
    "a tensor of torch": lambda: coded(GOOD, stype="torch.Tensor"),
    "a way of coding with escapes": lambda: coded(GOOD, stype="\x1b[2J" * 5000),
    "compressed": lambda: coded(gzip.compress(bytes(64 * MB))),
    "an archive that grows": lambda: coded(archive()),
    "dtype object": lambda: coded(GOOD, dtype="object"),
    "a dtype that is none": lambda: coded(GOOD, dtype="float31"),
    "a shape of 10^13": lambda: coded(GOOD, shape=(10**13,)),
    "a negative shape": lambda: coded(GOOD, shape=(-14,)),
    "no shape": lambda: coded(GOOD, shape=()),
    "a shape of 10^5 sizes": lambda: coded(GOOD, shape=(1,) * 100_000),
    "no array": lambda: ArrayRecord({}),
    "another name": lambda: ArrayRecord({"other": Array(FLAT)}),
    "a second array of 64 MB": lambda: ArrayRecord({"adapter": Array(FLAT), "more": Array(np.ones(16 * MB, "f4"))}),
    "5000 arrays": lambda: ArrayRecord({"adapter": Array(FLAT), **{f"a{n}": Array(FLAT) for n in range(5000)}}),
}


def entries(*changed: Any, **keys: Any) -> str:
    """The manifest with other entries or fields."""
    return json.dumps({**json.loads(MANIFEST), **({"tensors": list(changed)} if changed else {}), **keys})


A, B = json.loads(MANIFEST)["tensors"]
MANIFESTS: dict[str, Callable[[], Any]] = {
    "200 MB of spaces": lambda: " " * (200 * MB),
    "spaces around it": lambda: MANIFEST + " " * (64 * MB),
    "100000 brackets": lambda: "[" * 100_000,
    "brackets within": lambda: entries(["q/A", "float32", json.loads("[" * 900 + "]" * 900)], B),
    "no JSON": lambda: "{'tensors': []}",
    "nothing": lambda: "",
    "a number": lambda: 3,
    "bytes": lambda: b"{}",
    "a list of texts": lambda: [MANIFEST],
    "a list": lambda: "[]",
    "an entry of two": lambda: entries(["q/A", "float32"], B),
    "an entry twice": lambda: entries(A, A),
    "another order": lambda: entries(B, A),
    "an entry too many": lambda: entries(A, B, ["q/C", "float32", [0]]),
    "an entry too few": lambda: entries(A),
    "100000 entries": lambda: entries(*(["q/A", "float32", [1]] for _ in range(100_000))),
    "a name with escapes": lambda: entries(["\x1b[31m<b>q</b>\n/A", "float32", [2, 4]], B),
    "a name that is a number": lambda: entries([3, "float32", [2, 4]], B),
    "a size of 10^400": lambda: entries(["q/A", "float32", [10**400]], B),
    "sizes that overflow": lambda: entries(["q/A", "float32", [2**62, 2**62]], B),
    "an empty shape of 2^70": lambda: entries(["q/A", "float32", [0, 2**70]], B),
    "negative sizes": lambda: entries(["q/A", "float32", [-2, -4]], B),
    "sizes of texts": lambda: entries(["q/A", "float32", ["2", "4"]], B),
    "a size of true": lambda: entries(["q/A", "float32", [True, 8]], B),
    "another dtype": lambda: entries(["q/A", "complex128", [2, 4]], B),
    "sites of nothing": lambda: entries(sites=None),
    "a site's scaling NaN": lambda: MANIFEST.replace("2.0", "NaN"),
    "a site's scaling of 10^400": lambda: MANIFEST.replace("2.0", "1" + "0" * 400),
}
RECORDS: dict[str, Callable[[], RecordDict]] = {
    "a record too many": lambda: message(records={"more": ConfigRecord({"a": "b"})}),
    "a record of 64 MB too many": lambda: message(records={"x" * 5000: ConfigRecord({"a": "b" * 64 * MB})}),
    "a field too many": lambda: message(more="b" * 64 * MB),
    "an array record too many": lambda: message(records={"b": ArrayRecord({"adapter": Array(FLAT)})}),
    "no record": lambda: RecordDict({}),
    "arrays that are numbers": lambda: message(records={"arrays": MetricRecord({"adapter": 1.0})}),
    "a config of numbers": lambda: message(records={"config": MetricRecord({"manifest": 1.0, "task": 2.0})}),
}
NAN, INF = math.nan, math.inf
