"""How the shipped workflows and blueprints are written from their API form."""
