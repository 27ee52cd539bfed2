from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from saved import byte_tokenizer

from selfspec import InputError
from selfspec.huggingface.prompts import Prompt, check_length, encode_prompts, load_prompts, read_prompts

TOKENIZER = byte_tokenizer()


def file_of(tmp_path: Path, content: str | bytes, name: str = "prompts.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def chat(*messages: dict[str, Any]) -> str:
    """A line of a file: a chat of the user's messages."""
    return json.dumps({"messages": [{"role": "user"} | message for message in messages]})


def text_of(tokens: torch.Tensor) -> str:
    return TOKENIZER.decode(tokens)


def test_a_text_file_holds_one_prompt_per_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = file_of(tmp_path, "\ufeffone\r\n\n  two\x0c and more \n   \nthree")
    assert [text_of(tokens) for tokens in load_prompts(path, TOKENIZER)] == ["one", "  two\x0c and more ", "three"]


def test_prompts_are_one_dimensional_long_tensors(tmp_path: Path) -> None:
    (tokens,) = load_prompts(file_of(tmp_path, "naïve"), TOKENIZER)
    assert tokens.dtype == torch.long
    assert tokens.shape == (6,)  # ï takes two bytes


def test_json_lines_hold_prompts_of_several_lines_and_chats(tmp_path: Path) -> None:
    lines = '{"prompt": "a\\nb"}\n\n{"messages": [{"role": "user", "content": "hi"}]}\n'
    prompts = load_prompts(file_of(tmp_path, lines, "p.jsonl"), TOKENIZER)
    assert [text_of(tokens) for tokens in prompts] == ["a\nb", "user: hi\nassistant: "]


def test_chat_turns_a_text_into_a_chat(tmp_path: Path) -> None:
    (tokens,) = load_prompts(file_of(tmp_path, "hi"), TOKENIZER, chat=True)
    assert text_of(tokens) == "user: hi\nassistant: "


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": ', "line 2 is not JSON: Expecting value at column"),
        ("9" * 5000, "line 2 is not JSON"),
        ('"text"', "line 2 must be an object"),
        ("{}", "line 2 must be an object with either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "line 2 must be an object with either"),
        ('{"promt": "b"}', "line 2 must be an object with either"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": 7}', "line 2: 'prompt' must be a string, but int was given"),
        ('{"messages": []}', "line 2: the chat is empty"),
        (chat({"content": [{"type": "text"}]}), "'content' holds a part of type 'text' without a 'text' string"),
        (chat({"content": [{"type": "image_url", "image_url": {}}]}), "a part of type 'image_url', but only text"),
        (chat({"content": [7]}), "line 2: 'content' holds a part of type 'text' without a 'text' string"),
        (chat({"content": None}), "line 2: 'content' must be a string or a list of text parts, but none was given"),
        (chat({}), "line 2: 'content' must be a string or a list of text parts, but none was given"),
        (chat({"content": {"text": "hi"}}), "list of text parts, but dict was given"),
        (chat({"content": ""}, {"content": []}), "line 2: the chat is empty"),
        ('{"messages": "hi"}', "line 2: 'messages' must be a list"),
        ('{"messages": [{"content": "hi"}]}', "line 2: 'messages' must be a list of objects with 'role'"),
        ('{"messages": [{"role": "robot", "content": "hi"}]}', "chat template: no robots here"),
        ('{"prompt": "\\ud800"}', "line 2 holds a lone surrogate"),
    ],
)
def test_the_error_gives_the_number_of_a_bad_json_line(tmp_path: Path, line: str, complaint: str) -> None:
    path = file_of(tmp_path, f'{{"prompt": "fine"}}\n{line}\n', "p.jsonl")
    with pytest.raises(InputError, match=complaint) as raised:
        load_prompts(path, TOKENIZER)
    assert "\n" not in str(raised.value)


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}{{ t['function']['name'] }}?{% endfor %}"
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% for c in m.get('tool_calls', []) %}"
    "{% for name, value in c['function']['arguments'].items() %}{{ name ~ '=' ~ value }}{% endfor %}"
    "{% endfor %};{% endfor %}"
)


