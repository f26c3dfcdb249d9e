"""What a run says while it works: metrics.jsonl, one progress display, speed and memory, the versions it ran with."""

from ftlib.observe.environment import environment
from ftlib.observe.flops import Peak, count_weights, device_peak, flops_per_token
from ftlib.observe.meter import Meter
from ftlib.observe.metrics import MetricsFile
from ftlib.observe.progress import Progress

__all__ = [
    "Meter", "MetricsFile", "Peak", "Progress", "count_weights", "device_peak", "environment", "flops_per_token",
]
