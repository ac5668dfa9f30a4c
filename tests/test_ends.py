"""Where turns, thoughts and answers end: the same for rows, generation, evaluation, chat and what is published."""

import pytest
from chat_templates import TEMPLATES, chat_tokenizer
from tokenizers import processors
from transformers import GenerationConfig

from vkvtrain.chat import Conversation
from vkvtrain.chat_templates import check_arguments
from vkvtrain.config import EvictionConfig
from vkvtrain.ends import Thoughts, encode, end_tokens, opened_by_prompt, stop_at, thought_end, thought_start, turn_end
from vkvtrain.evaluation.thinking import divided, final_answer
from vkvtrain.generation.requests import Request
from vkvtrain.generation.stops import Stops
from vkvtrain.loading import Loaded
from vkvtrain.training.data.rows import Example
from vkvtrain.training.data.templates import tokenise
from vkvtrain.training.settings import DataSettings

ASK = ({"role": "user", "content": "3+4?"},)
LLAMA3 = (
    "{{- bos_token }}{% for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
COHERE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' "
    "+ '<|END_OF_TURN_TOKEN|>' }}{% else %}{{ '<|USER|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|START_RESPONSE|>' }}{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)
REFUSES = "{% if messages | length > 1 %}{{ raise_exception('one message only') }}{% endif %}{{ messages[0].content }}"


def made(template, *special, eos="<eos>"):
    tokenizer = chat_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    if eos != "<eos>":
        tokenizer.add_special_tokens({"eos_token": eos}) if eos else setattr(tokenizer, "eos_token", None)
    tokenizer.chat_template = template
    return tokenizer


def families():
    """(tokenizer, end tokens of the generation configuration, what a response is trained to end with)"""
    return {
        "llama3": (
            made(LLAMA3, "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_header_id|>", eos="<|end_of_text|>"),
            ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"], "<|eot_id|>",
        ),
        "gemma": (made(GEMMA, "<start_of_turn>", "<end_of_turn>"), ["<eos>", "<end_of_turn>"], "<end_of_turn>"),
        "mistral": (made(MISTRAL, "[INST]", "[/INST]", eos="</s>"), ["</s>"], "</s>"),
        "chatml on a base": (made(TEMPLATES["qwen3"], "<|im_start|>", "<|im_end|>"), ["<eos>"], "<|im_end|>"),
        "phi4": (chat_tokenizer("phi4"), ["<|end|>", "<eos>"], "<|end|>"),
        "phi4, one end configured": (chat_tokenizer("phi4"), ["<eos>"], "<|end|>"),
        "cohere": (
            made(COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|USER|>", "<|END_OF_TURN_TOKEN|>"),
            ["<|END_OF_TURN_TOKEN|>"], "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ),
        "cohere, nothing configured": (
            made(COHERE, "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|USER|>", "<|END_OF_TURN_TOKEN|>", eos=None), None,
            "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ),
        "gpt_oss": (chat_tokenizer("gpt_oss"), ["<|return|>"], "<|return|>"),
        "no special token": (made(PLAIN), None, "<eos>"),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(families()))
def test_rows_end_where_generation_stops(name):
    tokenizer, configured, end = families()[name]
    ids = None if configured is None else tokenizer.convert_tokens_to_ids(configured)
    stops = end_tokens(tokenizer, GenerationConfig(eos_token_id=ids))
    settings = DataSettings(source="x", response="rendered" if name == "gpt_oss" else "written")
    (row,) = tokenise([Example(ASK, "7", "row 1")], tokenizer, settings, ids or ())
    assert tokenizer.decode(row.input_ids[row.prompt_length :]).endswith("7" + end)
    assert row.input_ids[-1] in stops
    assert not stops & set(row.input_ids[row.prompt_length : -1])  # so that generation gives the whole response
    assert stops >= set(ids or ())
    if name != "no special token" and tokenizer.eos_token_id is not None:
        assert tokenizer.eos_token_id in stops
    written = tokenizer.decode(row.input_ids[row.prompt_length :])
    for part in {written, written.removesuffix("<|END_OF_TURN_TOKEN|>")}:  # an end that is written out, or half of it
        (again,) = tokenise(
            [Example(ASK, part.removeprefix(written.partition("7")[0]), "row 1")], tokenizer, settings, ids or ()
        )
        assert again == row


def test_a_message_within_a_turn_of_gpt_oss_ends_nothing():
    tokenizer = chat_tokenizer("gpt_oss")
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in end_tokens(tokenizer, GenerationConfig())


def test_a_template_that_wants_other_messages_tells_nothing():
    tokenizer = made(REFUSES)
    assert end_tokens(tokenizer, None) == {tokenizer.eos_token_id}
    assert end_tokens(made(None, eos=None), GenerationConfig()) == set()
    with pytest.raises(ValueError, match="row 1: the chat template refuses this conversation: one message only"):
        list(tokenise([Example(ASK, "7", "row 1")], tokenizer, DataSettings(source="x")))


def test_a_response_needs_some_end():
    for tokenizer, prompt in ((made(PLAIN, eos=None), ASK), (made(None, eos=None), "3+4?")):
        with pytest.raises(ValueError, match=r"row 1: .*a response could never end: set"):
            list(tokenise([Example(prompt, "7", "row 1")], tokenizer, DataSettings(source="x", response="written")))
    (row,) = tokenise([Example("3+4?", "7", "row 1")], made(None, eos=None), DataSettings(source="x"), [5])
    assert row.input_ids[-1] == 5


@pytest.mark.parametrize("prompt", [ASK, "3+4?"])
def test_nothing_is_trained_behind_an_end(prompt):
    tokenizer = made(TEMPLATES["qwen3"], "<|im_start|>", "<|im_end|>")
    settings = DataSettings(source="x", response="written")
    with pytest.raises(ValueError, match=r"row 1: the response goes on after '<eos>' \(its token 2 of"):
        list(tokenise([Example(prompt, "7<eos>8", "row 1")], tokenizer, settings))


def test_end_tokens_are_added_behind_those_that_a_model_has():
    generation = GenerationConfig(eos_token_id=9)
    stop_at(generation, {3, 9})
    assert generation.eos_token_id == [9, 3]
    stop_at(generation, [])
    assert generation.eos_token_id == [9, 3]
    empty = GenerationConfig()
    stop_at(empty, [])
    assert empty.eos_token_id is None
    stop_at(empty, [4])
    assert empty.eos_token_id == 4


QUESTION = "What does <think> mean?"
OPENED = "<|User|>2+2?<|Assistant|><think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("response", "prompt", "think_end", "cut_off", "answer"),
    [
        ("It begins thoughts: 4", QUESTION, None, False, "It begins thoughts: 4"),  # a question's tag opens nothing
        ("It begins thoughts: 4", QUESTION, "</think>", False, "It begins thoughts: 4"),
        ("so\n</think>\n\nIt ends with </think>: 4", OPENED, None, False, "It ends with </think>: 4"),
        ("<think>so</think>4, behind </think>", QUESTION, "</think>", False, "4, behind </think>"),
        ("4: </think> ends thoughts", QUESTION, None, False, "4: </think> ends thoughts"),
        ("4: </think> ends thoughts", CLOSED, "</think>", False, "4: </think> ends thoughts"),
        ("4 is said behind <think>", "2+2?", None, False, "4 is said behind <think>"),
        ("<think>\n</think>4", OPENED, None, False, "4"),  # repeated
        ("<think>a<think>b</think>4", "2+2?", None, False, "4"),
        ("<think></think>4", "2+2?", None, False, "4"),  # empty
        ("<think>so", OPENED, None, True, ""),
        ("\n\n<think>so", "2+2?", None, True, ""),
        ("[THINK]so[/THINK]4", "2+2?", None, False, "4"),
        ("so[/THINK]4", "2+2?[THINK]", None, False, "4"),
        ("so", "2+2?[THINK]", None, True, ""),
        ("<thought>so</thought>4", "2+2?", "</thought>", False, "4"),
        ("so</think>4", "2+2?", "</think>", False, "4"),  # its beginning was seen by nobody
        ("<|START_THINKING|>so<|END_THINKING|>4", "2+2?", "<|END_THINKING|>", False, "4"),
        ("<|channel|>analysis<|message|>so<|end|><|start|>assistant" + FINAL + "4", "2+2?", FINAL, False, "4"),
        (FINAL + "4", "2+2?", FINAL, False, "4"),
        ("<|channel|>analysis<|message|>so<|end|>", "2+2?", FINAL, False, ""),
        ("<|channel|>analysis<|message|>so", "2+2?", FINAL, True, ""),
        ("4", CLOSED, "</think>", True, "4"),  # thinking is off: what there is of it is answer
        ("4 and", "2+2?", "</think>", True, ""),
    ],
)
def test_tags_are_read_by_position(response, prompt, think_end, cut_off, answer):
    assert final_answer(response, prompt, think_end, cut_off) == answer


def test_tags_in_pairs():
    for start in ("<think>", "[THINK]", "<|START_THINKING|>", "<|begin_of_thought|>", "<|channel|>analysis<|message|>"):
        assert thought_start(thought_end(start)) == start
    assert thought_start("assistantfinal") is None
    assert opened_by_prompt("<|assistant|>") is None
    assert opened_by_prompt("<plan>\n") is None
    assert opened_by_prompt("<plan>\n", {"</plan>"}) == "<plan>\n"


def stopped(response, stop, prompt="2+2?", think_end=None, name="qwen3"):
    """What of a response has been generated when a stop string ends it; the whole where none does."""
    tokenizer = chat_tokenizer(name)
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    stops = Stops(Request((1,), 9, 0, stop=stop, thoughts=Thoughts.behind(prompt, think_end)), tokenizer)
    end = next((n for n in range(1, len(tokens) + 1) if stops.reached(tokens[:n])), len(tokens))
    return tokenizer.decode(tokens[:end])


@pytest.mark.parametrize("end", [None, "</think>"])
def test_stop_strings_count_after_the_thoughts(end):
    thinking = "<think>\nfirst\n\nQ: is it?\n</think>"
    assert stopped(thinking + "\n\n4\n\nmore", ("\n\n", "Q:"), think_end=end) == thinking + "\n\n4\n\n"
    assert stopped("a\n\nb\n</think>4 Q: and", ("\n\n", "Q:"), OPENED, end) == "a\n\nb\n</think>4 Q:"
    assert stopped("4\n\nmore", ("\n\n",), CLOSED, end) == "4\n\n"  # thinking is off
    assert stopped(thinking + "x" * 90 + "Q: more", ("Q:",), think_end=end).endswith("xQ:")
    assert stopped("<think>no end\n\nQ:", ("Q:",), think_end=end) == "<think>no end\n\nQ:"
    assert stopped("<think>\n" * 30 + "</think>4Q:5", ("Q:",), think_end=end).endswith("4Q:")
    # without special tokens for the tags, in pieces
    assert stopped("<think>Q:</think>Q:5", ("Q:",), think_end=end, name=None) == "<think>Q:</think>Q:"


def test_stop_strings_of_a_model_that_does_not_think():
    assert stopped("4 Q: more", ("Q:",)) == "4 Q:"
    assert stopped("<4 Q: more", ("Q:",)) == "<4 Q:"
    assert stopped("[THINK]Q:[/THINK]4Q:5", ("Q:",), name=None) == "[THINK]Q:[/THINK]4Q:"
    asked = Stops(Request((1,), 9, 0, stop=("b",)), chat_tokenizer(None))
    assert [asked.reached(chat_tokenizer(None)("<think>ab")["input_ids"][:n]) for n in (8, 9)] == [False, True]


def test_channels_of_gpt_oss_are_told_by_special_tokens():
    """`think_end_token` is the head of the final message; decoded text has neither head nor end."""
    tokenizer = chat_tokenizer("gpt_oss")
    response = f"<|channel|>analysis<|message|>so 5\n\n<|end|><|start|>assistant{FINAL}4<|return|>"
    tokens = tokenizer(response, add_special_tokens=False)["input_ids"]
    decode = lambda ids, skip_special_tokens=True: tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)  # noqa: E731
    thoughts = Thoughts.behind("<|start|>user<|message|>2+2?<|end|><|start|>assistant", FINAL)
    assert divided(tokens, decode, thoughts, True) == ("analysisso 5\n\nassistantfinal", "4")
    assert divided(tokens[:18], decode, thoughts, False) == ("analysisso 5\n\n", "")
    assert stopped(response, ("\n\n", "4"), think_end=FINAL, name="gpt_oss").endswith(FINAL + "4")


def closing(template, *names):
    """A tokenizer whose post-processor writes special tokens around every text."""
    tokenizer = chat_tokenizer(None)
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in names]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "tokens"),
    [
        (closing("<bos> $A", "<bos>"), "a", "<bos>a"),
        (closing("<bos> $A", "<bos>"), "<bos>a", "<bos>a"),
        (closing("<bos> $A", "<bos>"), "a<bos>", "<bos>a<bos>"),
        (closing("<bos> $A <eos>", "<bos>", "<eos>"), "<bos>a", "<bos>a"),
        (closing("<bos> $A <eos>", "<bos>", "<eos>"), "a<eos>", "<bos>a<eos><eos>"),
        (chat_tokenizer(None), "<bos>a", "<bos>a"),
        (chat_tokenizer(None), "a", "a"),
    ],
)
def test_one_beginning_of_sequence(tokenizer, text, tokens):
    assert tokenizer.decode(encode(tokenizer, [text])[0]) == tokens
    assert encode(tokenizer, []) == []


