"""Jobs in actors of Ray: on the devices of this host, or on those of a cluster.

Each actor has one device, which it is placed by: nodes offer the search's kind of device as a
resource named after its key (`resource_of`). There it has a `ForkingRunner`, as workers of one host
do, so that a job runs the same. An actor that dies, with its node perhaps, is made again wherever
the resource is free, and one more is made for each device that joins.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from autoquant.cache import cache_folder
from autoquant.devices import backend
from autoquant.devices.base import Place
from autoquant.errors import WorkerLostError, WorkersError, first_line
from autoquant.files import hold
from autoquant.records import Device
from autoquant.tuner.workers.crew import Begun, Crew
from autoquant.tuner.workers.forking import DONE, RAISED, TOLD, ForkingRunner
from autoquant.tuner.workers.jobs import BenchSpec, Job, LoadJob

if TYPE_CHECKING:
    from autoquant.tuner.workers.in_process import Runner

Result = TypeVar("Result")
_LOOK_S, _LOOKS = 2.0, 30
_REACH_S = 10.0
_OBJECTS_BYTES = 100 << 20
"""Room for what Ray keeps. Jobs and what they tell are small."""
_log = logging.getLogger(__name__)


def resource_of(hardware: Device) -> str:
    """Return the name of the resource that nodes with such a device offer, one for each."""
    return f"autoquant-{hardware.key}"


class RayCrew(Crew):
    """A crew whose runners are actors of Ray, as many as there are devices."""

    def __init__(self, spec: BenchSpec, hardware: Device, address: str) -> None:
        super().__init__()
        self._spec, self._resource = spec, resource_of(hardware)
        self._ended = threading.Event()
        self._address = address
        self._connect()
        try:
            self._take_in()
            if not self.workers:
                raise WorkersError(self._nothing_offered())
            self.wait_for_all()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """End the actors, and leave Ray."""
        import ray

        self._ended.set()
        super().close()
        ray.shutdown()

    def _connect(self) -> None:
        """Connect to the cluster, or start Ray on this host.

        Raises:
            WorkersError: It cannot be reached.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            if self._address:
                _reach(self._address)
                ray.init(self._address, **quiet)
                return
            here = len(backend(self._spec.device).places())
            with _like_here():
                ray.init(
                    num_cpus=1,
                    resources={self._resource: here},
                    object_store_memory=_OBJECTS_BYTES,
                    include_dashboard=False,
                    **quiet,
                )
        except Exception as error:
            where = f"reach {self._address}" if self._address else "start Ray"
            raise WorkersError(f"--workers cannot {where}: {first_line(error)}") from error

    def _nothing_offered(self) -> str:
        offer = f"--resources='{{\"{self._resource}\": 1}}'"
        return (
            f"no node of {self._address} offers this device: start its nodes with"
            f" `RAY_worker_niceness=0 ray start --address=HEAD {offer}`, or with the number of such"
            " devices in place of 1"
        )

    def _take_in(self) -> None:
        """Have an actor for each device that the cluster has now."""
        import ray

        offered = int(ray.cluster_resources().get(self._resource, 0))
        for _ in range(offered - self.workers):
            self.join(partial(_RayRunner, self._spec, self._resource))

    def _watch(self) -> None:
        """Take in the devices that join later."""
        while not self._ended.wait(_LOOK_S):
            try:
                self._take_in()
            except Exception as error:  # noqa: BLE001 - the cluster may be away for a moment
                _log.info("looked for further devices: %s", first_line(error))


def _reach(address: str) -> None:
    """Check that something listens there. Ray itself would try for minutes.

    Raises:
        OSError: Nothing does.
        ValueError: It is no HOST:PORT.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError("give ray://HOST:PORT")
    socket.create_connection((host, int(port)), _REACH_S).close()


@contextmanager
def _like_here() -> Iterator[None]:
    """Inside, processes that are started import from where this one does, at its priority."""
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "RAY_worker_niceness": "0",  # Ray's own is 15, which would disturb timings
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _RayRunner:
    """Runs jobs in an actor. It is made once Ray has a device for it."""

    def __init__(self, spec: BenchSpec, resource: str) -> None:
        import ray

        gpus = backend(spec.device).gpus
        actor = ray.remote(num_cpus=0, num_gpus=gpus, resources={resource: 1})(Actor)
        self._actor = actor.remote(spec)
        try:
            self.run(LoadJob(), lambda _message: None)
        except BaseException:
            self.close()
            raise

    def run(self, job: Job[Result], on_message: Callable[[Any], None]) -> Result:
        """Run a job as `Runner.run`.

        Raises:
            WorkerLostError: The actor was ended, or cannot be reached any more.
        """
        import ray

        try:
            ray.get(self._actor.begin.remote(job))
            while True:
                for kind, value in ray.get(self._actor.told.remote()):
                    if kind == RAISED:
                        raise value
                    if kind == DONE:
                        result: Result = value
                        return result
                    on_message(value)
        except (ray.exceptions.RayActorError, ConnectionError) as error:
            raise WorkerLostError(f"a worker is gone: {first_line(error)}") from None

    def close(self) -> None:
        """End the actor, with the processes that it started."""
        import ray

        try:
            ray.kill(self._actor)
        except Exception as error:  # noqa: BLE001 - it, or the cluster, is gone already
            _log.info("ended a worker: %s", first_line(error))


class Actor:
    """The other side of `_RayRunner`: a worker on the node that Ray chose."""

    def __init__(self, spec: BenchSpec) -> None:
        self._held: int | None = None
        self._place: Place | None = None
        self._crew = Crew()
        self._crew.join(partial(self._worker, spec))
        self._crew.wait_for_all()
        self._told: list[tuple[str, Any]] = []
        self._begun: Begun[Any] | None = None

    def begin(self, job: Job[Any]) -> None:
        """Begin a job."""
        self._begun = self._crew.begin(job, lambda message: self._told.append((TOLD, message)))

    def told(self) -> list[tuple[str, Any]]:
        """Wait for something, and return it: messages, and in the end what became of the job."""
        assert self._begun is not None
        self._begun.wait()
        told, self._told = self._told, []
        if self._begun.is_done:
            told.append(self._outcome(self._begun))
        return told

    def _outcome(self, begun: Begun[Any]) -> tuple[str, Any]:
        from autoquant.tuner.workers.worker import portable

        try:
            return DONE, begun.result()
        except Exception as error:  # noqa: BLE001 - raised again on the other side
            return RAISED, portable(error)

    def _worker(self, spec: BenchSpec) -> Runner:
        place = self._place = self._place or self._free_place(spec.device)
        return ForkingRunner(spec.at(place), place.environment)

    def _free_place(self, device: str) -> Place:
        """Return a part of this node that no other actor has; it is held until this one ends.

        Raises:
            WorkersError: Others have all of them.
        """
        places = backend(device).places()
        for _ in range(_LOOKS):
            for place in places:
                name = "-".join([place.device, *place.environment.values(), *map(str, place.cores)])
                self._held = hold(cache_folder() / "places" / name.replace(":", "-"))
                if self._held is not None:
                    return place
            time.sleep(_LOOK_S)
        raise WorkersError(f"other searches use every {device} device of {platform.node()}")


def ray_crew(spec: BenchSpec, hardware: Device, address: str) -> Crew:
    """Return actors of Ray as one runner.

    Args:
        hardware: The kind of device that each has.
        address: Of the cluster; empty to start Ray on this host.

    Raises:
        WorkersError: The cluster cannot be reached, or offers no such device.
    """
    return RayCrew(spec, hardware, address)
