#!/usr/bin/env bash
# Makes sure that the browser tests find a Chromium that starts: one that is installed, the
# distribution's (where this may install packages), or Playwright's own, which goes into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

# A file of that name is not enough: chromium-browser may be a stub that asks for a snap, and Playwright's
# own Chromium comes without the system's libraries.
starts() {
  [ -n "$1" ] && "$1" --version >/dev/null 2>&1
}

own_chromium() {
  find .venv/browsers -type f -name '*headless*shell' 2>/dev/null | head -n 1
}

for name in chromium chromium-browser google-chrome; do
  if starts "$(command -v $name)"; then exit; fi
done
if starts "$(own_chromium)"; then exit; fi

echo "kiln setup: installing Chromium for the browser tests" >&2
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq || true
  if apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null && starts chromium; then
    exit
  fi
fi
PLAYWRIGHT_BROWSERS_PATH=$PWD/.venv/browsers .venv/bin/playwright install chromium-headless-shell
if starts "$(own_chromium)"; then exit; fi
{
  echo "kiln setup: Chromium is installed in .venv/browsers and does not start:"
  "$(own_chromium)" --version 2>&1 | head -n 5 || true
  echo "It needs packages of the system; sudo .venv/bin/playwright install-deps chromium-headless-shell installs"
  .venv/bin/playwright install-deps --dry-run chromium-headless-shell 2>&1 || true
} >&2
exit 1
