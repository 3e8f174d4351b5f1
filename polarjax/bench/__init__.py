"""What `polarjax bench` times: decode steps and prefill, beside their floor."""
