"""A CLIP model and tokenizers with chat templates, small and random, for `ClipRelevance`."""

from __future__ import annotations

import functools

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import vlmprune as vp

PARTS = (
    "{%- macro said(content) %}{% for part in content if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in content if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endmacro -%}"
)

TEMPLATES = {
    "llava": PARTS + "{% for m in messages %}{{ m['role'].upper() + ': ' + said(m['content']) + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "mistral": PARTS + "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + said(m['content']) + ' [/INST]' }}"
    "{% else %}{{ ' ' + said(m['content']) + '</s>' }}{% endif %}{% endfor %}",
    "chatml": PARTS + "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + said(m['content']) + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": PARTS + "{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + said(m['content']) + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
    "strings": "{% for m in messages %}{{ m['role'].upper() + ': ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "strings, printed": "{% for m in messages %}{{ '<s>' ~ m['role'] ~ '\n' ~ m['content'] ~ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}",
}
"""As LLaVA-1.5, LLaVA-NeXT with Mistral, with Yi, with Llama 3 write; and tokenizers that know content as a string only."""


def tokenizer(chat_template: str | None = None, marks: bool = False, longest: int = 77) -> PreTrainedTokenizerFast:
    """One token per byte, so that every text comes back as it was; with `marks`, CLIP's at the beginning and the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: number + 3 for number, letter in enumerate(alphabet)} | {"<pad>": 0, "<begin>": 1, "<finish>": 2}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    if marks:
        made.post_processor = processors.TemplateProcessing(
            single="<begin> $A <finish>", special_tokens=[("<begin>", 1), ("<finish>", 2)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<begin>", eos_token="<finish>", model_max_length=longest
    )
    fast.chat_template = chat_template
    return fast


@functools.cache
def clip(width: int = 16) -> CLIPModel:
    text = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300}
    vision = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(text_config=text | ends, vision_config=vision | {"image_size": 16, "patch_size": 8}, projection_dim=12)
        ).eval()
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            parameter.normal_(0, 0.3, generator=draw)
    return model


def relevance(template: str | None = None, longest: int = 77, **more) -> vp.ClipRelevance:
    return vp.ClipRelevance(clip(), tokenizer(marks=True, longest=longest), tokenizer(template), **more)


def behind(name: str, *said: str, ask: bool = True) -> str:
    """What stands behind the picture of a conversation, written by a template: the user's words, the assistant's, …"""
    turns = []
    for number, text in enumerate(said):
        content = [{"type": "text", "text": text}]
        content = [{"type": "image"}, *content] if number == 0 else content
        if name.startswith("strings"):
            content = "<image>\n" * (number == 0) + text
        turns.append({"role": ("user", "assistant")[number % 2], "content": content})
    written = tokenizer(TEMPLATES[name]).apply_chat_template(turns, tokenize=False, add_generation_prompt=ask)
    assert written.count("<image>") == 1
    return written.partition("<image>")[2]


def ids(text: str) -> torch.Tensor:
    return torch.tensor(tokenizer()(text)["input_ids"])
