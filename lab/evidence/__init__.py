"""How well the kinds work and what each stage of training gains, on two small teachers."""
