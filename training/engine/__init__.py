"""A training run that survives kills: recipe, loop, folder, results, workers, optimisers, losses."""
