"""Fixtures of the folder: pytest finds imported fixtures here."""

from captured import compilations, fresh_compiler, reads, reads_by_round  # noqa: F401
