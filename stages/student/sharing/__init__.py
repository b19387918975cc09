"""A trained student elsewhere: the Hub, ONNX, model cards, provenance."""
