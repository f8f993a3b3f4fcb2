"""Text on both sides of token ids: chat template, tokenizer, detokenizer, reasoning and tool calls.

Needs the extra `kiln-common[text]` (jinja2, tokenizers); nothing here imports torch.
"""
