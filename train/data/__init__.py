"""From records to packed batches: sources, tokenizers, packing, the Grain pipeline. No file here imports jax."""
