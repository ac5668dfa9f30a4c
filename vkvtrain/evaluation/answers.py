r"""What the text of a final answer says: boxes, what is written around an answer, its words, units, numbers and parts.

Knows nothing of mathematics, and imports none of its libraries.
"""

import re
from collections.abc import Iterator

WORDS = "\ue000\ue001"
"""Around words in a plain text (`\\text{...}` in LaTeX): private characters, which no answer holds."""
AND, OR = "\ue002", "\ue003"
"""The words between the parts of an answer."""
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
"""Words that multiply a number, by a power of ten."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BETWEEN = re.compile(r"(?:[\s$.*]|\\[()\[\]]|\\(?:text|mbox)\s*\{\s*(?:and|or|,)\s*\}|\\quad|,|;|\band\b|\bor\b)*")
_SEPARATES = re.compile(r"[,;]|\band\b|\bor\b")
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ",
    "θ": r"\theta ", "∞": r"\infty ", "√": r"\sqrt ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ",
    "∈": r"\in ", "∪": r"\cup ", "±": r"\pm ", "°": r"^\circ ", "²": "^2", "³": "^3", "％": "%", "’": "'",
    "½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "∅": r"\emptyset ", "…": r"\ldots ",
}  # fmt: skip
_SPACES = "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000\n\t\r"
_PRIVATE = str.maketrans("", "", "\ue000\ue001\ue002\ue003\u200b\ufeff")
_TO_PLAIN = str.maketrans(_CHARACTERS | dict.fromkeys(_SPACES, " "))
_REWRITTEN = tuple(
    (re.compile(pattern), written)
    for pattern, written in (
        (r"\\(?:left|right|m?left|m?right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
        (r",\s*\\!\s*", ","),
        (r"\\!|\\(?:displaystyle|textstyle|limits|nolimits|large|Large|huge)(?![a-zA-Z])", ""),
        (r"\\(?:text)?color\s*\{[^{}]*\}", ""),
        (r"(?<!\\)\\[,;:> ]|~|\\(?:quad|qquad|thinspace|enspace|medspace)(?![a-zA-Z])|\\hspace\*?\{[^{}]*\}", " "),
        (r"(?<!\\)\\[()]|(?<!\\)\\\[(?!.*\\cr)|(?<!\\)\\\]", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:lbrace|\{)", r"\\{"),
        (r"\\(?:rbrace|\})", r"\\}"),
        (r"\\(?:leqslant|leq|leqq)(?![a-zA-Z])", r"\\le "),
        (r"\\(?:geqslant|geq|geqq)(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\simeq(?![a-zA-Z])|\\cong(?![a-zA-Z])", r"\\approx "),
        (r"\\varnothing(?![a-zA-Z])", r"\\emptyset "),
        (r"\\ast(?![a-zA-Z])", "*"),
        (r"\\?[%]", r"\\%"),
        (r"\\?\$", " "),
        (r"(?<![A-Za-z\\])infinity(?![A-Za-z])", r"\\infty "),
        (r"¢|€|£|¥|₹|₩|₽|\\(?:euro|pounds|textdollar|texteuro)(?![a-zA-Z])(?:\{\})?", " "),
        (r"\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
    )
)
_DEGREES = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|\^\s*\{\s*\\degree\s*\}|\\degrees?)(?:\s*\\(?:text|mathrm)\s*\{\s*[CF]\s*\}|\s*[CF](?![A-Za-z]))?"
)
_COMMAND = re.compile(
    r"\\(text(?:bf|it|rm|sf|tt|normal|up)?|mbox|hbox|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|emph|underline|boxed|fbox)"
    r"\s*\{([^{}]*)\}"
)
_UNIT = re.compile(r"[A-Za-z]+(?:[ ./][A-Za-z]+)*")
_WHOLE = re.compile(r"\\(?:boxed|fbox|boldsymbol|bm|mathbf|underline)\s*\{")
_ENCLOSED = re.compile(r"(\*\*|\*|__|`|\$\$|\$)(.+)\1", re.DOTALL)
_JOINED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d])")
_BRACED_COMMA = re.compile(r"(?<=\d)\{\s*,\s*\}(?=\d)")
_E_NOTATION = re.compile(r"(?<![A-Za-z\d.\\])(\d+(?:\.\d+)?|\.\d+)[eE]([+-]?\d+)(?![A-Za-z\d])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\ue000[^\ue001]*\ue001|.", re.DOTALL)
_OPENING = {"(", "[", "{", r"\{", r"\langle", r"\begin"}
_CLOSING = {")", "]", "}", r"\}", r"\rangle", r"\end"}


def last_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{...}`; None if there is none or its braces are not balanced.

    Boxes with nothing but a comma, "and" or "or" between them are one answer of several parts, `\boxed{1} or \boxed{2}`
    is `1 or 2`; otherwise what stands in the last box replaces what stands in an earlier one.
    """
    openings = list(_BOX.finditer(text))
    if not openings or (end := _end_of_group(text, openings[-1].end())) is None:
        return None
    content, start = text[openings[-1].end() : end].strip(), openings[-1].start()
    for opening in reversed(openings[:-1]):
        end = _end_of_group(text, opening.end())
        between = text[end + 1 : start] if end is not None and end < start else ""
        if not (_SEPARATES.search(between) and _BETWEEN.fullmatch(between)):
            break
        earlier = text[opening.end() : end].strip()
        if earlier != content:
            content = f"{earlier} {'or' if 'or' in between else 'and'} {content}"
        start = opening.start()
    return content


