"""Ray actors in place of worker processes: several GPUs, several machines (RAY_ADDRESS names a cluster that runs).

An actor takes a share of a round's messages and trains their clients together, as a worker process does. A thread for
each actor stands between Ray and the pipe that the pool listens to, so the pool knows no difference.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedpeft.clients.app import CohortApp
from fedpeft.simulations.workers import Job, Worker, handle


class Actor:
    """What runs at the other end: one base model, and the clients of the shares that it gets."""

    def __init__(self, make_app: Callable[[], ClientApp], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.app = make_app()

    def ready(self) -> None:
        """Returns once the actor has its model."""

    def answer(self, jobs: list[tuple[Message, Context]]) -> Iterator[tuple[Message, RecordDict | None]]:
        if isinstance(self.app, CohortApp):
            self.app.prepare(jobs)
        for message, context in jobs:
            yield handle(self.app, message, context)


class RayWorker(Worker):
    """One actor, as a worker of the pool.

    Args:
        gpus: share of a GPU that it takes.
    """

    def __init__(self, make_app: Callable[[], ClientApp], threads: int, gpus: float) -> None:
        import ray

        self.actor: Any = ray.remote(Actor).options(num_cpus=1, num_gpus=gpus).remote(make_app, threads)
        self.pipe, theirs = multiprocessing.Pipe()
        self.ready, self.jobs = False, deque[Job]()
        threading.Thread(target=bridge, args=(theirs, self.actor), daemon=True).start()

    def end(self) -> None:
        import ray

        ray.kill(self.actor)
        self.pipe.close()


def bridge(pipe: Connection[Any, Any], actor: Any) -> None:
    """Shares from the pool to the actor, outcomes back one by one; the pipe closes when the actor has ended."""
    import ray

    with pipe:
        try:
            ray.get(actor.ready.remote())
            pipe.send(None)
            while True:
                for outcome in actor.answer.options(num_returns="streaming").remote(pipe.recv()):
                    pipe.send(ray.get(outcome))
        except ray.exceptions.RayError as error:
            if isinstance(error, ray.exceptions.RayActorError) and error.actor_init_failed:
                pipe.send(str(error).strip().splitlines()[-1])
        except (EOFError, OSError):  # the pool has closed
            return


def start_ray(workers: int) -> Callable[[Callable[[], ClientApp], int], Worker]:
    """Start Ray, or join a cluster, and give what makes a worker; `workers` share the GPUs there are."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    library: Any = ray  # its functions have no types
    cpus = None if os.environ.get("RAY_ADDRESS") else workers
    library.init(include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=cpus)
    gpus = min(1.0, library.cluster_resources().get("GPU", 0.0) / workers)
    return lambda make_app, threads: RayWorker(make_app, threads, gpus)


def stop_ray() -> None:
    import ray

    ray.shutdown()
