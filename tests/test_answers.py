"""Answers as people write them, right and wrong; bad golds; texts that must not take hours; docs/grading.md."""

import json
import re
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks.hendrycks_math.utils import is_equiv
from math_verify import parse, verify

from vkvtrain.evaluation import grading
from vkvtrain.evaluation.grading import last_boxed, same_expression, same_integer, same_letter
from vkvtrain.evaluation.tasks import FinalNumber

RIGHT = {
    "41": [
        r"\$41.00",
        "41 dollars",
        r"41.00 \text{ dollars}",
        "€41",
        "£41",
        r"41~\text{km}",
        r"\boldsymbol{41}",
        r"\text{\$}41",
        "**41**",
        "41 miles",
        "=41",
        "x = 41",
        "x=41.0",
        "−(-41)",
        r"41^\circ",
        "41°",
        r"\frac{82}{2}",
        "4.1e1",
        r"4.1 \times 10^1",
        "41.",
        "$41$",
        "41.0",
        r"\text{41 km}",
        r"\mathbf{41}",
        r"41\text{ km/h}",
        "41 km/h",
        r"41\ \mathrm{m/s}",
        "41 square feet",
        r"41 \text{ cm}^2",
        r"41\,\mathrm{cm}^{2}",
        "USD 41",
        r"US\$41",
        "41 USD",
        "Rs. 41",
        r"\text{Answer: }41",
        "Answer: 41",
        "about 41",
        r"\approx 41",
        "041",
        "+41",
        "{41}",
        r"\boxed{41}",
        "41",
        "41 apples",
        "41 more apples",
        r"\textbf{41}",
        "41 degrees",
        r"41^{\circ}\text{C}",
        "41 °C",
        r"41\%",
        r" 41 \\ ",
        r"\(41\)",
        r"\[41\]",
        "40+1",
        "6^2+5",
        r"41\text{m}",
        "41 m",
        r"41 \text{ m}^3",
        "`41`",
        r"\underline{41}",
        r"\dfrac{82}{2}",
        r"\left(41\right)",
        "41.000",
        r"x=\frac{82}{2}=41",
        r"\text{Total} = 41",
        r"41 \text{ (units)}",
        "41 cents",
        "41¢",
        "41 students per class",
        r"41 \, \frac{\text{km}}{\text{h}}",
        "41 %",
        r"\text{41}",
    ],
    "1350": [
        "1,350",
        "1{,}350",
        r"1\,350",
        "1 350",
        r"\$1,350.00",
        r"1,\!350",
        "1~350",
        r"1.35 \times 10^3",
        "1.35e3",
        "1350.00",
        "1'350",
    ],
    "1234567": ["1,234,567", "1 234 567", "1{,}234{,}567", r"1,\! 234,\! 567"],
    "3000000": ["3 million", r"3 \text{ million}", r"\$3 million"],
    "15": [r"15\%", "15%", "15 percent", r"15\text{ percent}", r"15 \text{ \%}", "15 percentage points"],
    "0.15": [r"15\%", "15/100"],
    r"\frac{3}{20}": [r"15\%"],
    r"15\%": ["15", "0.15", r"15\%"],
    "12.5": [r"12.5\%"],
    "1,-2": ["-2, 1", "-2 and 1", r"-2 \text{ and } 1", "x=1 or x=-2", r"\{1,-2\}", "x=1, x=-2", r"x \in \{1,-2\}"],
    "3, 5, 7": ["7,5,3"],
    r"1 \pm \sqrt{19}": [r"1+\sqrt{19}, 1-\sqrt{19}", r"1-\sqrt{19}\text{ and }1+\sqrt{19}", r"x = 1 \pm \sqrt{19}"],
    r"\{1\pm\sqrt{5},-2\}": [r"-2, 1+\sqrt5, 1-\sqrt5"],
    r"\text{(C)}": ["C", "(C)", r"\text{C}", "C."],
    r"\text{Evelyn}": ["Evelyn", "evelyn"],
    r"\text{east}": ["East.", r"\textbf{east}"],
    r"\text{ellipse}": ["an ellipse"],
    "3:45": ["3:45", r"3:45\text{ p.m.}"],
    "3:4": [r"\frac34", "6:8", "3 : 4"],
    r"\infty": [r"+\infty", "infinity"],
    r"-\infty": [r"-\infty"],
    "0": ["-0", "0.0"],
    "73": ["073"],
    "6-5i": ["-5i+6", r"6-5\mathrm{i}"],
    "6 - 5i": ["6-5 i"],
    "2i^2": ["-2"],
    r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}": [
        r"\begin{bmatrix} -\frac{1}{3} \\ \frac{2}{3} \\ \frac{5}{3} \end{bmatrix}"
    ],
    r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}": [r"\left[\begin{matrix}1\\2\end{matrix}\right]"],
    r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}": [r"\frac15\begin{pmatrix} 1 \\ -18 \end{pmatrix}"],
    "y = 2x + 3": ["2x+3", "y-2x=3", "2x - y + 3 = 0"],
    "x=5": ["5", "5 = x"],
    "5x - 7y + 11z + 4 = 0": ["-5x+7y-11z=4", "10x-14y+22z+8=0"],
    "52_8": ["52_{8}", r"52_{\text{eight}}", "(52)_8", r"52_{\text{8}}"],
    "4210_{5}": ["4210_5"],
    r"(5,\infty)": ["x > 5", "5 < x", r"\{x \mid x > 5\}"],
    "(-1,6)": ["-1 < x < 6", "6 > x > -1", r"x > -1 \text{ and } x < 6"],
    r"(-\infty, 0]": [r"y \le 0"],
    r"(-\infty, 2) \cup (3, \infty)": [r"x<2 \text{ or } x>3", "x>3 or x<2"],
    r"(-\infty,3)\cup(3,\infty)": [r"x \neq 3"],
    "x > 5": [r"(5,\infty)"],
    r"x \in [-2,7]": ["[-2,7]", r"-2 \leq x \leq 7"],
    "[-2,7]": [r"-2 \leq x \leq 7"],
    r"(-\infty,\infty)": [r"\mathbb{R}"],
    r"(0,9) \cup (9,36)": [r"(9,36)\cup(0,9)"],
    r"\left( 3, \frac{\pi}{2} \right)": [r"(3, \pi/2)"],
    "(3,4)": ["3, 4", "(x,y)=(3,4)", "x=3, y=4", r"\langle 3,4\rangle"],
    "(1,-16,-4,43)": ["(1, -16, -4, 43)"],
    "(3,4]": [r"\left(3,4\right]"],
    r"\frac{14}{3}": ["14/3"],
    r"137 \frac{1}{2}": ["137.5"],
    r"1\frac{4}{5}": ["1 4/5", "9/5", "1.8"],
    r"\frac13": ["0.333333"],
    "0.333333": [r"\frac13"],
    r"\pi": ["3.14159265"],
    "p - q": ["q^2 + p - q^2 - q"],
    r"2\sqrt3": [r"\sqrt{12}"],
    "(a+5)(b+2)": ["ab+2a+5b+10"],
    "x^3+3x-6": ["p(x) = x^3+3x-6"],
    "3R^2": ["3r^2"],
    "2k+2": ["2(k+1)"],
    r"\frac{11+9a}{20}": [r"\frac{11}{20}+\frac{9a}{20}"],
    r"\cot x": [r"\frac{\cos x}{\sin x}"],
    r"\frac{20000}{\pi}": [r"20000/\pi"],
    r"11\sqrt5+11": [r"11(1+\sqrt{5})"],
    "6": ["2(3)", "(2)(3)"],
    "20": [r"2\binom{5}{2}"],
    "3": [r"\log_2(8)", r"\log_{2}(8)", r"\log_2 8"],
    r"10,\!080": ["10080"],
    r"11,\! 111,\! 111,\! 100": ["11111111100"],
    r"\$32,\!348": ["32,348"],
    "58,500": ["58500"],
    r"\$18.90": ["18.9"],
    r"864 \mbox{ inches}^2": ["864"],
    r"5.4 \text{ cents}": ["5.4"],
    r"\frac{270}7\text{ degrees}": [r"\frac{270}{7}^\circ"],
    r"15\mbox{ cm}^2": [r"15 \text{ cm}^2"],
    ".0000672": [r"6.72 \times 10^{-5}"],
    r"3\sqrt{13}": [r"3\sqrt{13}\text{ cm}"],
    r"288 \pi": [r"288\pi \text{ cubic inches}"],
    r"12\pi": [r"12\pi square cm"],
    "2^{-70}": [r"\frac{1}{2^{70}}"],
    "2^{2^{99}}": ["2^{2^{99}}"],
    "10000!": ["10000!", r"10000 \cdot 9999!"],
    "0.000001": ["10^{-6}", "10^-6"],
    "x^5 - x^4 + x^3 - x^2 + x - 1": ["(x-1)(x^4+x^2+1)"],
    r"\frac{1}{2}": [".5", r"\frac12 \text{ cm}"],
    "326.5": [r"\frac{653}{2}"],
    r"10\sqrt{5}": [r"10\sqrt5 \approx 22.36"],
    "22.36": [r"10\sqrt5 \approx 22.36"],
    "xy": ["yx"],
    "abc": ["cab"],
    r"\sqrt[3]{2}": ["2^{1/3}"],
    r"\emptyset": [r"\varnothing"],
    "2": ["2.0"],
    r"\text{no solution}": ["no solution"],
    "(-2,1)": ["(-2.0, 1)"],
    "2ab": ["2 a b"],
    "2k": ["2k"],
    "x < 5": ["5 > x"],
    r"2x+3y \le 6": [r"6 \ge 2x+3y"],
    r"\sqrt{2}+\sqrt{3}": [r"\sqrt{5+2\sqrt6}"],
    "May 5, 2024": ["May 5, 2024"],
    r"\text{May 5}": ["May 5"],
    "5": [r"\{5\}"],
    "even": [r"\text{Even}"],
    "1/2": [r"50\%"],
    "e^2": [r"\mathrm{e}^2"],
    "n!": ["n!"],
    "f(x)=2x": ["2x"],
    r"(2,12) \cup (12,102)": [r"(2,12) \cup (12,102)"],
}
"""Answers that are a gold, by gold."""

