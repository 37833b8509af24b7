"""scikit-learn's `digits`: small, real and easy. It shows that things run; it is no evidence for a method."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

from fedpeft.data.records import Records
from fedpeft.errors import InputError

SIDE, CLASSES = 8, 10
# Which of the records are for test, a bit for each: 597, stratified, as scikit-learn's train_test_split drew them once.
TEST = bytes.fromhex(
    "482004c8b52630c009166121d742450c5a000c1122a40028062c1e081108960a009019320430fca092c396e442"
    "284adab0441724c942c8e24a0130806004d82140eba02000588dc58010420ea09000054ae801f01000328ecc09"
    "005a36840083b8053ca3a69e4e0224000fcbd42804a499dd02124061e540812c604e9c376b8592174154c84048"
    "42a0a4980a5000b64b8561ee891388cf126c82c02205068f422109f202c141bd8813c809190101948e2102c410"
    "a8e52133283924c944c0c8688e2102932682028932a6402da6062108aa60809889a00c1286026a12853cb41d20"
)


class Digits:
    """1,797 handwritten digits of 8x8 pixels, ten classes; a fixed stratified test set of 597.

    Pixels are counts of ink from 0 to 16; they are scaled to [0, 1], as the embedded checkpoint was trained.
    """

    summary = "1,797 handwritten digits 8x8 (scikit-learn), 10 classes, 597 for test"
    kind = "image"
    license = "CC-BY-4.0"

    def load(self) -> tuple[Records, Records]:
        table = np.loadtxt(find_table(), delimiter=",")
        images = (table[:, :-1].reshape(-1, SIDE, SIDE, 1) / 16).astype(np.float32)
        names = [str(digit) for digit in range(CLASSES)]
        records = Records(images, table[:, -1].astype(np.int64), names, {}, "image")
        # The last byte has bits to spare.
        test = np.unpackbits(np.frombuffer(TEST, np.uint8), count=len(table)).astype(bool)
        return records.take(np.flatnonzero(~test)), records.take(np.flatnonzero(test))


def find_table() -> Path:
    """The file of scikit-learn's digits: a row a digit, 64 counts and what it is.

    It is read without scikit-learn, which with all that it loads is a second before the first round of every such run.

    Raises:
        InputError: the installed scikit-learn does not have it where it was.
    """
    found = importlib.util.find_spec("sklearn")  # which imports nothing
    folders = [] if found is None else found.submodule_search_locations or []
    paths = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders]
    for path in paths:
        if path.is_file():
            return path
    raise InputError(f"data.source=digits: no file {' or '.join(map(str, paths))} of scikit-learn. Install it anew.")
