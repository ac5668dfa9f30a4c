"""Loops, and what of a response is its answer."""

import random
import re

import pytest

from vkvtrain.evaluation.metrics import compression_ratio, ends_in_a_repetition, is_looping
from vkvtrain.evaluation.records import generation_record
from vkvtrain.evaluation.thinking import final_answer

WORDS = re.findall(
    r"\w+",
    "suppose triangle angle therefore sum integer prime even odd multiply divide square root equals positive negative "
    "point circle radius line segment case first second each both choose ways count total remainder modulo let be the "
    "of and a an is are that which so we have then thus because since with without",
)


def prose(seed, words=900):
    """Sentences of random words and numbers, with the entropy of real text."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) if rng.random() < 0.85 else str(rng.randrange(1000)) for _ in range(words))


def test_repetitions_of_tokens():
    assert ends_in_a_repetition([7] * 16)
    assert ends_in_a_repetition([1, 2, 3, *[4, 5, 6, 7] * 4])
    assert ends_in_a_repetition([9, *range(64)] + list(range(64)) * 3)
    assert ends_in_a_repetition([9, *range(500)] + list(range(500)) * 3)
    assert not ends_in_a_repetition([7] * 15)
    assert not ends_in_a_repetition([*[4, 5, 6, 7] * 4, 8])
    assert not ends_in_a_repetition(list(range(200)))
    assert not ends_in_a_repetition([*range(500)] * 3)
    assert not ends_in_a_repetition([])


@pytest.mark.parametrize("seed", range(5))
def test_ordinary_text_is_no_loop(seed):
    text = prose(seed)
    assert 1.5 < compression_ratio(text) < 4
    assert not is_looping(list(text.encode()), text)
    counting = ", ".join(map(str, range(1, 1200)))  # regular, but it goes somewhere
    assert not is_looping(list(counting.encode()), counting)


@pytest.mark.parametrize("seed", range(5))
def test_loops_that_vary_each_time_round_are_found(seed):
    rng = random.Random(seed)
    loop = "".join(
        f"Wait, let me check the case x = {rng.randrange(99)} again. That gives {rng.randrange(9999)}, which does not "
        "match the earlier result, so I should go back to the definition and try once more. "
        for _ in range(40)
    )
    tokens = list(loop.encode())
    assert not ends_in_a_repetition(tokens)
    assert compression_ratio(loop) >= 6
    assert is_looping(tokens, prose(seed) + loop)
    assert not is_looping(tokens, loop[:1000])  # too short to tell
    recovered = loop + prose(seed)
    assert not is_looping(list(recovered.encode()), recovered)  # it is how a generation ends that counts


def test_compression_of_nothing_and_of_broken_text():
    assert compression_ratio("") == 1
    assert compression_ratio("\ud800" * 2000) > 50


@pytest.mark.parametrize(
    ("response", "prompt", "think_end", "cut_off", "answer"),
    [
        ("so 4</think>\n\n\\boxed{4}", "", None, False, "\\boxed{4}"),
        ("a</think>b</think>c", "", None, False, "c"),  # the last one counts
        ("<think>so 4 \\boxed{4}", "", None, True, ""),
        ("<think>so 4 \\boxed{4}", "", None, False, ""),
        ("so 4 \\boxed{4}", "<|assistant|><think>\n", None, True, ""),  # the template opened the thinking
        ("so 4 \\boxed{4}", "<|assistant|><think>\n\n</think>\n\n", None, False, "so 4 \\boxed{4}"),  # thinking is off
        ("\\boxed{4}", "", None, True, "\\boxed{4}"),
        ("\\boxed{4}", "", "</think>", True, ""),  # a model that thinks was cut off
        ("\\boxed{4}", "", "</think>", False, "\\boxed{4}"),
        ("hm[/THINK]4", "", "[/THINK]", False, "4"),
        ("", "", None, False, ""),
        ("x</think>", "", None, False, ""),
    ],
)
def test_thinking_that_never_ended_is_no_answer(response, prompt, think_end, cut_off, answer):
    assert final_answer(response, prompt, think_end, cut_off) == answer


def test_a_record_says_whether_a_response_answered():
    done = generation_record([5, 6, 2], "x</think>4", "4", cut_off=False)
    assert (done["answered"], done["looping"], done["looping_or_cut_off"], done["tokens"]) == (True, False, False, 3)
    assert not generation_record([5, 6], "x</think>4", "4", cut_off=True)["answered"]
    assert not generation_record([5, 2], "<think>x", "", cut_off=False)["answered"]
    looped = generation_record([3] * 40, "a" * 40, "a" * 40, cut_off=True)
    assert looped["looping"]
    assert looped["repeated_ngram"]
    assert looped["looping_or_cut_off"]
