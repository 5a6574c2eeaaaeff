"""Held-out figures and reports: `python -m train.evaluate`."""
