"""What is learned, from which rows, by which loss."""
