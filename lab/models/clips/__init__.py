"""How the video model was made."""
