"""What kinds of attention cost and lose on this machine, measured while a model samples, and the choice among them."""
