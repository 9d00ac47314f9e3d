"""Stages 0 and 1: feature maps, pooling weights and biases of means learn a model's own attention, site by site."""
