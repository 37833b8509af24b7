"""The same strategy and ClientApp under Flower's simulation engine (Ray): several GPUs, several machines."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpeft.errors import RunError
from fedpeft.strategies.base import ServerState


def run_with_ray(
    make_app: Callable[[], ClientApp], play: Callable[[Grid], ServerState], clients: int, workers: int
) -> ServerState:
    """Run `play` as a ServerApp over `clients` virtual nodes, `workers` of them at a time.

    Args:
        make_app: picklable; Ray's actors call it.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from flwr.simulation import run_simulation
    from flwr.supercore import telemetry

    telemetry.FLWR_TELEMETRY_ENABLED = os.environ.get("FLWR_TELEMETRY_ENABLED", "0")  # Flower's default is to report

    logging.getLogger("flwr").setLevel(logging.ERROR)
    result: list[ServerState] = []
    failures: list[BaseException] = []
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            result.append(play(grid))
        except BaseException as error:  # raised again in the caller's thread; here it would only be printed
            failures.append(error)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        run_simulation(
            server_app,
            RayClient(make_app),
            num_supernodes=clients,
            backend_config={
                "init_args": {"num_cpus": workers, "include_dashboard": False, "log_to_driver": False},
                "client_resources": {"num_cpus": 1, "num_gpus": _gpu_share(workers)},
            },
        )
    if failures:
        raise failures[0]
    if not result:
        raise RunError("Flower's simulation engine ended without a result; its log above says why.")
    return result[0]


class RayClient(ClientApp):
    """A ClientApp that is made in the actor, so that only its recipe is pickled."""

    def __init__(self, make_app: Callable[[], ClientApp]) -> None:
        super().__init__()
        self.make_app = make_app
        self.made: ClientApp | None = None

    def __call__(self, message: Message, context: Context) -> Message:
        self.made = self.made or self.make_app()
        return self.made(message, context)


def _gpu_share(workers: int) -> float:
    import torch

    return min(1.0, torch.cuda.device_count() / workers) if torch.cuda.is_available() else 0.0
