"""Evaluation: suites of cases, answers drawn as any request's are, scorers, statistics."""
