"""The sections `privacy` and `secagg`: what of the records is protected, from whom, and how."""

from __future__ import annotations

from dataclasses import dataclass

from fedpeft.config.option import option


@dataclass
class PrivacyConfig:
    """Section `privacy`: what is protected, its budget, and how sampling and noise keep it."""

    unit: str = option(
        "none",
        "what differential privacy protects: sample, one record, by DP-SGD at each client, "
        "also against the server; client, all data of one client, by noise at a trusted server",
        choices=("none", "sample", "client"),
    )
    epsilon: float | None = option(
        None, "budget for the whole run; the noise follows. Give this or noise_multiplier", above=0
    )
    noise_multiplier: float | None = option(None, "noise standard deviation / clip; the budget follows", above=0)
    delta: float = option(1e-5, "of the guarantee; below 1 / records of the smallest client", above=0, high=0.5)
    clip: float = option(
        1.0,
        "L2 norm that one record's gradient (unit sample) or one client's update (unit client) "
        "is clipped to, over all trained tensors together",
        above=0,
    )
    accountant: str = option("pld", "how epsilon is computed", choices=("pld", "prv", "rdp"))
    planned_rounds: int | None = option(None, "rounds that the budget is planned for; null is run.rounds", low=1)
    randomness: str = option(
        "seeded",
        "seeded: reproducible, so not private (simulations, tests); os: the operating system's generator",
        choices=("seeded", "os"),
    )
    records: int | None = option(
        None,
        "public number of records a client is said to have, for its sampling rate; null "
        "takes each client's own count, which then counts as public",
        low=1,
    )
    release_metrics: bool = option(False, "let clients send loss, accuracy and counts, which no guarantee covers")
    policy: str | None = option(
        None, "policy file of every client, or folder with <client name>.yaml of each", path=True
    )
    client_sampling: str = option(
        "fixed",
        "unit client: a fixed number of clients a round (no amplification), or each "
        "with probability run.clients_per_round / data.clients",
        choices=("fixed", "poisson"),
    )
    adaptive_clip: bool = option(False, "unit client: let clip follow a quantile of the update norms")
    clip_quantile: float = option(0.5, "share of updates that adaptive clipping leaves unclipped", low=0, high=1)
    clip_lr: float = option(0.2, "step of adaptive clipping in log space", above=0)
    clip_count_noise: float | None = option(
        None, "standard deviation of the noise on the count of unclipped updates; null is clients a round / 20", above=0
    )


@dataclass
class SecAggConfig:
    """Section `secagg`: masks over fixed-point updates; strategies that must see each update cannot have it."""

    enabled: bool = option(False, "secure aggregation (SecAgg+): the server learns the sum of the updates, none alone")
    clip: float = option(1.0, "largest change of one coordinate in a round; larger ones are cut to it", above=0)
    # Sums are modulo 2**32, and 30 bits leave room for four clients; how many may have part is checked with secagg.
    bits: int = option(22, "bits of the fixed-point value of one coordinate", low=8, high=30)
    threshold: float = option(
        0.6, "share of a client's neighbours that must stay for its masks to be removed", above=0, high=1
    )
    neighbours: int | None = option(None, "clients that one client shares masks with; null is all others", low=2)
    min_clients: int | None = option(
        None,
        "fewest clients, as each of them sees, whose sum is given away; null is what secagg.threshold comes to",
        low=2,
    )
