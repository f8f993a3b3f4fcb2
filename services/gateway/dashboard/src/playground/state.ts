/** Rounds of the playground: one prompt, one or two versions, their answers, and how they were rated. */
import { ApiError, asApiError, errorIn, stream } from "../api";
import { Store } from "../store";
import type { Message, ToolCall } from "../types";

export interface Answer {
  index: number;
  content: string;
  reasoning: string;
  toolCalls: ToolCall[];
  finishReason: string | null;
  /** The reward it will be sent with; null while nobody rated it. */
  reward: number | null;
}

export interface Column {
  model: string;
  /** What the gateway says answered: "name@version" or "base". */
  adapter: string | null;
  completionId: string | null;
  answers: Answer[];
  isRunning: boolean;
  error: ApiError | null;
  firstTokenS: number | null;
  seconds: number | null;
  numTokens: number | null;
}

export interface Round {
  id: number;
  messages: Message[];
  columns: Column[];
  /** The job its ratings went to. */
  jobId: string | null;
}

export interface Settings {
  modelA: string;
  modelB: string; // "" compares with nothing
  numAnswers: number;
  temperature: number;
  maxTokens: number;
  thinking: "default" | "on" | "off";
  system: string;
  tools: string;
}

export interface Lesson {
  /** The name to learn under; null: the one that answered, so that what it knows is kept. */
  adapter: string | null;
  learningRate: number;
  epochs: number;
}

export interface PlaygroundState {
  prompt: string;
  settings: Settings;
  lesson: Lesson;
  /** The conversation that the next prompt goes on from. */
  context: Message[];
  rounds: Round[];
}

export const playground = new Store<PlaygroundState>({
  prompt: "",
  settings: {
    modelA: "",
    modelB: "",
    numAnswers: 2,
    temperature: 1,
    maxTokens: 256,
    thinking: "default",
    system: "",
    tools: "",
  },
  lesson: { adapter: null, learningRate: 0.001, epochs: 8 },
  context: [],
  rounds: [],
});

/** The name that ratings are learned under. */
export function learner({ lesson, rounds }: PlaygroundState): string {
  if (lesson.adapter !== null) return lesson.adapter;
  const answered = rounds.flatMap((round) => round.columns).map((column) => column.adapter);
  const names = answered.filter((adapter) => adapter && adapter !== "base");
  return names.at(-1)?.split("@")[0] ?? "playground";
}

let lastRound = 0;
const running = new Set<AbortController>();

export function stopAnswers(): void {
  for (const controller of running) controller.abort();
}

/** Prompts and answers are those of a key: whoever forgets it takes them along. */
export function forgetRounds(): void {
  stopAnswers();
  playground.update({ prompt: "", context: [], rounds: [] });
}

/** Throws where the tools are not a JSON array. */
export function parseTools(text: string): unknown[] | undefined {
  if (!text.trim()) return undefined;
  const tools: unknown = JSON.parse(text);
  if (!Array.isArray(tools)) throw new Error("tools are a JSON array of functions");
  return tools;
}

/** Ask the versions `models` for answers to `messages`; the round fills as they stream. */
export async function ask(messages: Message[], models: string[], settings: Settings): Promise<void> {
  const tools = parseTools(settings.tools);
  const round: Round = {
    id: ++lastRound,
    messages,
    columns: models.map((model) => newColumn(model)),
    jobId: null,
  };
  playground.update({ rounds: [round, ...playground.value.rounds] });
  await Promise.all(models.map((model, column) => fill(round.id, column, model, messages, settings, tools)));
}

function newColumn(model: string): Column {
  return {
    model,
    adapter: null,
    completionId: null,
    answers: [],
    isRunning: true,
    error: null,
    firstTokenS: null,
    seconds: null,
    numTokens: null,
  };
}

function bodyOf(
  model: string,
  messages: Message[],
  settings: Settings,
  tools: unknown[] | undefined,
): unknown {
  const body: Record<string, unknown> = {
    model,
    messages,
    stream: true,
    stream_options: { include_usage: true },
    n: settings.numAnswers,
    temperature: settings.temperature,
    max_tokens: settings.maxTokens,
  };
  if (tools) body.tools = tools;
  if (settings.thinking !== "default")
    body.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return body;
}

