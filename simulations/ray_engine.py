"""Ray actors in place of worker processes: several GPUs, several machines (RAY_ADDRESS names a cluster that runs).

An actor takes a share of a round's messages and trains their clients together, as a worker process does. A thread for
each actor stands between Ray and the pipe that the pool listens to, so the pool knows no difference.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedpeft.errors import RunError
from fedpeft.simulations.workers import Answer, Broken, Channel, Job, Lost, Worker, run_jobs, shared_memory

ASKED_S = 0.5  # between two looks at whether a node has ended
LOST = "A node of the Ray cluster is gone"


class Actor:
    """What runs at the other end: one base model, and the clients of the shares that it gets."""

    def __init__(self, make_app: Callable[[], ClientApp], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.app = make_app()

    def ready(self) -> str:
        """The node that the actor is on, once it has its model."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def answer(self, jobs: list[tuple[Message, Context]]) -> Iterator[Answer | Broken]:
        """Outcomes of the jobs, each as soon as it is there."""
        yield from run_jobs(self.app, jobs)


class RayWorker(Worker):
    """One actor, as a worker of the pool.

    Args:
        gpus: share of a GPU that it takes.
    """

    def __init__(self, make_app: Callable[[], ClientApp], threads: int, gpus: float) -> None:
        import ray

        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        self.actor: Any = ray.remote(Actor).options(**options).remote(make_app, threads)
        ours, theirs = multiprocessing.Pipe()
        self.pipe = Channel(ours)
        self.ready, self.jobs, self.share = False, deque[Job](), list[Job]()
        # A thread, since Ray's futures cannot be waited for beside pipes.
        threading.Thread(target=bridge, args=(Channel(theirs), self.actor), daemon=True).start()

    def death(self) -> Broken | str:
        return "the client's process ended (a Ray actor)"

    def end(self) -> None:
        import ray

        ray.kill(self.actor)
        self.pipe.close()


def bridge(pipe: Channel, actor: Any) -> None:
    """Shares from the pool to the actor, outcomes back one by one; the pipe closes when the actor has ended.

    An actor that ends with its node is no client's doing, and told as lost. What else Ray raises is of the machine: an
    object store in /dev/shm that is full, a disk. It is told as that.
    """
    import ray

    node = ""
    try:
        node = ray.get(actor.ready.remote())
        pipe.send(None)
        while True:
            # One by one as they are made: the pool counts answers to know which message an actor is busy with.
            for outcome in actor.answer.options(num_returns="streaming").remote(pipe.recv()):
                pipe.send(ray.get(outcome))
    except ray.exceptions.RayActorError as error:
        if error.actor_init_failed:
            pipe.send(str(error).strip().splitlines()[-1])
        elif node and is_gone(node):
            pipe.send(Lost(f"{LOST} ({node[:8]})."))
    except ray.exceptions.RayError as error:
        if node and is_gone(node):  # what it held is lost with it
            pipe.send(Lost(f"{LOST} ({node[:8]})."))
        else:
            pipe.send(Broken(f"Ray: {str(error).strip().splitlines()[0]} {shared_memory()}".strip()))
    except (EOFError, OSError):  # the pool has closed
        return
    finally:
        pipe.close()


def is_gone(node: str) -> bool:
    """Whether a node of the cluster has ended, whose actor has.

    Ray may know of the actor at once and of the node half a minute later, so the node is asked for an answer: that or
    the news that the node has ended, whichever comes first, decides.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    library: Any = ray  # its functions have no types
    there = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    options = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": there}
    answer = library.remote(answer_at_once).options(**options).remote()
    while any(known["NodeID"] == node and known["Alive"] for known in library.nodes()):
        if library.wait([answer], timeout=ASKED_S)[0]:
            try:
                library.get(answer)
            except ray.exceptions.RayError:  # it was refused, or ended with the node
                return True
            return False
    return True


def answer_at_once() -> None:
    """What a node does that is asked whether it is there."""


def start_ray(workers: int) -> Callable[[Callable[[], ClientApp], int], Worker]:
    """Start Ray, or join a cluster, and give what makes a worker; `workers` share the GPUs there are."""
    if lack := shared_memory():  # Ray would wait for its object store for minutes, or lose clients' replies
        raise RunError(f"run.engine=ray needs shared memory. {lack} run.engine=cohort with run.workers does without.")
    # Before the import. Ray would report its use otherwise, and run its actors at niceness 15: on a machine with other
    # work they would have a fiftieth of a core.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    library: Any = ray  # its functions have no types
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A cluster says itself what it has, and refuses to be told. One that nobody has named is left alone: Ray would join
    # what another program has begun on this machine.
    named = os.environ.get("RAY_ADDRESS")
    where: dict[str, Any] = {"address": named} if named else {"address": "local", "num_cpus": workers}
    try:
        library.init(include_dashboard=False, log_to_driver=False, logging_level="error", **where)
    except Exception as error:  # a raylet that does not come up: RuntimeError, TimeoutError and others
        why = f"{str(error).strip().splitlines()[0]} {shared_memory()}".strip()
        raise RunError(f"Ray could not start: {why}") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray's own would end the process without its farewell
            signal.signal(number, handler)
    cores = int(library.cluster_resources().get("CPU", 0))
    if cores < workers:  # Ray would wait for them without a word
        raise RunError(f"run.workers={workers}: the Ray cluster has {cores} cores, and an actor takes one.")
    gpus = min(1.0, library.cluster_resources().get("GPU", 0.0) / workers)
    return lambda make_app, threads: RayWorker(make_app, threads, gpus)


def stop_ray() -> None:
    """Disconnect from Ray, and end it where this process started it."""
    import ray

    ray.shutdown()
