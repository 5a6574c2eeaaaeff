"""What is kept of a run, and how damage is found."""
