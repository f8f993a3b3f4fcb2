"""Trains the demo model from nothing and writes its checkpoint folder.

    python demo/train_model.py --out demo/model --device cuda

The text, the tokenizer and the first weights come from the seed alone. The folder's
training.json records the hash of the training tokens and the held-out loss; a run with the
same seed and steps gives the same hash and a loss within 2 %.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from demo.data.corpus import PackedStep, make_corpus, make_shard, packed_steps  # noqa: E402
from demo.data.tokenizer import (  # noqa: E402
    END_OF_TEXT,
    MAX_CONTEXT_TOKENS,
    TURN_END,
    save_tokenizer,
    special_id,
    train_tokenizer,
)
from demo.measure import DemoModel, measure, sample_conversations  # noqa: E402
from demo.training import Schedule, StepLoss, demo_config, held_out_loss, initial_parameters, train  # noqa: E402
from kiln_nn.config import ModelConfig  # noqa: E402

DEFAULT_STEPS = 1800
STEP_TOKENS = 16384
NUM_SHARDS = 120
HELD_OUT_SHARD = 1_000_000
HELD_OUT_DOCUMENTS = 600
MAX_FILE_BYTES = 16_000_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint into")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS)
    parser.add_argument("--step-tokens", type=int, default=STEP_TOKENS, help="most tokens in one step")
    parser.add_argument("--shards", type=int, default=NUM_SHARDS, help="of 2,000 documents each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="processes that write the training text")
    parser.add_argument("--samples-per-prompt", type=int, default=16)
    parser.add_argument("--measure-count", type=int, default=200, help="sums and tool requests to measure on")
    parser.add_argument("--no-measure", action="store_true", help="only train and write the checkpoint")
    return parser.parse_args()


def print_progress(number: int, loss: StepLoss, seconds: float) -> None:
    if number % 20 in (0, 19) or number < 3:
        if not torch.isfinite(loss.total):
            raise FloatingPointError(f"the loss of step {number} is {loss.total.item()}")
        print(
            f"step {number:5d}  loss {loss.total.item():.4f}  answers {loss.next_token.item():.4f}"
            f"  mtp {loss.mtp.item():.4f}  {seconds:.1f} s",
            flush=True,
        )


def save_checkpoint(
    folder: Path, config: ModelConfig, parameters: dict[str, torch.Tensor], eos_ids: list[int]
) -> None:
    """Write config.json, generation_config.json and one bf16 model.safetensors."""
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in parameters.items()
    }
    path = folder / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    if path.stat().st_size > MAX_FILE_BYTES:
        raise RuntimeError(f"{path.name} has {path.stat().st_size} bytes, more than {MAX_FILE_BYTES}")
    write_json(folder / "config.json", {**config.to_hf_dict(), "torch_dtype": "bfloat16"})
    write_json(
        folder / "generation_config.json", {"do_sample": True, "eos_token_id": eos_ids, "temperature": 1.0}
    )


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def held_out_steps(tokenizer_path: Path, seed: int, step_tokens: int) -> list[PackedStep]:
    """Documents of a shard that training never sees."""
    corpus = make_shard(str(tokenizer_path), seed, HELD_OUT_SHARD, HELD_OUT_DOCUMENTS)
    return list(itertools.islice(packed_steps(corpus, min(step_tokens, corpus.num_tokens // 2), seed), 2))


def main() -> None:
    args = parse_arguments()
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, no change on a CPU
    save_tokenizer(train_tokenizer(args.seed), args.out)
    tokenizer = Tokenizer.from_file(str(args.out / "tokenizer.json"))
    corpus = make_corpus(args.out / "tokenizer.json", args.seed, args.shards, num_processes=args.processes)
    facts: dict[str, Any] = {
        "seed": args.seed,
        "data_sha256": corpus.sha256(),
        "num_documents": len(corpus.lengths),
        "num_data_tokens": corpus.num_tokens,
        "steps": args.steps,
        "step_tokens": args.step_tokens,
    }
    print(json.dumps(facts), flush=True)

    end_of_text, turn_end = (special_id(tokenizer, token) for token in (END_OF_TEXT, TURN_END))
    config = demo_config(tokenizer.get_vocab_size(), end_of_text, MAX_CONTEXT_TOKENS)
    parameters = initial_parameters(config, args.seed, args.device)
    facts["num_parameters"] = sum(parameter.numel() for parameter in parameters.values())
    schedule = Schedule(args.steps)
    train(config, parameters, packed_steps(corpus, args.step_tokens, args.seed), schedule, print_progress)

    # What is kept is what is committed: measure the parameters as bf16 stores them.
    stored = {name: tensor.detach().to(torch.bfloat16).float() for name, tensor in parameters.items()}
    save_checkpoint(args.out, config, stored, [end_of_text, turn_end])
    unseen = held_out_steps(args.out / "tokenizer.json", args.seed, args.step_tokens)
    facts["held_out_loss"], facts["held_out_mtp_loss"] = held_out_loss(config, stored, unseen)
    write_json(args.out / "training.json", facts)
    print(json.dumps(facts), flush=True)

    if args.no_measure:
        return
    model = DemoModel(config, stored, tokenizer)
    facts["measured"] = measure(
        model, unseen, samples_per_prompt=args.samples_per_prompt, count=args.measure_count
    )
    write_json(args.out / "training.json", facts)
    print(json.dumps(facts, indent=2, ensure_ascii=False))
    for prompt, answer in sample_conversations(model, 12):
        print("-----", prompt[-300:], ">>>", answer, sep="\n")


if __name__ == "__main__":
    main()
