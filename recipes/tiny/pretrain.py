"""Train the embedded tiny reasoning model from scratch.

    python recipes/tiny/pretrain.py --output vkvtrain/tiny/model

Runs on two CPU cores in under half an hour, writes the model (safetensors), its tokenizer, `training_log.jsonl` and
the model card. Full cache throughout: the embedded model knows nothing of eviction.
"""

import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from huggingface_hub import ModelCard
from huggingface_hub import ModelCardData as CardData
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vkvtrain.tiny.task import ALPHABET, END_THINK, MAX_PAIRS, SPLITS, THINK, Split, grade, problem, problems


@dataclass
class Settings:
    output: Path
    """Directory to write the model to."""
    steps: int = 1000
    """Optimiser steps once the curriculum has reached full length."""
    patience: int = 4000
    """Give up if the curriculum has not reached full length after so many steps."""
    batch_tokens: int = 4096
    """Tokens per step; a batch holds problems of one length."""
    learning_rate: float = 2e-3
    """Peak learning rate: linear warm-up over 100 steps, cosine to zero over the steps at full length."""
    seed: int = 0
    """Seed of the weights and of the data."""
    evaluate: int = 500
    """Validation and test problems for the numbers in the card, answered by greedy generation."""


def build_tokenizer() -> Any:
    """One token a character; `<think>` and `</think>` are tokens of their own; a beginning-of-text token is added."""
    words = ["<pad>", "<bos>", "<eos>", THINK, END_THINK, *ALPHABET]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{THINK}|{END_THINK}|."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        padding_side="left", clean_up_tokenization_spaces=False, model_max_length=512,
    )  # fmt: skip


def build_model(tokenizer: Any) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=512, rope_parameters={"rope_type": "default",
        "rope_theta": 10000.0}, tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, attention_dropout=0.0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def accuracy(model: Any, tokenizer: Any, split: Split, seed: int, count: int) -> dict[str, float]:
    """Share of problems whose total, and whose passcode, free greedy generation gets right."""
    model.eval()
    samples = list(problems(split, seed, count))
    scores = []
    for start in range(0, count, 250):
        chunk = samples[start : start + 250]
        batch = tokenizer(
            [sample.prompt for sample in chunk], return_tensors="pt", padding=True, return_token_type_ids=False
        )
        out = model.generate(**batch, max_new_tokens=160, do_sample=False)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores += [grade(text, sample.answer, sample.passcode) for text, sample in zip(texts, chunk, strict=True)]
    model.train()
    return {"exact_match": sum(s[0] for s in scores) / count, "fact_match": sum(s[1] for s in scores) / count}


