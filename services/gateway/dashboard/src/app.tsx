/** The frame around the views: navigation, state of the connection, key, theme, keyboard. */
import type { JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { apiKey } from "./api";
import { attachedOf } from "./derive";
import { connect, feed } from "./feed";
import { KeyForm } from "./key_form";
import { forgetRounds } from "./playground/state";
import { useStore } from "./store";
import { choose, theme, type Choice } from "./theme";
import { Adapters } from "./views/adapters";
import { Live } from "./views/live";
import { Logs } from "./views/logs";
import { Playground } from "./views/playground";
import { Training } from "./views/training";

interface View {
  id: string;
  title: string;
  icon: string; // an SVG path in a box of 24
  draw: (argument: string) => JSX.Element;
}

const VIEWS: View[] = [
  { id: "live", title: "Live", icon: "M3 12h4l3-8 4 16 3-8h4", draw: () => <Live /> },
  {
    id: "playground",
    title: "Playground",
    icon: "M4 5h16v11H9l-5 4z",
    draw: (wanted) => <Playground focusesPrompt={wanted === "prompt"} />,
  },
  {
    id: "training",
    title: "Training",
    icon: "M4 5v14h16M7 9c3 6 6 7 12 7",
    draw: (job) => <Training jobId={job} />,
  },
  {
    id: "adapters",
    title: "Adapters",
    icon: "M6 4v16M6 9h8a4 4 0 0 1 4 4v3M18 16l-2.5-2.5M18 16l2.5-2.5",
    draw: () => <Adapters />,
  },
  {
    id: "logs",
    title: "Logs",
    icon: "M5 6h14M5 12h14M5 18h9",
    draw: (wanted) => <Logs key={wanted} wanted={wanted} />,
  },
];

interface Place {
  view: View;
  argument: string;
}

function place(): Place {
  const [id, argument = ""] = location.hash.replace(/^#\/?/, "").split("/");
  return { view: VIEWS.find((view) => view.id === id) ?? VIEWS[0]!, argument: decodeURIComponent(argument) };
}

function usePlace(): Place {
  const [current, setPlace] = useState(place);
  useEffect(() => {
    const onHash = () => setPlace(place());
    addEventListener("hashchange", onHash);
    return () => removeEventListener("hashchange", onHash);
  }, []);
  useEffect(() => {
    document.title = `${current.view.title} · Kiln`;
    scrollTo(0, 0);
  }, [current.view]);
  return current;
}

function useKeys(showKeys: (isShown: boolean) => void): void {
  useEffect(() => {
    const onKey = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target)) return;
      const chosen = VIEWS[Number(event.key) - 1];
      if (chosen) location.hash = `#/${chosen.id}`;
      else if (event.key === "?") showKeys(true);
      else if (event.key === "/") {
        event.preventDefault();
        if (place().view.id === "playground") document.getElementById("prompt")?.focus();
        else location.hash = "#/playground/prompt";
      }
    };
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  }, []);
}

export function App() {
  const { view, argument } = usePlace();
  const [showsKeys, setShowsKeys] = useState(false);
  const main = useRef<HTMLElement>(null);
  const connection = useStore(feed, (state) => state.connection);
  useKeys(setShowsKeys);

  return (
    <div class="frame">
      <a class="skip" href="#main" onClick={(event) => (event.preventDefault(), main.current?.focus())}>
        Skip to content
      </a>
      <header class="side">
        <a class="brand" href="#/live" aria-label="Kiln, live overview">
          <img src="/dashboard/icon.svg" alt="" width="28" height="28" />
          <span>Kiln</span>
        </a>
        <Navigation view={view} />
        <State />
        <div class="tools">
          <ThemeChoice />
          <button type="button" class="quiet keys-button" onClick={() => setShowsKeys(true)}>
            Shortcuts
          </button>
        </div>
      </header>
      <main id="main" ref={main} tabIndex={-1}>
        <h1>{view.title}</h1>
        {connection === "key needed" ? <KeyForm /> : view.draw(argument)}
      </main>
      {showsKeys && <KeyList onClose={() => setShowsKeys(false)} />}
    </div>
  );
}

function Navigation({ view }: { view: View }) {
  return (
    <nav aria-label="Views">
      {VIEWS.map((entry, index) => (
        <a
          key={entry.id}
          href={`#/${entry.id}`}
          aria-current={entry.id === view.id ? "page" : undefined}
          title={`${entry.title} (${index + 1})`}
        >
          <svg viewBox="0 0 24 24" aria-hidden="true">
            <path d={entry.icon} />
          </svg>
          <span>{entry.title}</span>
        </a>
      ))}
    </nav>
  );
}

function isTyping(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && /^(INPUT|TEXTAREA|SELECT)$/.test(target.tagName);
}

function State() {
  const { connection, hello, adapters } = useStore(feed, (state) => state);
  const attached = attachedOf(adapters);
  const words = {
    live: "Live",
    connecting: "Connecting",
    lost: "Connection lost",
    "key needed": "Key needed",
  };
  return (
    <div class="state">
      <span class={`dot ${connection.replace(" ", "-")}`} />
      <div role="status">
        <b>{words[connection]}</b>
        {hello && <span class="served">{attached ?? hello.model ?? "no model"}</span>}
      </div>
      {apiKey.get() && connection !== "key needed" && (
        <button
          type="button"
          class="quiet"
          onClick={() => {
            apiKey.forget();
            forgetRounds();
            void connect();
          }}
        >
          Forget key
        </button>
      )}
    </div>
  );
}

function ThemeChoice() {
  const choice = useStore(theme, (value) => value.choice);
  return (
    <label class="theme">
      <span class="hidden">Theme</span>
      <select value={choice} onChange={(event) => choose(event.currentTarget.value as Choice)}>
        <option value="auto">System theme</option>
        <option value="light">Light theme</option>
        <option value="dark">Dark theme</option>
      </select>
    </label>
  );
}

const KEYS: [string, string][] = [
  ["1 – 5", "change the view"],
  ["/", "write a prompt"],
  ["Enter", "send the prompt; Shift + Enter begins a line"],
  ["Escape", "stop the answers; close this"],
  ["?", "show this"],
];

function KeyList({ onClose }: { onClose: () => void }) {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  return (
    <dialog ref={dialog} class="card" aria-labelledby="keys-title" onClose={onClose}>
      <h2 id="keys-title">Keyboard</h2>
      <dl class="keys">
        {KEYS.map(([key, does]) => (
          <div key={key}>
            <dt>
              <kbd>{key}</kbd>
            </dt>
            <dd>{does}</dd>
          </div>
        ))}
      </dl>
      <button type="button" onClick={onClose}>
        Close
      </button>
    </dialog>
  );
}
