#!/usr/bin/env bash
# Makes sure that the browser tests find a Chromium: one that is installed, the distribution's (where
# this may install packages), or Playwright's own, which goes into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
for name in chromium chromium-browser google-chrome; do
  command -v $name >/dev/null && exit
done
[ -n "$(ls .venv/browsers 2>/dev/null)" ] && exit
echo "kiln setup: installing Chromium for the browser tests" >&2
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq || true
  apt-get install -y -qq --no-install-recommends chromium fonts-liberation >/dev/null && exit
fi
PLAYWRIGHT_BROWSERS_PATH=$PWD/.venv/browsers .venv/bin/playwright install chromium-headless-shell
