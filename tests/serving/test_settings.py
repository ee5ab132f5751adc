"""Settings by option, environment and TOML; the documentation lists each of them, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from polyvec.cli import app
from polyvec.serving import run as run_module
from polyvec.serving.run import Settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    settings: list[Settings] = []
    monkeypatch.setattr(run_module, "run", settings.append)
    return settings


def serve(*arguments: str, env: dict[str, str] | None = None) -> Any:
    return CliRunner().invoke(app, ["serve", *arguments], env=env)


def test_the_documentation_is_the_truth() -> None:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    table = re.findall(r"^\| `(--\S+)` \| `(\S+)` \| (?:`(\S+)`)? ?\| (.*?) ?\| .+ \|$", DOCUMENT.read_text(), re.M)
    documented = {option: (variable, entry, default) for option, variable, entry, default in table}
    options = {option.opts[0]: option for option in command.params if option.name != "help"}
    assert list(documented) == list(options)
    for name, option in options.items():
        variable, entry, default = documented[name]
        assert variable == f"POLYVEC_{option.name.upper()}"
        assert entry == ("" if name == "--config" else option.name)
        if option.default is not None:
            assert default == str(option.default)


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    seen: list[Settings], tmp_path: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_seconds = 2.5\nqueue_tokens = 3\ncors_origin = ["https://a.org", "https://b.org"]\n')
    assert serve("--config", str(file)).exit_code == 0
    env = {"POLYVEC_PORT": "11", "POLYVEC_MAX_SECONDS": "12", "POLYVEC_CONFIG": str(file)}
    assert serve("--port", "21", env=env).exit_code == 0
    of_file, mixed = seen
    assert (of_file.port, of_file.max_seconds, of_file.queue_tokens) == (1, 2.5, 3)
    assert list(of_file.cors_origins) == ["https://a.org", "https://b.org"] and of_file.host == "127.0.0.1"
    assert (mixed.port, mixed.max_seconds, mixed.queue_tokens) == (21, 12.0, 3)


@pytest.mark.parametrize("text", ["prot = 1", "port", "port = 'a'", "port = 70000", "port = true", "[port]"])
def test_a_bad_file_is_refused(seen: list[Settings], tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    assert serve("--config", str(file)).exit_code == 2 and not seen
    assert serve("--config", str(tmp_path / "none")).exit_code == 2


def test_key_prints_a_key_and_keeps_its_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    made = CliRunner().invoke(app, ["key", "me", str(file), "--tokens-per-minute", "5"])
    assert made.exit_code == 0 and len(made.stdout.strip()) > 30
    assert made.stdout.strip() not in file.read_text() and "tokens_per_minute = 5" in file.read_text()
    assert CliRunner().invoke(app, ["key", "me", str(file)]).exit_code == 2
