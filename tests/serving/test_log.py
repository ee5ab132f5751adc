"""Lines of fields, which hold neither texts nor what an exception says."""

from __future__ import annotations

import logging
import re
import shlex

import httpx

from polyvec.serving.log import Fields
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
