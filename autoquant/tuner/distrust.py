"""What is done about a kernel that was timed as right and is found wrong in a proof."""

from __future__ import annotations

from dataclasses import replace

from autoquant.candidates import timed_as
from autoquant.errors import KernelError
from autoquant.profiler.timing import PROTOCOL
from autoquant.profiler.timing_table import TimingTable
from autoquant.tuner.ledger import ProofLedger
from autoquant.tuner.setup import SearchSetup


def distrust(
    lie: KernelError, timings: TimingTable, ledger: ProofLedger, setup: SearchSetup
) -> None:
    """Call all timings of the kernel incorrect, and all plans with it failed, with the reason.

    Raises:
        KernelError: The same one, if no timing is of this kernel: nothing would change.
    """
    ledger.distrust(lie)
    timed = (timed_as(lie.format), lie.kernel)
    reason = f"found wrong when a plan was proven, {lie.reason}"
    wrong = [
        replace(found, outcome="incorrect", reason=reason, samples_us=())
        for subject, found in timings.measurements.items()
        if (subject.format, subject.kernel) == timed and found.outcome == "ok"
    ]
    if not wrong:
        raise lie
    setup.store.replace_timings(setup.settled.hardware, PROTOCOL, wrong)
    setup.tell(f"{lie.format}/{lie.kernel} is no longer used: {lie.reason}")
