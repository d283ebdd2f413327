"""One function per rule: files in, files out."""
