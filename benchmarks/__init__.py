"""What this repository measures: kernels, decode steps, and the models it trains."""
