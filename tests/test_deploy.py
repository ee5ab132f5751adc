"""The files in ``deploy/`` call commands that exist, with options that exist."""

from __future__ import annotations

import re
import subprocess
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


def test_the_cluster_of_kuberay_is_a_job_with_workers() -> None:
    job = yaml.safe_load((DEPLOY / "kuberay.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert "--cluster auto" in job["spec"]["entrypoint"]
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for group in groups for container in group["template"]["spec"]["containers"]}
    assert images == {"polyvec-ray"} and "polyvec-ray" in (DEPLOY / "Containerfile.ray").read_text()
