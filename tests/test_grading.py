"""Grading: right answers in many forms, wrong ones, and texts that no parser should see."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vkvtrain.evaluation.grading import last_boxed, same_expression, same_integer, same_letter, same_text


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{70}.", "70"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{a}{b}} done", r"\frac{a}{b}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed {3}", "3"),
        (r"\fbox{3}", "3"),
        (r"\boxed{ }", ""),
        (r"\boxed{1} and then \boxed{\frac{1}{2", None),  # the last one was cut off
        (r"boxed{4}", None),
        (r"\boxed{5\\", None),
        ("", None),
    ],
)
def test_the_last_box_counts(text, content):
    assert last_boxed(text) == content


RIGHT = (
    "70",
    "070",
    "70.0",
    "70.",
    "$70$",
    r"\text{70}",
    r"70^\circ",
    "x = 70",
    r"\frac{140}{2}",
    "+70",
    r"\mathbf{70}",
)
WRONG = ("", "7", "-70", "69.9999999", "70.0000001", "seventy", "170", "7 0 1", "70, 71", r"\frac{70}{", "{" * 600)


@pytest.mark.parametrize("answer", RIGHT)
def test_integers_in_many_forms(answer):
    assert same_integer(answer, 70)


@pytest.mark.parametrize("answer", WRONG)
def test_other_answers_are_wrong(answer):
    assert not same_integer(answer, 70)
    assert not same_integer(None, 70)


def test_thousands():
    assert same_integer("1,234,567", 1234567)
    assert same_integer("1{,}234", "1234")
    assert same_integer(r"1\,234", 1234)
    assert not same_integer("1,23", 123)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("14/3", r"\frac{14}{3}"),
        (r"(3, \pi/2)", r"\left( 3, \frac{\pi}{2} \right)"),
        ("q^2 + p - q^2 - q", "p - q"),
        ("Evelyn", r"\text{Evelyn}"),
        (r"2\sqrt{3}", r"\sqrt{12}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        ("137.5", r"137 \frac{1}{2}"),
        ("[-2, 7]", r"x \in [-2,7]"),
    ],
)
def test_equal_expressions(answer, gold):
    assert same_expression(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("15/3", r"\frac{14}{3}"), (r"(3, \pi)", r"(3, \frac{\pi}{2})"), ("p + q", "p - q"), ("Eve", r"\text{Evelyn}"),
     ("(-2, 7)", "[-2, 7]"), ("", "1"), ("3.5", "3"), (r"\frac{1}{", r"\frac{1}{2}"), (None, "1")],
)  # fmt: skip
def test_unequal_expressions(answer, gold):
    assert not same_expression(answer, gold)


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "(10^9)!", r"\frac{" * 150, "x^{" * 150])
def test_answers_that_would_take_forever_are_wrong_after_seconds(answer):
    began = time.monotonic()
    assert not same_expression(answer, "5")
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("answer", ["C", "(C)", "[C]", r"\text{C}", r"\text{(C)}", "C) 4 eV", "C.", "$C$"])
def test_letters(answer):
    assert same_letter(answer, "C")
    assert not same_letter(answer, "A")


@pytest.mark.parametrize("answer", ["", None, "c", "Carbon", "the answer is C", "4 eV", "AC"])
def test_what_names_no_option_is_wrong(answer):
    assert not any(same_letter(answer, letter) for letter in "ABCD")


def test_texts_are_compared_exactly():
    assert same_text(r"\text{04821}", "04821")
    assert not same_text("4821", "04821")
    assert not same_text(None, "")


FRAGMENTS = st.sampled_from(
    [r"\boxed{", "{", "}", r"\frac", r"\text{", "$", "7", "12", "-", ".", ",", "^", "_", "\\", r"\{", "x", "=", " ",
     "(", ")", r"\left(", r"\sqrt", r"\pi", "</think>", "\n", "%", "é", "０", "\x00", "\ud800"]
)  # fmt: skip
MESS = st.one_of(st.text(max_size=40), st.lists(FRAGMENTS, max_size=16).map("".join))


@settings(max_examples=150)
@given(MESS)
def test_no_text_raises(text):
    box = last_boxed(text)
    for answer in (text, box):
        for same, gold in (
            (same_integer, "70"),
            (same_expression, r"\frac{1}{2}"),
            (same_letter, "B"),
            (same_text, "1"),
        ):
            assert same(answer, gold) in (True, False)


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers_equal_themselves_alone(gold, other):
    assert same_integer(last_boxed(rf"therefore \boxed{{{gold}}}"), gold)
    assert same_integer(f"{other:,}", gold) == (other == gold)