RIGHT |= {
    r"\frac{1}{3}": [r"0.\overline{3}", r".\bar{3}", r"33.3333333\%"],
    r"-\frac{1}{6}": [r"-0.1\overline{6}"],
    r"\text{Tuesday}": ["tuesday", r"\text{Tuesday.}"],
    "2500000": ["2.5 million"],
    "-\\frac{3}{2}": ["-1 1/2", "-1.5", r"-1\frac12"],
    "3,-3": [r"\pm 3", r"x=\pm 3"],
    "x^2+y^2=4": ["y^2+x^2=4", "x^2+y^2-4=0", "2x^2+2y^2=8"],
    "x=1,y=2": ["x=1, y=2", "y = 2, x = 1"],
    "[1,2)": [r"1 \le x < 2"],
    r"(-\infty,0)\cup(0,\infty)": [r"x \ne 0"],
    "-1": ["−1", "(-1)"],
    "17": [r"\color{red}{17}", r"\large 17", r"m+n = 17", "17 sq. ft.", r"17 \; \text{m/s}^2", "17¢"],
}
WRONG = {
    "41": [
        r"\$41.50",
        "41 or 42",
        "41, 42",
        r"\$141",
        "4.1",
        "-41",
        "41 and 42",
        r"41 \text{ or } 42",
        "42",
        "41x",
        "41_8",
        "41_{16}",
        "41 million",
        r"41\text{ thousand}",
        "41-42",
        "41–42",
        "40",
        "at least 41",
        "41 to 42",
        "not 41",
        "41/2",
        r"\frac{41}{2}",
        "41 1/2",
        "x > 41",
        r"x \ge 41",
        "41.0000001",
        "41!",
        r"\sqrt{41}",
        "|42|",
        "(41,42)",
        "41.4",
        r"\pm 41",
        "4 1",
        "41 + x",
        "41:42",
        "fortyone",
        "1/41",
        "0.41",
        "41e5",
        "41^2",
        "41 squared",
        "between 41 and 42",
        "41 or more",
        r"410\%",
        r"4100\%",
        "41 dozen",
        "41 and a half",
        "A = 42",
        "2x - 82 = 0",
        "42 = 41",
        "41 = 42",
        "41, 41",
    ],
    "1010": ["1010_2"],
    "1010_2": ["1010", "10"],
    "10": ["1010_2"],
    "52_8": ["52_9", "42"],
    "15": [r"15.5\%", "0.15"],
    "0.15": ["15"],
    "7": ["7 0 1"],
    r"\frac{1}{2^{70}}": [r"\frac{1}{2^{71}}", "0"],
    r"\frac{1}{12!}": [r"\frac{1}{13!}"],
    "0": ["5x - 7y + 4 = 0", r"\frac{1}{2^{70}}", "e^{-200}", "1/0"],
    "(0,0)": [r"(0,\frac{1}{2^{70}})"],
    r"\{1,2^{-70}\}": [r"\{1,2^{-71}\}"],
    r"\frac{x}{2^{70}}": [r"\frac{x}{2^{71}}"],
    "e^{-100}": ["e^{-101}"],
    r"\frac{\sqrt2}{2^{70}}": [r"\frac{\sqrt3}{2^{70}}"],
    "1": ["1+2^{-80}", "1/0"],
    r"\begin{pmatrix} 0\\1\end{pmatrix}": [r"\begin{pmatrix} 2^{-70}\\1\end{pmatrix}"],
    "(0,1)": ["2^{-70} < x < 1"],
    r"\frac{1}{2004!}": [r"\frac{1}{2006!}"],
    "10000!": ["10001!"],
    "2^{2^{99}}": ["2^{2^{98}}"],
    r"1.6 \times 10^{-19}": ["0", r"1.7 \times 10^{-19}"],
    "x=2^{-70}": ["x=2^{-71}"],
    "1000000": ["1000000.1"],
    "58500": ["58500.01"],
    r"\frac13": ["0.33"],
    r"\pi": ["3.14"],
    r"\frac{14}{3}": ["4.67"],
    r"90^\circ": [r"\frac{\pi}{2}"],
    "(3,4)": ["(4,3)", "[3,4]", r"\{3,4\}", "3", "4, 3", "3 or 4"],
    r"\{3,4\}": ["(3,4)"],
    "(3,4]": ["[3,4]"],
    "-2,1": ["(-2,1)"],
    "1,-2": ["1", "1,-2,3", "1,2"],
    r"(5,\infty)": [r"x \ge 5", "x<5", "2x>10", "5"],
    "(-1,6)": [r"-1 \le x < 6", "-1 < x"],
    "x>5": ["y>5", "5"],
    "x > 5": [r"x \ge 5"],
    "3:45": ["1:15"],
    "3:45 p.m.": ["3:45 a.m."],
    "3:4": ["4:3", "4/3"],
    r"\text{east}": ["west", "seat"],
    r"\text{Evelyn}": ["Eve"],
    r"\text{(C)}": ["D", "C or D", "(C) and (D)"],
    r"\infty": [r"-\infty"],
    "6-5i": ["6+5i"],
    "x=5": ["y=5", "6"],
    "y=2x+3": ["y=2x+4"],
    "p-q": ["q-p"],
    "2k": ["2"],
    "2": ["2k", r"\text{two or three}"],
    "5m": ["5"],
    "xy": ["x+y"],
    r"\frac{1}{2}": [r"\frac{1}{"],
    "3": ["3.5"],
    r"\text{no}": [r"\text{yes}"],
    "5x - 7y + 11z + 4 = 0": ["5x - 7y + 11z + 5 = 0", "0"],
    "x<5": ["x>5"],
    r"\sqrt{x^2}": ["x"],
    "100,200": ["200,100"],
}
"""Answers that are not."""

