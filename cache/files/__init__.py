"""Files that survive a crash and may come from someone else: durable writes, safe paths, strict JSON, locks."""
