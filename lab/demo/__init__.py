"""What `run.py demo` does."""
