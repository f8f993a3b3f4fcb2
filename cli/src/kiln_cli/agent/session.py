"""One task for the agent: answers and tool calls in turn, until the model has no more calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import kiln
from kiln_cli.agent.tools import TOOLS, Outcome, Workbench, code_of
from kiln_cli.chat.turn import Answer, stream_answer

SYSTEM = (
    "You can run Python and shell code with your tools, in a folder of your own without a network. "
    "Use them where they help, then answer."
)
_REFUSED = "The user did not allow this call."


class AgentView(Protocol):
    """What a person sees of the agent, and is asked."""

    def piece(self, content: str, reasoning: str) -> None: ...

    def end_of_answer(self, answer: Answer) -> None: ...

    def may_run(self, tool: str, code: str) -> bool:
        """Show the call and decide; what is refused is not run."""

    def ran(self, outcome: Outcome) -> None: ...


@dataclass
class Task:
    """What one task came to."""

    answer: str = ""
    adapter: str = ""
    finish_reason: str | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    is_cut: bool = False  # it had calls left when its steps were used up

    def as_json(self) -> dict[str, Any]:
        return {
            "answer": self.answer,
            "adapter": self.adapter,
            "finish_reason": self.finish_reason,
            "calls": self.calls,
            "steps_used_up": self.is_cut,
        }


class Agent:
    """A conversation with tools; the turns of all its tasks are remembered."""

    def __init__(
        self,
        client: kiln.Client,
        workbench: Workbench,
        view: AgentView,
        fields: dict[str, Any],
        max_steps: int,
    ) -> None:
        self._client = client
        self._workbench = workbench
        self._view = view
        self._fields = fields
        self._max_steps = max_steps
        self._messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]

    def do(self, prompt: str) -> Task:
        """Carry out one task.

        Raises:
            kiln.KilnError: the server refused or went away; the task is forgotten.
        """
        messages = [*self._messages, {"role": "user", "content": prompt}]
        task = Task()
        for _ in range(self._max_steps):
            body = {**self._fields, "messages": messages, "tools": TOOLS}
            answer = stream_answer(self._client, "/v1/chat/completions", body, self._view.piece)
            self._view.end_of_answer(answer)
            messages.append(answer.message())
            task.answer, task.adapter, task.finish_reason = (
                answer.content,
                answer.adapter,
                answer.finish_reason,
            )
            if not answer.tool_calls:
                break
            messages += [self._carry_out(call, task) for call in answer.tool_calls]
        else:
            task.is_cut = True
        self._messages = messages
        return task

    def _carry_out(self, call: dict[str, Any], task: Task) -> dict[str, Any]:
        """The tool's message; everything that was asked for is in `task.calls`."""
        found = code_of(call)
        if isinstance(found, str):
            text = found
            task.calls.append({"tool": call["function"]["name"], "refused": found})
        elif not self._view.may_run(*found):
            text = _REFUSED
            task.calls.append({"tool": found[0], "code": found[1], "refused": _REFUSED})
        else:
            outcome = self._workbench.run(*found)
            self._view.ran(outcome)
            text = outcome.for_model()
            task.calls.append({"tool": found[0], "code": found[1], **outcome.as_json()})
        return {"role": "tool", "tool_call_id": call["id"], "content": text}
