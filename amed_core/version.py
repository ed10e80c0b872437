"""The version of this package, which predictor files carry."""

__version__ = "0.1.0"
