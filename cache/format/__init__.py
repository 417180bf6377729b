"""Files of a cache: schema, header, manifest, part records, encodings, and creating a new one."""
