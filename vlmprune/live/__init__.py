"""Everything that touches a running model: hooks, the cache, the reading of a prompt, the record of what happened."""