def test_arguments_that_a_template_reads():
    """Also those that it sets itself where they are missing, behind transformers' own tags, and of loops."""
    tokenizer = made(
        "{% if not date_string is defined %}{% set date_string = '26 Jul' %}{% endif %}{{ date_string }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% if short %}{% break %}{% endif %}"
        "{% endfor %}{{ tools }}{{ bos_token }}"
    )
    for name in ("date_string", "short", "tools"):
        check_arguments(tokenizer, {name: 1}, "data.template_kwargs")
    for name in ("messages", "m", "add_generation_prompt", "bos_token"):
        with pytest.raises(ValueError, match=f"does not read {name!r} "):
            check_arguments(tokenizer, {name: 1}, "data.template_kwargs")
    with pytest.raises(ValueError, match=r"does not read 'date_strin' \(did you mean 'date_string'\?\)"):
        check_arguments(tokenizer, {"date_strin": 1}, "data.template_kwargs")
    with pytest.raises(ValueError, match="reads none"):
        check_arguments(made("{{ messages[0].content }}"), {"enable_thinking": False}, "x")
    with pytest.raises(ValueError, match="no valid template"):
        check_arguments(made("{% if %}"), {"x": 1}, "x")
    for text in ("false", "True", " TRUE "):
        with pytest.raises(ValueError, match=r"short is the text .*write (true|false) without quotes"):
            DataSettings(source="x", template_kwargs={"short": text})


