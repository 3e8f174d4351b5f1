"""What the engine promises, measured: one function for each promise."""
