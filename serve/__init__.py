"""How it is used: sampling and text generation."""
