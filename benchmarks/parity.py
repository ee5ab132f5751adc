"""The encoder against transformers + PEFT at the full 24-layer, 1024-wide shape, on random weights.

    python benchmarks/parity.py

Needs about 12 GB of memory. The tiny shape is a test; this one is run by hand and its result kept beside this file.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from polyvec.model.config import ModelConfig
from polyvec.model.weights import load_encoder, save_hf
from tests.conftest import packed, random_encoder
from tests.model.test_parity import load_reference, reference_states

LENGTHS = [5, 64, 17, 128, 33, 2]


def main() -> None:
    """Print the largest absolute error of a state for the base, each task, and a batch that mixes them."""
    config = ModelConfig()
    encoder = random_encoder(config)
    for name, parameter in encoder.named_parameters():  # the deviation that the model starts training from
        if "norm" not in name:
            parameter.data.mul_(0.02 / 0.1 if ".lora_" not in name else 0.2)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_path = Path(folder) / "tokenizer.json"
        tokenizer_path.write_text("{}")
        save_hf(encoder, Path(folder) / "model", tokenizer_path)
        again = load_encoder(Path(folder) / "model")
        same = all(
            torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values(), strict=True)
        )
        del again
        reference = load_reference(Path(folder) / "model", config.tasks)
    print(f"-hf round trip bitwise: {same}")
    ids, cu_seqlens = packed(LENGTHS, config.vocab_size)
    tasks: list[str | None] = [None, *config.tasks]
    for name, chosen in [(str(task or "base"), [task] * 6) for task in tasks] + [("mixed", tasks)]:
        task_ids = torch.tensor([-1 if t is None else config.tasks.index(t) for t in chosen])
        with torch.no_grad():
            ours = encoder(ids, cu_seqlens, task_ids)
        theirs = reference_states(reference, ids, cu_seqlens, chosen)
        error, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        print(f"{name}: max abs error {error:.1e} of states to {largest:.1f}")


if __name__ == "__main__":
    main()
