"""Writer: continuations on stdout as their rounds come in, and each one's figures on stderr."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from selfspec.cli.show import tell
from selfspec.cli.terminal import DRAFTED, asides, results

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from selfspec.cli.show import Show
    from selfspec.decoding.request import Committed
    from selfspec.speculator import SelfSpeculator


class Writer:
    """Writes continuations as their rounds come in; ctrl-C ends one early. Adds up the figures of all."""

    def __init__(self, spec: SelfSpeculator, tokenizer: PreTrainedTokenizerBase, show: Show | None) -> None:
        from selfspec.decoding.stats import Stats

        self._spec, self._tokenizer = spec, tokenizer
        self._style = show.style if show is not None else _drafted
        self._out = results()
        self.stats = Stats()
        self.interrupted = False
        if show is not None and self._out.color_system is not None and not self._out.no_color:
            tell([show.legend()])

    def write(self, prompt: Tensor, **options: Any) -> None:
        """Write one continuation, then its figures."""
        from selfspec.cli.detokenizer import Detokenizer

        text, before = Detokenizer(self._tokenizer, prompt.tolist()), self._spec.stats
        rounds = self._spec.stream_rounds(prompt.to(self._spec.model.device)[None], **options)
        try:
            for committed in rounds:
                for index, token in enumerate(committed.tokens):
                    style = self._style(committed, index)
                    if piece := text.put(token):
                        self._put(piece, style)
        except KeyboardInterrupt:
            self.interrupted = True
        self._put(text.end() + "\n")
        rounds.close()
        if self._spec.stats is not before:  # else it was interrupted before it began
            self.stats.add(self._spec.stats)
            asides().out(_figures(self._spec), style="dim", highlight=False)

    def _put(self, piece: str, style: str = "") -> None:
        self._out.out(printable(piece), style=style or None, end="", highlight=False)
        self._out.file.flush()


def _drafted(committed: Committed, index: int) -> str:
    """The style of a token, where only drafted ones have one."""
    return DRAFTED if index < committed.accepted else ""


def printable(text: str) -> str:
    """Without the control characters by which a text could command the terminal."""
    return "".join(char for char in text if char in "\n\t" or not (char < " " or "\x7f" <= char < "\xa0"))


def _figures(spec: SelfSpeculator) -> str:
    stats = spec.stats
    how = [stats.backend, *["compiled"] * stats.compiled, *["captured"] * stats.captured]
    chosen = ", ".join(f"{choice} ({passes}x)" for choice, passes in sorted(stats.choices.items()))
    adapted = [f"drafted by {chosen}"] if stats.policy == "adaptive" else []
    return "; ".join([str(stats), *adapted, ", ".join(how), *stats.slower_paths])
