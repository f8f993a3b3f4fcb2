/** What the services write, newest last. */
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { feed } from "../feed";
import { useStore } from "../store";
import type { LogLine } from "../types";
import { Badge, Empty } from "../ui";

const SHOWN = 400;
const LEVELS = ["debug", "info", "warning", "error", "critical"];

interface Filter {
  service: string;
  least: string;
  text: string;
  /** New lines are scrolled into sight. */
  follows: boolean;
}

export function Logs({ wanted: wantedAtFirst }: { wanted: string }) {
  const logs = useStore(feed, (state) => state.logs);
  const hello = useStore(feed, (state) => state.hello);
  const [filter, setFilter] = useState<Filter>({
    service: "",
    least: "info",
    text: wantedAtFirst,
    follows: true,
  });
  const list = useRef<HTMLOListElement>(null);
  const services = useMemo(() => [...new Set(logs.map((line) => line.service))].sort(), [logs]);
  const shown = useMemo(() => logs.filter((line) => passes(line, filter)).slice(-SHOWN), [logs, filter]);
  useEffect(() => {
    if (filter.follows && list.current) list.current.scrollTop = list.current.scrollHeight;
  }, [shown, filter.follows]);

  if (hello && !hello.has_logs)
    return hello.scopes.includes("admin") ? (
      <Empty title="This gateway knows of no log files">
        Started by kiln up it finds them by itself; elsewhere name their folder in KILN_GATEWAY_LOG_DIR.
      </Empty>
    ) : (
      <Empty title="This key may not read logs">It lacks the scope “admin”.</Empty>
    );
  return (
    <section class="card logs">
      <Filters filter={filter} change={setFilter} services={services} />
      {shown.length ? (
        <ol ref={list} class="lines" tabIndex={0} aria-label="Log lines">
          {shown.map((line) => (
            <li key={line.number} class={line.level}>
              {/* Between words of a line there are spaces, so that it breaks there. */}
              <time>{line.at.slice(11, 23)}</time> <span class="service">{line.service}</span>{" "}
              {line.level !== "info" && <Badge kind={line.level}>{line.level}</Badge>}{" "}
              <span class="event">{line.event}</span>{" "}
              <span class="fields-of-line">{fieldsOf(line)}</span>
            </li>
          ))}
        </ol>
      ) : (
        <Empty title="No line matches" />
      )}
    </section>
  );
}

interface FilterProps {
  filter: Filter;
  change: (filter: Filter) => void;
  services: string[];
}

function Filters({ filter, change, services }: FilterProps) {
  return (
    <div class="fields">
      <label>
        Service
        <select
          value={filter.service}
          onChange={(event) => change({ ...filter, service: event.currentTarget.value })}
        >
          <option value="">all</option>
          {services.map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
      </label>
      <label>
        At least
        <select
          value={filter.least}
          onChange={(event) => change({ ...filter, least: event.currentTarget.value })}
        >
          {LEVELS.slice(0, 4).map((level) => (
            <option key={level}>{level}</option>
          ))}
        </select>
      </label>
      <label>
        Contains
        <input
          type="search"
          value={filter.text}
          onInput={(event) => change({ ...filter, text: event.currentTarget.value })}
        />
      </label>
      <label class="check">
        <input
          type="checkbox"
          checked={filter.follows}
          onChange={(event) => change({ ...filter, follows: event.currentTarget.checked })}
        />
        Follow
      </label>
    </div>
  );
}

function passes(line: LogLine, { service, least, text }: Filter): boolean {
  return (
    (!service || line.service === service) &&
    LEVELS.indexOf(line.level) >= LEVELS.indexOf(least) &&
    wordsOf(line).toLowerCase().includes(text.toLowerCase())
  );
}

function fieldsOf(line: LogLine): string {
  return Object.entries(line.fields)
    .map(([name, value]) => `${name}=${value}`)
    .join(" ");
}

function wordsOf(line: LogLine): string {
  return `${line.event} ${fieldsOf(line)}`;
}
