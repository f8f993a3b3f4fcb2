#!/usr/bin/env bash
# Builds the dashboard (services/gateway/dashboard) into the gateway's package; with --check says
# whether what is committed there is its build. Without node, or without a way to its packages, the
# hash of the sources that the build left behind decides.
set -euo pipefail
cd "$(dirname "$0")/.."
sources=services/gateway/dashboard
target=services/gateway/src/kiln_gateway/dashboard/static

hash_of_sources() {
  (cd $sources && find . -name node_modules -prune -o -type f -print | LC_ALL=C sort | xargs sha256sum) | sha256sum | cut -d' ' -f1
}

install_packages() {
  local wanted
  wanted=$(sha256sum <$sources/package-lock.json)
  [ "$(cat $sources/node_modules/.stamp 2>/dev/null)" = "$wanted" ] && return
  # npm can end early and still say that all is well, so its tree is looked at.
  (cd $sources && npm ci --ignore-scripts --silent && npm ls --silent >/dev/null &&
    ls node_modules/{esbuild,preact,typescript,uplot}/package.json >/dev/null) &&
    echo "$wanted" >$sources/node_modules/.stamp
}

build_into() {
  (cd $sources && npx --no-install tsc --noEmit && node build.mjs "$1")
  hash_of_sources >"$1/sources.sha256"
}

if [ "${1:-}" != --check ]; then
  install_packages
  build_into "$PWD/$target"
  exit
fi

out_of_date() {
  echo "the built dashboard is out of date: run make dashboard" >&2
  exit 1
}
[ "$(hash_of_sources)" = "$(cat $target/sources.sha256)" ] || out_of_date
if command -v npm >/dev/null && install_packages; then
  out=$(mktemp -d)
  trap 'rm -rf "$out"' EXIT
  build_into "$out"
  diff -r "$out" $target >/dev/null || out_of_date
fi
