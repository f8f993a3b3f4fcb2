"""What the command line refuses, each with its own code and what to do about it."""

from kiln_common.errors import ErrorKind, InvalidRequest, KilnError


class PortInUse(KilnError):
    code = "port_in_use"
    kind = ErrorKind.CONFLICT
    hint = "Stop what uses it, or choose another: kiln up --port 8421, or make up PORT=8421."


class StateDirInUse(KilnError):
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
    code = "state_dir_unusable"
    kind = ErrorKind.CONFLICT
    hint = "Remove the folder, or choose another: kiln up --state-dir FOLDER, or make up STATE_DIR=FOLDER."


class PublicHostWithoutKeys(InvalidRequest):
    code = "public_host_without_keys"
    hint = (
        "Set KILN_GATEWAY_API_KEYS, or KILN_GATEWAY_ALLOW_PUBLIC_BIND=true if everyone who can reach "
        "this machine may do everything."
    )


class UnknownGpuSharing(InvalidRequest):
    code = "unknown_gpu_sharing"
    hint = "--gpu-sharing (or KILN_TRAINER_GPU_SHARING) is auto, mps or time_slices."


class ModelNotFound(InvalidRequest):
    code = "model_not_found"
    hint = "Give a folder with config.json and *.safetensors, or a hub id such as Qwen/Qwen3.5-4B."


class NotEnoughGpus(InvalidRequest):
    """`--engines` asks for more engines than there are GPUs."""

    code = "not_enough_gpus"
    hint = "Start fewer engines, show more GPUs with CUDA_VISIBLE_DEVICES, or add --device cpu."
