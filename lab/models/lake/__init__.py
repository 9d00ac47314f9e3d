"""How the image model and its autoencoder were made."""
