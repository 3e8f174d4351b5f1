"""Models that this project trains itself, to measure on trained weights."""
