"""Torch-free foundations every Kiln process shares: errors, settings, logs, wire types, clients, bus."""
