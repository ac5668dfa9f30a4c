"""Write a directory that stands on its own: weights, eviction setting, tokenizer, card and decoding code."""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig

from vkvtrain.adapters import ADAPTER_WEIGHTS, check_fits, read_adapter
from vkvtrain.config import CONFIG_NAME
from vkvtrain.ends import saved_ends, stop_at
from vkvtrain.loading import load_weights, read_config
from vkvtrain.publishing.card import model_card
from vkvtrain.publishing.measured import Evaluation
from vkvtrain.publishing.probe import check_written, logits, probe
from vkvtrain.publishing.run import FinishedRun
from vkvtrain.training.run_directory import GENERATION

_CODE = Path(__file__).parent / "custom_generate"
_LIBRARIES = ("python", "vkvtrain", "torch", "transformers", "peft", "accelerate")
_SETTINGS = re.compile(r"^EVICTION: dict\[str, Any\] = .*\nEND_TOKENS: list\[int\] = .*$", re.MULTILINE)


def export(
    run: FinishedRun, evaluation: Evaluation | None, directory: Path, name: str, *, merge: bool, overwrite: bool
) -> str:
    """Write what is published; the directory appears when it is complete and was compared with what was trained.

    Args:
        run: what is published.
        evaluation: what was measured of it, or None.
        directory: where to.
        name: what the card calls it, `user/repository` or the directory's name.
        merge: write whole weights, the adapter merged into them, instead of the adapter.
        overwrite: replace an earlier publication there.

    Returns:
        How far the written model is from the trained one, in words.

    Raises:
        ValueError: a directory that is taken or cannot be written, an adapter that does not fit its base model, a base
            model that cannot be merged into, a written model that is not the trained one, or a file that would tell a
            path of this machine.
    """
    check_directory(directory, overwrite)
    base = read_config(run.base.source, "base model", run.base.revision)
    if merge:
        check_mergeable(run, base)
    check_fits(read_adapter(run.directory, "adapter"), base, "adapter")
    with _beside(directory) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        compared = _write_model(run, new, merge)
        run.eviction.save_pretrained(new)
        AutoTokenizer.from_pretrained(run.directory).save_pretrained(new)
        _write_code(run, new / _CODE.name)
        model_card(run, evaluation, name, _versions(run), merge).save(new / "README.md")
        refuse_paths(new, run)
        if directory.exists():
            directory.rename(Path(scratch) / "old")
        new.rename(directory)
    return compared


def _beside(directory: Path) -> tempfile.TemporaryDirectory[str]:
    """A scratch directory on the same disk; raises ValueError where none can be made."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-")
    except OSError as error:
        raise ValueError(
            f"--to {str(directory)!r} cannot be written ({error.strerror}): choose another directory"
        ) from None


def check_directory(directory: Path, overwrite: bool) -> None:
    """Raise ValueError where something is that must not be replaced."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        raise ValueError(f"--to {str(directory)!r} is a file: choose another directory")
    if not (directory / CONFIG_NAME).is_file() or not (directory / _CODE.name).is_dir():
        raise ValueError(f"--to {str(directory)!r} holds something else: choose another directory")
    if not overwrite:
        raise ValueError(f"--to {str(directory)!r} holds a publication: choose another directory, or pass --overwrite")


def check_mergeable(run: FinishedRun, config: Any) -> None:
    """Raise ValueError for a base model whose weights cannot take an adapter without loss."""
    base, source = run.base, Path(run.base.source)
    if source.is_dir() and any(source.glob("*.gguf")) and not any(source.glob("*.safetensors")):
        raise ValueError(
            f"--merge needs a base model in safetensors, and {base.source!r} holds GGUF: convert it first, or publish "
            "the adapter alone"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"--merge needs a base model that is not quantized, and {base.name or base.source!r} is: publish the "
            "adapter alone, or train on the unquantized model"
        )


def _write_model(run: FinishedRun, directory: Path, merge: bool) -> str:
    """Write the adapter or merged weights, load them again, and compare them with what was trained, in words."""
    adapted = _adapted(run, run.directory)
    trained = probe(adapted)
    if merge:
        whole = merged(adapted)
        stop_at(whole.generation_config, saved_ends(str(run.directory)))
        plain = read_config(run.base.source, "base model", run.base.revision)  # its RoPE as others know it
        plain.tie_word_embeddings = whole.config.tie_word_embeddings
        whole.config = plain
        whole.save_pretrained(directory)
    else:
        _write_adapter(run, directory)
    del adapted  # two models need not fit at once
    return check_written(trained, _written_logits(run, directory, merge))


