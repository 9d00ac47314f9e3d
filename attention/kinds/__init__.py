"""What each kind of attention computes: formulas in PyTorch, feature maps, the float64 reference."""
