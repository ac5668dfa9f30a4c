"""What of a response is its answer: the part after the thinking. Thinking that never ended is no answer."""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from vkvtrain.ends import Thoughts


def final_answer(response: str, prompt: str = "", think_end: str | None = None, cut_off: bool = False) -> str:
    """The response after its thoughts; empty if they never ended.

    Thoughts begin where the prompt ends with their tag, as many chat templates leave it, or where the response begins
    with it. Their first end tag ends them. Where nobody sees them begin, but their end tag is named or there is no
    prompt, they end at the last end tag; without any, the response is all answer unless its limit cut it off.

    Args:
        response: the generated text.
        prompt: the text before it, chat template included.
        think_end: the model's end-of-thinking tag; by default that of the tag with which thoughts begin: `</think>`,
            `[/THINK]`, or gpt-oss' `<|channel|>final<|message|>` (if `response` is decoded with its special tokens).
        cut_off: whether the limit ended the response.
    """
    start = Thoughts.behind(prompt, think_end).answer_start(response, not cut_off)
    if start is None:
        return ""
    return response[start:].lstrip() if start else response


def divided(tokens: Sequence[int], decode: Callable[..., str], thoughts: Thoughts, finished: bool) -> tuple[str, str]:
    """(thoughts, answer) of a response as texts without special tokens, which may be what tells one from the other.

    Args:
        tokens: the response.
        decode: of tokens to text, with the keyword `skip_special_tokens`, by default true.
        thoughts: where its prompt leaves it.
        finished: whether it ended by itself.
    """
    whole = decode(tokens, skip_special_tokens=False)
    start = thoughts.answer_start(whole, finished)
    if start is None:
        return decode(tokens), ""
    if not start:
        return "", decode(tokens)

    def length(count: int) -> int:
        return len(decode(tokens[:count], skip_special_tokens=False))

    before = bisect_left(range(len(tokens)), start, key=length)
    head = whole[start : length(before)]  # of the answer, in the token that ended the thoughts
    answer, raw = (head + decode(tokens[before:])).lstrip(), decode(tokens)
    return raw.removesuffix(answer) if raw.endswith(answer) else decode(tokens[:before]), answer
