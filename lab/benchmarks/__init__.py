"""How fast the kinds are and what memory they take, against what users would pick instead."""
