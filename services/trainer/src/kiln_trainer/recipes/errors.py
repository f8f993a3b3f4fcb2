"""Why a job's data or settings cannot be trained on."""

from kiln_common.errors import InvalidRequest


class DocumentTooLong(InvalidRequest):
    """One document alone does not fit into a micro-batch."""

    code = "document_too_long"
    hint = "Raise batch_tokens, or shorten the example."

    def __init__(self, index: int, num_tokens: int, limit: int) -> None:
        super().__init__(f"document {index} has {num_tokens} tokens, batch_tokens allows {limit}")


class NoTrainableTokens(InvalidRequest):
    """Nothing in the data has a weight, so every gradient would be zero."""

    code = "no_trainable_tokens"
    hint = "Give at least one example an assistant turn, or a completion of at least one token."


class InvalidTrainingData(InvalidRequest):
    """Lengths, weights or log-probabilities of a document contradict each other."""

    code = "invalid_training_data"
    hint = "The message names the example or rollout; mend it, or leave it out."


class UnknownOption(InvalidRequest):
    """A setting names a variant there is not; the message lists those there are."""

    code = "unknown_training_option"
    hint = "Write one of the variants that the message lists, or leave the setting out."

    def __init__(self, field: str, value: str, known: tuple[str, ...]) -> None:
        super().__init__(f"{field} is {value!r}, known are {', '.join(known)}", param=field)
