"""How tokens know where they stand."""
