"""What is trained on is what the model would generate behind its chat template's prompt, or an error shows why not."""

import pytest
from chat_templates import TEMPLATES, chat_tokenizer

from vkvtrain.training.data.rows import Example
from vkvtrain.training.data.templates import tokenise
from vkvtrain.training.settings import DataSettings

ASK = ({"role": "user", "content": "2+2?"},)
SETTINGS = DataSettings(source="x")
THOUGHT = "<think>\ntwo and two\n</think>\n\n4"


def rows(name, completion, prompt=ASK, reasoning=None, **settings):
    """(prompt, response) of the row as texts, and the tokenizer."""
    tokenizer = chat_tokenizer(name)
    example = Example(prompt, completion, "rows.jsonl, row 3", reasoning)
    (row,) = tokenise([example], tokenizer, DataSettings(source="x", **settings))
    texts = [tokenizer.decode(row.input_ids[: row.prompt_length]), tokenizer.decode(row.input_ids[row.prompt_length :])]
    return texts, row, tokenizer


@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("system", [None, "Think."])
def test_the_prompt_is_what_generation_is_given(name, system):
    """Token by token, from the template's own tokenisation."""
    messages = [{"role": "system", "content": system}] if system else []
    messages += [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": THOUGHT}, *ASK]
    settings = {"response": "rendered" if name in ("gpt_oss", "qwen3") else "written"}
    _, row, tokenizer = rows(name, THOUGHT, tuple(messages), **settings)
    given = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(row.input_ids[: row.prompt_length]) == given


def test_a_well_formed_answer_of_qwen3():
    (prompt, response), row, tokenizer = rows("qwen3", THOUGHT)
    assert prompt == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert response == THOUGHT + "<|im_end|>"
    assert row.input_ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert rows("qwen3", THOUGHT + "<|im_end|>")[1] == row  # an end that is written out is not doubled
    assert rows("qwen3", THOUGHT, response="rendered")[1] == row
    assert rows("qwen3", THOUGHT, response="written")[1] == row


def test_thoughts_of_earlier_answers_are_what_the_template_makes_of_them():
    turns = ({"role": "user", "content": "1+1?"}, {"role": "assistant", "content": THOUGHT}, *ASK)
    (prompt, _), _, _ = rows("qwen3", THOUGHT, turns)
    assert "two and two" not in prompt
    assert "assistant\n4<|im_end|>" in prompt


def test_a_turn_ends_with_the_template_s_token_not_with_the_end_of_sequence():
    (_, response), _, _ = rows("phi4", THOUGHT)
    assert response == THOUGHT + "<|end|>"


def refused(name, completion, prompt=ASK, **settings):
    with pytest.raises(ValueError, match="row 3") as error:
        rows(name, completion, prompt, **settings)
    sentence, *shown = str(error.value).splitlines()
    return sentence, shown


def test_thoughts_that_the_template_strips_are_shown():
    sentence, (written, template) = refused("deepseek_r1", "two and two\n</think>\n\n4")
    assert "from character" in sentence
    assert "data.response to 'written'" in sentence
    assert r"<|Assistant|><think>\ntwo and two\n</think>\n\n4<eos>" in written
    assert r"<|Assistant|>\n\n4<eos>" in template


def test_thoughts_that_are_opened_twice_are_shown_and_written_once():
    _, (written, _) = refused("deepseek_r1", THOUGHT)
    assert r"<think>\n<think>\ntwo" in written
    once = rows("deepseek_r1", "two and two\n</think>\n\n4", response="written")
    assert once[0] == ["<bos><|User|>2+2?<|Assistant|><think>\n", "two and two\n</think>\n\n4<eos>"]
    assert rows("deepseek_r1", THOUGHT, response="written")[1] == once[1]


def test_a_response_without_thoughts_is_not_trained_as_a_thought():
    sentence, _ = refused("deepseek_r1", "4", response="written")
    assert "opens <think>, but the response has no </think>" in sentence
    with_thinking_off = rows("qwen3", "4", template_kwargs={"enable_thinking": False})
    assert with_thinking_off[0][0].endswith("<think>\n\n</think>\n\n")
    assert with_thinking_off[0][1] == "4<|im_end|>"
    sentence, (written, template) = refused("qwen3", "4")
    assert r"assistant\n4<|im_end|>" in written
    assert r"assistant\n<think>\n\n</think>" in template
    assert rows("qwen3", "4", response="rendered")[0][1] == "<think>\n\n</think>\n\n4<|im_end|>"


@pytest.mark.parametrize("response", ["checked", "written", "rendered"])
@pytest.mark.parametrize(
    ("name", "completion"),
    [
        ("deepseek_r1", "<think>\n12 * 12 is"), ("qwen3", "<think>\n12 * 12 is"), ("phi4", "<think>\n12 * 12 is"),
        ("deepseek_r1", "<think>\n<think>\n12 * 12 is"), ("phi4", "\n[THINK]12 * 12 is"),
        ("qwen3", "<thinking>12 * 12 is"), ("qwen3", "<|begin_of_thought|>12 * 12 is"),
        ("gpt_oss", "<|channel|>analysis<|message|>12 * 12 is"),
    ],
)  # fmt: skip
def test_a_trace_that_was_cut_off_in_its_thoughts_is_refused(name, completion, response):
    sentence, _ = refused(name, completion, response=response)
    if response == "written" or name == "phi4":
        assert "would be trained as a thought without an end" in sentence


def test_a_prompt_that_is_text_may_open_thoughts():
    for prompt in ("2+2?<think>\n", "2+2?[THINK]"):
        sentence, _ = refused("qwen3", "two and", prompt=prompt)
        assert "the generation prompt opens" in sentence
    assert rows("qwen3", "two and two</think>4", prompt="2+2?<think>\n")[0][1] == "two and two</think>4<|im_end|>"
    assert rows("qwen3", "It opens thoughts.", prompt="What is <think> for?")[0][1] == "It opens thoughts.<|im_end|>"
    assert rows("phi4", "<think></think>4", response="written")[0][1] == "<think></think>4<|end|>"
    assert rows("phi4", "<b>4</b>")[0][1] == "<b>4</b><|end|>"


def test_what_a_template_raises_is_told_with_the_row():
    tokenizer = chat_tokenizer("phi4")
    for broken, says in (
        ("raise_exception('no system role')", "no system role"),
        ("messages[0].name + ''", "no attribute 'name'"),
        ("messages[0].content + 1", "concatenate"),
    ):
        tokenizer.chat_template = f"{{{{ {broken} if messages[0].role == 'system' }}}}" + TEMPLATES["phi4"]
        asked = Example(({"role": "system", "content": "s"}, *ASK), "4", "row 2")
        with pytest.raises(ValueError, match=f"row 2: the chat template refuses this conversation: .*{says}"):
            list(tokenise([Example(ASK, "4", "row 1"), asked], tokenizer, SETTINGS))


@pytest.mark.parametrize("prompt", ["\ud83d", ({"role": "user", "content": "\ud83d"},)])
def test_half_a_surrogate_pair_is_told_with_the_row(prompt):
    for example in (Example(prompt, "4", "row 7"), Example("a", "4\udc00", "row 7")):
        with pytest.raises(ValueError, match=r"row 7 holds half a surrogate pair \('\\ud"):
            list(tokenise([example], chat_tokenizer("phi4"), SETTINGS))


def test_thoughts_behind_a_prompt_that_has_closed_them():
    _, (written, _) = refused("qwen3", THOUGHT, template_kwargs={"enable_thinking": False})
    assert r"<think>\n\n</think>\n\n<think>\ntwo and two" in written


def test_line_breaks_are_the_template_s_own():
    _, shown = refused("qwen3", "<think>two and two</think>4")
    assert len(shown) == 2
    assert rows("qwen3", "<think>two and two</think>4", response="rendered")[0][1] == THOUGHT + "<|im_end|>"


def test_channels_of_gpt_oss():
    _, (written, template) = refused("gpt_oss", THOUGHT)
    assert "<|start|>assistant<think>" in written
    assert "<|channel|>final<|message|><think>" in template
    expected = (
        "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    (prompt, response), row, _ = rows("gpt_oss", THOUGHT, response="rendered")
    assert prompt == "<|start|>user<|message|>2+2?<|end|><|start|>assistant"
    assert response == expected
    assert rows("gpt_oss", "4", reasoning="two and two")[1] == row  # reasoning given apart needs the template


def test_reasoning_given_apart():
    assert rows("qwen3", "4", reasoning="two and two")[0][1] == THOUGHT + "<|im_end|>"
    for name in ("deepseek_r1", "phi4"):  # templates that do not read it must not lose it
        sentence, shown = refused(name, "4", reasoning="two and two")
        assert "loses something" in sentence
        assert "two and two" in shown[0]
        assert "two and two" not in shown[1]


def test_rendering_that_loses_the_thoughts_is_refused():
    sentence, shown = refused("deepseek_r1", THOUGHT, response="rendered")
    assert "loses something" in sentence
    assert "two and two" not in shown[1]


def test_a_conversation_needs_a_template():
    with pytest.raises(ValueError, match="row 3 is a conversation, but the tokenizer has no chat template"):
        rows(None, "4")


def test_text_and_conversations_may_be_mixed():
    tokenizer = chat_tokenizer("qwen3")
    examples = [Example("2+2?", "4", "a"), Example(ASK, THOUGHT, "b"), Example("3", "4", "c")]
    found = list(tokenise(examples, tokenizer, DataSettings(source="x")))
    assert [row.index for row in found] == [0, 1, 2]
    assert tokenizer.decode(found[0].input_ids) == "2+2?4<|im_end|>"
    assert found[1] != found[0]
    alone = list(tokenise(examples[1:2], tokenizer, DataSettings(source="x")))
    assert alone[0].input_ids == found[1].input_ids
