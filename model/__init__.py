"""What is computed: configuration, layers, attention, the decoder-only transformer and its cache."""
