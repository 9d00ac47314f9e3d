"""What happens at an attention call while a model samples: the override, the decision, the backends, the record."""
