"""What changed in the format of Keras files, and how old configs are brought up to date."""
