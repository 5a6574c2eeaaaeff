"""The best layout of an experiment on a topology: `python -m tpu.plan`."""
