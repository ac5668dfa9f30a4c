"""From an example to the tokens that generation would see: the prompt as the model is asked, then what it answers.

A prompt that is text is tokenised with the tokenizer's special tokens. A conversation is rendered by the tokenizer's
chat template with `add_generation_prompt=True`, exactly as it is for generation, and the response follows as the model
would write it, up to the token that ends its turn.

Templates of thinking models rewrite finished conversations: they strip or move thoughts, and some open `<think>` in the
generation prompt. So the template's rendering of the whole conversation is compared with what is trained on, and a
difference is an error that shows both, unless `data.response` says which of them the model writes.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError

from vkvtrain.chat_templates import check_arguments
from vkvtrain.clock import warn_of_clock
from vkvtrain.ends import encode, opened_by_prompt, opened_by_response, thought_end, turn_end
from vkvtrain.training.data.rows import Example, Message, Row
from vkvtrain.training.settings import DataSettings

_MARK, _THOUGHT = "vkvtrain-content", "vkvtrain-thought"
"""Texts that no template changes: they show where it puts content and reasoning."""
_CHUNK = 256
"""Examples that are tokenised at once."""


def tokenise(
    examples: Iterable[Example], tokenizer: Any, settings: DataSettings, ends: Sequence[int] = ()
) -> Iterator[Row]:
    """The rows of the examples, in order.

    Args:
        examples: prompts and responses.
        tokenizer: the model's.
        settings: `response` and `template_kwargs`.
        ends: tokens at which the model's generation configuration ends a response, beside the tokenizer's.

    Raises:
        ValueError: a tokenizer that cannot end a response, a prompt of no tokens, or a response that the model would
            not write as it is trained: another text, thoughts without an end, or more than it would be asked for.
    """
    template: ChatTemplate | None = None
    known = [end for end in (tokenizer.eos_token_id, *ends) if end is not None]
    index = 0
    for chunk in _chunks(examples):
        prompts: list[str] = []
        responses: list[str] = []
        for example in chunk:
            if isinstance(example.prompt, str):
                prompt, response = example.prompt, example.completion
            else:
                template = template or ChatTemplate(tokenizer, settings, example, known)
                prompt, response = template.render(example)
            _check_characters(example, prompt + response)
            _check_thoughts(example, prompt, response, template.closings if template else ())
            prompts.append(prompt)
            responses.append(response)
        plain = [isinstance(example.prompt, str) for example in chunk]
        prompt_ids = _prompt_ids(tokenizer, prompts, plain)
        response_ids = _ids(tokenizer, responses)
        for example, prompt, response in zip(chunk, prompt_ids, response_ids, strict=True):
            if isinstance(example.prompt, str):
                response = _closed(example, response, known)
            if not prompt:
                raise ValueError(f"{example.where}: the prompt has no tokens; write at least one")
            _check_end(tokenizer, example, response, known)
            yield Row(index, [*prompt, *response], len(prompt))
            index += 1


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    chunk: list[Example] = []
    for example in examples:
        chunk.append(example)
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, which says all its special tokens itself."""
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _prompt_ids(tokenizer: Any, prompts: list[str], plain: list[bool]) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's own special tokens where it is plain text."""
    texts = iter(encode(tokenizer, [text for text, is_text in zip(prompts, plain, strict=True) if is_text]))
    rendered = iter(_ids(tokenizer, [text for text, is_text in zip(prompts, plain, strict=True) if not is_text]))
    return [next(texts if is_text else rendered) for is_text in plain]


def _closed(example: Example, response: list[int], known: Sequence[int]) -> list[int]:
    """A text's response with the token that ends it, unless the text writes one."""
    if not known:
        raise ValueError(
            f"{example.where}: the tokenizer has no eos_token and the model's generation configuration names none, so "
            "a response could never end: set one"
        )
    return response if response and response[-1] in known else [*response, known[0]]


