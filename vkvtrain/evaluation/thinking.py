"""What of a response is its answer: the part after the thinking. Thinking that never ended is no answer."""

THINK_END = "</think>"
"""The end tag that is looked for when none is named (Qwen3, DeepSeek-R1, QwQ and others write it)."""


def final_answer(response: str, prompt: str = "", think_end: str | None = None, cut_off: bool = False) -> str:
    """The response after its last end-of-thinking tag; empty if the thinking never ended.

    Thinking has begun where the response opens it, or where the prompt leaves it open, as many chat templates do. A
    response without any tag is all answer, unless it was cut off while its model is said to think (`think_end`).

    Args:
        response: the generated text.
        prompt: the text before it, chat template included.
        think_end: the model's end-of-thinking tag; default `</think>`.
        cut_off: whether the limit ended the response.
    """
    end = think_end or THINK_END
    if end in response:
        return response.rpartition(end)[2].lstrip()
    start = end.replace("</", "<", 1) if end.startswith("</") else None
    began = start is not None and (start in response or prompt.rfind(start) > prompt.rfind(end))
    return "" if began or (think_end is not None and cut_off) else response
