"""A private config must say some things and leave out others, whichever unit it protects."""

from __future__ import annotations

from fedpeft.config import Config
from fedpeft.errors import InputError

WEIGHTS = {  # privacy.unit -> why clients must weigh the same
    "sample": "counts of records would leave the clients unprotected",
    "client": "one client with many examples would move the mean by more than the noise hides",
}


def require_covered(config: Config) -> None:
    """Refuse a private config whose noise is not determined, or in which clients send what no guarantee covers.

    Raises:
        InputError: names the key and the way out.
    """
    privacy, data, weighting = config.privacy, config.data, config.strategy.weighting
    if (privacy.epsilon is None) == (privacy.noise_multiplier is None):
        raise InputError(
            f"privacy.epsilon={privacy.epsilon} and privacy.noise_multiplier={privacy.noise_multiplier}: "
            "give exactly one (set the other to null)."
        )
    if weighting != "uniform":
        raise InputError(
            f"strategy.weighting={weighting}: with privacy.unit={privacy.unit}, {WEIGHTS[privacy.unit]}. "
            "Set strategy.weighting=uniform."
        )
    if data.holdout > 0 and not privacy.release_metrics:
        raise InputError(
            f"data.holdout={data.holdout:g}: clients would send their accuracy, which no guarantee "
            "covers. Set data.holdout=0, or privacy.release_metrics=true to release it unprotected."
        )
