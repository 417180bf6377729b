"""What a cache is on disk: schema, header, manifest, part records, encodings, and making a new one."""
