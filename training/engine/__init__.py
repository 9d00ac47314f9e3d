"""A training run that survives kills: its recipe, loop, folder, results, workers, optimisers, losses, noise levels."""
