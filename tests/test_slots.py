"""The slot engine: answers that depend on their own request alone, sampling, stops, the journal, what is refused."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from families import tiny_family
from passes import held_at, rows_of, simulate, tiny_model
from peft import LoraConfig, get_peft_model
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from vkvtrain import EvictionCache, EvictionConfig
from vkvtrain.events import evictions_by, peak_entries
from vkvtrain.generation import Completion, Request, Sampling, generate, journal
from vkvtrain.generation.engine import _Engine
from vkvtrain.generation.journal import weights_of
from vkvtrain.generation.sampling import Sampler
from vkvtrain.noise import stream_key, token_gumbel
from vkvtrain.tiny import MODEL_PATH, task

CONFIG = EvictionConfig(policy="vase_attnv", budget=48, window=16)
SMALL = EvictionConfig(policy="vase_attnv", budget=16, window=4, sinks=2)
DRAWN = Sampling(temperature=1.2, top_p=0.95, seed=3)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(MODEL_PATH))


@pytest.fixture(scope="module")
def embedded():
    return AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain").eval()


def requests_of(tokenizer, sampling=Sampling(), pairs=(9, 16, 3, 6)):  # noqa: B008 (frozen)
    prompts = [task.problem("validation", 0, index, count).prompt for index, count in enumerate(pairs)]
    return [Request(tuple(tokenizer(p)["input_ids"]), 150, (i, 0), sampling) for i, p in enumerate(prompts)]


def stock(model, config, request, ends, **arguments):
    """The response that transformers' own `generate` gives with the evicting cache, and the cache."""
    cache = EvictionCache(config, model.config, [request.stream])
    ids = torch.tensor([request.prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=request.max_new_tokens,
        do_sample=False, pad_token_id=0, eos_token_id=sorted(ends) or None, **arguments,
    )  # fmt: skip
    return out[0, ids.shape[1] :].tolist(), cache


@pytest.mark.parametrize("policy", ["vase_attnv", "full"])
def test_greedy_answers_are_those_of_generate(policy, embedded, tokenizer):
    """With one slot, fewer than requests and more; and in another order."""
    config = CONFIG.model_copy(update={"policy": policy})
    requests, ends = requests_of(tokenizer), {tokenizer.eos_token_id}
    requests[3] = replace(requests[3], max_new_tokens=60)
    answers = generate(embedded, config, requests, slots=3, end_tokens=ends)
    for request, answer in zip(requests, answers, strict=True):
        tokens, cache = stock(embedded, config, request, ends)
        assert answer.tokens == tokens
        assert answer.finished == (tokens[-1] in ends)
        assert (answer.evictions, answer.peak_entries) == tuple(
            cache.stats()[0][name] for name in ("evictions", "peak_entries")
        )
    assert len({len(answer.tokens) for answer in answers}) >= 3
    assert_equal(answers[::-1], generate(embedded, config, requests[::-1], slots=8, end_tokens=ends))
    assert_equal(answers, generate(embedded, config, requests, slots=1, end_tokens=ends))


def assert_equal(ours, theirs):
    assert [replace(answer, log_probs=[]) for answer in ours] == [replace(answer, log_probs=[]) for answer in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


def test_sampled_answers_do_not_depend_on_slots_or_order(embedded, tokenizer):
    config = CONFIG
    requests, ends = requests_of(tokenizer, DRAWN), {tokenizer.eos_token_id}
    requests[1] = replace(requests[1], sampling=Sampling())  # greedy beside sampled
    requests[3] = replace(requests[3], sampling=Sampling(temperature=0.8, top_k=4, min_p=0.05, repetition_penalty=1.1))
    answers = generate(embedded, config, requests, slots=3, end_tokens=ends)
    assert_equal(answers, generate(embedded, config, requests, slots=1, end_tokens=ends))
    assert_equal(answers[::-1], generate(embedded, config, requests[::-1], slots=8, end_tokens=ends))
    other = [replace(request, stream=(request.stream[0], 1)) for request in requests]
    again = generate(embedded, config, other, slots=5, end_tokens=ends)
    assert sum(a.tokens != b.tokens for a, b in zip(answers, again, strict=True)) >= 2
    seeded = [replace(request, sampling=replace(request.sampling, seed=4)) for request in requests]
    again = generate(embedded, config, seeded, slots=5, end_tokens=ends)
    assert sum(a.tokens != b.tokens for a, b in zip(answers, again, strict=True)) >= 2


@pytest.mark.parametrize(
    ("family", "policy"),
    [("Qwen3", "h2o"), ("Llama", "random"), ("Gemma3", "vase_attnv"), ("gpt-oss", "vase_attnv"), ("Olmo3", "full")],
)
def test_families(family, policy):
    """Prompts shorter and longer than budget and sliding window, float64: as `generate` and as the simulation says."""
    config = SMALL.model_copy(update={"policy": policy})
    model = tiny_family(family, vocab=200)
    prompts = rows_of([3, 30, 1, 17, 60, 9], steps=0, vocab=200)
    limits = [40, 7, 30, 1, 25, 33]
    requests = [Request(tuple(p), n, i) for i, (p, n) in enumerate(zip(prompts, limits, strict=True))]
    answers = generate(model, config, requests, slots=2, end_tokens=())
    for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        tokens, _ = stock(model, config, request, ())
        assert answer.tokens == tokens
        assert not answer.finished
        seen = len(request.prompt) + len(tokens) - 1  # the last token is never given to the cache
        rule = (len(request.prompt), seen, 16, 4)
        counted = (evictions_by(*rule), peak_entries(*rule)) if config.evicts else (0, seen)
        assert (answer.evictions, answer.peak_entries) == counted
        logits, _ = simulate(model, config, [[*request.prompt, *tokens]], [len(request.prompt)], [place])
        expected = logits[0].float().log_softmax(-1)[len(request.prompt) - 1 : -1]
        expected = expected.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert answer.log_probs == pytest.approx(expected.tolist(), abs=1e-5)


def test_rows_that_come_and_go_hold_what_the_simulation_says(monkeypatch):
    """The cache rows at the end of each sequence, not only the tokens that came of them."""
    model = tiny_model(vocab=200)
    prompts = rows_of([3, 30, 20, 9], steps=0, vocab=200)
    requests = [Request(tuple(p), n, i) for i, (p, n) in enumerate(zip(prompts, [40, 25, 31, 50], strict=True))]
    held = {}
    complete = _Engine._complete

    def watched(engine, row, cache, slot):
        held[row.place] = [cache.positions(layer, slot).tolist() for layer in range(2)]
        return complete(engine, row, cache, slot)

    monkeypatch.setattr(_Engine, "_complete", watched)
    answers = generate(model, SMALL, requests, slots=2, end_tokens=())
    for place, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        sequence = [*request.prompt, *answer.tokens]
        _, evict_at = simulate(model, SMALL, [sequence], [len(request.prompt)], [place])
        assert [held_at(evict_at[layer], 0, len(sequence) - 1) for layer in range(2)] == held[place]


def test_an_adapter_is_used(embedded, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain")
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    requests, ends = requests_of(tokenizer, pairs=(9, 16, 4)), {tokenizer.eos_token_id}
    answers = generate(adapted, CONFIG, requests, slots=2, end_tokens=ends)
    assert [a.tokens for a in answers] == [stock(adapted, CONFIG, request, ends)[0] for request in requests]
    assert answers != generate(embedded, CONFIG, requests, slots=2, end_tokens=ends)


# Sampling


def test_a_repetition_penalty_is_transformers():
    model = tiny_model(vocab=200)
    prompts = rows_of([3, 30, 9], steps=0, vocab=200)
    requests = [Request(tuple(p), 40, i, Sampling(repetition_penalty=1.3)) for i, p in enumerate(prompts)]
    answers = generate(model, SMALL, requests, slots=2, end_tokens=())
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tokens == stock(model, SMALL, request, (), repetition_penalty=1.3)[0]
        assert answer.tokens != stock(model, SMALL, request, ())[0]


def draws(logits, count=20000, **settings):
    """What the sampler draws from one row of logits, at as many positions."""
    requests = [Request((1,), 1, stream, Sampling(**settings)) for stream in range(count)]
    sampler = Sampler(requests, logits.device)
    return sampler.choose(logits.expand(count, -1), torch.arange(count), None)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0}, range(8)),
        ({"temperature": 0.5}, range(8)),
        ({"temperature": 1.0, "top_k": 3}, [1, 4, 6]),
        ({"temperature": 1.0, "top_p": 0.65}, [1, 4]),
        ({"temperature": 1.0, "top_p": 0.001}, [4]),
        ({"temperature": 1.0, "min_p": 0.3}, [1, 4]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.85}, [1, 4]),  # of the three that top-k leaves
    ],
)
def test_draws_follow_the_filtered_softmax(settings, kept):
    probabilities = torch.tensor([0.05, 0.3, 0.02, 0.08, 0.4, 0.03, 0.11, 0.01])
    drawn = draws(probabilities.log()[None], **settings)
    expected = torch.zeros(8, dtype=torch.float64)
    expected[list(kept)] = probabilities.double()[list(kept)] ** (1 / settings["temperature"])
    counts = drawn.bincount(minlength=8)
    assert set(counts.nonzero().flatten().tolist()) == set(kept)
    expected = expected / expected.sum() * len(drawn)
    alive = expected > 0
    if alive.sum() > 1:
        assert stats.chisquare(counts[alive].numpy(), expected[alive].numpy()).pvalue > 1e-3


