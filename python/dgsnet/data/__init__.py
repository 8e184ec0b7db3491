"""Images, captions and tables: found, read, prepared and fed."""
