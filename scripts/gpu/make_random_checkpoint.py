"""Writes a Qwen3.5-shaped checkpoint with random weights, to measure and test without a download.

    python scripts/gpu/make_random_checkpoint.py --shape 4b --out /tmp/random-4b

Weights follow Hugging Face's initialisation, except A_log: memory half-lives are log-uniform from
1 to 4,096 tokens, because the usual draw forgets within a token and hides every state bug. The
tokenizer and the chat template are the demo model's, so the text it writes means nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from kiln_nn.config import ModelConfig
from kiln_nn.weights.names import TensorSpec, expected_tensors

DEMO_MODEL = Path(__file__).resolve().parents[2] / "demo" / "model"
SHARD_BYTES = 4 << 30

# hidden, intermediate, layers, (heads, kv heads), (key heads, value heads), tied
SHAPES = {
    "0.8b": (1024, 3584, 24, (8, 2), (16, 16), True),
    "4b": (2560, 9216, 32, (16, 4), (16, 32), True),
    "9b": (4096, 12288, 32, (16, 4), (16, 32), False),
}


def shape_config(name: str) -> dict[str, object]:
    """config.json of the named shape (figures of the published checkpoints)."""
    hidden, intermediate, num_layers, heads, linear_heads, tied = SHAPES[name]
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "vocab_size": 248_320,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="4b")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in (*DEMO_MODEL.glob("token*"), DEMO_MODEL / "chat_template.jinja"):
        shutil.copy(path, arguments.out)
    eos_id = json.loads((DEMO_MODEL / "config.json").read_text())["eos_token_id"]
    config = {**shape_config(arguments.shape), "eos_token_id": eos_id}
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2))

    shards: list[dict[str, torch.Tensor]] = [{}]
    num_bytes = 0
    for name, spec in expected_tensors(ModelConfig.from_dict(config), include_mtp=False).items():
        tensor = draw(name, spec, arguments.device).to(torch.bfloat16).cpu()
        if num_bytes + tensor.nbytes > SHARD_BYTES:
            shards.append({})
            num_bytes = 0
        shards[-1][name] = tensor
        num_bytes += tensor.nbytes
    weight_map = {}
    for index, shard in enumerate(shards, 1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, arguments.out / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    print(f"{len(weight_map)} tensors in {len(shards)} files under {arguments.out}")


if __name__ == "__main__":
    main()
