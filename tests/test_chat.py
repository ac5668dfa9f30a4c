"""Chat: several turns of one sequence over one evicting cache, for people and for pipes."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch
from passes import simulate
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionConfig
from vkvtrain.chat import Conversation, talk
from vkvtrain.cli import main
from vkvtrain.loading import Loaded
from vkvtrain.tiny import MODEL_PATH

EVICTION = EvictionConfig(policy="vase_attnv", budget=32, window=16)
GREEDY = {"do_sample": False, "max_new_tokens": 40}
PROBLEMS = ["c1a3@58b7?", "a8c5b4d1@52?"]
TEMPLATE = (
    "@{% for m in messages %}{{ '?' if m.role == 'user' else ';' }}{{ m.content.strip() }}<eos>{% endfor %}"
    "{% if add_generation_prompt %};{% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_PATH, attn_implementation="vkvtrain").eval()


def loaded(model, template=None):
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    tokenizer.chat_template = template
    return Loaded(model, tokenizer, EVICTION)


@pytest.fixture
def directory(tmp_path, model):
    """A model with its eviction setting, as `vkvtrain publish` writes it."""
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MODEL_PATH).save_pretrained(tmp_path)
    EVICTION.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["text", "template"])
def test_turns_continue_one_sequence(model, template):
    """Every answer is what one simulated pass over the whole conversation predicts at these places."""
    conversation = Conversation(loaded(model, template), EVICTION)
    chunks, answers = [], []
    for turn, message in enumerate([*PROBLEMS, "b2"]):
        before = len(conversation.tokens)
        new = conversation.answer(message, None, **GREEDY)
        end = len(conversation.tokens)
        # the last token of an answer is given to the cache with the next message
        chunks.append((max(0, before - (turn > 0)), end - new))
        answers.append((end - new, end))
    logits, _ = simulate(model, EVICTION, [conversation.tokens], [chunks], [0])
    predicted = logits[0].argmax(-1).tolist()
    for begin, end in answers:
        assert predicted[begin - 1 : end - 1] == conversation.tokens[begin:end]
    assert conversation.cache.stats()[0]["evictions"] > 2


def test_a_template_is_rendered_once_and_closes_what_did_not_close_itself(model):
    chat = loaded(model, TEMPLATE)
    conversation = Conversation(chat, EVICTION)
    text = lambda tokens: chat.tokenizer.decode(tokens)  # noqa: E731
    assert text(conversation.message_tokens("a1")) == "@?a1<eos>;"
    conversation.tokens = chat.tokenizer("@?a1<eos>;3")["input_ids"]  # cut off
    assert text(conversation.message_tokens("b2")) == "<eos>?b2<eos>;"
    conversation.tokens += chat.tokenizer("<eos>")["input_ids"]  # ended by itself
    assert text(conversation.message_tokens("b2")) == "?b2<eos>;"


def test_lines_are_messages(model, monkeypatch, capsys):
    lines = [PROBLEMS[0], "", PROBLEMS[1], "/new", PROBLEMS[0], "/exit", PROBLEMS[1]]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    talk(loaded(model), EVICTION, GREEDY)
    states = re.findall(r"\[.*\]", capsys.readouterr().out)
    held = r"\[\d+ tokens; (\d+) evictions so far; (\d+) of (\d+) entries held, \d+\.\d MiB\]"
    found = [re.fullmatch(held, state) for state in states]
    assert len(found) == 3
    assert all(found)
    assert states[0] == states[2]  # afresh
    evictions, entries, seen = map(int, found[1].groups())
    assert evictions >= 1
    assert entries < 32 + 16 < seen


def test_an_interrupted_answer_starts_afresh(model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([PROBLEMS[0]] * 3)))
    calls, generate = [], model.generate

    def interrupted(**arguments):
        calls.append(arguments["input_ids"].shape[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", interrupted)
    talk(loaded(model), EVICTION, GREEDY)
    assert "[interrupted: the next message starts afresh]" in capsys.readouterr().out
    assert calls[0] == calls[2] < calls[1]


@pytest.mark.slow
def test_chat_works_in_a_pipe(directory):
    command = [sys.executable, "-m", "vkvtrain.cli", "chat", str(directory), "--temperature", "0"]
    done = subprocess.run(
        command, input="\n".join(PROBLEMS), capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first == f"{directory}: vase_attnv, budget 32, window 16. /new starts afresh, /exit stops."
    assert rest[0].startswith("<think>a:3+0=3;")
    assert [line.startswith("[") for line in rest] == [False, True, False, True]
    assert not any(line.startswith("> ") for line in rest)


def test_the_budget_can_be_another(directory, monkeypatch, capsys):
    for budget, said in [("64", "vase_attnv, budget 64, window 16"), ("0", "full cache")]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(PROBLEMS[0]))
        assert main(["chat", str(directory), "--budget", budget, "--max-new-tokens", "30"]) == 0
        out = capsys.readouterr().out
        assert f": {said}. /new" in out
        assert "0 evictions so far; 40 of 40" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--budget", "40"], "budget (40) must be a multiple of window (16): use 32 or 48, or change window"),
        (["--temperature", "-1"], "--temperature must be 0 (greedy) or more"),
        (["--top-p", "0"], "--top-p must be above 0 and at most 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_bad_settings_are_one_sentence(directory, capsys, arguments, sentence):
    assert main(["chat", str(directory), *arguments]) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_directory_of_something_else_is_refused(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert "has no eviction_config.json: was it written by vkvtrain?" in capsys.readouterr().err


def test_sampling_is_repeatable(directory, monkeypatch, capsys):
    outs = []
    for seed in ("1", "1", "2"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(PROBLEMS)))
        assert main(["chat", str(directory), "--seed", seed, "--temperature", "3", "--max-new-tokens", "60"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1] != outs[2]
    assert torch.initial_seed() == 2