WRONG |= {
    "17": [
        "> 17",
        "< 17",
        r"\geq 17",
        "≠17",
        r"17\ldots",
        "17…",
        "17 hours and 5 minutes",
        r"17\pm 1",
        "17 - 20",
        r"17 \text{ if } x>0",
    ],
    "yes": ["yes and no", "no"],
    r"\pm 3": ["3", "-3"],
    "x=1,y=2": ["x=2, y=1"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"],
    r"0.\overline{3}": ["0.3", "3"],
    "1.5": ["1.5 million"],
    "[1,2)": ["x=1, y=2", "1, 2", "(1,2)", "1 < x < 2"],
}
LETTERS = [
    "C",
    "(C)",
    "[C]",
    r"\text{C}",
    r"\text{(C)}",
    "C) 4 eV",
    "C.",
    "$C$",
    "C: 12",
    "option C",
    "Option (C)",
    r"\text{Option C}",
    "**C**",
    r"\textbf{(C) } 12",
    "C. 12",
    r"\mathrm{C}",
    r"\boxed{C}",
    "(C) Compounds A and B",
    "Answer: C",
    r"\text{C) } 4",
    "{C}",
    r"\mathbf{(C)}",
    "C)",
    "choice C",
    r"(C) $A=\pi r^2$",
]
NO_LETTERS = [
    "C and D",
    "C or D",
    "(C) or (D)",
    "C, D",
    "C/D",
    r"C=\pi r^2",
    "C = 12",
    "C_2",
    "C^2",
    "Carbon",
    "c",
    "4 eV",
    "AC",
    "CD",
    "C) 4 eV or D) 5 eV",
    "(C), (D)",
    "(C)(D)",
    r"C \text{ and } D",
    r"\text{C or D}",
    "C+D",
    "C - 4",
    "the answer is C",
    "C & D",
    "not C",
    "C; D",
    "A and C",
    "C'",
    "C:D",
    "C2",
    "C4 eV",
    "C D",
    r"\text{C and D}",
    r"C \cdot 2",
]
ENDLESS = (
    "2^{2^{99}}", "9^{9^{9^{9}}}", "(10^9)!", "((5!)!)!", "1/0", "0^{-1}", "(" * 400, r"\binom{10^9}{10^8}",
    r"\prod_{k=1}^{10^{9}} k", "1" * 900, "1.0e999999999", "1.0000001^{1000000000}", r"\sin(10^{10^{10}})",
    "e^{e^{e^{e^{e}}}}", "(x+1)^{100000}", "a" * 900, "$" * 900, "41 " * 300, "\\text{" * 100 + "a" + "}" * 100,
    "=" * 500, "-" * 500 + "1", r"10^{-10^{10}}", "1:" * 300, "cm " * 300, "41 " + "cm " * 240,
)  # fmt: skip
"""Texts that evaluation, simplification or a regular expression could spend hours on."""
DOCUMENT = Path(__file__).parents[1] / "docs/grading.md"
ROWS = [
    tuple(cell.strip().strip("`") for cell in line.strip("|").split("|")[:5])
    for line in DOCUMENT.read_text().splitlines()
    if line.startswith("| `")
]


@pytest.mark.parametrize("gold", RIGHT)
def test_everyday_writing_is_right(gold):
    assert [answer for answer in RIGHT[gold] if not same_expression(answer, gold)] == []


@pytest.mark.parametrize("gold", WRONG)
def test_other_answers_are_wrong(gold):
    assert [answer for answer in WRONG[gold] if same_expression(answer, gold)] == []


def test_integers_are_graded_as_expressions_are():
    assert [answer for answer in RIGHT["41"] if not same_integer(answer, 41)] == []
    assert [answer for answer in WRONG["41"] if same_integer(answer, "41")] == []


def test_golds_differ_from_one_another():
    golds = [gold for gold in RIGHT if gold not in ("1,-2", "2", "e^2")]
    equal = {(one, other) for one in golds for other in golds if one != other and same_expression(other, one)}
    expected = {
        ("0.15", r"\frac{3}{20}"), ("0.15", r"15\%"), ("15", r"15\%"), (r"\frac{1}{2}", "1/2"), ("p - q", "p-q"),
        (r"1\frac{4}{5}", "1.8"), (r"\frac13", "0.333333"), ("x > 5", r"(5,\infty)"), (r"\frac{3}{20}", r"15\%"),
        ("6-5i", "6 - 5i"), (r"x \in [-2,7]", "[-2,7]"), (r"\text{even}", "even"),
            ("5", "x=5"), (r"\frac13", r"\frac{1}{3}"), ("0.333333", r"\frac{1}{3}"),
            (r"15\%", r"15\mbox{ cm}^2"), ("15", r"15\mbox{ cm}^2"),
    }  # fmt: skip
    assert {frozenset(pair) for pair in equal} <= {frozenset(pair) for pair in expected}


@pytest.mark.parametrize("answer", LETTERS)
def test_one_option_is_named(answer):
    assert [letter for letter in "ABCD" if same_letter(answer, letter)] == ["C"]


@pytest.mark.parametrize("answer", NO_LETTERS)
def test_hedges_and_formulas_name_no_option(answer):
    assert not same_letter(answer, "C")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{41} or \boxed{42}", "41 or 42"),
        (r"$\boxed{1}$, $\boxed{-2}$", "1 and -2"),
        (r"\boxed{1} \text{ and } \boxed{2}", "1 and 2"),
        (r"\boxed{41}, that is \boxed{42}", "42"),
        (r"\boxed{41}. So, \boxed{41}", "41"),
        (r"\boxed{41}, \boxed{41}", "41"),
    ],
)
def test_boxes_of_one_answer(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize("gold", ["5", r"\frac{x+1}{2}", r"(3,\infty)", r"\text{east}"])
def test_no_answer_takes_longer_than_the_limit(gold):
    for answer in ENDLESS:
        began = time.process_time()
        assert not same_expression(answer, gold), answer
        assert time.process_time() - began < 8, answer


def test_huge_numbers_are_equal_as_they_are_written():
    assert same_expression("2^{2^{99}}", "2^{2^{99}}")
    assert same_expression(r"2^{2^{98+1}}", "2^{2^{99}}")
    assert not same_expression("2^{2^{98}}", "2^{2^{99}}")


def test_a_thread_is_told_where_to_grade():
    raised = []

    def grade():
        try:
            same_expression("1", "1")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=grade)
    thread.start()
    thread.join()
    assert raised == ["answers are graded in the main thread: grading sets an alarm"]


