"""What the files of a model or an adapter are, so that other ones under the same name are noticed.

Knows files; knows nothing of what is done with them.
"""

import hashlib
from pathlib import Path

import transformers
from tqdm import tqdm

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_DECISIVE = (
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py", "*.bin", "*.gguf",
)  # fmt: skip
"""Weights, configuration, tokenizer, chat template, and code that comes with a model."""


def decisive_files(directory: Path) -> list[Path]:
    """The files of a model's directory that decide what it computes."""
    return sorted({file for kind in _DECISIVE for file in directory.glob(kind)})


def hash_of(files: list[Path], directory: Path) -> str:
    """Hash of the names and contents of files, large ones with a progress bar."""
    total = hashlib.blake2b()
    size = sum(file.stat().st_size for file in files)
    with tqdm(total=size, unit="B", unit_scale=True, desc=f"hashing {directory}", disable=size < 2**30) as bar:
        for file in files:
            total.update(f"{file.name} {file.stat().st_size}\n".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(2**24):
                    total.update(chunk)
                    bar.update(len(chunk))
    return total.hexdigest()[:16]


def adapter_hash(directory: Path) -> str:
    """Hash of an adapter's configuration and weights."""
    return hash_of([directory / part for part in ADAPTER], directory)


def stamp_of(files: list[Path]) -> str:
    """Hash of the names, sizes and times of change of files: a moment's look at whether they are the same as before."""
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(states).encode(), digest_size=8).hexdigest()


def model_identity(name: str, config: transformers.PretrainedConfig, revision: str | None) -> str:
    """Hash of the files of a model's directory, or name and commit of a model on the Hub.

    Args:
        name: directory or Hub name.
        config: as loaded from there; it knows the commit.
        revision: what was asked for, where the configuration does not know it.
    """
    directory = Path(name)
    if directory.is_dir():
        return hash_of(decisive_files(directory), directory)
    return f"{name}@{commit_of(config) or revision}"


def commit_of(config: transformers.PretrainedConfig) -> str | None:
    """The commit on the Hub that a configuration was loaded from; None for a directory."""
    return getattr(config, "_commit_hash", None)
