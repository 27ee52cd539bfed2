"""Workloads of the benchmark of drafters: their files, and the arithmetic that chose them."""

from __future__ import annotations

from random import Random

import pytest
from workloads.editing import VERSIONS, Function, short_functions
from workloads.faithfulness import copied, faithful, looped, whole_copies
from workloads.workload import CODE, COUNT, EDITING, MIXED, NEW_TOKENS, PROSE, WORKLOADS, Workload, endless

from selfspec import InputError
from selfspec.demo.copying import NEW_DOCSTRING
from selfspec.demo.corpus import Source
from selfspec.huggingface.loading import Loaded, load
from selfspec.huggingface.prompts import read_prompts

FILE = '''
class Box:
    def size(self):
        """How large it is."""
        return self.width * self.height
'''


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("demo", device="cpu", dtype="float32")


def texts(workload: Workload) -> list[str]:
    return [prompt.text for prompt in read_prompts(workload.path)]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_prompt_leaves_room_for_the_new_tokens(workload: Workload, loaded: Loaded) -> None:
    prompts = workload.prompts(loaded)
    assert len(prompts) == COUNT
    assert all(prompt.ndim == 1 and len(prompt) + NEW_TOKENS <= 1024 for prompt in prompts)


def test_no_prompt_is_of_two_kinds_and_the_mixed_workload_takes_turns() -> None:
    code, editing, prose, mixed = (texts(workload) for workload in (CODE, EDITING, PROSE, MIXED))
    assert len(code) == len(editing) == len(prose) == COUNT
    assert len({*code, *editing, *prose}) == 3 * COUNT
    assert not any(NEW_DOCSTRING in prompt for prompt in code + prose), "only editing has markers"
    for place, kind in enumerate((code, editing, prose)):
        assert mixed[place::4] == kind[: COUNT // 4]
    assert not set(mixed[3::4]) & set(editing)


def test_editing_prompts_hold_the_function_that_is_to_be_repeated() -> None:
    for prompt in texts(EDITING):
        function, *versions = prompt.split(f"\n\n{NEW_DOCSTRING}")
        header, body = function.split("\n", 1)
        assert header.startswith("def ")
        assert versions.pop() == ""  # the prompt ends with the marker
        assert len(versions) == VERSIONS
        assert all(version.startswith(f"\n{header}\n") and version.endswith(f'"""\n{body}') for version in versions)


def test_a_function_loses_its_indentation_and_its_docstring(loaded: Loaded) -> None:
    (function,) = short_functions([Source(path="box.py", text=FILE)], loaded.tokenizer, Random(0))
    assert function == Function(name="size", header="def size(self):", body="    return self.width * self.height")
    assert function.edited("Of {name}.") == 'def size(self):\n    """Of size."""\n    return self.width * self.height'


def test_a_copy_has_eight_tokens_in_a_row_or_more() -> None:
    assert copied(range(20), [99, *range(5, 13), 99]).tolist() == [False, *[True] * 8, False]
    assert not copied(range(20), [99, *range(5, 12), 99]).any()


def test_a_block_that_follows_itself_at_once_is_a_loop_and_no_true_copy() -> None:
    looping = [1, 2, 3, 4] * 3
    assert looped(looping).tolist() == [False] * 4 + [True] * 8
    assert not looped(list(range(40)) * 2).any()  # as long as a function with its marker
    assert faithful(looping, looping).sum() == 4


def test_whole_copies_may_differ_in_their_docstrings_alone() -> None:
    function = Function(name="f", header="def f(x):", body="    return x")
    text = "\n".join([function.edited("One."), function.edited("Two."), 'def f(x):\n    """Three."""\n    return 3\n'])
    assert whole_copies(function, text) == 2


def test_more_prompts_than_there_are_are_refused(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="12 prompts; 13 were asked for"):
        PROSE.prompts(loaded, count=13)


def test_endless_texts_never_hold_the_end_of_text(loaded: Loaded) -> None:
    assert endless(loaded) == {"suppress_tokens": [loaded.model.config.eos_token_id]}
