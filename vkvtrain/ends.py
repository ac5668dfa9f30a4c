"""Where a sequence begins, and where a turn, a thought and an answer end.

Rows, rollouts, held-out answers, lm-eval, chat and what is published ask this module, so that they begin and stop at
the same places:

- `end_tokens`: every token that ends a generation: the tokenizer's, the generation configuration's, the template's;
- `turn_end`: how a chat template closes an answer, up to the token that ends a generation;
- `Thoughts`: where the answer of a thinking model begins, by the position of its tags;
- `encode`: a text as a prompt, with one beginning-of-sequence token.

Knows tokenizers and texts, and nothing of what a model computes.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Self

from jinja2 import TemplateError
from transformers import GenerationConfig

Message = dict[str, Any]
_MARK = "vkvtrain-content"
"""A text that no template changes: it shows where the template puts what the assistant says."""
_ASKED: tuple[Message, ...] = ({"role": "user", "content": "-"},)


def end_tokens(tokenizer: Any, generation: GenerationConfig | None) -> frozenset[int]:
    """All tokens that end a generation; empty where neither tokenizer, configuration nor template names one.

    Args:
        tokenizer: of the model; its chat template is looked at.
        generation: the model's `generation_config`.
    """
    found = {*configured_ends(generation), tokenizer.eos_token_id} - {None}
    end = _template_end(tokenizer, found) if tokenizer.chat_template else None
    return frozenset(found if end is None else {*found, end})


def configured_ends(generation: GenerationConfig | None) -> list[int]:
    """The end tokens of a generation configuration, in its order."""
    own = None if generation is None else generation.eos_token_id
    return list(own) if isinstance(own, list) else [] if own is None else [own]


def stop_at(generation: GenerationConfig, tokens: Collection[int]) -> None:
    """Add end tokens to a generation configuration, behind those that it has."""
    own = configured_ends(generation)
    every = own + sorted(set(tokens) - set(own))
    if every:
        generation.eos_token_id = every if len(every) > 1 else every[0]


def saved_ends(name: str, revision: str | None = None) -> list[int]:
    """The end tokens of the generation_config.json in a directory or repository; empty without the file."""
    try:
        return configured_ends(GenerationConfig.from_pretrained(name, revision=revision or "main"))
    except OSError:
        return []


@dataclass(frozen=True)
class TurnEnd:
    """How a chat template closes an answer."""

    pieces: tuple[str, ...]
    """Texts of its tokens, from behind the answer up to the one that ends a generation."""
    token: int | None
    """That token; None where the template writes no special token and the tokenizer has no end of sequence."""
    after: str
    """All that follows the answer in a finished conversation."""

    @property
    def text(self) -> str:
        return "".join(self.pieces)


def turn_end(
    tokenizer: Any, render: Callable[[Sequence[Message]], str], asked: Sequence[Message], known: Collection[int]
) -> TurnEnd | None:
    """How a template ends the assistant's turn; None if it does not write what the assistant says.

    A template may write several special tokens behind an answer (Cohere's `<|END_RESPONSE|><|END_OF_TURN_TOKEN|>`), and
    more behind a conversation than behind a turn (Phi's `<|end|><|endoftext|>`). The end is the first token behind a
    turn that is known to end generations, else the last one behind a turn.

    Args:
        tokenizer: whose added tokens are looked for.
        render: a conversation's text; what it raises for the conversation as asked is raised.
        asked: turns that the assistant answers.
        known: tokens that end generations.
    """
    answered = [*asked, {"role": "assistant", "content": _MARK}]
    _, written, after = render(answered).rpartition(_MARK)
    if not written:
        return None
    finished = list(_added_tokens(tokenizer, after))
    try:
        goes_on = list(_added_tokens(tokenizer, render([*answered, *_ASKED]).rpartition(_MARK)[2]))
    except (TemplateError, TypeError):  # a template of one turn
        goes_on = []
    pairs = zip(finished, goes_on, strict=False)
    closing = [own for own, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)] or finished
    if not closing:
        return TurnEnd((tokenizer.eos_token or "",), tokenizer.eos_token_id, after)
    place = next((place for place, (token, _) in enumerate(closing) if token in known), len(closing) - 1)
    return TurnEnd(tuple(text for _, text in closing[: place + 1]), closing[place][0], after)


def _added_tokens(tokenizer: Any, text: str) -> Iterator[tuple[int, str]]:
    """The added tokens that a text begins with, behind white space."""
    added = {str(token): number for number, token in tokenizer.added_tokens_decoder.items()}
    longest_first = sorted(added, key=len, reverse=True)
    text = text.lstrip()
    while (token := next((one for one in longest_first if text.startswith(one)), None)) is not None:
        yield added[token], token
        text = text[len(token) :]


def _template_end(tokenizer: Any, known: Collection[int]) -> int | None:
    """The token that ends a turn, as the template writes a short conversation; None if it refuses such a one."""
    try:
        end = turn_end(
            tokenizer, lambda messages: tokenizer.apply_chat_template(list(messages), tokenize=False), _ASKED, known
        )
    except (TemplateError, TypeError):  # templates that want other messages: nothing is known of them here
        return None
    return None if end is None else end.token


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Texts as prompts: with the tokenizer's own special tokens, one beginning of sequence, and left open.

    A text that begins with the BOS token already gets none (as in lm-eval), and tokenizers that close every text with
    the end of sequence would end it before the response.
    """
    ids: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
    return [_once(tokenizer, text, tokens) for text, tokens in zip(texts, ids, strict=True)]


def _once(tokenizer: Any, text: str, tokens: list[int]) -> list[int]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and text.startswith(tokenizer.bos_token) and tokens[:2] == [bos, bos]:
        tokens = tokens[1:]
    closed = eos is not None and tokens[-1:] == [eos] and not text.endswith(tokenizer.eos_token)
    return tokens[:-1] if closed and eos != bos else tokens


_CHANNELS = ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>")
"""gpt-oss: its thoughts are messages in one channel, its answer is the message in the other."""
THINK_ENDS = ("</think>", "[/THINK]", _CHANNELS[1])
"""End tags that are looked for when none is named (Qwen3, DeepSeek-R1, Phi-4 and others; Magistral; gpt-oss)."""
_WORDS = (("START_", "END_"), ("begin_of_", "end_of_"))
_THOUGHT = re.compile(
    r"(?:<\|?(?:think|thinking|thoughts?|reasoning|begin_of_thought|START_THINKING)\|?>|\[THINK\]|◁think▷"
    + f"|{re.escape(_CHANNELS[0])})",
    re.IGNORECASE,
)
_TAG_AT_END = re.compile(r"[<\[◁][^<>\[\]◁▷/]+[>\]▷]\s*$")


def thought_end(start: str) -> str:
    """The tag that ends the thoughts that another begins: `</think>` of `<think>`."""
    if start == _CHANNELS[0]:
        return _CHANNELS[1]
    for first, last in _WORDS:
        if first in start:
            return start.replace(first, last)
    return f"{start[0]}/{start[1:]}"


def thought_start(end: str) -> str | None:
    """The tag that begins the thoughts that another ends; None where it does not follow."""
    if end == _CHANNELS[1]:
        return _CHANNELS[0]
    for first, last in _WORDS:
        if last in end:
            return end.replace(last, first)
    return end[0] + end[2:] if end[1:2] == "/" else None


def opened_by_response(response: str) -> str | None:
    """The tag with which a response begins to think."""
    found = _THOUGHT.match(response.lstrip())
    return None if found is None else found[0]


def opened_by_prompt(prompt: str, closings: Collection[str] = ()) -> str | None:
    """The tag at the end of a prompt that leaves thoughts open, with the white space behind it.

    Args:
        prompt: chat template included.
        closings: end tags of thoughts beside the usual ones.
    """
    if prompt.rstrip().endswith(_CHANNELS[0]):
        return _CHANNELS[0]
    found = _TAG_AT_END.search(prompt)
    tag = "" if found is None else found[0].strip()
    if found is None or not (_THOUGHT.fullmatch(tag) or thought_end(tag) in closings):
        return None
    return found[0]


@dataclass(frozen=True)
class Thoughts:
    """How a response to one prompt divides into thoughts and answer.

    Thoughts begin where the prompt ends with their tag, or where the response begins with it; then their first end tag
    ends them. What either tag means elsewhere, in a question, in the answer, is text.
    """

    ends: tuple[str, ...]
    """End tags."""
    is_named: bool
    """Whether the end tag was named, so that the model is known to think, though it may not say that it begins."""
    is_open: str | None
    """The end tag of the thoughts that the prompt has opened."""
    is_closed: bool
    """Whether the prompt has opened and closed them: thinking is off."""
    is_unseen: bool
    """Whether there is no prompt to look at."""

    @classmethod
    def behind(cls, prompt: str, end: str | None = None) -> Self:
        """The thoughts behind a prompt; `end` is the model's end-of-thinking tag."""
        ends = THINK_ENDS if end is None else (end,)
        text = prompt.rstrip()
        is_open = next((tag for tag in ends if (start := thought_start(tag)) and text.endswith(start)), None)
        return cls(ends, end is not None, is_open, text.endswith(ends), not prompt)

    def answer_start(self, response: str, finished: bool) -> int | None:
        """Where the answer begins in a response, 0 without thoughts; None while they have not ended.

        Args:
            response: the generated text.
            finished: whether it ended by itself, and neither goes on nor was cut off.
        """
        text = response.lstrip()
        for end in self.ends:
            start = thought_start(end)
            if end == self.is_open or (start is not None and text.startswith(start)):
                return self._behind_first(end, response)
            if not finished and start is not None and start.startswith(text):
                return None  # it may be about to begin
        if self.is_closed:
            return 0
        if self.is_named or self.is_unseen:  # thoughts whose beginning nobody sees
            last = max((response.rfind(end) + len(end) for end in self.ends if end in response), default=None)
            return 0 if last is None and (finished or not self.is_named) else last
        return 0

    @staticmethod
    def _behind_first(end: str, response: str) -> int | None:
        place = response.find(end)
        return None if place < 0 else place + len(end)
