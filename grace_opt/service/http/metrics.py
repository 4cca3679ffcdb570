"""Counters for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from grace_opt.service.http.state import Service


class _Collector:
    """Reads the service when Prometheus asks; nothing is counted twice."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        runner, cluster = self.service.runner, self.service.cluster
        runs = GaugeMetricFamily("grace_opt_runs", "Runs in the database.", labels=["state"])
        for state, count in self.service.storage.runs.counts().items():
            runs.add_metric([state], count)
        heads = CounterMetricFamily(
            "grace_opt_heads_solved", "Heads solved since the start.", labels=["solver", "status"]
        )
        for labels, count in list(runner.heads_solved.items()):
            heads.add_metric(list(labels), count)
        seconds = CounterMetricFamily(
            "grace_opt_solve_seconds", "Seconds of solving since the start.", labels=["solver"]
        )
        for solver, amount in list(runner.seconds_solving.items()):
            seconds.add_metric([solver], amount)
        yield from (runs, heads, seconds)
        yield GaugeMetricFamily("grace_opt_workers", "Worker threads of the cluster.", cluster.workers)
        yield GaugeMetricFamily("grace_opt_up", "1 while runs are worked on.", float(runner.trouble is None))


def exposition(service: Service) -> tuple[bytes, str]:
    """The text of /metrics and its media type."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(service))
    return generate_latest(registry), CONTENT_TYPE_LATEST
