"""Train from a file over gRPC, with nothing of Kiln installed: `pip install grpcio grpcio-reflection`.

python train_over_grpc.py ADDRESS FILE ADAPTER [--cancel-after STEP] [--learning-rate RATE] [--key KEY]

Each line of FILE is a document: {"token_ids": [...], "num_prompt_tokens": 12}. The tokens after the
prompt are learned. The trainer speaks token ids; POST /v1/tokenize of the gateway gives them. It
tells its own contract (server reflection), so no generated code is needed either.
"""

import argparse
import json

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PACKAGE = "kiln.v1"


class Trainer:
    """The trainer's methods and messages, as it describes them itself."""

    def __init__(self, channel, key=""):
        self._channel = channel
        self._metadata = [("authorization", f"Bearer {key}")] if key else []
        self._pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        self._methods = self._pool.FindServiceByName(f"{PACKAGE}.Trainer").methods_by_name

    def message(self, name, **fields):
        return GetMessageClass(self._pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))(**fields)

    def call(self, name, request, kind="unary_unary"):
        method = self._methods[name]
        answer = GetMessageClass(method.output_type)
        stub = getattr(self._channel, kind)(
            f"/{PACKAGE}.Trainer/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return stub(request, metadata=self._metadata)


def parts(trainer, arguments):
    """The settings, then one document after another: the file is never in memory as a whole."""
    settings = trainer.message("SubmitRequest")
    settings.config.adapter = arguments.adapter
    settings.config.epochs = 1
    settings.config.checkpoint_every = 10
    settings.config.optimizer.learning_rate = arguments.learning_rate
    settings.sft.SetInParent()
    yield trainer.message("SubmitPart", settings=settings)
    with open(arguments.file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            num_prompt, num_tokens = row["num_prompt_tokens"], len(row["token_ids"])
            weights = [0.0] * num_prompt + [1.0] * (num_tokens - num_prompt)
            example = trainer.message("SftExample", token_ids=row["token_ids"], loss_weights=weights)
            yield trainer.message("SubmitPart", sft_example=example)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("address", help="host:port or unix:/path")
    parser.add_argument("file")
    parser.add_argument("adapter")
    parser.add_argument("--cancel-after", type=int, default=0, metavar="STEP")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--key", default="", help="where the listener checks keys")
    arguments = parser.parse_args()
    with grpc.insecure_channel(arguments.address) as channel:
        trainer = Trainer(channel, arguments.key)
        job = trainer.call("SubmitStream", parts(trainer, arguments), "stream_unary")
        print(f"{job.id} {job.status}", flush=True)
        watch = trainer.message("WatchJobRequest", id=job.id)
        for event in trainer.call("WatchJob", watch, "unary_stream"):
            data = json.loads(event.data_json)
            print(event.type, data.get("step", ""), data.get("metrics", {}).get("loss", ""), flush=True)
            if event.type == "step" and data["step"] == arguments.cancel_after:
                trainer.call("CancelJob", trainer.message("CancelJobRequest", id=job.id))
        job = trainer.call("GetJob", trainer.message("GetJobRequest", id=job.id))
        print(f"{job.id} {job.status} {job.result.adapter}@{job.result.version} {job.result.sha256}")


if __name__ == "__main__":
    main()
