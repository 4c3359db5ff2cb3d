"""Every timing of a database as plain rows, for any device, version and protocol."""

from __future__ import annotations

from typing import Any

from sqlalchemy import select

from autoquant.errors import StoreError
from autoquant.records import Device
from autoquant.store.repository import Store
from autoquant.store.rows import measurement_from
from autoquant.store.schema import DeviceRow, TimingRow
from autoquant.store.transactions import transaction

COLUMNS = (
    "device",
    "device_key",
    "versions",
    "protocol",
    "n",
    "k",
    "bias",
    "dtype",
    "m",
    "format",
    "kernel",
    "working_set_bytes",
    "outcome",
    "latency_us",
    "spread_us",
    "relative_error",
    "reason",
)


def timing_rows(store: Store, device_part: str = "") -> list[dict[str, Any]]:
    """Return timings with the fields of `COLUMNS`, oldest first.

    `latency_us` is the median of the samples and `spread_us` their interquartile range, or None
    without samples. `device_key` separates devices of one name (threads, driver, cache).
    `versions` is a dict.

    Args:
        device_part: Return only devices whose name contains this text, in any case.

    Raises:
        StoreError: No device has such a name.
    """
    with transaction(store.engine) as session:
        devices = {row.key: row.fingerprint for row in session.scalars(select(DeviceRow))}
        chosen = [
            key for key, device in devices.items() if device_part.lower() in device.name.lower()
        ]
        if device_part and not chosen:
            names = ", ".join(sorted({device.name for device in devices.values()}))
            raise StoreError(
                f"no device here has {device_part!r} in its name; devices: {names or 'none'}"
            )
        rows = session.scalars(
            select(TimingRow).where(TimingRow.device_key.in_(chosen)).order_by(TimingRow.id)
        )
        return [_row(row, devices[row.device_key]) for row in rows]


def _row(row: TimingRow, device: Device) -> dict[str, Any]:
    found = {
        "device": device.name,
        "versions": dict(device.versions),
        "spread_us": measurement_from(row).spread_us if row.samples_us else None,
    }
    return {name: found[name] if name in found else getattr(row, name) for name in COLUMNS}
