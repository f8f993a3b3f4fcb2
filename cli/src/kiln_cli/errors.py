"""What the command line refuses, each with its own code and what to do about it."""

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class WrongUsage(InvalidRequest):
    """A command or option that there is not, one that is missing, or a value that it does not take."""

    code = "wrong_usage"
    hint = "The same command with --help shows what it takes."


class PortInUse(KilnError):
    """Something else listens on the port that kiln up is to use."""

    code = "port_in_use"
    kind = ErrorKind.CONFLICT
    hint = "Stop what uses it, or choose another: kiln up --port 8421, or make up PORT=8421."


class StateDirInUse(KilnError):
    """Another kiln up, or a service of it that has not ended yet, uses the state folder."""

    code = "state_dir_in_use"
    kind = ErrorKind.CONFLICT
    hint = (
        "Stop the other kiln up, or give this one its own: kiln up --state-dir FOLDER --port PORT, "
        "or make up STATE_DIR=FOLDER PORT=PORT."
    )


class DemoFailed(KilnError):
    """The demonstration could not be carried out to its end."""

    code = "demo_failed"
    hint = "Keep the services' logs: kiln demo --state-dir FOLDER, or make demo ARGS='--state-dir FOLDER'."


class StateDirUnusable(KilnError):
    """The folder for the services' sockets belongs to somebody else."""

    code = "state_dir_unusable"
    kind = ErrorKind.CONFLICT
    hint = "Remove the folder, or choose another: kiln up --state-dir FOLDER, or make up STATE_DIR=FOLDER."


class PublicHostWithoutKeys(InvalidRequest):
    """The address can be reached from other machines, and no API keys are set."""

    code = "public_host_without_keys"
    hint = (
        "Set KILN_GATEWAY_API_KEYS, or KILN_GATEWAY_ALLOW_PUBLIC_BIND=true if everyone who can reach "
        "this machine may do everything."
    )


class UnknownGpuSharing(InvalidRequest):
    """--gpu-sharing names no way of sharing a GPU."""

    code = "unknown_gpu_sharing"
    hint = "--gpu-sharing (or KILN_TRAINER_GPU_SHARING) is auto, mps or time_slices."


class ModelNotFound(InvalidRequest):
    """The folder given with --model has no config.json."""

    code = "model_not_found"
    hint = "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3.5-4B."


class NothingToSay(InvalidRequest):
    """Neither an argument nor standard input has a text to send."""

    code = "no_text"
    hint = "kiln chat 'A question', or echo 'A question' | kiln chat"


class InvalidJsonl(InvalidRequest):
    """A file of training data has lines that are not what they should be; nothing of it was sent."""

    code = "invalid_jsonl"
    hint = "Mend these lines. Each line is one JSON object; kiln train sft --help shows the forms."


class FileUnreadable(InvalidRequest):
    """The file that was named is not there, or may not be read."""

    code = "file_unreadable"
    hint = "Name a file that exists and may be read, or - for standard input."


class InvalidSetting(InvalidRequest):
    """--set was given something that is not NAME=VALUE, or a field of what is no object."""

    code = "invalid_setting"
    hint = "--set NAME=VALUE, where VALUE is JSON or plain text: --set schedule=cosine --set loss.type=dapo."


class NotConfirmed(InvalidRequest):
    """The command deletes something, and nobody is there to ask."""

    code = "not_confirmed"
    hint = "Add --yes to do it without being asked."


class InvalidReference(InvalidRequest):
    """What was given is not the way an adapter is named."""

    code = "invalid_reference"
    hint = "An adapter is written name or name@version; kiln adapters list shows what there is."


class ChecksumMismatch(KilnError):
    """What was downloaded is not what its source says it is; it was removed."""

    code = "checksum_mismatch"
    hint = "Download it again; if that does not help, its source is damaged."


class NoLogs(InvalidRequest):
    """The state folder has no logs of such services."""

    code = "no_logs"
    hint = "kiln up writes them below its state folder; kiln logs --state-dir FOLDER names another."


class NoTrainingData(InvalidRequest):
    """Neither a file nor a dataset to learn from was named."""

    code = "no_training_data"
    hint = "kiln train sft examples.jsonl --adapter NAME, or --dataset ID; - is standard input."


class NotEnoughGpus(InvalidRequest):
    """`--engines` asks for more engines than there are GPUs."""

    code = "not_enough_gpus"
    hint = "Start fewer engines, show more GPUs with CUDA_VISIBLE_DEVICES, or add --device cpu."


class QuantizingFailed(InvalidRequest):
    """Quantising was refused, or broke down; a refusal has the code and hint of its reason."""

    code = "quantizing_failed"
    hint = "The message is the last that it said; a GPU that is too small has --device cpu beside it."

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.code = code


class CalibrationTooShort(InvalidRequest):
    """A calibration text that is shorter than one sequence says nothing about what the model reads."""

    code = "calibration_too_short"
    hint = (
        "Give more text like what the model will read, a few hundred conversations, or a higher --max-tokens;"
        " --method rtn needs no text."
    )

    def __init__(self, num_tokens: int, least: int, recommended: int) -> None:
        super().__init__(
            f"the calibration text has {num_tokens:,} tokens; GPTQ needs {least:,}, and {recommended:,} or"
            " more are recommended"
        )


class TooManyTrainers(InvalidRequest):
    """`--trainers` asks for more trainers than there are engines whose weights they could share."""

    code = "too_many_trainers"
    hint = "Start more engines, or fewer trainers; with KILN_TRAINER_DEVICE set there can be one."
