"""Stages 0 and 1: feature maps and pooling weights learn a model's own attention, site by site."""