@dataclass
class Curriculum:
    """Short chains first: looking a key up is found sooner among few."""

    longest: int = 4
    smoothed: float = 10.0

    def pairs(self, rng: random.Random) -> int:
        return self.longest if rng.random() < 0.5 else rng.randint(max(1, self.longest // 2), self.longest)

    def observe(self, loss: float) -> None:
        """Lengthen once the present length is solved."""
        self.smoothed = 0.8 * self.smoothed + 0.2 * loss
        if self.smoothed < 0.1 and self.longest < MAX_PAIRS:
            self.longest = min(MAX_PAIRS, self.longest + max(2, self.longest // 3))
            self.smoothed = 0.2


def main(settings: Settings) -> None:
    torch.manual_seed(settings.seed)
    rng = random.Random(settings.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    settings.output.mkdir(parents=True, exist_ok=True)
    begin, index, step, full_length_from, losses = time.monotonic(), 0, 0, None, []
    curriculum = Curriculum()
    with (settings.output / "training_log.jsonl").open("w") as log:
        while full_length_from is None or step < full_length_from + settings.steps:
            if full_length_from is None and curriculum.longest == MAX_PAIRS:
                full_length_from = step
            if full_length_from is None and step >= settings.patience:
                raise SystemExit(f"not at full length after {step} steps: raise --patience or change --seed")
            progress = 0.0 if full_length_from is None else (step - full_length_from) / settings.steps
            rate = settings.learning_rate * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            pairs = curriculum.pairs(rng)
            rows = settings.batch_tokens // (10 * pairs + 12)
            batch = [problem("train", settings.seed, index + row, pairs) for row in range(rows)]
            index += rows
            ids = tokenizer(
                [b.prompt + b.response + "<eos>" for b in batch], return_tensors="pt", return_token_type_ids=False
            )["input_ids"]
            labels = ids.clone()
            labels[:, : 2 * pairs + 5] = -100  # bos, @, two digits, the pairs, ?
            loss = model(input_ids=ids, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            curriculum.observe(losses[-1])
            step += 1
            last = full_length_from is not None and step == full_length_from + settings.steps
            if step % 50 == 0 or last:
                row = {
                    "step": step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "longest": curriculum.longest,
                    "seconds": round(time.monotonic() - begin),
                }
                losses = []
                if step % 500 == 0 or last:
                    row |= accuracy(model, tokenizer, "validation", settings.seed, 100)
                    model.save_pretrained(settings.output)
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(row, flush=True)
    model.generation_config = GenerationConfig(
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model.save_pretrained(settings.output)
    tokenizer.save_pretrained(settings.output)
    final = {split: accuracy(model, tokenizer, split, settings.seed, settings.evaluate) for split in SPLITS[1:]}
    write_card(settings, sum(p.numel() for p in model.parameters()), step, round(time.monotonic() - begin), final)
    print(json.dumps(final), flush=True)


def write_card(
    settings: Settings, parameters: int, steps: int, seconds: int, accuracies: dict[str, dict[str, float]]
) -> None:
    """The model card beside the weights."""
    rows = "\n".join(
        f"| {split} | {settings.evaluate} | {scores['exact_match']:.1%} | {scores['fact_match']:.1%} |"
        for split, scores in accuracies.items()
    )
    example = problem("test", settings.seed, 0, 4)
    data = CardData(license="apache-2.0", library_name="transformers", pipeline_tag="text-generation")
    card = ModelCard(
        f"""---
{data.to_yaml()}
---
# The embedded tiny reasoning model of vkvtrain

A Qwen3-shaped model of {parameters:,} parameters (4 layers, 8 query heads, 4 KV heads, head dimension 32), trained from
scratch with the full cache to solve one task. It is small enough to train and evaluate for eviction on a CPU in
minutes; it knows nothing else and nothing of eviction.

## Task

A keyed running sum (`vkvtrain/tiny/task.py`). A prompt states the digits of {MAX_PAIRS} keys and, somewhere among
them, a two-digit passcode; the response restates every key, its digit and the running total modulo 10, then closes
with the total and the passcode. With four keys:

```
prompt     {example.prompt}
response   {example.response}
```

A response of {MAX_PAIRS} keys looks up every one of them in the prompt, and the passcode, stated once, after all else:
what eviction deleted is missed. One character is one token; `{THINK}` and `{END_THINK}` are tokens of their own.

## Data

Generated, seed {settings.seed}. A hash of the prompt decides between training (80%), validation (10%) and test (10%),
so the splits are disjoint by construction.

## Training

`python recipes/tiny/pretrain.py --output vkvtrain/tiny/model --seed {settings.seed}`: AdamW, peak learning rate
{settings.learning_rate:g}, {settings.batch_tokens} tokens a step, chains that lengthen from 4 to {MAX_PAIRS} keys
as they are solved, then {settings.steps} steps at full length: {steps} steps and {seconds} seconds on two CPU cores;
the log is `training_log.jsonl`.

## Numbers

Free greedy generation with the full cache:

| split | problems | exact match (total) | fact match (passcode) |
|---|---|---|---|
{rows}
"""
    )
    card.save(settings.output / "README.md")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
