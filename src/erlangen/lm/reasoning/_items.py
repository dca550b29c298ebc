"""What one question is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Item:
    """A question with a closed choice of answers."""

    family: str
    kind: str
    """The rule or template it was made from."""
    prompt: str
    """Ends without a space."""
    candidates: tuple[str, ...]
    """Texts that may follow the prompt, each with its leading space; none is a beginning of another."""
    answer: int
    """Which of the candidates is right."""
    block: int = 0
    """Items of one number were made together."""
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Accuracy of a blind choice."""
        return 1 / len(self.candidates)

    @property
    def text(self) -> str:
        """The prompt with the right answer."""
        return self.prompt + self.candidates[self.answer]
