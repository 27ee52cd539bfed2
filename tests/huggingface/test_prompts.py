from __future__ import annotations

from pathlib import Path

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
        ('{"prompt": "a", "promt": "b"}', "line 2 has an unknown key 'promt'"),
        ('{"prompt": ""}', "line 2: the prompt is empty"),
        ('{"prompt": 7}', "line 2: 'prompt' must be a string, but int was given"),
        ('{"messages": []}', "line 2: the chat is empty"),
        (
            '{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
            "line 2: 'content' must be a string, but list",
        ),
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
