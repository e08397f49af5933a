"""The three techniques: activations, filters and heatmaps. None imports another."""