class NoModel:
    """What a conversation asks of a model beside generating."""

    def __init__(self, ends):
        self.config, self.generation_config = None, GenerationConfig(eos_token_id=ends)


@pytest.mark.parametrize(
    ("name", "answer", "then"),
    [
        ("chatml on a base", "7<|im_end|>", "7<|im_end|>\n"),
        ("chatml on a base", "7<eos>", "7<|im_end|>\n"),  # the end of sequence is no part of ChatML
        ("chatml on a base", "7", "7<|im_end|>\n"),  # cut off
        ("cohere", "7<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", "7<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("cohere", "7<|END_RESPONSE|><eos>", "7<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        ("gpt_oss", "<|channel|>final<|message|>7<|return|>", "<|channel|>final<|message|>7<|end|>"),
    ],
)
def test_chat_goes_on_as_its_template_does(name, answer, then, monkeypatch):
    monkeypatch.setattr("vkvtrain.chat.EvictionCache", lambda *_: None)
    tokenizer, configured, _ = families()[name]
    model = NoModel(tokenizer.convert_tokens_to_ids(configured))
    conversation = Conversation(Loaded(model, tokenizer, EvictionConfig(policy="full")), EvictionConfig(policy="full"))
    first = conversation.message_tokens("3+4?")
    conversation.tokens = [*first, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    conversation._leave_the_closing_to_the_template("5+5?")
    every = tokenizer.decode([*conversation.tokens[len(first) :], *conversation.message_tokens("5+5?")])
    assert every.startswith(then)
    assert every.count("<eos>") == 0
    assert every.removeprefix(then).startswith(tokenizer.decode(first)[:5])


def test_the_end_of_a_turn_of_one_turn():
    """A template that renders one turn only still shows how it ends."""
    tokenizer = made("{{ raise_exception('one') if messages | length > 2 }}{{ messages[-1].content }}<eos>")
    end = turn_end(tokenizer, lambda m: tokenizer.apply_chat_template(list(m), tokenize=False), ASK, ())
    assert end is not None
    assert (end.text, end.token) == ("<eos>", tokenizer.eos_token_id)
