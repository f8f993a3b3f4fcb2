/** One answer: thinking apart, tool calls, and how good it was. */
import { useState } from "preact/hooks";
import { count, rate as perSecond, seconds } from "../format";
import { Badge, Problem } from "../ui";
import { assistantMessage, rate, type Answer, type Column, type Round } from "./state";
import type { Message } from "../types";

const RATINGS: [number, string][] = [
  [1, "Good"],
  [0.5, "Fair"],
  [0, "Bad"],
];

interface ColumnProps {
  round: Round;
  place: number;
  onContinue: (messages: Message[]) => void;
}

export function AnswerColumn({ round, place, onContinue }: ColumnProps) {
  const column = round.columns[place]!;
  return (
    <section class="column" aria-label={`Answers of ${column.adapter ?? column.model}`}>
      <header>
        <Badge kind={column.adapter && column.adapter !== "base" ? "version" : "quiet"}>
          {column.adapter ?? column.model}
        </Badge>
        <span class="facts">{facts(column)}</span>
      </header>
      <Problem error={column.error} />
      {column.answers.map((answer) => (
        <AnswerCard
          key={answer.index}
          round={round}
          place={place}
          answer={answer}
          isRunning={column.isRunning}
          onContinue={onContinue}
        />
      ))}
      {column.isRunning && !column.answers.length && <p class="note">Waiting for the first token …</p>}
    </section>
  );
}

function facts(column: Column): string {
  if (column.isRunning)
    return column.firstTokenS === null ? "" : `first token ${seconds(column.firstTokenS)}`;
  if (column.numTokens === null || !column.seconds) return column.error ? "" : "stopped";
  const speed = column.numTokens / column.seconds;
  return `first token ${seconds(column.firstTokenS)} · ${count(column.numTokens)} tokens · ${perSecond(speed)} tok/s`;
}

interface AnswerProps extends ColumnProps {
  answer: Answer;
  isRunning: boolean;
}

function AnswerCard({ round, place, answer, isRunning, onContinue }: AnswerProps) {
  const isWriting = isRunning && answer.finishReason === null;
  const isEnded = answer.finishReason !== null;
  return (
    <article class="answer" data-rated={answer.reward ?? undefined}>
      {answer.reasoning && (
        <details class="thinking" open={isWriting && !answer.content}>
          <summary>Thinking</summary>
          <p class="text">{answer.reasoning}</p>
        </details>
      )}
      {(answer.content.trim() || isWriting) && (
        <p class={`text ${isWriting ? "writing" : ""}`}>{answer.content.trim()}</p>
      )}
      {answer.toolCalls.map((toolCall) => (
        <div class="tool-call" key={toolCall.id}>
          <span>
            Calls <b>{toolCall.name}</b>
          </span>
          <pre>{pretty(toolCall.arguments)}</pre>
        </div>
      ))}
      {answer.finishReason === "length" && <p class="note">Cut off at the most tokens allowed.</p>}
      {isEnded && (
        <footer>
          <div class="rating" role="group" aria-label={`Rate answer ${answer.index + 1}`}>
            {RATINGS.map(([reward, word]) => (
              <button
                key={word}
                type="button"
                aria-pressed={answer.reward === reward}
                disabled={round.jobId !== null}
                onClick={() => rate(round.id, place, answer.index, answer.reward === reward ? null : reward)}
              >
                {word}
              </button>
            ))}
          </div>
          {!answer.toolCalls.length && (
            <button
              type="button"
              class="quiet"
              onClick={() => onContinue([...round.messages, assistantMessage(answer)])}
            >
              Continue
            </button>
          )}
        </footer>
      )}
      {isEnded && answer.toolCalls.length > 0 && (
        <ToolResults round={round} answer={answer} onContinue={onContinue} />
      )}
    </article>
  );
}

function ToolResults({ round, answer, onContinue }: Pick<AnswerProps, "round" | "answer" | "onContinue">) {
  const [results, setResults] = useState<string[]>(answer.toolCalls.map(() => ""));
  return (
    <form
      class="tool-results"
      onSubmit={(event) => {
        event.preventDefault();
        const messages: Message[] = answer.toolCalls.map((toolCall, index) => ({
          role: "tool",
          tool_call_id: toolCall.id,
          content: results[index] ?? "",
        }));
        onContinue([...round.messages, assistantMessage(answer), ...messages]);
      }}
    >
      {answer.toolCalls.map((toolCall, index) => (
        <label key={toolCall.id}>
          Result of {toolCall.name}
          <input
            value={results[index]}
            required
            onInput={(event) => {
              const value = event.currentTarget.value;
              setResults((before) => before.map((old, place) => (place === index ? value : old)));
            }}
          />
        </label>
      ))}
      <button type="submit">Send the result</button>
    </form>
  );
}

function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // it is still being written
  }
}