def test_chats_of_openais_format_are_rendered_with_content_parts_tools_and_calls(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "input_text", "text": "two"}, "three"]
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "tool_call_id": "1", "content": "3"}
    line = json.loads(chat({"content": parts}, call, {k: v for k, v in call.items() if k != "content"}, result))
    line |= {"model": "m", "temperature": 0, "tools": [{"type": "function", "function": {"name": "add"}}]}
    (prompt,) = read_prompts(file_of(tmp_path, json.dumps(line), "p.jsonl"))
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    rendered = "add?user:one\ntwo\nthree;assistant:a=1;assistant:a=1;tool:3;"
    assert text_of(prompt.encode(tokenizer)) == rendered


def test_arguments_that_are_no_json_stay_a_string(tmp_path: Path) -> None:
    call = {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{a"}}]}
    (prompt,) = read_prompts(file_of(tmp_path, chat(call), "p.jsonl"))
    assert prompt.messages[0]["tool_calls"][0]["function"]["arguments"] == "{a"


def test_further_keys_of_a_line_are_not_read(tmp_path: Path) -> None:
    lines = [
        {"task_id": "HumanEval/0", "prompt": "def f(", "entry_point": "f", "test": None},
        {"prompt": [{"role": "user", "content": "hi"}], "answer": "a chat under 'prompt'"},
    ]
    file = file_of(tmp_path, "\r\n\r\n".join("\ufeff" + json.dumps(line) for line in lines), "p.jsonl")
    assert [text_of(tokens) for tokens in load_prompts(file, TOKENIZER)] == ["def f(", "user: hi\nassistant: "]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[7]['content'] }}",
        "{{ messages[0].content.x.y }}",
        "{{ 'a' + 1 }}",
        "{{ [].pop() }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ raise_exception('two\nlines') }}",
        "{% if %}",
    ],
)
def test_a_template_that_cannot_render_a_chat_is_one_line(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="does not fit the tokenizer's chat template") as raised:
        Prompt(text="hi").as_chat().encode(tokenizer)
    assert "\n" not in str(raised.value)


def test_a_token_that_only_the_tokenizer_has_is_refused_by_name() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    size = len(tokenizer) - 1
    encode_prompts([Prompt(text="hi")], tokenizer, vocabulary=size)
    with pytest.raises(
        InputError,
        match=rf"line 3 holds '<pad>', the tokenizer's token {size}, but the model has tokens 0..{size - 1};",
    ):
        encode_prompts([Prompt(text="a<pad>", source="line 3")], tokenizer, vocabulary=size)


def test_missing_empty_and_unreadable_files_have_different_errors(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path / "none.txt", "no prompt file at"),
        (file_of(tmp_path, " \n\n", "empty.txt"), "is empty"),
        (file_of(tmp_path, b"ab\xff"), r"not UTF-8 text \(at byte 2\)"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(InputError, match=message):
            read_prompts(path)


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        Prompt(text="hi").as_chat().encode(byte_tokenizer(chat=False))


def test_prompts_that_are_too_short_or_too_long_are_refused() -> None:
    encode_prompts([Prompt(text="12345")], TOKENIZER, at_least=5, context=7, new_tokens=2)
    with pytest.raises(InputError, match="the prompt is empty"):
        encode_prompts([Prompt(text="")], TOKENIZER)
    for tokens, limits, message in (
        (1, {"at_least": 2}, "has 1 token, but at least 2 are needed"),
        (8, {"context": 7}, "has 8 tokens, but the model's context is 7"),
        (5, {"context": 7, "new_tokens": 3}, "with 3 new ones exceeds the model's context of 7"),
    ):
        with pytest.raises(InputError, match=message):
            check_length(tokens, "the prompt", **limits)
