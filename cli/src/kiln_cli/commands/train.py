"""`kiln train …`: sft, grpo, opd, status, watch, cancel, retry."""

from __future__ import annotations

from typing import Annotated

import typer

from kiln_cli.completion import complete_adapter, complete_job
from kiln_cli.session import Session, command

app = typer.Typer(
    help="Teach an adapter, and follow its jobs.", no_args_is_help=True, rich_markup_mode="rich"
)

Adapter = Annotated[
    str,
    typer.Option(
        "--adapter", "-a", help="Name to publish under; a new version.", autocompletion=complete_adapter
    ),
]
BaseAdapter = Annotated[
    str | None,
    typer.Option(
        help="Start from a name or name@version. The adapter's latest when left out.", show_default=False
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        "--learning-rate", "--lr", help="The highest that the schedule comes to.", show_default=False
    ),
]
Epochs = Annotated[int | None, typer.Option(help="Times through the data.", min=1, show_default=False)]
Rank = Annotated[int | None, typer.Option(help="Rank of the LoRA.", min=1, show_default=False)]
JobSeed = Annotated[
    int | None, typer.Option("--seed", help="Order of the data and fresh weights.", min=0, show_default=False)
]
Attach = Annotated[
    bool | None,
    typer.Option(
        "--attach/--no-attach", help="Let the result answer by default, or not.", show_default="attach"
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any other field of the route: NAME=VALUE, such as schedule=cosine."),
]
Detach = Annotated[bool, typer.Option("--detach", "-d", help="Print the job's id and end.")]
Key = Annotated[
    str | None,
    typer.Option(
        "--idempotency-key",
        help="The same key never makes a second job. Made up when left out.",
        show_default=False,
    ),
]
Dataset = Annotated[
    str | None, typer.Option(help="An uploaded data set's id instead of a file.", show_default=False)
]
JobId = Annotated[str, typer.Argument(help="The job's id.", autocompletion=complete_job)]


@command(
    app,
    "sft",
    examples=[
        "kiln train sft examples.jsonl --adapter polite --epochs 2",
        "kiln train sft examples.jsonl -a polite --no-attach --set schedule=cosine --detach",
    ],
)
def sft(
    session: Session,
    file: Annotated[
        str | None,
        typer.Argument(
            help='JSONL of {"messages": […]} or {"prompt", "completion"}; - is standard input.',
            show_default=False,
        ),
    ] = None,
    *,
    adapter: Adapter,
    dataset: Dataset = None,
    corrections: Annotated[
        bool, typer.Option("--corrections", help="Learn the corrections too that no job has learned yet.")
    ] = False,
    base_adapter: BaseAdapter = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    rank: Rank = None,
    seed: JobSeed = None,
    attach: Attach = None,
    settings: Settings = None,
    detach: Detach = False,
    idempotency_key: Key = None,
) -> int:
    """Learn from examples. Shows the job until its version answers, unless detached.

    Exit code 1 when the job failed, was cancelled or did not pass its gate. Ctrl-C leaves the job alone.
    """
    from kiln_cli.train.settings import job_fields
    from kiln_cli.train.submit import Following, sft_data, submit

    data, lines = sft_data(file, dataset, corrections)
    options = job_fields(
        settings or (),
        adapter=adapter,
        base_adapter=base_adapter,
        learning_rate=learning_rate,
        epochs=epochs,
        lora__rank=rank,
        seed=seed,
        attach=attach,
    )
    return submit(session, "sft", data | options, lines, Following(detach, idempotency_key))


@command(
    app,
    "grpo",
    examples=[
        "kiln train grpo scored.jsonl --adapter polite --learning-rate 1e-3",
        "kiln train grpo scored.jsonl -a polite --loss dapo --no-attach --json",
    ],
)
def grpo(
    session: Session,
    file: Annotated[
        str | None,
        typer.Argument(
            help='JSONL of {"prompt", "completion", "reward"}, {"completion_id", "index", "reward"}, or'
            " groups; - is standard input.",
            show_default=False,
        ),
    ] = None,
    *,
    adapter: Adapter,
    dataset: Dataset = None,
    loss: Annotated[
        str | None, typer.Option(help="grpo, dr_grpo, dapo, gspo or cispo.", show_default=False)
    ] = None,
    base_adapter: BaseAdapter = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    rank: Rank = None,
    seed: JobSeed = None,
    attach: Attach = None,
    settings: Settings = None,
    detach: Detach = False,
    idempotency_key: Key = None,
) -> int:
    """Learn from rewards: scored answers, those to one prompt being a group.

    Exit code 1 when the job failed, was cancelled or did not pass its gate. Ctrl-C leaves the job alone.
    """
    from kiln_cli.train.settings import job_fields
    from kiln_cli.train.submit import Following, grpo_data, submit

    data, lines = grpo_data(file, dataset)
    options = job_fields(
        settings or (),
        adapter=adapter,
        loss__type=loss,
        base_adapter=base_adapter,
        learning_rate=learning_rate,
        epochs=epochs,
        lora__rank=rank,
        seed=seed,
        attach=attach,
    )
    return submit(session, "grpo", data | options, lines, Following(detach, idempotency_key))


@command(
    app,
    "opd",
    examples=["kiln train opd prompts.jsonl --adapter student --teacher polite --max-tokens 24 --no-attach"],
)
def opd(
    session: Session,
    file: Annotated[
        str,
        typer.Argument(
            help='JSONL of {"prompt"} or {"messages": […]}, with "completions" those instead of sampled ones;'
            " - is standard input.",
        ),
    ],
    *,
    adapter: Adapter,
    teacher: Annotated[
        str | None,
        typer.Option(help="base, or an adapter.", autocompletion=complete_adapter, show_default=False),
    ] = None,
    teacher_model: Annotated[
        str | None, typer.Option(help="Another engine's model, instead.", show_default=False)
    ] = None,
    divergence: Annotated[
        str | None, typer.Option(help="reverse_kl, forward_kl or jsd.", show_default=False)
    ] = None,
    samples: Annotated[
        int | None, typer.Option("-n", help="Answers drawn to each prompt.", min=1, show_default=False)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.", min=1, show_default=False)] = None,
    base_adapter: BaseAdapter = None,
    learning_rate: LearningRate = None,
    epochs: Epochs = None,
    rank: Rank = None,
    seed: JobSeed = None,
    attach: Attach = None,
    settings: Settings = None,
    detach: Detach = False,
    idempotency_key: Key = None,
) -> int:
    """Learn from a teacher's judgement of what the student writes (on-policy distillation).

    Exit code 1 when the job failed, was cancelled or did not pass its gate. Ctrl-C leaves the job alone.
    """
    from kiln_cli.train.settings import job_fields
    from kiln_cli.train.submit import Following, opd_data, submit

    data, lines = opd_data(file)
    options = job_fields(
        settings or (),
        adapter=adapter,
        teacher=teacher,
        teacher__model=teacher_model,
        divergence=divergence,
        rollout__n=samples,
        rollout__max_tokens=max_tokens,
        base_adapter=base_adapter,
        learning_rate=learning_rate,
        epochs=epochs,
        lora__rank=rank,
        seed=seed,
        attach=attach,
    )
    return submit(session, "opd", data | options, lines, Following(detach, idempotency_key))


@command(app, "status", examples=["kiln train status", "kiln train status JOB --json"])
def status(
    session: Session,
    job_id: Annotated[
        str | None,
        typer.Argument(
            help="One job. The newest ones when left out.", autocompletion=complete_job, show_default=False
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="How many jobs are listed.", min=1, max=1000)] = 20,
) -> None:
    """List jobs, or show one: how far it is, its curve, how it ended."""
    from kiln_cli.train.job_table import show_job, show_jobs

    if job_id is not None:
        state = session.client.train.job(job_id).state
        session.out.answer(state.raw, lambda console: show_job(console, state))
        return
    states = [job.state for job in session.client.train.jobs(limit)]
    session.out.answer([state.raw for state in states], lambda console: show_jobs(console, states))


@command(app, "watch", examples=["kiln train watch JOB"])
def watch(session: Session, job_id: JobId) -> int:
    """Follow a job until it has ended. Exit code 1 when it failed, was cancelled or did not pass its gate."""
    from kiln_cli.train.submit import follow

    return follow(session, session.client.train.job(job_id))


@command(app, "cancel", examples=["kiln train cancel JOB"])
def cancel(
    session: Session,
    job_id: JobId,
    discard: Annotated[
        bool, typer.Option("--discard", help="Take back the versions that it published on its way.")
    ] = False,
) -> None:
    """Cancel a job: at once while it waits, at the next step boundary while it runs."""
    state = session.client.train.job(job_id).cancel(discard=discard).state
    session.out.answer(state.raw, lambda console: console.print(f"{state.id} {state.status}", markup=False))


@command(app, "retry", examples=["kiln train retry JOB --set learning_rate=1e-4 --detach"])
def retry(
    session: Session,
    job_id: JobId,
    settings: Settings = None,
    detach: Detach = False,
    idempotency_key: Key = None,
) -> int:
    """Run a job's data again as a new job, with the same settings or changed ones."""
    from kiln_cli.train.settings import job_fields
    from kiln_cli.train.submit import Following, accepted, send_once

    changes, following = job_fields(settings or ()), Following(detach, idempotency_key)
    job = session.client.train.job(job_id)
    again = send_once(session, following, lambda key: job.retry(idempotency_key=key, **changes))
    return accepted(session, again, following)
