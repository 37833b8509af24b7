"""Runs of stock Flower apps on a SuperLink, as its operators and its executors have them; fedpeft's own are none.

It is what a comparison with Flower needs beyond Flower's public interface, and what tests of a coordinator beside stock
nodes do (tests/unit/test_flower_names.py lists each private name).
"""

from __future__ import annotations

from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

AUTHENTICATED = frozenset({"/flwr.proto.Runtime/AcquireTask"})  # what an executor needs its secret for


def start_run(operator: ControlHttpClient, files: dict[str, bytes]) -> int:
    """Have the SuperLink start a run of an app that consists of these files; Flower's number of it."""
    content = build_fab_from_files(files)[0]
    return int(operator.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", content, {})))).run_id)


def is_finished(operator: ControlHttpClient, number: int) -> bool:
    """Whether a run has ended."""
    return bool(operator.ListRuns(ListRunsRequest(run_id=number)).run_dict[number].status.status == "finished")


def connect_executor(place: str, root: bytes, secret: bytes) -> RuntimeHttpClient:
    """The API that hands out tasks at HOST:PORT, to those who know the secret."""
    about = RuntimeVersionHttpInterceptor(component_name="SuperExec")
    proof = SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=AUTHENTICATED)
    return RuntimeHttpClient.from_server_address(place, False, root, [about, proof])


def take_token(executor: RuntimeHttpClient) -> str:
    """The token of a run that is to be worked on; empty if there is none."""
    answer: AcquireTaskResponse = executor.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
    return str(answer.token)
