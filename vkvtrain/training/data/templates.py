"""From an example to the tokens that generation would see: the prompt as the model is asked, then what it answers.

A prompt that is text is tokenised with the tokenizer's special tokens. A conversation is rendered by the tokenizer's
chat template with `add_generation_prompt=True`, exactly as it is for generation, and the response follows as the model
would write it, up to the token that ends its turn.

Templates of thinking models rewrite finished conversations: they strip or move thoughts, and some open `<think>` in the
generation prompt. So the template's rendering of the whole conversation is compared with what is trained on, and a
difference is an error that shows both, unless `data.response` says which of them the model writes.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from vkvtrain.clock import warn_of_clock
from vkvtrain.training.data.rows import Example, Message, Row
from vkvtrain.training.settings import DataSettings

_MARK, _THOUGHT = "vkvtrain-content", "vkvtrain-thought"
"""Texts that no template changes: they show where it puts content and reasoning."""
_OPENING = re.compile(r"[<\[]([^<>\[\]/]+)[>\]]\s*$")
"""A tag at the end of a generation prompt: the thoughts are open."""
_CHUNK = 256
"""Examples that are tokenised at once."""


def tokenise(examples: Iterable[Example], tokenizer: Any, settings: DataSettings) -> Iterator[Row]:
    """The rows of the examples, in order.

    Raises:
        ValueError: a tokenizer that cannot end a response, a prompt of no tokens, or a response that the model would
            not write as it is trained.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, so a response could never end: set one")
    template: ChatTemplate | None = None
    index = 0
    for chunk in _chunks(examples):
        prompts: list[str] = []
        responses: list[str] = []
        for example in chunk:
            if isinstance(example.prompt, str):
                prompt, response = example.prompt, example.completion
            else:
                template = template or ChatTemplate(tokenizer, settings, example)
                prompt, response = template.render(example)
            prompts.append(prompt)
            responses.append(response)
        plain = [isinstance(example.prompt, str) for example in chunk]
        prompt_ids = _ids(tokenizer, prompts, plain)
        response_ids = _ids(tokenizer, responses, [False] * len(chunk))
        for example, prompt, response in zip(chunk, prompt_ids, response_ids, strict=True):
            if isinstance(example.prompt, str):
                prompt, response = _end(tokenizer, example, prompt, response)
            if not prompt:
                raise ValueError(f"{example.where}: the prompt has no tokens; write at least one")
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


def _ids(tokenizer: Any, texts: list[str], special: list[bool]) -> list[list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens around it where `special` says so."""
    found: list[list[int]] = [[] for _ in texts]
    for with_special in (True, False):
        places = [place for place, wanted in enumerate(special) if wanted == with_special]
        if places:
            ids = tokenizer([texts[place] for place in places], add_special_tokens=with_special, verbose=False)
            for place, one in zip(places, ids["input_ids"], strict=True):
                found[place] = one
    return found


def _end(tokenizer: Any, example: Example, prompt: list[int], response: list[int]) -> tuple[list[int], list[int]]:
    """A text's prompt left open, its response closed."""
    end = tokenizer.eos_token_id
    assert isinstance(example.prompt, str)
    if prompt and prompt[-1] == end and not example.prompt.endswith(tokenizer.eos_token):
        prompt = prompt[:-1]  # tokenizers that close every text would end the sequence before the response
    return prompt, response if response[-1:] == [end] else [*response, end]


class ChatTemplate:
    """A tokenizer's chat template with the recipe's arguments.

    Args:
        tokenizer: with a chat template.
        settings: `response` and `template_kwargs`.
        example: a conversation, which shows how the template ends a turn.

    Raises:
        ValueError: a tokenizer without a template, or a template that does not write what the assistant says.

    Attributes:
        end: text of the token that ends the model's turn.
    """

    def __init__(self, tokenizer: Any, settings: DataSettings, example: Example) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{example.where} is a conversation, but the tokenizer has no chat template: use a model that has "
                "one, or write 'prompt' and 'completion' as text"
            )
        self._tokenizer = tokenizer
        self._settings = settings
        warn_of_clock(tokenizer, lambda: self._apply(example.prompt, add_generation_prompt=True), "data.date")
        self.end, self._after = self._end_of_turn(example)
        self._reads_reasoning = _THOUGHT in self._conversation(example, _MARK, _THOUGHT)

    def render(self, example: Example) -> tuple[str, str]:
        """(prompt, response) as texts; the response ends with the token that ends the turn.

        Raises:
            ValueError: the template writes the conversation differently from what would be trained on.
        """
        prompt = self._apply(example.prompt, add_generation_prompt=True)
        if self._settings.response == "rendered" or example.reasoning is not None:
            return prompt, self._rendered(example, prompt)
        end = "" if example.completion.endswith(self.end) else self.end
        if self._settings.response == "written":
            return prompt, self._without_opening(example, prompt) + end
        response = example.completion + end
        full = self._finished(self._conversation(example, example.completion.removesuffix(self.end), None))
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
        return self._apply([*example.prompt, message], add_generation_prompt=False)

    def _end_of_turn(self, example: Example) -> tuple[str, str]:
        """The token that ends a turn, and what the template writes after it in a finished conversation."""
        _, found, after = self._conversation(example, _MARK, None).rpartition(_MARK)
        if not found:
            raise ValueError(f"{example.where}: the chat template does not write what the assistant says")
        first = self._tokenizer(after, add_special_tokens=False)["input_ids"][:1]
        text = self._tokenizer.decode(first)
        if first and first[0] in self._tokenizer.added_tokens_decoder and after.startswith(text):
            return text, after[len(text) :]
        return self._tokenizer.eos_token, after

    def _finished(self, text: str) -> str:
        """A conversation up to the token that ends its last turn, which is all that a model generates."""
        body = text.removesuffix(self._after)
        return body if body.endswith(self.end) else body + self.end

    def _without_opening(self, example: Example, prompt: str) -> str:
        """The completion without the tag that the generation prompt has written already."""
        opening = _OPENING.search(prompt)
        if opening is None:
            return example.completion
        tag, rest = opening[0].strip(), example.completion.lstrip()
        if rest.startswith(tag):
            return rest[len(tag) :].lstrip("\n") if opening[0].endswith("\n") else rest[len(tag) :]
        closing = tag[0] + "/" + tag[1:]
        if closing not in rest and closing in self._closings():
            raise ValueError(
                f"{example.where}: the generation prompt opens {tag}, but the response has no {closing}, so it would "
                "be trained as a thought without an end: leave such rows out, or set data.template_kwargs"
            )
        return example.completion

    def _closings(self) -> set[str]:
        """Closing tags that a template or vocabulary knows."""
        template = self._tokenizer.chat_template
        text = template if isinstance(template, str) else "".join(template.values())
        return set(re.findall(r"[<\[]/[^<>\[\]]+[>\]]", text)) | {"</think>", "[/THINK]"}

    def _rendered(self, example: Example, prompt: str) -> str:
        """The response as the template writes it behind the generation prompt."""
        content, reasoning = example.completion, example.reasoning
        if reasoning is None and self._reads_reasoning:
            thought = re.fullmatch(r"\s*<think>(.*)</think>(.*)", content, re.DOTALL)
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
