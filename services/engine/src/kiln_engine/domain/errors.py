"""Why a request, an adapter or a step fails inside the engine."""

from __future__ import annotations

from kiln_common.errors import InvalidRequest, KilnError, Overloaded, Unavailable


class OutOfPages(KilnError):
    """Fewer pages are free than were asked for; nothing was reserved."""

    code = "out_of_pages"
    hint = "The engine should have waited for pages: this is a fault of Kiln's, please report it."

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} pages were asked for, {free} are free")


class OutOfStateSlots(KilnError):
    """Fewer state slots are free than were asked for; nothing was reserved."""

    code = "out_of_state_slots"
    hint = "The engine should have waited for slots: this is a fault of Kiln's, please report it."

    def __init__(self, wanted: int, free: int) -> None:
        super().__init__(f"{wanted} state slots were asked for, {free} are free")


class EmptyPrompt(InvalidRequest):
    """The prompt has no tokens, so there is nothing to go on from."""

    code = "empty_prompt"
    hint = "Send at least one token."
    param = "prompt_token_ids"


class AdapterUnavailable(Unavailable):
    """The adapter exists, but its bytes could not be brought to the device."""

    code = "adapter_unavailable"


class AdapterSlotsFull(Overloaded):
    """Every adapter slot is pinned by running requests."""

    code = "adapter_slots_full"
    retry_after_s = 5.0
    hint = "Wait for running requests to end, use fewer adapters at once, or raise num_adapter_slots."


class EngineDraining(Unavailable):
    """The engine is about to stop and takes no new requests."""

    code = "engine_draining"
    hint = "The engine is being stopped; send the request to another one or try again in a moment."


class AnswerHandedBack(Unavailable):
    """The engine stops before the answer has ended. A gateway goes on with it on another engine."""

    code = "answer_handed_back"
    hint = "No other engine was there to go on with the answer; try again in a moment."


class EngineFailed(Unavailable):
    """The forward pass that the request was part of failed, or the engine is about to be restarted."""

    code = "engine_failed"
    hint = "Try again in a moment; if it repeats, the engine's log has the traceback."


class NonFiniteLogits(KilnError):
    """The model gave NaN or infinity for this request; its neighbours in the batch are unharmed."""

    code = "non_finite_logits"
    hint = "The adapter's weights are too large, or the checkpoint is damaged; try the base model."

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"the model's output after {num_tokens} tokens is not finite")


class SessionOverflow(Overloaded):
    """The client does not read its step messages; its requests were cancelled."""

    code = "session_overflow"
    hint = "Read the stream without pause, or open fewer requests on it."


class GrammarTooSlow(InvalidRequest):
    """The schema or grammar took longer to compile than a request may take for it."""

    code = "grammar_too_slow"
    param = "grammar"
    hint = "Simplify the schema or grammar: fewer properties, smaller repetitions, fewer alternatives."

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"the grammar was not compiled within {limit_s:g} s")


class GrammarFailed(InvalidRequest):
    """The completion took the grammar beyond what may be computed in a step."""

    code = "grammar_failed"
    param = "grammar"
    hint = "Simplify the schema or grammar: it allows too many readings of the same text."

    def __init__(self, reason: str) -> None:
        super().__init__(f"the grammar could not be followed: {reason}")


class GrammarsUnavailable(Unavailable):
    """The engine has no tokenizer that it could check answers against a grammar with."""

    code = "grammars_unavailable"
    hint = "The engine's model folder needs tokenizer.json."
