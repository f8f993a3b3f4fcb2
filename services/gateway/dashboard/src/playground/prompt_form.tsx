/** What is asked, of which versions, and how they are sampled. */
import { useMemo } from "preact/hooks";
import { modelChoices } from "../derive";
import { feed } from "../feed";
import { useStore } from "../store";
import { Problem, useAction } from "../ui";
import { ask, parseTools, playground, stopAnswers, type Settings } from "./state";
import type { Message } from "../types";

const EXAMPLE_TOOLS = JSON.stringify(
  [
    {
      type: "function",
      function: {
        name: "get_weather",
        description: "Current weather of a city.",
        parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
      },
    },
  ],
  null,
  2,
);

export function modelsOf(settings: Settings, served: string | null): string[] {
  const first = settings.modelA || served || "base";
  return settings.modelB ? [first, settings.modelB] : [first];
}

export function PromptForm() {
  const { prompt, settings, context, rounds } = useStore(playground, (state) => state);
  const hello = useStore(feed, (state) => state.hello);
  const action = useAction();
  const isRunning = rounds.some((round) => round.columns.some((column) => column.isRunning));
  const change = (update: Partial<Settings>) => playground.update({ settings: { ...settings, ...update } });
  const send = () =>
    action.run(async () => {
      if (!prompt.trim()) return;
      parseTools(settings.tools); // throws before the conversation is let go
      const system: Message[] =
        settings.system.trim() && !context.length ? [{ role: "system", content: settings.system }] : [];
      const messages: Message[] = [...system, ...context, { role: "user", content: prompt }];
      const asking = ask(messages, modelsOf(settings, hello?.model ?? null), settings);
      playground.update({ context: [] });
      await asking;
    });
  return (
    <form
      class="card prompt-form"
      onSubmit={(event) => {
        event.preventDefault();
        void send();
      }}
    >
      <Context messages={context} />
      <PromptField isRunning={isRunning} send={send} />
      <div class="fields">
        <ModelSelect label="Version" value={settings.modelA} onChange={(modelA) => change({ modelA })} />
        <ModelSelect
          label="Compare with"
          none
          value={settings.modelB}
          onChange={(modelB) => change({ modelB })}
        />
        <NumberField
          label="Answers each"
          value={settings.numAnswers}
          min={1}
          max={8}
          step={1}
          onChange={(numAnswers) => change({ numAnswers })}
        />
      </div>
      <details>
        <summary>Sampling, system message, tools</summary>
        <MoreFields settings={settings} change={change} />
      </details>
      <div class="buttons">
        <button type="submit" class="primary" disabled={isRunning || !prompt.trim()}>
          Send
        </button>
        {isRunning && (
          <button type="button" onClick={stopAnswers}>
            Stop
          </button>
        )}
        <span class="note">Enter sends, Shift + Enter begins a line</span>
      </div>
      <Problem error={action.error} />
    </form>
  );
}

function Context({ messages }: { messages: Message[] }) {
  if (!messages.length) return null;
  return (
    <p class="context">
      Goes on from {messages.length} messages.{" "}
      <button type="button" class="quiet" onClick={() => playground.update({ context: [] })}>
        Begin anew
      </button>
    </p>
  );
}

function PromptField({ isRunning, send }: { isRunning: boolean; send: () => Promise<void> }) {
  const prompt = useStore(playground, (state) => state.prompt);
  return (
    <label>
      Prompt
      <textarea
        id="prompt"
        rows={3}
        placeholder="Write a short email reply to Tom about the spare key."
        value={prompt}
        onInput={(event) => playground.update({ prompt: event.currentTarget.value })}
        onKeyDown={(event) => {
          if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
            event.preventDefault();
            if (!isRunning) void send();
          } else if (event.key === "Escape") stopAnswers();
        }}
      />
    </label>
  );
}

function MoreFields({
  settings,
  change,
}: {
  settings: Settings;
  change: (update: Partial<Settings>) => void;
}) {
  return (
    <div class="more">
      <div class="fields">
        <NumberField
          label="Temperature"
          value={settings.temperature}
          min={0}
          max={2}
          step={0.1}
          onChange={(temperature) => change({ temperature })}
        />
        <NumberField
          label="Most tokens"
          value={settings.maxTokens}
          min={1}
          max={32768}
          step={1}
          onChange={(maxTokens) => change({ maxTokens })}
        />
        <label>
          Thinking
          <select
            value={settings.thinking}
            onChange={(event) => change({ thinking: event.currentTarget.value as Settings["thinking"] })}
          >
            <option value="default">as the server has it</option>
            <option value="on">on</option>
            <option value="off">off</option>
          </select>
        </label>
      </div>
      <label>
        System message
        <textarea
          rows={2}
          value={settings.system}
          onInput={(event) => change({ system: event.currentTarget.value })}
        />
      </label>
      <label>
        Tools, a JSON array
        <textarea
          class="code"
          rows={settings.tools ? 8 : 2}
          spellcheck={false}
          value={settings.tools}
          onInput={(event) => change({ tools: event.currentTarget.value })}
        />
      </label>
      {!settings.tools && (
        <button type="button" class="quiet" onClick={() => change({ tools: EXAMPLE_TOOLS })}>
          Put in an example
        </button>
      )}
    </div>
  );
}

interface ModelProps {
  label: string;
  value: string;
  none?: boolean;
  onChange: (value: string) => void;
}

function ModelSelect({ label, value, none, onChange }: ModelProps) {
  const hello = useStore(feed, (state) => state.hello);
  const adapters = useStore(feed, (state) => state.adapters);
  const choices = useMemo(() => modelChoices(hello?.model ?? null, adapters), [hello, adapters]);
  return (
    <label class="long">
      {label}
      <select
        value={value || (none ? "" : (choices[0]?.id ?? ""))}
        onChange={(event) => onChange(event.currentTarget.value)}
      >
        {none && <option value="">nothing</option>}
        {choices.map((choice) => (
          <option key={choice.id} value={choice.id}>
            {choice.label}
          </option>
        ))}
      </select>
    </label>
  );
}

interface NumberProps {
  label: string;
  value: number;
  min: number;
  max: number;
  step: number | "any";
  onChange: (value: number) => void;
}

export function NumberField({ label, value, min, max, step, onChange }: NumberProps) {
  return (
    <label>
      {label}
      <input
        type="number"
        value={value}
        min={min}
        max={max}
        step={step}
        onInput={(event) => {
          const typed = event.currentTarget.valueAsNumber;
          if (Number.isFinite(typed)) onChange(typed);
        }}
      />
    </label>
  );
}
