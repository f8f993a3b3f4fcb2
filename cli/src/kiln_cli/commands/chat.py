"""`kiln chat` and `kiln complete`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kiln_cli.chat.sampling import MaxTokens, Model, Seed, Temperature, request_fields
from kiln_cli.errors import NothingToSay
from kiln_cli.session import SERVER, Session, command


def register(app: typer.Typer) -> None:
    command(app, "chat", examples=["kiln chat", "kiln chat 'What is 2 + 3?' --model base"], panel=SERVER)(
        chat
    )
    command(app, "complete", examples=["kiln complete 'Thank you for' --max-tokens 24"], panel=SERVER)(
        complete
    )


def chat(
    session: Session,
    message: Annotated[
        str | None, typer.Argument(help="One question. A conversation when left out.", show_default=False)
    ] = None,
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="The system message.", show_default=False)] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Ask for thinking, or for none.", show_default=False),
    ] = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
) -> None:
    """Talk to the model. Answers stream; thinking is shown apart.

    In a conversation, /model switches who answers and /help lists the other commands. Without a
    terminal, standard input is the question.
    """
    from kiln_cli.chat.session import ChatSession, ask, footer
    from kiln_cli.chat.turn import stream_answer

    fields = request_fields(
        model=model,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        chat_template_kwargs=None if think is None else {"enable_thinking": think},
    )
    if message is None and sys.stdin.isatty() and not session.out.as_json:
        import readline  # noqa: F401 line editing and history for input()

        ChatSession(session.client, session.out.console, fields, system).run(lambda: input("» "))
        return
    question = _given(message)
    head = [{"role": "system", "content": system}] if system else []
    body = {**fields, "messages": [*head, {"role": "user", "content": question}]}
    if session.out.as_json:
        answer = stream_answer(session.client, "/v1/chat/completions", body, lambda content, reasoning: None)
        session.out.answer(answer.as_json(), lambda console: None)
    else:
        session.out.note(footer(ask(session.client, session.out.console, body)))


def complete(
    session: Session,
    prompt: Annotated[
        str | None,
        typer.Argument(help="Text to go on with. Standard input when left out.", show_default=False),
    ] = None,
    model: Model = None,
    temperature: Temperature = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text to stop at; may be repeated.")] = None,
) -> None:
    """Go on with a text, without a chat template."""
    from kiln_cli.chat.turn import stream_answer

    fields = request_fields(
        model=model, temperature=temperature, max_tokens=max_tokens, seed=seed, stop=stop or None
    )
    body = {**fields, "prompt": _given(prompt)}

    def show(content: str, reasoning: str) -> None:
        if not session.out.as_json:
            sys.stdout.write(content)
            sys.stdout.flush()

    answer = stream_answer(session.client, "/v1/completions", body, show)
    session.out.answer(answer.as_json(), lambda console: console.print())


def _given(text: str | None) -> str:
    """The argument, or what standard input holds. Raises NothingToSay."""
    if text is None and not sys.stdin.isatty():
        text = sys.stdin.read()
    if not text or not text.strip():
        raise NothingToSay("there is no text: give it as an argument or on standard input")
    return text
