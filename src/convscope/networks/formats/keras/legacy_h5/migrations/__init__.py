"""Changes in the format of Keras files, and migrations of old configs."""
