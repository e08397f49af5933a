"""Keras' files: .keras, HDF5 of any age."""