interface Chunk {
  id: string;
  kiln?: { adapter?: string };
  usage?: { completion_tokens: number } | null;
  choices: { index: number; delta: Delta; finish_reason: string | null }[];
}

interface Delta {
  content?: string | null;
  reasoning_content?: string;
  tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
}

async function fill(
  roundId: number,
  column: number,
  model: string,
  messages: Message[],
  settings: Settings,
  tools: unknown[] | undefined,
): Promise<void> {
  const controller = new AbortController();
  running.add(controller);
  const startedAt = performance.now();
  const passed = () => (performance.now() - startedAt) / 1000;
  const change = (update: (before: Column) => Column) => changeColumn(roundId, column, update);
  try {
    const init = {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(bodyOf(model, messages, settings, tools)),
      signal: controller.signal,
    };
    for await (const { data } of stream("/v1/chat/completions", init)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data) as Chunk;
      const error = errorIn(chunk);
      if (error) throw error;
      change((before) => take(before, chunk, passed()));
    }
  } catch (error) {
    const isStopped = error instanceof DOMException && error.name === "AbortError";
    if (!isStopped) change((before) => ({ ...before, error: asApiError(error) }));
  } finally {
    running.delete(controller);
    change((before) => ({ ...before, isRunning: false, seconds: passed() }));
  }
}

function take(column: Column, chunk: Chunk, passedS: number): Column {
  const answers = [...column.answers];
  for (const { index, delta, finish_reason } of chunk.choices) {
    const before = answers[index] ?? newAnswer(index);
    answers[index] = {
      ...before,
      content: before.content + (delta.content ?? ""),
      reasoning: before.reasoning + (delta.reasoning_content ?? ""),
      toolCalls: delta.tool_calls
        ? delta.tool_calls.reduce(withToolCall, before.toolCalls)
        : before.toolCalls,
      finishReason: finish_reason ?? before.finishReason,
    };
  }
  return {
    ...column,
    completionId: chunk.id,
    adapter: chunk.kiln?.adapter ?? column.adapter,
    // An index may come before a lower one.
    answers: Array.from(answers, (answer, index) => answer ?? newAnswer(index)),
    firstTokenS: column.firstTokenS ?? (chunk.choices.length ? passedS : null),
    numTokens: chunk.usage?.completion_tokens ?? column.numTokens,
  };
}

function newAnswer(index: number): Answer {
  return { index, content: "", reasoning: "", toolCalls: [], finishReason: null, reward: null };
}

function withToolCall(calls: ToolCall[], piece: NonNullable<Delta["tool_calls"]>[number]): ToolCall[] {
  const changed = [...calls];
  const before = changed[piece.index] ?? { id: "", name: "", arguments: "" };
  changed[piece.index] = {
    id: piece.id ?? before.id,
    name: piece.function?.name ?? before.name,
    arguments: before.arguments + (piece.function?.arguments ?? ""),
  };
  return changed;
}

export function changeRound(id: number, update: (before: Round) => Round): void {
  const rounds = playground.value.rounds.map((round) => (round.id === id ? update(round) : round));
  playground.update({ rounds });
}

function changeColumn(roundId: number, place: number, update: (before: Column) => Column): void {
  changeRound(roundId, (round) => ({
    ...round,
    columns: round.columns.map((column, index) => (index === place ? update(column) : column)),
  }));
}

export function rate(roundId: number, place: number, index: number, reward: number | null): void {
  changeColumn(roundId, place, (column) => ({
    ...column,
    answers: column.answers.map((answer) => (answer.index === index ? { ...answer, reward } : answer)),
  }));
}

export function assistantMessage(answer: Answer): Message {
  const message: Message = { role: "assistant", content: answer.content };
  if (answer.toolCalls.length)
    message.tool_calls = answer.toolCalls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  return message;
}
