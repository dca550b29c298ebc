"""Studies: a declared protocol in, tables and figures out. One file a study."""
