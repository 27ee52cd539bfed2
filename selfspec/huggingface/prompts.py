"""Prompts: files of text or JSON lines, and their token ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfspec.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
"""Suffixes of files with one JSON object per line; any other file is text with one prompt per line."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A text or a chat. `source` names the prompt in error messages."""

    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[Any, ...] = ()
    """The tools that a chat's request names, for the chat template."""
    source: str = "the prompt"

    def as_chat(self) -> Prompt:
        """The prompt with its text as a user's message; a chat is returned unchanged."""
        if self.messages:
            return self
        return Prompt(messages=({"role": "user", "content": self.text},), source=self.source)

    def encode(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Token ids `t`, with the special tokens that the tokenizer or its chat template adds."""
        import torch

        text = self._templated(tokenizer) if self.messages else self.text
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError(f"{self.source} holds a lone surrogate, which is no character; remove it") from None
        ids = tokenizer(text, add_special_tokens=not self.messages, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long, device="cpu")

    def _templated(self, tokenizer: PreTrainedTokenizerBase) -> str:
        from jinja2 import TemplateError

        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{self.source} is a chat, but the tokenizer has no chat template; give plain text, without --chat"
            )
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(self.messages), tools=list(self.tools) or None, tokenize=False, add_generation_prompt=True
                )
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{self.source} does not fit the tokenizer's chat template: {reason}") from None


def load_prompts(
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool = False,
    at_least: int = 1,
    context: int | None = None,
    new_tokens: int = 0,
) -> list[Tensor]:
    """The token ids `t` of each prompt in a file; see `read_prompts` and `encode_prompts`."""
    prompts = read_prompts(path)
    if chat:
        prompts = [prompt.as_chat() for prompt in prompts]
    return encode_prompts(prompts, tokenizer, at_least=at_least, context=context, new_tokens=new_tokens)


def encode_prompts(
    prompts: Iterable[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    at_least: int = 1,
    context: int | None = None,
    new_tokens: int = 0,
    vocabulary: int | None = None,
) -> list[Tensor]:
    """The token ids `t` of each prompt.

    Args:
        at_least: the fewest tokens that a prompt may have.
        vocabulary: the number of tokens that the model knows; a tokenizer may have more. None for no limit.
        context: the model's context in tokens; None for no limit.
        new_tokens: the number of new tokens that must fit into the context after each prompt.
    """
    encoded = []
    for prompt in prompts:
        tokens = prompt.encode(tokenizer)
        check_length(len(tokens), prompt.source, at_least=at_least, context=context, new_tokens=new_tokens)
        if vocabulary is not None and (highest := int(tokens.max())) >= vocabulary:
            raise InputError(
                f"{prompt.source} holds {tokenizer.decode(highest)!r}, the tokenizer's token {highest}, but the model "
                f"has tokens 0..{vocabulary - 1}; remove it from the prompt, or resize the model's embedding"
            )
        encoded.append(tokens)
    return encoded


def check_length(
    tokens: int, source: str, *, at_least: int = 1, context: int | None = None, new_tokens: int = 0
) -> None:
    """Raise `InputError` if a prompt has too few tokens, or too many for the context."""
    if tokens < at_least:
        short = "is empty" if tokens == 0 else f"has {tokens} token" + "s" * (tokens != 1)
        raise InputError(f"{source} {short}, but at least {at_least} are needed; write a longer prompt")
    if context is not None and tokens > context:
        raise InputError(f"{source} has {tokens} tokens, but the model's context is {context}; shorten the prompt")
    if context is not None and tokens + new_tokens > context:
        raise InputError(
            f"{source} has {tokens} tokens, which with {new_tokens} new ones exceeds the model's context of {context}; "
            "shorten the prompt, or ask for fewer new tokens"
        )


def read_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """The prompts of a file: one text per line, or JSON lines with `prompt` or `messages`. Blank lines are skipped.

    Raises:
        InputError: the file is missing, unreadable or without a prompt, or a line is malformed.
    """
    path = Path(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"no prompt file at {path}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompt file {path} is not UTF-8 text (at byte {error.start})") from None
    except OSError as error:
        raise InputError(f"prompt file {path} cannot be read: {error.strerror or error}") from None
    is_json = path.suffix.lower() in JSON_LINES
    prompts = []
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines(): a form feed belongs to the prompt
        text, source = line.removesuffix("\r").removeprefix("\ufeff"), f"{path} line {number}"
        if text.strip():
            prompts.append(_from_json(text, source) if is_json else Prompt(text=text, source=source))
    if not prompts:
        raise InputError(f"prompt file {path} is empty; write one prompt per line")
    return prompts


def _from_json(line: str, source: str) -> Prompt:
    """The prompt of one JSON object. Keys other than `prompt`, `messages` and `tools` are not read."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{source} is not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source} is not JSON that can be read: {error}") from None
    if not isinstance(data, dict) or len(data.keys() & {"prompt", "messages"}) != 1:
        raise InputError(f"{source} must be an object with either 'prompt' or 'messages'")
    value = data.get("prompt", data.get("messages"))
    if "messages" in data or isinstance(value, list):
        tools = data.get("tools") or []
        return _from_messages(value, tools if isinstance(tools, list) else [tools], source)
    if not isinstance(value, str):
        raise InputError(f"{source}: 'prompt' must be a string, but {type(value).__name__} was given")
    if not value:
        raise InputError(f"{source}: the prompt is empty")
    return Prompt(text=value, source=source)


def _from_messages(value: Any, tools: list[Any], source: str) -> Prompt:
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise InputError(f"{source}: 'messages' must be a list of objects with 'role' and 'content'")
    messages = tuple(_message(message, source) for message in value)
    if not any(message["content"] or message.get("tool_calls") for message in messages):
        raise InputError(f"{source}: the chat is empty")
    return Prompt(messages=messages, tools=tuple(tools), source=source)


def _message(message: dict[str, Any], source: str) -> dict[str, Any]:
    """A message of OpenAI's chat format as chat templates expect it: one text, and objects as arguments of calls."""
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_text_of(part, source) for part in content)
    elif content is None and (message.get("tool_calls") or message.get("function_call")):
        content = ""
    if not isinstance(content, str):
        given = "none" if content is None else type(content).__name__
        raise InputError(f"{source}: 'content' must be a string or a list of text parts, but {given} was given")
    message = message | {"content": content}
    if isinstance(message.get("tool_calls"), list):
        message["tool_calls"] = [_with_arguments(call) for call in message["tool_calls"]]
    return message


def _text_of(part: Any, source: str) -> str:
    """The text of a part of a message's content."""
    text = part.get("text") if isinstance(part, dict) else part
    kind = part.get("type", "text") if isinstance(part, dict) else "text"
    if kind not in ("text", "input_text", "output_text"):
        raise InputError(
            f"{source}: 'content' holds a part of type '{kind}', but only text can be read; remove the part"
        )
    if not isinstance(text, str):
        raise InputError(f"{source}: 'content' holds a part of type '{kind}' without a 'text' string")
    return text


def _with_arguments(call: Any) -> Any:
    """A tool call whose arguments are an object: OpenAI's format has the object as a JSON string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):  # a template may still print the string
        return call
    return call | {"function": function | {"arguments": arguments}}
