"""Writes a Qwen3.5-shaped checkpoint with random weights, to measure and test without a download.

    python scripts/gpu/make_random_checkpoint.py --shape 4b --out /tmp/random-4b [--spectrum trained]

Weights follow Hugging Face's initialisation, except A_log: memory half-lives are log-uniform from
1 to 4,096 tokens, because the usual draw forgets within a token and hides every state bug. The
tokenizer is the demo model's with made-up words for the other ids, so the text it writes means
nothing.

`--spectrum trained` gives the matrices what training does and quantising suffers from: singular values
that fall by a power law, heavy tails, and norms that make a few input channels far larger than others.
The final norm makes the next token's entropy about two nats.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kiln_nn.config import ModelConfig
from kiln_nn.weights.names import TensorSpec, expected_tensors

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
SHARD_BYTES = 4 << 30

# hidden, intermediate, layers, (heads, kv heads), (key heads, value heads), tied, vocabulary
SHAPES = {
    "0.8b": (1024, 3584, 24, (8, 2), (16, 16), True, 248_320),
    "4b": (2560, 9216, 32, (16, 4), (16, 32), True, 248_320),
    "9b": (4096, 12288, 32, (16, 4), (16, 32), False, 248_320),
    # The 4B's layers, few of them and with few words, for tools that slow everything down.
    "4b-short": (2560, 9216, 4, (16, 4), (16, 32), True, 5003),
}


def shape_config(name: str) -> dict[str, object]:
    """config.json of the named shape (figures of the published checkpoints)."""
    hidden, intermediate, num_layers, heads, linear_heads, tied, vocab = SHAPES[name]
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 256,
        "linear_num_key_heads": linear_heads[0],
        "linear_num_value_heads": linear_heads[1],
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "max_position_embeddings": 262_144,
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        "tie_word_embeddings": tied,
        "layer_types": [
            "full_attention" if index % 4 == 3 else "linear_attention" for index in range(num_layers)
        ],
        "mtp_num_hidden_layers": 0,
        "torch_dtype": "bfloat16",
    }


_ENDS_OF_BRANCHES = ("o_proj.weight", "out_proj.weight", "down_proj.weight")


def draw_trained(name: str, spec: TensorSpec, device: str) -> torch.Tensor:
    """One tensor with the spectrum and the outliers of a trained model; others as `draw`."""
    if name == "model.norm.weight":
        # Logits of standard deviation 4.6: of V normal ones the entropy is about log V - 4.6^2 / 2.
        return torch.full(spec.shape, 3.6, device=device)
    if name.endswith("layernorm.weight"):
        # Most channels near one, one in two hundred eight times as large: so are the layers' inputs.
        large = torch.rand(spec.shape, device=device) < 0.005
        return torch.where(large, 8.0, 1.0) * torch.exp(0.3 * torch.randn(spec.shape, device=device)) - 1
    if not name.endswith("proj.weight") and "in_proj" not in name:
        return draw(name, spec, device)
    num_outputs, num_inputs = spec.shape
    rank = min(spec.shape)
    falling = torch.arange(1, rank + 1, device=device, dtype=torch.float32) ** -0.6
    left = torch.randn(num_outputs, rank, device=device) * falling
    weight = left @ torch.randn(rank, num_inputs, device=device)
    # Student's t with five degrees of freedom: the tails of single weights.
    tails = torch.distributions.StudentT(torch.tensor(5.0, device=device)).sample(spec.shape)
    channels = torch.exp(0.2 * torch.randn(num_inputs, device=device))
    weight = (weight / weight.std() + 0.5 * tails) * channels
    weight *= 0.02 / weight.std()
    if name.endswith(_ENDS_OF_BRANCHES) and not name.startswith("model.layers.0."):
        # Behind the first layer, which turns tokens into something else, a layer adds about an eighth of
        # what it finds. A random model whose layers add all of it is chaotic: it answers any rounding with
        # another text.
        weight /= 8
    return weight


def draw(name: str, spec: TensorSpec, device: str) -> torch.Tensor:
    """One tensor as a fresh model would have it."""
    if name.endswith(".A_log"):
        # g = -exp(A_log) * softplus(a + dt_bias); at a = 0 and dt_bias = 0 the factor is log 2.
        half_lives = torch.exp(torch.rand(spec.shape, device=device) * math.log(4096))
        return torch.log(1.0 / half_lives)
    if name.endswith("dt_bias"):
        return torch.zeros(spec.shape, device=device)
    if name.endswith("linear_attn.norm.weight"):
        return torch.ones(spec.shape, device=device)
    if name.endswith("norm.weight"):  # multiplied as 1 + w
        return torch.zeros(spec.shape, device=device)
    return torch.randn(spec.shape, device=device) * 0.02


SPECTRA = {"fresh": draw, "trained": draw_trained}


def write_checkpoint(
    folder: Path, shape: str, seed: int, device: str, spectrum: str = "fresh", *, has_mtp: bool = False
) -> int:
    """Draw the weights on `device` and write everything a service needs; returns how many tensors.

    What is there already is left as it is when its config.json, which is written last, is the same.
    """
    eos_id = json.loads((DEMO_MODEL / "config.json").read_text())["eos_token_id"]
    config = {**shape_config(shape), "eos_token_id": eos_id, "kiln_random_seed": seed}
    if spectrum != "fresh":
        config["kiln_random_spectrum"] = spectrum
    if has_mtp:
        config["mtp_num_hidden_layers"] = 1
    specs = expected_tensors(ModelConfig.from_dict(config), include_mtp=has_mtp)
    config_path = folder / "config.json"
    if config_path.exists() and json.loads(config_path.read_text()) == config:
        return len(specs)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO_MODEL / name, folder)
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(config["vocab_size"])))

    torch.manual_seed(seed)
    shards: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    for name, spec in specs.items():
        tensor = SPECTRA[spectrum](name, spec, device).to(torch.bfloat16).cpu()
        if num_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    # transformers reads the size too.
    total_size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config_path.write_text(json.dumps(config, indent=2))
    return len(specs)


def _tokenizer(vocab_size: Any) -> dict[str, Any]:
    """The demo model's tokenizer with made-up words for every further id, so that all of them are text."""
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    for token_id in range(len(vocab), vocab_size):
        vocab[f"\u0120w{token_id}"] = token_id
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--spectrum", choices=sorted(SPECTRA), default="fresh")
    parser.add_argument("--mtp", action="store_true", help="with the layer that predicts a token further")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    num_tensors = write_checkpoint(
        arguments.out,
        arguments.shape,
        arguments.seed,
        arguments.device,
        arguments.spectrum,
        has_mtp=arguments.mtp,
    )
    print(f"{num_tensors} tensors under {arguments.out}")


if __name__ == "__main__":
    main()
