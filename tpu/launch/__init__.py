"""Commands that start runs on machines: `python -m tpu.launch`."""
