"""What the site takes from the source: every command with its options, and every sentence of an error.

A page asks for them by a line of its own, ``{{ commands }}`` or ``{{ error_sentences }}``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

PACKAGE = Path(__file__).parent.parent / "polyvec"

#: Exceptions whose first text is a sentence for the user. ``Problem`` has its HTTP status before it.
ERRORS = {
    "InputError", "WeightsError", "ModelTooLargeError", "MissingExtraError", "TextTooLargeError", "NotFiniteError",
    "Problem", "OverloadedError", "DeadlineError", "DrainingError",
}  # fmt: skip

_MUTE = {"join", "map", "str", "len", "sorted", "self", "type", "max", "min", "float"}  # names that say nothing


def on_page_markdown(markdown: str, **_: Any) -> str:
    """MkDocs calls this with every page."""
    for mark, make in (("{{ commands }}", command_reference), ("{{ error_sentences }}", error_reference)):
        if mark in markdown:
            markdown = markdown.replace(mark, make())
    return markdown


def error_reference() -> str:
    """Return a section for each module that raises errors, a line for each sentence."""
    sections = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if sentences := sorted(set(error_sentences(path))):
            name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            sections.append("\n".join([f"### {name}", "", *(f"* `{sentence}`" for sentence in sentences)]))
    return "\n\n".join(sections)


def error_sentences(path: Path) -> Iterator[str]:
    """Yield the sentences of the errors that a module makes; what is filled in at run time is in angle brackets."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            for argument in node.args:
                text = _text(argument)
                if any(character.islower() for character in text):
                    yield " ".join(text.split()).replace("`", "'")
                    break


def _text(node: ast.expr) -> str:
    """Return the text of a string as it is written, with the name of each value that is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.FormattedValue):
        names = [getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(node.value)]
        telling = [name.strip("_") for name in names if name and name not in _MUTE]
        return f"<{telling[0] if telling else 'value'}>"
    return ""


def command_reference() -> str:
    """Return a section for each command with its help and a table of what it takes."""
    from polyvec.cli import app

    return "\n\n".join(_command_section("polyvec", typer.main.get_command(app)))


def _command_section(name: str, command: Any) -> Iterator[str]:
    if hasattr(command, "commands"):
        for verb, child in command.commands.items():
            yield from _command_section(f"{name} {verb}", child)
        return
    rows = [_parameter_row(parameter) for parameter in command.params if parameter.name != "help"]
    yield f"## {name}\n\n{command.help}\n\n| | | default |\n|---|---|---|\n" + "\n".join(rows)


def _parameter_row(parameter: Any) -> str:
    is_argument = parameter.param_type_name == "argument"
    name = (
        (parameter.metavar or parameter.name.upper())
        if is_argument
        else ", ".join([*parameter.opts, *parameter.secondary_opts])
    )
    default = parameter.default
    shown = "" if default is None or callable(default) or str(default).endswith("UNSET") else f"`{default}`"
    variable = f" Or `{parameter.envvar}` in the environment." if parameter.envvar else ""
    explained = (parameter.help or "").replace("|", "\\|") + variable
    return f"| `{name}` | {explained} | {'required' if parameter.required else shown} |"
