/** Ask one or two versions, rate what they say, train on it, ask again. */
import { useEffect } from "preact/hooks";
import { AnswerColumn } from "../playground/answer";
import { LessonProgress, TeachForm } from "../playground/lesson";
import { modelsOf, PromptForm } from "../playground/prompt_form";
import { ask, playground, type Round } from "../playground/state";
import { feed } from "../feed";
import { useStore } from "../store";
import type { Message } from "../types";
import { Empty } from "../ui";

export function Playground({ focusesPrompt }: { focusesPrompt: boolean }) {
  useEffect(() => {
    if (focusesPrompt) document.getElementById("prompt")?.focus();
  }, [focusesPrompt]);
  const rounds = useStore(playground, (state) => state.rounds);
  return (
    <div class="playground">
      <PromptForm />
      <TeachForm />
      {rounds.length === 0 && (
        <Empty title="Ask, rate, train, ask again">
          Each answer is kept for an hour with its exact tokens. Rate two answers to one prompt, and a
          training job learns from the difference while the server goes on answering.
        </Empty>
      )}
      {rounds.map((round) => (
        <RoundCard key={round.id} round={round} />
      ))}
    </div>
  );
}

function RoundCard({ round }: { round: Round }) {
  const prompt = round.messages[round.messages.length - 1];
  const numEarlier = round.messages.filter((message) => message.role !== "system").length - 1;
  return (
    <section class="card round" aria-label={`Round ${round.id}`}>
      <header class="asked">
        <p class="text">
          {prompt?.role === "tool" && <span class="note">Result: </span>}
          {prompt?.content}
        </p>
        {numEarlier > 0 && <span class="note">after {numEarlier} messages</span>}
      </header>
      <div class={`answers of-${round.columns.length}`}>
        {round.columns.map((_column, place) => (
          <AnswerColumn key={place} round={round} place={place} onContinue={(messages) => goOn(messages)} />
        ))}
      </div>
      {round.jobId && <LessonProgress round={round} />}
    </section>
  );
}

/** With a tool's result the model is asked at once; after an answer the next prompt is written first. */
function goOn(messages: Message[]): void {
  const { settings } = playground.value;
  if (messages[messages.length - 1]?.role === "tool") {
    void ask(messages, modelsOf(settings, feed.value.hello?.model ?? null), settings);
    return;
  }
  playground.update({ context: messages, prompt: "" });
  document.getElementById("prompt")?.focus();
}
