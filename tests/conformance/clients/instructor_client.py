"""instructor against a gateway: `instructor_client.py URL built|not-built`."""

import sys

import instructor
import openai
from pydantic import BaseModel

URL, IS_STRUCTURED = f"{sys.argv[1]}/v1", sys.argv[2] == "built"


class Person(BaseModel):
    name: str
    age: int


def extract(mode: instructor.Mode, question: str) -> Person:
    plain = openai.OpenAI(base_url=URL, api_key="unused", max_retries=0)
    client = instructor.from_openai(plain, mode=mode)
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model="base", messages=messages, response_model=Person, max_retries=1
    )


if __name__ == "__main__":
    expected = {"name": "Ada", "age": 36}
    # This mode asks in words and reads the answer's code block.
    in_words = extract(instructor.Mode.MD_JSON, "Extract in a block.")
    assert in_words.model_dump() == expected, in_words
    for enforced, wish in (
        (instructor.Mode.TOOLS, "Extract with the tool."),
        (instructor.Mode.JSON, "Extract the person."),
        (instructor.Mode.JSON_SCHEMA, "Extract the person."),
    ):
        try:
            person = extract(enforced, wish)
        except Exception as error:  # instructor wraps the client's errors in its own
            assert not IS_STRUCTURED, error
            assert "not built yet" in str(error), error
        else:
            assert person.model_dump() == expected, person
