"""The files in ``deploy/`` call commands that exist, with options that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from polyvec.cli import app

DEPLOY = Path(__file__).parents[1] / "deploy"
FILES = sorted(DEPLOY.iterdir())


def test_every_option_that_a_file_names_exists() -> None:
    commands: Any = typer.main.get_command(app)
    called = 0
    for path in FILES:
        # A command goes on where its line ends in a backslash, or is indented further in YAML.
        text = re.sub(r"\\\n\s*", " ", path.read_text())
        text = re.sub(r"^(\s+)(polyvec .*)\n\1(--.*)$", r"\1\2 \3", text, flags=re.MULTILINE)
        for name, rest in re.findall(r"^(?!#).*?\bpolyvec (embed|serve|train)\b(.*)$", text, flags=re.MULTILINE):
            known = {option for parameter in commands.commands[name].params for option in parameter.opts}
            given = set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest))
            assert given <= known, f"{path.name}: polyvec {name} has no {given - known}"
            called += 1
    assert called >= 4


@pytest.mark.parametrize("path", [p for p in FILES if p.suffix == ".sbatch"], ids=lambda path: path.name)
def test_a_script_is_whole(path: Path) -> None:
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert path.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    unit = tmp_path / "polyvec.service"
    text = (DEPLOY / "polyvec.service").read_text()
    unit.write_text(text.replace("/opt/polyvec/bin/polyvec", sys.executable))  # it must be there
    verified = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert verified.returncode == 0 and "polyvec.service" not in verified.stderr, verified.stderr


def test_the_cluster_of_kuberay_is_a_job_with_workers() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert "--cluster auto" in job["spec"]["entrypoint"]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {"polyvec-ray"} and "polyvec-ray" in (DEPLOY / "Containerfile.ray").read_text()
