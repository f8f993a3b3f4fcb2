"""Why a job is not accepted, and why one failed for no fault of its arithmetic."""

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class InvalidJobConfig(InvalidRequest):
    """A setting lies outside its range."""

    code = "invalid_job_config"
    hint = "The field named in `param` has to be changed."


class InvalidReward(InvalidRequest):
    """A reward is NaN, infinite or of a size that no training survives."""

    code = "invalid_reward"
    hint = "Rewards are finite numbers of a reasonable size."


class GroupTooSmall(InvalidRequest):
    """A group has fewer than two completions, so none is better or worse than another."""

    code = "group_too_small"
    hint = "A group compares completions of one prompt: give at least two."


class LengthMismatch(InvalidRequest):
    """Two lists that belong together have different lengths."""

    code = "length_mismatch"
    hint = "Give one number for each token, or none at all."


class EmptyTrainingData(InvalidRequest):
    """The job has no examples, or one of them has no tokens."""

    code = "empty_training_data"
    hint = "Each example or rollout needs at least one token to learn from."


class JobBaseModelMismatch(KilnError):
    """The tokens belong to another base model than the engine serves."""

    code = "base_model_mismatch"
    kind = ErrorKind.CONFLICT
    hint = "Submit the job again for the model that is being served."


class PayloadTooLarge(KilnError):
    """The job's data is larger than the queue keeps for one job."""

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
    """The trainer died several times while it ran this job, so the job is not tried again."""

    code = "job_crashed_trainer"
    hint = "The trainer's log of those times says why; a smaller batch_tokens needs less memory."

    def __init__(self, num_crashes: int) -> None:
        super().__init__(f"the trainer ended {num_crashes} times while it ran this job, without progress")


class TrainerOutOfMemory(KilnError):
    """A step of the job needed more memory than there was."""

    code = "trainer_out_of_memory"
    hint = "Lower batch_tokens, or shorten the examples."


class JobFailedUnexpectedly(KilnError):
    """The job met a failure that nobody foresaw."""

    code = "job_failed"
    hint = "The trainer's log has the traceback."


class StartRankTooHigh(InvalidRequest):
    """The adapter to start from fits no engine's slot any more."""

    code = "adapter_rank_too_high"
    hint = "Start from another adapter, or start the engine with a higher max_adapter_rank."

    def __init__(self, reference: str, rank: int, limit: int) -> None:
        super().__init__(f"{reference} has rank {rank}, the engine holds up to {limit}")


class TeacherNotFound(KilnError):
    """No engine that the trainer knows serves the model that is to teach."""

    code = "teacher_not_found"
    kind = ErrorKind.NOT_FOUND
    hint = "KILN_TRAINER_TEACHER_ADDRESSES names engines that teach; those on the trainer's Redis are found."
    param = "teacher"


class TeacherUnavailable(KilnError):
    """The engine whose model is to teach does not answer."""

    code = "teacher_unavailable"
    kind = ErrorKind.UNAVAILABLE
    hint = "Start the engine that serves the teacher, or wait for it."
    param = "teacher"
    retry_after_s = 5.0


class TeacherChanged(KilnError):
    """The engine serves other weights under the teacher's name than when the job was accepted."""

    code = "teacher_changed"
    kind = ErrorKind.CONFLICT
    hint = "A job keeps its teacher: post a new one for the model that is there now."
    param = "teacher"


class TeacherVocabularyDiffers(InvalidRequest):
    """A token id means something else to the teacher, or nobody knows what it means."""

    code = "teacher_vocabulary_differs"
    hint = "Teacher and student need the same tokenizer, and a tokenizer.json in both checkpoints."
    param = "teacher"


class TeacherContextTooShort(InvalidRequest):
    """The teacher cannot read the longest completion with its prompt."""

    code = "teacher_context_too_short"
    hint = "Shorten prompts or rollout.max_tokens, or start the teacher's engine with a longer context."
    param = "teacher"


class TeacherAnswerIncomplete(KilnError):
    """The teacher's engine did not say what it was asked."""

    code = "teacher_answer_incomplete"
    hint = "Trainer and the teacher's engine have to be of the same version of Kiln."


class WorkerStopping(Exception):
    """The trainer was asked to stop: the job goes back to the queue at this step boundary."""
