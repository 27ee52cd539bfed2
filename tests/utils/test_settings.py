"""Described settings: their bounds, and the options that commands get from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import pytest
import typer
from selfspec_search import SearchSettings
from typer.testing import CliRunner

from selfspec import DecodeOptions, InputError
from selfspec.cli.options import Without, with_options
from selfspec.utils.settings import Described, SettingError, check_settings, described_fields


@dataclass(frozen=True, kw_only=True)
class Bounded:
    count: Annotated[int, Described("How many.", least=3)] = 5
    share: Annotated[float | None, Described("How much.", above=0, most=1)] = None
    seconds: Annotated[float | None, Described("How long.", above=0, unit="seconds")] = None
    place: Annotated[int, Described("Where.", least=2, most=7)] = 2
    memory: Annotated[int | None, Described("Bytes.", least=1, is_size=True)] = None
    kind: Annotated[Literal["odd", "even"], Described("Which.")] = "odd"
    internal: int = -1

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"count": 2}, "count is 2, but it must be at least 3"),
        ({"share": 0}, "share is 0, but it must be above 0 and at most 1"),
        ({"share": float("nan")}, "share is nan, but it must be above 0 and at most 1"),
        ({"seconds": float("inf")}, "seconds is inf seconds, but it must be more than 0 and finite"),
        ({"place": 8}, "place is 8, but it must be between 2 and 7"),
        ({"memory": 0}, "memory is 0, but it must be at least 1 byte"),
        ({"kind": "both"}, "kind is 'both', but it must be one of odd, even"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_value_out_of_bounds_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as refusal:
        Bounded(**given)
    assert str(refusal.value) == message


def test_values_at_the_bounds_and_none_are_taken() -> None:
    Bounded(count=3, share=1, seconds=1e-9, place=7, memory=1, kind="even")
    Bounded(share=None, seconds=None)


def test_a_command_gets_an_option_for_each_described_field_but_those_it_leaves_out() -> None:
    seen: list[Bounded] = []

    def command(
        settings: Annotated[Bounded, Without({"place"})], times: Annotated[int, Described("How often.", least=1)] = 1
    ) -> None:
        seen.append(settings)

    app = typer.Typer()
    app.command()(with_options(command))
    run = CliRunner().invoke
    assert run(app, ["--count", "11", "--memory", "2K", "--kind", "even"]).exit_code == 0
    assert run(app, []).exit_code == 0
    assert seen == [Bounded(count=11, memory=2048, kind="even"), Bounded()]
    assert "How many." in run(app, ["--help"]).stdout
    for unknown in ("--place", "--internal"):
        assert run(app, [unknown, "3"]).exit_code == 2
    assert run(app, ["--kind", "both"]).exit_code == 2
    for arguments, message in (
        (["--count", "2"], "--count is 2, but it must be at least 3"),
        (["--times", "0"], "--times is 0, but it must be at least 1"),
        (["--memory", "2X"], "--memory is '2X', but a size such as 512M or 4G is expected"),
    ):
        error = run(app, arguments).exception
        assert isinstance(error, InputError)
        assert str(error) == message


def test_every_setting_of_a_search_is_described() -> None:
    assert list(described_fields(SearchSettings)) == [field.name for field in fields(SearchSettings)]


def test_decode_options_read_a_size_and_refuse_what_is_none() -> None:
    assert DecodeOptions(draft_memory="2G").draft_memory_bytes == 2 * 2**30
    assert DecodeOptions(draft_memory=0).draft_memory_bytes == 0
    assert DecodeOptions().draft_memory_bytes is None
    with pytest.raises(InputError, match=r"^draft_memory is 'much', but a size such as 512M or 4G is expected$"):
        DecodeOptions(draft_memory="much")
    with pytest.raises(InputError, match="policy 'eager' is unknown; choose one of adaptive, fixed"):
        DecodeOptions(policy="eager")  # type: ignore[arg-type]
