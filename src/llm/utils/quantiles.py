"""Quantiles in constant memory: a histogram whose buckets grow by a constant factor."""

from __future__ import annotations

from math import ceil, log

GROWTH = 1.02
"""Width of a bucket: a quantile is off by at most one per cent of its value."""
SMALLEST = 1e-6
LARGEST = 1e6
LOG_GROWTH = log(GROWTH)


class Quantiles:
    """Counts, extremes, mean and quantiles of a series of durations in seconds.

    Values are clamped to a microsecond and eleven days, which bounds the buckets at 1,396.
    """

    __slots__ = ("_buckets", "count", "largest", "smallest", "total")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.total = 0.0
        self.smallest = 0.0
        self.largest = 0.0

    def add(self, value: float) -> None:
        """Count one *value*."""
        if self.count == 0 or value < self.smallest:
            self.smallest = value
        if value > self.largest:
            self.largest = value
        self.count += 1
        self.total += value
        if not SMALLEST <= value <= LARGEST:
            value = SMALLEST if value < SMALLEST else LARGEST
        bucket = ceil(log(value) / LOG_GROWTH)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + 1

    def quantile(self, q: float) -> float:
        """The value below which the share *q* of all values lies; 0.0 when there are none."""
        if self.count == 0:
            return 0.0
        rank = max(1, ceil(q * self.count))
        for bucket in sorted(self._buckets):
            rank -= self._buckets[bucket]
            if rank <= 0:
                # The middle of the bucket, within what was really seen.
                return min(max(float(GROWTH ** (bucket - 0.5)), self.smallest), self.largest)
        return self.largest

    def summary(self) -> dict[str, float]:
        """What the status page shows, in seconds."""
        return {
            "min": self.smallest,
            "max": self.largest,
            "average": self.total / self.count if self.count else 0.0,
            "p50": self.quantile(0.50),
            "p95": self.quantile(0.95),
            "p99": self.quantile(0.99),
        }
