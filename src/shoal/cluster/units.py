"""Sizes, rates and times as people write them: 80GiB, 3350GB/s, 100Gbit/s, 989TFLOPS, 5us.

A rate without its unit is refused: that is how a thousand gets lost. Knows nothing of what is
measured, but for the range that each may lie in.
"""

from __future__ import annotations

import re

from shoal.plan_file.fields import Field

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_TIMES = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?) *"


def size_bytes(field: Field, least: float = 1, most: float = 2.0**46) -> int:
    """Such as 80GB or 79.2GiB."""
    return int(_bytes(field, "", "a size such as 80GB or 79.2GiB", least, most))


def rate_bytes_per_s(field: Field, least: float, most: float) -> float:
    """Such as 3350GB/s or 100Gbit/s."""
    needed = "a rate with its unit, such as 3350GB/s or 100Gbit/s"
    bits = re.fullmatch(_NUMBER + r"([kKMGT]?)bit/s", field.text())
    if bits:
        return _inside(field, float(bits[1]) * _PREFIXES[bits[2]] / 8, needed, least, most, "B/s")
    return _bytes(field, "/s", needed, least, most)


def time_s(field: Field, least: float = 1e-9, most: float = 100.0) -> float:
    """Such as 5us or 1.2ms."""
    needed = "a time with its unit, such as 5us or 1.2ms"
    found = re.fullmatch(_NUMBER + r"(ns|us|µs|ms|s)", field.text())
    if not found:
        raise field.wrong(needed)
    return _inside(field, float(found[1]) * _TIMES[found[2]], needed, least, most, "s")


def flops_per_s(field: Field) -> float:
    """Such as 989T or 989TFLOPS, dense."""
    needed = "dense operations per second with their unit, such as 989T"
    found = re.fullmatch(_NUMBER + r"([GTP])(?:FLOPS|OPS)?", field.text())
    if not found:
        raise field.wrong(needed)
    value = float(found[1]) * _PREFIXES[found[2]]
    return _inside(field, value, needed, 1e9, 1e17, "flops/s")


def _bytes(field: Field, per: str, needed: str, least: float, most: float) -> float:
    found = re.fullmatch(_NUMBER + rf"([kKMGT]?|[KMGT]i)B{per}", field.text())
    if not found:
        raise field.wrong(needed)
    value = float(found[1]) * {**_PREFIXES, **_BINARY}[found[2]]
    return _inside(field, value, needed, least, most, f"B{per}")


def _inside(field: Field, value: float, needed: str, least: float, most: float, unit: str) -> float:
    if not least <= value <= most:
        raise field.wrong(f"{needed}, from {text(least, unit)} to {text(most, unit)}")
    return value


def text(value: float, unit: str) -> str:
    """For people: 3.35e12 B/s is 3350 GB/s."""
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)):
        if value >= 10 * factor:
            return f"{value / factor:.4g} {prefix}{unit}"
    for prefix, factor in (("", 1.0), ("m", 1e-3), ("u", 1e-6)):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
