"""Stages 2 and 3: changes of weights join the maps, block by block and then end to end."""
