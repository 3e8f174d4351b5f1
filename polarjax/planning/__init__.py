"""What a step, a batch and a device cost: bytes, memory, links and times."""
