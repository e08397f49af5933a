"""Keras model files in HDF5, of any age."""
