"""How images and text meet outside the text's own layers."""
