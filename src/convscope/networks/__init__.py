"""Opening models: whatever a user has becomes a `Network`."""

from convscope.networks.class_names import read_class_names
from convscope.networks.head import Head, Prediction
from convscope.networks.inputs import Inputs
from convscope.networks.installed import BACKENDS, choose_backend
from convscope.networks.layers import Layer
from convscope.networks.layouts import Layout, Tokens
from convscope.networks.network import Network, Source
from convscope.networks.opening import Named
from convscope.networks.passes import Pass, Record, Run
from convscope.networks.spec import ModelSpec, open_model

__all__ = [
    "BACKENDS",
    "Head",
    "Inputs",
    "Layer",
    "Layout",
    "ModelSpec",
    "Named",
    "Network",
    "Pass",
    "Prediction",
    "Record",
    "Run",
    "Source",
    "Tokens",
    "choose_backend",
    "open_model",
    "read_class_names",
]
