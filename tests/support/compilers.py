"""Stand-ins for the kernel compiler that a test drives by hand; they compile nothing and start no process."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

from esper_fx.cache import Job, JobResult


class HandCompiler:
    """Takes jobs; the test says when and how each ends."""

    def __init__(self) -> None:
        self.submitted: queue.SimpleQueue[tuple[Job, Future[JobResult]]] = queue.SimpleQueue()

    def submit(self, job: Job) -> Future[JobResult]:
        """Notes the job."""
        future: Future[JobResult] = Future()
        self.submitted.put((job, future))
        return future

    def next(self) -> tuple[Job, Future[JobResult]]:
        """The next job and its future; waits until it is there."""
        return self.submitted.get(timeout=10)


class EchoCompiler:
    """Ends every job at once, with its payload as the artifact; counts them by payload."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.payloads: list[bytes] = []
        self._lock = threading.Lock()

    def submit(self, job: Job) -> Future[JobResult]:
        """Returns a completed future."""
        with self._lock:
            self.payloads.append(job.payload)
        future: Future[JobResult] = Future()
        future.set_result(JobResult(job.payload, self.seconds, self.seconds / 2))
        return future


def job(payload: bytes) -> Job:
    """A job for a compiler that does not look at its target."""
    return Job("tests.support.cache_jobs:echo", payload)
