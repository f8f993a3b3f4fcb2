"""Seeded text for the demo model: conversations, their template, the tokenizer, packed documents."""
