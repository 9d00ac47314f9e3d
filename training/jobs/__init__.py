"""A whole training job, from a description to the result: for nodes and for processes of its own."""
