"""Read annotation files into a Manifest: registered datasets, their readers, and detector proposals."""
