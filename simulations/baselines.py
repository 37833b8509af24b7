"""Rows that every table needs: what frozen features, raw pixels or words reach with no federated training at all.

Both are fitted on the pooled training data, which a federation does not have: they are reference points, not rivals.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedpeft.seeds import numpy_generator

if TYPE_CHECKING:
    from fedpeft.adapters.adapted import Adapted
    from fedpeft.data.encode import Encoded
    from fedpeft.data.records import Records
    from fedpeft.run.world import World

log = logging.getLogger("fedpeft")
MAX_TRAIN = 5000


def baselines(here: World) -> dict[str, Any]:
    """Test accuracy of logistic regression on frozen features and on pixels or words; empty without classes.

    At most MAX_TRAIN training records are used. A row that cannot be fitted is None, and `<row>_reason` says why: a run
    does not end because of what only stands beside it.
    """
    if not here.local.model.base.objective.classes:
        return {}
    few = numpy_generator(here.config.run.seed, "baselines").permutation(len(here.train))[:MAX_TRAIN]
    y, y_test = here.train.labels[few], here.test.labels

    def frozen() -> dict[str, Any]:
        model = here.local.model
        model.write(here.start.adapter)
        x, x_test = (_collect_features(model, part) for part in (here.train_encoded.view(few), here.test_encoded))
        return {"frozen_logistic": fit_logistic(x, y, x_test, y_test)}

    def pixels_or_words() -> dict[str, Any]:
        x, x_test = raw(here.train.take(few), here.test)
        return {"pixels_or_words_logistic": fit_logistic(x, y, x_test, y_test)}

    return {**attempt_fit("frozen_logistic", frozen), **attempt_fit("pixels_or_words_logistic", pixels_or_words)}


def attempt_fit(name: str, fit: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What stands beside a run, or `name` as None with the reason for it."""
    try:
        return fit()
    except Exception as error:  # whatever scikit-learn, or a model that meets odd records, may raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("%s: not fitted: %s", name, reason)
        return {name: None, f"{name}_reason": reason}


def _collect_features(model: Adapted, data: Encoded) -> np.ndarray:
    return torch.cat([found for found, _, _ in model.features(data)]).numpy()


def raw(train: Records, test: Records) -> tuple[Any, Any]:
    """TF-IDF of words, or flat pixels."""
    if train.kind == "text":
        from sklearn.feature_extraction.text import TfidfVectorizer

        words = TfidfVectorizer(sublinear_tf=True, min_df=2)
        return words.fit_transform(train.inputs), words.transform(test.inputs)
    return np.reshape(train.inputs, (len(train.labels), -1)), np.reshape(test.inputs, (len(test.labels), -1))


def fit_logistic(x: Any, y: np.ndarray, x_test: Any, y_test: np.ndarray) -> float:
    """Test accuracy of a logistic regression (C = 10) on scaled inputs."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import MaxAbsScaler

    scale = MaxAbsScaler().fit(x)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(scale.transform(x), y)
    return float(model.score(scale.transform(x_test), y_test))
