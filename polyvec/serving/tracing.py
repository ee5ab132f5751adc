"""OpenTelemetry spans, where the environment asks for them. No span holds anything of a text or a key.

A request is a span with ``tokenise`` and ``vectors`` inside it; a ``batch`` is a trace of its own, linked to the
requests whose rows it computes, for it belongs to many. The variables are OpenTelemetry's own: an endpoint switches it
on, ``OTEL_SERVICE_NAME``, ``OTEL_TRACES_SAMPLER`` and the rest hold too.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from polyvec import __version__
from polyvec.errors import MissingExtraError

_log = logging.getLogger(__name__)
_LAST_SECONDS = 2.0  # for the last spans, once all requests are answered: no server stays for a collector that is away
_NOTHING = contextlib.nullcontext()
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


class Tracing:
    """Spans of one server; without an endpoint in the environment none, at no cost. ``close`` sends the last ones, or
    says that they are lost."""

    def __init__(self) -> None:
        self._tracer: Any = None
        named = [name for name in _ENDPOINTS if os.environ.get(name)]
        if not named or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
            return
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingExtraError.of(f"{named[0]} in the environment", "otel") from error
        os.environ.setdefault("OTEL_SERVICE_NAME", "polyvec")
        resource = Resource.create({"service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait without end
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("polyvec", __version__)
        self._trace, self._propagator = trace, TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """A span of a request, within the caller's trace if it names one; the dictionary takes its attributes.

        ``http.route`` becomes part of its name.
        """
        if self._tracer is None:
            yield {}
            return
        context = self._propagator.extract(dict(headers))
        with self._span(method, context=context, kind=self._trace.SpanKind.SERVER) as span:
            attributes: dict[str, Any] = {"http.request.method": method}
            try:
                yield attributes
            finally:
                span.set_attributes(attributes)
                span.update_name(f"{method} {attributes.get('http.route', '')}".rstrip())
                if attributes.get("http.response.status_code", 500) >= 500:
                    span.set_status(self._trace.StatusCode.ERROR)

    def span(self, name: str, **attributes: Any) -> AbstractContextManager[Any]:
        """A span inside the current one."""
        return _NOTHING if self._tracer is None else self._span(name, attributes=attributes)

    def link(self) -> Any:
        """Return what links a batch to the current span, None without one."""
        return None if self._tracer is None else self._trace.Link(self._trace.get_current_span().get_span_context())

    def batch(self, links: Sequence[Any], **attributes: Any) -> AbstractContextManager[Any]:
        """A span of a trace of its own, linked to those of the requests in it."""
        if self._tracer is None:
            return _NOTHING
        own = {id(link): link for link in links if link is not None}.values()
        root = self._trace.set_span_in_context(self._trace.INVALID_SPAN)
        return self._span("batch", context=root, links=list(own), attributes=attributes)

    @contextlib.contextmanager
    def _span(self, name: str, **options: Any) -> Iterator[Any]:
        """The current span. An exception says that it failed and no more, for the message may quote a text."""
        with self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False, **options
        ) as span:
            try:
                yield span
            except Exception:
                span.set_status(self._trace.StatusCode.ERROR)
                raise

    def close(self) -> None:
        if self._tracer is None:
            return
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_SECONDS)
        if sending.is_alive():
            _log.warning(
                "the collector must take the last spans within %g s, got no answer; they are lost", _LAST_SECONDS
            )
