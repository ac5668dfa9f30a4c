"""Load what training or `vkvtrain publish` wrote: model, tokenizer and eviction setting, ready to generate."""

import logging
import os
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

from vkvtrain.adapters import check_fits, read_adapter
from vkvtrain.config import EvictionConfig
from vkvtrain.ends import end_tokens, saved_ends, stop_at
from vkvtrain.rope import fixed_rope
from vkvtrain.support import ATTENTION, layer_kinds
from vkvtrain.tiny import embedded

logger = logging.getLogger(__name__)


class Loaded(NamedTuple):
    """What `load` returns."""

    model: Any
    tokenizer: Any
    eviction: EvictionConfig


def load(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> Loaded:
    """A model in evaluation mode, its tokenizer, and the eviction setting that it was trained for.

    The model decodes with `model.generate(..., past_key_values=EvictionCache(eviction, model.config))`; without that
    cache it is the plain model. Either way it stops where training taught it to. Adapters stay adapters (a
    `PeftModel`), so that `disable_adapter()` gives the base.

    Args:
        name_or_path: a directory or Hub repository with `eviction_config.json` and either an adapter or whole weights.
        revision: branch, tag or commit of the repository; an adapter names its base model's own.
        dtype: type of the weights; "auto" is the one they are stored in.
        device: where to; by default a GPU if there is one.

    Raises:
        ValueError: what cannot be loaded, and why. Only safetensors are read; no remote code is run.
    """
    name = os.fspath(name_or_path)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        eviction = EvictionConfig.from_pretrained(name, revision)
        adapter = find_adapter_config_file(name, revision=revision)
    except (OSError, HFValidationError) as error:
        raise ValueError(f"{name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    tokenizer = load_tokenizer(name, "tokenizer", revision)
    model = (_adapted if adapter else _whole)(name, revision, dtype, place)
    layer_kinds(model.config, eviction)
    stop_at(model.generation_config, saved_ends(name, revision))  # an adapter's are not its base model's
    stop_at(model.generation_config, end_tokens(tokenizer, model.generation_config))
    return Loaded(model.eval(), tokenizer, eviction)


def _whole(name: str, revision: str | None, dtype: Any, place: torch.device) -> Any:
    # quantized weights cannot be moved afterwards
    return load_weights(name, "model", revision=revision, dtype=dtype, device_map={"": place})


def load_config(name: str, revision: str | None = None, **arguments: Any) -> Any:
    """The configuration that commands load a model with: its rotary frequencies are one set for all sequences.

    Args:
        name: directory or Hub name of the model.
        revision: branch, tag or commit.
        arguments: further ones of `AutoConfig.from_pretrained`.
    """
    own = AutoConfig.from_pretrained(name, revision=revision or "main", **arguments)
    fixed = fixed_rope(own)
    if fixed is not own:
        longest = fixed.get_text_config(decoder=True).max_position_embeddings
        logger.warning(
            "%s: its rotary frequencies depend on the length; those for %d tokens are used for all sequences",
            name,
            longest,
        )
    return fixed


def _adapted(name: str, revision: str | None, dtype: Any, place: torch.device) -> Any:
    """The base model with the adapter; `from_pretrained` alone would look for the base under the adapter's revision."""
    adapter = read_adapter(name, "adapter", revision)
    base = embedded(adapter.config.base_model_name_or_path or "")
    if not base:
        raise ValueError(f"{name!r}: adapter_config.json names no base model (base_model_name_or_path)")
    check_fits(adapter, read_config(base, "base model", adapter.config.revision), "adapter")
    return PeftModel.from_pretrained(_whole(base, adapter.config.revision, dtype, place), name, revision=revision)


def read_config(name: str, where: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The transformers configuration of a model; raises ValueError, one sentence, where there is none.

    Args:
        name: directory or Hub name.
        where: the setting that names it, for the error.
        revision: branch, tag or commit on the Hub.
        trust_remote_code: whether the model's own code may run.
    """
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{where} {name!r} cannot be loaded: {' '.join(str(error).split())}") from None


def load_tokenizer(name: str, where: str, revision: str | None = None) -> Any:
    """The tokenizer of a model; raises ValueError, one sentence, where there is none or its files are damaged.

    Args:
        name: directory or Hub name.
        where: the setting that names it, for the error.
        revision: branch, tag or commit on the Hub.
    """
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where} {name!r} cannot be loaded: no tokenizer that can be read ({said})") from None


def load_weights(name: str, where: str, *, revision: str | None = None, **arguments: Any) -> Any:
    """A causal language model whose weights are all there, with the attention of this package.

    Args:
        name: directory or Hub name.
        where: the setting that names it, for errors.
        revision: branch, tag or commit on the Hub.
        arguments: of `from_pretrained`.

    Raises:
        ValueError: no such model, damaged or pickled files, or a tensor that is missing or of another shape, which
            transformers would fill with random numbers.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name, config=load_config(name, revision), revision=revision or "main", attn_implementation=ATTENTION,
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **arguments,
        )  # fmt: skip
        model, info = loaded
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{where} {name!r} cannot be loaded: {' '.join(str(error).split())}") from None
    wrong = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        raise ValueError(
            f"{where} {name!r} cannot be loaded: {len(wrong)} of its weights are missing or do not fit its config.json "
            f"({wrong[0]}, ...): copy or download it again"
        )
    return model
