"""A model's name to a folder: the one in the package, a local one, or one fetched from the Hugging Face hub."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from polyvec.errors import WeightsError

#: The model inside the package.
MINI = "polyvec-mini"

#: What a model needs; never code, pickles or other engines' files.
_PATTERNS = ["*.json", "model*.safetensors", "*/adapter_config.json", "*/adapter_model.safetensors"]


def resolve_model_folder(model: str | Path | None) -> Path:
    """Return the folder of ``model``: None or ``polyvec-mini``, a path, or a hub name such as ``org/name``.

    A hub model is fetched once and then read from the Hugging Face cache. Raises ``WeightsError`` if there is none.
    """
    if model is None or model == MINI:
        return Path(str(files("polyvec") / "weights" / "mini"))
    if not isinstance(model, (str, Path)) or not str(model):
        raise WeightsError(f"model must be '{MINI}', a folder or a hub name org/name, got {model!r}; name one")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if isinstance(model, Path) or str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise WeightsError(f"model must be '{MINI}', a folder or a hub name org/name, got {str(model)!r}, not a folder")
    # Here, because it costs a quarter of a second that a folder does not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"model must be a folder or can be fetched from the hub, got {model!r}: {reason}; "
            "fetch it on a machine with network and pass the folder"
        ) from error
