"""The engine's gRPC face: wire messages in, commands to the loop, step messages out."""