def test_a_draw_is_the_gumbel_maximum():
    """By the formula: noise of (seed, stream, position, token), whatever the row's neighbours and filters."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 50, generator=generator) * 2
    settings = [
        Sampling(0.7, seed=1), Sampling(), Sampling(1.3, top_k=10), Sampling(1.0, top_p=0.8), Sampling(2.0, min_p=0.1)
    ]  # fmt: skip
    requests = [Request((1,), 1, (row, 2), setting) for row, setting in enumerate(settings)]
    position = torch.tensor([3, 9, 4, 1000, 7])
    chosen = Sampler(requests, logits.device).choose(logits, position, None)
    for row, (request, setting) in enumerate(zip(requests, settings, strict=True)):
        if not setting.temperature:
            assert chosen[row] == logits[row].argmax()
            continue
        key = tuple(torch.tensor([word]) for word in stream_key(setting.seed, request.stream))
        noise = token_gumbel(key, position[row : row + 1], torch.arange(50)[None])[0]
        scores = logits[row] / setting.temperature
        chance = scores.softmax(-1)
        order = chance.argsort(descending=True)
        allowed = order[: setting.top_k or 50].tolist()
        total, kept = 0.0, []
        for token in allowed:
            if total < setting.top_p and chance[token] >= setting.min_p * chance.max():
                kept.append(token)
            total += float(chance[token])
        assert chosen[row] == max(kept, key=lambda token: scores[token].double() + noise[token])
        alone = Sampler([request], logits.device).choose(logits[row : row + 1], position[row : row + 1], None)
        assert alone[0] == chosen[row]


# Stops


def test_stop_strings(embedded, tokenizer):
    """A response ends with the token that completes one; the others go on."""
    requests = requests_of(tokenizer, pairs=(9, 16, 16))
    requests[1] = replace(requests[1], stop=("zz", ";d"))
    ends = {tokenizer.eos_token_id}
    answers = generate(embedded, CONFIG, requests, slots=2, end_tokens=ends, tokenizer=tokenizer)
    plain = generate(embedded, CONFIG, requests_of(tokenizer, pairs=(9, 16, 16)), slots=2, end_tokens=ends)
    assert_equal(answers[::2], plain[::2])
    text = tokenizer.decode(answers[1].tokens)
    assert text.endswith(";d")
    assert text.count(";d") == 1
    assert answers[1].finished
    assert answers[1].tokens == plain[1].tokens[: len(answers[1].tokens)]


def test_an_end_token_or_limit_at_once(embedded, tokenizer):
    """The first token may end a response: its request never takes a slot."""
    requests = [replace(request, max_new_tokens=1) for request in requests_of(tokenizer)]
    answers = generate(embedded, CONFIG, requests, slots=2, end_tokens=())
    assert all(len(answer.tokens) == 1 and not answer.finished for answer in answers)
    ends = {answers[0].tokens[0]}
    again = generate(embedded, CONFIG, requests_of(tokenizer), slots=2, end_tokens=ends)
    assert [a.tokens for a in again] == [a.tokens for a in answers]
    assert all(answer.finished for answer in again)
    assert generate(embedded, CONFIG, [], slots=2, end_tokens=()) == []


# The journal


class Interruption(Exception):
    pass


def interrupted(monkeypatch, after):
    """Make the engine raise once it has completed some sequences."""
    complete, count = _Engine._complete, []

    def breaks(engine, row, cache, slot):
        if len(count) == after:
            raise Interruption
        count.append(row.place)
        return complete(engine, row, cache, slot)

    monkeypatch.setattr(_Engine, "_complete", breaks)
    return count


def test_an_interrupted_run_continues(tmp_path, monkeypatch, embedded, tokenizer):
    path = tmp_path / "new" / "journal.jsonl"
    requests, ends = requests_of(tokenizer, DRAWN), {tokenizer.eos_token_id}
    reference = generate(embedded, CONFIG, requests, slots=3, end_tokens=ends)
    with monkeypatch.context() as patch:
        interrupted(patch, after=3)
        with pytest.raises(Interruption):
            generate(embedded, CONFIG, requests, slots=3, end_tokens=ends, journal=path)
    assert len(path.read_text().splitlines()) == 3
    with path.open("a") as file:
        file.write('{"request": "ab')  # torn
    with monkeypatch.context() as patch:
        done = interrupted(patch, after=99)
        assert_equal(reference, generate(embedded, CONFIG, requests, slots=2, end_tokens=ends, journal=path))
        assert len(done) == len(requests) - 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == len({line["request"] for line in lines}) == len(requests)
    with monkeypatch.context() as patch:
        interrupted(patch, after=0)
        kept = generate(embedded, CONFIG, requests, slots=1, end_tokens=ends, journal=path)
    assert_equal(reference, kept)
    assert all(isinstance(answer, Completion) for answer in kept)


def test_a_changed_request_is_not_taken_from_the_journal(tmp_path, embedded, tokenizer):
    """Nor one under another setting, of another model, adapter or weights."""
    path = tmp_path / "journal.jsonl"
    (request,) = requests_of(tokenizer, pairs=(4,))
    ends = {tokenizer.eos_token_id}

    def lines(model=embedded, config=CONFIG, asked=request, ends=ends):
        generate(model, config, [asked], slots=1, end_tokens=ends, tokenizer=tokenizer, journal=path)
        return len(path.read_text().splitlines())

    assert lines() == lines() == lines(asked=replace(request, stream=[request.stream[0]])) == 1
    changes = [
        {"max_new_tokens": 149}, {"prompt": request.prompt[1:]}, {"stream": (5,)}, {"sampling": DRAWN}, {"stop": ("x",)}
    ]  # fmt: skip
    for number, change in enumerate(changes, 2):
        assert lines(asked=replace(request, **change)) == number
    assert lines(config=CONFIG.model_copy(update={"seed": 1})) == 7
    assert lines(ends=set()) == 8
    model = AutoModelForCausalLM.from_pretrained(str(MODEL_PATH), attn_implementation="vkvtrain").eval()
    assert lines(model) == 8
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-3
    assert lines(model) == 9
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])).eval()
    assert lines(adapted) == 10
    with adapted.disable_adapter():
        assert lines(adapted) == 11
    adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] = 3.0
    assert lines(adapted) == 12


def test_a_journal_says_why_it_has_nothing_of_what_is_asked(tmp_path, embedded, tokenizer):
    path = tmp_path / "journal.jsonl"
    (request,) = requests_of(tokenizer, pairs=(4,))

    def ask(asked, config=CONFIG):
        return generate(embedded, config, [asked], slots=1, end_tokens=(), journal=path)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask(request)
        ask(request)
        ask(replace(request, stream=(7, 1)))  # another problem or attempt: nothing that one would expect to be there
    dated = replace(request, prompt=request.prompt[1:])
    with pytest.warns(UserWarning, match=r"different in prompt \(a chat template may write the day's date\): none of"):
        ask(dated)
    with pytest.warns(UserWarning, match="different in eviction: none of them is taken"):
        ask(request, CONFIG.model_copy(update={"seed": 1}))
    lines = [{**json.loads(line), "parts": {}} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = len(lines)
    ask(request)  # what an earlier version wrote
    assert len(path.read_text().splitlines()) == before


def test_weights_that_changed_places_are_other_weights():
    model = torch.nn.Linear(4, 3)
    seen = {weights_of(model)}
    with torch.no_grad():
        for change in (lambda w: w.flip(0), lambda w: w.flip(1), lambda w: w.roll(1), lambda w: -w):
            model.weight.copy_(change(model.weight))
            seen.add(weights_of(model))
    assert len(seen) == 5
    half = torch.nn.Linear(4, 3).to(torch.bfloat16)
    before = weights_of(half)
    with torch.no_grad():
        half.weight.copy_(half.weight.flip(1))
    assert weights_of(half) != before
    with torch.no_grad():
        half.weight.copy_(half.weight.flip(1))
    assert weights_of(half) == before


@pytest.mark.parametrize("chunk", [1, 5, 12, 1000])
def test_a_hash_of_weights_does_not_depend_on_how_it_is_computed(monkeypatch, chunk):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    expected = weights_of(model)
    monkeypatch.setattr(journal, "_CHUNK", chunk)
    assert weights_of(model) == expected


def test_a_file_that_is_no_journal(tmp_path, embedded, tokenizer):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"request": "a"}\n{"request": "b"}\n')
    with pytest.raises(ValueError, match=r"journal: line 1 of .*notes.jsonl is no completion"):
        generate(embedded, CONFIG, requests_of(tokenizer), slots=1, end_tokens=(), journal=path)
    assert path.read_text() == '{"request": "a"}\n{"request": "b"}\n'


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ()}, "request 1: the prompt is empty"),
        ({"max_new_tokens": 0}, "request 1: max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 5000}, r"request 1: .*max_new_tokens \(5000\) exceed the model's 4096 positions"),
        ({"stop": ("a",)}, "request 1: stop strings need the tokenizer"),
        ({"stop": ("",)}, "request 1: a stop string is empty"),
        ({"stream": "a"}, "streams must be ints or tuples"),
    ],
)
def test_requests_that_cannot_be_answered(change, message):
    request = Request((1, 2), 3, 0)
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), SMALL, [request, replace(request, **change)], slots=1, end_tokens=())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"min_p": 1.5}, "min_p must be from 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
    ],
)
def test_sampling_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_models_that_cannot_be_used():
    requests = [Request((1, 2), 3, 0)]
    with pytest.raises(ValueError, match="slots must be at least 1, got 0"):
        generate(tiny_model(), SMALL, requests, slots=0, end_tokens=())
    with pytest.raises(ValueError, match=r"training mode.*model.eval\(\)"):
        generate(tiny_model().train(), SMALL, requests, slots=1, end_tokens=())
    with pytest.raises(ValueError, match="attn_implementation='vkvtrain'"):
        generate(tiny_model(attention="sdpa"), SMALL, requests, slots=1, end_tokens=())
