"""Small random models and a small tokenizer: nothing is downloaded, and every adapter does something."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from polyvec import Embedder
from polyvec.inference.export import export_onnx
from polyvec.model.config import ModelConfig, tiny
from polyvec.model.encoder import Encoder
from polyvec.model.weights import save_encoder
from polyvec.samples import corpus
from polyvec.text.tokenizer import Tokenizer
from polyvec.training.vocabulary import train_unigram


def random_encoder(config: ModelConfig | None = None, *, seed: int = 0) -> Encoder:
    """Return an encoder whose every weight, the adapters' zero factors included, is random."""
    torch.manual_seed(seed)
    encoder = Encoder(config or tiny())
    for name, parameter in encoder.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter.data, mean=1.0, std=0.1)
        elif "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
        else:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return encoder.eval()


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What polyvec remembers of this machine goes here, of the commands that tests run too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("HF_DATASETS_CACHE", str(folder / "datasets"))
        with suppress(ImportError):  # where only tests/gpu run
            import datasets

            patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="session")
def encoder() -> Encoder:
    return random_encoder()


@pytest.fixture(scope="session")
def model_folder(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole tiny model in our layout, both graphs included, with a real tokenizer over the sample corpus."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_encoder(encoder, folder)
    langs = ("en", "de", "fr", "es", "it", "pt", "nl", "pl", "cs", "sv", "fi", "hu", "ro", "ru", "uk", "zh-CN")
    texts = [row["text"] for row in corpus() if row["lang"] in langs]
    tokenizer = train_unigram(texts * 2, vocab_size=encoder.config.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    for precision in ("fp32", "int8"):
        export_onnx(folder, precision=precision)
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(model_folder / "tokenizer.json", vocab_size=512, bos_token_id=0, eos_token_id=2)


@pytest.fixture(scope="session")
def embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder, engine="onnx")


@pytest.fixture(scope="session")
def torch_embedder(model_folder: Path) -> Embedder:
    return Embedder(model_folder, engine="torch", device="cpu")


@pytest.fixture(scope="session")
def mini(cache_folder: Path) -> Embedder:
    """polyvec-mini, the model in the package, on the engine that is fastest here."""
    return Embedder()


def free_port() -> int:
    """Return a port of this machine where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def packed(lengths: list[int], vocab_size: int = 512, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N,) random ids between ``<s>`` and ``</s>`` and (B+1,) offsets for texts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        row = torch.randint(4, vocab_size - 1, (length,), generator=generator)
        row[0], row[-1] = 0, 2
        rows.append(row)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.cat(rows), cu_seqlens
