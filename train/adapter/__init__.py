"""Adapters: their weights, their frozen base, PEFT's layout: `python -m train.adapter`."""
