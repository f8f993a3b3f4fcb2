"""Why a job is not accepted, and why one failed for no fault of its arithmetic."""

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class InvalidJobConfig(InvalidRequest):
    """A setting lies outside its range."""

    code = "invalid_job_config"
    hint = "The field named in `param` has to be changed."


class InvalidReward(InvalidRequest):
    code = "invalid_reward"
    hint = "Rewards are finite numbers of a reasonable size."


class GroupTooSmall(InvalidRequest):
    code = "group_too_small"
    hint = "A group compares completions of one prompt: give at least two."


class LengthMismatch(InvalidRequest):
    code = "length_mismatch"
    hint = "Give one number for each token, or none at all."


class EmptyTrainingData(InvalidRequest):
    code = "empty_training_data"
    hint = "Each example or rollout needs at least one token to learn from."


class JobBaseModelMismatch(KilnError):
    """The tokens belong to another base model than the engine serves."""

    code = "base_model_mismatch"
    kind = ErrorKind.CONFLICT
    hint = "Submit the job again for the model that is being served."


class PayloadTooLarge(KilnError):
    code = "payload_too_large"
    kind = ErrorKind.TOO_LARGE
    hint = "Split the data over several jobs."


class CorrectionsTaken(KilnError):
    """Each correction is learned once: another job has it, has learned it, or somebody deleted it."""

    code = "corrections_taken"
    kind = ErrorKind.CONFLICT
    hint = "Post the job again: `unused` takes those that are free by then."


class PayloadGone(KilnError):
    """A job's data was let go of to make room; its record is still there."""

    code = "payload_gone"
    kind = ErrorKind.CONFLICT
    hint = "Post the job's body again."


class PayloadCorrupt(KilnError):
    """What Redis holds is not what was accepted."""

    code = "payload_corrupt"
    hint = "Submit the job again, and check the disk under Redis."


class JobCrashedTrainer(KilnError):
    code = "job_crashed_trainer"
    hint = "The trainer's log of those times says why; a smaller batch_tokens needs less memory."

    def __init__(self, num_crashes: int) -> None:
        super().__init__(f"the trainer ended {num_crashes} times while it ran this job, without progress")


class TrainerOutOfMemory(KilnError):
    code = "trainer_out_of_memory"
    hint = "Lower batch_tokens, or shorten the examples."


class JobFailedUnexpectedly(KilnError):
    code = "job_failed"
    hint = "The trainer's log has the traceback."


class StartRankTooHigh(InvalidRequest):
    """The adapter to start from fits no engine's slot any more."""

    code = "adapter_rank_too_high"
    hint = "Start from another adapter, or start the engine with a higher max_adapter_rank."

    def __init__(self, reference: str, rank: int, limit: int) -> None:
        super().__init__(f"{reference} has rank {rank}, the engine holds up to {limit}")


class WorkerStopping(Exception):
    """The trainer was asked to stop: the job goes back to the queue at this step boundary."""
