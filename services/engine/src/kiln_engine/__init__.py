"""Owns one device: base weights, KV pages, recurrent states, scheduler, sampler, adapter slots."""
