"""API keys: hashes in a file that is read again, limits per key, and what the file must not be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from polyvec import Embedder
from polyvec.errors import InputError
from polyvec.serving import keys as keys_module
from polyvec.serving.app import make_app
from polyvec.serving.keys import Bucket, Keys, add_key
from polyvec.serving.service import Service


@pytest.fixture(autouse=True)
def look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_module, "_RELOAD_SECONDS", 0.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def ask(embedder: Embedder, file: Path) -> Iterator[TestClient]:
    add_key("first", file, {})
    with TestClient(make_app(Service(embedder, queue_tokens=5000), keys=Keys(file))) as client:
        yield client


def test_keys_are_asked_for(ask: TestClient, file: Path) -> None:
    key = add_key("second", file, {})
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    assert ask.get("/health").status_code == 200
    assert ask.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
    assert ask.get("/v1/models", headers=bearer(key[:-1])).status_code == 401
    assert ask.get("/").status_code == 200  # the page; what embeds has its path too
    assert ask.post("/", json={"inputs": "a"}).status_code == 401
    assert ask.get("/v1/models", headers=bearer(key)).status_code == 200


def test_a_key_that_is_removed_stops_working_and_a_broken_file_changes_nothing(ask: TestClient, file: Path) -> None:
    before = file.read_text()
    key = add_key("second", file, {})
    file.write_text("[second")
    assert ask.get("/v1/models", headers=bearer(key)).status_code == 401  # not read yet when the file broke
    file.write_text(before)
    os.utime(file, ns=(1, 1))
    again = add_key("third", file, {})
    assert ask.get("/v1/models", headers=bearer(again)).status_code == 200
    for broken in (b"[third", b"# caf\xe9"):
        file.write_bytes(broken)
        assert ask.get("/v1/models", headers=bearer(again)).status_code == 200
    file.unlink()
    assert ask.get("/v1/models", headers=bearer(again)).status_code == 200
    file.write_text(before)
    assert ask.get("/v1/models", headers=bearer(again)).status_code == 401


def test_limits_hold_for_a_key_and_survive_a_reload(ask: TestClient, file: Path, embedder: Embedder) -> None:
    few = add_key("few", file, {"requests_per_minute": 2})
    small = add_key("small", file, {"tokens_per_minute": 5})
    body = {"model": embedder.model_name, "input": ["some words of a text"] * 4}
    statuses = [ask.get("/v1/models", headers=bearer(few)).status_code for _ in range(2)]
    add_key("other", file, {})
    refused = ask.get("/v1/models", headers=bearer(few))
    assert statuses == [200, 200] and refused.status_code == 429 and int(refused.headers["retry-after"]) == 30
    assert "requests_per_minute of this key must be at most 2" in refused.json()["detail"]
    first = ask.post("/v1/embeddings", json=body, headers=bearer(small))
    second = ask.post("/v1/embeddings", json=body, headers=bearer(small))
    assert (first.status_code, second.status_code) == (200, 429)  # a full bucket lends
    assert int(second.headers["retry-after"]) > 60


def test_a_refused_request_costs_no_tokens(ask: TestClient, file: Path, embedder: Embedder) -> None:
    key = add_key("own", file, {"tokens_per_minute": 10})
    body = {"model": embedder.model_name, "input": ["some words of a text " * 20] * 50}
    refused = ask.post("/v1/embeddings", json=body, headers=bearer(key))
    assert refused.status_code == 400 and "at most 5000 tokens" in refused.json()["detail"]
    assert ask.post("/v1/embeddings", json={**body, "input": "a"}, headers=bearer(key)).status_code == 200


def test_a_bucket_refills_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(keys_module.time, "monotonic", lambda: now)
    bucket = Bucket(60)
    assert bucket.spend(90) == 0.0 and bucket.spend(1) == pytest.approx(31)
    now = 29.0
    assert bucket.spend(1) == pytest.approx(2)
    now = 31.0
    assert bucket.spend(1) == 0.0
    now = 1000.0
    assert bucket.spend(60) == 0.0 and bucket.spend(1) > 0  # never more than a minute's worth


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("", "must hold a key"),
        ("secret", "it is not TOML"),
        ("# caf\xe9", "it is not TOML"),
        ("[a]", "sha256"),
        ("a = 1", "sha256"),
        (f"[a]\nsha256 = '{'0' * 64}'\nrpm = 3", "requests_per_minute"),
        (f"[a]\nsha256 = '{'0' * 64}'\nrequests_per_minute = 0", "above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\ntokens_per_minute = true", "above 0"),
        (f"[a]\nsha256 = '{'0' * 64}'\ntokens_per_minute = nan", "above 0"),
    ],
)
def test_a_bad_file_is_refused(file: Path, text: str, rule: str) -> None:
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=rule):
        Keys(file)


def test_a_new_key_leaves_the_file_to_those_who_read_it(file: Path) -> None:
    file.unlink(missing_ok=True)
    add_key("a", file, {"tokens_per_minute": 1_234_567.0, "requests_per_minute": 0.5})
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o640)
    add_key("b", file, {})
    assert file.stat().st_mode & 0o777 == 0o640
    assert "tokens_per_minute = 1234567\n" in file.read_text() and "requests_per_minute = 0.5\n" in file.read_text()


def test_names_are_new_and_plain(file: Path) -> None:
    add_key("a", file, {})
    for name in ("a", "", "a b", "a]"):
        with pytest.raises(InputError, match="name must be"):
            add_key(name, file, {})
