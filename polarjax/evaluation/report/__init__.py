"""Results of evaluations as pages, tables and plots."""
