"""Files that survive a crash and may come from a stranger: durable writes, safe paths, strict JSON, locks."""
