"""What the commands are called with: parsers, which load nothing of what does the work.

`polarjax --help` and a misspelt option are answered without jax.
"""
