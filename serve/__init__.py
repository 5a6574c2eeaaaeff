"""How it is used: text generation."""
