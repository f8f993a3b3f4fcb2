#!/bin/sh
# Runs NVIDIA's MPS server for engine and trainer, or says in a line why it does not: the containers
# that joined this one's namespaces need it to stay either way, and without a server CUDA gives them
# turns as usual. The NVIDIA container toolkit brings the programs.
set -u
control=nvidia-cuda-mps-control
decided=$CUDA_MPS_PIPE_DIRECTORY-decided
rm -rf "$CUDA_MPS_PIPE_DIRECTORY" "$decided"
trap 'echo quit | "$control"; exit 0' TERM INT

why_not=
if command -v "$control" >/dev/null; then
  mkdir -m 0700 "$CUDA_MPS_PIPE_DIRECTORY"
  "$control" -f &
  server=$!
  until [ -e "$CUDA_MPS_PIPE_DIRECTORY/control" ]; do
    kill -0 "$server" 2>/dev/null || { why_not="$control ended at once"; break; }
    sleep 0.1
  done
else
  why_not="$control is not installed"
fi

touch "$decided"
if [ -z "$why_not" ]; then
  echo "MPS runs: engine and trainer work at once"
else
  echo "no MPS, engine and trainer take turns on the GPU: $why_not"
  rm -rf "$CUDA_MPS_PIPE_DIRECTORY"
  sleep infinity &
fi
wait $! # for the server; when it ends, the container is started again
