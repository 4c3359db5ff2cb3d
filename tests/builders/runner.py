"""A runner that does no work: what jobs would find out is what the test says."""

from __future__ import annotations

from dataclasses import replace

from autoquant.records import Measurement
from autoquant.tuner.workers.jobs import ProfileJob, ProveJob, Scored, ScoreJob, Timed

from .search import make_proof

ORIGINAL_MS = 20.0


def say_what_is_predicted(plan):
    """A proof of the predicted loss; a request takes 10 ms, and what the plan's linears take."""
    first, *others = dict.fromkeys(phase for layer in plan.layers for phase in layer.latency_us)
    linear_ms = sum(layer.latency_us[first] for layer in plan.layers) / 1e3
    loss, memory = plan.prediction.loss, plan.prediction.memory_bytes
    proof = make_proof(plan.plan_id, ms=10 + linear_ms, original_ms=ORIGINAL_MS, increase=loss)
    rest = dict.fromkeys(others, 0.25)
    return replace(
        proof,
        phase_ms={first: 9 + linear_ms} | rest,
        original_phase_ms={first: ORIGINAL_MS - 1} | rest,
        memory_bytes=memory,
    )


class FakeRunner:
    """Notes every job.

    Args:
        prove: Gives the proof of a plan, or raises.
        latency_us: Gives the latency of a subject, or a text: the reason why it cannot be used.
        loss: Gives the loss of (layer, numerics).
    """

    def __init__(self, prove=say_what_is_predicted, latency_us=lambda _subject: 10.0, loss=None):
        self.jobs = []
        self.closed = False
        self._prove, self._latency_us = prove, latency_us
        self._loss = loss or (lambda _layer, _numerics: 0.01)

    @property
    def proven(self):
        """The plans of all proofs that were asked for, in order."""
        return [job.plan for job in self.jobs if isinstance(job, ProveJob)]

    def run(self, job, on_message):
        self.jobs.append(job)
        if isinstance(job, ProveJob):
            return self._prove(job.plan), {"selection": (1.0, 2.0)}
        if isinstance(job, ScoreJob):
            for site, numerics, _format, _activation in job.changes:
                loss = self._loss(site.name, numerics)
                on_message(Scored(site.name, {(site.name, numerics): loss}))
            return None
        assert isinstance(job, ProfileJob)
        on_message(Timed(tuple(map(self._measured, job.subjects))))
        return None

    def close(self):
        self.closed = True

    def _measured(self, subject):
        found = self._latency_us(subject)
        if isinstance(found, str):
            return Measurement(subject=subject, outcome="unsupported", reason=found)
        return Measurement(subject=subject, outcome="ok", samples_us=(found,))
