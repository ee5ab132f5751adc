"""Lines of fields, which hold neither texts nor what an exception says."""

from __future__ import annotations

import io
import logging
import re
import shlex
import time

import httpx

from polyvec.serving.log import Fields, Lines
from tests.serving.process import start, stop

SECRET = "a sentence that nobody else may read"


def fields_of(line: str) -> dict[str, str]:
    return dict(field.split("=", 1) for field in shlex.split(line))


def test_a_request_is_a_line_of_fields() -> None:
    process, address = start()
    try:
        headers = {"x-request-id": "mine", "authorization": "Bearer of-a-secret"}
        body = {"model": "polyvec-mini", "input": SECRET}
        assert httpx.post(f"{address}/v1/embeddings", json=body, headers=headers).status_code == 200
        assert httpx.get(f"{address}/{SECRET.split()[1]}").status_code == 404
    finally:
        log = stop(process)
    lines = [fields_of(line) for line in log.splitlines() if line.startswith("time=")]
    (own,) = [line for line in lines if line.get("request") == "mine"]
    assert (own["level"], own["method"], own["route"], own["status"]) == ("info", "POST", "/v1/embeddings", "200")
    assert float(own["ms"]) > 0 and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", own["time"])
    (other,) = [line for line in lines if line.get("status") == "404"]
    assert other["route"] == "other"
    assert "sentence" not in log and "of-a-secret" not in log


def test_an_exception_is_its_type_alone() -> None:
    try:
        raise ValueError(SECRET)
    except ValueError as error:
        found = (ValueError, error, error.__traceback__)
    line = Fields().format(logging.LogRecord("x", logging.ERROR, "", 0, "worker %d\nended", (5,), found))
    assert "sentence" not in line and "\n" not in line
    assert fields_of(line) | {"time": ""} == {
        "time": "", "level": "error", "message": "worker 5\\nended", "error": "ValueError"
    }  # fmt: skip


def record(level: int, message: str) -> logging.LogRecord:
    return logging.LogRecord("x", level, "", 0, message, (), None)


def test_lines_come_in_order_soon_and_with_a_warning_at_once() -> None:
    stream = io.StringIO()
    lines = Lines(stream)
    lines.handle(record(logging.INFO, "first"))
    lines.handle(record(logging.WARNING, "second"))
    began = time.monotonic()
    while "second" not in stream.getvalue():
        assert time.monotonic() < began + 10
    lines.handle(record(logging.INFO, "third"))
    while "third" not in stream.getvalue():
        assert time.monotonic() < began + 20
    assert [fields_of(line)["message"] for line in stream.getvalue().splitlines()] == ["first", "second", "third"]
    lines.handle(logging.LogRecord("x", logging.INFO, "", 0, "no %d", ("number",), None))
    lines.handle(record(logging.INFO, "last"))
    lines.flush()
    assert stream.getvalue().endswith("message=last\n")


def test_a_log_that_nobody_reads_holds_up_nobody_and_stays_small() -> None:
    class Stuck(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.2)
            return super().write(text)

    stream = Stuck()
    lines = Lines(stream, most=10)
    lines.handle(record(logging.WARNING, "first"))
    began = time.monotonic()
    for i in range(1000):
        lines.handle(record(logging.WARNING, f"line {i}"))
    assert time.monotonic() - began < 10  # a thousand waits would be 200 s
    lines.flush()
    written = stream.getvalue().splitlines()
    assert len(written) < 900 and written[-1].endswith('message="line 999"')
