/** Light, dark, or as the system has it; remembered in this browser. */
import { Store } from "./store";

export type Choice = "auto" | "light" | "dark";

const NAME = "kiln-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function drawnAs(choice: Choice): "light" | "dark" {
  if (choice !== "auto") return choice;
  return system.matches ? "dark" : "light";
}

function remembered(): Choice {
  const found = localStorage.getItem(NAME);
  return found === "light" || found === "dark" ? found : "auto";
}

export const theme = new Store<{ choice: Choice; drawn: "light" | "dark" }>({
  choice: remembered(),
  drawn: drawnAs(remembered()),
});

function show(choice: Choice): void {
  document.documentElement.dataset.theme = drawnAs(choice);
  theme.set({ choice, drawn: drawnAs(choice) });
}

export function choose(choice: Choice): void {
  localStorage.setItem(NAME, choice);
  show(choice);
}

system.addEventListener("change", () => show(theme.value.choice));
show(theme.value.choice);
