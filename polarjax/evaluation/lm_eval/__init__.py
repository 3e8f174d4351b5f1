"""lm-evaluation-harness: its tasks, on this library's models."""
