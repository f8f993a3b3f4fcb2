"""Errors of the torch side: each has a stable `code` and a `hint` that says what to try.

kiln_nn does not import kiln_common; the services translate these at their edge by `code`.
"""

from __future__ import annotations

from collections.abc import Sequence

# Of the ways in which a file cannot be read, those that the next try would meet again. The rest (EIO, ESTALE,
# ETIMEDOUT, ENFILE ...) are the file system's own troubles, which pass.
LASTING_FILE_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class KilnNnError(Exception):
    """Base of everything kiln_nn raises on purpose."""

    code = "nn_error"
    hint = ""

    def __init__(self, message: str = "", *, hint: str | None = None) -> None:
        """`hint` is instead of that of the class."""
        super().__init__(message)
        if hint is not None:
            self.hint = hint

    @property
    def message(self) -> str:
        """What happened, with numbers."""
        return str(self)


class CheckpointRefused(KilnNnError):
    """Base of errors of a checkpoint, or of what was asked of it, that trying again would meet again."""


class InvalidModelConfig(CheckpointRefused):
    """config.json lacks a field, or a field has a value that cannot be."""

    code = "invalid_model_config"
    hint = "Compare the folder's config.json with that of the published Qwen3.5 checkpoint."


class UnsupportedModel(CheckpointRefused):
    """The checkpoint is well formed but of a kind this code does not compute."""

    code = "unsupported_model"
    hint = "Serve a dense Qwen3.5 text model (0.8B, 2B, 4B, 9B, 27B or a tiny one of the same family)."


class UnsupportedQuantization(CheckpointRefused):
    """The checkpoint is quantised in a way that is not read here; the message names it."""

    code = "unsupported_quantization"
    hint = (
        "Read are compressed-tensors (int4 in symmetric groups of 128, fp8 with a scale per output), GPTQ"
        " (4 bits, groups of 128, symmetric, without act-order) and AWQ (4 bits, groups of 128); or serve the"
        " unquantised checkpoint with --quantization."
    )


class InvalidQuantization(CheckpointRefused):
    """What was asked of quantising cannot be done with this model or this text."""

    code = "invalid_quantization"
    hint = "docs/quantization.md says what goes with what."


class ModelNotFound(CheckpointRefused):
    """The folder has no config.json or no weights in it."""

    code = "model_not_found"
    hint = "Give a folder with config.json and *.safetensors."


class UnsafeCheckpoint(CheckpointRefused):
    """Only pickled weights are there; unpickling runs code, so it is never done."""

    code = "unsafe_checkpoint"
    hint = "Convert the weights to safetensors (save_pretrained does by default)."


class CheckpointUnreadable(CheckpointRefused):
    """A weights file or its index is damaged or not what its name says."""

    code = "checkpoint_unreadable"
    hint = "Download the checkpoint again; a file is damaged or incomplete."


class CheckpointMismatch(CheckpointRefused):
    """Tensors are missing, unexpected or misshapen; the message names them."""

    code = "checkpoint_mismatch"
    hint = "config.json and the weight files must come from the same dense Qwen3.5 checkpoint."


class CheckpointNotRead(KilnNnError):
    """The file system failed while the model's folder was read."""

    code = "model_file_not_read"
    hint = "Look at the disk or the network file system that holds the model's folder; what was read is not at fault."


class ShareRefused(KilnNnError):
    """The weights were not handed over: wrong peer, wrong engine boot or no server."""

    code = "weights_share_refused"
    hint = "Engine and trainer must run as one user and share the engine's socket directory."


class ShareUnsupported(KilnNnError):
    """This machine cannot share weights in the wanted way."""

    code = "weights_share_unsupported"
    hint = (
        "Sharing needs Linux memfd on the CPU, or CUDA on the GPU; where descriptors are refused,"
        " KILN_ENGINE_WEIGHT_TRANSPORT=legacy shares by handle."
    )


class OutOfDeviceMemory(KilnNnError):
    """The weights do not fit beside what already lives on the GPU."""

    code = "out_of_device_memory"
    hint = "Free the GPU (nvidia-smi lists its users) or serve a smaller model."


class InvalidAdapter(KilnNnError):
    """An adapter's files are malformed or do not fit; the message names the key."""

    code = "invalid_adapter"
    hint = "Export the adapter with peft's save_pretrained for this base model."


class UnsupportedAdapter(KilnNnError):
    """The adapter uses a PEFT feature that is not computed here; the message names it."""

    code = "unsupported_adapter"
    hint = "Use plain LoRA on the linear layers: no DoRA, patterns, bias or saved modules."


class InvalidLoraSpec(KilnNnError):
    """Rank, alpha or targets of a wanted adapter make no sense; the message says which."""

    code = "invalid_lora_spec"
    hint = "targets is all, attention, mlp or a list of linear layer names; rank is at least 1."


def name_list(names: Sequence[str], limit: int = 8) -> str:
    """Names joined for a message, the tail counted instead of listed."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
