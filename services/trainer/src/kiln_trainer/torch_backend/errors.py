"""What can go wrong in the arithmetic, and kiln_nn's errors as this service's."""

from kiln_common.errors import ErrorKind, KilnError
from kiln_nn.errors import KilnNnError


class TrainingDiverged(KilnError):
    """A gradient or a parameter is not finite; nothing of it was saved."""

    code = "training_diverged"
    kind = ErrorKind.CONFLICT
    hint = "Lower the learning rate, set max_grad_norm, or check the data."


class BaseModelMismatch(KilnError):
    """The tokens belong to another base model than the engine serves."""

    code = "base_model_mismatch"
    kind = ErrorKind.CONFLICT
    hint = "Submit the job again for the model that is being served."

    def __init__(self, wanted: str, served: str) -> None:
        super().__init__(f"the job is for base model {wanted[:12]}, the engine serves {served[:12]}")


class WeightsNotBorrowed(KilnError):
    """A base parameter lies outside the engine's mapping: this process would hold a copy."""

    code = "weights_not_borrowed"
    hint = "The trainer refuses to hold a second copy: this is a fault of Kiln's, please report it."

    def __init__(self, names: list[str], num_bytes: int) -> None:
        shown = ", ".join(names[:4])
        super().__init__(f"{len(names)} base tensors ({num_bytes} bytes) are not borrowed: {shown}")


class ModelError(KilnError):
    """An error of kiln_nn, with its own code and hint."""

    kind = ErrorKind.INVALID_REQUEST

    def __init__(self, error: KilnNnError) -> None:
        super().__init__(error.message, hint=error.hint)
        self.code = error.code


class OutOfTrainingMemory(KilnError):
    """A micro-batch did not fit beside the engine on the device."""

    code = "training_out_of_memory"
    kind = ErrorKind.CONFLICT
    hint = "Lower batch_tokens; gradient_accumulation keeps the size of a step."

    def __init__(self, reason: str) -> None:
        super().__init__(f"a micro-batch found no memory: {' '.join(reason.split()) or 'none is left'}")


class GpuPartitionUnavailable(KilnError):
    """Under MPS, training needs a part of the GPU of its own, and the driver or torch cannot make one."""

    code = "gpu_partition_unavailable"
    kind = ErrorKind.CONFLICT
    hint = "Start with kiln up --gpu-sharing time_slices, or without the MPS server."