def _end_of_group(text: str, place: int) -> int | None:
    """Place of the brace that closes the group which is open at `place`."""
    depth = 1
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1  # what follows is escaped
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
        place += 1
    return None


def plain(answer: str) -> str:
    r"""An answer in one writing: without what wraps it, currency and degree signs, sizes of brackets and spaces.

    What is left of LaTeX is mathematics. Words stand between the characters of `WORDS`, and the words between the parts
    of an answer are `AND` and `OR`.
    """
    text = answer.translate(_PRIVATE).translate(_TO_PLAIN).strip()
    while (inner := _ENCLOSED.fullmatch(text)) or (inner := _WHOLE.match(text)):
        if inner.re is _WHOLE and _end_of_group(text, inner.end()) != len(text) - 1:
            break
        text = (text[inner.end() : -1] if inner.re is _WHOLE else inner[2]).strip()
    if "matrix" not in text and "array" not in text:
        text = re.sub(r"\\\\(?=[a-zA-Z{}])", r"\\", text)  # a command that was escaped twice
    for pattern, written in _REWRITTEN:
        text = pattern.sub(written, text)
    text = _DEGREES.sub(" ", text)
    while (inner := _COMMAND.sub(_without_command, text)) != text:
        text = inner
    text = re.sub(r"(?<![A-Za-z\\])(,?\s*)(and|or)(?![A-Za-z])(?![^\ue000]*\ue001)", _word_between, text)
    text = re.sub(r"\\(?:lor|vee)(?![a-zA-Z])", OR, re.sub(r"\\(?:land|wedge)(?![a-zA-Z])", AND, text))
    text = _BRACED_COMMA.sub(lambda comma: "" if re.match(r"\d{3}(?!\d)", text[comma.end() :]) else ".", text)
    text = _JOINED.sub(lambda number: number[0].replace(" ", ""), re.sub(r"\s+", " ", text))
    text = _E_NOTATION.sub(r"\1\\cdot 10^{\2}", _TIMES_TEN.sub(r"\\times ", text))
    text = re.sub(r"\^\s*([+-]\d+)", r"^{\1}", text.replace("**", "^"))
    return _without_braces(text)


def _without_command(command: re.Match[str]) -> str:
    """What a command of text or of a font wraps, as words if it is words."""
    name, content = command[1], " ".join(command[2].split())
    if re.fullmatch(r",?\s*(?:and|or)\s*,?", content):
        return OR if "or" in content else AND
    letters = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", "", content))
    wraps_mathematics = name in ("boxed", "fbox", "boldsymbol", "bm", "underline") or "math" in name
    is_symbol = len(content) == 1 and (name != "mathrm" or content in "iejd")
    if not letters or WORDS[0] in content or (wraps_mathematics and (is_symbol or not _UNIT.fullmatch(content))):
        return f" {content} "
    return f" {WORDS[0]}{content}{WORDS[1]} "


def _word_between(word: re.Match[str]) -> str:
    return OR if word[2] == "or" else AND


def _without_braces(text: str) -> str:
    """Without the period that ends a sentence, and without a group around the whole."""
    while True:
        text = text.strip().rstrip("\\").rstrip(".,;:").strip()
        if not (text.startswith("{") and _end_of_group(text, 1) == len(text) - 1):
            return text
        text = text[1:-1]


def without_words(text: str) -> str:
    """A plain text whose words are unmarked, lower-cased and without articles."""
    bare = re.sub(f"[{WORDS}]", " ", text).replace(AND, " and ").replace(OR, " or ").replace("\\%", "%")
    return re.sub(r"^(?:an?|the) ", "", " ".join(bare.casefold().split())).rstrip(".")


def depth(text: str) -> int:
    """Most brackets that are open at once."""
    return max((level for _, level in _levels(text)), default=0)


def _levels(text: str) -> Iterator[tuple[str, int]]:
    """The tokens of a plain text, each with the number of brackets that are open around it."""
    level = 0
    for token in _TOKEN.findall(text):
        if token in _CLOSING:
            level = max(level - 1, 0)
        yield token, level
        if token in _OPENING:
            level += 1


def split(text: str, separators: frozenset[str]) -> tuple[list[str], list[str]]:
    """(parts, separators between them) of a plain text; separators inside of brackets separate nothing."""
    parts, between = [""], []
    for token, level in _levels(text):
        if level == 0 and token in separators:
            between.append(token)
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts], between


def bracketed(text: str) -> tuple[str, str, str] | None:
    """(opening, content, closing) if brackets stand around the whole of a plain text."""
    tokens = list(_levels(text))
    if len(tokens) < 2 or tokens[0][0] not in _OPENING - {r"\begin"} or tokens[-1][0] not in _CLOSING - {r"\end"}:
        return None
    if any(level == 0 for _, level in tokens[1:-1]):
        return None
    return tokens[0][0], "".join(token for token, _ in tokens[1:-1]).strip(), tokens[-1][0]
