"""From logits to the next token of each row. Noise is counter-based, so a token depends on its own sequence alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vkvtrain.generation.requests import Request
from vkvtrain.noise import stream_key, token_gumbel


class Sampler:
    """The sampling parameters of some rows, as tensors.

    Args:
        requests: of each row.
        device: where the logits are.
    """

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        settings = [request.sampling for request in requests]
        self.drawn = [row for row, setting in enumerate(settings) if setting.temperature > 0]
        self.penalised = any(setting.repetition_penalty != 1 for setting in settings)
        drawn = [settings[row] for row in self.drawn]
        self.ordered = any(setting.top_k or setting.top_p < 1 or setting.min_p for setting in drawn)

        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        self.row = column(self.drawn, torch.int64)[:, 0]
        self.temperature = column([setting.temperature for setting in drawn])
        self.top_k = column([setting.top_k or torch.iinfo(torch.int64).max for setting in drawn], torch.int64)
        self.top_p = column([setting.top_p for setting in drawn])
        self.min_p = column([setting.min_p for setting in drawn])
        keys = [stream_key(setting.seed, requests[row].stream) for row, setting in zip(self.drawn, drawn, strict=True)]
        self.key = tuple(column([key[word] for key in keys], torch.int64)[:, 0] for word in (0, 1))
        self.penalty = column([setting.repetition_penalty for setting in settings])

    def choose(self, logits: Tensor, position: Tensor, seen: Tensor | None) -> Tensor:
        """The next token of each row, int64 [N].

        Args:
            logits: float32 [N, V].
            position: the place that the token will take in its sequence, int64 [N].
            seen: which tokens prompt and response hold, bool [N, V]; needed where a repetition penalty is set.
        """
        if self.penalised:
            assert seen is not None
            logits = torch.where(seen, torch.where(logits < 0, logits * self.penalty, logits / self.penalty), logits)
        tokens = logits.argmax(-1)
        if self.drawn:
            some = len(self.drawn) < len(logits)
            drawn, where = (logits[self.row], position[self.row]) if some else (logits, position)
            tokens[self.row] = self._draw(drawn / self.temperature, where)
        return tokens

    def _draw(self, scores: Tensor, position: Tensor) -> Tensor:
        """Gumbel-max over what the filters leave: a draw in proportion to the softmax of its scores."""
        if not self.ordered:
            tokens = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        else:
            scores, tokens = scores.sort(dim=-1, descending=True, stable=True)  # of equal scores the first
            place = torch.arange(scores.shape[1], device=scores.device)
            scores = scores.masked_fill(place >= self.top_k, -torch.inf)
            chance = scores.softmax(-1)
            likelier = chance.cumsum(-1) - chance
            kept = ((likelier < self.top_p) | (self.top_p == 1)) & (chance >= self.min_p * chance[:, :1])
            kept[:, 0] = True
            width = int((kept.int() * (place + 1)).amax())  # the noise of the rest is not worth computing
            scores = scores.masked_fill(~kept, -torch.inf)[:, :width]
            tokens = tokens[:, :width]
        noisy = scores.double() + token_gumbel((self.key[0], self.key[1]), position, tokens)
        return tokens.gather(-1, noisy.argmax(-1, keepdim=True))[:, 0]
