"""What importing the package brings along."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ["optuna", "flash_attn", "matplotlib", "typer", "fastapi", "prometheus_client", "selfspec_search"]


def imported_by(statement: str, *names: str) -> list[str]:
    code = f"{statement}\nimport sys\nprint(*(name for name in {names} if name in sys.modules))"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def test_the_runtime_imports_neither_the_search_nor_its_tools() -> None:
    statement = "from selfspec import *\nimport selfspec.speculator, selfspec.serving.metrics, selfspec.plan"
    assert imported_by(statement, *HEAVY) == []


def test_importing_selfspec_alone_does_not_wait_for_torch() -> None:
    assert imported_by("import selfspec", *HEAVY, "torch", "transformers") == []


def test_importing_the_search_alone_waits_for_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "optuna", "matplotlib", "sqlalchemy"]
    assert imported_by("import selfspec_search", *heavy) == []
    assert set(imported_by("from selfspec_search import search", *heavy)) >= {"torch", "transformers", "optuna"}


@pytest.mark.slow
def test_every_public_name_of_the_search_is_itself_whatever_was_imported_before() -> None:
    code = """
import pkgutil, importlib, inspect, selfspec_search
for module in pkgutil.iter_modules(selfspec_search.__path__):
    importlib.import_module(f"selfspec_search.{module.name}")
print(*(name for name in selfspec_search.__all__ if inspect.ismodule(getattr(selfspec_search, name))))
print(*(set(selfspec_search.__all__) - set(dir(selfspec_search))))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []
    with pytest.raises(ImportError, match="cannot import name 'explore'"):
        exec("from selfspec_search import explore")


def test_every_public_name_can_be_imported() -> None:
    import selfspec

    assert all(getattr(selfspec, name).__name__ == name for name in selfspec.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'speculate'"):
        selfspec.speculate  # noqa: B018


def test_what_plans_are_made_of_by_hand_is_public() -> None:
    import selfspec
    from selfspec.plan.schema import Setting

    parts = {part for part in Setting.__subclasses__() if part.__module__.startswith("selfspec.")}
    assert {part.__name__ for part in parts} >= {"RoundCosts", "PromptLookup"}
    assert all(getattr(selfspec, part.__name__) is part for part in parts)