def _written_logits(run: FinishedRun, directory: Path, merge: bool) -> Tensor:
    if merge:
        return logits(load_weights(str(directory), "--merge", dtype="auto", device_map=_device_map()).eval())
    return logits(_adapted(run, directory))


def _adapted(run: FinishedRun, adapter: Path) -> Any:
    """The base model as it was trained on, with an adapter, in evaluation mode."""
    dtype = run.recipe["model"].get("dtype", "auto")
    model = load_weights(
        run.base.source, "base model", revision=run.base.revision, dtype=dtype, device_map=_device_map()
    )
    return PeftModel.from_pretrained(model, adapter).eval()


def _device_map() -> dict[str, Any]:
    return {"": torch.device("cuda" if torch.cuda.is_available() else "cpu")}


def merged(adapted: Any) -> Any:
    """The base model with the adapter in its weights.

    Where the adapter changes one of two tied layers, the output layer gets weights of its own before: merged into a
    shared tensor, a change of one would change the other too.
    """
    base = adapted.get_base_model()
    ends = base.get_input_embeddings(), base.get_output_embeddings()
    first, last = (_module_below(one) for one in ends)
    if last.weight is first.weight and any(isinstance(one, BaseTunerLayer) for one in ends):
        last.weight = nn.Parameter(last.weight.detach().clone(), requires_grad=False)
    whole = adapted.merge_and_unload(safe_merge=True)
    if whole.get_output_embeddings().weight is not whole.get_input_embeddings().weight:
        whole.config.tie_word_embeddings = False
    return whole


def _module_below(module: Any) -> Any:
    """The layer of the base model that an adapter's layer wraps, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _write_adapter(run: FinishedRun, directory: Path) -> None:
    """The adapter, unchanged but for the name of its base model."""
    shutil.copyfile(run.directory / ADAPTER_WEIGHTS, directory / ADAPTER_WEIGHTS)
    settings: Any = PeftConfig.from_pretrained(str(run.directory))
    settings.base_model_name_or_path, settings.revision = run.base.name, run.base.revision
    settings.save_pretrained(directory)
    for source, revision in ((str(run.directory), None), (run.base.source, run.base.revision)):
        try:  # runs of earlier versions have none, some base models neither
            generation = GenerationConfig.from_pretrained(source, revision=revision or "main")
        except OSError:
            continue
        generation.to_json_file(directory / GENERATION)
        return


def _write_code(run: FinishedRun, directory: Path) -> None:
    """`custom_generate/`, its code with the run's eviction setting and end tokens in the place of the defaults."""
    shutil.copytree(_CODE, directory, ignore=shutil.ignore_patterns("__pycache__"))
    path = directory / "generate.py"
    settings = (
        f"EVICTION: dict[str, Any] = {run.eviction.model_dump(mode='python')!r}\n"
        f"END_TOKENS: list[int] = {saved_ends(str(directory.parent))}"
    )
    text, replaced = _SETTINGS.subn(lambda _: settings, path.read_text())
    assert replaced == 1, "generate.py has lost its settings"
    path.write_text(text)


def _versions(run: FinishedRun) -> Mapping[str, str]:
    path = run.directory / "environment.json"
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): restore it, or remove it") from None
    return {name: str(found[name]) for name in _LIBRARIES if name in found}


def refuse_paths(directory: Path, run: FinishedRun) -> None:
    """Raise ValueError if a text file tells where on this machine the run or its base model was."""
    private = {str(run.directory.resolve()), str(Path.home()) + "/"}
    if Path(run.base.source).is_dir():
        private |= {run.base.source, str(Path(run.base.source).resolve())}
    private -= {"//", "/"}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.suffix != ".safetensors":
            text = path.read_text(encoding="utf-8", errors="replace")
            told = next((secret for secret in sorted(private) if secret in text), None)
            if told is not None:
                raise ValueError(f"{path.name} would publish the path {told!r}: remove it from the run and try again")
