"""``python -m polyvec`` is the command, for launchers that take a module."""

from polyvec.cli import app

app(prog_name="polyvec")
