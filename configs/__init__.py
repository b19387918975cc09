"""The experiments that ship with advkd, one YAML file each; read by `advkd.pipeline.config`."""
