"""Save and load encoders; every foreign tensor name lives here, and weights load whole or not at all."""
from __future__ import annotations
import json, os
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
from polyvec.model.config import ModelConfig
from polyvec.model.encoder import Encoder
def save_encoder(encoder, folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"config.json").write_text(json.dumps(encoder.config.to_dict(), indent=2))
    save_file(encoder.state_dict(), folder/"tmp"); os.replace(folder/"tmp", folder/"model.safetensors")
def load_encoder(folder):
    e=Encoder(ModelConfig.from_dict(json.loads((folder/"config.json").read_text()))); e.load_state_dict(load_file(folder/"model.safetensors")); return e