def _check_characters(example: Example, text: str) -> None:
    """Raise ValueError for half a surrogate pair, as broken JSON escapes leave it: no tokenizer reads it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{example.where} holds half a surrogate pair ({text[error.start]!r}), which is no character: repair the "
            "text where it was written"
        ) from None


def _check_thoughts(example: Example, prompt: str, response: str, closings: Collection[str]) -> None:
    """Raise ValueError for thoughts that the prompt or the response opens and nothing ends."""
    own = opened_by_response(example.completion)
    asked = opened_by_prompt(prompt, closings)
    for who, tag, text in (("response", own, example.completion), ("generation prompt", asked, response)):
        if tag is not None and thought_end(tag.strip()) not in text:
            raise ValueError(
                f"{example.where}: the {who} opens {tag.strip()}, but the response has no {thought_end(tag.strip())}, "
                "so it would be trained as a thought without an end: leave such rows out, or set data.template_kwargs"
            )


def _check_end(tokenizer: Any, example: Example, response: list[int], known: Collection[int]) -> None:
    """Raise ValueError for a response that goes on behind a token that ends generations."""
    place = next((place for place, token in enumerate(response[:-1]) if token in known), None)
    if place is not None:
        raise ValueError(
            f"{example.where}: the response goes on after {tokenizer.decode(response[place])!r} (its token "
            f"{place + 1} of {len(response)}), where generation stops: take it out of the text"
        )


class ChatTemplate:
    """A tokenizer's chat template with the recipe's arguments.

    Args:
        tokenizer: with a chat template.
        settings: `response` and `template_kwargs`.
        example: a conversation, which shows how the template ends a turn.
        known: tokens that end generations.

    Raises:
        ValueError: a tokenizer without a template, a template that does not write what the assistant says, or
            arguments that it does not read.

    Attributes:
        end: text from behind an answer up to the token that ends a generation.
        closings: end tags that the template or the vocabulary knows.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, example: Example, known: Collection[int]) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{example.where} is a conversation, but the tokenizer has no chat template: use a model that has "
                "one, or write 'prompt' and 'completion' as text"
            )
        check_arguments(tokenizer, settings.template_kwargs, "data.template_kwargs")
        self._tokenizer = tokenizer
        self._settings = settings
        assert not isinstance(example.prompt, str)
        with _of_row(example):
            warn_of_clock(tokenizer, lambda: self._apply(example.prompt, True), "data.date")
            end = turn_end(tokenizer, lambda messages: self._apply(messages, False), example.prompt, known)
        if end is None:
            raise ValueError(f"{example.where}: the chat template does not write what the assistant says")
        if end.token is None:
            raise ValueError(
                f"{example.where}: neither the chat template nor the tokenizer has a token that ends a turn, so a "
                "response could never end: set eos_token"
            )
        self.end = end.text
        self.closings = self._closings()
        self._end_pieces, self._after = end.pieces, end.after
        self._reads_reasoning = _THOUGHT in self._conversation(example, _MARK, _THOUGHT)

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt, response) as texts; the response ends with the token that ends the turn.

        Raises:
            ValueError: the template writes the conversation differently from what would be trained on.
        """
        with _of_row(example):
            prompt = self._apply(example.prompt, add_generation_prompt=True)
        if self._settings.response == "rendered" or example.reasoning is not None:
            return prompt, self._rendered(example, prompt)
        said = self._without_end(example.completion)
        if self._settings.response == "written":
            return prompt, self._without_opening(said, prompt) + self.end
        response = said + self.end
        full = self._finished(self._conversation(example, said, None))
        if full != prompt + response:
            advice = (
                "look at both, then set data.response to 'written' if the model writes the first (a doubled tag is "
                "then dropped), or to 'rendered' if it writes the second"
            )
            raise ValueError(_difference(example, prompt + response, full, advice))
        return prompt, response

    def _apply(self, messages: Any, add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self._settings.template_kwargs,
        )

    def _conversation(self, example: Example, content: str, reasoning: str | None) -> str:
        """The template's rendering of the example's prompt with one more turn, finished."""
        message: Message = {"role": "assistant", "content": content}
        if reasoning is not None:  # templates read one name or the other
            message |= {"reasoning_content": reasoning, "thinking": reasoning}
        with _of_row(example):
            return self._apply([*example.prompt, message], add_generation_prompt=False)

    def _finished(self, text: str) -> str:
        """A conversation up to the token that ends its last turn, which is all that a model generates."""
        body = text.removesuffix(self._after)
        return body if body.endswith(self.end) else body + self.end

    def _without_end(self, completion: str) -> str:
        """The completion without as much of the end of its turn as it writes out."""
        for count in range(len(self._end_pieces), 0, -1):
            written = "".join(self._end_pieces[:count])
            if completion.endswith(written):
                return completion.removesuffix(written)
        return completion

    def _without_opening(self, said: str, prompt: str) -> str:
        """The completion without the tag that the generation prompt has written already."""
        opening = opened_by_prompt(prompt, self.closings)
        rest = said.lstrip()
        if opening is None or not rest.startswith(opening.strip()):
            return said
        rest = rest.removeprefix(opening.strip())
        return rest.lstrip("\n") if opening.endswith("\n") else rest

    def _closings(self) -> set[str]:
        template = self._tokenizer.chat_template
        text = template if isinstance(template, str) else "".join(template.values())
        text += " ".join(map(str, self._tokenizer.added_tokens_decoder.values()))
        return set(re.findall(r"[<\[]/[^<>\[\]]+[>\]]", text))

    def _rendered(self, example: Example, prompt: str) -> str:
        """The response as the template writes it behind the generation prompt."""
        content, reasoning = self._without_end(example.completion), example.reasoning
        if reasoning is None and self._reads_reasoning:
            thought = re.fullmatch(r"\s*<think>(.*?)</think>(.*)", content, re.DOTALL)
            if thought:
                reasoning, content = thought[1].strip(), thought[2].strip()
        full = self._finished(self._conversation(example, content, reasoning))
        response = full[len(prompt) :]
        lost = [part for part in (content, reasoning) if part is not None and part.strip() not in response]
        if not full.startswith(prompt) or not full.endswith(self.end) or lost:
            advice = (
                "the second loses something, so write the reasoning into the text and set data.response to 'written'"
            )
            written = f"<think>{reasoning}</think>{content}" if example.reasoning else example.completion
            raise ValueError(_difference(example, prompt + written + self.end, full, advice))
        return response


@contextmanager
def _of_row(example: Example) -> Iterator[None]:
    """A template's own errors with the row that it fails on."""
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise ValueError(
            f"{example.where}: the chat template refuses this conversation: {' '.join(str(error).split())}"
        ) from None


def _difference(example: Example, trained: str, full: str, advice: str) -> str:
    """One sentence, and the two texts around the first place where they differ."""
    pairs = enumerate(zip(trained, full, strict=False))
    place = next((i for i, (ours, theirs) in pairs if ours != theirs), min(len(trained), len(full)))
    start = max(0, place - 60)

    def excerpt(text: str) -> str:
        return ("..." if start else "") + repr(text[start : start + 160]) + ("..." if start + 160 < len(text) else "")

    return (
        f"{example.where}: behind the generation prompt the chat template writes something else than the data, from "
        f"character {place} on: {advice}\n  data as written  {excerpt(trained)}\n  chat template    {excerpt(full)}"
    )
