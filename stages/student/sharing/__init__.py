"""A trained student as an ONNX file: writing it, running it."""
