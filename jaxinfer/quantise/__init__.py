"""Makes quantised models, layer by layer: see `layers.quantise_layers`."""

from jaxinfer.quantise.layers import Method, Statistics, quantise_layers, quantise_params

__all__ = ["Method", "Statistics", "quantise_layers", "quantise_params"]
