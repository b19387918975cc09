"""A trained student outside its run: provenance, model cards, ONNX files."""
