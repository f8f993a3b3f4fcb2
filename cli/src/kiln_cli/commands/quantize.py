"""`kiln quantize`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kiln_cli.commands.up import DeviceKind
from kiln_cli.session import MACHINE, Session, command


class Scheme(StrEnum):
    INT4 = "int4"
    FP8 = "fp8"


class Method(StrEnum):
    GPTQ = "gptq"
    RTN = "rtn"


def register(app: typer.Typer) -> None:
    command(
        app,
        "quantize",
        examples=["kiln quantize ~/models/Qwen3.5-4B --calibration examples.jsonl --out Qwen3.5-4B-int4"],
        asks_server=False,
        panel=MACHINE,
    )(quantize)


def quantize(
    session: Session,
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id.", metavar="MODEL")],
    out: Annotated[Path, typer.Option(help="The folder to make: a new or an empty one.")],
    scheme: Annotated[Scheme, typer.Option(help="int4: 4 bits in groups of 128; fp8: 8 bits.")] = Scheme.INT4,
    method: Annotated[
        Method | None,
        typer.Option(
            help="gptq needs a calibration text; rtn rounds to nearest, as kiln up --quantization does.",
            show_default="gptq with a calibration text, rtn without",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="Text like what the model will read: a .jsonl file of text, messages or prompt and"
            " completion, or plain text.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens that are read of it.", min=1)] = 131_072,
    device: Annotated[
        DeviceKind | None,
        typer.Option(help="auto, cpu or cuda; auto is a GPU when there is one.", show_default="auto"),
    ] = None,
) -> None:
    """Quantise a checkpoint's large matrices, into a folder that kiln up and other engines serve.

    The folder is in the format of compressed-tensors. See docs/quantization.md for what is lost and what
    stays as it is.
    """
    from kiln_cli.quantize.calibration import RECOMMENDED_TOKENS, check_length, read_documents
    from kiln_cli.quantize.process import quantise
    from kiln_cli.up.options import resolve_model

    folder, _ = resolve_model(model)
    chosen = method or (Method.GPTQ if calibration else Method.RTN)
    documents = read_documents(calibration.expanduser(), folder, max_tokens) if calibration else []
    num_tokens = sum(map(len, documents))
    if chosen is Method.GPTQ and calibration and (warning := check_length(num_tokens)):
        session.out.note(f"warning: {warning}")
    request = {
        "folder": str(folder),
        "out": str(out.expanduser().absolute()),
        "scheme": scheme.value,
        "method": chosen.value,
        "documents": documents,
        "device": None if device in (None, DeviceKind.AUTO) else device.value,
    }
    result = quantise(request, lambda done, of: session.out.note(f"layer {done} of {of}"))
    answer = {
        "folder": request["out"],
        "scheme": scheme.value,
        "method": chosen.value,
        "calibration_tokens": num_tokens,
        "recommended_calibration_tokens": RECOMMENDED_TOKENS if chosen is Method.GPTQ else 0,
        "bytes": result["num_bytes"],
        "quantized_layers": result["num_quantised"],
        "plain_modules": result["plain_modules"],
    }
    session.out.answer(answer, lambda console: console.print(answer["folder"], markup=False, soft_wrap=True))
    if method is None and chosen is Method.RTN and scheme is Scheme.INT4:
        session.out.note("rounded to nearest; with --calibration FILE less is lost (GPTQ)")
    session.out.note(f"kiln up --model {request['out']} serves it")
