// Writes the page, its script and its style into the folder named on the command line.
import { build } from "esbuild";
import { cp, mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";

const target = process.argv[2];
if (!target) throw new Error("usage: node build.mjs FOLDER");
await mkdir(target, { recursive: true });
await build({
  entryPoints: { app: "src/main.tsx" },
  outdir: target,
  bundle: true,
  minify: true,
  format: "iife",
  target: ["chrome109", "firefox115", "safari16"],
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "none",
  charset: "utf8",
  logLevel: "warning",
});
for (const name of ["index.html", "icon.svg"]) await cp(join("public", name), join(target, name));
const licenses = ["preact", "uplot"].map(
  async (name) => `${name}\n\n${await readFile(join("node_modules", name, "LICENSE"), "utf8")}`,
);
await writeFile(join(target, "licenses.txt"), (await Promise.all(licenses)).join("\n"));
