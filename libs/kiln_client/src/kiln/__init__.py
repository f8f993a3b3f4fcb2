"""The Python client of a Kiln server.

    import kiln

    client = kiln.Client()                      # http://127.0.0.1:8420, or KILN_URL
    rollouts = client.rollouts("Write a short, friendly email reply.", n=16)
    rewards = [score(rollout.text) for rollout in rollouts]
    job = client.train.grpo("helpful", rollouts, rewards, learning_rate=1e-3)
    job.wait(progress=True)                     # the next answer is the new version's

`AsyncClient` has the same methods to await. `client.openai` is the openai client on the same server.
"""

from kiln.aio import AsyncClient, AsyncJob
from kiln.call import Call, SseReader
from kiln.client import Client, Job
from kiln.data import EvalRun
from kiln.errors import (
    ApiError,
    AuthenticationError,
    ConflictError,
    ConnectionFailed,
    EvalFailed,
    GateNotPassed,
    InvalidRequestError,
    JobCancelled,
    JobFailed,
    KilnError,
    NotBuiltError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    ServerTimeoutError,
    TooLargeError,
    UnavailableError,
    WaitTimedOut,
)
from kiln.progress import ProgressLine
from kiln.values import Adapter, AdapterVersion, JobEvent, JobOptions, JobState, LoraOptions, Rollout

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterVersion",
    "ApiError",
    "AsyncClient",
    "AsyncJob",
    "AuthenticationError",
    "Call",
    "Client",
    "ConflictError",
    "ConnectionFailed",
    "EvalFailed",
    "EvalRun",
    "GateNotPassed",
    "InvalidRequestError",
    "Job",
    "JobCancelled",
    "JobEvent",
    "JobFailed",
    "JobOptions",
    "JobState",
    "KilnError",
    "LoraOptions",
    "NotBuiltError",
    "NotFoundError",
    "PermissionDeniedError",
    "ProgressLine",
    "RateLimitError",
    "Rollout",
    "ServerError",
    "ServerTimeoutError",
    "SseReader",
    "TooLargeError",
    "UnavailableError",
    "WaitTimedOut",
]
