"""Finished completions on disk, so that an interrupted run goes on where it was.

One JSON object a line: a fingerprint of everything that the completion depends on, hashes of its parts, and the
completion. What was asked otherwise, of another model or under another eviction setting is not taken from it, and where
that leaves nothing, a warning names the parts that are others.
"""

import fcntl
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from vkvtrain.config import EvictionConfig
from vkvtrain.generation.requests import Completion, Request
from vkvtrain.noise import canonical_stream

_AS_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**24
"""Weights that are hashed at once."""
_ODD = 0x2545F4914F6CDD1D
"""A multiplier whose products spread over all 64 bits (Vigna's xorshift64*)."""
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache")


class Journal:
    """The completions of one model under one setting, in a file that several processes may write.

    Args:
        path: the file, made if missing.
        context: what all of its completions depend on, see `context_of`.
        requests: what may be asked of it.

    Raises:
        ValueError: a file that is not a journal.
    """

    def __init__(self, path: Path, context: Mapping[str, str], requests: Sequence[Request]) -> None:
        self.context = context
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115 (closed by __exit__)
        wanted = {self.fingerprint(request) for request in requests}
        self._found: dict[str, Completion] = {}
        others: list[Mapping[str, str]] = []
        with self._locked():
            self._file.seek(0)
            end = 0
            for number, line in enumerate(iter(self._file.readline, b""), 1):
                if not line.endswith(b"\n"):  # an interrupted write
                    self._file.truncate(end)
                    break
                end += len(line)
                key, parts, completion = _read(line, path, number)
                if key in wanted:
                    self._found[key] = completion
                else:
                    others.append(parts)
        if not self._found and (different := self._different(others, requests)):
            day = " (a chat template may write the day's date)" if "prompt" in different else ""
            warnings.warn(
                f"journal {os.fspath(path)} has answers to other requests only, different in {', '.join(different)}"
                f"{day}: none of them is taken, and the new ones are added to it",
                stacklevel=3,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def parts(self, request: Request) -> dict[str, str]:
        """Hashes of all that a completion depends on, by name."""
        asked = asdict(request) | {"stream": canonical_stream(request.stream)}
        return {**self.context, **{name: _hash(value) for name, value in asked.items()}}

    def fingerprint(self, request: Request) -> str:
        """A hash of the request and the context."""
        return _hash(self.parts(request))

    def _different(self, others: Sequence[Mapping[str, str]], requests: Sequence[Request]) -> list[str]:
        """In what the completion that is most like a request differs from it, of those with the request's stream."""
        asked = {parts["stream"]: parts for parts in map(self.parts, requests)}
        differences = [
            [name for name, value in asked[other["stream"]].items() if other.get(name) != value]
            for other in others
            if other.get("stream") in asked
        ]
        return min(differences, key=len, default=[])

    def find(self, request: Request) -> Completion | None:
        """The completion that the file held when it was opened, if any."""
        return self._found.get(self.fingerprint(request))

    def add(self, request: Request, completion: Completion) -> None:
        """Write a finished completion."""
        written = {"request": self.fingerprint(request), "parts": self.parts(request), **asdict(completion)}
        line = json.dumps(written) + "\n"
        with self._locked():
            end = self._file.seek(0, os.SEEK_END)
            try:
                self._file.write(line.encode())
            except OSError:
                self._file.truncate(end)
                raise

    def _locked(self) -> "_Lock":
        return _Lock(self._file.fileno())


class _Lock:
    """Other processes wait; so a line that does not end is one whose writer is gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __enter__(self) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        fcntl.flock(self.descriptor, fcntl.LOCK_UN)


def _read(line: bytes, path: Path, number: int) -> tuple[str, Mapping[str, str], Completion]:
    try:
        values = json.loads(line)
        return values.pop("request"), values.pop("parts", {}), Completion(**values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"journal: line {number} of {os.fspath(path)} is no completion ({error}): name another file, or remove it"
        ) from None


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def context_of(model: Any, config: EvictionConfig, end_tokens: Collection[int], tokenizer: Any) -> dict[str, str]:
    """Hashes of what completions depend on beside their request: eviction setting, end tokens, tokenizer, model, its
    weights, and this package's version.
    """
    settings = json.loads(model.config.to_json_string(use_diff=False))
    vocabulary = None if tokenizer is None else sorted(tokenizer.get_vocab().items())
    return {
        "eviction": _hash(config.model_dump(mode="json")),
        "end_tokens": _hash(sorted(end_tokens)),
        "model": _hash({name: value for name, value in settings.items() if name not in _VOLATILE}),
        "adapters": _hash(_adapters_of(model)),
        "weights": weights_of(model),
        "vocabulary": _hash(vocabulary),
        "vkvtrain": version("vkvtrain"),
    }


def _adapters_of(model: torch.nn.Module) -> list[str]:
    """What adapter layers do that no weight says: which adapters are in use, and their scaling."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return [
        f"{name} {layer.active_adapters} {layer.disable_adapters} {getattr(layer, 'scaling', None)}"
        for name, layer in layers
    ]


@torch.no_grad()
def weights_of(model: torch.nn.Module) -> str:
    """A hash of the names, shapes and bits of a model's weights, the same on every device.

    The bits of each tensor are added up as integers, each multiplied by an odd number that depends on its place, so
    that a model of billions of parameters takes a moment, and weights that changed places are other weights.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict(keep_vars=True).items():
        bits = tensor.detach().contiguous().view(_AS_INTEGERS[tensor.element_size()]).flatten()
        total = 0
        for start in range(0, len(bits), _CHUNK):
            part = bits[start : start + _CHUNK].to(torch.int64)
            place = torch.arange(start, start + len(part), device=bits.device)
            total += int((part * (2 * (place * _ODD ^ place >> 7) + 1)).sum())
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total % 2**64}\n".encode())
    return found.hexdigest()
