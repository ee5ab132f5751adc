"""polyvec's export in sentence-transformers: a task's prompt by its name, its adapter by PEFT."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from peft import PeftModel
from sentence_transformers import SentenceTransformer


class TaskModel:
    """A folder that ``polyvec export MODEL -o FOLDER --layout hf`` wrote."""

    def __init__(self, folder: Path) -> None:
        self.model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        tasks = [task for task in self.model.prompts if (folder / _adapter(task)).is_dir()]
        base = self.model[0].auto_model
        self.adapters = PeftModel.from_pretrained(
            base, str(folder / _adapter(tasks[0])), adapter_name=_adapter(tasks[0])
        )
        for task in tasks[1:]:
            self.adapters.load_adapter(str(folder / _adapter(task)), adapter_name=_adapter(task))

    def encode(self, texts: list[str], task: str) -> np.ndarray:
        self.adapters.set_adapter(_adapter(task))  # inside the model: PEFT puts its layers in place of the base's
        return self.model.encode(texts, prompt_name=task)


def _adapter(task: str) -> str:
    return task.replace(".", "_").replace("-", "_")  # PEFT's names may hold no dot


def main(texts: list[str], question: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        export = ["polyvec", "export", "polyvec-mini", "-o", f"{folder}/hf", "--layout", "hf"]
        subprocess.run([sys.executable, "-m", *export], check=True)
        model = TaskModel(Path(folder) / "hf")
    scores = model.encode(texts, "retrieval.passage") @ model.encode([question], "retrieval.query")[0]
    return texts[int(scores.argmax())]


if __name__ == "__main__":
    print(main(["The train is late.", "A cat sleeps on the chair."], "Wo schläft die Katze?"))
