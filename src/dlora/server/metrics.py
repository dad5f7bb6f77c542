"""What a server does, for the provider: Prometheus metrics, readiness, and both read again.

Only on loopback: the labels name tenants, which no tenant may see.
"""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from dlora.errors import PeerLost, UsageError
from dlora.extras import missing_extra
from dlora.protocol.address import LOOPBACK_ADDRESS
from dlora.server.tenants import Tenancy, Tenant

__all__ = ["ServerStatus", "read_status", "serve_metrics"]

_COUNTERS: dict[str, tuple[str, Callable[[Tenant], float]]] = {
    "dlora_received_bytes": ("Bytes from edges.", lambda tenant: tenant.received_bytes),
    "dlora_sent_bytes": ("Bytes to edges.", lambda tenant: tenant.sent_bytes),
    "dlora_tokens": ("Tokens of finished forward passes.", lambda tenant: tenant.tokens),
    "dlora_compute_seconds": ("Seconds with a compute slot.", lambda tenant: tenant.compute_s),
    "dlora_edge_wait_seconds": (
        "Seconds in which streams waited for their edge.",
        lambda tenant: tenant.wait_s,
    ),
    "dlora_queue_seconds": (
        "Seconds in which streams waited for a compute slot.",
        lambda tenant: tenant.queue_s,
    ),
}
_GAUGES: dict[str, tuple[str, Callable[[Tenant], float]]] = {
    "dlora_streams": ("Streams in flight.", lambda tenant: tenant.streams),
    "dlora_inflight_bytes": (
        "Activations and KV caches reserved.",
        lambda tenant: tenant.inflight_bytes,
    ),
}


@dataclass(frozen=True, kw_only=True)
class ServerStatus:
    """What metrics say at one moment."""

    state: str
    """ready, or draining."""
    queue_length: float
    """Streams that wait for a compute slot."""
    tenants: dict[str, dict[str, float]]
    """Tenant -> name of a sample -> value."""


class _Collector:
    """Reads the tenancy whenever Prometheus asks: nothing is counted twice."""

    def __init__(
        self,
        tenancy: Tenancy,
        queue_length: Callable[[], int],
        lost_log_lines: Callable[[], int],
        kept_bytes: Callable[[], dict[str, int]],
    ) -> None:
        self.tenancy, self.queue_length = tenancy, queue_length
        self.lost_log_lines, self.kept_bytes = lost_log_lines, kept_bytes

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        tenants = list(self.tenancy.tenants.values())

        for families, kind in ((_COUNTERS, CounterMetricFamily), (_GAUGES, GaugeMetricFamily)):
            for name, (text, value) in families.items():
                family = kind(name, text, labels=["tenant"])
                for tenant in tenants:
                    family.add_metric([tenant.name], value(tenant))
                yield family

        for name, text, label in (
            ("dlora_finished_streams", "Streams that ended, by status.", "status"),
            ("dlora_refusals", "Refusals, by reason.", "reason"),
        ):
            family = CounterMetricFamily(name, text, labels=["tenant", label])
            for tenant in tenants:
                counts = tenant.finished if label == "status" else tenant.refused
                for key, count in list(counts.items()):
                    family.add_metric([tenant.name, key], count)
            yield family

        kept = GaugeMetricFamily(
            "dlora_kept_bytes", "Modules and prefixes kept for later.", labels=["tenant"]
        )
        for owner, size in self.kept_bytes().items():
            kept.add_metric([owner], size)
        yield kept
        yield GaugeMetricFamily(
            "dlora_queue_length", "Streams that wait for a slot.", value=self.queue_length()
        )
        yield CounterMetricFamily(
            "dlora_failed_logins", "Calls of nobody known.", value=self.tenancy.failed_logins
        )
        yield CounterMetricFamily(
            "dlora_lost_log_lines",
            "Lines of the access log that could not be written.",
            value=self.lost_log_lines(),
        )


class _Threads(ThreadingMixIn, WSGIServer):
    """A thread for each connection: one that says nothing keeps nobody from the others."""

    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    """The standard handler without its line on stderr for every request."""

    timeout = 10.0
    """Seconds that a connection may say nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing."""


@contextmanager
def serve_metrics(server: Any, port: int) -> Iterator[int]:
    """/metrics, /healthz and /readyz of a `Server`, on loopback; yields the port.

    healthz: the process lives. readyz: it takes new streams. Raises UsageError if prometheus_client
    is not installed or the port is taken.
    """
    try:
        from prometheus_client import CollectorRegistry, make_wsgi_app
    except ImportError as error:
        raise missing_extra("server", "metrics_port") from error

    registry = CollectorRegistry()
    registry.register(
        _Collector(
            server.tenancy,
            lambda: server.queue_length,
            lambda: server.lost_log_lines,
            lambda: server.kept_bytes,
        )
    )
    metrics = make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            page: Iterable[bytes] = metrics(environ, start_response)
            return page

        status = "404 Not Found"
        if path == "/healthz" or (path == "/readyz" and server.is_ready):
            status = "200 OK"
        elif path == "/readyz":
            status = "503 Service Unavailable"
        start_response(status, [("Content-Type", "text/plain")])
        return [f"{status[4:].lower()}\n".encode()]

    try:
        httpd = make_server(LOOPBACK_ADDRESS, port, app, _Threads, _Quiet)
    except OSError as error:
        raise UsageError(f"metrics_port {port}: {error.strerror}") from error
    thread = threading.Thread(target=httpd.serve_forever, name="dlora-metrics", daemon=True)
    thread.start()
    try:
        yield httpd.server_port
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def read_status(port: int) -> ServerStatus:
    """What the metrics of a server on this machine say.

    Raises PeerLost if there is none, UsageError if prometheus_client is not installed.
    """
    text, state = _fetch(port)
    tenants, queue_length = _by_tenant(text)
    return ServerStatus(state=state, queue_length=queue_length, tenants=tenants)


def _fetch(port: int) -> tuple[str, str]:
    """(metrics, "ready" or "draining") of a server on this machine. Raises PeerLost."""
    text, address = "", f"{LOOPBACK_ADDRESS}:{port}"
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        with urllib.request.urlopen(f"http://{address}/readyz", timeout=5):
            return text, "ready"
    except urllib.error.HTTPError:
        return text, "draining"
    except OSError as error:
        raise PeerLost(
            f"no metrics at {address} ({error}): is `dlora serve --metrics_port {port}` running?"
        ) from error


def _by_tenant(text: str) -> tuple[dict[str, dict[str, float]], float]:
    """(tenant -> name of a sample -> value, length of the queue), from Prometheus' text form."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise missing_extra("server", "`dlora status`") from error

    tenants: dict[str, dict[str, float]] = {}
    queue_length = 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            tenant = sample.labels.get("tenant")
            if sample.name == "dlora_queue_length":
                queue_length = sample.value
            elif tenant is not None and not sample.name.endswith("_created"):
                # Samples with one more label, such as refusals by reason, are summed.
                values = tenants.setdefault(tenant, {})
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return tenants, queue_length
