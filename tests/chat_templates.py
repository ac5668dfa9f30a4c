"""Chat templates that treat thoughts as those of real thinking models do, and a tokenizer of bytes to use them with."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN3 = """\
{%- set ns = namespace(asked=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role != 'assistant' -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- else -%}
    {%- set thought = m.reasoning_content or '' -%}
    {%- set said = m.content -%}
    {%- if not thought and '</think>' in said -%}
      {%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.asked -%}{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}{%- endif -%}
    {{- said.lstrip('\\n') + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""
"""Thoughts are written in the last answer and stripped from earlier ones; the model opens them itself."""

DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
  {%- if m.role == 'system' -%}{{- m.content -}}
  {%- elif m.role == 'user' -%}{{- '<|User|>' + m.content -}}
  {%- else -%}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|Assistant|><think>\\n' -}}{%- endif -%}"""
"""Thoughts are stripped from every answer, and opened by the generation prompt."""

PHI4 = """\
{%- for m in messages -%}{{- '<|' + m.role + '|>' + m.content + '<|end|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""
"""Content is content; a turn does not end with the end-of-sequence token."""

GPT_OSS = """\
{%- for m in messages -%}
  {%- if m.role == 'assistant' -%}
    {%- if m.thinking and loop.last -%}
      {{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}
    {%- endif -%}
    {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') -}}
  {%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"""
"""Thoughts are a message of their own, in another channel."""

TEMPLATES = {"qwen3": QWEN3, "deepseek_r1": DEEPSEEK_R1, "phi4": PHI4, "gpt_oss": GPT_OSS}
SPECIAL = {
    "qwen3": ("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    "deepseek_r1": ("<|User|>", "<|Assistant|>", "<think>", "</think>"),
    "phi4": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "gpt_oss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
}
ENDS = {"qwen3": "<|im_end|>", "gpt_oss": "<|return|>"}


def chat_tokenizer(name: str | None) -> PreTrainedTokenizerFast:
    """A lossless tokenizer of bytes with the template of a family, or with none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, bos_token="<bos>", eos_token=ENDS.get(name or "", "<eos>"), pad_token="<pad>",
        additional_special_tokens=list(SPECIAL.get(name or "", ())), clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if name is not None:
        tokenizer.chat_template = TEMPLATES[name]
    return tokenizer
