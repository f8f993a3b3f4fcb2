/** Asks for the API key where the gateway wants one. It stays in this tab. */
import { useState } from "preact/hooks";
import { apiKey } from "./api";
import { connect, feed } from "./feed";
import { useStore } from "./store";
import { Problem } from "./ui";

export function KeyForm() {
  const [key, setKey] = useState("");
  const error = useStore(feed, (state) => state.error);
  const wasRefused = apiKey.get() !== "";
  return (
    <form
      class="card key-form"
      onSubmit={(event) => {
        event.preventDefault();
        apiKey.set(key.trim());
        feed.update({ connection: "connecting" });
        void connect();
      }}
    >
      <h2>This server asks for an API key</h2>
      <p>The key is kept in this tab until you close it, and is sent to this server only.</p>
      <label>
        API key
        <input
          type="password"
          autocomplete="off"
          required
          value={key}
          onInput={(event) => setKey(event.currentTarget.value)}
        />
      </label>
      <button type="submit" class="primary">
        Use this key
      </button>
      {wasRefused && <Problem error={error} />}
    </form>
  );
}
