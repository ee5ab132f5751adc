"""One model folder to another: layouts and ONNX graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from polyvec.atomic import check_new_folder
from polyvec.errors import InputError, MissingExtraError
from polyvec.inference.engines import Engine
from polyvec.model.hub import resolve_model_folder
from polyvec.model.layouts import copy_companions

try:
    from polyvec.model.weights import load_encoder, save_encoder, save_hf, save_original
except ImportError as error:
    raise MissingExtraError.of("export", "export") from error

#: Raises ``WeightsError`` for the engine of a graph that is not to be kept.
Gate = Callable[[Engine], None]
LAYOUTS = ("polyvec", "hf", "original")


def convert(
    model: str, output: Path | None, *, layout: str, onnx: str | None, gate: Callable[[Path], Gate] | None = None
) -> Iterator[str]:
    """Write ``model`` to the new folder ``output`` in ``layout``, then its graph; yield one line about each.

    Without ``output`` the graph is written beside the model's own weights, which must be in polyvec's layout. ``gate``
    makes, of the folder with the weights, a check that refuses a graph.
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if output is None and onnx is None:
        raise InputError("export needs --output or --onnx, got neither")
    if onnx is not None and layout != "polyvec":
        raise InputError(f"an ONNX graph lies beside weights in polyvec's layout, got layout {layout!r}")
    source = resolve_model_folder(model)
    if output is not None:
        check_new_folder(output)
        encoder = load_encoder(source)
        if layout == "hf":
            save_hf(encoder, output, source / "tokenizer.json")
        else:
            (save_original if layout == "original" else save_encoder)(encoder, output)
            copy_companions(source, output)
        yield f"{layout} layout in {output}"
    if onnx is not None:
        from polyvec.inference.export import export_onnx

        folder = output or source
        parity = export_onnx(folder, precision=onnx, gate=None if gate is None else gate(folder))
        yield f"{onnx} graph in {folder}: largest error {parity.max_abs_error:.1e}, cosine {parity.min_cosine:.6f}"
