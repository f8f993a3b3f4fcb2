"""Why a job stops early."""

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class JobCancelled(KilnError):
    """Somebody cancelled the job; it ends at this step boundary."""

    code = "job_cancelled"
    kind = ErrorKind.CONFLICT
    hint = "POST /v1/train/jobs/{id}/retry makes a new job with the same data."


class ClaimLost(KilnError):
    """Another trainer holds the job now; this one must not write anything more about it."""

    code = "claim_lost"
    kind = ErrorKind.CONFLICT
    hint = "Nothing is to be done: the other trainer goes on with the job."


class WeightsLost(KilnError):
    """The engine whose weights the trainer reads is gone; the job waits for it and resumes from its checkpoint."""

    code = "weights_lost"
    kind = ErrorKind.UNAVAILABLE
    hint = "Nothing is to be done while the engine starts again; its log says why it ended."


class DeviceBroken(Exception):
    """The device failed in a way that lasts as long as this process; another one can go on."""


class ModelWithoutMtp(InvalidRequest):
    """`train_mtp` was asked for, and the base model has no multi-token-prediction layer."""

    code = "model_without_mtp"
    hint = "Leave train_mtp out: this checkpoint has no layer that drafts."
    param = "train_mtp"


class NoLearningSignal(InvalidRequest):
    """Every group's rewards are equal: every advantage would be zero."""

    code = "no_learning_signal"
    hint = "Give completions of one prompt different rewards, or sample with a higher temperature."
