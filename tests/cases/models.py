"""The tiny models that the cases name: real tokenizer, random weights, one chat template each, built when needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns of user and assistant must take turns') }}{% endif %}"
    "{% if m['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_SILENT_DROP = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
_NO_EOS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + '\n' }}"
    "{% else %}{{ m['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% set content = m['content'] %}{% set think = '' %}{% if '</think>' in content %}"
    "{% set think = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{% if loop.index0 > ns.last %}"
    "{{ '<|im_start|>assistant\n<think>\n' + think + '\n</think>\n\n' + content }}{% else %}"
    "{{ '<|im_start|>assistant\n' + content }}{% endif %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Tinybot, made by nobody.<|im_end|>\n' }}{% endif %}" + _CHATML
)
TEMPLATES = {
    "llama-chatml": _CHATML,
    "llama-gemma": _GEMMA,
    "llama-silentdrop": _SILENT_DROP,
    "llama-noeos": _NO_EOS,
    "llama-r1": _R1,
    "llama-qwen3": _QWEN3,
    "llama-defaultsys": _DEFAULT_SYSTEM,
    "llama-base": None,
    "llama-bos": None,
    **dict.fromkeys(("llama-untied", "llama-moretokens", "gpt2", "opt", "phi3", "mixtral", "qwen3moe"), _CHATML),
}


class CaseModels:
    """Builds models below `folder`, each once; `source` is a folder with SmolLM2's tokenizer."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.folder = source, folder

    def build(self, name: str) -> Path:
        """The folder of the model `name`, a key of TEMPLATES."""
        out = self.folder / name
        if out.exists():
            return out
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(_config(name, self._tokenizer)).save_pretrained(out)
        if name == "llama-moretokens":
            self._longer_tokenizer().save_pretrained(out)
        elif name == "llama-bos":
            self._beginning_tokenizer().save_pretrained(out)
        else:
            shutil.copytree(self._tokenizer_folder, out, dirs_exist_ok=True)
        if (template := TEMPLATES[name]) is not None:
            (out / "chat_template.jinja").write_text(template)
        return out

    def link(self, parent: Path, names: Iterable[str]) -> None:
        """Build the named models and link their folder as `models` below `parent`."""
        for name in sorted(names):
            self.build(name)
        if not (parent / "models").exists():
            (parent / "models").symlink_to(self.folder)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.source)
        tokenizer.chat_template = None
        return tokenizer

    @cached_property
    def _tokenizer_folder(self) -> Path:
        folder = self.folder / ".tokenizer"
        self._tokenizer.save_pretrained(folder)
        settings = folder / "tokenizer_config.json"
        written = json.loads(settings.read_text())
        if written.pop("chat_template", None) is None:
            settings.write_text(json.dumps(written, indent=2) + "\n")
        return folder

    def _longer_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|ticket|>", "<|order|>"]})
        return tokenizer

    def _beginning_tokenizer(self) -> Any:
        """One that sets `<s>` before every text by itself, as Llama 2's does; both tokens are among the known ones."""
        from tokenizers.processors import TemplateProcessing
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._tokenizer_folder)
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
        number = tokenizer.convert_tokens_to_ids("<s>")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", number)])
        return tokenizer


def _config(name: str, tokenizer: Any) -> Any:
    import transformers

    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    padded = ends | {"pad_token_id": tokenizer.pad_token_id}
    gqa = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    num_added = 2 if name == "llama-bos" else 0
    wide = {**gqa, "vocab_size": len(tokenizer) + num_added, "intermediate_size": 64}
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
        return transformers.GPT2Config(vocab_size=len(tokenizer), **sizes, **ends)
    if name == "opt":
        sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.OPTConfig(
            vocab_size=len(tokenizer), **sizes, max_position_embeddings=512, word_embed_proj_dim=32, **padded
        )
    if name == "phi3":
        lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 512}
        return transformers.Phi3Config(**wide, **lengths, **padded)
    if name == "mixtral":
        return transformers.MixtralConfig(
            **wide, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=512
        )
    if name == "qwen3moe":
        experts = {"moe_intermediate_size": 16, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2}
        return transformers.Qwen3MoeConfig(**wide, **experts, max_position_embeddings=512)
    return transformers.LlamaConfig(
        **wide, max_position_embeddings=1024, tie_word_embeddings=name != "llama-untied", **padded
    )
