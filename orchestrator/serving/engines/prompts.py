"""What a query asks as tokens: a conversation in the chat template it was trained with, or a plain text."""

from __future__ import annotations

from typing import Any

from clusters.safe.reading import first_line
from orchestrator.data.rendering.chat import template_of
from orchestrator.serving.engines.protocol import Query, Refused


def prompt_tokens(tokenizer: Any, query: Query) -> list[int]:
    """Raises Refused for a conversation that the template does not take, or without a token."""
    if query.tokens is not None:
        tokens = query.tokens
        if unknown := [token for token in tokens if token >= len(tokenizer)]:
            raise Refused(400, f"token {unknown[0]}: the tokenizer's last one is {len(tokenizer) - 1}", param="prompt")
    elif query.messages is None:
        tokens = list(tokenizer(query.prompt or "")["input_ids"])
    else:
        tokens = _of_conversation(tokenizer, _with_system(query))
    if not tokens:
        raise Refused(400, "the prompt is empty", param="prompt")
    return tokens


def _with_system(query: Query) -> list[dict[str, str]]:
    messages, system = query.messages or [], query.model.system
    if system and all(message["role"] != "system" for message in messages):
        return [{"role": "system", "content": system}, *messages]  # as it was trained
    return messages


def _of_conversation(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    if template_of(tokenizer) is None:
        if [message["role"] for message in messages] == ["user"]:  # as such a model is trained: the bare prompt
            return list(tokenizer(messages[0]["content"])["input_ids"])
        raise Refused(
            400,
            "this model has no chat template: send one user message, or a text to /v1/completions",
            "no_chat_template",
            "messages",
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # Jinja raises its own tree, templates raise what they like
        message = f"the chat template refuses the conversation: {first_line(error)}"
        raise Refused(400, message, "invalid_conversation", "messages") from None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
