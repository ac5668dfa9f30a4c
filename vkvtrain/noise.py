"""Counter-based random numbers: a pure function of (seed, stream, layer, KV head, event, position).

Where the next token is drawn, of (seed, stream, position, token).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) on int64 tensors, so the integers
are bit-equal on every device and in every batch layout. The 64-bit key is a hash of seed and stream; the four counter
words are position, event, layer and KV head, so no two numbers of a sequence share a counter.
"""

import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import SupportsIndex

import torch
from torch import Tensor

Stream = int | Sequence["Stream"]
"""Names the sequence whose noise is drawn: an int, or a (nested) tuple of ints such as (sample, repeat, epoch)."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_PROJECTION_HEAD = _MASK
"""Counter word of draws that all KV heads share; no KV head has this index."""
_TOKEN_HEAD = _MASK - 1
"""Counter word of the draws that choose the next token, likewise."""


def canonical_stream(stream: Stream) -> tuple[int, ...]:
    """A stream as a flat tuple without trailing zeros, so that `n`, `(n,)` and `(n, 0)` name the same sequence.

    Raises:
        ValueError: anything but 64-bit ints and (nested) tuples of them.
    """

    def flatten(value: Stream) -> Iterable[int]:
        if isinstance(value, SupportsIndex) and not isinstance(value, bool):  # NumPy's and a tensor's integers too
            try:
                value = operator.index(value)
            except TypeError:
                raise ValueError(f"streams must be ints or tuples of ints, got {value!r}") from None
            if not -(2**63) <= value < 2**63:
                raise ValueError(f"streams: {value} does not fit 64 bits")
            yield value
        elif isinstance(value, (tuple, list)):
            for nested in value:
                yield from flatten(nested)
        else:
            raise ValueError(f"streams must be ints or tuples of ints, got {value!r}")

    flat = list(flatten(stream))
    while flat and flat[-1] == 0:
        flat.pop()
    return tuple(flat)


def stream_key(seed: int, stream: Stream) -> tuple[int, int]:
    """The two 32-bit words of the Philox key of a sequence."""
    words = (seed, *canonical_stream(stream))
    digest = hashlib.blake2b(b"".join(word.to_bytes(16, "little", signed=True) for word in words), digest_size=8)
    low_high = int.from_bytes(digest.digest(), "little")
    return low_high & _MASK, low_high >> 32


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The multipliers, int64 [2], and what is added to the key before each round, [10, 2]; on a device once."""
    increments = [[number * word & _MASK for word in _WEYL] for number in range(10)]
    return torch.tensor(_MULTIPLIERS, device=device), torch.tensor(increments, device=device)


def philox(counter: Sequence[Tensor | int], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10.

    Args:
        counter: four broadcastable 32-bit words (int64 tensors or ints).
        key: two 32-bit words as int64 tensors, broadcastable with the counter.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    device = key[0].device
    words = [torch.as_tensor(word, dtype=torch.int64, device=device) for word in counter]
    c0, c1, c2, c3 = torch.broadcast_tensors(*words, *key)[:4]
    ones = (1,) * c0.dim()
    multipliers, increments = _constants(device)
    # broadcast in the rounds alone: of a key there are ten
    keys = torch.stack([word.view(ones[word.dim() :] + word.shape) for word in key])
    keys = (keys + increments.view(10, 2, *ones)).bitwise_and_(_MASK)
    # the two halves of a round are one tensor: a round is six small kernels
    multiplied, mixed = torch.stack([c0, c2]), torch.stack([c1, c3])
    # each of Philox4x32's ten rounds multiplies two words and uses both 32-bit halves of the products: a product is
    # whole in one int64, and shift and mask give its halves on every device alike
    for round_key in keys.unbind():
        # products wrap as unsigned 64-bit arithmetic does; only what is multiplied next needs its upper bits off
        product = (multiplied * multipliers.view(2, *ones)).flip(0)
        multiplied = (product >> 32).bitwise_xor_(mixed).bitwise_xor_(round_key).bitwise_and_(_MASK)
        mixed = product
    (c0, c2), (c1, c3) = multiplied.unbind(), (mixed & _MASK).unbind()
    return c0, c1, c2, c3


def _unit(high: Tensor, low: Tensor) -> Tensor:
    """Two 32-bit words as a float64 strictly between 0 and 1 (52 random bits, centred)."""
    return (((high >> 6) * 2**26 + (low >> 6)).double() + 0.5) * 2.0**-52


def token_gumbel(key: tuple[Tensor, Tensor], position: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of the tokens that may come next, float64 [N, C].

    Args:
        key: Philox key words of the sequences, int64 [N].
        position: the place that the token will take in its sequence, int64 [N].
        tokens: int64 [N, C].
    """
    words = philox((tokens, position[:, None], 0, _TOKEN_HEAD), (key[0][:, None], key[1][:, None]))
    return -torch.log(-torch.log(_unit(words[0], words[1])))


@dataclass(frozen=True)
class NoiseSource:
    """The random numbers of one eviction event in one layer, for several sequences.

    `key` are the Philox key words of the sequences, int64 [N]; `event` their event numbers, int64 [N]; `layer` is the
    layer of all, or that of each, int64 [N].
    """

    key: tuple[Tensor, Tensor]
    event: Tensor
    layer: int | Tensor

    def gumbel(self, positions: Tensor) -> Tensor:
        """Standard Gumbel noise of each candidate, float64.

        Args:
            positions: int64 [N, Hkv, C].
        """
        words = self._words(positions)
        return -torch.log(-torch.log(_unit(words[0], words[1])))

    def uniform(self, positions: Tensor) -> Tensor:
        """Uniform noise of each candidate between 0 and 1, float64; independent of the Gumbel noise.

        Args:
            positions: int64 [N, Hkv, C].
        """
        words = self._words(positions)
        return _unit(words[2], words[3])

    def _words(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        heads = torch.arange(positions.shape[1], device=positions.device)[:, None]
        key = (self.key[0][:, None, None], self.key[1][:, None, None])
        layer = self.layer if isinstance(self.layer, int) else self.layer[:, None, None]
        return philox((positions, self.event[:, None, None], layer, heads), key)

    def projection(self, dim: int, rank: int, per_event: bool) -> Tensor:
        """A Gaussian random projection, entries N(0, 1/rank), float32 [N, dim, rank], shared by the KV heads.

        Args:
            dim: rows, the head dimension.
            rank: columns.
            per_event: drawn afresh at every event, else once per sequence and layer.
        """
        device = self.event.device
        index = torch.arange(dim * rank, device=device)
        event = self.event[:, None] if per_event else torch.zeros_like(self.event)[:, None]
        key = (self.key[0][:, None], self.key[1][:, None])
        layer = self.layer if isinstance(self.layer, int) else self.layer[:, None]
        words = philox((index, event, layer, _PROJECTION_HEAD), key)
        radius = torch.sqrt(-2.0 * torch.log(_unit(words[0], words[1])))  # Box and Muller 1958
        normal = radius * torch.cos(2.0 * math.pi * _unit(words[2], words[3]))
        return (normal / math.sqrt(rank)).view(-1, dim, rank).float()
