"""Evaluation suites and runs: facts about adapter versions, kept beside them."""
