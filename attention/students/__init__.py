"""What a model learned, as files and in memory: tensors, specs, whether it fits a model."""
