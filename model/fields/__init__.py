"""The fields of ModelConfig, in parts for their readers."""
