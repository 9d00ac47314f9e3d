"""Which attention each site runs: what it costs, and the choice under a budget."""
