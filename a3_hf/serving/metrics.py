"""Prometheus's counters of a server."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The counters of one server, in a registry of their own. Tokens a pass are `a3_tokens_total` / `a3_passes_total`."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.waiting = Gauge("a3_waiting_requests", "Jobs that wait for their first pass.", **own)
        self.running = Gauge("a3_running_requests", "Requests that are not answered yet.", **own)
        self.requests = Counter("a3_requests", "Answered requests.", ["path", "status"], **own)
        self.seconds = Histogram("a3_request_seconds", "From a request's arrival to the end of its answer.", ["path"],
                                 buckets=SECONDS, **own)  # fmt: skip
        self.first_token = Histogram("a3_first_token_seconds", "From a request's arrival to its first token.",
                                     buckets=SECONDS, **own)  # fmt: skip
        self.passes = Counter("a3_passes", "Passes of the model.", **own)
        self.written = Counter("a3_tokens", "Tokens written.", **own)
        self.rows = Histogram("a3_batch_rows", "Rows of a pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128), **own)
        self.pass_seconds = Histogram("a3_pass_seconds", "Seconds of a pass.", buckets=SECONDS, **own)

    def text(self) -> bytes:
        """All counters in Prometheus's text format."""
        return generate_latest(self.registry)
