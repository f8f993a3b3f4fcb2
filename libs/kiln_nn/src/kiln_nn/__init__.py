"""The Qwen3.5 model shared by the engine and the trainer: weights, sharing, LoRA, blocks and kernels."""
