"""The demo's trained models, and how they were made."""