@given(st.integers(-(10**12), 10**12), st.integers(0, 4), st.sampled_from([1, -1, 2, 10**6]))
def test_numbers_equal_themselves_alone(gold, decimals, step):
    written = f"{gold / 10**decimals:.{decimals}f}" if abs(gold) < 10**9 else str(gold)
    assert same_expression(rf"\text{{about }} {written} \text{{ km}}", written)
    assert not same_expression(str(gold + step), str(gold))
    assert same_integer(f"{gold:,}".replace(",", r"\,"), gold)


@pytest.mark.parametrize(("gold", "answer", "here", "math_verify", "lm_eval"), ROWS)
def test_the_document_says_how_graders_differ(gold, answer, here, math_verify, lm_eval):
    says = {True: "yes", False: "no"}
    assert says[same_expression(answer, gold)] == here
    assert says[bool(verify(parse(f"\\boxed{{{gold}}}"), parse(f"\\boxed{{{answer}}}")))] == math_verify
    assert says[is_equiv(answer, gold)] == lm_eval


def test_the_document_has_a_table():
    assert len(ROWS) > 20


@pytest.mark.parametrize(
    ("read", "gold", "says"),
    [
        (grading.integer_gold, "2.5", "must be an integer in digits, got '2.5'"),
        (grading.integer_gold, "$1200", "must be an integer"),
        (grading.integer_gold, 2.0**60, "must be an integer"),
        (grading.integer_gold, float("nan"), "must be an integer"),
        (grading.integer_gold, None, "must be an integer"),
        (grading.integer_gold, True, "must be an integer"),
        (grading.expression_gold, "", "must be text or a number"),
        (grading.expression_gold, None, "must be text or a number"),
        (grading.expression_gold, ["1"], "must be text or a number"),
        (grading.expression_gold, float("nan"), "must be text or a number"),
        (grading.expression_gold, r"\frac{1}{0}", "cannot be read as mathematics or words"),
        (grading.expression_gold, "x" * 1001, "cannot be read as mathematics or words"),
        (grading.letter_gold, "(C)", "capital letter"),
        (grading.letter_gold, "AB", "capital letter"),
        (grading.text_gold, "", "must be text"),
        (grading.text_gold, "$5", "must be text without what wraps"),
    ],
)
def test_bad_golds_are_refused(read, gold, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        read(gold)


@pytest.mark.parametrize(
    ("gold", "digits"),
    [("1,200", "1200"), ("004", "4"), (4.0, "4"), ("9007199254740993", "9007199254740993"), (-3, "-3")],
)
def test_integer_golds(gold, digits):
    assert grading.integer_gold(gold) == digits


@pytest.mark.parametrize("gold", ["2.5", "$1200", "n/a", "4 apples", ""])
def test_a_gold_of_gsm8k_is_refused_with_its_line(gold, tmp_path):
    rows = [{"question": "?", "answer": f"So\n#### {one}"} for one in ("9007199254740993", gold)]
    (tmp_path / "some.jsonl").write_text("\n\n".join(json.dumps(row) for row in rows))
    config = {
        "task": "vkv_gsm8k", "test_split": "test", "output_type": "generate_until", "num_fewshot": 0,
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "metadata": {"data": str(tmp_path / "some.jsonl")}, "generation_kwargs": {"until": []},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"some.jsonl, line 3: the answer must be an integer in digits"):
        FinalNumber(config)
