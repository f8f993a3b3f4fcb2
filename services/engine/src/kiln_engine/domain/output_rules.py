"""What a request demands of its tokens beyond sampling: a grammar, and an end of the thinking."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Matcher(Protocol):
    """A place in a grammar: what one completion has written of it."""

    @property
    def is_at_end(self) -> bool:
        """Whether nothing but an end token may follow."""
        ...

    def fork(self) -> Matcher:
        """Another one at the same place, to look ahead with."""
        ...

    def advance(self, token_id: int) -> None:
        """Go on by a token.

        Raises:
            GrammarFailed: the grammar does not allow the token, or went beyond its limits.
        """
        ...


class CompiledGrammar(Protocol):
    def start(self) -> Matcher:
        """A matcher at the beginning. Cheap: compiling was done before."""
        ...


@dataclass(frozen=True, slots=True)
class ThinkingRules:
    """How the thinking block ends that the prompt left open; fields as in engine.proto."""

    end_token_id: int
    budget_tokens: int | None = None
    before_end_token_ids: tuple[int, ...] = ()
    after_end_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class OutputRules:
    """Grammar and thinking of one request; fields as in engine.proto."""

    grammar: CompiledGrammar | None = None
    trigger_token_id: int | None = None
    thinking: ThinkingRules | None = None


@dataclass(frozen=True, slots=True)
class Allowance:
    """What may be drawn next: `only` one token; or what `matcher` allows, all without one.

    Less `banned_token_ids`, unless nothing is left without them.
    """

    only: int | None = None
    matcher: Matcher | None = None
    banned_token_ids: frozenset[int] = frozenset()


class Constraint(Protocol):
    """What a row of a plan holds of its sequence's rules.

    `allowance` speaks of the row's draw once every step before the row's has been committed.
    """

    @property
    def allowance(self) -> Allowance: ...

    def after(self, token_id: int) -> Constraint | None:
        """The same rules once `token_id` follows; None where it may not. Changes nothing here."""
        ...
