"""Devices, their limits, and how long linears take on them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from sqlalchemy import delete, select

from autoquant.records import (
    Device,
    Measurement,
    Roofline,
    TimingSubject,
)
from autoquant.store.rows import (
    measurement_from,
)
from autoquant.store.schema import (
    TIMING_KEY,
    DeviceRow,
    RooflineRow,
    TimingRow,
)
from autoquant.store.transactions import Transactions


class Timings(Transactions):
    """What is measured on a device."""

    def put_device(self, device: Device) -> None:
        with self._writing() as session:
            session.merge(DeviceRow(key=device.key, fingerprint=device))

    def roofline(self, device: Device) -> Roofline | None:
        """Return the measured limits of `device`, or None."""
        with self._session() as session:
            row = session.get(RooflineRow, device.key)
            if row is None:
                return None
            return Roofline(
                bandwidth_bytes_per_s=row.bandwidth_bytes_per_s, flops_per_s=row.flops_per_s
            )

    def put_roofline(self, device: Device, roofline: Roofline) -> None:
        with self._writing() as session:
            session.merge(RooflineRow(device_key=device.key, **asdict(roofline)))

    def timings(self, device: Device, protocol: str) -> dict[TimingSubject, Measurement]:
        """Return every measurement made on `device` under `protocol`."""
        with self._session() as session:
            rows = session.scalars(
                select(TimingRow).filter_by(device_key=device.key, protocol=protocol)
            )
            return {measurement.subject: measurement for measurement in map(measurement_from, rows)}

    def put_timings(
        self, device: Device, protocol: str, measurements: Iterable[Measurement]
    ) -> list[Measurement]:
        """Save measurements that were made in turn, all or none of them.

        Returns:
            The measurements that the store holds of their subjects. What another process has saved
            meanwhile stays.
        """
        kept = []
        with self._writing() as session:
            for measurement in measurements:
                fresh = _timing_row(device, protocol, measurement)
                row = session.scalars(select(TimingRow).filter_by(**_timing_key(fresh))).first()
                if row is None:
                    row = fresh
                    session.add(row)
                kept.append(measurement_from(row))
        return kept

    def replace_timings(
        self, device: Device, protocol: str, measurements: Iterable[Measurement]
    ) -> None:
        """Save measurements in place of those of the same subjects, all or none of them."""
        with self._writing() as session:
            for measurement in measurements:
                row = _timing_row(device, protocol, measurement)
                session.execute(delete(TimingRow).filter_by(**_timing_key(row)))
                session.add(row)


def _timing_key(row: TimingRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in TIMING_KEY}


def _timing_row(device: Device, protocol: str, measurement: Measurement) -> TimingRow:
    subject = measurement.subject
    return TimingRow(
        device_key=device.key,
        protocol=protocol,
        **asdict(subject.shape),
        m=subject.m,
        format=subject.format,
        kernel=subject.kernel,
        working_set_bytes=subject.working_set_bytes,
        outcome=measurement.outcome,
        reason=measurement.reason,
        latency_us=measurement.latency_us if measurement.samples_us else None,
        samples_us=measurement.samples_us,
        relative_error=measurement.relative_error,
    )
