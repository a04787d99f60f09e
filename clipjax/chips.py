"""What chips can do at most: the denominator of model FLOP utilization."""

from __future__ import annotations

PEAKS: tuple[tuple[str, float], ...] = (
    # Makers' figures for dense bfloat16 products, in operations a second and jax device. A device is a
    # whole chip, but half of one for TPU v2, v3 and 7x.
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
    ("TPU7x", 1153.5e12),
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("V100", 125e12),
    ("T4", 65e12),
)
"""Part of `jax.Device.device_kind` -> peak; the first that occurs in the name counts."""


def peak_flops(device_kind: str) -> float | None:
    """Operations a second of one device in bfloat16; None for a chip that is not in the table."""
    return next((peak for name, peak in PEAKS if name.lower() in device_kind.lower()), None)
