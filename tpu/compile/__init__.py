"""The real TPU compiler without a TPU, and what its programs cost: `python -m tpu.compile`."""
