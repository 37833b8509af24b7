"""scikit-learn's `digits`: small, real and easy. It shows that things run; it is no evidence for a method."""

from __future__ import annotations

import numpy as np

from fedpeft.data.records import Records

TEST = 597


class Digits:
    """1,797 handwritten digits of 8x8 pixels, ten classes; a fixed stratified test set of 597.

    Pixels are counts of ink from 0 to 16; they are scaled to [0, 1], as the embedded checkpoint was trained.
    """

    summary = "1,797 handwritten digits 8x8 (scikit-learn), 10 classes, 597 for test"
    kind = "image"
    license = "CC-BY-4.0"

    def load(self) -> tuple[Records, Records]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        raw = load_digits()
        images = (raw.images / 16).astype(np.float32)[..., None]
        records = Records(images, raw.target.astype(np.int64), [str(name) for name in raw.target_names], {}, "image")
        train, test = train_test_split(np.arange(len(images)), test_size=TEST, stratify=raw.target, random_state=0)
        return records.take(np.sort(train)), records.take(np.sort(test))
