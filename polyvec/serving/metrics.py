"""What the server counts, for Prometheus. No label holds anything of a text or a key."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SIZES = tuple(2**i for i in range(15))


class Metrics:
    """One registry of its own, so that two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("polyvec_requests", "Answers", ["path", "status"], registry=registry)
        self.request_seconds = Histogram("polyvec_request_seconds", "Whole requests", ["path"], registry=registry)
        self.tokens = Counter("polyvec_tokens", "Tokens embedded", ["task"], registry=registry)
        self.tokenise_seconds = Histogram("polyvec_tokenise_seconds", "Texts of a request to tokens", registry=registry)
        self.queue_tokens = Gauge("polyvec_queue_tokens", "Tokens being read, waiting or running", registry=registry)
        self.queue_seconds = Histogram("polyvec_queue_seconds", "Wait of a row", registry=registry)
        self.engine_seconds = Histogram("polyvec_engine_seconds", "Pass of a batch", registry=registry)
        self.batch_rows = Histogram("polyvec_batch_rows", "Rows of a batch", buckets=_SIZES, registry=registry)
        self.batch_tokens = Histogram("polyvec_batch_tokens", "Tokens of a batch", buckets=_SIZES, registry=registry)
        self.shared_rows = Counter(
            "polyvec_shared_rows", "Rows that were not computed again", ["how"], registry=registry
        )
        self.padding_tokens = Counter("polyvec_padding_tokens", "Tokens of padding computed", registry=registry)
        self._of_answers: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Count an answer. ``path`` is a route's, so that there are few."""
        if (path, status) not in self._of_answers:  # looking labels up takes longer than counting
            own = (self.requests.labels(path=path, status=status), self.request_seconds.labels(path=path))
            self._of_answers[path, status] = own
        number, histogram = self._of_answers[path, status]
        number.inc()
        histogram.observe(seconds)
