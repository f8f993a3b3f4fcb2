"""Real clients against a gateway with a scripted engine, each in an environment of its own.

What each client does is in clients/; a client that meets something unexpected ends with its traceback.
"""

import asyncio
import os

import httpx
import pytest
import redis.asyncio

from tests.support.gateway import REPOSITORY, build_rig, served
from tests.support.redis_server import private_redis

CLIENTS = ("anthropic", "langchain-openai", "instructor", "litellm")
CALL = "<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"
PARAMETER = "<parameter={name}>\n{value}\n</parameter>\n"
PERSON = {"name": "Ada", "age": 36}
PERSON_TEXT = '{"name": "Ada", "age": 36}'


def answer_to(prompt):
    """What the model says after this prompt; the last question decides."""
    question = prompt.rpartition("<|im_start|>user\n")[2]
    if "<tool_response>" in question:
        return "Hello there!"
    if "Call the tool." in question:
        return CALL.format(name="weather", parameters=PARAMETER.format(name="city", value="Oslo"))
    if "Extract with the tool." in question:
        parameters = "".join(PARAMETER.format(name=name, value=value) for name, value in PERSON.items())
        return CALL.format(name="Person", parameters=parameters)
    if "Extract in a block." in question:
        return f"```json\n{PERSON_TEXT}\n```"
    if "Extract" in question:
        return PERSON_TEXT
    if "Think first." in question:
        return "A greeting.\n</think>\n\nHello there!"
    return "Hello there!"


async def run(folder, program, *arguments):
    """Standard output and error of a program of this repository that must succeed; it runs in `folder`."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "PYTHONWARNINGS": "ignore"}
    process = await asyncio.create_subprocess_exec(
        REPOSITORY / program,
        *arguments,
        cwd=folder,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()[-6000:]
    return output.decode()


@pytest.fixture
async def rig_and_address(tmp_path):
    with private_redis(tmp_path) as server:
        store = redis.asyncio.from_url(server.url)
        rig = build_rig(tmp_path, redis=store, max_model_len=8192)
        rig.engine.script = lambda request: answer_to(rig.tokenizer.decode(list(request.prompt_token_ids)))
        async with served(rig) as address:
            yield rig, address
        await store.aclose()


async def structured_output(address):
    """Whether the gateway builds structured output: "built" or "not-built"."""
    body = {"messages": [{"role": "user", "content": "Extract"}], "response_format": {"type": "json_object"}}
    async with httpx.AsyncClient(timeout=30) as http:
        status = (await http.post(f"{address}/v1/chat/completions", json=body)).status_code
    assert status in (200, 501)
    return "built" if status == 200 else "not-built"


@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_gets_what_it_asks_for(rig_and_address, tmp_path, client):
    _, address = rig_and_address
    await run(tmp_path, "scripts/install_client.sh", client)
    script = REPOSITORY / "tests/conformance/clients" / f"{client.replace('-', '_')}_client.py"
    python = f".venv-clients/{client}/bin/python"
    await run(tmp_path, python, script, address, await structured_output(address))


ROUTES = (
    *("chat/completions", "completions", "completions/batch", "embeddings", "responses", "messages"),
    *("messages/count_tokens", "tokenize", "detokenize", "models"),
)


async def test_requests_made_up_from_the_openapi_document_meet_no_server_error(rig_and_address, tmp_path):
    _, address = rig_and_address
    await run(tmp_path, "scripts/install_client.sh", "schemathesis")
    program = ".venv-clients/schemathesis/bin/schemathesis"
    settings = REPOSITORY / "tests/conformance/schemathesis.toml"
    options = ["--checks", "not_a_server_error,content_type_conformance", "--phases", "fuzzing"]
    options += ["--max-examples", "4", "--seed", "1", "--suppress-health-check", "all"]
    chosen = ["--include-path-regex", f"^/v1/({'|'.join(ROUTES)})$", "--warnings", "off"]
    output = await run(
        tmp_path, program, "--config-file", settings, "run", f"{address}/openapi.json", *options, *chosen
    )
    assert f"Tested: {len(ROUTES)}" in output, output[-3000:]
