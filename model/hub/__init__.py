"""Hugging Face checkpoints in and out: `python -m model.hub`."""
