"""The HTTP edge: OpenAI API, chat template, tokenizer, streaming, rollouts, training routes."""
