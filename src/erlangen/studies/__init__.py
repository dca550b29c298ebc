"""Studies: a declared protocol in, tables and figures out. A file or folder a study."""
